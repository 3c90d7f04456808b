"""REE FS: objects in files of the normal world, found by dirf.db; one operation of a guest at a time.

Source: OP-TEE secure storage, sections 3, 5 and 6; the order of RPCs is that of the recordings and of real stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from optee.abi.results import Result
from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.directory import Directory, open_tree
from optee.storage.fs_rpc import remove_file
from optee.storage.hash_tree import HashTree, Services
from optee.storage.layout import DirectoryEntry
from optee.storage.ree_file import read_content, truncate_content, write_content
from optee.threads import Thread
from optee.wait_queue import Mutex

T = TypeVar("T")


class ReeFile:
    """An open object: its file, and its entry in dirf.db."""

    __slots__ = ("index", "number", "tree")

    def __init__(self, tree: HashTree, index: int, number: int) -> None:
        self.tree = tree
        self.index = index
        self.number = number

    @property
    def length(self) -> int:
        """Bytes of content."""
        return self.tree.length


class OpenDirectory:
    """An enumeration of one owner's objects: the next entry to look at."""

    __slots__ = ("index", "owner")

    def __init__(self, owner: bytes) -> None:
        self.owner = owner
        self.index = 0


def while_locked(mutex: Mutex, thread: Thread, steps: Steps[T]) -> Steps[T]:
    """Run steps with a mutex held. No `finally`: a guest that dies meanwhile must not suspend again."""
    yield from mutex.lock(thread)
    try:
        result = yield from steps
    except TeeError:
        yield from mutex.unlock(thread)
        raise
    yield from mutex.unlock(thread)
    return result


class ReeFs:
    """The file system of one guest. Every method raises TeeError.

    Objects are named by their owner (a UUID as a C structure) and their id.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._mutex = Mutex()  # ree_fs_mutex
        self._directory: Directory | None = None
        self._references = 0

    def open(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[ReeFile]:
        """Open an object. ITEM_NOT_FOUND; CORRUPT_OBJECT also if its file is lost."""
        return while_locked(self._mutex, thread, self._open(thread, owner, object_id))

    def create(
        self, thread: Thread, owner: bytes, object_id: bytes, pieces: Sequence[bytes], *, overwrite: bool
    ) -> Steps[ReeFile]:
        """Create an object of these contents, one behind the other. ACCESS_CONFLICT if it is there, unless `overwrite`."""
        return while_locked(self._mutex, thread, self._create(thread, owner, object_id, pieces, overwrite=overwrite))

    def close(self, thread: Thread, file: ReeFile) -> Steps[None]:
        """Close an object."""
        return while_locked(self._mutex, thread, self._close(thread, file))

    def read(self, thread: Thread, file: ReeFile, offset: int, size: int) -> Steps[bytes]:
        """Read up to `size` bytes."""
        return while_locked(self._mutex, thread, read_content(thread, file.tree, offset, size))

    def write(self, thread: Thread, file: ReeFile, offset: int, data: bytes) -> Steps[None]:
        """Write and commit."""
        steps = self._change(thread, file, write_content(thread, file.tree, offset, data))
        return while_locked(self._mutex, thread, steps)

    def truncate(self, thread: Thread, file: ReeFile, length: int) -> Steps[None]:
        """Shorten or lengthen, and commit."""
        steps = self._change(thread, file, truncate_content(thread, file.tree, length))
        return while_locked(self._mutex, thread, steps)

    def rename(self, thread: Thread, owner: bytes, old: bytes, new: bytes) -> Steps[None]:
        """Give an object another id. ACCESS_CONFLICT if that is taken."""
        return while_locked(self._mutex, thread, self._with_directory(thread, self._rename, owner, old, new))

    def remove(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[None]:
        """Remove an object, by its id."""
        return while_locked(self._mutex, thread, self._with_directory(thread, self._remove, owner, object_id))

    def open_directory(self, thread: Thread, owner: bytes) -> Steps[OpenDirectory]:
        """Begin an enumeration. ITEM_NOT_FOUND if there is no object."""
        return while_locked(self._mutex, thread, self._open_directory(thread, owner))

    def read_directory(self, thread: Thread, opened: OpenDirectory) -> Steps[bytes]:
        """Id of the next object. ITEM_NOT_FOUND at the end."""
        return while_locked(self._mutex, thread, self._with_directory(thread, self._read_directory, opened))

    def close_directory(self, thread: Thread) -> Steps[None]:
        """End an enumeration."""
        return while_locked(self._mutex, thread, self._put(thread, close=False))

    def _get(self, thread: Thread) -> Steps[Directory]:
        if self._directory is None:
            self._directory = yield from Directory.open(thread, self._services)
        self._references += 1
        return self._directory

    def _put(self, thread: Thread, *, close: bool) -> Steps[None]:
        """Drop a reference; dirf.db is closed with the last one, or (`close`) after an error."""
        self._references -= 1
        if self._directory is not None and (close or not self._references):
            directory, self._directory = self._directory, None
            yield from directory.close(thread)

    def _with_directory(self, thread: Thread, operation: _Operation[T], *arguments: object) -> Steps[T]:
        """Run an operation with dirf.db open; after an error uncommitted changes are forgotten with it."""
        directory = yield from self._get(thread)
        try:
            result = yield from operation(thread, directory, *arguments)
        except TeeError:
            yield from self._put(thread, close=True)
            raise
        yield from self._put(thread, close=False)
        return result
