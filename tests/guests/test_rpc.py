"""Each RPC, answered as Linux answers it."""

from collections.abc import Callable
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from guests import Driver, Guest, KernelPanicError, MisbehavingSupplicant, Misbehaviour, Supplicant, boot
from guests.clock import BOOT_TIME
from hv_models.memory import PAGE_SIZE
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import NotificationOperation, RpcCommand, ShmType
from optee.abi.smc import Function, RpcReturn, SecCapability
from tests.guests.secure import (
    ASK_SLEEP,
    ASK_TIME,
    RPC_ARG_CAPABILITIES,
    XEN_CAPABILITIES,
    Ask,
    SecureSide,
    Steps,
    make_ram,
)

TA = UUID(int=1)
VALUE_IN, VALUE_OUT = ParamType.VALUE_INPUT, ParamType.VALUE_OUTPUT
both = pytest.mark.parametrize("capabilities", [RPC_ARG_CAPABILITIES, XEN_CAPABILITIES])


async def ask(
    capabilities: SecCapability, *asked: Ask, supplicant: Supplicant | None = None, pages: int = 256
) -> tuple[list[Message], SecureSide, Driver]:
    """Open a session to a TA that asks all that; return the replies."""
    replies: list[Message] = []

    def asks(side: SecureSide, message: Message) -> Steps:
        for one in asked:
            reply = yield one
            replies.append(reply)
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(pages), capabilities, tas={TA: asks})
    async with boot(side.ram, side) as guest:
        if supplicant is not None:
            await guest.driver.start_supplicant(supplicant)
        answer = await guest.driver.open_session(TA)
        assert answer.ret == Result.SUCCESS
        await guest.driver.close_session(answer.session)
    return replies, side, guest.driver


def shm_alloc(kind: int, size: int) -> Ask:
    return Ask(RpcCommand.SHM_ALLOC, [Param(VALUE_IN, kind, size, 8)])


@both
async def test_time_and_sleep_are_on_the_clock(capabilities: SecCapability, autojump_clock: MockClock) -> None:
    half = Ask(RpcCommand.SUSPEND, [Param(VALUE_IN, 1500)])
    replies, *_ = await ask(capabilities, ASK_TIME, half, ASK_TIME)
    assert [reply.ret for reply in replies] == [0, 0, 0]
    first, second = replies[0].params[0], replies[2].params[0]
    assert (first.attr, first.a, first.b) == (VALUE_OUT, BOOT_TIME, 0)
    assert (second.a, second.b) == (BOOT_TIME + 1, 500_000_000)


@both
@pytest.mark.parametrize(
    "asked",
    [
        Ask(RpcCommand.GET_TIME, []),
        Ask(RpcCommand.GET_TIME, [Param(VALUE_IN)]),
        Ask(RpcCommand.SUSPEND, [Param(VALUE_OUT, 1)]),
        Ask(RpcCommand.SUSPEND, [Param(VALUE_IN, 1), Param(VALUE_IN, 1)]),
        Ask(RpcCommand.NOTIFICATION, [Param(VALUE_OUT)]),
        Ask(RpcCommand.NOTIFICATION, [Param(VALUE_IN, 2, 64)]),
        Ask(RpcCommand.NOTIFICATION, [Param(VALUE_IN, NotificationOperation.WAIT, 256)]),
        Ask(RpcCommand.NOTIFICATION, [Param(VALUE_IN, NotificationOperation.SEND, 256)]),
        Ask(RpcCommand.SHM_ALLOC, []),
        Ask(RpcCommand.SHM_ALLOC, [Param(VALUE_OUT, 0, 4096)]),
        shm_alloc(ShmType.GLOBAL, 4096),
        Ask(RpcCommand.SHM_FREE, []),
        Ask(RpcCommand.SHM_FREE, [Param(VALUE_IN, ShmType.GLOBAL)]),
        Ask(RpcCommand.LOAD_TA, [Param(0x4)]),
    ],
)
async def test_malformed_requests(capabilities: SecCapability, asked: Ask) -> None:
    replies, side, driver = await ask(capabilities, asked, supplicant=Supplicant())
    assert [reply.ret for reply in replies] == [Result.BAD_PARAMETERS]
    assert side.idle and driver.allocator.used == 0


async def test_more_parameters_than_an_rpc_has() -> None:
    class Five(SecureSide):
        def _send(self, number, thread, asked):
            answer = super()._send(number, thread, asked)
            self.ram.write(thread.argument + 28, (5).to_bytes(4, "little"))
            return answer

        def _resume(self, regs):
            results.append(int.from_bytes(self.ram.read(self.slots[regs[3]].argument + 20, 4), "little"))
            self.ram.write(self.slots[regs[3]].argument + 28, bytes(4))
            return super()._resume(regs)

    def asks(side: SecureSide, message: Message) -> Steps:
        yield ASK_TIME
        return Result.SUCCESS, Origin.TRUSTED_APP

    results: list[int] = []
    side = Five(make_ram(), tas={TA: asks})
    async with boot(side.ram, side) as guest:
        await guest.driver.open_session(TA)
    assert results == [Result.BAD_PARAMETERS]


@both
async def test_notification_sent_before_it_is_waited_for(capabilities: SecCapability) -> None:
    send = Ask(RpcCommand.NOTIFICATION, [Param(VALUE_IN, NotificationOperation.SEND, 65)])
    wait = Ask(RpcCommand.NOTIFICATION, [Param(VALUE_IN, NotificationOperation.WAIT, 65)])
    with trio.fail_after(5):
        replies, *_ = await ask(capabilities, send, send, wait)
    assert [reply.ret for reply in replies] == [0, 0, 0]


@both
async def test_memory_of_the_kernel_is_named_by_address(capabilities: SecCapability) -> None:
    free: list[Ask] = []

    def asks(side: SecureSide, message: Message) -> Steps:
        reply = yield shm_alloc(ShmType.KERNEL, 2 * PAGE_SIZE + 1)
        param = reply.params[0]
        assert (reply.ret, param.attr, param.b) == (0, ParamType.TMEM_OUTPUT, 3 * PAGE_SIZE)
        assert param.a % PAGE_SIZE == 0 and param.c
        free.append(Ask(RpcCommand.SHM_FREE, [Param(VALUE_IN, ShmType.KERNEL, param.c)]))
        reply = yield free[0]
        assert reply.ret == 0
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), capabilities, tas={TA: asks})
    async with boot(side.ram, side) as guest:
        answer = await guest.driver.open_session(TA)
        await guest.driver.close_session(answer.session)
    assert free and side.idle and guest.driver.allocator.used == 0


@both
async def test_memory_of_the_supplicant_is_listed_and_never_registered(capabilities: SecCapability) -> None:
    sizes = [1, PAGE_SIZE, 600 * PAGE_SIZE]

    def asks(side: SecureSide, message: Message) -> Steps:
        cookies = []
        for size in sizes:
            reply = yield shm_alloc(ShmType.APPL, size)
            param = reply.params[0]
            assert (reply.ret, reply.ret_origin, param.attr, param.b) == (0, Origin.COMMS, 0x20A, size)
            listed = side.read_list(param)
            assert len(set(listed.pages)) == -(-size // PAGE_SIZE) and all(listed.pages)
            cookies.append(param.c)
        for cookie in cookies:
            reply = yield Ask(RpcCommand.SHM_FREE, [Param(VALUE_IN, ShmType.APPL, cookie)])
            assert reply.ret == 0
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(1024), capabilities, tas={TA: asks})
    async with boot(side.ram, side) as guest:
        await guest.driver.start_supplicant(Supplicant())
        answer = await guest.driver.open_session(TA)
        assert answer.ret == 0
        await guest.driver.close_session(answer.session)
        assert not any("REGISTER_SHM" in line for line in side.log[8:])
    assert side.idle and guest.driver.allocator.used == 0


@both
@pytest.mark.parametrize("kind", [ShmType.KERNEL, ShmType.APPL])
async def test_no_memory_left(capabilities: SecCapability, kind: ShmType) -> None:
    replies, side, driver = await ask(
        capabilities, shm_alloc(kind, 300 * PAGE_SIZE), supplicant=Supplicant(), pages=128
    )
    assert [reply.ret for reply in replies] == [Result.OUT_OF_MEMORY]
    assert side.idle and driver.allocator.used == 0


@pytest.mark.parametrize("misbehaviour", [Misbehaviour.REFUSE, Misbehaviour.NO_MEMORY, Misbehaviour.FORGED_MEMORY])
async def test_supplicant_gives_no_memory(misbehaviour: Misbehaviour) -> None:
    replies, _, driver = await ask(
        RPC_ARG_CAPABILITIES,
        shm_alloc(ShmType.APPL, PAGE_SIZE),
        supplicant=MisbehavingSupplicant(misbehaviour),
    )
    assert [reply.ret for reply in replies] == [Result.OUT_OF_MEMORY]
    assert driver.allocator.used == 0


async def test_supplicant_gives_less_memory_than_asked() -> None:
    replies, *_ = await ask(
        RPC_ARG_CAPABILITIES,
        shm_alloc(ShmType.APPL, 3 * PAGE_SIZE),
        supplicant=MisbehavingSupplicant(Misbehaviour.SMALL_MEMORY),
    )
    assert (replies[0].ret, replies[0].params[0].b) == (0, PAGE_SIZE)


@both
@pytest.mark.parametrize("attr", [ParamType.RMEM_OUTPUT, ParamType.TMEM_OUTPUT])
async def test_null_memory_comes_back_as_temporary(capabilities: SecCapability, attr: ParamType) -> None:
    image = b"x" * 5000
    uuid = UUID(int=5)
    words = [int.from_bytes(uuid.bytes[at : at + 8], "little") for at in (0, 8)]
    asked = Ask(RpcCommand.LOAD_TA, [Param(VALUE_IN, *words), Param(attr)])
    replies, *_ = await ask(capabilities, asked, supplicant=Supplicant({uuid: image}))
    assert (replies[0].ret, replies[0].ret_origin) == (0, Origin.COMMS)
    assert replies[0].params == [Param(VALUE_IN, *words), Param(ParamType.TMEM_OUTPUT, 0, len(image), 0)]


async def test_rpc_alloc_without_memory_is_answered_with_null() -> None:
    class Greedy(SecureSide):
        def _resume(self, regs):
            if self.slots[regs[3]].waiting == "ALLOC":
                answers.append(regs)
                self.slots[regs[3]].waiting = None
            return super()._resume(regs)

    def asks(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            yield ASK_TIME
        return Result.SUCCESS, Origin.TRUSTED_APP

    answers: list[tuple[int, ...]] = []
    side = Greedy(make_ram(64), XEN_CAPABILITIES, tas={TA: asks})
    async with boot(side.ram, side) as guest:
        session = (await guest.driver.open_session(TA)).session
        hoard = guest.driver.allocator.pages(guest.driver.allocator.free)
        await guest.driver.invoke(session, 0)
        guest.driver.allocator.release(hoard)
        await guest.driver.close_session(session)
    assert len(answers) == 1
    assert (answers[0][0], answers[0][1:3], answers[0][4:6]) == (Function.RETURN_FROM_RPC, (0, 0), (0, 0))


def forge(function: int, words: tuple[int, ...]) -> Callable[[SecureSide, Message], Steps]:
    def ta(side: SecureSide, message: Message) -> Steps:
        side.forged = (function, *words, 0)
        yield ASK_TIME
        return Result.SUCCESS, Origin.TRUSTED_APP

    return ta


class Forging(SecureSide):
    """Answers a yielding call with any registers."""

    def _send(self, number, thread, asked):
        return self.forged


@pytest.mark.parametrize("function", [RpcReturn.FREE, RpcReturn.CMD])
@pytest.mark.parametrize("cookie", [(0, 0), (0xFFFF0000, 0xDEAD0000)])
async def test_cookies_that_crash_linux(function: RpcReturn, cookie: tuple[int, int]) -> None:
    side = Forging(make_ram(), XEN_CAPABILITIES, tas={TA: forge(function, cookie)})
    with pytest.raises(KernelPanicError):
        async with boot(side.ram, side) as guest:
            await guest.driver.open_session(TA)


async def test_rpc_free_gives_the_page_back() -> None:
    class Uncached(SecureSide):
        """Frees the RPC argument at the end of each call, as OP-TEE does with its cache off."""

        def _step(self, number, reply):
            thread = self.slots[number]
            answer = super()._step(number, reply)
            if answer[0] == 0 and thread.cookie:
                self.cache.clear()
                self.slots[number] = thread
                thread.steps = iter(())
                thread.waiting = None
                self.frees += 1
                upper, lower = thread.cookie >> 32, thread.cookie & 0xFFFFFFFF
                thread.cookie = 0
                self.finished = True
                return RpcReturn.FREE, upper, lower, number
            return answer

        def _resume(self, regs):
            if self.finished:
                self.finished = False
                self.slots[regs[3]] = None
                return (0,)
            return super()._resume(regs)

        finished = False
        frees = 0

    def asks(side: SecureSide, message: Message) -> Steps:
        yield ASK_TIME
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = Uncached(make_ram(), XEN_CAPABILITIES, tas={TA: asks})
    async with boot(side.ram, side) as guest:
        before = guest.driver.allocator.used
        for _ in range(5):
            await guest.driver.open_session(TA)
        assert guest.driver.allocator.used == before and side.frees == 5


async def test_an_unknown_rpc_is_returned_from() -> None:
    class Odd(SecureSide):
        def _send(self, number, thread, asked):
            thread.waiting = None
            return 0xFFFF_00AA, 1, 2, number

    def asks(side: SecureSide, message: Message) -> Steps:
        yield ASK_SLEEP
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = Odd(make_ram(), tas={TA: asks})
    async with boot(side.ram, side) as guest:
        side.regs.clear()
        assert (await guest.driver.open_session(TA)).ret == Result.SUCCESS
        assert side.regs[1][:4] == (Function.RETURN_FROM_RPC, 1, 2, 0)


async def interrupts(guest: Guest, side: SecureSide, *values: int) -> None:
    side.notify(*values)
    await trio.testing.wait_all_tasks_blocked()


async def test_notifications_by_interrupt() -> None:
    def waits(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            yield Ask(RpcCommand.NOTIFICATION, [Param(VALUE_IN, NotificationOperation.WAIT, 7)])
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), tas={TA: waits})
    async with boot(side.ram, side) as guest:
        session = (await guest.driver.open_session(TA)).session
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.driver.invoke, session, 0)
            await trio.testing.wait_all_tasks_blocked()
            side.log.clear()
            await interrupts(guest, side, 0, 7)
        assert side.log.count("GET_ASYNC_NOTIF_VALUE") == 2
        assert side.log.count("CALL_WITH_REGD_ARG DO_BOTTOM_HALF []") == 1
        side.log.clear()
        await interrupts(guest, side)
        assert side.log == ["GET_ASYNC_NOTIF_VALUE"]
        await guest.driver.close_session(session)
    assert side.log[-2:] == ["CALL_WITH_REGD_ARG STOP_ASYNC_NOTIF []", "CALL_WITH_RPC_ARG UNREGISTER_SHM [5]"]


async def test_without_the_capability_no_interrupt_is_served() -> None:
    side = SecureSide(make_ram(), XEN_CAPABILITIES)
    async with boot(side.ram, side) as guest:
        await interrupts(guest, side, 0)
        assert "GET_ASYNC_NOTIF_VALUE" not in side.log
