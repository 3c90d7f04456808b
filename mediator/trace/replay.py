"""Replay a recording: the guest's side goes into the mediator, a scripted secure world answers as recorded.

One VM has the recorded RAM, so that recorded addresses are its IPAs; no frame has PA = IPA. What OP-TEE sees
and what the guest sees are compared with the recording. Source: the trace-file description, "Replaying".
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hv_models.machine import Machine, RamBlock
from hv_models.memory import PAGE_SIZE
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.steps import Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.documents import DocumentError
from mediator.host import Host
from mediator.invariants import SCAN_EVERY, Checker
from mediator.trace.expected import (
    LOW,
    MESSAGE_CALLS,
    answered_there,
    first_difference,
    message_size,
    output_fields,
    own_answers,
    registers,
    strays,
    taken_reply,
)
from mediator.trace.format import (
    AnswerEvent,
    CallEvent,
    ForwardEvent,
    Header,
    Mark,
    ReturnEvent,
    TraceEvent,
    read_trace,
)
from mediator.trace.report import ReplayReport
from mediator.trace.sight import Found, Sight
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    PARAM_SIZE,
)
from optee.abi.smc import API_UID, Function, ReturnCode, RpcReturn, VmId, is_rpc

ROOMY_THREADS: Final = 64
"""Threads of the scripted OP-TEE where the recording does not say how many it had: more than any recorded
call needs, so that it is the recorded OP-TEE that answers ETHREAD_LIMIT."""
DEFAULT_CLIENT: Final = 1


@dataclass(slots=True)
class Pending:
    """A call that is with the scripted OP-TEE: where OP-TEE sees its message and RPC argument.

    request: the RPC request that OP-TEE made last, while it is not answered.
    """

    ticket: Ticket
    regs: Regs
    shadow: int = 0
    rpc_behind: bool = False
    request: bytes | None = None


Observer = Callable[[TraceEvent, Step], None]


class Replay:
    """One trace and one policy. `observer` sees each event with the step that answered it."""

    def __init__(self, header: Header, events: list[TraceEvent], policy: Policy, observer: Observer | None = None):
        self.header = header
        self.events = events
        self.policy = policy
        self.report = ReplayReport(events=len(events))
        self.machine = Machine()
        self.client = VmId(DEFAULT_CLIENT if header.client_id is None else header.client_id)
        self.vm: VirtualMachine = self.machine.create_xen(
            "recorded", [RamBlock(ipa, size) for ipa, size in header.ram], domain=self.client - 1
        )
        self._sight = Sight(self.machine, self.vm)
        host = Host(self.machine)
        self.mediator = Mediator(replace(policy, flow=None), host)  # a recording has its own order
        self.checker = Checker(self.mediator, host)
        self._as_xen = policy.name == "xen" and header.client_id is not None
        self._observer = observer
        self._own = own_answers(events)
        self._pending: dict[int, Pending] = {}
        self._replies: dict[int, Reply] = {}
        self._calls: dict[int, CallEvent] = {}
        self._threads: dict[int, Pending] = {}
        self._arguments: dict[int, int] = {}
        self._event: TraceEvent = Mark(1, "start")
        self._waiting: dict[int, CallEvent] = {}
        """Calls of a recording with a mediator between: it decided about them when it forwarded, or never did."""

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> ReplayReport:
        """All events; afterwards the VM is destroyed and everything must be given back."""
        try:
            self._start()
            for number, event in enumerate(self.events):
                self._event = event
                if isinstance(event, CallEvent):
                    self._call(event)
                elif isinstance(event, ForwardEvent):
                    self._recorded_forward(event)
                elif isinstance(event, AnswerEvent):
                    if event.id is not None and event.id in self._pending:
                        self._answer(event.id, event.regs, event.message, event.rpc)
                elif isinstance(event, ReturnEvent):
                    self._return(event)
                if number % 256 == 0:
                    progress(number, len(self.events))
                if number % SCAN_EVERY == 0:
                    self.checker.scan(memory=True)
            self._end()
            progress(len(self.events), len(self.events))
        finally:
            self.machine.close()
        self.report.violations = self.checker.violations
        return self.report

    # Start and end

    def _start(self) -> None:
        reply = self._host_request(self.checker.probe())
        if reply.regs[0] != ReturnCode.OK:
            self._unexpected("probe", "OP-TEE", hex(reply.regs[0]))
        reply = self._host_request(self.checker.create(self.client, self.vm))
        if reply.regs[0] != ReturnCode.OK:
            self._unexpected("create", "a guest", hex(reply.regs[0]))

    def _host_request(self, step: Step) -> Reply:
        while not isinstance(step, Reply):
            if isinstance(step, Preempt):
                step = self.checker.proceed(step.ticket)
                continue
            assert isinstance(step, Forward)
            recorded = self._own.get(step.regs[0], [])
            if recorded:
                forward, answer = recorded.pop(0)
                if self._as_xen and forward.regs != step.regs:
                    self._unexpected("forward.regs", _hexes(forward.regs), _hexes(step.regs))
                regs = answer.regs
            else:
                regs = _SCRIPTED.get(step.regs[0], (0, 0, 0, 0))
            step = self.checker.returned(step.ticket, regs)
        return step

    def _end(self) -> None:
        guest = self.mediator.guests.get(self.client)
        if guest is not None:
            self.report.peak_pages_pinned = guest.ledger.pages_peak
            sums = guest.ledger.sums()
            self.report.left = {name: sums[name] for name in ("pages", "calls", "buffers", "rpc_arguments")}
            for event in list(self._waiting.values()):
                self._submit(event)
            for identity in list(self._pending):
                # The recording ends while OP-TEE runs this call: the call ends with the recording.
                self._answer(identity, (ReturnCode.EBADCMD, 0, 0, 0), None, None)
        self.checker.finish(memory=True)
        self._host_request(self.checker.destroy(self.client))
        pins = self.vm.pins
        pages = self.machine.pages.allocated
        if pins or pages or self.mediator.guests:
            self._unexpected("left after the end", 0, {"pins": pins, "mediator pages": pages})

    # The guest's side

    def _call(self, event: CallEvent) -> None:
        self.report.calls += 1
        self._calls[event.id] = event
        resumes = event.regs[0] & LOW == Function.RETURN_FROM_RPC
        for entry in event.memory:
            if resumes and entry.kind == "message":
                continue  # a driver leaves the message of a suspended call alone
            if not self._sight.write(entry.at, entry.data):
                self._unexpected("recorded memory", "an address in RAM", hex(entry.at))
        if self.header.client_id is None:
            self._submit(event)
        else:
            self._waiting[event.id] = event

    def _submit(self, event: CallEvent) -> None:
        self._go_on(event, event.id, self.checker.submit(self.client, event.vcpu, event.regs), None)

    def _go_on(self, event: TraceEvent, identity: int, step: Step, pending: Pending | None) -> None:
        while isinstance(step, Preempt):
            step = self.checker.proceed(step.ticket)
        if self._observer is not None:
            self._observer(event, step)
        if isinstance(step, Reply):
            self._replies[identity] = step
            if is_rpc(step.regs[0]):
                thread = step.regs[3] & LOW
                if pending is not None:
                    self._threads[thread] = pending
                elif thread in self._threads:
                    # The mediator asks for something of its own (R19): OP-TEE's request is no more.
                    self._threads[thread].request = None
        elif isinstance(step, Forward):
            self._pending[identity] = self._forwarded(self._calls[identity], step)
        else:
            assert isinstance(step, Queue)
            self._unexpected("step", "an answer", f"the call waits until {step.until}")

    def _return(self, event: ReturnEvent) -> None:
        self.report.returned += 1
        if event.id in self._waiting:
            self._submit(self._waiting.pop(event.id))
        if event.id in self._pending:
            if self._as_xen and not answered_there(event):
                self._unexpected("forward", "none recorded", _hexes(self._pending[event.id].regs))
            by_kind = {entry.kind: entry.data for entry in event.memory if entry.kind != "list"}
            self._answer(event.id, event.regs, by_kind.get("message"), by_kind.get("rpc"))
        reply = self._replies.pop(event.id, None)
        call = self._calls.pop(event.id)
        if reply is None:
            self._unexpected("return", _hexes(event.regs), "no answer")
            return
        differing = registers(self.policy, call.regs, event.regs, reply.regs, self.report.expected)
        if differing is not None:
            self._unexpected("guest's registers", _hexes(differing[0]), _hexes(differing[1]))
        a0 = event.regs[0] & LOW
        for entry in event.memory:
            done = entry.kind == "message" and a0 == ReturnCode.OK
            asked = entry.kind == "rpc" and a0 == RpcReturn.CMD
            if done or asked:
                data = entry.data
                if asked:
                    data = data[: message_size(data)]
                seen = self._sight.read(entry.at, len(data))
                if seen != data:
                    self._unexpected(f"guest's {entry.kind}", *first_difference(data, seen))

    # The secure world's side

    def _forwarded(self, call: CallEvent, step: Forward) -> Pending:
        self.report.forwarded += 1
        regs = step.regs
        asked = call.regs[0] & LOW
        function = regs[0]
        wanted = asked
        if asked == Function.CALL_WITH_REGD_ARG:
            wanted = int(Function.CALL_WITH_RPC_ARG)
            self.report.expected["regd_arg_as_rpc_arg"] += 1
        if function != wanted:
            self._unexpected("forwarded function", hex(wanted), hex(function))
        if regs[7] != self.client:
            self._unexpected("forwarded a7", self.client, regs[7])
        pending = Pending(step.ticket, regs)
        if function in MESSAGE_CALLS:
            pending.shadow = regs[1] << 32 | regs[2]
            pending.rpc_behind = function == Function.CALL_WITH_RPC_ARG
            self._check_message(call, pending)
        elif function == Function.RETURN_FROM_RPC:
            known = self._threads.pop(regs[3], None)
            if known is None:
                self._unexpected("resumed thread", "a suspended one", regs[3])
            else:
                pending.shadow, pending.rpc_behind = known.shadow, known.rpc_behind
                pending.request = known.request
            self._check_resume(call, pending)
        return pending

    def _check_message(self, call: CallEvent, pending: Pending) -> None:
        """The message that OP-TEE sees equals the guest's but for addresses and ret (R11)."""
        for entry in call.memory:
            if entry.kind == "message":
                message = entry.data[: message_size(entry.data)]
                self._report(self._sight.shadow("message", message, pending.shadow, 0, preset=True))
                return

    def _check_resume(self, call: CallEvent, pending: Pending) -> None:
        regs = pending.regs
        page = regs[1] << 32 | regs[2]
        if page in self.machine.pages:
            self._arguments[(regs[4] & LOW) << 32 | regs[5] & LOW] = page
            return
        place = self._rpc_place(pending, (call.regs[1] & LOW) << 32 | call.regs[2] & LOW)
        if pending.request is None or place is None:
            return
        for entry in call.memory:
            if entry.kind == "rpc" and len(entry.data) >= len(pending.request):
                if strays(pending.request, entry.data):
                    given = bytes(entry.data[: len(pending.request)])
                    self._unexpected("forwarded rpc", *first_difference(given, taken_reply(pending.request, given)))
                    return
                self._report(self._sight.shadow("rpc", taken_reply(pending.request, entry.data), *place, preset=False))

    def _rpc_place(self, pending: Pending, cookie: int) -> tuple[int, int] | None:
        """Where OP-TEE sees the RPC argument: page and offset."""
        if pending.shadow not in self.machine.pages:
            return None
        if pending.rpc_behind:
            count = HEADER.unpack_from(self.machine.memory.frame(pending.shadow))[7]
            return pending.shadow, HEADER_SIZE + PARAM_SIZE * count
        page = self._arguments.get(cookie)
        return None if page is None else (page, 0)

    def _recorded_forward(self, event: ForwardEvent) -> None:
        """What another mediator forwarded for the same call (policy `xen` only)."""
        if event.id is None:
            return
        if event.id in self._waiting:
            self._submit(self._waiting.pop(event.id))
        if not self._as_xen:
            return
        pending = self._pending.get(event.id)
        if pending is None:
            reply = self._replies.get(event.id)
            if reply is None or reply.regs[0] != ReturnCode.ETHREAD_LIMIT:
                self._unexpected("forward", _hexes(event.regs), "answered by the mediator itself")
            return
        regs, recorded = list(pending.regs), list(event.regs)
        if regs[0] in MESSAGE_CALLS or (regs[1] << 32 | regs[2]) in self.machine.pages:
            regs[1:3] = recorded[1:3] = []
        if regs != recorded:
            self._unexpected("forward.regs", _hexes(recorded), _hexes(regs))
        if event.message is not None and regs[0] in MESSAGE_CALLS:
            # Between the first forward and the end the shadow is OP-TEE's.
            self._report(self._sight.forward("message", event.message, pending.shadow))
        if event.rpc is not None:
            call = self._calls[event.id]
            place = self._rpc_place(pending, (call.regs[1] & LOW) << 32 | call.regs[2] & LOW)
            if place is not None and not place[1]:
                self._report(self._sight.forward("rpc", event.rpc[: message_size(event.rpc)], place[0]))

    def _answer(self, identity: int, regs: Regs, message: bytes | None, rpc: bytes | None) -> None:
        """The scripted OP-TEE writes what the recorded one wrote, and answers."""
        pending = self._pending.pop(identity)
        a0 = regs[0] & LOW
        if pending.shadow and pending.shadow in self.machine.pages:
            if message is not None and a0 == ReturnCode.OK:
                frame = self.machine.memory.frame(pending.shadow)
                for start, end in output_fields(message[: message_size(message)]):
                    frame[start:end] = message[start:end]
            pending.request = None
            if rpc is not None and a0 == RpcReturn.CMD:
                pending.request = rpc[: message_size(rpc)]
                place = self._rpc_place(pending, (regs[1] & LOW) << 32 | regs[2] & LOW)
                if place is not None:
                    page, base = place
                    size = min(message_size(rpc), PAGE_SIZE - base)
                    self.machine.memory.frame(page)[base : base + size] = rpc[:size]
        self._go_on(self._event, identity, self.checker.returned(pending.ticket, regs), pending)

    def _report(self, found: Iterable[Found]) -> None:
        for each in found:
            self._unexpected(*each)

    def _unexpected(self, what: str, expected: Any, got: Any) -> None:
        self.report.unexpected += 1
        if self.report.first_unexpected is None:
            event = self._event
            self.report.first_unexpected = {
                "line": event.line,
                "call": getattr(event, "id", None),
                "what": what,
                "expected": expected,
                "got": got,
            }


_SCRIPTED: Final[dict[int, Regs]] = {
    int(Function.CALLS_UID): API_UID,
    int(Function.GET_THREAD_COUNT): (0, ROOMY_THREADS, 0, 0),
}


def _hexes(regs: Sequence[int]) -> list[str]:
    return [hex(word) for word in regs]


def replay(path: Path, policy: Policy, progress: Callable[[int, int], None] = lambda done, total: None) -> ReplayReport:
    """Replay one trace file.

    Raises:
        DocumentError: the file is not a whole trace.

    """
    header, events = read_trace(path)
    try:
        run = Replay(header, events, policy)
    except ValueError as error:
        raise DocumentError([f"{path}:1: {error}"]) from None
    return run.run(progress)
