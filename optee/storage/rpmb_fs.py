"""RPMB FS: objects in the files of a small FAT file system on the RPMB device; one operation of a guest at a time.

Source: OP-TEE secure storage, section 4. Every change takes effect with the write of one block: data within its block,
or the FAT entry of a file whose data was written elsewhere before. Two things are done otherwise than in OP-TEE, so
that a power cut leaves an object old or new: an overwriting `create` switches the entry of the object that is there
(OP-TEE clears it, then renames the new file); and what an interrupted `create` left is begun anew, not continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeVar

from optee.abi.results import Result
from optee.abi.rpmb import RPMB_BLOCK_SIZE
from optee.errors import TeeError
from optee.steps import Steps
from optee.storage.keys import StorageKeys
from optee.storage.layout import BLOCK_SIZE, CORE_OWNER, FEK_SIZE
from optee.storage.rpmb import Rpmb
from optee.storage.rpmb_layout import (
    ACTIVE,
    FAT_ENTRY_SIZE,
    FAT_START,
    LAST,
    LAST_ENTRY,
    MAGIC,
    PARTITION_SIZE,
    VERSION,
    FatEntry,
    Partition,
    Space,
    directory_name,
    file_name,
    parse_object_id,
)
from optee.threads import Thread
from optee.wait_queue import Mutex, while_locked

T = TypeVar("T")

READ_ENTRIES: Final = 8
"""CFG_RPMB_FS_RD_ENTRIES: FAT entries that are read at once. None of them is kept: CFG_RPMB_FS_CACHE_ENTRIES is 0."""


class Placed(NamedTuple):
    """A FAT entry and where it is, in bytes."""

    address: int
    entry: FatEntry

    def is_file(self, name: str) -> bool:
        """It is the entry of the file with this name."""
        return bool(self.entry.flags & ACTIVE) and self.entry.name == name


class RpmbFile:
    """An open file: its owner, and its FAT entry as it was last read."""

    __slots__ = ("address", "entry", "owner")

    def __init__(self, owner: bytes, placed: Placed) -> None:
        self.owner = owner
        self.address, self.entry = placed

    @property
    def length(self) -> int:
        """Bytes of content."""
        return self.entry.size

    def is_here(self, placed: Placed) -> bool:
        """It is this file's entry: meanwhile the file may have been renamed, or overwritten with another."""
        address, entry = placed
        same = entry.enc_fek == self.entry.enc_fek or entry.name == self.entry.name
        return address == self.address and same and bool(entry.flags & ACTIVE)


class RpmbDirectory:
    """An enumeration of one owner's objects: the ids that are left."""

    __slots__ = ("object_ids",)

    def __init__(self, object_ids: list[bytes]) -> None:
        self.object_ids = object_ids


class RpmbFs:
    """The file system for one guest. Every method raises TeeError, also those of `Rpmb`.

    Objects are named by their owner (a UUID as a C structure) and their id. Closing costs nothing: a handle holds
    nothing of the device.
    """

    def __init__(self, device: Rpmb, keys: StorageKeys, random: Callable[[int], bytes]) -> None:
        self.device = device
        self._keys = keys
        self._random = random
        self._mutex = Mutex()  # rpmb_mutex
        self._fat_start: int | None = None

    def open(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[RpmbFile]:
        """Open an object. ITEM_NOT_FOUND."""
        return self._run(thread, self._open(thread, owner, file_name(owner, object_id)))

    def create(
        self, thread: Thread, owner: bytes, object_id: bytes, pieces: Sequence[bytes], *, overwrite: bool
    ) -> Steps[RpmbFile]:
        """Create an object of these contents. ACCESS_CONFLICT if it is there already, unless `overwrite`."""
        return self._run(thread, self._create(thread, owner, object_id, pieces, overwrite=overwrite))

    def close(self, thread: Thread, file: RpmbFile) -> Steps[None]:
        """Close an object."""
        yield from ()

    def read(self, thread: Thread, file: RpmbFile, offset: int, size: int) -> Steps[bytes]:
        """Read up to `size` bytes."""
        return self._run(thread, self._read(thread, file, offset, size))

    def write(self, thread: Thread, file: RpmbFile, offset: int, data: bytes) -> Steps[None]:
        """Write and commit. STORAGE_NO_SPACE."""
        return self._run(thread, self._write(thread, file, offset, data))

    def truncate(self, thread: Thread, file: RpmbFile, length: int) -> Steps[None]:
        """Shorten or lengthen, and commit. OUT_OF_MEMORY where there is no space to lengthen it."""
        return self._run(thread, self._truncate(thread, file, length))

    def rename(self, thread: Thread, owner: bytes, old: bytes, new: bytes) -> Steps[None]:
        """Give an object another id. ACCESS_CONFLICT if that is taken."""
        return self._run(thread, self._rename(thread, file_name(owner, old), file_name(owner, new)))

    def remove(self, thread: Thread, owner: bytes, object_id: bytes) -> Steps[None]:
        """Remove an object, by its id."""
        return self._run(thread, self._remove(thread, file_name(owner, object_id)))

    def open_directory(self, thread: Thread, owner: bytes) -> Steps[RpmbDirectory]:
        """Begin an enumeration. ITEM_NOT_FOUND if there is no object."""
        return self._run(thread, self._open_directory(thread, owner))

    def read_directory(self, thread: Thread, opened: RpmbDirectory) -> Steps[bytes | None]:
        """Id of the next object; None at the end."""
        yield from ()
        return opened.object_ids.pop(0) if opened.object_ids else None

    def close_directory(self, thread: Thread, opened: RpmbDirectory) -> Steps[None]:
        """End an enumeration."""
        yield from ()

    def open_raw(self, thread: Thread, name: str, *, create: bool) -> Steps[RpmbFile]:
        """Open a file of OP-TEE's core by its name; with `create` make it, empty, if it is not there."""
        return self._run(thread, self._open_raw(thread, f"/{name}", create=create))

    def _run(self, thread: Thread, operation: Steps[T]) -> Steps[T]:
        return while_locked(self._mutex, thread, self._whole(thread, operation))

    def _whole(self, thread: Thread, operation: Steps[T]) -> Steps[T]:
        """Run an operation, and see its writes through to the device."""
        try:
            result = yield from operation
        except TeeError:
            self.device.drop()
            raise
        yield from self.device.flush(thread)
        return result

    def _set_up(self, thread: Thread) -> Steps[int]:
        """Read the header once, format a device that has none, and return where the FAT begins.

        The header is written back before it counts, so that a request to write that was held back earlier is void.
        """
        if self._fat_start is None:
            device = self.device
            yield from device.start(thread)
            header = yield from device.read(thread, 0, RPMB_BLOCK_SIZE)
            yield from device.write(thread, 0, header)
            partition = Partition.unpack((yield from device.read(thread, 0, PARTITION_SIZE)))
            if partition.magic != MAGIC:
                partition = partition._replace(magic=MAGIC, version=VERSION, fat_start=FAT_START)
                yield from self._write_entry(thread, Placed(partition.fat_start, LAST_ENTRY))
                yield from device.write(thread, 0, partition.pack())
            elif partition.version != VERSION:
                raise TeeError(Result.ACCESS_DENIED)
            self._fat_start = partition.fat_start
            device.is_set_up = True
        return self._fat_start

    def _write_entry(self, thread: Thread, placed: Placed) -> Steps[None]:
        yield from self.device.write(thread, placed.address, placed.entry.pack())

    def _read_fat(self, thread: Thread, until: Callable[[Placed], bool] = lambda _: False) -> Steps[list[Placed]]:
        """Entries from the first on: to the last, or to the one that is looked for."""
        address = yield from self._set_up(thread)
        found: list[Placed] = []
        while True:
            data = yield from self.device.read(thread, address, READ_ENTRIES * FAT_ENTRY_SIZE)
            for at in range(0, len(data), FAT_ENTRY_SIZE):
                placed = Placed(address + at, FatEntry.unpack(data[at : at + FAT_ENTRY_SIZE]))
                found.append(placed)
                if placed.entry.flags & LAST or until(placed):
                    return found
            address += len(data)

    def _find(self, thread: Thread, name: str) -> Steps[Placed | None]:
        *_, placed = yield from self._read_fat(thread, lambda placed: placed.is_file(name))
        return placed if placed.is_file(name) else None

    def _get(self, thread: Thread, name: str) -> Steps[Placed]:
        found = yield from self._find(thread, name)
        if found is None:
            raise TeeError(Result.ITEM_NOT_FOUND)
        return found

    def _space(self, fat: Sequence[Placed], *, entries: int = 0) -> Space:
        """What is taken: by files, by the FAT, and by `entries` more entries of it."""
        space = Space(self.device.last_block * RPMB_BLOCK_SIZE)  # OP-TEE leaves the last block alone
        good = space.take(0, fat[-1].address + (1 + entries) * FAT_ENTRY_SIZE)
        for _, entry in fat:
            if entry.flags & ACTIVE and entry.size:
                good &= space.take(entry.start, entry.size)
        if not good:
            raise TeeError(Result.OUT_OF_MEMORY)
        return space

    def _open(self, thread: Thread, owner: bytes, name: str) -> Steps[RpmbFile]:
        return RpmbFile(owner, (yield from self._get(thread, name)))

    def _open_raw(self, thread: Thread, name: str, *, create: bool) -> Steps[RpmbFile]:
        if not create:
            return (yield from self._open(thread, CORE_OWNER, name))
        return (yield from self._new_file(thread, CORE_OWNER, name))

    def _new_entry(self, owner: bytes, name: str) -> FatEntry:
        enc_fek = bytes(FEK_SIZE)
        while not any(enc_fek):
            enc_fek = self._keys.encrypt_fek(owner, self._random(FEK_SIZE))
        return FatEntry(flags=ACTIVE, enc_fek=enc_fek).named(name)

    def _new_file(self, thread: Thread, owner: bytes, name: str) -> Steps[RpmbFile]:
        """Make an empty file, in the entry of one of that name, the first that is free, or a new one."""
        fat = yield from self._read_fat(thread)
        taken = [placed.address for placed in fat if placed.is_file(name)]
        free = [address for address, entry in fat if not entry.flags & ACTIVE]
        address = (taken or free)[0]
        if address == fat[-1].address:
            self._space(fat, entries=1)
            yield from self._write_entry(thread, Placed(address + FAT_ENTRY_SIZE, LAST_ENTRY))
        placed = Placed(address, self._new_entry(owner, name))
        yield from self._write_entry(thread, placed)
        return RpmbFile(owner, placed)

    def _create(
        self, thread: Thread, owner: bytes, object_id: bytes, pieces: Sequence[bytes], *, overwrite: bool
    ) -> Steps[RpmbFile]:
        name = file_name(owner, object_id)
        found = yield from self._find(thread, name)
        if found is not None:
            if not overwrite:
                raise TeeError(Result.ACCESS_CONFLICT)
            file = RpmbFile(owner, found)
            empty = self._new_entry(owner, name)
            yield from self._replace(thread, file, empty, 0, b"".join(pieces), (yield from self._read_fat(thread)))
            return file
        temporary = file_name(owner, object_id, temporary=True)
        file = yield from self._new_file(thread, owner, temporary)
        try:
            offset = 0
            for piece in pieces:
                yield from self._write(thread, file, offset, piece)
                offset += len(piece)
            yield from self._rename(thread, temporary, name)
        except TeeError:
            yield from self._remove_quietly(thread, temporary)
            raise
        return file

    def _remove_quietly(self, thread: Thread, name: str) -> Steps[None]:
        try:
            yield from self._remove(thread, name)
        except TeeError:
            return

    def _refresh(self, thread: Thread, file: RpmbFile, *, whole: bool = False) -> Steps[list[Placed]]:
        """Read a file's entry again, with those before it; or with all there are, if it is to be changed."""
        fat = yield from self._read_fat(thread, (lambda _: False) if whole else file.is_here)
        for placed in fat:
            if file.is_here(placed):
                file.entry = placed.entry
                return fat
        raise TeeError(Result.ITEM_NOT_FOUND)

    def _read_data(self, thread: Thread, owner: bytes, entry: FatEntry, offset: int, size: int) -> Steps[bytes]:
        if not any(entry.enc_fek):  # a build of OP-TEE without encryption wrote it
            raise TeeError(Result.SECURITY)
        cipher = self._keys.open_rpmb_file(owner, entry.enc_fek)
        return (yield from self.device.read(thread, entry.start + offset, size, cipher))

    def _write_data(self, thread: Thread, owner: bytes, entry: FatEntry, offset: int, data: bytes) -> Steps[None]:
        cipher = self._keys.open_rpmb_file(owner, entry.enc_fek)
        yield from self.device.write(thread, entry.start + offset, data, cipher)

    def _read(self, thread: Thread, file: RpmbFile, offset: int, size: int) -> Steps[bytes]:
        if not size:
            return b""
        yield from self._refresh(thread, file)
        size = min(size, file.length - offset)
        if size <= 0:
            return b""
        return (yield from self._read_data(thread, file.owner, file.entry, offset, size))

    def _write(self, thread: Thread, file: RpmbFile, offset: int, data: bytes) -> Steps[None]:
        if not data:
            return
        fat = yield from self._refresh(thread, file, whole=True)
        entry = file.entry
        if offset + len(data) <= entry.size and self.device.is_atomic(entry.start + offset, len(data)):
            yield from self._write_data(thread, file.owner, entry, offset, data)
        else:
            yield from self._replace(thread, file, entry, offset, data, fat)

    def _replace(
        self, thread: Thread, file: RpmbFile, base: FatEntry, offset: int, data: bytes, fat: Sequence[Placed]
    ) -> Steps[None]:
        """Write the content of `base`, changed from `offset` on, to a new place, and let the file's entry name that."""
        size = max(offset + len(data), base.size)
        start = self._space(fat).find(size) if size else 0
        if start is None:
            raise TeeError(Result.STORAGE_NO_SPACE)
        new = base._replace(start=start, size=size)
        for piece_start in range(0, size, BLOCK_SIZE):
            piece = bytearray(min(BLOCK_SIZE, size - piece_start))
            kept = min(len(piece), base.size - piece_start)
            end = piece_start + len(piece)
            if kept > 0 and not (offset <= piece_start and end <= offset + len(data)):
                piece[:kept] = yield from self._read_data(thread, file.owner, base, piece_start, kept)
            first, last = max(offset, piece_start), min(offset + len(data), end)
            if first < last:
                piece[first - piece_start : last - piece_start] = data[first - offset : last - offset]
            yield from self._write_data(thread, file.owner, new, piece_start, bytes(piece))
        yield from self._write_entry(thread, Placed(file.address, new))
        file.entry = new

    def _truncate(self, thread: Thread, file: RpmbFile, length: int) -> Steps[None]:
        fat = yield from self._refresh(thread, file, whole=True)
        entry = file.entry
        if length > entry.size:
            if self._space(fat).find(length) is None:
                raise TeeError(Result.OUT_OF_MEMORY)
            yield from self._replace(thread, file, entry, length, b"", fat)
            return
        new = entry._replace(size=length)
        yield from self._write_entry(thread, Placed(file.address, new))
        file.entry = new

    def _rename(self, thread: Thread, old: str, new: str) -> Steps[None]:
        address, entry = yield from self._get(thread, old)
        if (yield from self._find(thread, new)) is not None:
            raise TeeError(Result.ACCESS_CONFLICT)
        yield from self._write_entry(thread, Placed(address, entry.named(new)))

    def _remove(self, thread: Thread, name: str) -> Steps[None]:
        address, _ = yield from self._get(thread, name)
        yield from self._write_entry(thread, Placed(address, FatEntry()))

    def _open_directory(self, thread: Thread, owner: bytes) -> Steps[RpmbDirectory]:
        prefix = directory_name(owner)
        fat = yield from self._read_fat(thread)
        names = [entry.name for _, entry in fat if entry.flags & ACTIVE and entry.name.startswith(prefix)]
        object_ids = [object_id for name in names if (object_id := parse_object_id(owner, name)) is not None]
        if not object_ids:
            raise TeeError(Result.ITEM_NOT_FOUND)
        return RpmbDirectory(object_ids)
