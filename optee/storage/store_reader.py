"""Reads a directory of secure storage as tee-supplicant keeps it, without OP-TEE and without changing it.

Source: OP-TEE secure storage, sections 1, 3 and 6. What is live is decided as OP-TEE decides it.
"""

from __future__ import annotations

import re
import stat
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from optee.storage.damage import Damage, DamagedError
from optee.storage.keys import StorageKeys
from optee.storage.layout import (
    CORE_OWNER,
    DIRECTORY_NAME,
    ENTRY_SIZE,
    MAX_OBJECT_ID,
    OBJECT_HEADER_SIZE,
    DirectoryEntry,
    ObjectHeader,
    committed_head,
)
from optee.storage.tree_reader import ROOT, TreeReader

MAX_FILE_SIZE: Final = 1 << 30
"""Bytes of one file: more is not of secure storage, whose files hold at most a few MiB."""

_NUMBERED: Final = re.compile(r"0|[1-9a-f][0-9a-f]{0,7}")


class NotAStoreError(Exception):
    """The directory cannot be read, or is none of secure storage."""


class StoredObject:
    """An object as its directory entry and its file have it."""

    def __init__(self, store: StoreReader, index: int, entry: DirectoryEntry) -> None:
        self.index = index
        self.entry = entry
        self._store = store

    @property
    def is_raw(self) -> bool:
        """A file of OP-TEE's core: no header, no attributes."""
        return self.entry.owner == CORE_OWNER

    @cached_property
    def _content(self) -> bytes | Damage:
        return self._store.file_content(self.entry.file_name, "lost: the directory names it, but it is not there")

    @cached_property
    def tree(self) -> TreeReader | None:
        """The file; None if it is lost."""
        if isinstance(self._content, Damage):
            return None
        entry = self.entry
        return TreeReader(entry.file_name, self._content, self._store.keys, entry.owner, entry.root_hash)

    @cached_property
    def damages(self) -> list[Damage]:
        """All that is wrong with it, the live data blocks included."""
        if self.tree is None:
            return [self._content] if isinstance(self._content, Damage) else []
        if self.tree.slot is None and not self.tree.damages:
            return [Damage(self.tree.name, "file", self._store.explain_stranger(self))]
        if self.tree.damages:
            # A dead first root node of an empty file has one hash for all of them: the look-up by hash may take it.
            if (other := self._store.owner_of(self.tree.file_data)) is not None:
                return [Damage(self.tree.name, "file", _not_this(other))]
            return [*self.tree.damages, *self.tree.block_damages()]
        found = self.tree.block_damages()
        if not found and not self.is_raw:
            found += self._header_damages(self.tree)
        return found

    def _header_damages(self, tree: TreeReader) -> list[Damage]:
        if tree.length < OBJECT_HEADER_SIZE:
            return [Damage(tree.name, "object header", f"the content has only {tree.length} bytes")]
        if ObjectHeader.unpack(tree.read(0, OBJECT_HEADER_SIZE)).data_offset > tree.length:
            return [Damage(tree.name, "object header", "attributes reach beyond the content")]
        return []

    def _whole(self) -> TreeReader:
        if self.damages:
            raise DamagedError(self.damages[0])
        if self.tree is None:
            raise AssertionError("a lost file without damage")
        return self.tree

    @property
    def header(self) -> ObjectHeader | None:
        """Header of a TA's object, also if other parts are damaged; None for files of the core. Raises DamagedError."""
        if self.is_raw:
            return None
        if self.tree is None or self.tree.length < OBJECT_HEADER_SIZE:
            raise DamagedError(self.damages[0])
        return ObjectHeader.unpack(self.tree.read(0, OBJECT_HEADER_SIZE))

    @property
    def size(self) -> int:
        """Bytes of the data stream, as the header says. Raises DamagedError."""
        header = self.header
        if self.tree is None or self.tree.meta is None:
            raise DamagedError(self.damages[0])
        return max(self.tree.length - (header.data_offset if header is not None else 0), 0)

    @property
    def attributes(self) -> bytes:
        """Serialized attributes. Raises DamagedError."""
        tree, header = self._whole(), self.header
        return tree.read(OBJECT_HEADER_SIZE, header.attr_size) if header is not None else b""

    @property
    def data(self) -> bytes:
        """The data stream. Raises DamagedError."""
        tree, header = self._whole(), self.header
        return tree.read(header.data_offset if header is not None else 0, tree.length)


def _not_this(other: StoredObject) -> str:
    return f"is not the one of this object: it is file {other.entry.file_name}, of entry {other.index}"


class OpenedDirectory(NamedTuple):
    """What dirf.db says: objects in order of their entries, indices of free entries, and what is wrong."""

    objects: list[StoredObject]
    free: list[int]
    damages: list[Damage]

    @property
    def all_damages(self) -> list[Damage]:
        """Those of the directory, then those of the objects."""
        return [*self.damages, *(damage for stored in self.objects for damage in stored.damages)]


class StoreReader:
    """A store. Raises NotAStoreError if there is none at `path`; damage is told by `damages`, not raised.

    anchor: root hash that dirf.db must have; without it the version with the larger counter counts.
    """

    def __init__(self, path: Path, keys: StorageKeys, anchor: bytes | None = None) -> None:
        self.path = path
        self.keys = keys
        self.anchor = anchor
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            raise NotAStoreError(f"{path}: {error.strerror}") from None
        names = {entry.name for entry in entries}
        self.numbered = sorted((name for name in names if _NUMBERED.fullmatch(name)), key=lambda name: int(name, 16))
        """Names of the files that objects can have."""
        self.strangers = sorted(names - {DIRECTORY_NAME, *self.numbered})
        """Names that secure storage does not make."""
        self.is_empty = not names
        """Nothing was stored here yet: OP-TEE makes dirf.db when a guest first needs secure storage."""
        if self.strangers and DIRECTORY_NAME not in names and not self.numbered:
            raise NotAStoreError(f"{path}: no secure storage: there is no {DIRECTORY_NAME} in it")

    def file_content(self, name: str, lost: str) -> bytes | Damage:
        """Bytes of a file, or why there are none; `lost` says so if it is not there. Raises NotAStoreError."""
        path = self.path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                return Damage(name, "file", "not a regular file")
            if status.st_size > MAX_FILE_SIZE:
                return Damage(name, "file", f"larger than {MAX_FILE_SIZE >> 20} MiB, which none of secure storage is")
            return path.read_bytes()
        except FileNotFoundError:
            return Damage(name, "file", lost)
        except OSError as error:
            raise NotAStoreError(f"{path}: {error.strerror}") from None

    @cached_property
    def _content(self) -> bytes | Damage:
        return self.file_content(DIRECTORY_NAME, "lost: without it no object can be found")

    @cached_property
    def tree(self) -> TreeReader | None:
        """dirf.db; None if it is lost."""
        if isinstance(self._content, Damage):
            return None
        return TreeReader(DIRECTORY_NAME, self._content, self.keys, None, self.anchor)

    @property
    def is_half_made(self) -> bool:
        """Creating dirf.db was interrupted: OP-TEE makes it anew, and there are no objects.

        One of 0 bytes is so only while there are no other files: it is the first that is made.
        """
        tree = self.tree
        if tree is None or self.anchor is not None:
            return False
        return tree.half_made or (not tree.file_data and not self.numbered)

    @cached_property
    def opened(self) -> OpenedDirectory:
        """Contents of dirf.db, as far as it can be read."""
        if self.tree is None or self.is_half_made:
            fresh = self.is_empty and self.anchor is None
            return OpenedDirectory([], [], [self._content] if isinstance(self._content, Damage) and not fresh else [])
        return self._read_directory(self.tree)

    def _read_directory(self, tree: TreeReader) -> OpenedDirectory:
        objects: list[StoredObject] = []
        free: list[int] = []
        damages: list[Damage] = []
        if tree.slot is None and not tree.damages:
            damages.append(Damage(DIRECTORY_NAME, "file", "not the one that is anchored: an old copy, or another's"))
        damages += [*tree.damages, *tree.block_damages()]
        for index in range(tree.length // ENTRY_SIZE):
            try:
                entry = DirectoryEntry.unpack(tree.read(index * ENTRY_SIZE, ENTRY_SIZE))
            except DamagedError:
                continue
            if entry.is_free:
                free.append(index)
            elif entry.id_size > MAX_OBJECT_ID:
                damages.append(Damage(DIRECTORY_NAME, f"entry {index}", f"object id of {entry.id_size} bytes"))
            else:
                objects.append(StoredObject(self, index, entry))
        damages += self._twice(objects)
        return OpenedDirectory(objects, free, damages)

    @staticmethod
    def _twice(objects: list[StoredObject]) -> list[Damage]:
        """Entries that share their object or their file with an earlier one."""
        found = []
        seen: dict[object, int] = {}
        for stored in objects:
            entry = stored.entry
            for what, key in (("object", (entry.owner, entry.object_id)), ("file", entry.number)):
                first = seen.setdefault(key, stored.index)
                if first != stored.index:
                    found.append(Damage(DIRECTORY_NAME, f"entry {stored.index}", f"the same {what} as entry {first}"))
        return found

    @property
    def objects(self) -> list[StoredObject]:
        """Objects in the order of their entries."""
        return self.opened.objects

    @property
    def orphans(self) -> list[str]:
        """Files that no entry names: left behind by interrupted operations, never cleaned, harmless."""
        named = {stored.entry.file_name for stored in self.objects}
        return [name for name in self.numbered if name not in named]

    @cached_property
    def damages(self) -> list[Damage]:
        """All that is wrong with the live state: directory first, then objects."""
        found = self.opened.all_damages
        if found and self.tree is not None and self.tree.torn:
            newer = self.tree.with_newer_head()
            if not self._read_directory(newer).all_damages:
                reason = "was changed: the version before it, which is live thereby, is no more whole"
                found.insert(0, Damage(DIRECTORY_NAME, f"head slot {newer.slot}", f"counter {reason}"))
        return found

    def explain_stranger(self, stored: StoredObject) -> str:
        """Say why a file may have no version with the root hash that its entry has."""
        entry, tree = stored.entry, stored.tree
        if tree is None:
            raise ValueError("the file is lost")
        heads = tree.head_at(0), tree.head_at(1)
        slot = committed_head(heads[0].counter, heads[1].counter) if heads[0] and heads[1] else None
        root = tree.node_at(ROOT, slot) if slot is not None else None
        for other in self.objects:
            if other is not stored and root is not None and other.entry.root_hash == root.hash:
                return _not_this(other)
        alone = TreeReader(entry.file_name, tree.file_data, self.keys, entry.owner)
        if alone.slot is not None and not alone.damages and alone.head is not None:
            counter = alone.head.counter
            return f"is whole, but another version (counter {counter}) than the directory has: an old copy put back"
        return "no version of its root node has the hash that the directory has"

    def owner_of(self, file_data: bytes) -> StoredObject | None:
        """The object of which a file is the live version, whatever its name; None if it is nobody's."""
        for stored in self.objects:
            entry = stored.entry
            tree = TreeReader(entry.file_name, file_data, self.keys, entry.owner, entry.root_hash)
            if tree.slot is not None and not tree.damages:
                return stored
        return None

    def find(self, owner: bytes, object_id: bytes) -> StoredObject | None:
        """The object of a TA with this id."""
        for stored in self.objects:
            if stored.entry.owner == owner and stored.entry.object_id == object_id:
                return stored
        return None
