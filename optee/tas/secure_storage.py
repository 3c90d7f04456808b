"""secure_storage of optee_examples: raw objects, written whole, read whole, deleted."""

from __future__ import annotations

from uuid import UUID

from optee.abi.results import Result, StorageId
from optee.storage.registry import DataFlag
from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, Steps, TeeError, TrustedApplication, command

_CREATE = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE | DataFlag.ACCESS_WRITE_META | DataFlag.OVERWRITE


class SecureStorage(TrustedApplication):
    """READ_RAW, WRITE_RAW and DELETE. Ids and data pass through the TA's heap, which bounds their size."""

    uuid = UUID("f4e750bb-1437-4fbf-8785-8d3580c34994")
    unknown_command = Result.NOT_SUPPORTED

    @command(0, ParamKind.MEMREF_INPUT, ParamKind.MEMREF_OUTPUT)
    def read_raw(self, tee: Tee, name: Memref, data: Memref) -> Steps[None]:
        """Read an object; with too small a buffer answer its size (SHORT_BUFFER)."""
        id_copy, data_copy = tee.malloc(name.capacity), tee.malloc(data.capacity)
        handle = yield from tee.storage.open(StorageId.PRIVATE, name.read(), DataFlag.ACCESS_READ | DataFlag.SHARE_READ)
        size = handle.info.data_size
        failure: TeeError | None = None
        try:
            if size > data.capacity:
                data.size = size
                raise TeeError(Result.SHORT_BUFFER)
            data.put((yield from tee.storage.read(handle, size)))
        except TeeError as error:
            failure = error
        yield from tee.storage.close(handle)
        id_copy.free()
        data_copy.free()
        if failure is not None:
            raise failure

    @command(1, ParamKind.MEMREF_INPUT, ParamKind.MEMREF_INPUT)
    def write_raw(self, tee: Tee, name: Memref, data: Memref) -> Steps[None]:
        """Create an object, or replace one, and write its data; what fails in the middle is deleted."""
        id_copy, data_copy = tee.malloc(name.capacity), tee.malloc(data.capacity)
        handle = yield from tee.storage.create(StorageId.PRIVATE, name.read(), _CREATE)
        try:
            yield from tee.storage.write(handle, data.read())
        except TeeError:
            yield from tee.storage.delete(handle)
            raise
        yield from tee.storage.close(handle)
        id_copy.free()
        data_copy.free()

    @command(2, ParamKind.MEMREF_INPUT)
    def delete(self, tee: Tee, name: Memref) -> Steps[None]:
        """Delete an object."""
        id_copy = tee.malloc(name.capacity)
        handle = yield from tee.storage.open(
            StorageId.PRIVATE, name.read(), DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE_META
        )
        yield from tee.storage.delete(handle)
        id_copy.free()
