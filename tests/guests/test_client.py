"""The client API: parameters of every kind, shared memory, sessions, cancellation, the pool."""

from dataclasses import dataclass, field
from uuid import UUID, uuid5

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

import guests
from guests import (
    Direction,
    MemoryResult,
    Null,
    Partial,
    RegistrationError,
    TeeError,
    Temporary,
    Value,
    Values,
    Whole,
)
from guests.pool import PoolFullError, SessionPool
from hv_models.memory import PAGE_SIZE
from optee.abi.message import Command, Login, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.smc import SecCapability
from tests.guests.secure import (
    ASK_SLEEP,
    RPC_ARG_CAPABILITIES,
    XEN_CAPABILITIES,
    SecureSide,
    Steps,
    make_ram,
)

TA = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")
NULL_KINDS = {ParamType.TMEM_INPUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT}
INPUT, OUTPUT, INOUT = Direction.INPUT, Direction.OUTPUT, Direction.INOUT
both = pytest.mark.parametrize("capabilities", [RPC_ARG_CAPABILITIES, XEN_CAPABILITIES])


@dataclass
class Mirror:
    """A TA that inverts what it gets, and remembers what it saw. `grow` is added to each size it sets."""

    messages: list[list[Param]] = field(default_factory=list)
    seen: list[bytes | None] = field(default_factory=list)
    ret: int = Result.SUCCESS
    grow: int = 0

    def __call__(self, side: SecureSide, message: Message) -> Steps:
        self.messages.append(list(message.params))
        if message.cmd != Command.INVOKE_COMMAND:
            return Result.SUCCESS, Origin.TRUSTED_APP
        self.seen.clear()
        for index, (attr, a, b, c) in enumerate(message.params):
            if attr in (ParamType.VALUE_INOUT, ParamType.VALUE_OUTPUT):
                message.params[index] = Param(attr, ~a & 0xFFFFFFFF, ~b & 0xFFFFFFFF)
            elif ParamType.RMEM_INPUT <= attr <= ParamType.RMEM_INOUT:
                data = side.bytes_of(side.shared[c], a, b)
                self.seen.append(data)
                if attr != ParamType.RMEM_INPUT:
                    side.put(side.shared[c], bytes(~byte & 0xFF for byte in data), a)
                    message.params[index] = Param(attr, a, b + self.grow, c)
            elif attr in NULL_KINDS:
                assert a == 0
                self.seen.append(None)
        return self.ret, Origin.TRUSTED_APP
        yield


def inverted(data: bytes) -> bytes:
    return bytes(~byte & 0xFF for byte in data)


@both
async def test_values(capabilities: SecCapability) -> None:
    side = SecureSide(make_ram(), capabilities, tas={TA: (ta := Mirror())})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        async with await context.open_session(TA) as session:
            outputs = await session.invoke(7, Value(1, 2, INPUT), None, Value(3, 4), Value(direction=OUTPUT))
            assert outputs == (
                Values(1, 2),
                None,
                Values(~3 & 0xFFFFFFFF, ~4 & 0xFFFFFFFF),
                Values(2**32 - 1, 2**32 - 1),
            )
            assert [param.attr for param in ta.messages[-1]] == [1, 0, 3, 2]
        assert [param.attr for param in ta.messages[0]] == [0x101, 0x101, 0, 0, 0, 0]
    assert side.idle and guest.driver.allocator.used == 0


@both
@given(
    data=st.binary(max_size=3 * PAGE_SIZE),
    size=st.integers(0, 2 * PAGE_SIZE),
    direction=st.sampled_from(Direction),
)
def test_temporary_memory(capabilities: SecCapability, data: bytes, size: int, direction: Direction) -> None:
    async def main() -> None:
        side = SecureSide(make_ram(64), capabilities, tas={TA: (ta := Mirror())})
        async with guests.open(side.ram, side) as guest, guest.context() as context:
            session = await context.open_session(TA)
            held = guest.driver.allocator.used
            (output,) = await session.invoke(0, Temporary(data, size, direction))
            length = max(len(data), size)
            whole = data.ljust(length, b"\0")
            assert ta.seen == [whole]
            assert output == MemoryResult(length, inverted(whole) if direction != INPUT else b"")
            assert guest.driver.allocator.used == held
        assert side.idle and guest.driver.allocator.used == 0

    trio.run(main)


@both
async def test_null_is_passed_as_such_where_op_tee_knows_it(capabilities: SecCapability) -> None:
    side = SecureSide(make_ram(), capabilities, tas={TA: (ta := Mirror())})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        before = len(side.log)
        assert await session.invoke(0, Null(), Null(5, INPUT)) == (MemoryResult(0), MemoryResult(5))
        assert ta.seen == [None, None] and ta.messages[-1][:2] == [Param(0xA), Param(0x9, 0, 5)]
        assert len(side.log) == before + 1


async def test_null_without_the_capability_is_a_buffer() -> None:
    side = SecureSide(make_ram(), SecCapability.DYNAMIC_SHM, tas={TA: (ta := Mirror())})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        assert await session.invoke(0, Null(), Value(1)) == (MemoryResult(0), Values(2**32 - 2, 2**32 - 1))
        assert ta.seen == [b""]
    assert side.idle and guest.driver.allocator.used == 0


@both
async def test_registered_memory_is_seen_and_changed_in_place(capabilities: SecCapability) -> None:
    side = SecureSide(make_ram(), capabilities, tas={TA: (ta := Mirror())})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        buffer = context.buffer(5000, 0xDF0)
        buffer.write(bytes(range(250)) * 20)
        original = buffer.read()
        async with await context.register(buffer) as memory:
            assert await session.invoke(0, Whole(memory)) == (MemoryResult(5000),)
            assert memory.read() == buffer.read() == inverted(original)
            assert await session.invoke(0, Partial(memory, 4000, 500, INPUT)) == (MemoryResult(500),)
            assert ta.seen == [inverted(original)[4000:4500]]
            assert await session.invoke(0, Partial(memory, 100, 7)) == (MemoryResult(7),)
            assert memory.read(99, 9) == inverted(original)[99:100] + original[100:107] + inverted(original)[107:108]
        context.free(buffer)
        async with await context.allocate(100, OUTPUT) as memory:
            assert memory.kernel_memory.buffer.offset == 0
            await session.invoke(0, Whole(memory))
            assert [param.attr for param in ta.messages[-1]] == [6, 0, 0, 0]
            assert memory.read() == b"\xff" * 100
    assert side.idle and guest.driver.allocator.used == 0


@pytest.mark.parametrize(
    ("offset", "size", "direction"),
    [(0, 101, INPUT), (100, 1, INPUT), (-1, 5, INPUT), (5, -1, INPUT), (0, 100, OUTPUT), (0, 100, INOUT)],
)
async def test_parts_that_the_library_refuses(offset: int, size: int, direction: Direction) -> None:
    side = SecureSide(make_ram())
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        memory = await context.allocate(100, INPUT)
        before = len(side.log)
        with pytest.raises(TeeError) as refused:
            await session.invoke(0, Partial(memory, offset, size, direction))
        assert (refused.value.result, refused.value.origin) == (Result.BAD_PARAMETERS, Origin.API)
        with pytest.raises(TeeError):
            await session.invoke(0, None, None, None, None, None)
        assert len(side.log) == before
        assert await session.invoke(0, Partial(memory, 100, 0, INPUT)) == (MemoryResult(0),)


async def test_the_same_memory_twice_has_two_names() -> None:
    side = SecureSide(make_ram())
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        buffer = context.buffer(PAGE_SIZE)
        first, second = await context.register(buffer), await context.register(buffer)
        assert first.kernel_memory.cookie != second.kernel_memory.cookie
        await first.release()
        await first.release()
        with pytest.raises(ValueError, match="released"):
            first.read()
        second.write(b"still there")
        await second.release()
        context.free(buffer)


async def test_short_buffer_says_what_it_needs() -> None:
    ta = Mirror(ret=Result.SHORT_BUFFER, grow=10_000)
    side = SecureSide(make_ram(), tas={TA: ta})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        with pytest.raises(TeeError, match="SHORT_BUFFER from TRUSTED_APP") as error:
            await session.invoke(0, Temporary(size=16, direction=OUTPUT))
        (output,) = error.value.outputs
        assert isinstance(output, MemoryResult) and output.size == 10_016


@both
async def test_refused_memory_is_out_of_memory_and_leaves_nothing(capabilities: SecCapability) -> None:
    side = SecureSide(make_ram(256), capabilities, max_pages=3)
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        held = guest.driver.statistics()
        small, large, huge = Temporary(b"x"), Temporary(size=3 * PAGE_SIZE), Temporary(size=1 << 22)
        for parameters in ([large], [small, large], [small, small, huge]):
            with pytest.raises(TeeError) as refused:
                await session.invoke(0, *parameters)
            assert (refused.value.result, refused.value.origin) == (Result.OUT_OF_MEMORY, Origin.API)
        assert isinstance(refused.value.__cause__, guests.OutOfGuestMemoryError)
        with pytest.raises(TeeError) as refused:
            await context.allocate(4 * PAGE_SIZE)
        cause = refused.value.__cause__
        assert isinstance(cause, RegistrationError) and cause.result == Result.OUT_OF_MEMORY
        now = guest.driver.statistics()
        assert (now.pages_used, now.shared_memory_objects) == (held.pages_used, held.shared_memory_objects)
        assert await session.invoke(0, small)


@pytest.mark.parametrize(
    ("login", "group", "client"),
    [
        (Login.PUBLIC, None, UUID(int=0)),
        (Login.USER, None, uuid5(UUID("58ac9ca0-2086-4683-a1b8-ec4bc08e01b6"), "uid=3e8")),
        (Login.GROUP, None, uuid5(UUID("58ac9ca0-2086-4683-a1b8-ec4bc08e01b6"), "gid=64")),
        (Login.GROUP, 27, uuid5(UUID("58ac9ca0-2086-4683-a1b8-ec4bc08e01b6"), "gid=1b")),
    ],
)
async def test_the_kernel_vouches_for_the_client(login: Login, group: int | None, client: UUID) -> None:
    side = SecureSide(make_ram(), tas={TA: (ta := Mirror())})
    async with guests.open(side.ram, side) as guest, guest.context(uid=1000, gid=100) as context:
        await context.open_session(TA, login=login, group=group)
        who = ta.messages[0][1]
        assert b"".join(word.to_bytes(8, "little") for word in who[1:3]) == client.bytes
        assert who.c == login


async def test_refused_session() -> None:
    def refuses(side: SecureSide, message: Message) -> Steps:
        return Result.ACCESS_DENIED, Origin.TRUSTED_APP
        yield

    side = SecureSide(make_ram(), tas={TA: refuses})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        with pytest.raises(TeeError, match="ACCESS_DENIED from TRUSTED_APP"):
            await context.open_session(TA, Temporary(b"credentials"))
    assert side.idle and guest.driver.allocator.used == 0


async def test_what_a_process_leaves_goes_in_linux_order() -> None:
    side = SecureSide(make_ram())
    async with guests.open(side.ram, side) as guest:
        context = guest.context()
        await context.open_session(TA)
        await context.allocate(100)
        await context.open_session(TA)
        side.log.clear()
        await context.close()
        assert side.log == [
            "CALL_WITH_RPC_ARG UNREGISTER_SHM [5]",
            "CALL_WITH_REGD_ARG CLOSE_SESSION []",
            "CALL_WITH_REGD_ARG CLOSE_SESSION []",
        ]
        await context.close()
        assert len(side.log) == 3
    assert side.idle and guest.driver.allocator.used == 0


async def test_cancellation_reaches_the_session(autojump_clock: MockClock) -> None:
    cancelled: list[int] = []

    def waits(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.CANCEL:
            cancelled.append(message.session)
        elif message.cmd == Command.INVOKE_COMMAND:
            while message.session not in cancelled:
                yield ASK_SLEEP
            return Result.CANCEL, Origin.TRUSTED_APP
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), tas={TA: waits})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        session = await context.open_session(TA)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def cancel() -> None:
                await trio.sleep(0.55)
                await session.request_cancellation()

            with pytest.raises(TeeError, match="CANCEL"):
                await session.invoke(0)
        assert cancelled == [session.identifier]
    assert side.idle


def sleeps(side: SecureSide, message: Message) -> Steps:
    if message.cmd == Command.INVOKE_COMMAND:
        yield ASK_SLEEP
        if message.func:
            return Result.TARGET_DEAD, Origin.TEE
    return Result.SUCCESS, Origin.TRUSTED_APP


async def test_pool_bounds_callers(autojump_clock: MockClock) -> None:
    side = SecureSide(make_ram(), threads=8, tas={TA: sleeps})
    outcomes: list[str] = []
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        pool = SessionPool(context, TA, limit=2, queue=3)

        async def call() -> None:
            try:
                await pool.invoke(0)
                outcomes.append("done")
            except PoolFullError:
                outcomes.append("full")

        start = trio.current_time()
        async with pool, trio.open_nursery() as nursery:
            for _ in range(7):
                nursery.start_soon(call)
        assert trio.current_time() - start == pytest.approx(0.3)
        assert sorted(outcomes) == ["done"] * 5 + ["full"] * 2
        assert outcomes[:2] == ["full"] * 2
        assert sum("OPEN_SESSION [101 101 0" in line for line in side.log) == 2
    assert side.idle


async def test_pool_keeps_its_interval(autojump_clock: MockClock) -> None:
    side = SecureSide(make_ram())
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        pool = SessionPool(context, TA, limit=4, queue=10, interval=0.25)
        start = trio.current_time()
        async with pool, trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(pool.invoke, 0)
        assert trio.current_time() - start == pytest.approx(1.0)


async def test_pool_replaces_a_dead_session(autojump_clock: MockClock) -> None:
    side = SecureSide(make_ram(), tas={TA: sleeps})
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        pool = SessionPool(context, TA, limit=1, queue=0)
        with pytest.raises(TeeError, match="TARGET_DEAD"):
            await pool.invoke(1)
        with trio.move_on_after(0.05):
            await pool.invoke(0)
        assert await pool.invoke(0) == ()
        await pool.close()
        assert sum("OPEN_SESSION [101 101 0" in line for line in side.log) == 2
    assert side.idle


@pytest.mark.parametrize(("limit", "queue", "interval"), [(0, 1, 0.0), (1, -1, 0.0), (1, 1, -1.0)])
async def test_pool_needs_sensible_bounds(limit: int, queue: int, interval: float) -> None:
    side = SecureSide(make_ram())
    async with guests.open(side.ram, side) as guest, guest.context() as context:
        with pytest.raises(ValueError, match="pool"):
            SessionPool(context, TA, limit=limit, queue=queue, interval=interval)
