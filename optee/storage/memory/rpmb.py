"""Cache of RPMB blocks, as they are on the device: replaced in turn; what an operation writes goes out at its end.

A block that is written again within the operation goes out once, in the place of the last time. So what makes a change
count, a FAT entry, still goes after the data that it names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from optee.abi.rpmb import RPMB_BLOCK_SIZE
from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.steps import Steps
from optee.storage.keys import StorageKeys
from optee.storage.memory.lru import Clock, Entry, Lru
from optee.storage.memory.pool import Pool, Slot
from optee.storage.rpmb import Rpmb
from optee.threads import Thread

_SLAB: Final = 16


class RpmbBlock(Entry):
    """A block; with a reference it has been written and is not on the device yet."""

    __slots__ = ("slot",)

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot


class RpmbCache(Lru[int, RpmbBlock]):
    """Blocks by their index on the device. Unlike elsewhere, being used does not let one stay longer."""

    def __init__(self, clock: Clock, heap: Heap, owner: Owner, count: int, *, reserve: int, places: bool) -> None:
        self.pool = Pool(heap, owner, RPMB_BLOCK_SIZE, count, _SLAB, reserve=reserve, places=places)
        super().__init__(clock, count, self.pool.statistics)

    def find(self, key: int) -> RpmbBlock | None:
        """A block, which keeps its turn."""
        block = self._entries.get(key)
        if block is not None:
            block.used = self._clock.now
        return block

    def keep(self, index: int, data: bytes) -> RpmbBlock | None:
        """Keep a block; None if there is no room but for blocks that have to go out first."""
        block = self._entries.get(index)
        if block is None:
            slot = self.pool.allocate()
            if slot is None and self.make_room():
                slot = self.pool.allocate()
            if slot is None:
                return None
            block = RpmbBlock(slot)
            self.insert(index, block)
        block.slot.view[:] = data
        return block

    def _drop(self, entry: RpmbBlock) -> None:
        self.pool.release(entry.slot)


class CachedRpmb(Rpmb):
    """The device with the cache before it, once it is set up."""

    def __init__(self, keys: StorageKeys, random: Callable[[int], bytes], cache: RpmbCache, *, write_key: bool) -> None:
        super().__init__(keys, random, write_key=write_key)
        self._cache = cache
        self._changed: dict[int, RpmbBlock] = {}
        """Blocks that are not on the device yet, in the order of their last writes."""

    def _read_blocks(self, thread: Thread, first: int, count: int) -> Steps[list[bytes]]:
        cache = self._cache
        known = [cache.find(index) for index in range(first, first + count)]
        if self.is_set_up and all(known):
            cache.statistics.hits += count
            return [bytes(block.slot.view) for block in known if block is not None]
        cache.statistics.misses += count
        blocks = yield from super()._read_blocks(thread, first, count)
        if not self.is_set_up:
            return blocks
        for number, data in enumerate(blocks):
            changed = self._changed.get(first + number)
            if changed is None:
                cache.keep(first + number, data)
            else:
                blocks[number] = bytes(changed.slot.view)
        return blocks

    def _write_block(self, thread: Thread, index: int, block: bytes) -> Steps[None]:
        if not self.is_set_up:
            yield from super()._write_block(thread, index, block)
            return
        kept = self._cache.keep(index, block)
        if kept is None:
            yield from self.flush(thread)
            kept = self._cache.keep(index, block)
        if kept is None:
            yield from super()._write_block(thread, index, block)
            return
        if self._changed.pop(index, None) is None:
            kept.references += 1
        self._changed[index] = kept

    def flush(self, thread: Thread) -> Steps[None]:
        """Write what is not on the device yet."""
        while self._changed:
            index, block = next(iter(self._changed.items()))
            yield from super()._write_block(thread, index, bytes(block.slot.view))
            del self._changed[index]
            block.references -= 1

    def drop(self) -> None:
        """Forget what is not on the device yet: the operation failed."""
        while self._changed:
            index, block = self._changed.popitem()
            block.references -= 1
            self._cache.discard(index)
