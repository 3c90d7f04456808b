"""Hash-tree files by name: opened, created, closed, removed. Nothing is kept of one that is closed.

Source: OP-TEE secure storage, sections 3 and 5.
"""

from __future__ import annotations

from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.fs_rpc import close_file, open_file, remove_file
from optee.storage.hash_tree import HashTree, Services
from optee.threads import Thread


class TreeFiles:
    """The files of one guest. Methods raise TeeError."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def open(self, thread: Thread, name: str, owner: bytes | None, expected: bytes | None) -> Steps[HashTree]:
        """Open a file of this root hash; None takes the latest version, and removes a file that does not open."""
        try:
            fd = yield from open_file(thread, name, create=False)
            tree = yield from self._make(thread, name, fd, owner)
            return (yield from self._ready(thread, tree, tree.open(thread, expected)))
        except TeeError:
            if expected is None:
                yield from remove_file(thread, name)
            raise

    def create(self, thread: Thread, name: str, owner: bytes | None) -> Steps[HashTree]:
        """Make an empty file; it is removed if that fails."""
        try:
            fd = yield from open_file(thread, name, create=True)
            tree = yield from self._make(thread, name, fd, owner)
            return (yield from self._ready(thread, tree, tree.create(thread)))
        except TeeError:
            yield from remove_file(thread, name)
            raise

    def _make(self, thread: Thread, name: str, fd: int, owner: bytes | None) -> Steps[HashTree]:
        """The tree of an open file; the file is closed if there is no memory for it."""
        try:
            return self._tree(name, fd, owner)
        except TeeError:
            yield from close_file(thread, fd)
            raise

    def _tree(self, name: str, fd: int, owner: bytes | None) -> HashTree:
        return HashTree(self._services, fd, owner)

    def _ready(self, thread: Thread, tree: HashTree, start: Steps[None]) -> Steps[HashTree]:
        """Read or write what a tree begins with; it is closed if that fails."""
        try:
            yield from start
        except TeeError:
            yield from tree.close(thread)
            raise
        return tree

    def close(self, thread: Thread, tree: HashTree) -> Steps[None]:
        """Close a file; what is not committed is lost."""
        return tree.close(thread)

    def remove(self, thread: Thread, name: str) -> Steps[None]:
        """Remove a file; whether that works makes no difference to anybody."""
        return remove_file(thread, name)
