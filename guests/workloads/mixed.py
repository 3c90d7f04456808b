"""Workload `mixed`: what a guest full of different clients does, well-behaved and not."""

from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Final, TypeAlias
from uuid import UUID

import trio

from guests.client import Context, Session
from guests.client_memory import Direction
from guests.guest import Guest
from guests.operation import TeeError
from guests.parameters import MemoryResult, Partial, Temporary, Value, Values
from guests.workloads.applications import (
    AES,
    EXERCISE,
    HELLO_WORLD,
    RANDOM,
    SECURE_STORAGE,
    Aes,
    Exercise,
    HelloWorld,
    SecureStorage,
)
from guests.workloads.applications import Random as RandomCommand
from guests.workloads.refusals import try_refusals
from guests.workloads.report import Report
from optee.abi.results import Origin, Result

_Use: TypeAlias = Callable[[Context, Session, Report, Random], Awaitable[None]]

CALLERS: Final = 12
"""Clients at once: more than OP-TEE has threads, so that some wait for one."""

_OPERATIONS: Final = 16  # of each client in a round
_PAUSE: Final = 20  # milliseconds that a client sleeps inside a TA: it occupies a thread, and no vCPU
_LONG_WAIT: Final = 200  # milliseconds of the wait that is cancelled
_CANCELLABLE: Final = 1
_PANIC_CODE: Final = 0x0BAD
_TEXT: Final = 512  # bytes to encrypt
_AES_CTR, _AES_KEY_SIZE, _ENCODE, _DECODE = 2, 16, 1, 0
_IV: Final = bytes(16)
_FIRST: Final = 100  # invocations
_TROUBLED: Final = 4  # one guest in so many has its troublemaker from the start, the first one, too
_ROUNDS_BETWEEN_OBJECTS: Final = 8  # an object costs some hundred round trips to tee-supplicant
_NAME_SIZE: Final = 16
_OBJECT_SIZES: Final = (0, 100, 5000)  # bytes: no block, one, two


async def mixed(
    guest: Guest, report: Report, *, rounds: int | None = None, seed: int = 0, callers: int = CALLERS
) -> None:
    """Show that calls are cheap, try the refusals once; then let all clients work for `rounds` (None: for ever).

    In a round a client sleeps in a TA, then mixes hello_world, random and aes (through registered and through
    temporary memory); in some it keeps an object in secure storage for a while. Beside them one more client has a
    wait cancelled and a TA panic in each round. A TA that is not there is left out, and the report names it.

    To load a TA takes more calls than a hundred invocations: so those come first, each client opens a session when it
    first needs it, and the next client comes when the one before has its first. Where many guests share a mediator,
    each has done something soon. That is its tour; one guest in four also has its first panic and cancelled wait then.
    All clients of the first guest come at once, so that it sees what it is like to have more clients than threads.
    """
    choose = Random(seed)
    if rounds == 0:
        await try_refusals(guest, report)
        report.toured = True
        return
    number = _number(guest.name)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_first, guest, report)
        if number % _TROUBLED == 1:
            nursery.start_soon(_troublemaker, guest, report, 1)
    report.toured = number != 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(try_refusals, guest, report)
        nursery.start_soon(_troublemaker, guest, report, rounds)
        for _ in range(callers):
            client = partial(_client, guest, report, rounds, Random(choose.random()))
            if number == 1:
                nursery.start_soon(client)
            else:
                await nursery.start(client)


def _number(name: str) -> int:
    """The number at the end of a guest's name; 1 if it has none."""
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 1


async def _first(guest: Guest, report: Report) -> None:
    """One client that invokes hello_world often enough to be seen."""
    choose = Random(0)
    async with guest.context() as context:
        session = await report.open_if_present(context, HELLO_WORLD, "hello_world")
        if session is not None:
            for _ in range(_FIRST):
                await _increment(context, session, report, choose)


async def _troublemaker(guest: Guest, report: Report, rounds: int | None) -> None:
    async with guest.context() as context:
        done = 0
        while done != rounds and "exercise" not in report.absent:
            await _cancelled_wait(context, report)
            await _panic(context, report)
            done += 1


class _Sessions:
    """The sessions of one client, each opened when it is first asked for."""

    def __init__(self, context: Context, report: Report) -> None:
        self._context = context
        self._report = report
        self._open: dict[str, Session | None] = {}

    async def get(self, ta: UUID, name: str) -> Session | None:
        """The session to a TA; None if there is none."""
        if name not in self._open:
            self._open[name] = await self._report.open_if_present(self._context, ta, name)
        return self._open[name]


async def _client(
    guest: Guest,
    report: Report,
    rounds: int | None,
    choose: Random,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async with guest.context() as context:
        sessions = _Sessions(context, report)
        name = choose.randbytes(_NAME_SIZE)
        done = 0
        while done != rounds:
            sleeper = await sessions.get(EXERCISE, "exercise")
            if not done:
                task_status.started()
            if sleeper is not None:
                with report.operation("wait"):
                    await sleeper.invoke(Exercise.WAIT, Value(_PAUSE, direction=Direction.INPUT))
                if guest.driver.statistics().thread_limits:
                    report.toured = True
            for _ in range(_OPERATIONS):
                use, ta, called = choose.choice(_WORK)
                session = await sessions.get(ta, called)
                if session is not None:
                    await use(context, session, report, choose)
            if done % _ROUNDS_BETWEEN_OBJECTS == 0:
                storage = await sessions.get(SECURE_STORAGE, "secure_storage")
                if storage is not None:
                    await _keep(storage, report, name, choose)
            await trio.lowlevel.checkpoint()
            done += 1
            report.toured = True


async def _increment(context: Context, session: Session, report: Report, choose: Random) -> None:
    value = choose.randrange(1 << 31)
    with report.operation("hello_world INC_VALUE"):
        outputs = await session.invoke(HelloWorld.INC_VALUE, Value(value))
        report.expect("hello_world INC_VALUE", outputs == (Values(value + 1, 0),))


async def _random(context: Context, session: Session, report: Report, choose: Random) -> None:
    size = choose.randint(1, 64)
    with report.operation("random GENERATE"):
        parameter = Temporary(size=size, direction=Direction.OUTPUT)
        (output,) = await session.invoke(RandomCommand.GENERATE, parameter)
        report.expect("random GENERATE", isinstance(output, MemoryResult) and len(output.data) == size)


async def _aes(context: Context, session: Session, report: Report, choose: Random) -> None:
    """Encrypt through registered memory, decrypt through temporary memory: the text must come back."""
    key, text = choose.randbytes(_AES_KEY_SIZE), choose.randbytes(_TEXT)
    with report.operation("aes there and back"):
        await _prepare(session, _ENCODE, key)
        async with await context.allocate(2 * _TEXT) as memory:
            memory.write(text)
            source = Partial(memory, 0, _TEXT, Direction.INPUT)
            target = Partial(memory, _TEXT, _TEXT, Direction.OUTPUT)
            await session.invoke(Aes.CIPHER, source, target)
            cipher = memory.read(_TEXT)
        await _prepare(session, _DECODE, key)
        *_, output = await session.invoke(
            Aes.CIPHER,
            Temporary(cipher, direction=Direction.INPUT),
            Temporary(size=_TEXT, direction=Direction.OUTPUT),
        )
        report.expect("aes there and back", cipher != text and output == MemoryResult(_TEXT, text))


async def _keep(session: Session, report: Report, name: bytes, choose: Random) -> None:
    """Write an object, read it back, and delete it; the name is this client's own."""
    object_id = Temporary(name, direction=Direction.INPUT)
    data = choose.randbytes(choose.choice(_OBJECT_SIZES))
    with report.operation("secure_storage there and back"):
        await session.invoke(SecureStorage.WRITE_RAW, object_id, Temporary(data, direction=Direction.INPUT))
        buffer = Temporary(size=max(_OBJECT_SIZES), direction=Direction.OUTPUT)
        _, output = await session.invoke(SecureStorage.READ_RAW, object_id, buffer)
        await session.invoke(SecureStorage.DELETE, object_id)
        report.expect("secure_storage there and back", isinstance(output, MemoryResult) and output.data == data)


async def _prepare(session: Session, mode: int, key: bytes) -> None:
    values = [Value(word, direction=Direction.INPUT) for word in (_AES_CTR, _AES_KEY_SIZE, mode)]
    await session.invoke(Aes.PREPARE, *values)
    await session.invoke(Aes.SET_KEY, Temporary(key, direction=Direction.INPUT))
    await session.invoke(Aes.SET_IV, Temporary(_IV, direction=Direction.INPUT))


async def _cancelled_wait(context: Context, report: Report) -> None:
    """Cancel a wait that has begun: it ends with CANCEL, when the sleep that is under way is over.

    Not so where the request found no free thread until the wait was over: nothing is expected then.
    """
    session = await report.open_if_present(context, EXERCISE, "exercise")
    if session is None:
        return
    ends: list[TeeError | None] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_wait_until_cancelled, session, ends)
        await trio.sleep(_LONG_WAIT / 4000)
        with report.operation("request cancellation"):
            await session.request_cancellation()
        in_time = not ends
    await trio.lowlevel.checkpoint_if_cancelled()  # a stop may have shortened the sleep before the request came
    if in_time:
        with report.operation("cancelled wait", result=Result.CANCEL):
            if ends[0] is not None:
                raise ends[0]
    await session.close()


async def _wait_until_cancelled(session: Session, ends: list[TeeError | None]) -> None:
    try:
        await session.invoke(Exercise.WAIT, Value(_LONG_WAIT, _CANCELLABLE, Direction.INPUT))
    except TeeError as error:
        ends.append(error)
    else:
        ends.append(None)


async def _panic(context: Context, report: Report) -> None:
    """Make a TA panic, twice use the dead session, close it, and open a new one."""
    session = await report.open_if_present(context, EXERCISE, "exercise")
    if session is None:
        return
    for _ in range(2):
        with report.operation("panic", result=Result.TARGET_DEAD, origin=Origin.TEE):
            await session.invoke(Exercise.PANIC, Value(_PANIC_CODE, direction=Direction.INPUT))
    await session.close()
    with report.operation("open after panic"):
        await (await context.open_session(EXERCISE)).close()


_WORK: Final[tuple[tuple[_Use, UUID, str], ...]] = (
    (_increment, HELLO_WORLD, "hello_world"),
    (_random, RANDOM, "random"),
    (_aes, AES, "aes"),
)
