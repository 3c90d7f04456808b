"""Cache of hash-tree nodes: those of closed files stay, until time passes or another file needs their memory.

Each node has a slot of the pool, in which it stands as it was committed: so nodes that lie close together can be
written at once, with what lies between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from optee.memory.heap import Heap
from optee.memory.pool import Owner
from optee.memory.structures import HTREE_NODE
from optee.storage.layout import Node
from optee.storage.memory.lru import Clock, Entry, Lru
from optee.storage.memory.pool import Pool, Slot

_SLAB: Final = 64


class NodeSet(Entry):
    """The nodes of a closed file. `slots`: of node 2 and those behind it."""

    __slots__ = ("nodes", "root_hash", "slots", "whole")

    def __init__(self, root_hash: bytes, nodes: dict[int, Node], slots: list[Slot]) -> None:
        super().__init__()
        self.root_hash = root_hash
        self.nodes = nodes
        self.slots = slots
        self.whole = True


class NodeCache(Lru[str, NodeSet]):
    """Nodes by file, from one pool."""

    def __init__(self, clock: Clock, heap: Heap, owner: Owner, count: int, *, reserve: int, places: bool) -> None:
        self.pool = Pool(heap, owner, HTREE_NODE, count, _SLAB, reserve=reserve, places=places)
        super().__init__(clock, count, self.pool.statistics)

    def allocate(self) -> Slot | None:
        """A slot for a node; where there is none, nodes of a closed file go, and it is tried once more."""
        slot = self.pool.allocate()
        if slot is None and self.make_room():
            slot = self.pool.allocate()
        return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        self.pool.release(slot)

    def claim(self, file: str, root_hash: bytes) -> NodeSet | None:
        """Take the nodes of a file out of the cache, if they are those under this root."""
        nodes = self._entries.get(file)
        if nodes is None or not nodes.whole or nodes.root_hash != root_hash:
            self.discard(file)
            self.statistics.misses += 1
            return None
        del self._entries[file]
        self.statistics.hits += 1
        return nodes

    def collect(self, budget: int, before: int, short: Callable[[], bool]) -> tuple[int, bool]:
        """As of every level, but counted in nodes: a large file's go in portions."""
        examined = 0
        while self._entries:
            file, nodes = next(iter(self._entries.items()))
            if nodes.used >= before and not short():
                break
            if examined >= budget:
                return examined, False
            nodes.whole = False
            count = min(budget - examined, len(nodes.slots))
            for _ in range(count):
                self.pool.release(nodes.slots.pop())
            examined += max(count, 1)
            if not nodes.slots:
                self._evict(file)
        return examined, True

    def _drop(self, entry: NodeSet) -> None:
        while entry.slots:
            self.pool.release(entry.slots.pop())
        entry.nodes = {}
