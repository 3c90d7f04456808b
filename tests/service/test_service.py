"""At the conduit: what guests of both flavours see, and what reaches OP-TEE, with everything real in between."""

from collections.abc import Iterator

import pytest
import trio
import trio.testing

from hv_models.conduit import ConduitClosed, InProcessConduit
from hv_models.machine import Machine
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.steps import Event
from mediator.invariants import Checker
from mediator.policies import load_policy
from mediator.shell import NOTIFICATION_INTERRUPT, Service
from mediator.world import LocalSecureWorld
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.smc import API_UID, Function, Registers, ReturnCode, SecCapability, to_pair
from optee.config import Config
from optee.secure_world import SecureWorld

NOT_HANDLED = 2**64 - 1
OF_THE_HOST = (Function.VM_CREATED, Function.VM_DESTROYED)
FOREIGN_IDS = (0, 1, 2, 3, 4, 5, 0x7FFF, 0xFFFF, 0x10001, 0x10002, 1 << 32 | 1, 2**64 - 1)


class Board:
    """Four VMs, kvm and xen in turn, on one machine with OP-TEE."""

    def __init__(self, policy: str = "default", *, checked: bool = True, threads: int = 2, room: int = 8) -> None:
        self.machine = Machine()
        self.model = SecureWorld(self.machine.memory, Config(threads=threads, guests=room))
        self.world = LocalSecureWorld(self.machine, self.model)
        self.core = Mediator(load_policy(policy), self.world)
        self.checker = Checker(self.core, self.world, self.model.threads_held)
        self.events: list[Event] = []
        self.service = Service(self.checker if checked else self.core, self.world, self.events.append)
        self.model.on_notification = self.service.notify
        self.vms: list[VirtualMachine] = []
        self.conduits: list[InProcessConduit] = []

    async def start(self) -> "Board":
        assert await self.service.start()
        for number in range(4):
            create = self.machine.create_xen if number % 2 else self.machine.create_kvm
            vm = create(f"vm-{number}", 4 << 20)
            assert await self.service.add(vm)
            self.vms.append(vm)
            self.conduits.append(InProcessConduit(vm, self.service.mediate))
        self.world.inbox.clear()
        return self

    async def smc(self, vm: int, *regs: int, vcpu: int = 0) -> Registers:
        return await self.conduits[vm].call(vcpu, (*regs, *(0,) * (8 - len(regs))))

    async def message(self, vm: int, message: Message, page: int = 1, a7: int = 0) -> tuple[int, Message]:
        """CALL_WITH_ARG of a message in a page of the VM's; its a0, and the message then."""
        ram = self.vms[vm].ram[0]
        at = ram.base + page * 4096
        ram.write(at, message.pack())
        regs = await self.smc(vm, Function.CALL_WITH_ARG, *to_pair(at), 0, 0, 0, 0, a7)
        return regs[0], Message.unpack(ram.read(at, 4096))

    async def end(self) -> None:
        """Everything is given back, nothing was violated."""
        for vm in self.vms:
            assert await self.service.remove(vm)
        self.checker.scan()
        assert self.checker.violations == []
        assert self.machine.pins() == {vm.client_id: 0 for vm in self.vms}
        assert self.machine.pages.allocated == 0
        assert self.model.partitions() == ()


@pytest.fixture
def board(request: pytest.FixtureRequest) -> Iterator[Board]:
    made = Board(getattr(request, "param", "default"))
    yield made
    made.machine.close()


policies = pytest.mark.parametrize("board", ["default", "xen", "minimal"], indirect=True)


@policies
async def test_reserved_memory_is_offered_by_optee_and_never_by_us(board: Board) -> None:
    await board.start()
    for vm in range(4):
        for nsec in (0, 1, 2, 0xFFFFFFFF, 2**64 - 1):
            regs = await board.smc(vm, Function.EXCHANGE_CAPABILITIES, nsec)
            if regs[0] == ReturnCode.OK:
                assert not regs[1] & SecCapability.HAVE_RESERVED_SHM
                assert not regs[1] & SecCapability.VIRTUALIZATION
                assert regs[1] & SecCapability.DYNAMIC_SHM
        assert (await board.smc(vm, Function.EXCHANGE_CAPABILITIES))[0] == ReturnCode.OK
        assert (await board.smc(vm, Function.GET_SHM_CONFIG))[0] == ReturnCode.ENOTAVAIL
        assert board.service.seen[board.vms[vm].client_id].reserved_seen == 0
    assert board.world.reserved_offered == {vm.client_id for vm in board.vms}
    assert not any(function == Function.GET_SHM_CONFIG for function, _ in board.world.inbox)
    await board.end()


@policies
async def test_a7_is_the_callers_own_id_whatever_the_guest_puts_there(board: Board) -> None:
    await board.start()
    functions = sorted(board.core.policy.functions - {Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG})
    for vm in range(4):
        board.world.inbox.clear()
        for a7 in FOREIGN_IDS:
            for function in functions:
                await board.smc(vm, function, 0, 0, 0, 0, 0, 0, a7)
            a0, answer = await board.message(vm, Message(Command.CLOSE_SESSION, session=77), a7=a7)
            assert a0 == 0 and answer.ret == Result.ITEM_NOT_FOUND and answer.ret_origin == Origin.TEE
        assert {client for _, client in board.world.inbox} == {board.vms[vm].client_id}
        assert board.service.seen[board.vms[vm].client_id].forged > 0
    await board.end()


@policies
async def test_functions_that_are_not_allowed_never_reach_optee(board: Board) -> None:
    """The whole owner range around the known ids, both calling conventions."""
    await board.start()
    allowed = {int(function) for function in board.core.policy.functions}
    ids = [base + number for base in (0x3200_0000, 0xB200_0000, 0x7200_0000, 0xF200_0000) for number in range(0x40)]
    ids += [0xBF00_FF00 + number for number in range(0x10)]
    for vm in range(4):
        for function in ids:
            if function not in allowed:
                regs = await board.smc(vm, function, 1, 2, 3, 4, 5, 6, 7)
                assert regs == (NOT_HANDLED, 1, 2, 3, 4, 5, 6, 7), hex(function)
    assert not board.world.inbox
    assert board.model.partitions() == tuple(vm.client_id for vm in reversed(board.vms))
    denied = {event.vm for event in board.events if event.name == "call_denied"}
    assert denied == {vm.client_id for vm in board.vms}
    assert {event.level for event in board.events} <= {"debug", "info"}
    await board.end()


async def test_what_is_not_the_mediators_is_answered_by_the_hypervisor(board: Board) -> None:
    await board.start()
    for vm in range(4):
        assert (await board.smc(vm, 0x84000000))[0] != NOT_HANDLED  # PSCI_VERSION
        assert (await board.smc(vm, 0x8200_0000))[0] == NOT_HANDLED
    assert not board.world.inbox
    await board.end()


async def test_identities_come_through(board: Board) -> None:
    await board.start()
    for vm in range(4):
        assert (await board.smc(vm, Function.CALLS_UID))[:4] == API_UID
    await board.end()


async def test_no_address_of_the_host_is_seen_and_no_ipa_is_forwarded(board: Board) -> None:
    """Temporary memory of two pages: pinned, translated, and nothing of that in the guest's view."""
    await board.start()
    for vm in range(4):
        ram = board.vms[vm].ram[0]
        lists, first = ram.base + 8 * 4096, ram.base + 16 * 4096
        ram.write(lists, b"".join((first + number * 4096).to_bytes(8, "little") for number in range(2)))
        params = [Param(ParamType.TMEM_INOUT | 0x200, lists, 8192, 0x55)]
        _, answer = await board.message(vm, Message(Command.INVOKE_COMMAND, 0, 9, params=params))
        assert answer.params == params
        count = board.service.memories[board.vms[vm].client_id]
        assert (count.pages, count.identical) == (2, 0)
    await board.end()


async def test_a_vm_that_was_removed_is_not_handled_any_more(board: Board) -> None:
    await board.start()
    vm = board.vms[1]
    assert await board.service.remove(vm)
    assert (await board.smc(1, Function.CALLS_UID))[0] == NOT_HANDLED
    assert await board.service.remove(vm)  # again: nothing to do
    board.machine.destroy(vm)
    with pytest.raises(ConduitClosed):
        await board.smc(1, Function.CALLS_UID)
    assert (await board.smc(0, Function.CALLS_UID))[:4] == API_UID
    board.vms.remove(vm)
    await board.end()


async def test_a_vm_that_optee_has_no_room_for_is_refused() -> None:
    board = await Board(room=4).start()
    vm = board.machine.create_kvm("one-too-many", 1 << 20)
    assert not await board.service.add(vm)
    conduit = InProcessConduit(vm, board.service.mediate)
    assert (await conduit.call(0, (Function.CALLS_UID, *(0,) * 7)))[0] == NOT_HANDLED
    board.machine.destroy(vm)
    await board.end()


async def test_an_optee_without_virtualization_is_not_started() -> None:
    machine = Machine()
    model = SecureWorld(machine.memory, Config(virtualization=False))
    world = LocalSecureWorld(machine, model)
    assert not await Service(Mediator(load_policy("default"), world), world).start()
    machine.close()


# Notifications


async def test_notifications_reach_the_guests_that_enabled_them(board: Board) -> None:
    """OP-TEE has one interrupt and does not say whose: all that enabled it are told, no others."""
    await board.start()
    for vm in (0, 3):
        assert (await board.smc(vm, Function.ENABLE_ASYNC_NOTIF))[0] == ReturnCode.OK
    board.model.notify(board.vms[0].client_id, 7)
    assert [vm.acknowledge() for vm in board.vms] == [NOTIFICATION_INTERRUPT, None, None, NOTIFICATION_INTERRUPT]
    assert (await board.smc(0, Function.GET_ASYNC_NOTIF_VALUE))[:3] == (0, 7, 1)
    assert (await board.smc(3, Function.GET_ASYNC_NOTIF_VALUE))[:3] == (0, 0, 0)
    assert await board.service.remove(board.vms[3])
    board.model.notify(board.vms[0].client_id, 8)
    assert [vm.acknowledge() for vm in board.vms] == [NOTIFICATION_INTERRUPT, None, None, None]
    await board.end()


@pytest.mark.parametrize("board", ["xen", "minimal"], indirect=True)
async def test_no_notifications_where_the_policy_has_none(board: Board) -> None:
    await board.start()
    assert (await board.smc(0, Function.ENABLE_ASYNC_NOTIF))[0] == NOT_HANDLED
    board.model.notify(board.vms[0].client_id, 7)
    assert all(vm.acknowledge() is None for vm in board.vms)
    await board.end()


async def test_a_waiting_guest_gets_its_interrupt(board: Board) -> None:
    await board.start()
    await board.smc(0, Function.ENABLE_ASYNC_NOTIF)
    found: list[int] = []

    async def wait() -> None:
        found.append(await board.conduits[0].wait_for_interrupt())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert found == []
        board.model.notify(board.vms[0].client_id, 1)
    assert found == [NOTIFICATION_INTERRUPT]
    await board.end()


# Pausing, and dying in the middle


async def test_calls_of_a_paused_vm_wait_and_go_on(board: Board) -> None:
    """R28; nobody else has to do anything for that."""
    await board.start()
    client = board.vms[0].client_id
    answers: list[Registers] = []

    async def call(vcpu: int) -> None:
        answers.append(await board.smc(0, Function.CALLS_UID, vcpu=vcpu))

    assert board.service.pause(board.vms[0])
    async with trio.open_nursery() as nursery:
        for vcpu in (0, 1):
            nursery.start_soon(call, vcpu)
        await trio.testing.wait_all_tasks_blocked()
        assert answers == []
        assert not any(found == client for _, found in board.world.inbox)
        assert (await board.smc(1, Function.CALLS_UID))[:4] == API_UID
        await trio.testing.wait_all_tasks_blocked()
        assert answers == []
        assert board.service.resume(board.vms[0])
    assert [answer[:4] for answer in answers] == [API_UID, API_UID]
    await board.end()


async def test_a_paused_vm_that_is_removed_answers_its_waiting_calls(board: Board) -> None:
    await board.start()
    answers: list[Registers] = []

    async def call() -> None:
        answers.append(await board.smc(0, Function.CALLS_UID))

    assert board.service.pause(board.vms[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        assert await board.service.remove(board.vms[0])
    assert [answer[0] for answer in answers] == [NOT_HANDLED]
    await board.end()


async def test_a_cancelled_call_was_not_made_or_is_ended(board: Board) -> None:
    """A guest that is cut off while its call waits leaves nothing behind."""
    await board.start()
    assert board.service.pause(board.vms[0])
    with trio.move_on_after(0) as scope:
        await board.smc(0, Function.CALLS_UID)
    assert scope.cancelled_caught
    assert board.service.resume(board.vms[0])
    assert (await board.smc(0, Function.CALLS_UID))[:4] == API_UID
    await board.end()


async def test_a_vm_dies_with_a_suspended_call_and_its_memory_comes_back(board: Board) -> None:
    await board.start()
    board.model.interrupt_pending = lambda _: True
    first = board.vms[0]
    ram = first.ram[0]
    lists = ram.base + 8 * 4096
    ram.write(lists, (ram.base + 16 * 4096).to_bytes(8, "little"))
    param = Param(ParamType.TMEM_INOUT | 0x200, lists, 4096, 0x55)
    a0, _ = await board.message(0, Message(Command.INVOKE_COMMAND, 0, 9, params=[param]))
    assert a0 >> 16 == 0xFFFF
    assert first.pins == 1 and board.model.threads_held(first.client_id) == 1
    assert await board.service.remove(first)
    assert first.pins == 0 and board.model.threads_held(first.client_id) == 0
    await board.end()
