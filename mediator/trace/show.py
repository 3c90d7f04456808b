"""One call's way through the mediator, drawn: guest, mediator, OP-TEE, and each RPC round until the call ends.

The recording says what the guest and OP-TEE said; what the mediator made of it is found by replaying the trace
up to that call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from hv_models.memory import PAGE_MASK, PAGE_SIZE
from mediator.core.policy import Policy
from mediator.core.records import Call
from mediator.core.steps import Forward, Reply, Step
from mediator.decode import decode_message, decode_registers
from mediator.documents import DocumentError
from mediator.trace.diagram import GUEST, MEDIATOR, OPTEE, Arrow, Journey
from mediator.trace.format import (
    CallEvent,
    Mark,
    Memory,
    ReturnEvent,
    TraceEvent,
    read_trace,
)
from mediator.trace.replay import Replay
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER_SIZE,
    NONCONTIG,
    TYPE_MASK,
    Command,
    Message,
    ParamType,
    message_size,
    page_count,
)
from optee.abi.registers import member_of, name_of
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, is_rpc
from optee.abi.smc_operands import ARGUMENTS, DATA_ANSWERS, THREAD

SHOWN_RANGES: Final = 8
"""Ranges of one page list that are shown; a list may have thousands."""
SHOWN_FRAMES: Final = 3

_LOW: Final = 0xFFFFFFFF
_MESSAGE_CALLS: Final = frozenset({Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG})
_YIELDING: Final = _MESSAGE_CALLS | {Function.RETURN_FROM_RPC}
_TMEM: Final = range(ParamType.TMEM_INPUT, ParamType.TMEM_INOUT + 1)
_SUPPLICANT: Final = frozenset(
    {
        RpcCommand.LOAD_TA,
        RpcCommand.RPMB,
        RpcCommand.FS,
        RpcCommand.GPROF,
        RpcCommand.SOCKET,
        RpcCommand.FTRACE,
        RpcCommand.SUPP_PLUGIN,
    }
)
"""RPC commands that Linux' driver hands to tee-supplicant; the others it answers itself."""
_SAID_ELSEWHERE: Final = ("function id", "code", "RPC", "UUID")
"""Operands that the name of a call or answer says already."""

_AFTER_ALLOC: Final = " (after ALLOC)"
_OF_ALLOC: Final = tuple(
    operand.name for operand in ARGUMENTS[Function.RETURN_FROM_RPC] if operand.name.endswith(_AFTER_ALLOC)
)

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _Smc:
    """One SMC of the guest."""

    call: CallEvent
    root: int
    answer: ReturnEvent | None = None


class Recording:
    """A trace, with the SMCs that belong together: a call and the RETURN_FROM_RPCs that take it on.

    Raises:
        DocumentError: the file is not a whole trace.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self.events = read_trace(path)
        self._smcs: dict[int, _Smc] = {}
        self._calls: dict[int, list[_Smc]] = {}
        waiting: dict[int, int] = {}
        for event in self.events:
            if isinstance(event, CallEvent):
                root = event.id
                if event.regs[0] & _LOW == Function.RETURN_FROM_RPC:
                    root = waiting.pop(event.regs[3] & _LOW, event.id)
                smc = self._smcs[event.id] = _Smc(event, root)
                self._calls.setdefault(root, []).append(smc)
            elif isinstance(event, ReturnEvent):
                smc = self._smcs[event.id]
                smc.answer = event
                if smc.call.regs[0] & _LOW in _YIELDING and is_rpc(event.regs[0]):
                    waiting[event.regs[3] & _LOW] = smc.root

    def rows(self) -> Iterator[tuple[str, ...]]:
        """List the calls: id, line, vCPU, function, what the message asks, RPC rounds, how it ended."""
        for root, smcs in self._calls.items():
            first = smcs[0].call
            function = name_of(Function, first.regs[0] & _LOW)
            place = (str(root), str(first.line), str(first.vcpu))
            yield *place, function, _asked(first), str(len(smcs) - 1), _end(smcs[-1])

    def root_of(self, number: int) -> int:
        """The call that an SMC belongs to.

        Raises:
            DocumentError: the trace has no such SMC.

        """
        smc = self._smcs.get(number)
        if smc is None:
            have = f"{min(self._smcs)} to {max(self._smcs)}" if self._smcs else "none"
            raise DocumentError([f"{self.path}: there is no call {number}; the ids are {have}"])
        return smc.root

    def follow(self, root: int, policy: Policy, progress: Progress = lambda done, total: None) -> Journey:
        """Replay the trace up to the end of a call and note what happens to it."""
        smcs = self._calls[root]
        wanted = {smc.call.id: smc for smc in smcs}
        last = max(at for at, event in enumerate(self.events) if getattr(event, "id", None) in wanted)
        first = smcs[0].call
        function = name_of(Function, first.regs[0] & _LOW)
        place = f"line {first.line}, vCPU {first.vcpu}"
        what = " ".join(filter(None, (function, _asked(first))))
        journey = Journey(f"call {root} ({place}): {what}; {_end(smcs[-1])}; policy {policy.name}")
        try:
            replay = Replay(self.header, self.events[: last + 1], policy, lambda event, step: follower.see(event, step))
        except ValueError as error:
            raise DocumentError([f"{self.path}:1: {error}"]) from None
        follower = _Follower(replay, wanted, journey)
        journey.unexpected = replay.run(progress).unexpected
        return journey


class _Follower:
    """Turns what the replay shows into arrows."""

    def __init__(self, replay: Replay, wanted: dict[int, _Smc], journey: Journey) -> None:
        self._replay = replay
        self._wanted = wanted
        self._arrows = journey.arrows
        self._pins = 0
        self._rpc = 0
        self._seen: set[int] = set()

    def see(self, event: TraceEvent, step: Step) -> None:
        """Look at an event of the trace and at what the mediator does next."""
        pins = self._replay.vm.pins
        changed, self._pins = pins - self._pins, pins
        if isinstance(event, Mark) or event.id is None or event.line in self._seen:
            # What the replay itself answers at the end of the trace is none of the recording's.
            return
        smc = self._wanted.get(event.id)
        if smc is None:
            return
        self._seen.add(event.line)
        if isinstance(event, CallEvent):
            self._enter(event)
        else:
            self._arrows.append(Arrow(OPTEE, MEDIATOR, _words(event.regs, _answers(smc))))
        notes = [_pinned(changed, pins)] if changed else []
        if isinstance(step, Forward):
            if isinstance(event, CallEvent):
                notes = [*self._forwarded(step), *notes]
            else:
                notes.append("the RPC cannot be delivered: OP-TEE is told so, the guest nothing")
            self._arrows.append(Arrow(MEDIATOR, OPTEE, self._call_words(step.regs), tuple(notes)))
        elif isinstance(step, Reply):
            self._rpc = step.regs[0] & _LOW
            notes += _returned(smc, step)
            self._arrows.append(Arrow(MEDIATOR, GUEST, _words(step.regs[:4], _answers(smc)), tuple(notes)))

    def _enter(self, event: CallEvent) -> None:
        notes: list[str] = []
        if event.interrupts:
            notes.append(f"{_count(event.interrupts, 'interrupt')} before, left out of the recording")
        resumes = event.regs[0] & _LOW == Function.RETURN_FROM_RPC
        for entry in event.memory:
            if entry.kind == "message" and not resumes:
                notes += _message(entry, done=False)
            elif entry.kind == "rpc" and resumes:
                notes += _message(entry, done=True)
        self._arrows.append(Arrow(GUEST, MEDIATOR, self._call_words(event.regs), tuple(notes)))

    def _call_words(self, regs: Sequence[int]) -> str:
        """A call's registers; what RETURN_FROM_RPC has for ALLOC alone is left out after another RPC."""
        words = _words(regs, hidden=() if self._rpc == RpcReturn.ALLOC else _OF_ALLOC)
        return words.replace(_AFTER_ALLOC, "")

    def _forwarded(self, step: Forward) -> Iterator[str]:
        """Where OP-TEE finds what the guest sent, and what the guest's addresses became."""
        call = step.ticket
        if not isinstance(call, Call) or call.shadow is None:
            return
        if step.regs[0] != Function.RETURN_FROM_RPC:
            yield f"the message is a copy in the mediator's page {call.shadow.pa:#x}"
            yield from self._translated(call.shadow.view)
        elif self._rpc == RpcReturn.ALLOC:
            yield "the guest's page is pinned; OP-TEE gets one of the mediator's own for RPC arguments"
        elif self._rpc == RpcReturn.CMD:
            if call.rpc_offset:
                yield from self._translated(call.shadow.view[call.rpc_offset :])
            elif call.argument is not None:
                yield from self._translated(call.argument.page.view)

    def _translated(self, data: memoryview) -> Iterator[str]:
        """The page lists of a message or RPC argument that OP-TEE is about to see."""
        for index, param in enumerate(Message.unpack(bytes(data)).params):
            if param.attr & TYPE_MASK in _TMEM and param.attr & NONCONTIG and param.a:
                offset = param.a & PAGE_MASK
                page = param.a - offset
                pages = self._list(page, page_count(param.b, offset))
                yield f"parameter {index}: {_count(len(pages), 'page')}, listed in the mediator's page {page:#x}"
                yield from self._ranges(pages)

    def _list(self, page: int, count: int) -> list[int]:
        """The addresses in one of the mediator's own page lists."""
        found: list[int] = []
        while len(found) < count:
            words = np.frombuffer(self._replay.machine.memory.frame(page), np.uint64)
            found += words[: min(count - len(found), ENTRIES_PER_PAGE)].tolist()
            page = int(words[ENTRIES_PER_PAGE])
        return found

    def _ranges(self, pas: Sequence[int]) -> Iterator[str]:
        """IPA to PA, consecutive IPAs together; the IPA is what the hypervisor says has this frame."""
        runs: list[tuple[int | None, list[int]]] = []
        follows: int | None = None
        for pa in pas:
            ipa = self._replay.vm.find(pa)
            if ipa is not None and ipa == follows:
                runs[-1][1].append(pa)
            else:
                runs.append((ipa, [pa]))
            follows = None if ipa is None else ipa + PAGE_SIZE
        for first, frames in runs[:SHOWN_RANGES]:
            if first is None:
                yield f"  no page of this guest -> PA {frames[0]:#x}"
                continue
            last = f" to {first + (len(frames) - 1) * PAGE_SIZE:#x}" if len(frames) > 1 else ""
            more = f", ... ({_count(len(frames), 'frame')})" if len(frames) > SHOWN_FRAMES else ""
            yield f"  IPA {first:#x}{last} -> PA {', '.join(map(hex, frames[:SHOWN_FRAMES]))}{more}"
        if len(runs) > SHOWN_RANGES:
            yield f"  ... and {_count(len(runs) - SHOWN_RANGES, 'more range')}"


def _returned(smc: _Smc, step: Reply) -> Iterator[str]:
    """What the guest finds in its memory."""
    answer = smc.answer
    if answer is None:
        return
    a0 = step.regs[0] & _LOW
    for entry in answer.memory:
        if entry.kind == "message" and a0 == ReturnCode.OK:
            yield from _message(entry, done=True)
        elif entry.kind == "rpc" and a0 == RpcReturn.CMD:
            yield from _message(entry, done=False)
            yield f"for {_server(entry.data)}"


def _words(regs: Sequence[int], answer_to: Function | None = None, hidden: Sequence[str] = ()) -> str:
    """Registers in a line: the name, and the operands that are not zero."""
    decoded = decode_registers(regs, answer_to)
    operands = [
        f"{row['name']} {row['words'] or row['value']}"
        for row in decoded["rows"]
        if row["name"] not in (*_SAID_ELSEWHERE, *hidden) and (row["value"] != "0x0" or row["name"] == THREAD.name)
    ]
    return ": ".join(filter(None, (decoded["name"], ", ".join(operands))))


def _message(entry: Memory, *, done: bool) -> Iterator[str]:
    """A message or RPC argument: a line for its header and one for each parameter."""
    rpc = entry.kind == "rpc"
    data = entry.data[: message_size(int.from_bytes(entry.data[HEADER_SIZE - 4 : HEADER_SIZE], "little"))]
    try:
        decoded = decode_message(data, rpc=rpc)
        argument = decoded["rpc_argument" if rpc else "message"]
        message = Message.unpack(data)
    except ValueError as error:
        yield str(error)
        return
    what = " ".join(filter(None, (argument["command"], argument["operation"])))
    if done:
        yield f"{'reply to ' if rpc else ''}{what}: {_result(message)}"
    else:
        yield f"{what} at IPA {entry.at:#x}{_header_words(message)}"
    for index, param in enumerate(argument["params"]):
        if int(param["attr"], 16) == ParamType.NONE:
            continue
        rows = (f"{row['name']} {row['value']}" for row in param["rows"] if row["value"] != "0x0")
        content = f" ({param['content']})" if param["content"] else ""
        yield f"  {index}: {param['words']}{content} {', '.join(rows)}".rstrip()


def _header_words(message: Message) -> str:
    words = {"func": message.func, "session": message.session, "cancel id": message.cancel_id}
    return "".join(f", {name} {value:#x}" for name, value in words.items() if value)


def _result(message: Message) -> str:
    if message.ret == Result.SUCCESS:
        return "SUCCESS"
    return f"{name_of(Result, message.ret)} from {name_of(Origin, message.ret_origin)}"


def _server(data: bytes) -> str:
    """Who in the guest answers an RPC."""
    command = member_of(RpcCommand, int.from_bytes(data[:4], "little"))
    return "tee-supplicant" if command in _SUPPLICANT else "the driver"


def _asked(call: CallEvent) -> str:
    """What a call's message asks for, in short; for one that resumes nothing known, the thread it names."""
    if call.regs[0] & _LOW == Function.RETURN_FROM_RPC:
        return f"thread {call.regs[3] & _LOW:#x}"
    for entry in call.memory:
        if entry.kind == "message" and len(entry.data) >= HEADER_SIZE:
            command, func = (int.from_bytes(entry.data[at : at + 4], "little") for at in (0, 4))
            name = name_of(Command, command)
            return f"{name} {func:#x}" if command == Command.INVOKE_COMMAND else name
    return ""


def _end(smc: _Smc) -> str:
    """How a call ended, as the recording has it."""
    answer = smc.answer
    if answer is None:
        return "not ended"
    if smc.call.regs[0] & _LOW not in _YIELDING:
        function = _answers(smc)
        return _words(answer.regs, function) if function in DATA_ANSWERS else _words(answer.regs[:1], function)
    if is_rpc(answer.regs[0]):
        return f"waits for RPC {name_of(RpcReturn, answer.regs[0] & _LOW)}"
    code = name_of(ReturnCode, answer.regs[0] & _LOW)
    for entry in answer.memory:
        if entry.kind == "message" and code == "OK" and len(entry.data) >= HEADER_SIZE:
            message = Message.unpack(entry.data[: HEADER_SIZE - 4] + bytes(4))
            return f"{code}, {_result(message)}"
    return code


def _answers(smc: _Smc) -> Function | None:
    """The fast call whose answer the registers are."""
    member = member_of(Function, smc.call.regs[0] & _LOW)
    return member if isinstance(member, Function) and member not in _YIELDING else None


def _pinned(changed: int, now: int) -> str:
    return f"{_count(abs(changed), 'page')} {'pinned' if changed > 0 else 'unpinned'}, now {now}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
