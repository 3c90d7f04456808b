"""A stand-in for secure storage: what loading a TA needs of it, in OP-TEE's order of RPCs.

Loading a TA looks into two files of OP-TEE's own, the TA database `ta.db` and the versions of loaded TAs
`ta_ver.db`, by way of the directory `dirf.db`. This module keeps them with the file layout of OP-TEE's
hash-tree files (head and root node in two versions each, a data block in two versions, commit by counter),
but **without encryption and authentication**, for files of one block only: nothing here protects anything,
and a store that a real OP-TEE wrote reads as corrupt. Its purpose is the sequence of RPCs (OP-TEE secure
storage, sections 3 and 6; recordings of hello_world). The real formats replace it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Final, TypeAlias, TypeVar
from uuid import UUID

from optee.abi.results import Result
from optee.abi.rpc import FS_NAME_MAX, FsOperation, RpcCommand
from optee.errors import TeeError
from optee.rpc import RMEM_INPUT, RMEM_OUTPUT, VALUE_INPUT, VALUE_OUTPUT, cached_payload, rpc_command
from optee.steps import Steps
from optee.threads import Thread
from optee.wait_queue import Mutex

T = TypeVar("T")
_Entry: TypeAlias = tuple[bytes, bytes, int, bytes, int]

_FS: Final = int(RpcCommand.FS)
_BLOCK: Final = 4096
_HEAD: Final = struct.Struct("<Q56xI")  # length of the data, counter: 68 bytes
_NODE: Final = struct.Struct("<32s32sH")  # hash, digest of the data block, flags: 66 bytes
_HEAD_OFFSETS: Final = (0, _HEAD.size)
_NODE_OFFSETS: Final = (_BLOCK, _BLOCK + _NODE.size)
_DATA_OFFSETS: Final = (2 * _BLOCK, 3 * _BLOCK)
_BLOCK_VERSION: Final = 1  # flag of a node: which version of its block is committed

_ENTRY: Final = struct.Struct("<16s64sI32sI")  # of the directory: owner, id, length of id, hash, file number
_VERSIONS_HEADER: Final = struct.Struct("<II")  # version of the format, entries
_VERSION: Final = struct.Struct("<16sI")  # TA, version
_TA_DATABASE: Final = b"ta.db\0"
_TA_VERSIONS: Final = b"ta_ver.db\0"
_OWNER: Final = bytes(16)


def _fs_name(thread: Thread, operation: FsOperation, name: str) -> Steps[int]:
    """OPEN, CREATE or REMOVE: the file's descriptor where there is one."""
    payload = yield from cached_payload(thread, "FS", FS_NAME_MAX)
    payload.store(0, f"/{name}\0".encode())
    params = [(VALUE_INPUT, operation, 0, 0), (RMEM_INPUT, 0, FS_NAME_MAX, payload.cookie)]
    if operation is not FsOperation.REMOVE:
        params.append((VALUE_OUTPUT, 0, 0, 0))
    reply = yield from rpc_command(thread, _FS, params)
    if reply.ret:
        raise TeeError(reply.ret)
    return reply.params[-1][1]


def _fs_close(thread: Thread, fd: int) -> Steps[None]:
    yield from rpc_command(thread, _FS, ((VALUE_INPUT, FsOperation.CLOSE, fd, 0),))


def _fs_read(thread: Thread, fd: int, offset: int, size: int) -> Steps[bytes]:
    payload = yield from cached_payload(thread, "FS", size)
    params = ((VALUE_INPUT, FsOperation.READ, fd, offset), (RMEM_OUTPUT, 0, size, payload.cookie))
    reply = yield from rpc_command(thread, _FS, params)
    if reply.ret:
        raise TeeError(reply.ret)
    if reply.params[1][2] != size:
        raise TeeError(Result.CORRUPT_OBJECT)
    return payload.load(0, size)


def _fs_write(thread: Thread, fd: int, offset: int, data: bytes) -> Steps[None]:
    payload = yield from cached_payload(thread, "FS", len(data))
    payload.store(0, data)
    params = ((VALUE_INPUT, FsOperation.WRITE, fd, offset), (RMEM_INPUT, 0, len(data), payload.cookie))
    reply = yield from rpc_command(thread, _FS, params)
    if reply.ret:
        raise TeeError(reply.ret)


class _File:
    """An open hash-tree file of at most one block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.counter = 0
        self.length = 0
        self.digest = bytes(32)
        self.block_version = 0
        self.written = False
        """A version of the block that is not committed yet has been written."""

    def _node(self) -> bytes:
        body = self.digest + self.block_version.to_bytes(2, "little")
        return hashlib.sha256(body).digest() + body

    @property
    def hash(self) -> bytes:
        """Root hash."""
        return self._node()[:32]

    def create(self, thread: Thread) -> Steps[None]:
        """Write an empty file: node and head in version 1, a void head in version 0."""
        yield from self._commit(thread)
        yield from _fs_write(thread, self.fd, _HEAD_OFFSETS[0], bytes(_HEAD.size))

    def open(self, thread: Thread, root_hash: bytes | None) -> Steps[None]:
        """Find the committed version: by root hash, or without one by the larger counter."""
        if root_hash is None:
            even = yield from _fs_read(thread, self.fd, _HEAD_OFFSETS[0], _HEAD.size)
            odd = yield from _fs_read(thread, self.fd, _HEAD_OFFSETS[1], _HEAD.size)
            heads = _HEAD.unpack(even), _HEAD.unpack(odd)
            self.length, self.counter = max(heads, key=lambda head: head[1])
            if not (yield from self._read_node(thread, self.counter & 1)):
                raise TeeError(Result.CORRUPT_OBJECT)
        else:
            for version in (0, 1):
                if (yield from self._read_node(thread, version)) and self.hash == root_hash:
                    break
            else:
                raise TeeError(Result.CORRUPT_OBJECT)
            head = yield from _fs_read(thread, self.fd, _HEAD_OFFSETS[version], _HEAD.size)
            self.length, self.counter = _HEAD.unpack(head)
        if not self.counter or self.length > _BLOCK:
            raise TeeError(Result.CORRUPT_OBJECT)

    def _read_node(self, thread: Thread, version: int) -> Steps[bool]:
        """Read one version of the root node: False if it is not whole."""
        node = yield from _fs_read(thread, self.fd, _NODE_OFFSETS[version], _NODE.size)
        _, self.digest, flags = _NODE.unpack(node)
        self.block_version = flags & _BLOCK_VERSION
        return self._node() == node

    def _read_block(self, thread: Thread) -> Steps[bytes]:
        block = yield from _fs_read(thread, self.fd, _DATA_OFFSETS[self.block_version], _BLOCK)
        if hashlib.sha256(block).digest() != self.digest:
            raise TeeError(Result.CORRUPT_OBJECT)
        return block

    def read(self, thread: Thread, offset: int, size: int) -> Steps[bytes]:
        """Read up to `size` bytes; beyond the end costs nothing."""
        size = min(size, self.length - offset)
        if size <= 0:
            return b""
        block = yield from self._read_block(thread)
        return block[offset : offset + size]

    def write(self, thread: Thread, offset: int, data: bytes) -> Steps[None]:
        """Write into the other version of the block; `sync` commits it."""
        if offset + len(data) > _BLOCK:
            raise TeeError(Result.STORAGE_NO_SPACE)
        block = bytearray(_BLOCK)
        if self.length:
            block[:] = yield from self._read_block(thread)
        block[offset : offset + len(data)] = data
        if not self.written:
            self.block_version ^= 1
            self.written = True
        yield from _fs_write(thread, self.fd, _DATA_OFFSETS[self.block_version], bytes(block))
        self.digest = hashlib.sha256(block).digest()
        self.length = max(self.length, offset + len(data))

    def sync(self, thread: Thread) -> Steps[None]:
        """Commit what was written."""
        if self.written:
            yield from self._commit(thread)
            self.written = False

    def _commit(self, thread: Thread) -> Steps[None]:
        self.counter += 1
        slot = self.counter & 1
        yield from _fs_write(thread, self.fd, _NODE_OFFSETS[slot], self._node())
        yield from _fs_write(thread, self.fd, _HEAD_OFFSETS[slot], _HEAD.pack(self.length, self.counter))


class _Object:
    """An open object: its file and its place in the directory."""

    def __init__(self, file: _File, index: int, *, created: bool) -> None:
        self.file = file
        self.index = index
        self.created = created


def _while_locked(mutex: Mutex, thread: Thread, steps: Steps[T]) -> Steps[T]:
    """Run steps with a mutex held. No `finally`: a guest that dies meanwhile must not suspend again."""
    yield from mutex.lock(thread)
    try:
        result = yield from steps
    except TeeError:
        yield from mutex.unlock(thread)
        raise
    yield from mutex.unlock(thread)
    return result


class StorageStandIn:
    """Secure storage of one guest, as far as loading TAs needs it."""

    def __init__(self) -> None:
        self._mutex = Mutex()  # ree_fs_mutex
        self._database_mutex = Mutex()  # tadb_mutex
        self._versions_mutex = Mutex()  # ver_db_mutex
        self._directory: _File | None = None
        self._references = 0
        self._numbers: set[int] = set()

    def look_for_ta(self, thread: Thread) -> Steps[None]:
        """Open and close the TA database, which is always empty here. Raises TeeError."""
        yield from _while_locked(self._database_mutex, thread, self._look_for_ta(thread))

    def check_version(self, thread: Thread, uuid: UUID, version: int) -> Steps[None]:
        """Note a loaded TA's version; an older one than before is refused: TeeError(ACCESS_CONFLICT)."""
        yield from _while_locked(self._versions_mutex, thread, self._check_version(thread, uuid, version))

    def _look_for_ta(self, thread: Thread) -> Steps[None]:
        database = yield from self._open_or_create(thread, _TA_DATABASE, b"")
        yield from self._locked(thread, self._close(thread, database))

    def _check_version(self, thread: Thread, uuid: UUID, version: int) -> Steps[None]:
        versions = yield from self._open_or_create(thread, _TA_VERSIONS, _VERSIONS_HEADER.pack(0, 0))
        try:
            yield from self._update_version(thread, versions, uuid, version)
        except TeeError:
            yield from self._locked(thread, self._close(thread, versions))
            raise
        yield from self._locked(thread, self._close(thread, versions))

    def _update_version(self, thread: Thread, versions: _Object, uuid: UUID, version: int) -> Steps[None]:
        count = 0
        if not versions.created:
            header = yield from self._locked(thread, versions.file.read(thread, 0, _VERSIONS_HEADER.size))
            _, count = _VERSIONS_HEADER.unpack(header)
        index = 0
        known = False
        while index < count and not known:
            place = _VERSIONS_HEADER.size + index * _VERSION.size
            entry = yield from self._locked(thread, versions.file.read(thread, place, _VERSION.size))
            if len(entry) < _VERSION.size:
                raise TeeError(Result.CORRUPT_OBJECT)
            ta, newest = _VERSION.unpack(entry)
            if ta == uuid.bytes:
                known = True
                if version < newest:
                    raise TeeError(Result.ACCESS_CONFLICT)
                if version == newest:
                    return
            else:
                index += 1
        place = _VERSIONS_HEADER.size + index * _VERSION.size
        yield from self._locked(thread, self._write(thread, versions, place, _VERSION.pack(uuid.bytes, version)))
        if not known:
            header = _VERSIONS_HEADER.pack(0, count + 1)
            yield from self._locked(thread, self._write(thread, versions, 0, header))

    def _locked(self, thread: Thread, steps: Steps[T]) -> Steps[T]:
        """Run one operation under the file system's lock."""
        return (yield from _while_locked(self._mutex, thread, steps))

    def _open_or_create(self, thread: Thread, name: bytes, content: bytes) -> Steps[_Object]:
        try:
            return (yield from self._locked(thread, self._open(thread, name)))
        except TeeError as error:
            if error.result != Result.ITEM_NOT_FOUND:
                raise
        return (yield from self._locked(thread, self._create(thread, name, content)))

    def _get_directory(self, thread: Thread) -> Steps[_File]:
        """Open dirf.db, or create it; every entry is read once to learn the used file numbers."""
        directory = self._directory
        if directory is None:
            try:
                directory = _File((yield from _fs_name(thread, FsOperation.OPEN, "dirf.db")))
                yield from self._open_file(thread, directory, None)
            except TeeError as error:
                yield from self._remove_directory(thread)
                if error.result != Result.ITEM_NOT_FOUND:
                    raise
                directory = _File((yield from _fs_name(thread, FsOperation.CREATE, "dirf.db")))
                yield from directory.create(thread)
            self._numbers.clear()
            for index in self._indices():
                entry = yield from self._read_entry(thread, directory, index)
                if entry is None:
                    break
                self._numbers.add(entry[4])
            self._directory = directory
        self._references += 1
        return directory

    def _open_file(self, thread: Thread, file: _File, root_hash: bytes | None) -> Steps[None]:
        try:
            yield from file.open(thread, root_hash)
        except TeeError:
            yield from _fs_close(thread, file.fd)
            raise

    def _remove_directory(self, thread: Thread) -> Steps[None]:
        """Remove a dirf.db that does not open; whether that works does not matter."""
        try:
            yield from _fs_name(thread, FsOperation.REMOVE, "dirf.db")
        except TeeError:
            return

    def _put_directory(self, thread: Thread) -> Steps[None]:
        self._references -= 1
        if not self._references and self._directory is not None:
            fd, self._directory = self._directory.fd, None
            yield from _fs_close(thread, fd)

    @staticmethod
    def _indices() -> Iterator[int]:
        return iter(range(_BLOCK // _ENTRY.size))

    def _read_entry(self, thread: Thread, directory: _File, index: int) -> Steps[_Entry | None]:
        data = yield from directory.read(thread, index * _ENTRY.size, _ENTRY.size)
        if len(data) < _ENTRY.size:
            return None
        owner, name, length, root_hash, number = _ENTRY.unpack(data)
        return owner, name, length, root_hash, number

    def _find_entry(self, thread: Thread, directory: _File, name: bytes) -> Steps[tuple[int, bytes, int] | None]:
        """Index, root hash and file number of an object, by reading entry after entry."""
        for index in self._indices():
            entry = yield from self._read_entry(thread, directory, index)
            if entry is None:
                return None
            owner, identifier, length, root_hash, number = entry
            if owner == _OWNER and identifier[:length] == name:
                return index, root_hash, number
        return None

    def _open(self, thread: Thread, name: bytes) -> Steps[_Object]:
        directory = yield from self._get_directory(thread)
        try:
            found = yield from self._find_entry(thread, directory, name)
            if found is None:
                raise TeeError(Result.ITEM_NOT_FOUND)
            index, root_hash, number = found
            file = _File((yield from _fs_name(thread, FsOperation.OPEN, f"{number:x}")))
            yield from self._open_file(thread, file, root_hash)
        except TeeError:
            yield from self._put_directory(thread)
            raise
        return _Object(file, index, created=False)

    def _create(self, thread: Thread, name: bytes, content: bytes) -> Steps[_Object]:
        directory = yield from self._get_directory(thread)
        try:
            number = next(n for n in range(len(self._numbers) + 1) if n not in self._numbers)
            file = _File((yield from _fs_name(thread, FsOperation.CREATE, f"{number:x}")))
            yield from file.create(thread)
            if content:
                yield from file.write(thread, 0, content)
                yield from file.sync(thread)
            # OP-TEE goes through the directory for an object to replace, a free entry, and the name again.
            yield from self._find_entry(thread, directory, name)
            yield from self._find_entry(thread, directory, name)
            yield from self._find_entry(thread, directory, name)
            index = directory.length // _ENTRY.size
            entry = _ENTRY.pack(_OWNER, name, len(name), file.hash, number)
            yield from directory.write(thread, index * _ENTRY.size, entry)
            yield from directory.sync(thread)
        except TeeError:
            yield from self._put_directory(thread)
            raise
        self._numbers.add(number)
        return _Object(file, index, created=True)

    def _write(self, thread: Thread, target: _Object, offset: int, data: bytes) -> Steps[None]:
        """Write and commit: the object, then its root hash in the directory."""
        directory = yield from self._get_directory(thread)
        try:
            yield from target.file.write(thread, offset, data)
            yield from target.file.sync(thread)
            entry = yield from self._read_entry(thread, directory, target.index)
            if entry is None:
                raise TeeError(Result.CORRUPT_OBJECT)
            owner, name, length, _, number = entry
            changed = _ENTRY.pack(owner, name, length, target.file.hash, number)
            yield from directory.write(thread, target.index * _ENTRY.size, changed)
            yield from directory.sync(thread)
        except TeeError:
            yield from self._put_directory(thread)
            raise
        yield from self._put_directory(thread)

    def _close(self, thread: Thread, target: _Object) -> Steps[None]:
        yield from self._put_directory(thread)
        yield from _fs_close(thread, target.file.fd)
