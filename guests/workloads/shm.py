"""Workload `shm`: shared memory of all kinds and sizes, with a TA that writes into it where there is one."""

from random import Random
from typing import Final

from guests.client import Context, Session
from guests.client_memory import Direction, SharedMemory
from guests.guest import Guest
from guests.operation import TeeError
from guests.parameters import MemoryResult, Null, Partial, Temporary, Whole
from guests.workloads.applications import RANDOM
from guests.workloads.applications import Random as RandomCommand
from guests.workloads.refusals import try_refusals
from guests.workloads.report import Report
from hv_models.memory import PAGE_SIZE
from optee.abi.results import Origin, Result

SIZES: Final = (1, 16, PAGE_SIZE, PAGE_SIZE + 1, 16 * PAGE_SIZE, 128 * PAGE_SIZE)
"""Bytes of the buffers; the last is the least that GlobalPlatform asks an implementation to share."""

_PATTERN: Final = b"\x5a"
_OFFSETS: Final = (0, 16, PAGE_SIZE - 8)
_MOST_RANDOM: Final = 4096  # bytes that one operation lets the TA fill


async def shm(guest: Guest, report: Report, *, rounds: int | None = None, seed: int = 0) -> None:
    """Register, use and release buffers `rounds` times (None: for ever), in sizes and places chosen by `seed`."""
    await try_refusals(guest, report)
    choose = Random(seed)
    async with guest.context() as context:
        session = await report.open_if_present(context, RANDOM, "random")
        done = 0
        while rounds is None or done < rounds:
            await _one_round(context, session, report, choose)
            done += 1


async def _one_round(context: Context, session: Session | None, report: Report, choose: Random) -> None:
    size, offset = choose.choice(SIZES), choose.choice(_OFFSETS)
    buffer = context.buffer(size, offset)
    buffer.write(_PATTERN * size)
    with report.operation("register"):
        async with await context.register(buffer) as first:
            with report.operation("register again"):
                await (await context.register(buffer)).release()
            await _beyond(session, report, first)
            if session is not None:
                await _fill_part(session, report, first, choose)
    context.free(buffer)

    with report.operation("allocate"):
        async with await context.allocate(size, Direction.OUTPUT) as memory:
            if session is not None and size <= _MOST_RANDOM:
                with report.operation("random into whole buffer"):
                    outputs = await session.invoke(RandomCommand.GENERATE, Whole(memory))
                    report.expect("random into whole buffer", outputs == (MemoryResult(size),))

    if session is not None:
        with report.operation("random into temporary memory"):
            temporary = Temporary(size=min(size, _MOST_RANDOM), direction=Direction.OUTPUT)
            (output,) = await session.invoke(RandomCommand.GENERATE, temporary)
            good = isinstance(output, MemoryResult) and len(output.data) == temporary.size
            report.expect("random into temporary memory", good)
        with report.operation("random into NULL"):
            outputs = await session.invoke(RandomCommand.GENERATE, Null())
            report.expect("random into NULL", outputs == (MemoryResult(0),))


async def _fill_part(session: Session, report: Report, memory: SharedMemory, choose: Random) -> None:
    """Have a part filled; what lies around it must stay as it is."""
    start = choose.randrange(memory.size)
    size = min(choose.randint(1, memory.size - start), _MOST_RANDOM)
    before, behind = memory.read(0, start), memory.read(start + size)
    with report.operation("random into part"):
        part = Partial(memory, start, size, Direction.OUTPUT)
        outputs = await session.invoke(RandomCommand.GENERATE, part)
        around = memory.read(0, start) == before and memory.read(start + size) == behind
        report.expect("random into part", outputs == (MemoryResult(size),) and around)


async def _beyond(session: Session | None, report: Report, memory: SharedMemory) -> None:
    """Name one byte more than was registered: the client's own library must refuse it."""
    if session is None:
        return
    try:
        await session.invoke(RandomCommand.GENERATE, Partial(memory, 0, memory.size + 1, Direction.OUTPUT))
    except TeeError as error:
        good = error.result == Result.BAD_PARAMETERS and error.origin == Origin.API
        report.refused("beyond a buffer", good=good, answer=str(error))
    else:
        report.refused("beyond a buffer", good=False, answer="it was accepted")
