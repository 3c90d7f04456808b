"""Pools: slots of one size in slabs that are taken from the core's heap, one slab in advance.

A slab has a bitmap of its slots, the pool a list of free ones. A slot is zeroed when it is released. Releasing what
the pool does not hold, or holds no longer, is counted and changes nothing.
"""

from __future__ import annotations

import sys
from typing import Final

from optee.memory.heap import QUANTUM, Heap, block_size
from optee.memory.pool import Owner
from optee.storage.memory.statistics import LevelStatistics

_LEVELS: Final = frozenset(
    f"{__name__.rpartition('.')[0]}.{name}" for name in ("blocks", "buffers", "lru", "nodes", "objects", "pool", "rpmb")
)
"""Modules that allocate for somebody else."""


class Slab:
    """Adjacent slots: one allocation of the heap."""

    __slots__ = ("address", "base", "bitmap", "memory")

    def __init__(self, address: int, base: int, memory: memoryview) -> None:
        self.address = address
        """The allocation."""
        self.base = base
        """The first slot, aligned."""
        self.memory = memory
        self.bitmap = 0
        """Bit n: slot n is taken."""


class Slot:
    """A slot while it is taken: `view` are its bytes. A later owner of the same bytes gets a `Slot` of its own."""

    __slots__ = ("address", "slab", "view")

    def __init__(self, address: int, slab: Slab, view: memoryview) -> None:
        self.address = address
        self.slab: Slab | None = slab
        """None once it is released."""
        self.view = view


class Pool:
    """Up to `limit` slots of `size` bytes.

    reserve: bytes of the heap that the pool leaves free when it grows. places: note where slots are allocated.
    """

    def __init__(
        self,
        heap: Heap,
        owner: Owner,
        size: int,
        limit: int,
        slab_slots: int,
        *,
        alignment: int = QUANTUM,
        reserve: int = 0,
        places: bool = False,
    ) -> None:
        self.size = size
        self.limit = limit
        self.statistics = LevelStatistics()
        self.double_releases = 0
        self.foreign_releases = 0
        self.places: dict[int, str] | None = {} if places else None
        """By address: where a slot was allocated."""
        self._heap = heap
        self._owner = owner
        self._slab_slots = slab_slots
        self._alignment = alignment
        self._reserve = reserve
        self._zeroes = bytes(size)
        self._slabs: list[Slab] = []
        self._count = 0
        self._free: list[tuple[Slab, int]] = []
        """Free slots: slab and number in it."""
        if limit:
            self._grow()

    def __len__(self) -> int:
        """Slots that are taken."""
        return self._count - len(self._free)

    @property
    def charged(self) -> int:
        """Bytes of the heap that the slabs take."""
        return sum(self._footprint(slab) for slab in self._slabs)

    @property
    def fragmentation(self) -> float:
        """Share of the slabs' slots that are free; 0 without slabs."""
        return len(self._free) / self._count if self._count else 0.0

    def _footprint(self, slab: Slab) -> int:
        return block_size(self._slab_size(len(slab.memory) // self.size))

    def _slab_size(self, count: int) -> int:
        return count * self.size + self._alignment - QUANTUM

    def allocate(self) -> Slot | None:
        """Take a slot, full of zeroes; None if there is no room, or for more in the heap."""
        if not self._free and not self._grow():
            self.statistics.failures += 1
            return None
        slab, index = self._free.pop()
        slab.bitmap |= 1 << index
        start = index * self.size
        slot = Slot(slab.base + start, slab, slab.memory[start : start + self.size])
        self.statistics.took(self.size)
        if self.places is not None:
            self.places[slot.address] = place_of_caller()
        return slot

    def release(self, slot: Slot) -> bool:
        """Zero a slot and give it back; False, and no change, if it was released before or is none of this pool."""
        slab = slot.slab
        if slab is None:
            self.double_releases += 1
            return False
        if slab not in self._slabs:
            self.foreign_releases += 1
            return False
        slot.slab = None
        slot.view[:] = self._zeroes
        index = (slot.address - slab.base) // self.size
        slab.bitmap &= ~(1 << index)
        self._free.append((slab, index))
        self.statistics.gave(self.size)
        if self.places is not None:
            del self.places[slot.address]
        return True

    @property
    def bound(self) -> int:
        """The most that `charged` can be."""
        sizes = [self._slab_slots] * (self.limit // self._slab_slots) + [self.limit % self._slab_slots]
        return sum(block_size(self._slab_size(count)) for count in sizes if count)

    def trim(self, slabs: int, *, keep: int = 1) -> tuple[int, int]:
        """Give wholly free slabs back to the heap, but for the first `keep`; `slabs` are looked at, at most.

        How many it were, and the bytes that the heap gained.
        """
        gained = 0
        looked = self._slabs[keep:][-slabs:] if slabs > 0 else []
        for slab in looked:
            if not slab.bitmap:
                gained += self._footprint(slab)
                self._drop(slab)
        return len(looked), gained

    def _drop(self, slab: Slab) -> None:
        self._slabs.remove(slab)
        self._count -= len(slab.memory) // self.size
        self._heap.free(slab.address)
        self._free = [free for free in self._free if free[0] is not slab]

    def _grow(self) -> bool:
        count = min(self._slab_slots, self.limit - self._count)
        size = self._slab_size(count)
        room = self._heap.size - self._heap.allocated - self._reserve
        if count <= 0 or size > room or size > self._heap.largest_free:
            return False
        address = self._heap.allocate(size, self._owner)
        base = -(-address // self._alignment) * self._alignment
        slab = Slab(address, base, memoryview(bytearray(count * self.size)))
        self._slabs.append(slab)
        self._count += count
        self._free.extend((slab, index) for index in reversed(range(count)))
        return True


def place_of_caller() -> str:
    """Module and line of the code that allocates."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in _LEVELS:
        frame = frame.f_back
    return f"{frame.f_globals['__name__']}:{frame.f_lineno}"
