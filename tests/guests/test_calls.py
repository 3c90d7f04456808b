"""The call queue, and what cancellation means."""

from uuid import UUID

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from guests import Guest, MemoryResult, Supplicant, TeeError, Temporary, Value, boot
from guests.calls import CallQueue
from hv_models.conduit import ConduitClosed
from hv_models.memory import PAGE_SIZE
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, Registers, ReturnCode
from tests.guests.secure import ASK_SLEEP, Ask, SecureSide, Steps, make_ram

TA = UUID(int=1)


def sleeps(side: SecureSide, message: Message) -> Steps:
    if message.cmd == Command.INVOKE_COMMAND:
        yield ASK_SLEEP
    return Result.SUCCESS, Origin.TRUSTED_APP


def refusals(side: SecureSide) -> int:
    return sum("ETHREAD_LIMIT" in line for line in side.log)


@pytest.mark.parametrize("callers", [2, 3, 9])
async def test_a_refused_call_is_tried_again_only_after_one_of_ours_ended(
    callers: int, autojump_clock: MockClock
) -> None:
    side = SecureSide(make_ram(), threads=1, default=sleeps)
    async with boot(side.ram, side, vcpus=callers) as guest:
        session = (await guest.driver.open_session(TA)).session
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(callers):
                nursery.start_soon(guest.driver.invoke, session, 0)
            await wait_all_tasks_blocked()
            assert refusals(side) == guest.driver.statistics().waiting_for_thread == callers - 1
            await trio.sleep(0.05)
            assert refusals(side) == callers - 1, "tried again although nothing had ended"
        assert trio.current_time() - start == pytest.approx(callers * 0.1)
        assert refusals(side) == callers - 1, "each end lets exactly one caller try again"


async def test_an_end_between_refusal_and_its_arrival_is_not_missed() -> None:
    """The refusal is on its way while the only call in flight ends: nothing would wake the caller later."""

    class Late(SecureSide):
        async def call(self, vcpu: int, regs: Registers) -> Registers:
            answer = await super().call(vcpu, regs)
            if answer[0] == ReturnCode.ETHREAD_LIMIT:
                hold.set()
                await ended.wait()
            return answer

    hold, ended = trio.Event(), trio.Event()
    side = Late(make_ram(), threads=1, default=sleeps)
    async with boot(side.ram, side) as guest:
        session = (await guest.driver.open_session(TA)).session

        async def first() -> None:
            await guest.driver.invoke(session, 0)
            ended.set()

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first)
                await wait_all_tasks_blocked()
                nursery.start_soon(guest.driver.invoke, session, 0)
                await hold.wait()
        assert refusals(side) == 1


async def test_the_queue_is_first_come_first_served() -> None:
    queue, order = CallQueue(), []

    async def wait(number: int) -> None:
        await queue.wait(queue.completed)
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(wait, number)
            await wait_all_tasks_blocked()
        for _ in range(4):
            queue.complete()
            await wait_all_tasks_blocked()
    assert order == [0, 1, 2, 3]


async def test_cancelled_while_waiting_for_a_thread(autojump_clock: MockClock) -> None:
    side = SecureSide(make_ram(), threads=1, default=sleeps)
    async with boot(side.ram, side) as guest, guest.context() as context:
        first, second = [await context.open_session(TA) for _ in range(2)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.invoke, 0)
            await wait_all_tasks_blocked()
            before = len(side.log)
            with trio.move_on_after(0.01) as scope:
                await second.invoke(0)
            assert scope.cancelled_caught
            assert side.log[before:] == ["CALL_WITH_REGD_ARG INVOKE_COMMAND [0 0 0 0] ETHREAD_LIMIT"]
        assert await second.invoke(0) == ()
        before = guest.driver.statistics().pages_used
    assert side.idle or before


async def test_a_signal_ends_a_sleep_and_the_call_goes_to_its_end(autojump_clock: MockClock) -> None:
    side = SecureSide(make_ram(), default=sleeps)
    async with boot(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        start = trio.current_time()
        with trio.move_on_after(0.02) as scope:
            assert await session.invoke(0, Temporary(b"some data")) == (MemoryResult(9, b"some data"),)
            await session.invoke(0)
        assert scope.cancelled_caught
        assert trio.current_time() - start == pytest.approx(0.02)
        assert not any(side.slots)
        assert side.log[-1] == "CALL_WITH_RPC_ARG UNREGISTER_SHM [5]"
        assert len(side.shared) == 1  # the argument page
        assert await session.invoke(0) == ()
    assert guest.driver.allocator.used == 0


async def test_a_signal_does_not_end_a_notification_wait(autojump_clock: MockClock) -> None:
    def contended(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            yield Ask(RpcCommand.NOTIFICATION, [Param(ParamType.VALUE_INPUT, message.func, 64)])
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), tas={TA: contended})
    async with boot(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)

        async def wake() -> None:
            await trio.sleep(1)
            await guest.driver.invoke(session.identifier, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wake)
            start = trio.current_time()
            with trio.move_on_after(0.1):
                assert await session.invoke(0) == ()
            assert trio.current_time() - start == pytest.approx(1)
        assert not any(side.slots)


async def test_cancelling_the_guest_is_a_power_cut(autojump_clock: MockClock) -> None:
    def never(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            yield Ask(RpcCommand.NOTIFICATION, [Param(ParamType.VALUE_INPUT, 0, 64)])
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), tas={TA: never})

    async def process(guest: Guest) -> None:
        async with guest.context() as context:
            await (await context.open_session(TA)).invoke(0, Temporary(b"data"))

    with trio.move_on_after(1) as scope:
        async with boot(side.ram, side) as guest, trio.open_nursery() as nursery:
            nursery.start_soon(process, guest)
            nursery.start_soon(process, guest)
            await wait_all_tasks_blocked()
            before = len(side.log)
    assert scope.cancelled_caught
    assert side.log[before:] == [], "nothing is sent after the power is gone"


async def test_nothing_is_sent_after_the_block_failed() -> None:
    side = SecureSide(make_ram())
    with pytest.raises(KeyError, match="ours"):
        async with boot(side.ram, side):
            before = len(side.log)
            raise KeyError("ours")
    assert side.log[before:] == []


async def test_a_conduit_that_closes_ends_the_caller() -> None:
    class Closing(SecureSide):
        closed = False

        async def call(self, vcpu: int, regs: Registers) -> Registers:
            if self.closed:
                raise ConduitClosed
            return await super().call(vcpu, regs)

    side = Closing(make_ram())
    with pytest.raises(ConduitClosed):
        async with boot(side.ram, side) as guest, guest.context() as context:
            session = await context.open_session(TA)
            side.closed = True
            await session.invoke(0)


async def test_cancelled_before_the_smc_costs_nothing() -> None:
    """A conduit may be cancelled as long as it has not executed the SMC; a begun call is resumed all the same."""

    class Checks(SecureSide):
        async def call(self, vcpu: int, regs: Registers) -> Registers:
            if regs[0] == Function.RETURN_FROM_RPC and not self.cancelled:
                self.cancelled = True
                scope.cancel()
            await trio.lowlevel.checkpoint_if_cancelled()
            return await super().call(vcpu, regs)

        cancelled = True

    def asks(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            for _ in range(3):
                yield Ask(RpcCommand.GET_TIME, [Param(ParamType.VALUE_OUTPUT)])
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = Checks(make_ram(), default=asks)
    async with boot(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        side.cancelled = False
        with trio.CancelScope() as scope:
            assert await session.invoke(0) == ()
        assert side.cancelled and not any(side.slots)
        with trio.CancelScope() as scope:
            scope.cancel()
            before = len(side.log)
            await session.invoke(0, Value(1))
        assert scope.cancelled_caught and side.log[before:] == []
    assert side.idle and guest.driver.allocator.used == 0


async def test_memory_of_a_cancelled_process_is_unregistered() -> None:
    """Even where the conduit lets no call of a cancelled task through."""

    class Checks(SecureSide):
        async def call(self, vcpu: int, regs: Registers) -> Registers:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await super().call(vcpu, regs)

    side = Checks(make_ram())
    async with boot(side.ram, side) as guest, guest.context() as context:
        used = guest.driver.allocator.used
        memory = await context.allocate(3 * PAGE_SIZE)
        with trio.CancelScope() as scope:
            scope.cancel()
            await memory.release()
        assert not scope.cancelled_caught
        assert guest.driver.allocator.used == used
    assert side.idle and guest.driver.allocator.used == 0


async def test_a_request_waits_for_a_supplicant_and_a_signal_ends_that(autojump_clock: MockClock) -> None:
    answers: list[int] = []

    def loads(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.OPEN_SESSION and message.params[0].a == 1 << 56:
            reply = yield Ask(RpcCommand.LOAD_TA, [Param(ParamType.VALUE_INPUT), Param(ParamType.TMEM_OUTPUT)])
            answers.append(reply.ret)
            return reply.ret, Origin.TEE
        return Result.SUCCESS, Origin.TRUSTED_APP

    ta = UUID(bytes=bytes(7) + b"\1" + bytes(8))
    side = SecureSide(make_ram(), default=loads)
    async with boot(side.ram, side) as guest, guest.context() as context:
        with trio.move_on_after(3) as scope:
            with pytest.raises(TeeError, match="COMMUNICATION"):
                await context.open_session(ta)
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught and answers == [Result.COMMUNICATION]
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def late() -> None:
                with pytest.raises(TeeError) as refused:
                    await context.open_session(ta)
                assert refused.value.result == Result.ITEM_NOT_FOUND

            await wait_all_tasks_blocked()
            assert answers == [Result.COMMUNICATION]
            await guest.driver.start_supplicant(Supplicant())
    assert side.idle and guest.driver.allocator.used == 0


async def test_a_session_that_was_opened_for_a_killed_process_is_closed(autojump_clock: MockClock) -> None:
    def slow_to_open(side: SecureSide, message: Message) -> Steps:
        yield ASK_SLEEP
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), tas={TA: slow_to_open})
    async with boot(side.ram, side) as guest:
        with trio.move_on_after(0.05) as scope:
            async with guest.context() as context:
                await context.open_session(TA)
                assert len(side.sessions) == 1
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught and side.sessions == {}
