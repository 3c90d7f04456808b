"""The address space of a TA: which regions it has, and how many translation tables they need.

Source: OP-TEE's dumps of TAs; memory sizing reference, section 2. Regions lie one behind the other, parameters behind
the TA's own, so the tables that are needed are those from the first region's window to the last one's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from optee.memory.build import PAGE, Geometry, up

USER_VA: Final = 0x4000_0000
"""Where user space begins."""
FIRST_VA: Final = 0x4000_5000
"""Of the first region."""
DATA: Final = 0x2000
"""Bytes of .data, .got and the like, in the region that also holds the heap."""


class PrivateRegion(NamedTuple):
    """A region in memory of the TA's own: physically contiguous, whole pages."""

    size: int
    flags: str
    """r, w, x and s (secure), or - for each that it is not."""
    what: str
    """(ldelf), (stack), [0] for the TA's own ELF file, or nothing."""


_LDELF: Final = (
    PrivateRegion(0x2000, "rw-s", "(ldelf)"),
    PrivateRegion(0x8000, "r-xs", "(ldelf)"),
    PrivateRegion(0x1000, "rw-s", "(ldelf)"),
    PrivateRegion(0x4000, "rw-s", "(ldelf)"),
    PrivateRegion(0x1000, "r--s", ""),
)
REGIONS: Final = len(_LDELF) + 3
"""Regions of its own that each TA has."""


def private_regions(stack: int, code: int, heap: int) -> tuple[PrivateRegion, ...]:
    """Regions of a TA with so many bytes of stack, of code and constants, and of heap."""
    return (
        *_LDELF,
        PrivateRegion(_pages(stack), "rw-s", "(stack)"),
        PrivateRegion(_pages(code), "r-xs", "[0]"),
        PrivateRegion(_pages(DATA + heap), "rw-s", "[0]"),
    )


def mapped(regions: Iterable[int]) -> int:
    """Virtual address behind regions of these sizes."""
    return FIRST_VA + sum(regions)


def tables_for(geometry: Geometry, end_va: int) -> int:
    """Translation tables of a TA whose last region ends there."""
    return geometry.windows(FIRST_VA, end_va)


def _pages(size: int) -> int:
    return max(up(size), PAGE)
