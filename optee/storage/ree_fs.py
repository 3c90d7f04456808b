"""REE FS: objects in files of the normal world, found by dirf.db; one operation of a guest at a time.

Source: OP-TEE secure storage, sections 3, 5 and 6; the order of RPCs is that of the recordings and of real stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from optee.abi.results import Result
from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.directory import Directory
from optee.storage.hash_tree import HashTree
from optee.storage.layout import DirectoryEntry
from optee.storage.ree_file import read_content, truncate_content, write_content
from optee.storage.tree_files import TreeFiles
from optee.threads import Thread
from optee.wait_queue import Mutex, while_locked

if TYPE_CHECKING:
    from optee.storage.anchor import Anchor

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


class ReeFs:
    """The file system of one guest. Every method raises TeeError.

    Objects are named by their owner (a UUID as a C structure) and their id.
    """

    def __init__(self, files: TreeFiles, anchor: Anchor | None = None) -> None:
        self._files = files
        self._anchor = anchor
        self._mutex = Mutex()  # ree_fs_mutex
        self._directory: Directory | None = None
        self._references = 0

    def open(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[ReeFile]:
        """Open an object. ITEM_NOT_FOUND; CORRUPT_OBJECT also if its file is lost."""
        return while_locked(self._mutex, thread, self._open(thread, owner, object_id))

    def create(
        self, thread: Thread, owner: bytes, object_id: bytes, pieces: Sequence[bytes], *, overwrite: bool
    ) -> Steps[ReeFile]:
        """Create an object of these contents. ACCESS_CONFLICT if it is there already, unless `overwrite`."""
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
        return self._run(thread, lambda directory: self._rename(thread, directory, owner, old, new))

    def remove(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[None]:
        """Remove an object, by its id."""
        return self._run(thread, lambda directory: self._remove(thread, directory, owner, object_id))

    def open_directory(self, thread: Thread, owner: bytes) -> Steps[OpenDirectory]:
        """Begin an enumeration. ITEM_NOT_FOUND if there is no object."""
        return while_locked(self._mutex, thread, self._open_directory(thread, owner))

    def read_directory(self, thread: Thread, opened: OpenDirectory) -> Steps[bytes | None]:
        """Id of the next object; None at the end."""
        return self._run(thread, lambda directory: self._read_directory(thread, directory, opened))

    def close_directory(self, thread: Thread, opened: OpenDirectory) -> Steps[None]:
        """End an enumeration."""
        return while_locked(self._mutex, thread, self._put(thread, close=False))

    def _run(self, thread: Thread, operation: Callable[[Directory], Steps[T]]) -> Steps[T]:
        return while_locked(self._mutex, thread, self._with_directory(thread, operation))

    def _get(self, thread: Thread) -> Steps[Directory]:
        if self._directory is None:
            self._directory = yield from Directory.open(thread, self._files, self._anchor)
        self._references += 1
        return self._directory

    def _put(self, thread: Thread, *, close: bool) -> Steps[None]:
        """Drop a reference; dirf.db is closed with the last one, or (`close`) after an error."""
        self._references -= 1
        if self._directory is not None and (close or not self._references):
            directory, self._directory = self._directory, None
            yield from directory.close(thread)

    def _with_directory(self, thread: Thread, operation: Callable[[Directory], Steps[T]]) -> Steps[T]:
        """Run an operation with dirf.db open; after an error uncommitted changes are forgotten with it."""
        directory = yield from self._get(thread)
        try:
            result = yield from operation(directory)
        except TeeError:
            yield from self._put(thread, close=True)
            raise
        yield from self._put(thread, close=False)
        return result

    def _open(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[ReeFile]:
        directory = yield from self._get(thread)
        try:
            found = yield from directory.find(thread, owner, object_id)
            if found is None:
                raise TeeError(Result.ITEM_NOT_FOUND)
            index, entry = found
            tree = yield from self._open_tree(thread, entry)
        except TeeError:
            yield from self._put(thread, close=True)
            raise
        return ReeFile(tree, index, entry.number)

    def _open_tree(self, thread: Thread, entry: DirectoryEntry) -> Steps[HashTree]:
        try:
            return (yield from self._files.open(thread, entry.file_name, entry.owner, entry.root_hash))
        except TeeError as error:
            if error.result == Result.ITEM_NOT_FOUND:  # somebody took the file away
                raise TeeError(Result.CORRUPT_OBJECT) from None
            raise

    def _create(
        self, thread: Thread, owner: bytes, object_id: bytes, pieces: Sequence[bytes], *, overwrite: bool
    ) -> Steps[ReeFile]:
        directory = yield from self._get(thread)
        try:
            number = directory.new_number()
            name = f"{number:x}"
            tree = yield from self._files.create(thread, name, owner)
        except TeeError:
            yield from self._put(thread, close=True)
            raise
        try:
            offset = 0
            for piece in pieces:
                yield from write_content(thread, tree, offset, piece)
                offset += len(piece)
            yield from tree.sync(thread)
            entry = DirectoryEntry.make(owner, object_id, tree.root_hash, number)
            index = yield from self._set_name(thread, directory, entry, overwrite=overwrite)
        except TeeError:
            yield from self._put(thread, close=True)
            yield from self._files.close(thread, tree)
            yield from self._files.remove(thread, name)
            raise
        return ReeFile(tree, index, number)

    def _set_name(self, thread: Thread, directory: Directory, entry: DirectoryEntry, *, overwrite: bool) -> Steps[int]:
        """Give a new file its entry: the one of the object that it replaces, or a free one."""
        found = yield from directory.find(thread, entry.owner, entry.object_id)
        if found is not None:
            if not overwrite:
                raise TeeError(Result.ACCESS_CONFLICT)
            index, replaced = found
        else:
            yield from directory.find(thread, entry.owner, entry.object_id)  # OP-TEE looks twice
            index = yield from directory.find_free(thread)
        yield from directory.write(thread, index, entry)
        yield from directory.commit(thread)
        if found is not None:
            yield from self._files.remove(thread, replaced.file_name)
        return index

    def _close(self, thread: Thread, file: ReeFile) -> Steps[None]:
        yield from self._put(thread, close=False)
        yield from self._files.close(thread, file.tree)

    def _change(self, thread: Thread, file: ReeFile, change: Steps[None]) -> Steps[None]:
        yield from self._with_directory(thread, lambda directory: self._commit(thread, directory, file, change))
        yield from file.tree.cut(thread)

    def _commit(self, thread: Thread, directory: Directory, file: ReeFile, change: Steps[None]) -> Steps[None]:
        """Change a file, commit it, and then its root hash."""
        yield from change
        yield from file.tree.sync(thread)
        entry = yield from directory.read(thread, file.index)
        if entry.number != file.number:  # replaced while it was open
            raise TeeError(Result.CORRUPT_OBJECT)
        yield from directory.write(thread, file.index, entry._replace(root_hash=file.tree.root_hash))
        yield from directory.commit(thread)

    def _rename(self, thread: Thread, directory: Directory, owner: bytes, old: bytes, new: bytes) -> Steps[None]:
        if (yield from directory.find(thread, owner, new)) is not None:
            raise TeeError(Result.ACCESS_CONFLICT)
        found = yield from directory.find(thread, owner, old)
        if found is None:
            raise TeeError(Result.ITEM_NOT_FOUND)
        index, entry = found
        renamed = DirectoryEntry.make(owner, new, entry.root_hash, entry.number)
        yield from directory.write(thread, index, renamed)
        yield from directory.commit(thread)

    def _remove(self, thread: Thread, directory: Directory, owner: bytes, object_id: bytes) -> Steps[None]:
        found = yield from directory.find(thread, owner, object_id)
        if found is None:
            raise TeeError(Result.ITEM_NOT_FOUND)
        index, entry = found
        yield from directory.remove(thread, index)
        yield from directory.commit(thread)
        yield from self._files.remove(thread, entry.file_name)
        yield from directory.find(thread, owner, object_id)  # OP-TEE asserts that it is gone

    def _open_directory(self, thread: Thread, owner: bytes) -> Steps[OpenDirectory]:
        directory = yield from self._get(thread)
        try:
            first = yield from directory.next(thread, owner, 0)
        except TeeError:
            yield from self._put(thread, close=True)
            raise
        if first is None:
            yield from self._put(thread, close=False)
            raise TeeError(Result.ITEM_NOT_FOUND)
        return OpenDirectory(owner)

    def _read_directory(self, thread: Thread, directory: Directory, opened: OpenDirectory) -> Steps[bytes | None]:
        found = yield from directory.next(thread, opened.owner, opened.index)
        if found is None:
            return None
        index, entry = found
        opened.index = index + 1
        return entry.object_id
