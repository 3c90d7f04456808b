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
from hv_models.link import Flavour
from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from hv_models.smccc import NOT_SUPPORTED
from hv_models.socket_conduit import open_conduit
from hv_models.vm import VirtualMachine
from mediator.board import NOTHING_LEFT, Board, images
from mediator.service.links import Ending, Link
from mediator.shell import NOTIFICATION_INTERRUPT
from optee.abi.smc import API_UID, Function, ReturnCode
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
