"""Random client programs: what a process of a guest may do with the TEE Client API, and what must come of it."""

import hashlib
from collections.abc import Awaitable, Callable
from random import Random
from uuid import UUID

import trio
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from guests import (
    Context,
    Direction,
    Guest,
    MemoryResult,
    Null,
    Partial,
    Session,
    TeeError,
    Temporary,
    Value,
    Values,
    Whole,
)
from guests.workloads.applications import AES, HELLO_WORLD, INVOKE_TESTS, RANDOM, Aes, HelloWorld
from guests.workloads.applications import Random as RandomCommand
from optee.abi.results import Origin, Result
from optee.tas.concurrent import Concurrent
from optee.tas.exercise import ExerciseTa, KeepAliveTa, SingleInstanceTa, SingleSessionTa
from tests.xtest.cases import (
    CALL_OTHER,
    COUNT,
    DEAD,
    INPUT,
    MUTEX,
    OUTPUT,
    OVERRUN,
    PANIC,
    WAIT,
    count,
    fails,
    number,
)

RECURSE, ALLOCATE, COPY, REE_TIME, FAIL, COPY_THROUGH = 2, 3, 8, 10, 11, 12
MAX_OPERATIONS = 6
UNKNOWN_COMMAND = 0x7777
MEMORY_SIZES = (0, 1, 100, 4096, 4097, 20_000)


class Program:
    """One process: some sessions with its own instances, and operations whose results it knows beforehand."""

    def __init__(self, guest: Guest, context: Context, draw: Random) -> None:
        self.guest = guest
        self.context = context
        self.draw = draw

    async def run(self) -> None:
        for _ in range(self.draw.randint(1, MAX_OPERATIONS)):
            operation: Callable[[Program], Awaitable[None]] = self.draw.choice(OPERATIONS)
            await operation(self)

    async def increment(self) -> None:
        value = self.draw.randrange(1 << 32)
        async with await self.context.open_session(HELLO_WORLD) as session:
            for command, more in ((HelloWorld.INC_VALUE, 1), (HelloWorld.DEC_VALUE, -1)):
                expected = Values((value + more) % (1 << 32), 0)
                assert await session.invoke(command, Value(value)) == (expected,)

    async def counters(self) -> None:
        """Each session has its own instance, and one session's calls come one after the other."""
        sessions = [await self.context.open_session(ExerciseTa.uuid) for _ in range(2)]
        totals: list[int] = []

        async def add() -> None:
            totals.append(await count(sessions[0], 1))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(add)
        assert sorted(totals) == [1, 2, 3]
        assert await count(sessions[1], 9) == 9
        for session in sessions:
            await session.close()

    async def shared_counter(self) -> None:
        """One instance for the whole guest, in which other programs count, and which they let panic."""
        ta = self.draw.choice((SingleInstanceTa, SingleSessionTa, KeepAliveTa))
        try:
            async with await self.context.open_session(ta.uuid) as session:
                first = await count(session, 1)
                second = await count(session, 2)
                assert second >= first + 2 and (ta is not SingleSessionTa or (first, second) == (1, 3))
                if self.draw.random() < 0.2:
                    assert await fails(session.invoke(PANIC, number(1))) == DEAD
        except TeeError as error:
            busy = ta is SingleSessionTa and error.result == Result.BUSY
            assert (busy or (error.result, error.origin) == DEAD) and error.origin == Origin.TEE

    async def panic(self) -> None:
        session = await self.context.open_session(ExerciseTa.uuid)
        if self.draw.random() < 0.5:
            assert await fails(session.invoke(PANIC, number(self.draw.randrange(1 << 32)))) == DEAD
        else:
            assert await fails(session.invoke(OVERRUN, Temporary(bytes(65), direction=INPUT))) == DEAD
        assert await fails(session.invoke(COUNT, Value(1))) == DEAD
        await session.close()

    async def results(self) -> None:
        """A TA's own result comes back as it is, and so does what it does not know."""
        result = self.draw.choice((Result.GENERIC, Result.ACCESS_DENIED, 0x1234))
        async with await self.context.open_session(ExerciseTa.uuid) as session:
            assert await fails(session.invoke(FAIL, number(result))) == (result, Origin.TRUSTED_APP)
            unknown = await fails(session.invoke(UNKNOWN_COMMAND))
            assert unknown == (Result.BAD_PARAMETERS, Origin.TRUSTED_APP)
            wrong = await fails(session.invoke(COUNT, Temporary(b"a value is wanted")))
            assert wrong == (Result.BAD_PARAMETERS, Origin.TRUSTED_APP)
            assert await fails(session.invoke(ALLOCATE, number(1 << 20))) == (
                Result.OUT_OF_MEMORY,
                Origin.TRUSTED_APP,
            )

    async def absent(self) -> None:
        ta = UUID(int=self.draw.getrandbits(128))
        assert await fails(self.context.open_session(ta)) == (Result.ITEM_NOT_FOUND, Origin.TEE)

    async def wait(self) -> None:
        milliseconds = self.draw.randrange(500)
        began = trio.current_time()
        async with await self.context.open_session(ExerciseTa.uuid) as session:
            await session.invoke(WAIT, number(milliseconds))
        assert trio.current_time() >= began + milliseconds / 1000 - 1e-6

    async def cancelled_wait(self) -> None:
        """Cancelled in time it ends with CANCEL; the request may come too early or too late."""
        session = await self.context.open_session(ExerciseTa.uuid)
        ends: list[tuple[int, int]] = []

        async def sleeper() -> None:
            try:
                await session.invoke(WAIT, number(300, 1))
            except TeeError as error:
                ends.append((error.result, error.origin))
            else:
                ends.append((Result.SUCCESS, Origin.TRUSTED_APP))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await trio.sleep(self.draw.random() / 5)
            await session.request_cancellation()
        assert ends[0] in ((Result.CANCEL, Origin.TRUSTED_APP), (Result.SUCCESS, Origin.TRUSTED_APP))
        await session.close()

    async def killed(self) -> None:
        """A process that is killed in its work leaves nothing."""
        with trio.move_on_after(self.draw.random() / 5):
            async with (
                self.guest.context() as context,
                await context.open_session(ExerciseTa.uuid) as session,
                await context.allocate(8192) as memory,
            ):
                await session.invoke(WAIT, number(self.draw.randrange(400)))
                await self._copy(session, memory)

    async def copy(self) -> None:
        async with await self.context.open_session(ExerciseTa.uuid) as session:
            for _ in range(self.draw.randint(1, 3)):
                size = self.draw.choice(MEMORY_SIZES)
                data = self.draw.randbytes(size)
                if size and self.draw.random() < 0.5:
                    async with await self.context.allocate(size) as memory:
                        await self._copy(session, memory)
                else:
                    await self._copy_temporary(session, data)

    async def _copy(self, session: Session, memory) -> None:
        """Within one buffer, and what lies around stays."""
        data = self.draw.randbytes(memory.size)
        memory.write(data)
        half = memory.size // 2
        source, target = Partial(memory, 0, half, INPUT), Partial(memory, half, half, OUTPUT)
        assert await session.invoke(COPY, source, target) == (MemoryResult(half), MemoryResult(half))
        assert memory.read() == data[:half] * 2 + data[2 * half :]
        beyond = Partial(memory, half, memory.size + 1, INPUT)
        assert await fails(session.invoke(COPY, beyond, target)) == (Result.BAD_PARAMETERS, Origin.API)
        assert await session.invoke(COPY_THROUGH, Whole(memory)) == (MemoryResult(memory.size),)
        assert memory.read() == data[:half] * 2 + data[2 * half :]

    async def _copy_temporary(self, session: Session, data: bytes) -> None:
        source = Temporary(data, direction=INPUT) if data else Null(direction=INPUT)
        _, output = await session.invoke(COPY, source, Temporary(size=len(data) + 5, direction=OUTPUT))
        assert output == MemoryResult(len(data), data)
        if data:
            try:
                await session.invoke(COPY, source, Null(direction=OUTPUT))
                raise AssertionError("a NULL buffer took everything")
            except TeeError as error:
                assert error.result == Result.SHORT_BUFFER and error.outputs[1] == MemoryResult(len(data))

    async def registered_twice(self) -> None:
        buffer = self.context.buffer(5000, self.draw.choice((0, 16, 4090)))
        data = self.draw.randbytes(2500)
        buffer.write(data)
        async with (
            await self.context.register(buffer, INPUT) as source,
            await self.context.register(buffer) as both,
            await self.context.open_session(ExerciseTa.uuid) as session,
        ):
            await session.invoke(COPY, Partial(source, 0, 2500, INPUT), Partial(both, 2500, 2500, OUTPUT))
        assert buffer.read() == data * 2
        self.context.free(buffer)

    async def released_in_use(self) -> None:
        """A buffer stays until its users are done, whoever else takes its cookie; who comes later is refused."""
        data = self.draw.randbytes(20_000)
        session = await self.context.open_session(Concurrent.uuid)
        memory = await self.context.allocate(len(data), INPUT)
        memory.write(data)

        async def user() -> None:
            try:
                _, digest = await session.invoke(1, Whole(memory), Temporary(size=32, direction=OUTPUT))
                assert digest.data == hashlib.sha256(data).digest()
            except ValueError as error:  # released before the client's library had looked at it
                assert "released" in str(error)

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(user)
            for _ in range(self.draw.randrange(20)):
                await trio.lowlevel.checkpoint()
            await memory.release()
        await session.close()

    async def random(self) -> None:
        async with await self.context.open_session(RANDOM) as session:
            outputs = [
                (await session.invoke(RandomCommand.GENERATE, Temporary(size=32, direction=OUTPUT)))[0] for _ in "ab"
            ]
            assert outputs[0] != outputs[1] and all(len(output.data) == 32 for output in outputs)

    async def aes(self) -> None:
        key, iv, text = self.draw.randbytes(16), self.draw.randbytes(16), self.draw.randbytes(700)
        async with await self.context.open_session(AES) as session:
            await session.invoke(Aes.PREPARE, number(2), number(16), number(1))
            await session.invoke(Aes.SET_KEY, Temporary(key, direction=INPUT))
            await session.invoke(Aes.SET_IV, Temporary(iv, direction=INPUT))
            _, output = await session.invoke(
                Aes.CIPHER, Temporary(text, direction=INPUT), Temporary(size=700, direction=OUTPUT)
            )
        assert output.data == Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(text)

    async def mutex(self) -> None:
        kind = self.draw.randrange(2)
        async with await self.context.open_session(INVOKE_TESTS) as session:
            for _ in range(3):
                _, seen = await session.invoke(MUTEX, number(kind, 100_000), Value(direction=OUTPUT))
                assert kind or seen.b == 1

    async def sum(self) -> None:
        data = self.draw.randbytes(self.draw.randint(1, 9000))
        async with await self.context.open_session(INVOKE_TESTS) as session:
            (output,) = await session.invoke(1, Temporary(data, direction=Direction.INOUT))
        assert output.data == bytes([sum(data) & 0xFF]) + data[1:]

    async def ta_to_ta(self) -> None:
        value = self.draw.randrange(1 << 31)
        async with await self.context.open_session(ExerciseTa.uuid) as session:
            _, output = await session.invoke(CALL_OTHER, number(2, HelloWorld.INC_VALUE), Value(value))
            assert output == Values(value + 1, 0)
            depth = self.draw.randrange(4)
            assert await session.invoke(RECURSE, Value(depth)) == (Values(depth, depth),)

    async def time(self) -> None:
        async with await self.context.open_session(ExerciseTa.uuid) as session:
            before = self.guest.driver.clock.now()[0]
            (answer,) = await session.invoke(REE_TIME, Value(direction=OUTPUT))
            assert before <= answer.a <= self.guest.driver.clock.now()[0]


OPERATIONS = [
    Program.increment,
    Program.counters,
    Program.shared_counter,
    Program.panic,
    Program.results,
    Program.absent,
    Program.wait,
    Program.cancelled_wait,
    Program.killed,
    Program.copy,
    Program.registered_twice,
    Program.released_in_use,
    Program.random,
    Program.aes,
    Program.mutex,
    Program.sum,
    Program.ta_to_ta,
    Program.time,
]
