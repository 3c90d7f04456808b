"""Translation tables of TAs: the pool that all TAs of a guest share.

Source: memory sizing reference, section 2. A context holds tables while it is mapped, that is while a call runs in it;
threads for which too few are left wait. A context that alone needs more than all of them fails.
"""

from __future__ import annotations

from optee.memory.build import Build
from optee.memory.pool import Statistics


class TablePool:
    """Tables of the pool; with preallocated tables there is none."""

    __slots__ = ("_biggest_failure", "_failed", "_held_at_biggest_failure", "free", "max_held", "name", "size")

    def __init__(self, build: Build) -> None:
        self.name = "Translation tables"
        self.size = 0 if build.prealloc else build.tables
        """Tables, not bytes."""
        self.free = self.size
        """Tables that no mapped context holds."""
        self.max_held = 0
        self._failed = self._biggest_failure = self._held_at_biggest_failure = 0

    def check(self, needed: int) -> bool:
        """Whether one context may need so many; counts it as a failure if not."""
        if needed <= self.size:
            return True
        self._failed += 1
        if needed > self._biggest_failure:
            self._biggest_failure = needed
            self._held_at_biggest_failure = self.size - self.free
        return False

    def take(self, count: int) -> bool:
        """Take so many tables; False if fewer are free now."""
        left = self.free - count
        if left < 0:
            return False
        self.free = left
        if self.size - left > self.max_held:
            self.max_held = self.size - left
        return True

    def give(self, count: int) -> None:
        """Give tables back."""
        self.free += count

    @property
    def statistics(self) -> Statistics:
        """The pool's counters, in tables."""
        held = self.size - self.free
        failed = self._failed, self._biggest_failure, self._held_at_biggest_failure
        return Statistics(held, self.max_held, self.size, *failed)
