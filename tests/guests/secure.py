"""A secure world in a page of code, for tests of the guest alone: it reads the guest's RAM by IPA.

A TA is a generator function over the message: it yields what it asks of the normal world (`Ask`, `INTERRUPT`) and
returns (ret, origin). Everything that the driver did is in `log`.
"""

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

import trio

from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from optee.abi.message import Command, Message, Param, ParamType, list_pages, message_size, page_count
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import (
    API_UID,
    Function,
    Registers,
    ReturnCode,
    RpcReturn,
    SecCapability,
    from_pair,
    to_pair,
)

BASE = 0x4000_0000
RPC_ARG_CAPABILITIES = SecCapability(0xF5)
XEN_CAPABILITIES = SecCapability.DYNAMIC_SHM | SecCapability.MEMREF_NULL
CALLS = {Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG}


def make_ram(pages: int = 1024) -> GuestRam:
    return GuestRam(PageStore("guest", pages), BASE)


class Ask(NamedTuple):
    """An RPC command; the answer is the RPC argument as the guest left it."""

    command: int
    params: list[Param]


class Interrupt:
    """A foreign interrupt."""


INTERRUPT = Interrupt()
ASK_TIME = Ask(RpcCommand.GET_TIME, [Param(ParamType.VALUE_OUTPUT)])
ASK_SLEEP = Ask(RpcCommand.SUSPEND, [Param(ParamType.VALUE_INPUT, 100)])
Steps = Generator[Ask | Interrupt, Message, tuple[int, int]]
Ta = Callable[["SecureSide", Message], Steps]


@dataclass
class Thread:
    steps: Steps
    waiting: object = None
    pending: "Ask | None" = None
    argument: int = 0
    cookie: int = 0


@dataclass
class Shared:
    pages: list[int]
    offset: int
    size: int


def echo(side: "SecureSide", message: Message) -> Steps:
    """Increments the first value, as hello_world does; opens and closes."""
    if message.cmd == Command.INVOKE_COMMAND and message.params[0].attr == ParamType.VALUE_INOUT:
        message.params[0] = message.params[0]._replace(a=message.params[0].a + 1)
    return Result.SUCCESS, Origin.TRUSTED_APP
    yield INTERRUPT


@dataclass
class SecureSide:
    """The conduit: answers every SMC of one guest."""

    ram: GuestRam
    capabilities: SecCapability = RPC_ARG_CAPABILITIES
    threads: int = 2
    default: Ta = echo
    tas: dict[UUID, Ta] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    regs: list[Registers] = field(default_factory=list)
    shared: dict[int, Shared] = field(default_factory=dict)
    max_pages: int = 1 << 20
    fails_with: int = 0
    in_smc: int = 0
    peak: int = 0

    def __post_init__(self) -> None:
        self.slots: list[Thread | None] = [None] * self.threads
        self.sessions: dict[int, Ta] = {}
        self.cache: list[tuple[int, int]] = []
        self.caching = False
        self.values: list[int] = []
        self.interrupt = trio.Event()

    async def wait_for_interrupt(self) -> int:
        await self.interrupt.wait()
        self.interrupt = trio.Event()
        return 27

    def notify(self, *values: int) -> None:
        self.values += values
        self.interrupt.set()

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        assert len(regs) == 8
        self.in_smc += 1
        self.peak = max(self.peak, self.in_smc)
        await trio.lowlevel.cancel_shielded_checkpoint()
        self.in_smc -= 1
        self.regs.append(regs)
        answer = self._dispatch(tuple(int(word) for word in regs))
        return (*answer, *(0,) * (4 - len(answer)), *regs[4:])

    def _dispatch(self, regs: Registers) -> Registers:
        match regs[0]:
            case Function.RETURN_FROM_RPC:
                return self._resume(regs)
            case function if function in CALLS:
                return self._begin(regs)
            case function:
                self.log.append(Function(function).name)
                return self._fast(function)

    def _fast(self, function: int) -> Registers:
        match function:
            case Function.CALLS_UID:
                return API_UID
            case Function.CALLS_REVISION:
                return 2, 0
            case Function.GET_OS_REVISION:
                return 4, 10
            case Function.EXCHANGE_CAPABILITIES:
                return 0, self.capabilities, 66, 4
            case Function.ENABLE_ASYNC_NOTIF:
                return (0,)
            case Function.GET_ASYNC_NOTIF_VALUE:
                if not self.values:
                    return 0, 0, 0
                return 0, self.values.pop(0), 1 | (2 if self.values else 0)
            case Function.DISABLE_SHM_CACHE | Function.ENABLE_SHM_CACHE if any(self.slots):
                return (ReturnCode.EBUSY,)
            case Function.ENABLE_SHM_CACHE:
                self.caching = True
                return (0,)
            case Function.DISABLE_SHM_CACHE:
                self.caching = False
                return (0, *to_pair(self.cache.pop()[1])) if self.cache else (ReturnCode.ENOTAVAIL,)
            case Function.GET_SHM_CONFIG:
                return (ReturnCode.ENOTAVAIL,)
        return (0xFFFF_FFFF_FFFF_FFFF,)

    def _begin(self, regs: Registers) -> Registers:
        at = from_pair(regs[1], regs[2])
        if regs[0] == Function.CALL_WITH_REGD_ARG:
            at = self.shared[at].pages[0] + regs[3]
        message = Message.unpack(self.ram.read(at, PAGE_SIZE - at % PAGE_SIZE))
        attributes = " ".join(f"{param.attr:x}" for param in message.params)
        self.log.append(f"{Function(regs[0]).name} {Command(message.cmd).name} [{attributes}]")
        if self.fails_with:
            return (self.fails_with,)
        if None not in self.slots:
            self.log[-1] += " ETHREAD_LIMIT"
            return (ReturnCode.ETHREAD_LIMIT,)
        number = self.slots.index(None)
        thread = self.slots[number] = Thread(self._work(message, at))
        if regs[0] != Function.CALL_WITH_ARG:
            thread.argument = at + message_size(len(message.params))
        return self._step(number, None)

    def _resume(self, regs: Registers) -> Registers:
        number = regs[3]
        if number >= len(self.slots):
            return (ReturnCode.ERESUME,)
        thread = self.slots[number]
        if thread is None:
            return (ReturnCode.ERESUME,)
        if isinstance(thread.waiting, Ask):
            return self._step(number, Message.unpack(self.ram.read(thread.argument, message_size(4))))
        if thread.waiting == "ALLOC":
            thread.argument, thread.cookie = from_pair(*regs[1:3]), from_pair(*regs[4:6])
            return self._send(number, thread, thread.pending)
        return self._step(number, None)

    def _step(self, number: int, reply: Message | None) -> Registers:
        thread = self.slots[number]
        assert thread is not None
        try:
            asked = thread.steps.send(reply)
        except StopIteration as end:
            self.slots[number] = None
            if thread.cookie:
                self.cache.append((thread.argument, thread.cookie))
            return (end.value,)
        if isinstance(asked, Interrupt):
            thread.waiting = asked
            return RpcReturn.FOREIGN_INTR, 0, 0, number
        return self._send(number, thread, asked)

    def _send(self, number: int, thread: Thread, asked: Ask) -> Registers:
        if not thread.argument and self.cache:
            thread.argument, thread.cookie = self.cache.pop()
        if not thread.argument:
            thread.waiting, thread.pending = "ALLOC", asked
            self.log.append("ALLOC")
            return RpcReturn.ALLOC, message_size(4), 0, number
        thread.waiting = asked
        self.log.append(f"RPC {asked.command}")
        self.ram.write(thread.argument, bytes(message_size(4)))
        message = Message(asked.command, ret=Result.GENERIC, params=asked.params)
        self.ram.write(thread.argument, message.pack())
        return RpcReturn.CMD, *to_pair(thread.cookie), number

    def _work(self, message: Message, at: int):
        ret, origin = message.ret, message.ret_origin
        match message.cmd:
            case Command.REGISTER_SHM:
                ret = self._register(message.params[0])
            case Command.UNREGISTER_SHM:
                known = self.shared.pop(message.params[0].c, None)
                ret = Result.SUCCESS if known else Result.BAD_PARAMETERS
            case Command.OPEN_SESSION:
                octets = b"".join(word.to_bytes(8, "little") for word in message.params[0][1:3])
                ta = self.tas.get(UUID(bytes=octets), self.default)
                message.session = max(self.sessions, default=0) + 1
                self.sessions[message.session] = ta
                ret, origin = yield from ta(self, message)
                if ret:
                    del self.sessions[message.session]
            case Command.INVOKE_COMMAND if message.session in self.sessions:
                ret, origin = yield from self.sessions[message.session](self, message)
            case Command.CLOSE_SESSION:
                known = self.sessions.pop(message.session, None)
                ret, origin = (Result.SUCCESS if known else Result.ITEM_NOT_FOUND), Origin.TEE
            case Command.CANCEL:
                ret, origin = yield from self.sessions[message.session](self, message)
            case Command.DO_BOTTOM_HALF | Command.STOP_ASYNC_NOTIF:
                ret = Result.SUCCESS
            case _:
                return ReturnCode.EBADCMD
        message.ret, message.ret_origin = ret, origin
        self.ram.write(at, message.pack())
        return ReturnCode.OK

    def _register(self, param: Param) -> int:
        if page_count(param.b, param.a % PAGE_SIZE) > self.max_pages:
            return Result.OUT_OF_MEMORY
        self.shared[param.c] = self.read_list(param)
        return Result.SUCCESS

    def read_list(self, param: Param) -> Shared:
        """Read the page list of a NONCONTIG parameter."""
        offset = param.a % PAGE_SIZE
        count = page_count(param.b, offset)
        words: list[int] = []
        at = param.a - offset
        for _ in range(list_pages(count)):
            page = struct.unpack("<512Q", self.ram.read(at, PAGE_SIZE))
            words += page[:511]
            at = page[511]
        return Shared(words[:count], offset, param.b)

    def bytes_of(self, shared: Shared, offset: int, size: int) -> bytes:
        """What a TA sees of a shared buffer."""
        whole = b"".join(self.ram.read(page, PAGE_SIZE) for page in shared.pages)
        return whole[shared.offset + offset :][:size]

    def put(self, shared: Shared, data: bytes, offset: int = 0) -> None:
        """Write as a TA does."""
        for index, byte in enumerate(data):
            page, within = divmod(shared.offset + offset + index, PAGE_SIZE)
            self.ram.write(shared.pages[page] + within, bytes((byte,)))

    @property
    def idle(self) -> bool:
        """Nothing is under way and nothing is held."""
        return not any(self.slots) and not self.sessions and not self.shared and not self.cache
