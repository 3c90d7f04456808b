"""Persistent objects as a TA has them: TEE_*PersistentObject and TEE_*ObjectData.

Source: GP TEE Internal Core API, chapter 5; OP-TEE secure storage, sections 1 and 6. As in OP-TEE's library, results
that a function may not return are a panic of the TA.

    handle = yield from tee.storage.create(StorageId.PRIVATE, b"id", DataFlag.ACCESS_WRITE)
    yield from tee.storage.write(handle, b"data")
    yield from tee.storage.close(handle)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from optee.abi.results import Result, TaFlag
from optee.errors import TaPanic, TeeError
from optee.memory.pool import Owner
from optee.memory.structures import FILE_HANDLE, TRANSIENT_OBJECT
from optee.parameters import Memref, PrivateBuffer
from optee.steps import Steps
from optee.storage.attributes import DATA_TYPE, pack_attributes
from optee.storage.handles import Enumerator, ObjectHandle, ObjectInfo, TransientKey
from optee.storage.layout import MAX_OBJECT_ID, OBJECT_HEADER_SIZE, USAGE_OFFSET, ObjectHeader
from optee.storage.registry import OPEN_FLAGS, DataFlag, Purpose

if TYPE_CHECKING:
    from optee.storage.file_system import OpenFile, Storage
    from optee.storage.registry import Record
    from optee.ta_context import Instance
    from optee.threads import Thread

T = TypeVar("T")
ObjectId: TypeAlias = bytes | Memref
"""Bytes of the TA's own, or a reference: one into memory that the client shares is a panic."""

MAX_POSITION: Final = 0xFFFFFFFF
"""TEE_DATA_MAX_POSITION."""
SEEK_SET, SEEK_CUR, SEEK_END = range(3)
"""TEE_DATA_SEEK_*."""
_STORAGE_FAILED: Final = frozenset({Result.CORRUPT_OBJECT, Result.STORAGE_NOT_AVAILABLE})
_OPENED: Final = _STORAGE_FAILED | {Result.ITEM_NOT_FOUND, Result.ACCESS_CONFLICT, Result.OUT_OF_MEMORY}
_CREATED: Final = _OPENED | {Result.STORAGE_NO_SPACE}
_WRITTEN: Final = _STORAGE_FAILED | {Result.STORAGE_NO_SPACE, Result.OVERFLOW}
_TRUNCATED: Final = _STORAGE_FAILED | {Result.STORAGE_NO_SPACE}
_POSITIONED: Final = _STORAGE_FAILED | {Result.OVERFLOW}
_RENAMED: Final = _STORAGE_FAILED | {Result.ACCESS_CONFLICT}
_DELETED: Final = frozenset({Result.STORAGE_NOT_AVAILABLE})
_ENUMERATED: Final = _STORAGE_FAILED | {Result.ITEM_NOT_FOUND}


class TrustedStorage:
    """Trusted storage for an instance of a TA, in one of its calls."""

    def __init__(self, instance: Instance, thread: Thread) -> None:
        self._instance = instance
        self._thread = thread
        self._owner = instance.uuid.bytes_le
        self._storages: dict[int, Storage] = thread.partition.storage.storages
        self._pools = thread.partition.pools

    def handle(self, number: int) -> ObjectHandle:
        """The open object with that number. A wrong one is a panic."""
        try:
            return self._instance.handles.objects[number]
        except KeyError:
            raise TaPanic(Result.BAD_STATE) from None

    def enumerator(self, number: int) -> Enumerator:
        """The enumerator with that number. A wrong one is a panic."""
        try:
            return self._instance.handles.enumerators[number]
        except KeyError:
            raise TaPanic(Result.BAD_PARAMETERS) from None

    def open(self, storage_id: int, object_id: ObjectId, flags: int) -> Steps[ObjectHandle]:
        """TEE_OpenPersistentObject. Raises TeeError: ITEM_NOT_FOUND, ACCESS_CONFLICT, CORRUPT_OBJECT, OUT_OF_MEMORY."""
        return self._or_panic(_OPENED, self._open(storage_id, object_id, flags))

    def create(
        self, storage_id: int, object_id: ObjectId, flags: int, data: bytes = b"", key: TransientKey | None = None
    ) -> Steps[ObjectHandle]:
        """TEE_CreatePersistentObject. Raises TeeError: as `open`, and STORAGE_NO_SPACE."""
        return self._or_panic(_CREATED, self._create(storage_id, object_id, flags, data, key))

    def close(self, handle: ObjectHandle) -> Steps[None]:
        """TEE_CloseObject. Of a handle that is closed already, a panic."""
        del self._instance.handles.objects[self._live(handle).number]
        yield from self._release(handle)

    def delete(self, handle: ObjectHandle) -> Steps[None]:
        """TEE_CloseAndDeletePersistentObject1. Without ACCESS_WRITE_META a panic."""
        return self._or_panic(_DELETED, self._delete(handle))

    def rename(self, handle: ObjectHandle, object_id: ObjectId) -> Steps[None]:
        """TEE_RenamePersistentObject. Raises TeeError: ACCESS_CONFLICT. Without ACCESS_WRITE_META a panic."""
        return self._or_panic(_RENAMED, self._rename(handle, object_id))

    def read(self, handle: ObjectHandle, size: int) -> Steps[bytes]:
        """TEE_ReadObjectData: up to `size` bytes. Raises TeeError: CORRUPT_OBJECT. Without ACCESS_READ a panic."""
        return self._or_panic(_STORAGE_FAILED, self._read(handle, size))

    def write(self, handle: ObjectHandle, data: bytes) -> Steps[None]:
        """TEE_WriteObjectData. Raises TeeError: OVERFLOW, STORAGE_NO_SPACE, CORRUPT_OBJECT."""
        return self._or_panic(_WRITTEN, self._write(handle, data))

    def truncate(self, handle: ObjectHandle, size: int) -> Steps[None]:
        """TEE_TruncateObjectData: cut, or lengthen with zeroes; the position stays. Raises TeeError as `write`."""
        return self._or_panic(_TRUNCATED, self._truncate(handle, size))

    def seek(self, handle: ObjectHandle, offset: int, whence: int) -> None:
        """TEE_SeekObjectData: a place before the beginning is the beginning. Raises TeeError: OVERFLOW."""
        self._live(handle)
        bases = {SEEK_SET: 0, SEEK_CUR: handle.position, SEEK_END: handle.data_size}
        if whence not in bases:
            raise TaPanic(Result.ITEM_NOT_FOUND)
        position = max(bases[whence] + offset, 0)
        if position > MAX_POSITION:
            raise TeeError(Result.OVERFLOW)
        handle.position = position

    def restrict_usage(self, handle: ObjectHandle, usage: int) -> Steps[None]:
        """TEE_RestrictObjectUsage1: take away all bits of the usage but these, for good."""
        return self._or_panic(_STORAGE_FAILED, self._restrict_usage(handle, usage))

    def allocate_enumerator(self) -> Enumerator:
        """TEE_AllocatePersistentObjectEnumerator."""
        enumerator = Enumerator(self._instance.handles.new_number())
        self._instance.handles.enumerators[enumerator.number] = enumerator
        return enumerator

    def free_enumerator(self, enumerator: Enumerator) -> Steps[None]:
        """TEE_FreePersistentObjectEnumerator."""
        yield from self.reset_enumerator(enumerator)
        del self._instance.handles.enumerators[enumerator.number]

    def reset_enumerator(self, enumerator: Enumerator) -> Steps[None]:
        """TEE_ResetPersistentObjectEnumerator."""
        if enumerator.opened is not None:
            opened, enumerator.opened = enumerator.opened, None
            yield from enumerator.storage.fs.close_directory(self._thread, opened)

    def start_enumerator(self, enumerator: Enumerator, storage_id: int) -> Steps[None]:
        """TEE_StartPersistentObjectEnumerator. Raises TeeError: ITEM_NOT_FOUND if the TA has no object."""
        return self._or_panic(_ENUMERATED, self._start(enumerator, storage_id))

    def next_object(self, enumerator: Enumerator) -> Steps[tuple[ObjectInfo, bytes]]:
        """TEE_GetNextPersistentObject: what it is, and its id. Raises TeeError: ITEM_NOT_FOUND at the end."""
        return self._or_panic(_ENUMERATED, self._next(enumerator))

    def close_all(self) -> Steps[None]:
        """Close what the instance has open, because it ends."""
        handles = self._instance.handles
        while handles.objects:
            _, handle = handles.objects.popitem()
            yield from self._release(handle)
        for enumerator in list(handles.enumerators.values()):
            yield from self.free_enumerator(enumerator)

    def _or_panic(self, allowed: Collection[int], steps: Steps[T]) -> Steps[T]:
        try:
            return (yield from steps)
        except TeeError as error:
            if error.result in allowed:
                raise
            raise TaPanic(error.result) from None

    def _object_id(self, object_id: ObjectId) -> bytes:
        if isinstance(object_id, Memref):
            if not isinstance(object_id.buffer, PrivateBuffer):
                raise TeeError(Result.ACCESS_DENIED)
            object_id = object_id.read()
        if len(object_id) > MAX_OBJECT_ID:
            raise TeeError(Result.BAD_PARAMETERS)
        return object_id

    def _storage(self, storage_id: int) -> Storage:
        if storage_id not in self._storages:
            raise TeeError(Result.ITEM_NOT_FOUND)
        return self._storages[storage_id]

    def _open(self, storage_id: int, object_id: ObjectId, flags: int) -> Steps[ObjectHandle]:
        if flags & ~OPEN_FLAGS:
            raise TeeError(Result.BAD_PARAMETERS)
        storage = self._storage(storage_id)
        record = storage.registry.get(self._owner, self._object_id(object_id), flags, Purpose.OPEN)
        handle = self._new_handle(self._instance.handles.new_number(), storage, record, flags)
        try:
            yield from self._read_header(handle)
        except TeeError as error:
            if error.result == Result.CORRUPT_OBJECT:
                yield from self._remove_file(handle)
            self._drop(handle)
            raise
        self._instance.handles.objects[handle.number] = handle
        return handle

    def _read_header(self, handle: ObjectHandle) -> Steps[None]:
        """Open the file of a handle and learn what it holds; the file is closed again where that fails."""
        record, fs = handle.record, handle.storage.fs
        file: OpenFile = yield from fs.open(self._thread, record.owner, record.object_id)
        try:
            data = yield from fs.read(self._thread, file, 0, OBJECT_HEADER_SIZE)
            if len(data) < OBJECT_HEADER_SIZE:
                raise TeeError(Result.CORRUPT_OBJECT)
            handle.header = header = ObjectHeader.unpack(data)
            if header.data_offset > file.length:
                raise TeeError(Result.CORRUPT_OBJECT)
            if header.attr_size:
                size = header.attr_size
                handle.serialized = yield from fs.read(self._thread, file, OBJECT_HEADER_SIZE, size)
        except TeeError:
            yield from fs.close(self._thread, file)
            raise
        handle.file = file
        handle.data_size = file.length - header.data_offset
        record.usage = header.object_usage

    def _create(
        self, storage_id: int, object_id: ObjectId, flags: int, data: bytes, key: TransientKey | None
    ) -> Steps[ObjectHandle]:
        if flags & ~(OPEN_FLAGS | DataFlag.OVERWRITE):
            raise TeeError(Result.BAD_PARAMETERS)
        storage = self._storage(storage_id)
        record = storage.registry.get(self._owner, self._object_id(object_id), flags, Purpose.CREATE)
        handle = self._new_handle(self._instance.handles.new_number(), storage, record, flags)
        if key is None:
            key = TransientKey(DATA_TYPE, 0, ())
        handle.serialized = pack_attributes(key.attributes)
        present = sum(bool(value) << index for index, value in enumerate(key.attributes))
        sizes = len(handle.serialized), key.object_size, key.object_size
        handle.header = ObjectHeader(*sizes, key.object_usage, key.object_type, present)
        pieces = handle.header.pack(), handle.serialized, data
        overwrite = bool(flags & DataFlag.OVERWRITE)
        try:
            handle.file = yield from storage.fs.create(
                self._thread, self._owner, record.object_id, pieces, overwrite=overwrite
            )
        except TeeError as error:
            if error.result == Result.CORRUPT_OBJECT:
                yield from self._remove_file(handle)
            self._drop(handle)
            raise
        handle.data_size = len(data)
        record.usage = key.object_usage
        record.creating = False
        self._instance.handles.objects[handle.number] = handle
        return handle

    def _release(self, handle: ObjectHandle) -> Steps[None]:
        yield from handle.storage.fs.close(self._thread, handle.file)
        self._drop(handle)

    def _new_handle(self, number: int, storage: Storage, record: Record, flags: int) -> ObjectHandle:
        try:
            owner = Owner("object handle", self._pools.guest)
            memory = self._pools.heap.allocate_all((TRANSIENT_OBJECT, FILE_HANDLE), owner)
        except TeeError:
            storage.registry.put(record)
            raise
        return ObjectHandle(number, storage, record, flags, memory)

    def _drop(self, handle: ObjectHandle) -> None:
        self._pools.heap.free_all(handle.memory)
        handle.storage.registry.put(handle.record)

    def _remove_file(self, handle: ObjectHandle) -> Steps[None]:
        """Remove an object that turned out corrupt; if that fails too, it stays."""
        record = handle.record
        try:
            yield from handle.storage.fs.remove(self._thread, record.owner, record.object_id)
        except TeeError:
            return

    def _touch(self, handle: ObjectHandle, steps: Steps[T]) -> Steps[T]:
        """Work on the content. A corrupt object is removed, and its handle closed unless the TA's flags forbid it."""
        try:
            return (yield from steps)
        except TeeError as error:
            if error.result == Result.CORRUPT_OBJECT:
                yield from self._remove_file(handle)
                if not self._instance.flags & TaFlag.DONT_CLOSE_HANDLE_ON_CORRUPT_OBJECT:
                    yield from self.close(handle)
            raise

    def _live(self, handle: ObjectHandle) -> ObjectHandle:
        return self.handle(handle.number)

    def _need(self, handle: ObjectHandle, flag: DataFlag, result: Result = Result.ACCESS_CONFLICT) -> None:
        self._live(handle)
        if not handle.flags & flag:
            raise TeeError(result)

    def _delete(self, handle: ObjectHandle) -> Steps[None]:
        self._need(handle, DataFlag.ACCESS_WRITE_META)
        record = handle.record
        try:
            yield from handle.storage.fs.remove(self._thread, record.owner, record.object_id)
        except TeeError:
            yield from self.close(handle)
            raise
        yield from self.close(handle)

    def _rename(self, handle: ObjectHandle, object_id: ObjectId) -> Steps[None]:
        self._need(handle, DataFlag.ACCESS_WRITE_META, Result.BAD_STATE)
        record, new = handle.record, self._object_id(object_id)
        fs, registry = handle.storage
        reserved = registry.get(self._owner, new, DataFlag.ACCESS_WRITE_META, Purpose.RENAME)
        try:
            yield from fs.rename(self._thread, self._owner, record.object_id, new)
        except TeeError:
            registry.put(reserved)
            raise
        registry.rename(record, reserved)

    def _read(self, handle: ObjectHandle, size: int) -> Steps[bytes]:
        self._need(handle, DataFlag.ACCESS_READ)
        position = handle.header.data_offset + handle.position
        data = yield from self._touch(handle, handle.storage.fs.read(self._thread, handle.file, position, size))
        handle.position += len(data)
        return data

    def _write(self, handle: ObjectHandle, data: bytes) -> Steps[None]:
        self._need(handle, DataFlag.ACCESS_WRITE)
        end = handle.position + len(data)
        if end > MAX_POSITION:
            raise TeeError(Result.OVERFLOW)
        position = handle.header.data_offset + handle.position
        yield from self._touch(handle, handle.storage.fs.write(self._thread, handle.file, position, data))
        handle.position = end
        handle.data_size = max(handle.data_size, end)

    def _truncate(self, handle: ObjectHandle, size: int) -> Steps[None]:
        self._need(handle, DataFlag.ACCESS_WRITE)
        length = handle.header.data_offset + size
        yield from self._touch(handle, handle.storage.fs.truncate(self._thread, handle.file, length))
        handle.data_size = size

    def _restrict_usage(self, handle: ObjectHandle, usage: int) -> Steps[None]:
        usage &= self._live(handle).record.usage
        stored = usage.to_bytes(4, "little")
        yield from self._touch(handle, handle.storage.fs.write(self._thread, handle.file, USAGE_OFFSET, stored))
        handle.record.usage = usage

    def _start(self, enumerator: Enumerator, storage_id: int) -> Steps[None]:
        yield from self.reset_enumerator(enumerator)
        enumerator.storage = self._storage(storage_id)
        enumerator.opened = yield from enumerator.storage.fs.open_directory(self._thread, self._owner)

    def _next(self, enumerator: Enumerator) -> Steps[tuple[ObjectInfo, bytes]]:
        if enumerator.opened is None:
            raise TeeError(Result.ITEM_NOT_FOUND)
        storage = enumerator.storage
        object_id = yield from storage.fs.read_directory(self._thread, enumerator.opened)
        if object_id is None:
            raise TeeError(Result.ITEM_NOT_FOUND)
        record = storage.registry.get(self._owner, object_id, 0, Purpose.ENUMERATE)
        handle = self._new_handle(0, storage, record, 0)
        try:
            yield from self._read_header(handle)
        except TeeError:
            self._drop(handle)
            raise
        info = handle.info._replace(handle_flags=0)
        yield from self._release(handle)
        return info, object_id
