"""Secure memory of TAs: which addresses an instance has.

As yet an allocator without OP-TEE's limits per guest; it gives panic reports real, distinct addresses and is
the place where a model of TA RAM and page tables plugs in.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hv_models.memory import PAGE_MASK, PAGE_SIZE
from optee.abi.results import Result
from optee.errors import TeeError

if TYPE_CHECKING:
    from optee.trusted_application import TrustedApplication

_FIRST_VA: Final = 0x4000_5000
_DATA_SIZE: Final = 0x2000  # .data, .got and the like beside the heap


class TaRam:
    """Physically contiguous secure memory, first fit."""

    def __init__(self, base: int, size: int) -> None:
        self._holes = [(base, base + size)]

    def allocate(self, size: int) -> int:
        """PA of `size` bytes. Raises TeeError(OUT_OF_MEMORY)."""
        for index, (start, end) in enumerate(self._holes):
            if end - start >= size:
                if end - start == size:
                    del self._holes[index]
                else:
                    self._holes[index] = (start + size, end)
                return start
        raise TeeError(Result.OUT_OF_MEMORY)

    def free(self, pa: int, size: int) -> None:
        """Give an allocation back."""
        insort(self._holes, (pa, pa + size))
        merged = self._holes[:1]
        for start, end in self._holes[1:]:
            if start == merged[-1][1]:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        self._holes = merged


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a TA's address space as OP-TEE's dumps show it."""

    va: int
    pa: int
    size: int
    flags: str
    """r, w, x and s (secure), or - for each that it is not."""
    what: str
    """(ldelf), (stack), (param), [0] for the TA's own ELF file, or nothing."""


class TaMemory:
    """The regions of one instance, allocated as one piece."""

    def __init__(self, ram: TaRam, ta: type[TrustedApplication]) -> None:
        sizes = (
            (0x2000, "rw-s", "(ldelf)"),
            (0x8000, "r-xs", "(ldelf)"),
            (0x1000, "rw-s", "(ldelf)"),
            (0x4000, "rw-s", "(ldelf)"),
            (0x1000, "r--s", ""),
            (_pages(ta.stack_size), "rw-s", "(stack)"),
            (_pages(ta.code_size), "r-xs", "[0]"),
            (_pages(_DATA_SIZE + ta.data_size), "rw-s", "[0]"),
        )
        self._ram = ram
        self.size = sum(size for size, _, _ in sizes)
        self.pa = ram.allocate(self.size)
        """PA of the first byte."""
        va, pa = _FIRST_VA, self.pa
        regions = []
        for size, flags, what in sizes:
            regions.append(Region(va, pa, size, flags, what))
            va += size
            pa += size
        self.regions = tuple(regions)
        self.end_va = va

    @property
    def stack_base(self) -> int:
        """Lowest virtual address of the stack."""
        return next(region.va for region in self.regions if region.what == "(stack)")

    def free(self) -> None:
        """Give the memory back."""
        self._ram.free(self.pa, self.size)


def _pages(size: int) -> int:
    return max((size + PAGE_MASK) & ~PAGE_MASK, PAGE_SIZE)
