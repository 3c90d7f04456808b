"""Whole calls in one process: client API, driver, hypervisor, mediator and OP-TEE's model, as `serve` runs them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from guests import Context, Direction, Guest, Parameter, Temporary, Value, Whole
from guests.workloads.applications import EXERCISE, HELLO_WORLD, Exercise, HelloWorld
from mediator.bench.measure import ASYNC_BATCH, Timing, interleaved
from mediator.board import Board
from mediator.core.policy import Policy
from optee.config import Config
from optee.tas.hello_world import HelloWorld as HelloWorldTa

INVOKES_TARGET: Final = 8000
OPENS_TARGET: Final = 1000
SHARES_TARGET: Final = 4000
PRICE_BUFFER: Final = 64 * 1024
"""Bytes of the buffer that an invoke gets along: what fits reserved memory elsewhere."""
PRICE: Final = "e2e-price"

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_FLAVOUR: Final = "kvm"

AsyncOperation = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class EndToEndCase:
    """A measurement of whole calls; `target` is the operations per second that it should reach."""

    name: str
    what: str
    target: int | None
    prepare: Callable[[Context], Awaitable[AsyncOperation]]
    loaded: bool = False
    """TAs are not part of OP-TEE's image: the guest's tee-supplicant has them."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """What one case took. smcs: SMCs of the guest in one operation. checkpoints: as many switches of trio's loop."""

    case: EndToEndCase
    timing: Timing
    smcs: float
    checkpoints: Timing

    @property
    def rate(self) -> float:
        """Operations per second, by the median."""
        return 1e6 / self.timing.median

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None where there is none."""
        return None if self.case.target is None else self.rate >= self.case.target

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "name": self.case.name,
            "what": self.case.what,
            "unit": "us",
            "median": round(self.timing.median, 3),
            "min": round(self.timing.minimum, 3),
            "p95": round(self.timing.p95, 3),
            "per_second": round(self.rate),
            "target_per_second": self.case.target,
            "met": self.met,
            "smcs": self.smcs,
            "checkpoints": round(self.checkpoints.median, 3),
        }


@dataclass(frozen=True, slots=True)
class Price:
    """One way to pass a buffer: microseconds, SMCs and pages pinned for one invoke with it."""

    how: str
    timing: Timing
    smcs: float
    pages: float

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "how": self.how,
            "bytes": PRICE_BUFFER,
            "us": round(self.timing.median, 3),
            "smcs": self.smcs,
            "pages_pinned": self.pages,
        }


async def _invoke(context: Context) -> AsyncOperation:
    session = await context.open_session(HELLO_WORLD)
    return lambda: session.invoke(HelloWorld.INC_VALUE, Value(1))


async def _open_and_close(context: Context) -> AsyncOperation:
    async def run() -> None:
        await (await context.open_session(HELLO_WORLD)).close()

    return run


def _share(size: int) -> Callable[[Context], Awaitable[AsyncOperation]]:
    async def prepare(context: Context) -> AsyncOperation:
        buffer = context.buffer(size)

        async def run() -> None:
            await (await context.register(buffer)).release()

        return run

    return prepare


def _size(size: int) -> str:
    return f"{size // _KIB} KiB" if size < _MIB else f"{size // _MIB} MiB"


SHARED: Final = tuple(size * _KIB for size in (4, 64, 512, 4096))
"""Bytes of the buffers that are registered and released."""

END_TO_END: Final = (
    EndToEndCase("e2e-invoke", "hello_world INC_VALUE, one value, session open", INVOKES_TARGET, _invoke),
    EndToEndCase("e2e-open", "open and close of hello_world, an early TA", OPENS_TARGET, _open_and_close),
    EndToEndCase("e2e-load", "the same, loaded by tee-supplicant each time", None, _open_and_close, loaded=True),
    *(
        EndToEndCase(
            f"e2e-share-{_size(size).replace(' ', '-').lower()}",
            f"register and release {_size(size)}",
            SHARES_TARGET if size == 512 * _KIB else None,
            _share(size),
        )
        for size in SHARED
    ),
)


def measure_case(policy: Policy, case: EndToEndCase, batches: int) -> EndToEnd:
    """Measure a case on a board of its own, with one guest and one caller."""

    async def main() -> EndToEnd:
        async with _guest(policy, loaded=case.loaded) as (_, guest), guest.context() as context:
            operation = await case.prepare(context)
            smcs = await _smcs(guest, operation)

            async def checkpoints() -> None:
                for _ in range(round(smcs)):
                    await trio.lowlevel.checkpoint()

            timing, bare = await _measure([operation, checkpoints], batches)
            return EndToEnd(case, timing, smcs, bare)

    return trio.run(main)


def price_of_no_reserved_memory(policy: Policy, batches: int) -> list[Price]:
    """Measure an invoke with a buffer that its TA leaves alone: temporary, registered once, allocated once.

    Reserved memory would cost a copy and no call. Without it the buffer is registered: for each call if it is
    temporary, once for all if not.
    """

    async def main() -> list[Price]:
        async with _guest(policy) as (board, guest), guest.context() as context:
            session = await context.open_session(EXERCISE)
            registered = await context.register(context.buffer(PRICE_BUFFER))
            allocated = await context.allocate(PRICE_BUFFER)
            ways: dict[str, Parameter] = {
                "temporary": Temporary(bytes(PRICE_BUFFER), direction=Direction.INOUT),
                "registered once": Whole(registered),
                "allocated once": Whole(allocated),
            }
            (memory,) = board.service.memories.values()
            prices = []
            for how, parameter in ways.items():

                async def operation(parameter: Parameter = parameter) -> None:
                    await session.invoke(Exercise.TAKE, parameter)

                before = memory.pages
                smcs = await _smcs(guest, operation)
                pages = (memory.pages - before) / ASYNC_BATCH
                (timing,) = await _measure([operation], batches)
                prices.append(Price(how, timing, smcs, pages))
            return prices

    return trio.run(main)


@asynccontextmanager
async def _guest(policy: Policy, *, loaded: bool = False) -> AsyncIterator[tuple[Board, Guest]]:
    config = Config(early_tas=frozenset() if loaded else None)
    async with Board(policy, config, check=False) as board, board.guest(_FLAVOUR, tas=(HelloWorldTa,)) as guest:
        yield board, guest


async def _smcs(guest: Guest, operation: AsyncOperation) -> float:
    """Count the SMCs of one operation, over a batch of them."""
    before = guest.driver.statistics().smcs
    for _ in range(ASYNC_BATCH):
        await operation()
    return (guest.driver.statistics().smcs - before) / ASYNC_BATCH


async def _measure(operations: list[AsyncOperation], batches: int) -> list[Timing]:
    return [Timing.of(taken) for taken in await interleaved(operations, batches)]
