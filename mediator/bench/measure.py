"""Timing: medians over repeated batches, with Python's garbage collector at work as it is in real life."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

Operation = Callable[[], object]


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


def measure(operation: Operation, *, batches: int, size: int, after: Operation | None = None) -> Timing:
    """Time `operation` in batches of `size`; with `after`, which undoes it, one by one and without counting that."""
    gc.collect()
    if after is not None:
        return Timing.of([_one(operation, after) for _ in range(batches)])
    return Timing.of([_batch(operation, size) for _ in range(batches)])


def _one(operation: Operation, after: Operation) -> float:
    start = perf_counter_ns()
    operation()
    taken = perf_counter_ns() - start
    after()
    return taken / 1000


def _batch(operation: Operation, size: int) -> float:
    start = perf_counter_ns()
    for _ in range(size):
        operation()
    return (perf_counter_ns() - start) / 1000 / size
