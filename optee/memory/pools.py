"""The pools of a running OP-TEE: those of the machine (the nexus), and those of each guest.

Source: OP-TEE core behaviour, section 1; memory sizing reference, section 5. All guests get equal shares of secure RAM,
also where they are alone. Of a guest nothing can be taken by another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from optee.errors import TeeError
from optee.memory.build import CORE_OWN, PAGE, THREAD_STACK_PAGES, Build
from optee.memory.heap import HEADER, Heap
from optee.memory.pool import Allocation, Owner, Statistics
from optee.memory.structures import GUEST
from optee.memory.ta_ram import TaRam
from optee.memory.tables import TablePool


class LowMemory(NamedTuple):
    """Four fifths of a pool were taken for the first time, or it failed for the first time."""

    pool: str
    guest: int
    statistics: Statistics


OnLow = Callable[[LowMemory], None]


class GuestPools:
    """Memory that one guest has to itself."""

    def __init__(self, build: Build, guest: int, ta_ram: TaRam, on_low: OnLow) -> None:
        self.build = build
        self.guest = guest
        self.heap = Heap(build.heap, best_fit=build.best_fit)
        """The core's heap."""
        self.ta_ram = ta_ram
        self.tables = TablePool(build)
        self._core = Owner("core", guest)
        self.heap.allocate(CORE_OWN - HEADER, self._core)
        if build.stacks:
            for _ in range(build.threads):
                self.ta_ram.allocate(THREAD_STACK_PAGES * PAGE, self._core)
        for pool in (self.heap, self.ta_ram):
            pool.on_low = lambda pool: on_low(LowMemory(pool.name, guest, pool.statistics))

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Counters by the pool's name; of translation tables in tables, else in bytes."""
        return {pool.name: pool.statistics for pool in (self.heap, self.ta_ram, self.tables)}

    def left(self) -> list[Allocation]:
        """Everything that is allocated but for what the core itself keeps."""
        everything = (*self.heap.allocations(), *self.ta_ram.allocations())
        return [allocation for allocation in everything if allocation.owner is not self._core]


class NexusPools:
    """Memory of the machine, out of which guests are made."""

    def __init__(self, build: Build, secure_ram_base: int, on_low: OnLow) -> None:
        assert build.secure_ram is not None
        self.build = build
        self.heap = Heap(build.nexus_heap, "KHeap")
        self._on_low = on_low
        self._ram = TaRam(secure_ram_base + build.tee_ram, max(build.secure_ram - build.tee_ram, 0), "secure RAM")
        self._held: dict[GuestPools, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.heap.on_low = lambda pool: on_low(LowMemory(pool.name, 0, pool.statistics))

    def create_guest(self, guest: int) -> GuestPools:
        """Take a guest's share. Raises TeeError(OUT_OF_MEMORY)."""
        build, owner = self.build, Owner("guest", guest)
        nexus = self.heap.allocate_all(GUEST, owner)
        taken: list[int] = []
        try:
            if build.virtualization:
                for size in (build.core_rw, build.core_tables):
                    pa = self._ram.allocate(size, owner)
                    taken.append(pa)
            size = build.ta_ram or 0
            taken.append(self._ram.allocate(size, owner))
            pools = GuestPools(build, guest, TaRam(taken[-1], size), self._on_low)
        except TeeError:
            self._give(nexus, tuple(taken))
            raise
        self._held[pools] = nexus, tuple(taken)
        return pools

    def destroy_guest(self, pools: GuestPools) -> None:
        """Take a guest's share back."""
        self._give(*self._held.pop(pools))

    def _give(self, nexus: tuple[int, ...], ram: tuple[int, ...]) -> None:
        self.heap.free_all(nexus)
        for pa in ram:
            self._ram.free(pa)
