"""The collector: lets go what was long unused, and under pressure what was least recently used.

OP-TEE has no thread of its own, so it works at entries of yielding calls, in passes of a bounded size: objects, then
blocks, nodes, RPC buffers, and at last whole slabs back to the heap. A round goes on where the pass before stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Final

from optee.memory.heap import Heap
from optee.storage.memory.lru import Clock
from optee.storage.memory.statistics import CollectorStatistics

PASS_BOUND: Final = 64
"""Entries, or slabs, that one pass looks at."""
AGE: Final = 10
"""An entry is long unused after so many intervals."""

Phase = Callable[[int, int, Callable[[], bool]], tuple[int, bool]]
"""A level's `collect`: budget, time, whether memory is short; entries looked at, and whether it is done."""


class Collector:
    """Of one guest.

    freed: bytes that the levels have freed so far. interval: milliseconds between two rounds, 0 for none. reserve:
    bytes of the heap to keep free.
    """

    def __init__(
        self,
        clock: Clock,
        heap: Heap,
        phases: Sequence[Phase],
        freed: Callable[[], int],
        *,
        interval: int,
        reserve: int,
    ) -> None:
        self.statistics = CollectorStatistics()
        self._freed = freed
        self._clock = clock
        self._heap = heap
        self._phases = phases
        self._interval = interval
        self._reserve = reserve
        self._phase = 0
        self._last = 0

    def short(self) -> bool:
        """Tell whether less of the heap is free than is to be."""
        return self._heap.size - self._heap.allocated < self._reserve

    def enter(self, now: int) -> None:
        """A yielding call begins: do a pass if it is time, if a round is under way, or if memory is short."""
        self._clock.now = now
        due = self._interval and now - self._last >= self._interval
        if due or self._phase or self.short():
            self._last = now
            self.run(self.short)

    def run(self, short: Callable[[], bool]) -> bool:
        """One pass; True if it ended a round."""
        started, freed = perf_counter_ns(), self._freed()
        before = self._clock.now - AGE * self._interval if self._interval else -1
        budget = PASS_BOUND
        while budget > 0 and self._phase < len(self._phases):
            examined, done = self._phases[self._phase](budget, before, short)
            budget -= examined
            if not done:
                break
            self._phase += 1
        examined = PASS_BOUND - budget
        if examined > PASS_BOUND:
            raise AssertionError(f"a pass of the collector looked at {examined} entries")
        count = self.statistics
        count.passes += 1
        count.examined += examined
        count.bytes += self._freed() - freed
        count.longest_pass = max(count.longest_pass, examined)
        ended = self._phase == len(self._phases)
        if ended:
            self._phase = 0
            count.collections += 1
        count.nanoseconds += perf_counter_ns() - started
        return ended
