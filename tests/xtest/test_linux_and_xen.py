"""Around OP-TEE: what Linux cannot bear, and what a guest sees of Xen's mediator, on whole boards."""

import pytest
import trio
from trio.testing import MockClock

from guests import Direction, Driver, Value
from guests.workloads.applications import EXERCISE, HELLO_WORLD, Exercise, HelloWorld
from hv_models.memory import PAGE_SIZE
from mediator.board import NOTHING_LEFT, Board
from optee.abi.message import NONCONTIG, Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.smc import Function, Registers, ReturnCode, RpcReturn, from_pair, to_pair
from optee.config import Config
from tests.guests.secure import RPC_ARG_CAPABILITIES, XEN_CAPABILITIES, SecureSide, make_ram

UNKNOWN = 0xABCDEF
KEPT = (0x1111, 0x2222, 0x3333)


class Answering(SecureSide):
    """Gives one function's calls a wrong answer, for ever."""

    def __init__(self, function: Function, status: int, capabilities: int) -> None:
        super().__init__(make_ram(), capabilities)
        self.wrong = {function: status}
        self.asked = 0

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        if regs[0] in self.wrong:
            self.asked += 1
            await trio.lowlevel.checkpoint()
            return (self.wrong[regs[0]], 0, 0, 0, 0, 0, 0, 0)
        return await super().call(vcpu, regs)


@pytest.mark.parametrize(
    ("function", "status", "capabilities", "asked"),
    [
        (Function.DISABLE_SHM_CACHE, ReturnCode.EBUSY, RPC_ARG_CAPABILITIES, 1),
        (Function.ENABLE_SHM_CACHE, ReturnCode.EBUSY, XEN_CAPABILITIES, 1),
        (Function.CALL_WITH_ARG, ReturnCode.ETHREAD_LIMIT, XEN_CAPABILITIES, 1),
        (Function.CALL_WITH_RPC_ARG, ReturnCode.ETHREAD_LIMIT, RPC_ARG_CAPABILITIES, 1),
    ],
)
async def test_wrong_answers_hang_linux(
    function: Function, status: int, capabilities: int, asked: int, autojump_clock: MockClock
) -> None:
    """With nothing of its own under way it waits for the end of a call that does not exist."""
    side = Answering(function, status, capabilities)
    with trio.move_on_after(1e6) as scope:
        await Driver(side.ram, side).probe()
    assert scope.cancelled_caught and side.asked == asked


async def test_a_shm_cache_without_end_makes_linux_ask_for_ever() -> None:
    side = Answering(Function.DISABLE_SHM_CACHE, ReturnCode.OK, XEN_CAPABILITIES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Driver(side.ram, side).probe)
        while side.asked < 1000:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


class Raw:
    """A guest without a driver: registers and RAM."""

    def __init__(self, board: Board, vm) -> None:
        self.conduit = board.conduit(vm)
        self.ram = vm.ram[0]
        self.at = self.ram.base + PAGE_SIZE

    async def smc(self, *regs: int) -> Registers:
        return await self.conduit.call(0, (*regs, *[0] * (8 - len(regs))))

    def put(self, message: Message) -> int:
        self.ram.write(self.at, message.pack())
        return self.at

    async def send(self, message: Message, *x3: int) -> Registers:
        return await self.smc(Function.CALL_WITH_ARG, *to_pair(self.put(message)), *x3)

    def message(self, params: int = 0) -> Message:
        return Message.unpack(self.ram.read(self.at, 32 + 32 * params))

    def share(self, pages: int, cookie: int) -> Message:
        entries = b"".join((self.ram.base + (16 + page) * PAGE_SIZE).to_bytes(8, "little") for page in range(pages))
        self.ram.write(self.ram.base + 2 * PAGE_SIZE, entries)
        at = self.ram.base + 2 * PAGE_SIZE
        return Message(
            Command.REGISTER_SHM, params=[Param(ParamType.TMEM_OUTPUT | NONCONTIG, at, pages * PAGE_SIZE, cookie)]
        )


def open_message(uuid) -> Message:
    halves = [int.from_bytes(uuid.bytes[at : at + 8], "little") for at in (0, 8)]
    return Message(Command.OPEN_SESSION, params=[Param(0x101, *halves), Param(0x101)])


async def test_under_xen_the_words_of_a_completed_call_are_the_guests_and_of_an_rpc_optees() -> None:
    async with Board("xen", Config(early_tas=frozenset())) as board:
        guest = Raw(board, await board.create("xen"))
        at = guest.put(open_message(HELLO_WORLD))
        before = guest.message(2)
        answer = await guest.smc(Function.CALL_WITH_ARG, *to_pair(at), KEPT[2])
        assert answer[:4] == (RpcReturn.ALLOC, 160, 0, 0)
        assert guest.message(2) == before  # written back at the end of the call, not at RPC returns
        while answer[0] != ReturnCode.OK:  # no memory for RPC arguments: the call ends
            assert answer[0] == RpcReturn.ALLOC
            answer = await guest.smc(Function.RETURN_FROM_RPC, 0, 0, answer[3])
        assert guest.message(2).ret == Result.OUT_OF_MEMORY
        answer = await guest.send(Message(Command.CLOSE_SESSION, session=5), KEPT[2])
        assert answer[:4] == (ReturnCode.OK, *to_pair(at), KEPT[2])
        assert (guest.message().ret, guest.message().ret_origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)


async def test_under_xen_the_seventeenth_buffer_and_130_pages_are_out_of_memory() -> None:
    async with Board("xen") as board:
        guest = Raw(board, await board.create("xen"))
        outcomes = []
        for pages, cookie in [(130, 99), (129, 1), *[(1, cookie) for cookie in range(2, 18)]]:
            answer = await guest.send(guest.share(pages, cookie))
            outcomes.append((answer[0], guest.message(1).ret, guest.message(1).ret_origin))
        refused = (ReturnCode.OK, Result.OUT_OF_MEMORY, Origin.COMMS)
        assert outcomes[0] == outcomes[-1] == refused
        assert {outcome[:2] for outcome in outcomes[1:-1]} == {(ReturnCode.OK, Result.SUCCESS)}


async def test_under_xen_the_cache_of_rpc_arguments_comes_back_by_cookie() -> None:
    """ENABLE_SHM_CACHE, calls with RPCs, and at unload each cookie once, until there is no more."""
    async with Board("xen", Config(early_tas=frozenset())) as board:
        vm = await board.create("xen")
        guest = Raw(board, vm)
        assert (await guest.smc(Function.ENABLE_SHM_CACHE))[0] == ReturnCode.OK
        cookie, page = 0x1234_5678_9ABC_DEF0, guest.ram.base + 8 * PAGE_SIZE
        answer = await guest.send(open_message(HELLO_WORLD))
        assert answer[0] == RpcReturn.ALLOC
        answer = await guest.smc(Function.RETURN_FROM_RPC, *to_pair(page), answer[3], *to_pair(cookie))
        while answer[0] == RpcReturn.CMD:
            assert from_pair(answer[1], answer[2]) == cookie
            answer = await guest.smc(Function.RETURN_FROM_RPC, *answer[1:4])  # `ret` of each stays GENERIC
        assert answer[0] == ReturnCode.OK
        freed = await guest.smc(Function.DISABLE_SHM_CACHE)
        assert freed[0] == ReturnCode.OK and (freed[1], freed[2] & 0xFFFFFFFF) == to_pair(cookie)
        assert freed[2] in (cookie, cookie & 0xFFFFFFFF)  # the whole cookie, as the reference has it, or its low half
        assert (await guest.smc(Function.DISABLE_SHM_CACHE))[0] == ReturnCode.ENOTAVAIL
        await board.destroy(vm)
        assert board.left() == NOTHING_LEFT
    assert board.violations == []


@pytest.mark.parametrize("flavour", ["kvm", "xen"])
async def test_an_interrupt_is_served_while_a_call_is_under_way(flavour: str, autojump_clock: MockClock) -> None:
    """GET_ASYNC_NOTIF_VALUE comes in the middle of other calls, and a bottom half is one more call."""
    async with Board() as board, board.guest(flavour) as guest, guest.context() as context:
        session = await context.open_session(EXERCISE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.invoke, Exercise.WAIT, Value(1000, 0, Direction.INPUT))
            await trio.sleep(0.1)
            (vm,) = board.machine.vms.values()
            calls = guest.driver.statistics().calls
            board.model.notify(vm.client_id, 0)
            await trio.sleep(0.1)
            assert guest.driver.statistics().calls == calls + 1
            assert board.model.threads_held(vm.client_id) == 1
    assert board.violations == []


@pytest.mark.parametrize("policy", ["default", "xen"])
async def test_a_long_call_comes_back_for_every_interrupt(policy: str) -> None:
    """What would freeze the vCPU: OP-TEE returns FOREIGN_INTR whenever the guest has an interrupt pending."""
    async with Board(policy) as board, board.guest("xen") as guest, guest.context() as context:
        async with await context.open_session(EXERCISE) as session:
            board.model.interrupt_pending = lambda _: True
            before = guest.driver.statistics().foreign_interrupts
            await session.invoke(6, Value(50, 0, Direction.INPUT))
            assert guest.driver.statistics().foreign_interrupts - before >= 50
        async with await context.open_session(HELLO_WORLD) as session:
            await session.invoke(HelloWorld.INC_VALUE, Value(1))
    assert board.violations == []
