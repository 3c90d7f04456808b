"""A guest in one page of code, to drive `SecureWorld.call`: addresses are PAs, RPCs are served on the spot."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from hv_models.memory import PAGE_SIZE, Bank, Frames, PageStore, PhysicalMemory
from optee.abi.message import ENTRIES_PER_PAGE, NONCONTIG, Command, Message, Param, ParamType, page_count
from optee.abi.results import Origin, Result
from optee.abi.rpc import FsOperation, NotificationOperation, RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, from_pair, is_rpc, to_pair
from optee.config import Config
from optee.secure_world import Answer, SecureWorld
from optee.ta_image import build_image
from optee.tas.catalogue import BUILT_IN
from optee.tas.hello_world import HelloWorld

RAM = 0x8000_0000
RAM_PAGES = 4096
SECURE = 0x0E10_0000
DEVICE = 0x0900_0000
META = 0x100 | ParamType.VALUE_INPUT
REGISTER = NONCONTIG | ParamType.TMEM_OUTPUT
NONE = Param(ParamType.NONE)


def uuid_words(uuid: UUID) -> tuple[int, int]:
    first, second = struct.unpack("<QQ", uuid.bytes)
    return first, second


def value(a: int = 0, b: int = 0, kind: ParamType = ParamType.VALUE_INOUT) -> Param:
    return Param(kind, a, b)


@dataclass
class Rpc:
    """An RPC command as the guest sees it, and where its argument lies."""

    at: int
    command: int
    params: list[Param]


@dataclass
class Supplicant:
    """Serves every RPC: files in a dictionary, TA images, shared memory, sleep and notifications."""

    rig: "Rig"
    files: dict[str, bytearray] = field(default_factory=dict)
    images: dict[UUID, bytes] = field(default_factory=lambda: {ta.uuid: build_image(ta) for ta in BUILT_IN})
    open_files: dict[int, bytearray] = field(default_factory=dict)
    seen: list[Rpc] = field(default_factory=list)
    buffers: dict[int, int] = field(default_factory=dict)

    def serve(self, rpc: Rpc) -> None:
        self.seen.append(rpc)
        ret = Result.SUCCESS
        match rpc.command:
            case RpcCommand.SHM_ALLOC:
                size = rpc.params[0].b
                cookie = self.rig.new_cookie()
                buffer, listed = self.rig.buffer(size)
                self.buffers[cookie] = buffer
                rpc.params[0] = Param(REGISTER, listed, size, cookie)
            case RpcCommand.SHM_FREE:
                del self.buffers[rpc.params[0].b]
            case RpcCommand.LOAD_TA:
                image = self.images.get(UUID(bytes=struct.pack("<QQ", *rpc.params[0][1:3])))
                if image is None:
                    ret = Result.ITEM_NOT_FOUND
                else:
                    if rpc.params[1].attr == ParamType.RMEM_OUTPUT:
                        self.rig.memory.write(self.buffers[rpc.params[1].c], image)
                    rpc.params[1] = rpc.params[1]._replace(b=len(image))
            case RpcCommand.FS:
                ret = self._file(rpc)
            case RpcCommand.GET_TIME:
                rpc.params[0] = rpc.params[0]._replace(a=1700000000, b=5)
        self.rig.answer(rpc, ret)

    def _file(self, rpc: Rpc) -> Result:
        _, operation, fd, offset = rpc.params[0]
        if operation in (FsOperation.OPEN, FsOperation.CREATE, FsOperation.REMOVE):
            name = self.rig.memory.read(self.buffers[rpc.params[1].c], 350).split(b"\0")[0].decode()
            if operation == FsOperation.REMOVE:
                return Result.SUCCESS if self.files.pop(name, None) else Result.ITEM_NOT_FOUND
            if operation == FsOperation.CREATE:
                self.files[name] = bytearray()
            if name not in self.files:
                return Result.ITEM_NOT_FOUND
            number = min(set(range(6, 100)) - set(self.open_files))
            self.open_files[number] = self.files[name]
            rpc.params[2] = rpc.params[2]._replace(a=number)
        elif operation == FsOperation.CLOSE:
            del self.open_files[fd]
        elif operation == FsOperation.READ:
            data = bytes(self.open_files[fd][offset : offset + rpc.params[1].b])
            self.rig.memory.write(self.buffers[rpc.params[1].c], data)
            rpc.params[1] = rpc.params[1]._replace(b=len(data))
        elif operation == FsOperation.WRITE:
            content = self.open_files[fd]
            data = self.rig.memory.read(self.buffers[rpc.params[1].c], rpc.params[1].b)
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        return Result.SUCCESS


class Rig:
    """One machine with one bank of RAM, its OP-TEE, and VMs 1..n."""

    def __init__(self, config: Config | None = None, vms: int = 1) -> None:
        self.memory = PhysicalMemory()
        self.store = PageStore("ram", RAM_PAGES)
        self.memory.add(Bank("ram", self.store, Frames(RAM, RAM_PAGES)))
        self.world = SecureWorld(self.memory, config or Config(threads=2, guests=2))
        for vm in range(1, vms + 1):
            assert self.call(Function.VM_CREATED, vm, vm=0)[0] == 0
        self._next_page = RAM
        self._cookie = 0x1000
        self.supplicant = Supplicant(self)
        self.rpc_pages: dict[int, int] = {}
        """Cookie of each RPC argument that was given out, and its page."""

    def call(
        self, function: int, a1: int = 0, a2: int = 0, a3: int = 0, a4: int = 0, a5: int = 0, vm: int = 1
    ) -> Answer:
        return self.world.call((function, a1, a2, a3, a4, a5, 0, vm))

    def page(self, count: int = 1) -> int:
        """PA of fresh zeroed pages, one behind the other."""
        pa = self._next_page
        self._next_page += count * PAGE_SIZE
        assert self._next_page <= RAM + RAM_PAGES * PAGE_SIZE
        return pa

    def new_cookie(self) -> int:
        self._cookie += 1
        return self._cookie

    def buffer(self, size: int, offset: int = 0) -> tuple[int, int]:
        """PA of a buffer and the buf_ptr of a page list for it."""
        count = page_count(size, offset)
        data = self.page(count)
        return data + offset, self.page_list([data + i * PAGE_SIZE for i in range(count)]) | offset

    def page_list(self, pages: list[int]) -> int:
        first = here = self.page()
        while True:
            self.memory.write(here, struct.pack(f"<{len(pages[:ENTRIES_PER_PAGE])}Q", *pages[:ENTRIES_PER_PAGE]))
            pages = pages[ENTRIES_PER_PAGE:]
            if not pages:
                return first
            following = self.page()
            self.memory.write(here + 8 * ENTRIES_PER_PAGE, struct.pack("<Q", following))
            here = following

    def write(self, message: Message, pa: int | None = None) -> int:
        """Put a message into memory, a page of its own if no place is given."""
        pa = self.page() if pa is None else pa
        self.memory.write(pa, message.pack())
        return pa

    def read(self, pa: int) -> Message:
        return Message.unpack(self.memory.read(pa, PAGE_SIZE - pa % PAGE_SIZE))

    def read_at(self, pa: int, size: int) -> Message:
        """A message of `size` bytes that may cross a page."""
        return Message.unpack(self.memory.read(pa, size))

    def issue(self, message: Message, *, vm: int = 1, function: int = Function.CALL_WITH_RPC_ARG) -> tuple[Answer, int]:
        """Issue a yielding call: the answer and the PA of its message."""
        pa = self.write(message)
        return self.call(function, *to_pair(pa), vm=vm), pa

    def run(
        self,
        message: Message,
        *,
        vm: int = 1,
        function: int = Function.CALL_WITH_RPC_ARG,
        serve: Callable[[Rpc], None] | None = None,
    ) -> Message:
        """Run a message to its end, RPCs served: the message afterwards."""
        answer, pa = self.issue(message, vm=vm, function=function)
        answer = self.finish(answer, pa, vm=vm, serve=serve)
        assert answer == (ReturnCode.OK, 0, 0, 0), answer
        return self.read(pa)

    def finish(self, answer: Answer, pa: int, *, vm: int = 1, serve: Callable[[Rpc], None] | None = None) -> Answer:
        """Serve RPCs until a call ends."""
        while is_rpc(answer[0]):
            answer = self.step(answer, pa, vm=vm, serve=serve)
        return answer

    def step(self, answer: Answer, pa: int, *, vm: int = 1, serve: Callable[[Rpc], None] | None = None) -> Answer:
        """Serve one RPC return and resume."""
        thread = answer[3]
        if answer[0] == RpcReturn.ALLOC:
            cookie = self.new_cookie()
            self.rpc_pages[cookie] = self.page()
            return self.resume(thread, *to_pair(self.rpc_pages[cookie]), *to_pair(cookie), vm=vm)
        if answer[0] == RpcReturn.FREE:
            del self.rpc_pages[from_pair(answer[1], answer[2])]
        elif answer[0] == RpcReturn.CMD:
            (serve or self.supplicant.serve)(self.rpc(answer, pa))
        return self.resume(thread, vm=vm)

    def resume(self, thread: int, a1: int = 0, a2: int = 0, a4: int = 0, a5: int = 0, *, vm: int = 1) -> Answer:
        return self.call(Function.RETURN_FROM_RPC, a1, a2, thread, a4, a5, vm=vm)

    def rpc(self, answer: Answer, pa: int) -> Rpc:
        """Read the RPC argument that an RPC CMD return names."""
        assert answer[0] == RpcReturn.CMD, answer
        cookie = from_pair(answer[1], answer[2])
        at = self.rpc_pages[cookie] if cookie else pa + 32 + 32 * len(self.read(pa).params)
        argument = self.read(at)
        assert argument.ret == Result.GENERIC
        return Rpc(at, argument.cmd, list(argument.params))

    def answer(self, rpc: Rpc, ret: int = 0) -> None:
        """Write the reply to an RPC into its argument."""
        reply = Message(rpc.command, ret=ret, ret_origin=Origin.COMMS, params=rpc.params)
        self.memory.write(rpc.at, reply.pack())

    def open(
        self,
        uuid: UUID = HelloWorld.uuid,
        *params: Param,
        vm: int = 1,
        function: int = Function.CALL_WITH_RPC_ARG,
    ) -> int:
        """Open a session that must succeed: its id."""
        opened = self.run(open_message(uuid, *params), vm=vm, function=function)
        assert (opened.ret, opened.ret_origin) == (0, Origin.TRUSTED_APP), hex(opened.ret)
        return opened.session

    def invoke(self, session: int, command: int, *params: Param, vm: int = 1) -> Message:
        return self.run(invoke_message(session, command, *params), vm=vm)

    def close(self, session: int, vm: int = 1) -> Message:
        return self.run(Message(Command.CLOSE_SESSION, session=session), vm=vm)

    def register(self, buf_ptr: int, size: int, cookie: int, vm: int = 1) -> Message:
        return self.run(register_message(buf_ptr, size, cookie), vm=vm)

    def unregister(self, cookie: int, vm: int = 1) -> Message:
        return self.run(unregister_message(cookie), vm=vm)


def open_message(uuid: UUID, *params: Param) -> Message:
    meta = [Param(META, *uuid_words(uuid), 0), Param(META, 0, 0, 0)]
    return Message(Command.OPEN_SESSION, params=[*meta, *params])


def invoke_message(session: int, command: int, *params: Param) -> Message:
    padded = [*params, *[NONE] * (4 - len(params))]
    return Message(Command.INVOKE_COMMAND, command, session, params=padded)


def register_message(buf_ptr: int, size: int, cookie: int) -> Message:
    return Message(Command.REGISTER_SHM, params=[Param(REGISTER, buf_ptr, size, cookie)])


def unregister_message(cookie: int) -> Message:
    return Message(Command.UNREGISTER_SHM, params=[Param(ParamType.RMEM_INPUT, 0, 0, cookie)])


def is_notification(rpc: Rpc, operation: NotificationOperation) -> bool:
    return rpc.command == RpcCommand.NOTIFICATION and rpc.params[0].a == operation
