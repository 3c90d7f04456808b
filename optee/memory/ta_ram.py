"""Secure physical memory in whole pages: each allocation is one contiguous piece, the lowest that suffices.

Source: memory sizing reference, sections 3 and 5 (tee_mm). Pieces never move, so what is free may be of no use to a
large region.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from optee.memory.build import PAGE, down
from optee.memory.pool import Owner, Pool

_MASK: Final = PAGE - 1


class TaRam(Pool):
    """`size` bytes from the PA `base` on."""

    def __init__(self, base: int, size: int, name: str = "Physical TA memory") -> None:
        super().__init__(down(size), name)
        self.base = base
        self._starts = [base]
        self._ends = [base + self.size]

    def allocate(self, size: int, owner: Owner) -> int:
        """PA of `size` bytes, rounded up to pages. Raises TeeError(OUT_OF_MEMORY)."""
        size = (size + _MASK) & ~_MASK
        starts, ends = self._starts, self._ends
        for index, start in enumerate(starts):
            if ends[index] - start >= size:
                break
        else:
            raise self._failure(size)
        if ends[index] - start == size:
            del starts[index], ends[index]
        else:
            starts[index] = start + size
        self._take(start, size, owner)
        return start

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
