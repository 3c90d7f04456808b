"""Cache of files, open and closed: key, length and counter of each, so that it opens without an RPC."""

from __future__ import annotations

from typing import Final

from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.memory.structures import FS_HTREE
from optee.storage.keys import FileCipher
from optee.storage.memory.lru import Clock, Entry, Lru
from optee.storage.memory.pool import Pool, Slot

_SLAB: Final = 16


class CachedFile(Entry):
    """A file; with a reference it is open."""

    __slots__ = ("cipher", "counter", "length", "max_node_id", "root_hash", "slot")

    def __init__(self, slot: Slot, cipher: FileCipher) -> None:
        super().__init__()
        self.slot = slot
        self.cipher = cipher
        self.root_hash = b""
        """Of the last commit; empty while the file is open."""
        self.counter = 0
        self.length = 0
        self.max_node_id = 0


class ObjectCache(Lru[str, CachedFile]):
    """Files by name."""

    def __init__(self, clock: Clock, heap: Heap, owner: Owner, count: int, *, reserve: int, places: bool) -> None:
        self.pool = Pool(heap, owner, FS_HTREE, count, _SLAB, reserve=reserve, places=places)
        super().__init__(clock, count, self.pool.statistics)

    def look_up(self, name: str, expected: bytes | None) -> CachedFile | None:
        """A closed file, of this root hash if one is expected; it is in use then."""
        cached = self.find(name)
        if cached is None or cached.references or (expected is not None and cached.root_hash != expected):
            self.statistics.misses += 1
            return None
        self.statistics.hits += 1
        cached.references += 1
        return cached

    def add(self, name: str, cipher: FileCipher) -> CachedFile | None:
        """Note a file that was just opened; None if it is open already, or if there is no room."""
        known = self._entries.get(name)
        if known is not None and known.references:
            return None
        self.discard(name)
        slot = self.pool.allocate()
        if slot is None and self.make_room():
            slot = self.pool.allocate()
        if slot is None:
            return None
        cached = CachedFile(slot, cipher)
        cached.references = 1
        slot.view[: len(cipher.enc_fek)] = cipher.enc_fek
        self.insert(name, cached)
        return cached

    def holds(self, name: str, cached: CachedFile) -> bool:
        """Tell whether a file is still known by its name."""
        return self._entries.get(name) is cached

    def _drop(self, entry: CachedFile) -> None:
        self.pool.release(entry.slot)
