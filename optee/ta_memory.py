"""Memory of a loaded TA: its regions in secure memory, and what the core keeps about them.

Source: memory sizing reference, sections 2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hv_models.memory import PAGE_MASK
from optee.abi.results import Result
from optee.errors import TeeError
from optee.memory.address_space import FIRST_VA, USER_VA, private_regions, tables_for
from optee.memory.build import GROUP, PAGE
from optee.memory.needs import groups
from optee.memory.pool import Owner
from optee.memory.pools import GuestPools
from optee.memory.structures import TABLE_GROUP, VM_REGION, ta_context
from optee.parameters import Memref, Params

if TYPE_CHECKING:
    from optee.trusted_application import TrustedApplication

_NOTHING: Final[tuple[int, ...]] = ()


class TablesNotAvailable(TeeError):
    """One context needs more translation tables than there are."""

    def __init__(self, needed: int) -> None:
        super().__init__(Result.OUT_OF_MEMORY)
        self.needed = needed

    def console(self) -> str:
        """What OP-TEE prints."""
        return f"E/TC:?? 0 alloc_pgt: {self.needed} page tables not available"


class NotMapped(TeeError):
    """The memory references of a call could not be mapped: the TA has not run."""


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


class Mapped:
    """What a call adds to an instance while it runs."""

    __slots__ = ("groups", "regions", "tables")

    def __init__(self, tables: int, regions: tuple[int, ...], groups: tuple[int, ...]) -> None:
        self.tables = tables
        """Of the pool, that the whole instance needs for this call."""
        self.regions = regions
        self.groups = groups


class TaMemory:
    """The memory of one instance. Raises TeeError(OUT_OF_MEMORY), and then has taken nothing."""

    def __init__(self, pools: GuestPools, ta: type[TrustedApplication], session: int) -> None:
        sizes = private_regions(ta.stack_size, ta.code_size, ta.data_size)
        self._pools = pools
        self._owner = owner = Owner(ta.__name__, pools.guest, session)
        self.end_va = FIRST_VA + sum(region.size for region in sizes)
        self.tables = self._tables(self.end_va)
        """Of the pool, that a call without memory references needs."""
        self._heap = pools.heap.allocate_all(ta_context(len(sizes)), owner)
        self._groups: tuple[int, ...] = _NOTHING
        self._plain = Mapped(self.tables, _NOTHING, _NOTHING)
        self._ram: list[int] = []
        va, regions = FIRST_VA, []
        try:
            for size, flags, what in sizes:
                pa = pools.ta_ram.allocate(size, owner)
                self._ram.append(pa)
                regions.append(Region(va, pa, size, flags, what))
                va += size
            self._groups = self._take_groups(self.end_va, 0)
        except TeeError:
            self.free()
            raise
        self.regions = tuple(regions)

    @property
    def stack_base(self) -> int:
        """Lowest virtual address of the stack."""
        return next(region.va for region in self.regions if region.what == "(stack)")

    def _tables(self, end_va: int) -> int:
        """Tables of the pool for an address space that ends there. Raises TeeError."""
        build = self._pools.build
        if end_va - USER_VA > build.geometry.user_space:
            raise TeeError(Result.OUT_OF_MEMORY)
        if build.prealloc:
            return 0
        needed = tables_for(build.geometry, end_va)
        if not self._pools.tables.check(needed):
            raise TablesNotAvailable(needed)
        return needed

    def _take_groups(self, end_va: int, held: int) -> tuple[int, ...]:
        """Groups of preallocated tables beyond those that are held: a piece of TA RAM and of heap for each."""
        build = self._pools.build
        if not build.prealloc:
            return _NOTHING
        taken: list[int] = []
        try:
            for _ in range(groups(build, tables_for(build.geometry, end_va)) - held):
                address = self._pools.heap.allocate(TABLE_GROUP, self._owner)
                taken.append(address)
                address = self._pools.ta_ram.allocate(GROUP * PAGE, self._owner)
                taken.append(address)
        except TeeError:
            self._give_groups(tuple(taken))
            raise
        return tuple(taken)

    def _give_groups(self, taken: tuple[int, ...]) -> None:
        for address in taken[0::2]:
            self._pools.heap.free(address)
        for pa in taken[1::2]:
            self._pools.ta_ram.free(pa)

    def map_parameters(self, params: Params) -> Mapped:
        """Map the memory references of a call behind the TA's own regions. Raises TeeError(OUT_OF_MEMORY)."""
        sizes = _merged(params)
        if not sizes:
            return self._plain
        end_va = self.end_va + sum(sizes)
        tables = self._tables(end_va)
        regions = self._pools.heap.allocate_all((VM_REGION,) * len(sizes), self._owner)
        if not self._pools.build.prealloc:
            return Mapped(tables, regions, _NOTHING)
        try:
            return Mapped(tables, regions, self._take_groups(end_va, len(self._groups) // 2))
        except TeeError:
            self._pools.heap.free_all(regions)
            raise

    def unmap_parameters(self, mapped: Mapped) -> None:
        """End what `map_parameters` began."""
        if mapped is not self._plain:
            self._pools.heap.free_all(mapped.regions)
            self._give_groups(mapped.groups)

    def free(self) -> None:
        """Give the memory back."""
        self._give_groups(self._groups)
        for pa in self._ram:
            self._pools.ta_ram.free(pa)
        self._pools.heap.free_all(self._heap)


def _merged(params: Params) -> Sequence[int]:
    """Sizes of the regions that memory references become: those that touch in one buffer are one."""
    spans: list[tuple[int, int, int]] = []
    for param in params:
        if type(param) is Memref and param.capacity and param.buffer is not None:
            start = param.offset + param.buffer.start
            end = (start + param.capacity + PAGE_MASK) & ~PAGE_MASK
            spans.append((id(param.buffer), start & ~PAGE_MASK, end))
    if not spans:
        return _NOTHING
    if len(spans) == 1:
        return (spans[0][2] - spans[0][1],)
    spans.sort()
    merged = spans[:1]
    for span in spans[1:]:
        buffer, start, end = merged[-1]
        if span[0] == buffer and span[1] <= end:
            merged[-1] = buffer, start, max(end, span[2])
        else:
            merged.append(span)
    return [end - start for _, start, end in merged]
