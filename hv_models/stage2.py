"""Stage-2 translation: VMSAv8-64 tables in modelled memory, and the TLB kept in step.

4 KiB granule, 39-bit IPAs, walks start at level 1; level 1 and 2 leaves are blocks of 1 GiB and 2 MiB.
Everything that changes a table goes through one of two functions, `_write` and `_write_scattered`, which
bring the TLB of the regions along.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from hv_models.descriptor import (
    ADDRESS,
    BLOCK_PAGES,
    ENTRIES,
    IPA_BITS,
    LEAF_ATTRIBUTES,
    LEVEL_SHIFT,
    LOGGED,
    RAMP,
    S2AP_WRITE,
    TABLE_OR_PAGE,
    VALID,
    Descriptor,
    PageKind,
    is_ram_rw,
    join,
    split,
)
from hv_models.memory import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    Bank,
    IndexArray,
    Ipa,
    Pa,
    PageArray,
    PhysicalMemory,
)
from hv_models.pages import Page, PagePool
from hv_models.region import Pinned, Region
from hv_models.sharing import FrameSharing
from hv_models.walk import Reason, Stage2Fault, Walk, walk

__all__ = ["PageKind", "Pinned", "Reason", "Stage2", "Stage2Fault", "Walk"]

_ADDRESS = np.uint64(ADDRESS)
_VALID = np.uint64(VALID)
_PAGE_SHIFT = np.uint64(PAGE_SHIFT)
_GROUP_SHIFT = np.uint64(LEVEL_SHIFT[2])
_GROUP_MASK = (1 << LEVEL_SHIFT[2]) - 1
_INDEX_MASK = np.uint64(ENTRIES - 1)
_NOWHERE = np.uint64(0)


class Stage2:
    """The stage-2 tables of one VM, in pages of `pool`, which is part of `memory`.

    IPAs and page counts of the methods are trusted (hypervisor code calls them), except in `walk`, which
    takes any integer.
    """

    def __init__(self, memory: PhysicalMemory, pool: PagePool, sharing: FrameSharing) -> None:
        self._memory = memory
        self._pool = pool
        self._sharing = sharing
        self._pages: dict[int, Page] = {}
        self.regions: list[Region] = []
        self.allowed: frozenset[int] = frozenset()
        """IPAs of pages that may be shared with OP-TEE although another VM maps them; not in the TLB."""
        self.root = self._new_table()
        """PA of the level 1 table (what VTTBR_EL2.BADDR holds)."""

    @property
    def tables(self) -> int:
        """Pages that the tables take."""
        return len(self._pages)

    def walk(self, ipa: int) -> Walk:
        """Translate one address by walking the tables as the hardware does."""
        return walk(self.root, self._table, ipa)

    def map(self, ipa: int, pas: PageArray, kind: PageKind) -> None:
        """Map consecutive pages from `ipa` to the given frames, by blocks where frames and addresses allow."""
        self._write(ipa, pas | np.uint64(LEAF_ATTRIBUTES[kind] | TABLE_OR_PAGE))

    def map_scattered(self, ipas: PageArray, pas: PageArray, *, logged: bool = False) -> None:
        """Map single pages of RAM, each to its frame; with `logged`, write-protected for dirty logging."""
        attributes = LEAF_ATTRIBUTES[PageKind.RAM_RW] | TABLE_OR_PAGE
        if logged:
            attributes = attributes & ~S2AP_WRITE | LOGGED
        self._write_scattered(ipas, pas | np.uint64(attributes))

    def unmap(self, ipa: int, pages: int) -> None:
        """Make accesses to a range fault."""
        self._write(ipa, np.zeros(pages, dtype=np.uint64))

    def change(self, ipa: int, pages: int, kind: PageKind) -> None:
        """Give mapped pages another kind; their frames stay. Raises Stage2Fault if one is not mapped."""
        if kind is PageKind.NONE:
            self.unmap(ipa, pages)
            return
        descriptors = self.descriptors(ipa, pages)
        valid = descriptors & _VALID
        if not valid.all():
            raise Stage2Fault(ipa + (int(valid.argmin()) << PAGE_SHIFT), Reason.UNMAPPED)
        self._write(ipa, descriptors & _ADDRESS | np.uint64(LEAF_ATTRIBUTES[kind] | TABLE_OR_PAGE))

    def protect_for_logging(self, ipas: PageArray) -> None:
        """Write-protect those of the pages that are read-write RAM, so that the guest's next write faults."""
        descriptors = self.lookup(ipas)
        ram = is_ram_rw(descriptors)
        protected = descriptors[ram] & ~np.uint64(S2AP_WRITE) | np.uint64(LOGGED)
        self._write_scattered(ipas[ram], protected)

    def unprotect_logged(self, ipas: PageArray) -> None:
        """Give write access back where `protect_for_logging` took it."""
        descriptors = self.lookup(ipas)
        logged = descriptors & np.uint64(LOGGED) != 0
        writable = descriptors[logged] & ~np.uint64(LOGGED) | np.uint64(S2AP_WRITE)
        self._write_scattered(ipas[logged], writable)

    def descriptors(self, ipa: int, pages: int) -> PageArray:
        """The leaf of each page of a range as a page descriptor, whatever its level; 0 where there is none."""
        found = np.zeros(pages, dtype=np.uint64)
        for first, last, at in _groups(ipa, pages):
            leaf = self._leaf(at)
            index = (at >> PAGE_SHIFT) % ENTRIES
            if not isinstance(leaf, int):
                found[first:last] = leaf[index : index + last - first]
            elif leaf:
                found[first:last] = RAMP[index : index + last - first] + np.uint64(leaf)
        return found

    def lookup(self, ipas: PageArray) -> PageArray:
        """The leaf of each of any pages as a page descriptor; 0 where there is none."""
        found = np.zeros(len(ipas), dtype=np.uint64)
        for places, at in _scattered_groups(ipas):
            leaf = self._leaf(at)
            index = ipas[places] >> _PAGE_SHIFT & _INDEX_MASK
            if not isinstance(leaf, int):
                found[places] = leaf[index.view(np.int64)]
            elif leaf:
                found[places] = (index << _PAGE_SHIFT) + np.uint64(leaf)
        return found

    def find(self, pa: int) -> list[Ipa]:
        """All page addresses at which this VM maps the frame of `pa`, ascending."""
        frame = np.uint64(pa & ~PAGE_MASK)
        found: list[Ipa] = []
        for base, level, leaves in self._leaves():
            size = np.uint64(BLOCK_PAGES[level] * PAGE_SIZE)
            offset = frame - (leaves & _ADDRESS)
            places = np.flatnonzero((leaves & _VALID != 0) & (offset < size)).tolist()
            found += (Ipa(base + (place << LEVEL_SHIFT[level]) + int(offset[place])) for place in places)
        return sorted(found)

    def add_region(self, region: Region) -> None:
        """Keep a TLB for a range of IPAs; its bank becomes this VM's."""
        if region.end > 1 << IPA_BITS:
            raise ValueError(f"RAM ends at IPA {region.end:#x}, beyond {IPA_BITS}-bit IPAs")
        for other in self.regions:
            if region.overlaps(other.base, other.size):
                raise ValueError(f"RAM at IPA {region.base:#x} overlaps that at {other.base:#x}")
        self.regions.append(region)
        self._sharing.own(region.bank, self)
        self._fill_range(region.base, self.descriptors(region.base, region.pages))

    def remove_region(self, region: Region) -> None:
        """Unmap a region and forget it; other VMs that map frames of it lose them."""
        self.unmap(region.base, region.pages)
        self.unmap_frames(region.bank)  # pages of it that were mapped at other places too
        self.regions.remove(region)
        self._sharing.disown(region.bank)

    def unmap_frames(self, bank: Bank) -> None:
        """Unmap the frames of a bank wherever they are mapped; a block that reaches into it goes as a whole."""
        for base, level, leaves in list(self._leaves()):
            pas = leaves & _ADDRESS
            if level == 3:
                hit = bank.frames.find(pas) >= 0
            else:
                hit = (pas < bank.frames.end) & (pas + BLOCK_PAGES[level] * PAGE_SIZE > bank.frames.base)
            for place in np.flatnonzero(hit & (leaves & _VALID != 0)).tolist():
                self.unmap(base + (place << LEVEL_SHIFT[level]), BLOCK_PAGES[level])

    def refresh(self) -> None:
        """Bring the TLB up to date after the sharing of own frames changed."""
        for region in self.regions:
            self._fill_range(region.base, self.descriptors(region.base, region.pages))

    def shareable(self, ipa: int, bank: Bank, page: int) -> bool:
        """Whether the frame at `ipa` is mapped by this VM alone, or explicitly allowed (rule R26)."""
        own = any(region.bank is bank for region in self.regions)
        return (own and not self._sharing.shared(bank, page)) or ipa & ~PAGE_MASK in self.allowed

    def close(self) -> None:
        """Drop all regions and mappings and give the tables back."""
        for region in list(self.regions):
            self.remove_region(region)
        if self._sharing.mappings:
            for base, level, leaves in list(self._leaves()):
                if level == 3:
                    self.unmap(base, ENTRIES)
                    continue
                for place in np.flatnonzero(leaves & _VALID).tolist():
                    self.unmap(base + (place << LEVEL_SHIFT[level]), BLOCK_PAGES[level])
        for page in self._pages.values():
            self._pool.release(page)
        self._pages.clear()

    def _write(self, ipa: int, descriptors: PageArray) -> None:
        """Put page descriptors (0: unmapped) in place of what a range has: tables, sharing, and TLB."""
        used = self._foreign(descriptors)
        dropped = self._foreign(self.descriptors(ipa, len(descriptors))) if self._sharing.mappings else []
        position = 0
        while position < len(descriptors):
            position += self._write_leaf(ipa + (position << PAGE_SHIFT), descriptors[position:])
        self._fill_range(ipa, descriptors)
        if used or dropped:
            self._sharing.change(self, used, dropped)

    def _write_leaf(self, ipa: int, descriptors: PageArray) -> int:
        """Write the largest block that the descriptors begin with, or pages up to the next 2 MiB."""
        for level in (1, 2):
            pages = BLOCK_PAGES[level]
            if ipa % (pages * PAGE_SIZE) or len(descriptors) < pages:
                continue
            block = join(descriptors[:pages])
            if block is not None:
                self._set_block(ipa, level, block)
                return pages
        index = (ipa >> PAGE_SHIFT) % ENTRIES
        written = descriptors[: ENTRIES - index]
        if written.any() or not self._unmapped(ipa):
            self._table_at(ipa, 3)[index : index + len(written)] = written
        return len(written)

    def _write_scattered(self, ipas: PageArray, descriptors: PageArray) -> None:
        for places, at in _scattered_groups(ipas):
            index = (ipas[places] >> _PAGE_SHIFT & _INDEX_MASK).view(np.int64)
            self._table_at(at, 3)[index] = descriptors[places]
        for region in self.regions:
            inside = (ipas >= np.uint64(region.base)) & (ipas < np.uint64(region.end))
            offsets = (ipas[inside] - np.uint64(region.base)) >> _PAGE_SHIFT
            self._fill(region, offsets.view(np.int64), descriptors[inside])

    def _set_block(self, ipa: int, level: int, descriptor: int) -> None:
        """Put a block (0: nothing) at a level, in place of the tables that stood below."""
        if not descriptor and level == 2 and self._unmapped(ipa):
            return
        words = self._table_at(ipa, level)
        index = (ipa >> LEVEL_SHIFT[level]) % ENTRIES
        self._release_below(level, Descriptor(words[index]))
        words[index] = descriptor

    def _release_below(self, level: int, descriptor: Descriptor) -> None:
        if descriptor.is_table(level):
            if level == 1:
                for below in self._table(descriptor.address).tolist():
                    self._release_below(2, Descriptor(below))
            self._pool.release(self._pages.pop(descriptor.address))

    def _table_at(self, ipa: int, level: int) -> PageArray:
        """The table of a level that translates `ipa`; made if missing, by splitting the block there."""
        words = self._table(self.root)
        for above in range(1, level):
            index = (ipa >> LEVEL_SHIFT[above]) % ENTRIES
            descriptor = Descriptor(words[index])
            if not descriptor.is_table(above):
                table = self._new_table()
                if descriptor.valid:
                    self._table(table)[:] = split(descriptor, above)
                descriptor = Descriptor(table | VALID | TABLE_OR_PAGE)
                words[index] = descriptor
            words = self._table(descriptor.address)
        return words

    def _leaf(self, ipa: int) -> PageArray | int:
        """The level 3 table that translates `ipa`, or the first page descriptor of its 2 MiB (0: none)."""
        words = self._table(self.root)
        for level in (1, 2):
            descriptor = Descriptor(words[(ipa >> LEVEL_SHIFT[level]) % ENTRIES])
            if not descriptor.valid:
                return 0
            if not descriptor.is_table(level):
                within = ipa & (BLOCK_PAGES[level] * PAGE_SIZE - 1) & ~_GROUP_MASK
                return (descriptor | TABLE_OR_PAGE) + within
            words = self._table(descriptor.address)
        return words

    def _unmapped(self, ipa: int) -> bool:
        """Whether nothing at all is mapped in the 2 MiB around `ipa`, not even a table."""
        leaf = self._leaf(ipa)
        return isinstance(leaf, int) and not leaf

    def _leaves(self) -> Iterator[tuple[int, int, PageArray]]:
        """All leaves: (IPA of the first entry, level, entries); what is a table there shows as 0."""
        level1 = self._table(self.root)
        yield 0, 1, _without_tables(level1)
        for index1 in _tables_in(level1):
            base = index1 << LEVEL_SHIFT[1]
            level2 = self._table(int(level1[index1]) & ADDRESS)
            yield base, 2, _without_tables(level2)
            for index2 in _tables_in(level2):
                yield base + (index2 << LEVEL_SHIFT[2]), 3, self._table(int(level2[index2]) & ADDRESS)

    def _table(self, pa: int) -> PageArray:
        bank, page = self._memory.find(pa)
        words: PageArray = bank.store.words[page]
        return words

    def _new_table(self) -> Pa:
        page = self._pool.allocate()
        self._pages[page.pa] = page
        return page.pa

    def _foreign(self, descriptors: PageArray) -> list[tuple[Bank, int]]:
        """RAM of other VMs among the frames of the leaves."""
        pas = descriptors[descriptors & _VALID != 0] & _ADDRESS
        for region in self.regions:
            if not len(pas):
                break
            pas = pas[region.bank.frames.find(pas) < 0]
        return self._sharing.foreign(self, pas) if len(pas) else []

    def _fill_range(self, ipa: int, descriptors: PageArray) -> None:
        for region in self.regions:
            first = (max(ipa, region.base) - ipa) >> PAGE_SHIFT
            last = (min(ipa + (len(descriptors) << PAGE_SHIFT), region.end) - ipa) >> PAGE_SHIFT
            if first < last:
                start = (ipa - region.base >> PAGE_SHIFT) + first
                self._fill(region, slice(start, start + last - first), descriptors[first:last])

    def _fill(self, region: Region, index: slice | IndexArray, descriptors: PageArray) -> None:
        """Make TLB entries of page descriptors."""
        if not descriptors.any():
            if region.entries[index].any():  # what is not written costs no memory
                region.entries[index] = 0
                region.pas[index] = 0
            return
        pas = descriptors & _ADDRESS
        pages = region.bank.frames.find(pas)
        shareable = is_ram_rw(descriptors) & (pages >= 0)
        shared = self._sharing.shared_pages(region.bank)
        if shared:
            shareable &= ~np.isin(pages, shared)
        region.entries[index] = np.where(shareable, pages + 1, 0)
        region.pas[index] = np.where(shareable, pas, _NOWHERE)
        if region.base == 0:
            region.entries[0] = region.pas[0] = 0


def _groups(ipa: int, pages: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range at multiples of 2 MiB: (first page, behind last page, IPA of the first)."""
    first = 0
    while first < pages:
        at = ipa + (first << PAGE_SHIFT)
        last = min(pages, first + ENTRIES - (at >> PAGE_SHIFT) % ENTRIES)
        yield first, last, at
        first = last


def _scattered_groups(ipas: PageArray) -> Iterator[tuple[IndexArray, int]]:
    """Sort pages by the 2 MiB they lie in: (their places in `ipas`, IPA of the 2 MiB)."""
    groups = ipas >> _GROUP_SHIFT
    order = np.argsort(groups, kind="stable")
    groups = groups[order]
    bounds = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist(), len(ipas)]
    for start, stop in pairwise(bounds):
        if start < stop:
            yield order[start:stop], int(groups[start]) << LEVEL_SHIFT[2]


def _tables_in(words: PageArray) -> list[int]:
    found: list[int] = np.flatnonzero(words & np.uint64(3) == 3).tolist()
    return found


def _without_tables(words: PageArray) -> PageArray:
    return np.where(words & np.uint64(3) == 3, np.uint64(0), words)
