"""A guest with secure storage: every change of its disk is noted, and the power can be cut at any of them.

So it is with its RPMB device, which lies on the same disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from guests.rpmb import RpmbDevice, answer_request
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Result, StorageId
from optee.abi.rpc import FsOperation, RpcCommand
from optee.abi.smc import Function, ReturnCode
from optee.config import Config
from optee.storage.memory.manager import MemoryManager
from optee.storage.options import StorageMemory, StorageOptions
from optee.storage.registry import DataFlag
from optee.tas.secure_storage_test import StorageTest
from tests.optee.rig import REGISTER, Rig, Rpc, invoke_message, open_message, value

ALL = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE | DataFlag.ACCESS_WRITE_META
READ_WRITE = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE
SHARED_READ = DataFlag.ACCESS_READ | DataFlag.SHARE_READ
PRIVATE = int(StorageId.PRIVATE)
RPMB = int(StorageId.PRIVATE_RPMB)
RPMB_ASKED = 1000
MANAGED = StorageOptions(memory=StorageMemory.MANAGED, leak_detection=1)
CHANGES = (FsOperation.CREATE, FsOperation.WRITE, FsOperation.TRUNCATE, FsOperation.REMOVE)


@dataclass
class Disk:
    """The files of the guest, and what was done to them."""

    files: dict[str, bytearray] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    """File operations, in order; RPMB requests are RPMB_ASKED."""
    cut_after: int | None = None
    """File operations and RPMB requests until the power is cut."""
    rpmb: RpmbDevice | None = None
    fail_at: int | None = None
    """Operations before one that fails."""
    open_files: dict[int, tuple[str, bytearray]] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> "Disk":
        return cls({path.name: bytearray(path.read_bytes()) for path in directory.iterdir()})

    def snapshot(self) -> dict[str, bytes]:
        return {name: bytes(content) for name, content in self.files.items()}

    def serve(self, rig: "StorageRig", rpc: Rpc) -> Result:
        if self.cut_after is not None:
            if not self.cut_after:
                return Result.GENERIC
            self.cut_after -= 1
        if rpc.command == RpcCommand.RPMB:
            self.asked.append(RPMB_ASKED)
            return self.serve_rpmb(rig, rpc)
        operation = FsOperation(rpc.params[0].a)
        self.asked.append(operation)
        if self.fail_at is not None and len(self.asked) > self.fail_at:
            self.fail_at = None
            return Result.GENERIC
        return self._serve(rig, rpc, operation)

    def serve_rpmb(self, rig: "StorageRig", rpc: Rpc) -> Result:
        asked, wanted = rpc.params
        request = rig.memory.read(rig.supplicant.buffers[asked.c] + asked.a, asked.b)
        result, response = answer_request(self.rpmb, request, wanted.b)
        rig.memory.write(rig.supplicant.buffers[wanted.c] + wanted.a, response)
        return Result(result)

    def _serve(self, rig: "StorageRig", rpc: Rpc, operation: FsOperation) -> Result:
        _, _, fd, offset = rpc.params[0]
        match operation:
            case FsOperation.OPEN | FsOperation.CREATE | FsOperation.REMOVE:
                name = rig.payload(rpc.params[1], 350).split(b"\0")[0].decode().removeprefix("/")
                if operation == FsOperation.CREATE:
                    self.files[name] = bytearray()
                elif name not in self.files:
                    if operation == FsOperation.REMOVE:
                        self.changes.append(f"REMOVE .//{name}")
                    return Result.ITEM_NOT_FOUND
                if operation != FsOperation.OPEN:
                    self.changes.append(f"{operation.name} .//{name}")
                if operation == FsOperation.REMOVE:
                    del self.files[name]
                    return Result.SUCCESS
                number = min(set(range(6, 100)) - set(self.open_files))
                self.open_files[number] = name, self.files[name]
                rpc.params[2] = rpc.params[2]._replace(a=number)
            case FsOperation.CLOSE:
                del self.open_files[fd]
            case FsOperation.READ:
                data = bytes(self.open_files[fd][1][offset : offset + rpc.params[1].b])
                rig.memory.write(rig.supplicant.buffers[rpc.params[1].c], data)
                rpc.params[1] = rpc.params[1]._replace(b=len(data))
            case FsOperation.WRITE:
                name, content = self.open_files[fd]
                data = rig.payload(rpc.params[1], rpc.params[1].b)
                self.changes.append(f"WRITE .//{name} off={offset} len={len(data)}")
                content.extend(bytes(max(0, offset + len(data) - len(content))))
                content[offset : offset + len(data)] = data
            case FsOperation.TRUNCATE:
                name, content = self.open_files[fd]
                self.changes.append(f"TRUNCATE .//{name} len={offset}")
                content.extend(bytes(max(0, offset - len(content))))
                del content[offset:]
        return Result.SUCCESS


class StorageRig(Rig):
    """One guest whose files are on a disk that outlives it."""

    def __init__(self, disk: Disk | None = None, **config: object) -> None:
        super().__init__(Config(threads=4, guests=2, **config))
        self.vm = 1
        """The guest that acts."""
        self.disks: dict[int, Disk] = {}
        self._plug_in(disk)
        self.served: list[Rpc] = []
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._lists: dict[int, tuple[int, int]] = {}
        self._page = self.page()
        self._scratch = {name: self.buffer(1 << 20) for name in ("id", "data")}

    @property
    def disk(self) -> Disk:
        """Of the guest that acts."""
        return self.disks[self.vm]

    def _plug_in(self, disk: Disk | None) -> None:
        self.disks[self.vm] = disk or Disk()
        self.disk.open_files.clear()

    def add_guest(self) -> None:
        """Let one more guest come, with an empty disk: it acts now."""
        self.vm = len(self.disks) + 1
        assert self.call(Function.VM_CREATED, self.vm, vm=0)[0] == 0
        self._plug_in(None)

    @property
    def storage_memory(self) -> MemoryManager:
        """The memory manager of the guest that acts."""
        partition = self.world._by_id[self.vm]
        assert partition.storage.memory is not None
        return partition.storage.memory

    def payload(self, param: Param, size: int) -> bytes:
        return self.memory.read(self.supplicant.buffers[param.c], size)

    def serve(self, rpc: Rpc) -> None:
        """Files from the disk; buffers of RPCs are used again, so that a test may make as many as it likes."""
        self.served.append(Rpc(rpc.at, rpc.command, list(rpc.params)))
        if rpc.command in (RpcCommand.FS, RpcCommand.RPMB):
            self.answer(rpc, self.disk.serve(self, rpc))
        elif rpc.command == RpcCommand.SHM_ALLOC:
            size = rpc.params[0].b
            free = self._free.setdefault(size, [])
            cookie = self.new_cookie()
            data, listed = free.pop() if free else self.buffer(size)
            self.supplicant.buffers[cookie] = data
            self._lists[cookie] = size, listed
            rpc.params[0] = Param(REGISTER, listed, size, cookie)
            self.answer(rpc)
        elif rpc.command == RpcCommand.SHM_FREE:
            size, listed = self._lists.pop(rpc.params[0].b)
            self._free[size].append((self.supplicant.buffers.pop(rpc.params[0].b), listed))
            self.answer(rpc)
        elif rpc.command == RpcCommand.RPMB_PROBE_RESET:
            self.answer(rpc, Result.NOT_SUPPORTED)
        else:
            self.supplicant.serve(rpc)

    def send(self, message: Message) -> Message:
        """Run a message on one page that is used again."""
        self.memory.write(self._page, message.pack())
        answer = self.call(0x32000004, self._page >> 32, self._page & 0xFFFFFFFF, vm=self.vm)
        answer = self.finish(answer, self._page, vm=self.vm, serve=self.serve)
        assert answer == (ReturnCode.OK, 0, 0, 0), answer
        return self.read(self._page)

    def session(self, ta: UUID = StorageTest.uuid, storage: int = PRIVATE) -> "Client":
        opened = self.send(open_message(ta))
        assert opened.ret == 0, hex(opened.ret)
        return Client(self, opened.session, storage)

    def memref(self, name: str, data: bytes | int, kind: ParamType) -> Param:
        """A temporary buffer, filled, or of so many bytes."""
        at, listed = self._scratch[name]
        if isinstance(data, bytes):
            self.memory.write(at, data)
        size = data if isinstance(data, int) else len(data)
        return Param(0x200 | kind, listed, size, 0) if size else Param(kind, 0, 0, 0)

    def output(self, size: int) -> bytes:
        return self.memory.read(self._scratch["data"][0], size)


class StorageError(Exception):
    def __init__(self, result: int) -> None:
        super().__init__(Result(result).name)
        self.result = Result(result)


INPUT, OUTPUT = ParamType.TMEM_INPUT, ParamType.TMEM_OUTPUT
VALUE = ParamType.VALUE_INPUT


class Client:
    """Commands of the storage test TA in one session, on one storage unless told otherwise.

    A result that is no success raises StorageError.
    """

    def __init__(self, rig: StorageRig, number: int, storage: int = PRIVATE) -> None:
        self.rig = rig
        self.number = number
        self.storage = storage
        self.vm = rig.vm

    def invoke(self, command: int, *params: Param) -> Sequence[Param]:
        self.rig.vm = self.vm
        done = self.rig.send(invoke_message(self.number, command, *params))
        if done.ret:
            raise StorageError(done.ret)
        return done.params

    def name(self, object_id: bytes) -> Param:
        return self.rig.memref("id", object_id, INPUT)

    def open(self, object_id: bytes, flags: int = ALL, storage: int | None = None) -> int:
        place = value(self.storage if storage is None else storage, kind=VALUE)
        return self.invoke(0, self.name(object_id), value(flags), place)[1].b

    def create(self, object_id: bytes, data: bytes = b"", flags: int = ALL, storage: int | None = None) -> int:
        place = value(0, self.storage if storage is None else storage, VALUE)
        content = self.rig.memref("data", data, INPUT)
        return self.invoke(4, self.name(object_id), value(flags), place, content)[1].b

    def close(self, handle: int) -> None:
        self.invoke(1, value(handle, kind=VALUE))

    def read(self, handle: int, size: int) -> bytes:
        params = self.invoke(2, self.rig.memref("data", size, OUTPUT), value(handle))
        assert params[0].b == params[1].b
        return self.rig.output(params[1].b)

    def write(self, handle: int, data: bytes) -> None:
        self.invoke(3, self.rig.memref("data", data, INPUT), value(handle, kind=VALUE))

    def seek(self, handle: int, offset: int, whence: int = 0) -> None:
        self.invoke(5, value(handle, offset & 0xFFFFFFFF, VALUE), value(whence, kind=VALUE))

    def unlink(self, handle: int) -> None:
        self.invoke(6, value(handle, kind=VALUE))

    def rename(self, handle: int, object_id: bytes) -> None:
        self.invoke(7, value(handle, kind=VALUE), self.name(object_id))

    def truncate(self, handle: int, size: int) -> None:
        self.invoke(8, value(handle, size, VALUE))

    def info(self, handle: int) -> tuple[int, ...]:
        """Type, usage, bits, bytes of data, position, flags."""
        outputs = [value(kind=ParamType.VALUE_OUTPUT)] * 3
        _, *found = self.invoke(21, value(handle, kind=VALUE), *outputs)
        return tuple(word for param in found for word in (param.a, param.b))

    def close_session(self) -> None:
        self.rig.vm = self.vm
        assert self.rig.send(Message(Command.CLOSE_SESSION, session=self.number)).ret == 0

    def enumerate(self, storage: int | None = None) -> list[tuple[bytes, int]]:
        """Ids and sizes of all objects."""
        storage = self.storage if storage is None else storage
        (handle, *_) = self.invoke(9, value(kind=ParamType.VALUE_OUTPUT))
        found = []
        try:
            self.invoke(12, value(handle.a, storage, VALUE))
            while True:
                output = self.rig.memref("data", 64, OUTPUT)
                _, info, name, _ = self.invoke(
                    13, value(handle.a, kind=VALUE), value(kind=ParamType.VALUE_OUTPUT), output
                )
                found.append((self.rig.output(name.b), info.b))
        except StorageError as error:
            if error.result != Result.ITEM_NOT_FOUND:
                raise
        self.invoke(10, value(handle.a, kind=VALUE))
        return found

    def content(self, object_id: bytes) -> bytes:
        handle = self.open(object_id, SHARED_READ)
        data = self.read(handle, 1 << 20)
        self.close(handle)
        return data
