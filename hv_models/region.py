"""RAM regions and pins: the part of translation that page lists of thousands of entries go through.

A region keeps the answer to "may this page be shared, and which page of the bank is it?" for each of its
pages in one dense array, its TLB, so that a list is translated by a few array operations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hv_models.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Bank, IndexArray, Ipa, PageArray, sparse_zeros


class Region:
    """A contiguous range of IPAs that is backed, page by page, by one bank (a KVM memory slot).

    `pas[n]` is the PA of the page at IPA base + 4096 * n if that page is normal read-write RAM which may be shared
    with OP-TEE, and 0 otherwise. One more element, always 0, stands at the end for every address outside: look-ups
    clip to it.
    """

    def __init__(self, base: int, bank: Bank) -> None:
        if base < 0 or base & PAGE_MASK:
            raise ValueError(f"RAM starts at a page-aligned IPA, not {base:#x}")
        self.base = Ipa(base)
        self.bank = bank
        self.pages = bank.store.pages
        self.size = self.pages * PAGE_SIZE
        self.view = bank.store.view
        self.octets = bank.store.octets
        self.base_word: PageArray = np.array(base, dtype=np.uint64)
        self.pas: PageArray = sparse_zeros(self.pages + 1, np.dtype(np.uint64))
        self.entries: npt.NDArray[np.int32] = sparse_zeros(self.pages + 1, np.dtype(np.int32))
        """1 + the number of the bank's page where `pas` is not 0, and 0 elsewhere."""
        self.lookup = memoryview(self.entries.data)
        """The same entries for look-up of single pages (`memoryview` indexes faster than an array)."""
        self.dirty: npt.NDArray[np.bool_] | None = None
        """While writes are logged: which pages were written since the log was last read."""

    def __repr__(self) -> str:
        return f"<Region {self.base:#x}-{self.end - 1:#x} on {self.bank!r}>"

    @property
    def end(self) -> int:
        """First IPA behind the region."""
        return self.base + self.size

    def overlaps(self, base: int, size: int) -> bool:
        """Whether a range of IPAs has a page in common with the region."""
        return base < self.end and self.base < base + size

    def index(self, ipa: int) -> int | None:
        """Number of the page that contains `ipa`, if it lies in the region."""
        index = (ipa - self.base) >> PAGE_SHIFT
        return index if 0 <= index < self.pages else None

    def ipa(self, index: int) -> Ipa:
        """IPA of a page of the region."""
        return Ipa(self.base + (index << PAGE_SHIFT))

    def addresses(self) -> PageArray:
        """IPA of each page."""
        return (np.arange(self.pages, dtype=np.uint64) << np.uint64(PAGE_SHIFT)) + self.base_word


class Part(NamedTuple):
    """Pages of a pin that lie in one bank."""

    bank: Bank
    pas: PageArray
    """PA of each."""
    region: Region | None
    """The region that the guest named them in; None for addresses outside of its RAM."""
    places: IndexArray
    """Number of the page in that region."""
    positions: IndexArray | None
    """Places in the whole pin, ascending; None if the part is the whole."""


class Pinned:
    """Pages that `VirtualMachine.pin` pinned, in the order in which they were named.

    Only `pas` is meant for the holder; the rest is the VM's.
    """

    __slots__ = ("owner", "parts", "pas")

    def __init__(self, owner: object, pas: PageArray, parts: tuple[Part, ...]) -> None:
        self.pas = pas
        """PA of each page, u64."""
        self.owner: object | None = owner
        """The VM that pinned the pages; None once they are unpinned."""
        self.parts = parts

    def __len__(self) -> int:
        return len(self.pas)

    def __repr__(self) -> str:
        state = "" if self.owner is not None else ", released"
        return f"<Pinned {len(self.pas)} pages{state}>"

    def page(self, position: int) -> memoryview:
        """The 4096 bytes of one of the pages."""
        for part in self.parts:
            if part.positions is None:
                return part.bank.frame(int(part.pas[position]))
            place = int(np.searchsorted(part.positions, position))
            if place < len(part.positions) and part.positions[place] == position:
                return part.bank.frame(int(part.pas[place]))
        raise IndexError(position)
