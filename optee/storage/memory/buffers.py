"""Buffers of any size: from pools of 1, 4 and 16 KiB, larger ones straight from the heap; counted by reference.

A buffer is what a block is read into from RPC memory and what the cache then keeps: it is passed on, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from optee.memory.heap import QUANTUM, Heap
from optee.memory.pool import Owner
from optee.storage.memory.pool import Pool, Slot, place_of_caller
from optee.storage.memory.statistics import LevelStatistics

KIB: Final = 1024
CLASSES: Final = (KIB, 4 * KIB, 16 * KIB)
"""Bytes of each size class; a buffer of one is aligned to it."""
_SLAB: Final = 64 * KIB


class Buffer:
    """Memory with references; the last one that goes zeroes and releases it."""

    __slots__ = ("_buffers", "_slot", "address", "references", "view")

    def __init__(self, buffers: Buffers, slot: Slot | None, address: int, view: memoryview) -> None:
        self._buffers = buffers
        self._slot = slot
        self.address = address
        self.view = view
        self.references = 1

    def share(self) -> Buffer:
        """Take one more reference."""
        self.references += 1
        return self

    def release(self) -> None:
        """Drop a reference. One too many is counted and changes nothing."""
        if not self.references:
            self._buffers.double_releases += 1
            return
        self.references -= 1
        if not self.references:
            self._buffers._give(self, self._slot)


class Buffers:
    """All buffers of one guest. limits: how many of each class there may be."""

    def __init__(
        self, heap: Heap, owner: Owner, limits: Sequence[int], *, reserve: int = 0, places: bool = False
    ) -> None:
        self.pools = [
            Pool(heap, owner, size, limit, _SLAB // size, alignment=size, reserve=reserve, places=places)
            for size, limit in zip(CLASSES, limits, strict=True)
        ]
        self.direct = LevelStatistics()
        """Buffers beyond the largest class."""
        self.direct_places: dict[int, str] | None = {} if places else None
        self.double_releases = 0
        self._heap = heap
        self._owner = owner
        self._reserve = reserve
        self._direct: dict[int, tuple[int, int]] = {}

    @property
    def charged(self) -> int:
        """Bytes of the heap."""
        return sum(pool.charged for pool in self.pools) + sum(size for _, size in self._direct.values())

    def allocate(self, size: int, alignment: int = QUANTUM) -> Buffer | None:
        """A buffer of at least `size` bytes, all zero, at a multiple of `alignment`, a power of two; None: no room."""
        for pool in self.pools:
            if size <= pool.size and alignment <= pool.size:
                slot = pool.allocate()
                return None if slot is None else Buffer(self, slot, slot.address, slot.view)
        return self._allocate_direct(size, alignment)

    def _allocate_direct(self, size: int, alignment: int) -> Buffer | None:
        whole = size + alignment - QUANTUM
        heap = self._heap
        if whole > heap.largest_free or heap.size - heap.allocated - whole < self._reserve:
            self.direct.failures += 1
            return None
        allocation = heap.allocate(whole, self._owner)
        address = -(-allocation // alignment) * alignment
        self._direct[address] = allocation, whole
        self.direct.took(whole)
        if self.direct_places is not None:
            self.direct_places[address] = place_of_caller()
        return Buffer(self, None, address, memoryview(bytearray(size)))

    def _give(self, buffer: Buffer, slot: Slot | None) -> None:
        if slot is not None:
            pool = next(pool for pool in self.pools if pool.size == len(slot.view))
            pool.release(slot)
            return
        allocation, whole = self._direct.pop(buffer.address)
        buffer.view[:] = bytes(len(buffer.view))
        self._heap.free(allocation)
        self.direct.gave(whole)
        if self.direct_places is not None:
            del self.direct_places[buffer.address]
