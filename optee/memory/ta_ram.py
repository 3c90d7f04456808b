"""Secure physical memory in whole pages: each allocation is one contiguous piece, the lowest that suffices.

Source: memory sizing reference, sections 3 and 5 (tee_mm). Pieces never move, so what is free may be of no use to a
large region.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.build import PAGE, down
from optee.memory.heap import LOW, Allocation, Owner, Statistics

_MASK: Final = PAGE - 1


class TaRam:
    """`size` bytes from the PA `base` on."""

    def __init__(self, base: int, size: int, name: str = "Physical TA memory") -> None:
        self.name = name
        self.base = base
        self.size = down(size)
        self.allocated = 0
        self.max_allocated = 0
        self.on_low: Callable[[TaRam], None] | None = None
        """Told once when four fifths are taken, or when an allocation fails."""
        self._low_mark = self.size * LOW
        self._starts = [base]
        self._ends = [base + self.size]
        self._used: dict[int, tuple[int, Owner]] = {}
        self._failed = self._biggest_failure = self._allocated_at_biggest_failure = 0

    def allocate(self, size: int, owner: Owner) -> int:
        """PA of `size` bytes, rounded up to pages. Raises TeeError(OUT_OF_MEMORY)."""
        size = (size + _MASK) & ~_MASK
        starts, ends = self._starts, self._ends
        for index, start in enumerate(starts):
            if ends[index] - start >= size:
                break
        else:
            self._fail(size)
        if ends[index] - start == size:
            del starts[index], ends[index]
        else:
            starts[index] = start + size
        self._used[start] = size, owner
        self.allocated += size
        if self.allocated > self.max_allocated:
            self.max_allocated = self.allocated
            if self.allocated > self._low_mark:
                self._tell()
        return start

    def _fail(self, size: int) -> None:
        self._failed += 1
        if size > self._biggest_failure:
            self._biggest_failure = size
            self._allocated_at_biggest_failure = self.allocated
        self._tell()
        raise TeeError(Result.OUT_OF_MEMORY)

    def _tell(self) -> None:
        told, self.on_low = self.on_low, None
        self._low_mark = self.size
        if told is not None:
            told(self)

    def free(self, pa: int) -> None:
        """Give an allocation back. Raises KeyError for an address that is not allocated."""
        size, _ = self._used.pop(pa)
        self.allocated -= size
        starts, ends = self._starts, self._ends
        index = bisect_left(starts, pa)
        end = pa + size
        if index < len(starts) and starts[index] == end:
            end = ends[index]
            del starts[index], ends[index]
        if index and ends[index - 1] == pa:
            ends[index - 1] = end
        else:
            starts.insert(index, pa)
            ends.insert(index, end)

    @property
    def largest_free(self) -> int:
        """Bytes of the largest piece that can be allocated."""
        return max((end - start for start, end in zip(self._starts, self._ends, strict=True)), default=0)

    @property
    def free_squares(self) -> int:
        """Sum of the squares of the free pieces' sizes."""
        return sum((end - start) ** 2 for start, end in zip(self._starts, self._ends, strict=True))

    @property
    def statistics(self) -> Statistics:
        """The pool's counters."""
        failed = self._failed, self._biggest_failure, self._allocated_at_biggest_failure
        return Statistics(self.allocated, self.max_allocated, self.size, *failed)

    def reset_statistics(self) -> None:
        """Start counting anew; what is allocated stays."""
        self.max_allocated = self.allocated
        self._failed = self._biggest_failure = self._allocated_at_biggest_failure = 0

    def allocations(self) -> list[Allocation]:
        """Everything that is allocated, by address."""
        return [Allocation(pa, *self._used[pa]) for pa in sorted(self._used)]
