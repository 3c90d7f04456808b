"""Hash-tree files by name: opened, created, closed, removed. Nothing is kept of one that is closed.

Source: OP-TEE secure storage, sections 3 and 5.
"""

from __future__ import annotations

from collections.abc import Callable

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
            return (yield from self._ready(thread, fd, owner, lambda tree: tree.open(thread, expected)))
        except TeeError:
            if expected is None:
                yield from remove_file(thread, name)
            raise

    def create(self, thread: Thread, name: str, owner: bytes | None) -> Steps[HashTree]:
        """Make an empty file; it is removed if that fails."""
        try:
            fd = yield from open_file(thread, name, create=True)
            return (yield from self._ready(thread, fd, owner, lambda tree: tree.create(thread)))
        except TeeError:
            yield from remove_file(thread, name)
            raise

    def _ready(
        self, thread: Thread, fd: int, owner: bytes | None, start: Callable[[HashTree], Steps[None]]
    ) -> Steps[HashTree]:
        """Make the tree of an open file ready; the file is closed if that fails."""
        try:
            tree = HashTree(self._services, fd, owner)
        except TeeError:
            yield from close_file(thread, fd)
            raise
        try:
            yield from start(tree)
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
