"""Timing: medians over repeated batches, with Python's garbage collector at work as it is in real life."""

import gc
import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from typing import Final

ASYNC_BATCH: Final = 20
"""Operations of a sample where each of them waits."""
_WARM_UP: Final = 3

Operation = Callable[[], object]
Sample = Callable[[], float]
"""Takes one sample: microseconds of one operation."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one operation: each sample is the mean of a batch."""

    median: float
    minimum: float
    p95: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarize samples, of which there is at least one."""
        ordered = sorted(samples)
        rank = math.ceil(0.95 * len(ordered)) - 1
        return cls(statistics.median(ordered), ordered[0], ordered[rank])

    def as_data(self) -> dict[str, float]:
        """The same for JSON."""
        return {"median": round(self.median, 3), "min": round(self.minimum, 3), "p95": round(self.p95, 3)}


def batch(operation: Operation, size: int) -> Sample:
    """Take the mean of `size` operations."""

    def sample() -> float:
        start = perf_counter_ns()
        for _ in range(size):
            operation()
        return (perf_counter_ns() - start) / 1000 / size

    return sample


def undone(operation: Operation, after: Operation) -> Sample:
    """Take one operation, and undo it without counting that."""

    def sample() -> float:
        start = perf_counter_ns()
        operation()
        taken = perf_counter_ns() - start
        after()
        return taken / 1000

    return sample


def measure(samples: Sequence[Sample], rounds: int, seconds: float = 0) -> list[Timing]:
    """Take one sample of each in turn: what disturbs one disturbs the others as well.

    `rounds` times at least, and for so many seconds.
    """
    gc.collect()
    taken: list[list[float]] = []
    end = perf_counter() + seconds
    while len(taken) < rounds or perf_counter() < end:
        taken.append([sample() for sample in samples])
    return [Timing.of(column) for column in zip(*taken, strict=True)]


async def interleaved(operations: Sequence[Callable[[], Awaitable[object]]], rounds: int) -> list[list[float]]:
    """Take batches of each in turn, as `measure` does of what is synchronous; the samples in microseconds."""
    gc.collect()
    taken: list[list[float]] = [[] for _ in operations]
    for number in range(_WARM_UP + rounds):
        for operation, samples in zip(operations, taken, strict=True):
            start = perf_counter_ns()
            for _ in range(ASYNC_BATCH):
                await operation()
            if number >= _WARM_UP:
                samples.append((perf_counter_ns() - start) / 1000 / ASYNC_BATCH)
    return taken
