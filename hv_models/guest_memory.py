"""Guest memory as a mediator reaches it: copies, and pins that hold pages while OP-TEE has their addresses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from hv_models.memory import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Bank,
    Gfn,
    GuestRam,
    IndexArray,
    Ipa,
    PageArray,
    PhysicalFault,
    PhysicalMemory,
)
from hv_models.region import Part, Pinned, Region
from hv_models.stage2 import PageKind, Reason, Stage2, Stage2Fault
from hv_models.walk import REFUSED_KINDS

_SHIFT = np.array(PAGE_SHIFT, dtype=np.uint64)  # arrays without dimensions are the fastest operands
_MASK = np.array(PAGE_MASK, dtype=np.uint64)
_INT64 = np.dtype(np.int64)
_READABLE: Final = frozenset({PageKind.RAM_RW, PageKind.RAM_RO})


class _NoRegion(Region):
    """Stands for the first region of a VM that has no RAM: every look-up misses."""

    def __init__(self) -> None:
        self.base = Ipa(0)
        self.size = self.pages = 0
        self.base_word = np.array(0, dtype=np.uint64)
        self.pas = np.zeros(1, dtype=np.uint64)


_NO_REGION: Final[Region] = _NoRegion()


class GuestMemory:
    """The memory of one VM behind its stage-2 tables.

    Addresses may be any integers; whatever is not allowed raises `Stage2Fault` and changes nothing.
    """

    def __init__(self, name: str, memory: PhysicalMemory, stage2: Stage2, release: Callable[[Bank], None]) -> None:
        self.name = name
        self.stage2 = stage2
        self._memory = memory
        self._release = release
        self._first = _NO_REGION
        self._removed: list[Region] = []

    @property
    def regions(self) -> Sequence[Region]:
        """The RAM of the VM, in the order in which it was added."""
        return self.stage2.regions

    @property
    def ram(self) -> tuple[GuestRam, ...]:
        """The RAM as the guest sees it, one `GuestRam` per region."""
        return tuple(GuestRam(region.bank.store, region.base) for region in self.regions)

    @property
    def allowed_shared_frames(self) -> frozenset[int]:
        """IPAs of pages that this VM may share with OP-TEE although another VM maps their frame (R26)."""
        return self.stage2.allowed

    @allowed_shared_frames.setter
    def allowed_shared_frames(self, ipas: frozenset[int]) -> None:
        self.stage2.allowed = ipas

    def read(self, ipa: int, size: int, *, writable: bool = False) -> bytes:
        """Copy bytes of one page of RAM; with `writable` it must be read-write RAM. Raises Stage2Fault."""
        region = self._first
        offset = ipa - region.base
        within = offset & PAGE_MASK
        if 0 <= offset < region.size and 0 <= size <= PAGE_SIZE - within:
            entry = region.lookup[offset >> PAGE_SHIFT]
            if entry:
                start = (entry - 1 << PAGE_SHIFT) + within
                return region.octets[start : start + size]
        bank, page = self._resolve(ipa, size, writable)
        return bank.page_view(page)[within : within + size].tobytes()

    def write(self, ipa: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes of one page of read-write RAM. Raises Stage2Fault."""
        region = self._first
        offset = ipa - region.base
        within = offset & PAGE_MASK
        size = len(data)
        if 0 <= offset < region.size and size <= PAGE_SIZE - within:
            index = offset >> PAGE_SHIFT
            entry = region.lookup[index]
            if entry:
                start = (entry - 1 << PAGE_SHIFT) + within
                region.view[start : start + size] = data
                if region.dirty is not None:
                    region.dirty[index] = True
                return
        bank, page = self._resolve(ipa, size, True)
        bank.page_view(page)[within : within + size] = data
        place = self._place(ipa)
        if place is not None and place[0].dirty is not None:
            place[0].dirty[place[1]] = True

    def write_fields(self, ipa: int, data: bytes, fields: Sequence[slice]) -> None:
        """Write these fields of `data`, which belongs at `ipa` in one page, looked up once. Raises Stage2Fault.

        Fields are slices of `data` with a start and a stop; what lies between them stays as it is.
        """
        region = self._first
        distance = ipa - region.base
        within = distance & PAGE_MASK
        if 0 <= distance < region.size and len(data) <= PAGE_SIZE - within:
            index = distance >> PAGE_SHIFT
            entry = region.lookup[index]
            if entry:
                start = (entry - 1 << PAGE_SHIFT) + within
                view = region.view[start : start + len(data)]
                for field in fields:
                    view[field] = data[field]
                if region.dirty is not None:
                    region.dirty[index] = True
                return
        for field in fields:
            self.write(ipa + field.start, data[field])

    def pin(self, ipas: PageArray) -> Pinned:
        """Translate page addresses and keep each page from being given away until `unpin`.

        Only normal read-write RAM of this VM may be pinned, not the page at IPA 0 and no frame that another
        VM maps. A page that is named twice is pinned twice. All or nothing: raises Stage2Fault for the
        first page that cannot be pinned. What is checked and what is pinned is one copy of `ipas`.
        """
        pinned = self._pin_in(self._first, ipas)
        return self._pin_slowly(ipas.copy()) if pinned is None else pinned

    def unpin(self, pinned: Pinned) -> None:
        """Undo one `pin`. Raises ValueError if these pages are not pinned by this VM (any more)."""
        if pinned.owner is not self:
            raise ValueError(f"{pinned!r} is not pinned by {self.name}")
        pinned.owner = None
        for part in pinned.parts:
            part.bank.unpin(part.pas)
        if self._removed:
            self._release_removed()

    def load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        """Copy bytes of pinned pages; `offset` counts from the start of the first page."""
        pieces = [page[start:stop] for page, start, stop in self._pieces(pinned, offset, size)]
        return pieces[0].tobytes() if len(pieces) == 1 else b"".join(pieces)

    def store_fields(self, pinned: Pinned, base: int, data: bytes, fields: Sequence[slice]) -> None:
        """Write fields of `data`, which belongs into pinned pages; `base` counts from the start of the first page.

        Raises ValueError, with nothing written, for a field outside of the pages.
        """
        number = base >> PAGE_SHIFT
        start = base & PAGE_MASK
        end = base + len(data)
        if start + len(data) <= PAGE_SIZE and base >= 0 and pinned.owner is self and number < len(pinned.pas):
            page = pinned.page(number)[start : start + len(data)]
            for field in fields:
                page[field] = data[field]
        else:
            end = base + max((field.stop for field in fields), default=0)
            pieces = [list(self._pieces(pinned, base + field.start, field.stop - field.start)) for field in fields]
            for field, places in zip(fields, pieces, strict=True):
                done = field.start
                for page, start, stop in places:
                    page[start:stop] = data[done : done + stop - start]
                    done += stop - start
        self._mark(pinned, number, (end + PAGE_MASK) >> PAGE_SHIFT)

    def mark_dirty(self, pinned: Pinned) -> None:
        """Tell the hypervisor that the secure world may have written to all pages of a pin (R27)."""
        for part in pinned.parts:
            if part.region is not None and part.region.dirty is not None:
                part.region.dirty[part.places] = True

    def pinned(self) -> dict[Gfn, int]:
        """References per page, of the pages that have any. A page counts where its RAM lies, or lay."""
        counts: Counter[Gfn] = Counter()
        for region in (*self._removed, *self.regions):
            for page, count in region.bank.pinned().items():
                counts[Gfn((region.base >> PAGE_SHIFT) + page)] += count
        return counts

    @property
    def pins(self) -> int:
        """Sum of all references on pages of this VM."""
        return sum(int(region.bank.pins.sum()) for region in (*self._removed, *self.regions))

    def _fault_in(self, ipas: PageArray) -> bool:
        """Map those of the pages that should be mapped but are not; whether there were any."""
        return False

    def _add_region(self, region: Region) -> None:
        self.stage2.add_region(region)
        self._first = self.regions[0]

    def _remove_region(self, region: Region) -> None:
        """Take RAM away; its bank is released once no page of it is pinned."""
        self.stage2.remove_region(region)
        self._first = self.regions[0] if self.regions else _NO_REGION
        self._removed.append(region)
        self._release_removed()

    def _release_removed(self) -> None:
        for region in list(self._removed):
            if not region.bank.pins.any():
                self._removed.remove(region)
                self._release(region.bank)

    def _place(self, ipa: int) -> tuple[Region, int] | None:
        """The region of an address, and the number of the page in it."""
        for region in self.regions:
            index = region.index(ipa)
            if index is not None:
                return region, index
        return None

    def _resolve(self, ipa: int, size: int, writable: bool) -> tuple[Bank, int]:
        """The page behind an access that the first region's TLB did not answer. Raises Stage2Fault."""
        if size < 0 or (ipa & PAGE_MASK) + size > PAGE_SIZE:
            raise Stage2Fault(ipa, Reason.CROSSES_PAGE)
        place = self._place(ipa)
        if place is not None and place[0].lookup[place[1]]:
            return place[0].bank, place[0].lookup[place[1]] - 1
        bank, page, kind = self._backing(ipa)
        if kind not in _READABLE or (writable and kind is not PageKind.RAM_RW):
            raise Stage2Fault(ipa, REFUSED_KINDS[kind])
        return bank, page

    def _backing(self, ipa: int) -> tuple[Bank, int, PageKind]:
        walk = self.stage2.walk(ipa)
        if walk.fault and 0 <= ipa < 1 << 64 and self._fault_in(np.array([ipa & ~PAGE_MASK], dtype=np.uint64)):
            walk = self.stage2.walk(ipa)
        if walk.pa is None:
            raise Stage2Fault(ipa, Reason.UNMAPPED)
        if walk.kind not in _READABLE:
            raise Stage2Fault(ipa, REFUSED_KINDS[walk.kind])
        try:
            bank, page = self._memory.find(walk.pa)
        except PhysicalFault:
            raise Stage2Fault(ipa, Reason.HOLE) from None
        return bank, page, walk.kind

    def _pin_in(self, region: Region, ipas: PageArray) -> Pinned | None:
        """Pin pages all of which are in the TLB of one region; None if they are not."""
        offsets = ipas - region.base_word
        index = (offsets >> _SHIFT).view(_INT64)
        try:
            pas = region.pas[index]
        except IndexError:
            return None
        if np.count_nonzero(pas) != len(pas) or np.count_nonzero(offsets & _MASK):
            return None
        region.bank.pin(pas)
        return Pinned(self, pas, (Part(region.bank, pas, region, index, None),))

    def _pin_slowly(self, ipas: PageArray) -> Pinned:
        """Pin pages that are not all in the first region's TLB."""
        for region in self.regions[1:]:
            pinned = self._pin_in(region, ipas)
            if pinned is not None:
                return pinned
        parts, missing = self._gather(ipas)
        if len(missing) and self._fault_in(ipas[missing]):
            pinned = self._pin_in(self._first, ipas)
            if pinned is not None:
                return pinned
            parts, missing = self._gather(ipas)
        for position in missing.tolist():
            ipa = int(ipas[position])
            bank, page = self._shareable(ipa)
            named, index = self._place(ipa) or (None, 0)
            pa = np.array([bank.frames.address(page)], dtype=np.uint64)
            parts.append(Part(bank, pa, named, np.array([index]), np.array([position])))
        pas = np.zeros(len(ipas), dtype=np.uint64)
        for part in parts:
            part.bank.pin(part.pas)
            pas[part.positions] = part.pas
        return Pinned(self, pas, tuple(parts))

    def _gather(self, ipas: PageArray) -> tuple[list[Part], IndexArray]:
        """What the TLBs of all regions say; and the positions of the pages that none of them has."""
        parts: list[Part] = []
        aligned = ipas & _MASK == 0
        missing = np.ones(len(ipas), dtype=np.bool_)
        for region in self.regions:
            index = ((ipas - region.base_word) >> _SHIFT).view(np.int64)
            pas = region.pas.take(index, mode="clip")
            positions = np.flatnonzero((pas != 0) & aligned)
            if len(positions):
                parts.append(Part(region.bank, pas[positions], region, index[positions], positions))
                missing[positions] = False
        return parts, np.flatnonzero(missing)

    def _shareable(self, ipa: int) -> tuple[Bank, int]:
        """The page of an address that the TLBs do not have. Raises Stage2Fault if it may not be pinned."""
        if ipa == 0:
            raise Stage2Fault(ipa, Reason.NULL)
        if ipa & PAGE_MASK:
            raise Stage2Fault(ipa, Reason.UNALIGNED)
        bank, page, kind = self._backing(ipa)
        if kind is not PageKind.RAM_RW:
            raise Stage2Fault(ipa, REFUSED_KINDS[kind])
        if not self.stage2.shareable(ipa, bank, page):
            raise Stage2Fault(ipa, Reason.SHARED)
        return bank, page

    def _pieces(self, pinned: Pinned, offset: int, size: int) -> Iterator[tuple[memoryview, int, int]]:
        if pinned.owner is not self:
            raise ValueError(f"{pinned!r} is not pinned by {self.name}")
        if offset < 0 or size < 0 or offset + size > len(pinned) << PAGE_SHIFT:
            raise ValueError(f"{size} bytes at {offset} are outside of {pinned!r}")
        while size:
            start = offset & PAGE_MASK
            count = min(size, PAGE_SIZE - start)
            yield pinned.page(offset >> PAGE_SHIFT), start, start + count
            offset += count
            size -= count

    def _mark(self, pinned: Pinned, first: int, last: int) -> None:
        for part in pinned.parts:
            if part.region is not None and part.region.dirty is not None:
                index = part.places
                if part.positions is None:
                    index = index[first:last]
                else:
                    index = index[(part.positions >= first) & (part.positions < last)]
                part.region.dirty[index] = True
