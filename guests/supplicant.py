"""tee-supplicant: the process that does for OP-TEE what a kernel cannot: files, TA images and the RPMB device.

Source: optee_client's tee-supplicant, and what the recordings show of it. One object is one process: it is
started once, by `guests.driver.Driver.start_supplicant`.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeAlias
from uuid import UUID

import trio

from guests.errors import OutOfGuestMemoryError
from guests.files import DirectoryFiles, Files, MemoryFiles, OpenFile, path_parts
from guests.rpmb import RpmbDevice, answer_request
from guests.supplicant_device import MemoryParam, RpcParam, SupplicantMemory, ValueParam
from hv_models.memory import PAGE_SIZE
from optee.abi.results import Result
from optee.abi.rpc import FsOperation, RpcCommand, ShmType

MAX_OPEN_FILES: Final = 256
"""Files and directories that OP-TEE may have open at once: descriptors are the host's."""

_FIRST_HANDLE: Final = 3
_EIGHT: Final = 8
_OUTPUT: Final = 2
_FORGED_ID: Final = 1 << 30
_NO_IMAGES: Final[Mapping[UUID, bytes]] = MappingProxyType({})

_Answer: TypeAlias = tuple[tuple[type[RpcParam], ...], Callable[..., int]]


class Supplicant:
    """The usual tee-supplicant: LOAD_TA, FS, RPMB, and shared memory; it answers everything else NOT_SUPPORTED.

    images: TA images by UUID. ta_directory: where `<uuid>.ta` files are looked for besides. storage: directory for
    OP-TEE's files; without one they live in memory as long as this object (a second supplicant can be given the
    first one's `files`). rpmb: the device that this guest was given; it is number 0.
    Files are read and written in the task of the call that needs them: keep both directories on a disk that answers
    quickly.
    """

    pauses = False

    def __init__(
        self,
        images: Mapping[UUID, bytes] = _NO_IMAGES,
        *,
        ta_directory: Path | None = None,
        storage: Path | None = None,
        files: Files | None = None,
        rpmb: RpmbDevice | None = None,
    ) -> None:
        self._images = images
        self._ta_directory = ta_directory
        self._rpmb = rpmb
        self.files: Files = files or (DirectoryFiles(storage) if storage else MemoryFiles())
        self._memory: SupplicantMemory | None = None
        self._open: dict[int, OpenFile | list[str]] = {}
        self.stopped = trio.Event()

    def start(self, memory: SupplicantMemory) -> None:
        """Take the kernel's device. Raises ValueError if this process has run before."""
        if self._memory is not None or self.stopped.is_set():
            raise ValueError("a supplicant runs once")
        self._memory = memory

    def stop(self) -> None:
        """End the process: close its files, let a pause return."""
        for file in self._open.values():
            if not isinstance(file, list):
                file.close()
        self._open.clear()
        self.stopped.set()

    async def pause(self, command: int) -> None:
        """Take no time; `SlowSupplicant` does."""

    def process(self, command: int, params: Sequence[RpcParam]) -> int:
        """Answer one request."""
        kinds, answer = _COMMANDS.get(command, _UNKNOWN)
        if tuple(map(type, params[: len(kinds)])) != kinds:
            return Result.BAD_PARAMETERS
        return answer(self, *params)

    def _not_supported(self, *_: RpcParam) -> int:
        return Result.NOT_SUPPORTED

    def _allocate(self, value: ValueParam) -> int:
        if self._memory is None or value.a != ShmType.APPL:
            return Result.BAD_PARAMETERS
        try:
            value.c = self._memory.allocate(value.b)
        except OutOfGuestMemoryError:
            return Result.OUT_OF_MEMORY
        return Result.SUCCESS

    def _free(self, value: ValueParam) -> int:
        if self._memory is None or value.a != ShmType.APPL or not self._memory.free(value.b):
            return Result.BAD_PARAMETERS
        return Result.SUCCESS

    def _image(self, uuid: UUID) -> bytes | None:
        if uuid in self._images:
            return self._images[uuid]
        if self._ta_directory is None:
            return None
        try:
            return (self._ta_directory / f"{uuid}.ta").read_bytes()
        except OSError:
            return None

    def _load_ta(self, value: ValueParam, memory: MemoryParam) -> int:
        """Give the size of an image, and the image itself where there is a buffer for it."""
        octets = value.a.to_bytes(_EIGHT, "little") + value.b.to_bytes(_EIGHT, "little")
        image = self._image(UUID(bytes=octets))
        if image is None:
            return Result.ITEM_NOT_FOUND
        space, memory.size = memory.size, len(image)
        if memory.shm is None:
            return Result.SUCCESS
        if space < len(image):
            return Result.SHORT_BUFFER
        memory.write(image)
        return Result.SUCCESS

    def _file_operation(self, operation: ValueParam, *rest: RpcParam) -> int:
        kinds, answer = _OPERATIONS.get(operation.a, _UNKNOWN)
        if tuple(map(type, rest)) != kinds:
            return Result.BAD_PARAMETERS
        try:
            return answer(self, operation, *rest)
        except FileNotFoundError:
            return Result.ITEM_NOT_FOUND
        except FileExistsError:
            return Result.ACCESS_CONFLICT
        except OSError:
            return Result.GENERIC

    def _open_file(self, operation: ValueParam, name: MemoryParam, handle: ValueParam) -> int:
        parts = path_parts(name.read())
        return self._add(handle, lambda: self.files.open(parts, create=operation.a == FsOperation.CREATE))

    def _open_directory(self, _: ValueParam, name: MemoryParam, handle: ValueParam) -> int:
        parts = path_parts(name.read())
        return self._add(handle, lambda: list(self.files.list(parts)))

    def _close(self, operation: ValueParam) -> int:
        file = self._open.pop(operation.b, None)
        if file is None:
            return Result.BAD_PARAMETERS
        if not isinstance(file, list):
            file.close()
        return Result.SUCCESS

    def _read(self, operation: ValueParam, data: MemoryParam) -> int:
        content = self._file(operation.b).read(operation.c, data.size)
        data.write(content)
        data.size = len(content)
        return Result.SUCCESS

    def _write(self, operation: ValueParam, data: MemoryParam) -> int:
        self._file(operation.b).write(operation.c, data.read())
        return Result.SUCCESS

    def _truncate(self, operation: ValueParam) -> int:
        self._file(operation.b).truncate(operation.c)
        return Result.SUCCESS

    def _remove(self, _: ValueParam, name: MemoryParam) -> int:
        self.files.remove(path_parts(name.read()))
        return Result.SUCCESS

    def _rename(self, operation: ValueParam, old: MemoryParam, new: MemoryParam) -> int:
        names = path_parts(old.read()), path_parts(new.read())
        self.files.rename(*names, overwrite=bool(operation.b))
        return Result.SUCCESS

    def _read_directory(self, operation: ValueParam, name: MemoryParam) -> int:
        names = self._open.get(operation.b)
        if not isinstance(names, list):
            return Result.BAD_PARAMETERS
        if not names:
            return Result.ITEM_NOT_FOUND
        entry = names[0].encode() + b"\0"
        space, name.size = name.size, len(entry)
        if space < len(entry):
            return Result.SHORT_BUFFER
        names.pop(0)
        name.write(entry)
        return Result.SUCCESS

    def _rpmb_request(self, request: MemoryParam, response: MemoryParam) -> int:
        result, answer = answer_request(self._rpmb, request.read(), response.size)
        response.write(answer)
        return result

    def _add(self, handle: ValueParam, make: Callable[[], OpenFile | list[str]]) -> int:
        if len(self._open) >= MAX_OPEN_FILES:
            return Result.GENERIC
        file = make()
        number = _FIRST_HANDLE
        while number in self._open:
            number += 1
        self._open[number] = file
        handle.a = number
        return Result.SUCCESS

    def _file(self, handle: int) -> OpenFile:
        file = self._open.get(handle)
        if file is None or isinstance(file, list):
            raise OSError(errno.EBADF, f"no open file {handle}")
        return file


_UNKNOWN: Final[_Answer] = ((), Supplicant._not_supported)
_COMMANDS: Final[Mapping[int, _Answer]] = {
    RpcCommand.SHM_ALLOC: ((ValueParam,), Supplicant._allocate),
    RpcCommand.SHM_FREE: ((ValueParam,), Supplicant._free),
    RpcCommand.LOAD_TA: ((ValueParam, MemoryParam), Supplicant._load_ta),
    RpcCommand.FS: ((ValueParam,), Supplicant._file_operation),
    RpcCommand.RPMB: ((MemoryParam, MemoryParam), Supplicant._rpmb_request),
}
_OPERATIONS: Final[Mapping[int, _Answer]] = {
    FsOperation.OPEN: ((MemoryParam, ValueParam), Supplicant._open_file),
    FsOperation.CREATE: ((MemoryParam, ValueParam), Supplicant._open_file),
    FsOperation.CLOSE: ((), Supplicant._close),
    FsOperation.READ: ((MemoryParam,), Supplicant._read),
    FsOperation.WRITE: ((MemoryParam,), Supplicant._write),
    FsOperation.TRUNCATE: ((), Supplicant._truncate),
    FsOperation.REMOVE: ((MemoryParam,), Supplicant._remove),
    FsOperation.RENAME: ((MemoryParam, MemoryParam), Supplicant._rename),
    FsOperation.OPENDIR: ((MemoryParam, ValueParam), Supplicant._open_directory),
    FsOperation.CLOSEDIR: ((), Supplicant._close),
    FsOperation.READDIR: ((MemoryParam,), Supplicant._read_directory),
}
"""What each operation has behind its first value, as `optee.abi.rpc_operands` has it, and what does it."""


class SlowSupplicant(Supplicant):
    """Takes `delay` seconds of trio's clock for each request."""

    pauses = True

    def __init__(self, delay: float, images: Mapping[UUID, bytes] = _NO_IMAGES, *, files: Files | None = None) -> None:
        super().__init__(images, files=files)
        self._delay = delay

    async def pause(self, command: int) -> None:
        """Sleep, unless the process ends before."""
        with trio.move_on_after(self._delay):
            await self.stopped.wait()


class Misbehaviour(Enum):
    """Ways in which a supplicant can go wrong."""

    REFUSE = auto()
    """every request is answered GENERIC"""
    SILENT = auto()
    """no request is ever answered, until the process ends"""
    NO_MEMORY = auto()
    """shared memory is refused"""
    FORGED_MEMORY = auto()
    """shared memory is promised, with an id that does not exist"""
    SMALL_MEMORY = auto()
    """shared memory is a page where more was asked"""
    LYING_SIZE = auto()
    """outputs are said to be a page longer than their buffers"""
    GARBAGE = auto()
    """outputs are filled with 0xa5"""


class MisbehavingSupplicant(Supplicant):
    """Does one thing wrong in every request that it concerns."""

    def __init__(
        self,
        misbehaviour: Misbehaviour,
        images: Mapping[UUID, bytes] = _NO_IMAGES,
        *,
        files: Files | None = None,
    ) -> None:
        super().__init__(images, files=files)
        self._misbehaviour = misbehaviour
        self.pauses = misbehaviour is Misbehaviour.SILENT

    async def pause(self, command: int) -> None:
        """Never come back: this is what SILENT does."""
        await self.stopped.wait()

    def process(self, command: int, params: Sequence[RpcParam]) -> int:
        """Answer one request wrongly."""
        kind = self._misbehaviour
        if kind is Misbehaviour.REFUSE:
            return Result.GENERIC
        allocated = params[0] if command == RpcCommand.SHM_ALLOC else None
        if isinstance(allocated, ValueParam):
            if kind is Misbehaviour.NO_MEMORY:
                return Result.OUT_OF_MEMORY
            if kind is Misbehaviour.FORGED_MEMORY:
                allocated.c = _FORGED_ID
                return Result.SUCCESS
            if kind is Misbehaviour.SMALL_MEMORY:
                allocated.b = min(allocated.b, PAGE_SIZE)
        result = super().process(command, params)
        for param in params:
            if isinstance(param, MemoryParam) and param.direction & _OUTPUT:
                if kind is Misbehaviour.GARBAGE:
                    param.write(b"\xa5" * param.size)
                elif kind is Misbehaviour.LYING_SIZE:
                    param.size += PAGE_SIZE
        return result
