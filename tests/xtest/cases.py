"""The rows S1 to S10: what a guest's clients do in each case of xtest, every answer looked at."""

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from guests import (
    ConduitMethod,
    Context,
    Direction,
    Guest,
    Partial,
    Session,
    SharedMemory,
    TeeError,
    Temporary,
    Value,
    Values,
)
from guests.workloads.applications import AES, HELLO_WORLD, INVOKE_TESTS, Aes, HelloWorld, InvokeTests
from optee.abi.results import Origin, Result
from optee.tas.catalogue import EXAMPLES, EXERCISES
from optee.tas.concurrent import Concurrent, ConcurrentLarge
from optee.tas.exercise import ExerciseTa, KeepAliveTa, SingleInstanceTa
from tests.xtest.traffic import Traffic

LOADED = (*EXAMPLES, *EXERCISES, Concurrent, ConcurrentLarge)
"""TAs whose images each guest has; OP-TEE has none of them built in."""

PANIC, WAIT, COUNT, OVERRUN, CALL_OTHER = 0, 1, 7, 5, 9
DEAD = (Result.TARGET_DEAD, Origin.TEE)
INPUT, OUTPUT = Direction.INPUT, Direction.OUTPUT
LOOPS = 8
MUTEX, DT_DRIVER_TESTS, TRANSFER_LIST_TESTS = 7, 11, 12


class Case:
    """A booted guest, what the case draws at random, and what its calls have caused at OP-TEE."""

    def __init__(self, guest: Guest, draw: Random, traffic: Traffic, client: int) -> None:
        self.guest = guest
        self.draw = draw
        self._snapshot = lambda: traffic.snapshot(client)
        self._before = self._snapshot()

    def seen(self) -> Counter[str]:
        """Messages and RPCs at OP-TEE since the last time, by name; interrupts come when they want."""
        now = self._snapshot()
        seen, self._before = now - self._before, now
        del seen["FOREIGN_INTR"]
        return seen


Client = Callable[[Case], Awaitable[None]]


def number(a: int, b: int = 0) -> Value:
    return Value(a, b, INPUT)


async def fails(awaitable: Awaitable[object]) -> tuple[int, int]:
    """Result and origin of what must not succeed."""
    with pytest.raises(TeeError) as raised:
        await awaitable
    return raised.value.result, raised.value.origin


async def count(session: Session, more: int) -> int:
    """Add to the counter of the session's instance."""
    (total,) = await session.invoke(COUNT, Value(more))
    assert isinstance(total, Values)
    return total.a


async def probe(case: Case) -> None:
    """S1: booting was all; the tee-supplicant that has started could load TAs."""
    assert case.guest.driver.devices


async def xtest_1001(case: Case) -> None:
    """S2: self tests of the core."""
    async with case.guest.context() as context, await context.open_session(INVOKE_TESTS) as session:
        assert await session.invoke(InvokeTests.SELF_TESTS) == ()
        assert await session.invoke(DT_DRIVER_TESTS) == ()
        refused = await fails(session.invoke(TRANSFER_LIST_TESTS))
        assert refused == (Result.NOT_SUPPORTED, Origin.TRUSTED_APP)
    assert case.seen() == {"OPEN_SESSION": 1, "INVOKE_COMMAND": 3, "CLOSE_SESSION": 1}


async def xtest_1002(case: Case) -> None:
    """S3: a buffer of 16 KiB, whose sum the pseudo TA writes into its first byte."""
    data = case.draw.randbytes(16 * 1024)
    async with case.guest.context() as context, await context.open_session(INVOKE_TESTS) as session:
        (output,) = await session.invoke(InvokeTests.PARAMS, Temporary(data))
    assert output.data == bytes([sum(data) & 0xFF]) + data[1:]
    messages = ("OPEN_SESSION", "REGISTER_SHM", "INVOKE_COMMAND", "UNREGISTER_SHM", "CLOSE_SESSION")
    assert case.seen() == dict.fromkeys(messages, 1)


async def hello_world(case: Case) -> None:
    """S4: cold, with an empty store of TA versions, and warm."""
    for cold in (True, False):
        async with case.guest.context() as context, await context.open_session(HELLO_WORLD) as session:
            assert await session.invoke(HelloWorld.INC_VALUE, Value(42)) == (Values(43, 0),)
            assert await session.invoke(HelloWorld.DEC_VALUE, Value(43)) == (Values(42, 0),)
        seen = case.seen()
        assert seen["LOAD_TA"] == 2 and seen["SHM_ALLOC"] == seen["SHM_FREE"] > 0
        assert bool(seen["FS.CREATE"]) is bool(seen["FS.WRITE"]) is cold and seen["FS.READ"]


async def xtest_1004(case: Case) -> None:
    """S5: digest and cipher, all through temporary memory: twelve registrations in ten invokes."""
    key, iv, text = case.draw.randbytes(16), case.draw.randbytes(16), case.draw.randbytes(5000)
    encryptor = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
    expected = encryptor.update(text)
    async with case.guest.context() as context:
        async with await context.open_session(Concurrent.uuid) as session:
            for data in (b"abc", text):
                _, digest = await session.invoke(
                    1, Temporary(data, direction=INPUT), Temporary(size=32, direction=OUTPUT)
                )
                assert digest.data == hashlib.sha256(data).digest()
        async with await context.open_session(AES) as session:
            for mode, data, answer in ((1, text, expected), (0, expected, text)):
                await session.invoke(Aes.PREPARE, number(2), number(16), number(mode))
                await session.invoke(Aes.SET_KEY, Temporary(key, direction=INPUT))
                await session.invoke(Aes.SET_IV, Temporary(iv, direction=INPUT))
                _, output = await session.invoke(
                    Aes.CIPHER, Temporary(data, direction=INPUT), Temporary(size=5000, direction=OUTPUT)
                )
                assert output.data == answer
    seen = case.seen()
    assert seen["REGISTER_SHM"] == seen["UNREGISTER_SHM"] == 12 and seen["INVOKE_COMMAND"] == 10


async def xtest_1003(case: Case) -> None:
    """S6: two writers and four readers of one mutex, more clients than threads."""
    together = []

    async def client(kind: int) -> None:
        async with case.guest.context() as context, await context.open_session(INVOKE_TESTS) as session:
            for _ in range(20):
                _, seen = await session.invoke(MUTEX, number(kind, 100_000), Value(direction=OUTPUT))
                assert 1 <= seen.b <= seen.a <= 6
                assert kind or seen.b == 1  # a writer is alone
                together.append(seen.a)

    async with trio.open_nursery() as nursery:
        for kind in (0, 0, 1, 1, 1, 1):
            nursery.start_soon(client, kind)
    assert len(together) == 120 and max(together) > 1
    seen = case.seen()
    assert seen["INVOKE_COMMAND"] == 120 and case.guest.driver.statistics().thread_limits > 0
    assert seen["NOTIFICATION.WAIT"] > 0 and seen["NOTIFICATION.SEND"] > 0


async def xtest_1005(case: Case) -> None:
    """S7, first half: three sessions, three instances."""
    async with case.guest.context() as context:
        sessions = [await context.open_session(ExerciseTa.uuid) for _ in range(3)]
        assert case.seen()["LOAD_TA"] == 6
        for turn in (1, 2):
            for index, session in enumerate(sessions):
                assert await count(session, index + 1) == turn * (index + 1)
        for session in sessions:
            await session.close()


async def xtest_1012(case: Case) -> None:
    """S7, second half: one instance for all sessions."""
    async with case.guest.context() as context:
        sessions = [await context.open_session(SingleInstanceTa.uuid) for _ in range(3)]
        assert case.seen()["LOAD_TA"] == 2
        assert [await count(session, 5) for session in sessions] == [5, 10, 15]
        for session in sessions:
            await session.close()
        async with await context.open_session(SingleInstanceTa.uuid) as session:
            assert await count(session, 1) == 1


async def xtest_1007(case: Case) -> None:
    """S8: a panic, and what of the session is left."""
    async with case.guest.context() as context:
        session = await context.open_session(ExerciseTa.uuid)
        for command, parameter in ((PANIC, number(0xBAD)), (COUNT, Value(1))):
            assert await fails(session.invoke(command, parameter)) == DEAD
        await session.close()
        session = await context.open_session(ExerciseTa.uuid)
        smashed = await fails(session.invoke(OVERRUN, Temporary(bytes(65), direction=INPUT)))
        assert smashed == DEAD
        await session.close()


async def xtest_1021(case: Case) -> None:
    """S8: who dies with whom."""
    for ta, shared in ((ExerciseTa, False), (SingleInstanceTa, True), (KeepAliveTa, True)):
        async with case.guest.context() as context:
            first, second = [await context.open_session(ta.uuid) for _ in range(2)]
            assert await count(second, 7) == 7
            assert await fails(first.invoke(PANIC, number(1))) == DEAD
            if shared:
                assert await fails(second.invoke(COUNT, Value(1))) == DEAD
            else:
                assert await count(second, 1) == 8
            async with await context.open_session(ta.uuid) as fresh:
                assert await count(fresh, 1) == 1
            await first.close()
            await second.close()
    async with case.guest.context() as context:  # one TA calls another, which panics: the caller lives
        caller = await context.open_session(ExerciseTa.uuid)
        died = await fails(caller.invoke(CALL_OTHER, number(1, PANIC), Value(3)))
        assert died[0] in (Result.TARGET_DEAD, Result.BAD_PARAMETERS)
        assert await count(caller, 1) == 1
        await caller.close()


async def xtest_1040(case: Case) -> None:
    """S8: three clients open, panic and close one single-instance TA, over and over."""
    panics = 0

    async def client(context: Context) -> None:
        nonlocal panics
        for _ in range(LOOPS):
            while True:
                try:
                    session = await context.open_session(SingleInstanceTa.uuid)
                    break
                except TeeError as error:  # it died while we were on our way in
                    assert (error.result, error.origin) == DEAD
            assert await fails(session.invoke(PANIC, number(2))) == DEAD
            panics += 1
            await session.close()

    async with case.guest.context() as context, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(client, context)
    assert panics == 3 * LOOPS


async def xtest_1009(case: Case) -> None:
    """S9: three waits, and one that is cancelled while it sleeps."""
    async with case.guest.context() as context, await context.open_session(ExerciseTa.uuid) as session:
        for milliseconds in (100, 500, 2000):
            began = trio.current_time()
            assert await session.invoke(WAIT, number(milliseconds)) == (Values(milliseconds, 0),)
            assert trio.current_time() - began >= milliseconds / 1000 - 1e-6
        ends = []

        async def wait() -> None:
            ends.append(await fails(session.invoke(WAIT, number(2000, 1))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.5)
            await session.request_cancellation()
            assert not ends  # it counts when the sleep has returned
        assert ends == [(Result.CANCEL, Origin.TRUSTED_APP)]
    seen = case.seen()
    assert seen["SUSPEND"] == 4 and seen["CANCEL"] == 1


async def xtest_1013(case: Case) -> None:
    """S10: three clients, one buffer that all of them use, a small TA and one too large for Xen's buffers."""
    data = case.draw.randbytes(20_000)
    limited = case.guest.method == ConduitMethod.HVC and not case.guest.driver.rpc_argument
    for ta in (Concurrent, ConcurrentLarge):
        refused = ta is ConcurrentLarge and limited
        limits = case.guest.driver.statistics().thread_limits
        case.seen()
        async with case.guest.context() as context, await context.allocate(len(data)) as memory:
            memory.write(data)
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(_digests, case, context, ta, memory, refused)
        seen = case.seen()
        assert seen["REGISTER_SHM"] == seen["UNREGISTER_SHM"] == (1 if refused else 1 + 3 * 5)
        assert case.guest.driver.statistics().thread_limits > limits


async def _digests(case: Case, context: Context, ta: type[Concurrent], memory: SharedMemory, refused: bool) -> None:
    """Work and digest parts of the common buffer, which others read at the same time."""
    if refused:
        assert await fails(context.open_session(ta.uuid)) == (Result.OUT_OF_MEMORY, Origin.TEE)
        return
    async with await context.open_session(ta.uuid) as session:
        for _ in range(5):
            assert await session.invoke(0) == ()
            first, last = sorted(case.draw.sample(range(memory.size), 2))
            part = Partial(memory, first, last - first, INPUT)
            _, digest = await session.invoke(1, part, Temporary(size=32, direction=OUTPUT))
            assert digest.data == hashlib.sha256(memory.read(first, last - first)).digest()


CASES: dict[str, Client] = {
    "S1 probe": probe,
    "S2 1001": xtest_1001,
    "S3 1002": xtest_1002,
    "S4 hello_world": hello_world,
    "S5 1004": xtest_1004,
    "S6 1003": xtest_1003,
    "S7 1005": xtest_1005,
    "S7 1012": xtest_1012,
    "S8 1007": xtest_1007,
    "S8 1021": xtest_1021,
    "S8 1040": xtest_1040,
    "S9 1009": xtest_1009,
    "S10 1013": xtest_1013,
}
