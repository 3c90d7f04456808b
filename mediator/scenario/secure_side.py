"""The secure world of a scenario: OP-TEE's model, with answers of its own script and faults on demand."""

import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from hv_models.machine import Machine
from hv_models.memory import PAGE_SIZE, PhysicalFault, PhysicalMemory
from mediator.core.ledger import Ledger, Limits
from mediator.core.ports import SharedPage
from mediator.core.steps import Regs
from mediator.failures import Countdown, FaultyLedger
from mediator.world import LocalSecureWorld
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    NONCONTIG,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    Message,
    ParamType,
    message_size,
    page_count,
)
from optee.abi.registers import Named, name_of
from optee.abi.results import Result
from optee.abi.rpc import FsOperation, NotificationOperation, RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, from_pair, is_rpc
from optee.secure_world import SecureWorld

_LOW: Final = 0xFFFFFFFF
_TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_WITH_MESSAGE: Final = frozenset({int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG)})
COUNTED_BY_OPERATION: Final[Mapping[RpcCommand, type[Named]]] = {
    RpcCommand.FS: FsOperation,
    RpcCommand.NOTIFICATION: NotificationOperation,
}


@dataclass
class Conversation:
    """A yielding call as the secure world sees it: where its message and its RPC argument are."""

    message: int
    argument: int | None = None
    asked: int | None = None
    """Where the RPC argument of the RPC under way is."""
    request: Message | None = None
    """That argument as OP-TEE wrote it."""


@dataclass(frozen=True)
class Forwarded:
    """One SMC that reached the secure world, as it was then.

    message: of a new call; argument: the RPC argument of a resumed one. lists: by parameter of either, the page
    addresses of its page list.
    """

    regs: Regs
    message: Message | None = None
    argument: Message | None = None
    lists: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


class Script(Protocol):
    """An answer that waits for its call."""

    @property
    def takes(self) -> float:
        """Virtual seconds from the call to the answer."""
        ...

    def fits(self, regs: Regs) -> bool:
        """Whether it is meant for this call."""
        ...

    def __call__(self, regs: Regs, conversation: Conversation | None) -> Regs:
        """Write what it writes, and give x0..x3."""
        ...


class SecureWitness(Protocol):
    """Who is told what OP-TEE is called with, and what it answers."""

    def forwarded(self, client: int, seen: Forwarded, answer: Regs, request: Message | None) -> None:
        """OP-TEE answered a call for this client. request: its RPC argument, if the answer is an RPC CMD."""
        ...


@dataclass
class Inbox:
    """What one guest's calls were at OP-TEE."""

    total: int = 0
    """SMCs so far; `forwarded` keeps the last ones."""
    forwarded: deque[Forwarded] = field(default_factory=lambda: deque(maxlen=256))
    traffic: Counter[str] = field(default_factory=Counter)
    """Messages by command, RPCs by command and operation; interrupts as FOREIGN_INTR."""
    scripts: list[Script] = field(default_factory=list)
    conversations: dict[int, Conversation] = field(default_factory=dict)
    pages: dict[int, int] = field(default_factory=dict)
    asked_for_page: set[int] = field(default_factory=set)
    said: str = ""
    """What the last call was, and its answer, in words; whoever logs it takes it away."""


@dataclass(frozen=True)
class UnderWay:
    """A call that has come in and is not answered yet."""

    regs: Regs
    inbox: Inbox
    conversation: Conversation | None
    script: Script | None


class SecureSide:
    """Stands before OP-TEE's model, wherever that is: counts what passes, answers by script where there is one.

    memory: what OP-TEE reaches; model: what answers where there is no script; witness: who is told of all of it.
    """

    def __init__(
        self, memory: PhysicalMemory, model: Callable[[Regs], Regs], witness: SecureWitness | None = None
    ) -> None:
        self.inboxes: defaultdict[int, Inbox] = defaultdict(Inbox)
        self._memory = memory
        self._model = model
        self.witness = witness

    def call(self, regs: Regs) -> Regs:
        """Execute one SMC, or answer it by script."""
        return self.end(self.begin(regs))

    def begin(self, regs: Regs) -> UnderWay:
        """An SMC comes in; the script that is its answer is taken."""
        inbox = self.inboxes[regs[7] or regs[1]]
        function = regs[0] & _LOW
        conversation = self._conversation(inbox, function, regs)
        inbox.total += 1
        inbox.forwarded.append(self._seen(inbox, function, regs, conversation))
        script = next((script for script in inbox.scripts[:1] if script.fits(regs)), None)
        if script is not None:
            inbox.scripts.remove(script)
        return UnderWay(regs, inbox, conversation, script)

    def end(self, call: UnderWay) -> Regs:
        """Answer it, by its script or by the model."""
        regs, inbox, conversation = call.regs, call.inbox, call.conversation
        answer = self._model(regs) if call.script is None else call.script(regs, conversation)
        inbox.said = self._words(inbox, regs[0] & _LOW, conversation, answer)
        if regs[0] & _LOW == Function.VM_DESTROYED and answer[0] & _LOW == ReturnCode.OK:
            inbox.conversations.clear()
        if self.witness is not None:
            request = None if conversation is None else conversation.request
            self.witness.forwarded(regs[7] or regs[1], inbox.forwarded[-1], answer, request)
        return answer

    def threads_held(self, client: int) -> int:
        """Calls of a client that are suspended."""
        return len(self.inboxes[client].conversations)

    def _words(self, inbox: Inbox, function: int, conversation: Conversation | None, answer: Regs) -> str:
        """A call and its answer in words, for whoever reads what happened; counts RPCs."""
        code = answer[0] & _LOW
        asked = ""
        if conversation is not None:
            asked = self._note(inbox, conversation, answer)
        last = inbox.forwarded[-1].message
        name = name_of(Function, function) + ("" if last is None else f" {name_of(Command, last.cmd)}")
        if is_rpc(code):
            return f"{name} → RPC {asked or name_of(RpcReturn, code)}, thread {answer[3]}"
        result = ""
        if conversation is not None and code == ReturnCode.OK:
            message = self._message(conversation.message)
            result = "" if message is None else f", ret {name_of(Result, message.ret)}"
        return f"{name} → {name_of(ReturnCode, code)}{result}"

    def _seen(self, inbox: Inbox, function: int, regs: Regs, conversation: Conversation | None) -> Forwarded:
        """Look at a call as OP-TEE does, and count its message."""
        if conversation is None:
            return Forwarded(regs)
        if function in _WITH_MESSAGE:
            message = self._message(conversation.message)
            if message is None:
                return Forwarded(regs)
            inbox.traffic[name_of(Command, message.cmd)] += 1
            return Forwarded(regs, message=message, lists=self._lists(message))
        at = conversation.asked
        argument = None if at is None else self._message(at)
        return Forwarded(regs, argument=argument, lists={} if argument is None else self._lists(argument))

    def _lists(self, message: Message) -> dict[int, tuple[int, ...]]:
        """The page addresses that a message's page lists name."""
        found: dict[int, tuple[int, ...]] = {}
        for index, (attribute, pointer, size, _) in enumerate(message.params):
            if attribute & TYPE_MASK not in _TMEM or not attribute & NONCONTIG or not pointer:
                continue
            left = page_count(size, pointer % PAGE_SIZE)
            page = pointer - pointer % PAGE_SIZE
            addresses: list[int] = []
            while left > 0:
                try:
                    words = struct.unpack(f"<{PAGE_SIZE // 8}Q", self.read(page, PAGE_SIZE))
                except PhysicalFault:
                    break
                addresses += words[: min(left, ENTRIES_PER_PAGE)]
                left -= ENTRIES_PER_PAGE
                page = words[ENTRIES_PER_PAGE]
            found[index] = tuple(addresses)
        return found

    def _conversation(self, inbox: Inbox, function: int, regs: Regs) -> Conversation | None:
        if function in _WITH_MESSAGE:
            at = from_pair(regs[1], regs[2])
            message = self._message(at)
            behind = at + message_size(len(message.params)) if message is not None else None
            return Conversation(at, behind if function == Function.CALL_WITH_RPC_ARG else None)
        if function != Function.RETURN_FROM_RPC:
            return None
        thread = regs[3] & _LOW
        if thread in inbox.asked_for_page:
            inbox.asked_for_page.discard(thread)
            page = from_pair(regs[1], regs[2])
            if page:
                inbox.pages[from_pair(regs[4], regs[5])] = page
        return inbox.conversations.pop(thread, None)

    def _note(self, inbox: Inbox, conversation: Conversation, answer: Regs) -> str:
        """Remember which thread a suspended call has, and count its RPC; return the RPC's name."""
        code = answer[0] & _LOW
        conversation.request = None
        if not is_rpc(code):
            return ""
        thread = answer[3] & _LOW
        inbox.conversations[thread] = conversation
        conversation.asked = None
        if code == RpcReturn.ALLOC:
            inbox.asked_for_page.add(thread)
        if code != RpcReturn.CMD:
            inbox.traffic[name_of(RpcReturn, code)] += 1
            return name_of(RpcReturn, code)
        conversation.asked = conversation.argument or inbox.pages.get(from_pair(answer[1], answer[2]))
        request = None if conversation.asked is None else self._message(conversation.asked)
        conversation.request = request
        if request is None:
            return ""
        name = name_of(RpcCommand, request.cmd)
        operations = COUNTED_BY_OPERATION.get(RpcCommand(request.cmd)) if name in RpcCommand.__members__ else None
        if operations is not None and request.params:
            name = f"{name}.{name_of(operations, request.params[0].a)}"
        inbox.traffic[name] += 1
        return name

    def argument(self, client: int, conversation: Conversation, cookie: int) -> int | None:
        """PA of the RPC argument of a call: behind its message, or the page that has this cookie."""
        return conversation.argument or self.inboxes[client].pages.get(cookie)

    def write(self, pa: int, data: bytes) -> None:
        """Write into a page that OP-TEE may reach. Raises PhysicalFault."""
        self._memory.write(pa, data)

    def read(self, pa: int, size: int) -> bytes:
        """Read such memory. Raises PhysicalFault."""
        return self._memory.read(pa, size)

    def _message(self, pa: int) -> Message | None:
        """The message at a PA as far as it lies in one page; None for what cannot be one."""
        room = PAGE_SIZE - pa % PAGE_SIZE
        try:
            data = self._memory.read(pa, room)
        except PhysicalFault:
            return None
        if room < HEADER_SIZE or HEADER.unpack_from(data)[7] > min(MAX_PARAMS, (room - HEADER_SIZE) // PARAM_SIZE):
            return None
        return Message.unpack(data)


class ScriptedWorld(LocalSecureWorld):
    """OP-TEE's model in this process behind a `SecureSide`, and the mediator's memory, which fails on demand."""

    def __init__(self, machine: Machine, model: SecureWorld, witness: SecureWitness | None = None) -> None:
        super().__init__(machine, model)
        self.side = SecureSide(machine.memory, model.call, witness)
        self.pages = Countdown()
        """The mediator page that is not there."""
        self.records = Countdown()
        """The record (of a call, a buffer, an RPC argument) for which there is no memory."""
        self.lend = self._lend

    def _lend(self) -> SharedPage | None:
        """See `SecureWorld.lend`; None when a failure was asked for."""
        return None if self.pages.due() else self.machine.pages.allocate()

    def ledger(self, limits: Limits) -> Ledger:
        """See `Host.ledger`."""
        return FaultyLedger(limits, self.records)

    def call(self, regs: Regs) -> Regs:
        """Execute one SMC, or answer it by script."""
        self.note_call(regs)
        answer = self.side.call(regs)
        self.note_answer(regs, answer)
        return answer


class PatientWorld(ScriptedWorld):
    """The same where scripted answers may take virtual time; others have their turn meanwhile."""

    async def forward(self, regs: Regs) -> Regs:
        """See `DistantSecureWorld`."""
        self.note_call(regs)
        call = self.side.begin(regs)
        if call.script is not None and call.script.takes:
            with trio.CancelScope(shield=True):
                await trio.sleep(call.script.takes)
        answer = self.side.end(call)
        self.note_answer(regs, answer)
        return answer
