"""Both conduits, in process and by socket, are the same to a guest."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

import guests
from guests.workloads import Report, hello, shm
from hv_models.conduit import Conduit, ConduitClosed
from hv_models.link import FEATURES, Flavour, Request, close_all, interrupt, number, read_call
from hv_models.link import call as link_call
from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from hv_models.smccc import NOT_SUPPORTED
from hv_models.socket_conduit import SocketConduit, open_conduit
from hv_models.socket_link import SocketLink
from hv_models.vm import VirtualMachine
from mediator.board import NOTHING_LEFT, Board, images
from mediator.service.links import Ending, Link
from mediator.shell import NOTIFICATION_INTERRUPT
from optee.abi.smc import API_UID, Function, Registers, ReturnCode
from optee.tas.catalogue import BUILT_IN

RAM = 32 << 20
FLAVOURS = ["kvm", "xen"]


@asynccontextmanager
async def vm_by_socket(board: Board, flavour: str) -> AsyncIterator[tuple[VirtualMachine, GuestRam, Conduit]]:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ram = GuestRam(PageStore("guest", RAM // PAGE_SIZE), RAM_BASE)
    served = Link(board, ours)
    endings: list[Ending] = []

    async def serve() -> None:
        endings.append(await served.serve())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_conduit(theirs, Flavour[flavour.upper()], "by-socket", 2, [ram]) as conduit:
            assert served.vm is not None
            yield served.vm, ram, conduit
            await conduit.stop()
    assert endings == [Ending.FINISHED] and served.reason == ""
    assert not board.machine.vms


@asynccontextmanager
async def vm_in_process(board: Board, flavour: str) -> AsyncIterator[tuple[VirtualMachine, GuestRam, Conduit]]:
    vm = await board.create(flavour, ram=RAM)
    yield vm, vm.ram[0], board.conduit(vm)
    await board.destroy(vm)


@pytest.fixture(params=[vm_in_process, vm_by_socket], ids=["in process", "by socket"])
def make(request: pytest.FixtureRequest):
    return request.param


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_calls_reach_optee_and_others_the_hypervisor(make, flavour: str) -> None:
    async with Board() as board:
        async with make(board, flavour) as (vm, _, conduit):
            assert vm.hypervisor.name == flavour
            for vcpu in (0, 1):
                answer = await conduit.call(vcpu, (int(Function.CALLS_UID), 1, 2, 3, 4, 5, 6, 99))
                assert answer == (*API_UID, 4, 5, 6, 99)
            assert (await conduit.call(0, (0x8400_0000, *range(7))))[0] == 0x10001
            assert (await conduit.call(0, (0x8300_0001, *range(7)))) == (NOT_SUPPORTED, *range(7))
            assert (await conduit.call(0, (int(Function.VM_DESTROYED), *range(1, 8)))) == (NOT_SUPPORTED, *range(1, 8))
        assert board.left() == NOTHING_LEFT
    assert board.violations == []


@pytest.mark.parametrize("regs", [(), (1,) * 7, (1,) * 9, (-1, *(0,) * 7), (*(0,) * 7, 1 << 64)])
async def test_what_are_no_registers_is_an_error(make, regs) -> None:
    async with Board() as board, make(board, "kvm") as (_, _, conduit):
        with pytest.raises(ValueError, match="8 registers"):
            await conduit.call(0, regs)
        with pytest.raises(IndexError):
            await conduit.call(2, (int(Function.CALLS_UID), *(0,) * 7))


async def test_a_vcpu_does_one_call_at_a_time_and_two_vcpus_two(make) -> None:
    """While one vCPU's call waits, the other's is answered; nothing is lost when it goes on."""
    async with Board() as board, make(board, "kvm") as (vm, _, conduit):
        answered: list[int] = []

        async def call(vcpu: int) -> None:
            await conduit.call(vcpu, (int(Function.CALLS_UID), *(0,) * 7))
            answered.append(vcpu)

        step = board.core.pause(vm.client_id)
        assert step
        async with trio.open_nursery() as nursery:
            for vcpu in (0, 0, 1):
                nursery.start_soon(call, vcpu)
            await trio.testing.wait_all_tasks_blocked()
            assert answered == []
            assert board.core.resume(vm.client_id)
            board.service._changed.unpark_all()
        assert sorted(answered) == [0, 0, 1]


async def test_interrupts_wake_who_waits(make) -> None:
    async with Board() as board, make(board, "xen") as (vm, _, conduit):
        assert (await conduit.call(0, (int(Function.ENABLE_ASYNC_NOTIF), *(0,) * 7)))[0] == ReturnCode.OK
        async with trio.open_nursery() as nursery:
            taken: list[int] = []

            async def wait() -> None:
                taken.append(await conduit.wait_for_interrupt())

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert taken == []
            board.model.notify(vm.client_id, 5)
        assert taken == [NOTIFICATION_INTERRUPT]


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_a_whole_guest_runs(make, flavour: str) -> None:
    """Probe, sessions, TA loading by RPC, shared memory, unload: nothing is left, and no invariant is violated."""
    async with Board() as board:
        async with make(board, flavour) as (vm, ram, conduit):
            report = Report()
            method = guests.ConduitMethod(vm.hypervisor.conduit)
            supplicant = guests.Supplicant(images(*(ta for ta in BUILT_IN if not ta.is_pseudo)))
            async with guests.open(ram, conduit, vcpus=2, method=method, supplicant=supplicant) as guest:
                await hello(guest, report, rounds=3)
                await shm(guest, report, rounds=1)
            assert (report.errors, report.notes) == (0, [])
            assert report.invokes > 3
        assert board.left() == NOTHING_LEFT
    assert board.violations == []


async def test_nobody_to_answer_any_more(nursery: trio.Nursery) -> None:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with Board() as board:
        served = Link(board, ours)
        scope = trio.CancelScope()

        async def serve() -> None:
            with scope:
                await served.serve()

        nursery.start_soon(serve)
        ram = GuestRam(PageStore("guest", 16), RAM_BASE)
        async with open_conduit(theirs, Flavour.KVM, "orphan", 2, [ram]) as conduit:
            scope.cancel()
            with pytest.raises(ConduitClosed, match="the mediator ends"):
                await conduit.wait_for_interrupt()
            with pytest.raises(ConduitClosed, match="the mediator ends"):
                await conduit.call(0, (int(Function.CALLS_UID), *(0,) * 7))


# Who receives: whoever waits for an answer, and somebody else where nobody does


class ByHand:
    """The mediator's end of a link, record by record."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.link = SocketLink(sock)
        self.calls: list[tuple[int, Registers]] = []

    async def greet(self) -> None:
        for answer in (int(FEATURES), 0, 0, 0, 1):
            message = await self.link.receive()
            close_all(message.fds)
            await self.link.send(message.request, number(answer), reply=True)

    async def hear(self) -> None:
        message = await self.link.receive()
        assert message.request == Request.CALL
        self.calls.append(read_call(message))

    async def answer(self, vcpu: int) -> None:
        await self.link.send(Request.CALL, link_call(vcpu, (vcpu, *range(1, 8))), reply=True)


@pytest.fixture
async def by_hand() -> AsyncIterator[tuple[SocketConduit, ByHand]]:
    ours, theirs = trio.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ram = GuestRam(PageStore("guest", 16), RAM_BASE)
    mediator = ByHand(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mediator.greet)
        async with open_conduit(theirs, Flavour.KVM, "guest", 4, [ram]) as conduit:
            yield conduit, mediator
    mediator.link.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
async def test_answers_find_their_vcpus_in_any_order(
    by_hand: tuple[SocketConduit, ByHand], order: tuple[int, ...]
) -> None:
    conduit, mediator = by_hand
    found: dict[int, Registers] = {}

    async def call(vcpu: int) -> None:
        found[vcpu] = await conduit.call(vcpu, (int(Function.CALLS_UID), *(vcpu,) * 7))

    async with trio.open_nursery() as nursery:
        for vcpu in range(3):
            nursery.start_soon(call, vcpu)
            await mediator.hear()
        for vcpu in order:
            await mediator.answer(vcpu)
            await trio.testing.wait_all_tasks_blocked()
            assert vcpu in found
    assert found == {vcpu: (vcpu, *range(1, 8)) for vcpu in range(3)}
    assert sorted(vcpu for vcpu, _ in mediator.calls) == [0, 1, 2]


async def test_an_interrupt_comes_through_whoever_receives(by_hand: tuple[SocketConduit, ByHand]) -> None:
    conduit, mediator = by_hand
    for line in (40, 41):  # nobody calls
        await mediator.link.send(Request.INTERRUPT, interrupt(line))
        assert await conduit.wait_for_interrupt() == line
    async with trio.open_nursery() as nursery:  # somebody does
        nursery.start_soon(conduit.call, 0, (int(Function.CALLS_UID), *(0,) * 7))
        await mediator.hear()
        await mediator.link.send(Request.INTERRUPT, interrupt(42))
        assert await conduit.wait_for_interrupt() == 42
        await mediator.answer(0)
    await mediator.link.send(Request.INTERRUPT, interrupt(43))
    assert await conduit.wait_for_interrupt() == 43


@pytest.mark.parametrize("waits", [0, 1])
async def test_a_call_that_is_cancelled_still_takes_its_answer(
    by_hand: tuple[SocketConduit, ByHand], waits: int
) -> None:
    """The SMC was executed: its answer comes out first, whether the caller receives or waits for another who does."""
    conduit, mediator = by_hand
    found: list[Registers] = []
    scopes = [trio.CancelScope(), trio.CancelScope()]

    async def call(vcpu: int) -> None:
        with scopes[vcpu]:
            found.append(await conduit.call(vcpu, (int(Function.CALLS_UID), *(0,) * 7)))
            await trio.lowlevel.checkpoint()
            found.append(())

    async with trio.open_nursery() as nursery:
        for vcpu in range(2):
            nursery.start_soon(call, vcpu)
            await mediator.hear()
        scopes[waits].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        for vcpu in (0, 1):
            await mediator.answer(vcpu)
    assert len(found) == 3 and found.count(()) == 1


async def test_a_mediator_that_is_gone_ends_every_call(by_hand: tuple[SocketConduit, ByHand]) -> None:
    conduit, mediator = by_hand
    ended: list[int] = []

    async def call(vcpu: int) -> None:
        with pytest.raises(ConduitClosed):
            await conduit.call(vcpu, (int(Function.CALLS_UID), *(0,) * 7))
        ended.append(vcpu)

    async with trio.open_nursery() as nursery:
        for vcpu in range(4):
            nursery.start_soon(call, vcpu)
            await mediator.hear()
        mediator.link.close()
    assert sorted(ended) == [0, 1, 2, 3]
    with pytest.raises(ConduitClosed):
        await conduit.wait_for_interrupt()
