"""The storage TAs of xtest (cases 6001 to 6021): every function of trusted storage as a command.

Handles go to the client as numbers; object ids are copied into the TA's memory first, but for the commands that try
what happens if they are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

from optee.abi.results import Result, StorageId
from optee.storage.handles import TransientKey
from optee.storage.registry import DataFlag
from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, Steps, TeeError, TrustedApplication, Value, command

_ROUNDS = 20
_AES = 0xA0000010
_KEY_BITS = 256
_ALL = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE | DataFlag.ACCESS_WRITE_META
_SIGN = 1 << 31
_LARGEST_PIECE = 1 << 16


def _signed(word: int) -> int:
    return word - 2 * _SIGN if word & _SIGN else word


class StorageTest(TrustedApplication):
    """An instance for each session: handles of two sessions meet in the registry of open objects only."""

    uuid = UUID("b689f2a7-8adf-477a-9f99-32e90c0ad0a2")
    data_size = 1 << 20

    @command(0, ParamKind.MEMREF_INPUT, ParamKind.VALUE_INOUT, ParamKind.VALUE_INPUT)
    def open_object(self, tee: Tee, name: Memref, flags: Value, storage: Value) -> Steps[None]:
        """Open the object with flags `a` in storage `a`: its handle is `b`."""
        flags.b = (yield from tee.storage.open(storage.a, name.read(), flags.a)).number

    @command(1, ParamKind.VALUE_INPUT)
    def close_object(self, tee: Tee, handle: Value) -> Steps[None]:
        """Close handle `a`."""
        yield from tee.storage.close(tee.storage.handle(handle.a))

    @command(2, ParamKind.MEMREF_OUTPUT, ParamKind.VALUE_INOUT)
    def read(self, tee: Tee, data: Memref, handle: Value) -> Steps[None]:
        """Read as much as the buffer holds from handle `a`: `b` bytes."""
        content = yield from tee.storage.read(tee.storage.handle(handle.a), data.capacity)
        data.put(content)
        handle.b = len(content)

    @command(3, ParamKind.MEMREF_INPUT, ParamKind.VALUE_INPUT)
    def write(self, tee: Tee, data: Memref, handle: Value) -> Steps[None]:
        """Write the buffer to handle `a`."""
        yield from tee.storage.write(tee.storage.handle(handle.a), data.read())

    @command(4, ParamKind.MEMREF_INPUT, ParamKind.VALUE_INOUT, ParamKind.VALUE_INPUT, ParamKind.MEMREF_INPUT)
    def create_object(self, tee: Tee, name: Memref, flags: Value, storage: Value, data: Memref) -> Steps[None]:
        """Create the object with flags `a` in storage `b` and with initial data: its handle is `b`."""
        flags.b = (yield from tee.storage.create(storage.b, name.read(), flags.a, data.read())).number

    @command(5, ParamKind.VALUE_INPUT, ParamKind.VALUE_INPUT)
    def seek(self, tee: Tee, handle: Value, whence: Value) -> None:
        """Seek in handle `a` by the signed offset `b` from `whence.a`."""
        tee.storage.seek(tee.storage.handle(handle.a), _signed(handle.b), whence.a)

    @command(6, ParamKind.VALUE_INPUT)
    def unlink(self, tee: Tee, handle: Value) -> Steps[None]:
        """Close and delete handle `a`."""
        yield from tee.storage.delete(tee.storage.handle(handle.a))

    @command(7, ParamKind.VALUE_INPUT, ParamKind.MEMREF_INPUT)
    def rename(self, tee: Tee, handle: Value, name: Memref) -> Steps[None]:
        """Give the object of handle `a` another id."""
        yield from tee.storage.rename(tee.storage.handle(handle.a), name.read())

    @command(8, ParamKind.VALUE_INPUT)
    def truncate(self, tee: Tee, handle: Value) -> Steps[None]:
        """Make the data of handle `a` `b` bytes long."""
        yield from tee.storage.truncate(tee.storage.handle(handle.a), handle.b)

    @command(9, ParamKind.VALUE_OUTPUT)
    def allocate_enumerator(self, tee: Tee, handle: Value) -> None:
        """Answer an enumerator."""
        handle.a = tee.storage.allocate_enumerator().number

    @command(10, ParamKind.VALUE_INPUT)
    def free_enumerator(self, tee: Tee, handle: Value) -> Steps[None]:
        """Free enumerator `a`."""
        yield from tee.storage.free_enumerator(tee.storage.enumerator(handle.a))

    @command(11, ParamKind.VALUE_INPUT)
    def reset_enumerator(self, tee: Tee, handle: Value) -> Steps[None]:
        """Reset enumerator `a`."""
        yield from tee.storage.reset_enumerator(tee.storage.enumerator(handle.a))

    @command(12, ParamKind.VALUE_INPUT)
    def start_enumerator(self, tee: Tee, handle: Value) -> Steps[None]:
        """Start enumerator `a` on storage `b`."""
        yield from tee.storage.start_enumerator(tee.storage.enumerator(handle.a), handle.b)

    @command(13, ParamKind.VALUE_INPUT, ParamKind.VALUE_OUTPUT, ParamKind.MEMREF_OUTPUT)
    def next_object(self, tee: Tee, handle: Value, info: Value, name: Memref) -> Steps[None]:
        """Next object of enumerator `a`: its type and bytes of data, and its id."""
        found, object_id = yield from tee.storage.next_object(tee.storage.enumerator(handle.a))
        info.a, info.b = found.object_type, found.data_size
        name.put(object_id)

    @command(14, ParamKind.MEMREF_INPUT, ParamKind.VALUE_INPUT)
    def create_overwrite(self, tee: Tee, name: Memref, storage: Value) -> Steps[None]:
        """Create with OVERWRITE in storage `a`; then without, which must be ACCESS_CONFLICT (6012)."""
        object_id = name.read()
        flags = _ALL | DataFlag.OVERWRITE
        for _ in range(2):
            handle = yield from tee.storage.create(storage.a, object_id, flags)
            yield from tee.storage.close(handle)
        try:
            handle = yield from tee.storage.create(storage.a, object_id, _ALL)
        except TeeError as error:
            if error.result != Result.ACCESS_CONFLICT:
                raise
        else:
            raise TeeError(Result.GENERIC)
        handle = yield from tee.storage.open(storage.a, object_id, _ALL)
        yield from tee.storage.delete(handle)

    @command(15, ParamKind.VALUE_INPUT)
    def key_in_persistent(self, tee: Tee, storage: Value) -> Steps[None]:
        """Keep an AES key in storage `a` and find it again (6013)."""
        key = TransientKey(_AES, _KEY_BITS, (tee.random(_KEY_BITS // 8),))
        handle = yield from tee.storage.create(storage.a, b"key", _ALL, b"", key)
        yield from tee.storage.close(handle)
        handle = yield from tee.storage.open(storage.a, b"key", _ALL)
        same = tuple(handle.attributes) == key.attributes and handle.info.object_size == _KEY_BITS
        yield from tee.storage.delete(handle)
        if not same:
            raise TeeError(Result.GENERIC)

    @command(16, ParamKind.VALUE_INPUT)
    def loop(self, tee: Tee, storage: Value) -> Steps[None]:
        """Create and delete an object in storage `a` again and again (6014)."""
        for _ in range(_ROUNDS):
            handle = yield from tee.storage.create(storage.a, b"loop", _ALL | DataFlag.OVERWRITE)
            yield from tee.storage.delete(handle)

    @command(17, ParamKind.VALUE_INPUT)
    def restrict_usage(self, tee: Tee, handle: Value) -> Steps[None]:
        """Restrict the usage of handle `a` to `b` (6021)."""
        yield from tee.storage.restrict_usage(tee.storage.handle(handle.a), handle.b)

    @command(21, ParamKind.VALUE_INPUT, ParamKind.VALUE_OUTPUT, ParamKind.VALUE_OUTPUT, ParamKind.VALUE_OUTPUT)
    def get_info(self, tee: Tee, handle: Value, kind: Value, sizes: Value, state: Value) -> None:
        """Type and usage, bits of the key and bytes of data, position and flags of handle `a` (6017)."""
        info = tee.storage.handle(handle.a).info
        kind.a, kind.b = info.object_type, info.object_usage
        sizes.a, sizes.b = info.object_size, info.data_size
        state.a, state.b = info.data_position, info.handle_flags

    @command(22, ParamKind.MEMREF_INPUT)
    def open_id_in_shared_memory(self, tee: Tee, name: Memref) -> Steps[None]:
        """Open with an id that the client could change meanwhile: a panic (6020)."""
        yield from tee.storage.open(StorageId.PRIVATE, name, DataFlag.ACCESS_READ)

    @command(23, ParamKind.MEMREF_INPUT)
    def create_id_in_shared_memory(self, tee: Tee, name: Memref) -> Steps[None]:
        """Create with an id that the client could change meanwhile: a panic (6020)."""
        yield from tee.storage.create(StorageId.PRIVATE, name, _ALL)

    @command(24, ParamKind.MEMREF_INPUT, ParamKind.VALUE_INOUT, ParamKind.VALUE_INPUT, ParamKind.MEMREF_INPUT)
    def create_key(self, tee: Tee, name: Memref, flags: Value, kind: Value, secret: Memref) -> Steps[None]:
        """Create a key object of type `a` and `b` bits with flags `a`: its handle is `b`."""
        key = TransientKey(kind.a, kind.b, (secret.read(),))
        flags.b = (yield from tee.storage.create(StorageId.PRIVATE, name.read(), flags.a, b"", key)).number

    @command(25, ParamKind.VALUE_INPUT, ParamKind.MEMREF_OUTPUT)
    def get_attribute(self, tee: Tee, handle: Value, secret: Memref) -> None:
        """Attribute `b` of the key of handle `a`."""
        attributes = tee.storage.handle(handle.a).attributes
        if handle.b >= len(attributes):
            raise TeeError(Result.ITEM_NOT_FOUND)
        secret.put(attributes[handle.b])

    @command(26, ParamKind.VALUE_INPUT, ParamKind.VALUE_INPUT)
    def read_in_pieces(self, tee: Tee, handle: Value, sizes: Value) -> Steps[None]:
        """Read `a` bytes of handle `a` in pieces of `b`, all in this one call (as xtest's benchmark 1002)."""
        for size in _pieces(sizes):
            yield from tee.storage.read(tee.storage.handle(handle.a), size)

    @command(27, ParamKind.VALUE_INPUT, ParamKind.VALUE_INPUT)
    def write_in_pieces(self, tee: Tee, handle: Value, sizes: Value) -> Steps[None]:
        """Write `a` bytes to handle `a` in pieces of `b`, all in this one call (as xtest's benchmarks 1001, 1003)."""
        for number, size in enumerate(_pieces(sizes)):
            yield from tee.storage.write(tee.storage.handle(handle.a), bytes([number & 0xFF]) * size)


def _pieces(sizes: Value) -> Iterator[int]:
    """Sizes of the pieces of `b` bytes that make up `a` bytes. Raises TeeError(BAD_PARAMETERS)."""
    if not 0 < sizes.b <= _LARGEST_PIECE:
        raise TeeError(Result.BAD_PARAMETERS)
    return (min(sizes.b, sizes.a - at) for at in range(0, sizes.a, sizes.b))


class StorageTest2(StorageTest):
    """A second TA with the same commands: its objects are its own, also where ids are equal (6015)."""

    uuid = UUID("731e279e-aafb-4575-a771-38caa6f0cca6")
