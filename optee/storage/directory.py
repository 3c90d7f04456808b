"""dirf.db while it is open: which file belongs to which object.

Source: OP-TEE secure storage, section 3. Looking for an entry reads them one by one; nothing is cached but which file
numbers are in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

from optee.abi.results import Result
from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.hash_tree import HashTree
from optee.storage.layout import DIRECTORY_NAME, ENTRY_SIZE, FREE_ENTRY, DirectoryEntry
from optee.storage.ree_file import read_content, write_content
from optee.storage.tree_files import TreeFiles
from optee.threads import Thread

if TYPE_CHECKING:
    from optee.storage.anchor import Anchor


def _open_latest(thread: Thread, files: TreeFiles) -> Steps[HashTree]:
    """Open dirf.db without an anchor: the version with the larger counter; create it if it is not there."""
    try:
        return (yield from files.open(thread, DIRECTORY_NAME, None, None))
    except TeeError as error:
        if error.result != Result.ITEM_NOT_FOUND:
            raise
    return (yield from files.create(thread, DIRECTORY_NAME, None))


def _open_anchored(thread: Thread, files: TreeFiles, anchor: Anchor) -> Steps[HashTree]:
    """Open the dirf.db whose root hash is anchored: CORRUPT_OBJECT for another one, SECURITY if there is none.

    Where nothing is anchored yet, an empty dirf.db is made and anchored, over whatever lies there.
    """
    expected = yield from anchor.read(thread)
    if expected is not None:
        try:
            return (yield from files.open(thread, DIRECTORY_NAME, None, expected))
        except TeeError as error:
            if error.result != Result.ITEM_NOT_FOUND:
                raise
        yield from anchor.reset(thread)
    tree = yield from files.create(thread, DIRECTORY_NAME, None)
    try:
        yield from anchor.write(thread, tree.root_hash)
    except TeeError:
        yield from files.close(thread, tree)
        raise TeeError(Result.SECURITY) from None
    return tree


class Directory:
    """Entries by index. Changes are committed by `commit`."""

    def __init__(self, files: TreeFiles, tree: HashTree, anchor: Anchor | None) -> None:
        self._files = files
        self._tree = tree
        self._anchor = anchor
        self._numbers: set[int] = set()

    @classmethod
    def open(cls, thread: Thread, files: TreeFiles, anchor: Anchor | None) -> Steps[Directory]:
        """Open dirf.db, or create it, and learn which file numbers are in use. Raises TeeError."""
        tree = yield from _open_anchored(thread, files, anchor) if anchor else _open_latest(thread, files)
        directory = cls(files, tree, anchor)
        try:
            for index in directory._indices():
                entry = yield from directory.read(thread, index)
                if not entry.is_free:
                    directory._numbers.add(entry.number)
        except TeeError:
            yield from files.close(thread, tree)
            raise
        return directory

    def close(self, thread: Thread) -> Steps[None]:
        """Close the file; what is not committed is lost."""
        yield from self._files.close(thread, self._tree)

    def _indices(self) -> Iterator[int]:
        return iter(range(self._tree.length // ENTRY_SIZE))

    def read(self, thread: Thread, index: int) -> Steps[DirectoryEntry]:
        """Read an entry. Raises TeeError(ITEM_NOT_FOUND) behind the last one."""
        data = yield from read_content(thread, self._tree, index * ENTRY_SIZE, ENTRY_SIZE)
        if len(data) < ENTRY_SIZE:
            raise TeeError(Result.ITEM_NOT_FOUND)
        return DirectoryEntry.unpack(data)

    def write(self, thread: Thread, index: int, entry: DirectoryEntry) -> Steps[None]:
        """Write an entry."""
        yield from write_content(thread, self._tree, index * ENTRY_SIZE, entry.pack())

    def find(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[tuple[int, DirectoryEntry] | None]:
        """Index and entry of an object, by reading entry after entry."""
        for index in self._indices():
            entry = yield from self.read(thread, index)
            if entry.owner == owner and entry.object_id == object_id and not entry.is_free:
                return index, entry
        return None

    def next(self, thread: Thread, owner: bytes, index: int) -> Steps[tuple[int, DirectoryEntry] | None]:
        """The first entry of an owner from `index` on."""
        for place in count(index):
            if place * ENTRY_SIZE >= self._tree.length:
                break
            entry = yield from self.read(thread, place)
            if entry.owner == owner and not entry.is_free:
                return place, entry
        return None

    def find_free(self, thread: Thread) -> Steps[int]:
        """Index of the first free entry, or of the one behind the last."""
        for index in self._indices():
            if (yield from self.read(thread, index)).is_free:
                return index
        return self._tree.length // ENTRY_SIZE

    def new_number(self) -> int:
        """Take the lowest file number that no entry has."""
        number = next(number for number in count() if number not in self._numbers)
        self._numbers.add(number)
        return number

    def remove(self, thread: Thread, index: int) -> Steps[None]:
        """Free an entry and its file number."""
        entry = yield from self.read(thread, index)
        yield from self.write(thread, index, FREE_ENTRY)
        self._numbers.discard(entry.number)

    def commit(self, thread: Thread) -> Steps[None]:
        """Make all changes since the last commit count, together."""
        yield from self._tree.sync(thread)
        if self._anchor is not None:
            yield from self._anchor.write(thread, self._tree.root_hash)
