"""Hash-tree files with the memory manager's caches before them."""

from __future__ import annotations

from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.hash_tree import HashTree, Services
from optee.storage.memory.manager import MemoryManager
from optee.storage.memory.tree import NOT_OPEN, ManagedTree
from optee.storage.tree_files import TreeFiles
from optee.threads import Thread


class CachedFiles(TreeFiles):
    """The files of one guest."""

    def __init__(self, services: Services, memory: MemoryManager) -> None:
        super().__init__(services)
        self._memory = memory

    def open(self, thread: Thread, name: str, owner: bytes | None, expected: bytes | None) -> Steps[HashTree]:
        """As without caches; a file that they know is not read again, and dirf.db is believed to be as it was."""
        cached = self._memory.objects.look_up(name, expected)
        if cached is not None:
            try:
                tree = self._tree(name, NOT_OPEN, owner)
            except TeeError:
                cached.references -= 1
                raise
            try:
                return (yield from self._ready(thread, tree, tree.resume(thread, cached)))
            except TeeError:  # the disk has it otherwise: look at it as if nothing were known
                self._forget(name)
        return (yield from super().open(thread, name, owner, expected))

    def create(self, thread: Thread, name: str, owner: bytes | None) -> Steps[HashTree]:
        """As without caches; what they know of an earlier file of that name is forgotten."""
        self._forget(name)
        return super().create(thread, name, owner)

    def remove(self, thread: Thread, name: str) -> Steps[None]:
        """As without caches."""
        self._forget(name)
        return super().remove(thread, name)

    def _forget(self, name: str) -> None:
        self._memory.objects.discard(name)
        self._memory.nodes.discard(name)
        self._memory.blocks.forget(name)

    def _tree(self, name: str, fd: int, owner: bytes | None) -> ManagedTree:
        return ManagedTree(self._services, self._memory, name, fd, owner)

    def _ready(self, thread: Thread, tree: HashTree, start: Steps[None]) -> Steps[HashTree]:
        yield from super()._ready(thread, tree, start)
        if isinstance(tree, ManagedTree):
            tree.enlist()
        return tree
