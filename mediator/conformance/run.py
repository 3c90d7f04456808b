"""Run a vector against our core: the guests' side and the recorded secure world in, what we did out.

What comes out has the vector format itself, so that comparing is a matter of two records, and our own run can
be written as a vector file.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from hv_models.memory import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from hv_models.stage2 import Stage2Fault
from mediator.conformance import vectors as v
from mediator.conformance.facts import Facts, lists_named, note_message, note_parameters, strays
from mediator.conformance.image import changed_runs, differing_runs, first_difference
from mediator.conformance.machine import VectorMachine, VectorMemory
from mediator.conformance.secure_side import SecureSide
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.records import Call
from mediator.core.states import BufferState, GuestState
from mediator.core.steps import RPC_UNDELIVERED, Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.invariants import Checker
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    OFFSET_RET,
    PARAM,
    Command,
)
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Cookie, Function, RpcReturn, ThreadId, VmId

NOT_HANDLED: Final = 0xFFFFFFFFFFFFFFFF
ENOMEM: Final = -12
ENODEV: Final = -19
_RC: Final = {0: 0, 6: ENOMEM}
_RESUMES: Final = {
    RpcReturn.ALLOC: "ALLOC",
    RpcReturn.CMD: "CMD",
    RpcReturn.FOREIGN_INTR: "INTR",
    RpcReturn.FREE: "FREE",
}
_NO_ANSWER: Final = (0, 0, 0, 0)


@dataclass(slots=True)
class Observed:
    """What we did in one step."""

    step: v.Step
    facts: Facts
    memory: tuple[str, str] | None = None
    """The first guest bytes that are not as recorded: (recorded, ours)."""


class Run:
    """One vector on a machine of its own."""

    def __init__(self, vector: v.Vector, policy: Policy) -> None:
        self.vector = vector
        self.machine = VectorMachine(vector.setup.domains)
        policy = replace(policy, flow=None)  # a vector has its own order
        self.mediator = Mediator(policy, self.machine, self.machine.ledger)
        self.checker = Checker(self.mediator, self.machine)
        self.miscounted = False
        """Ours may have allocated more or less than the recorded mediator since failures were asked for."""
        self._secure = SecureSide(self.machine)
        self._request: bytes | None = None
        self._dying: set[int] = set()
        self._recorded: dict[int, bytes] = {}
        self._adopted: defaultdict[int, list[v.MemoryWrite]] = defaultdict(list)
        self._facts = Facts()
        self._serving = VmId(0)

    def close(self) -> None:
        """Give back the machine."""
        self.machine.close()

    def adopt(self) -> None:
        """Leave guests with the memory that was recorded: what they do next follows from what they found there.

        In what is observed a guest writes it before its next call, so that it can be played again.
        """
        for domain, image in self._recorded.items():
            base = self.machine.described[domain].base_gfn << PAGE_SHIFT
            changes = changed_runs(domain, base, self.machine.image(domain), image)
            self._adopted[domain] += (v.MemoryWrite(ipa=change.ipa, hex=change.hex) for change in changes)
            self.machine.restore(domain, image)

    def steps(self) -> Iterator[Observed]:
        """Do one step after the other."""
        for step in self.vector.steps:
            self._facts = Facts()
            if isinstance(step, v.Probe):
                reply, forwarded = self._drive(self.checker.probe(), step.out.forwarded, None)
                ready = reply is not None and reply.regs[0] == 0
                done: v.Step = v.Probe(op="probe", out=v.ProbeOut(result=ready, forwarded=forwarded))
                yield Observed(done, self._facts)
            elif isinstance(step, v.Create):
                yield Observed(self._create(step), self._facts)
            elif isinstance(step, v.Smc):
                yield self._smc(step)
            elif isinstance(step, v.Relinquish):
                yield Observed(self._relinquish(step), self._facts)
            else:
                if isinstance(step, v.P2m):
                    self.machine.p2m(step)
                elif isinstance(step, v.Flip):
                    self.machine.flip(step)
                else:
                    self.machine.alloc_fault(step)
                yield Observed(step, self._facts)

    def _create(self, step: v.Create) -> v.Create:
        memory = self.machine.memory(step.domain)
        if self.miscounted and (step.out.rc == ENOMEM or self.machine.objects.left == 0):
            # The record tells whether the failure that was asked for comes here.
            self.machine.objects.left = 0 if step.out.rc == ENOMEM else -1
        request = self.checker.create(VmId(step.domain + 1), memory)
        reply, forwarded = self._drive(request, step.out.forwarded, None)
        rc = ENODEV if reply is None else _RC.get(reply.regs[0], ENODEV)
        return v.Create(op="create", domain=step.domain, out=v.CreateOut(rc=rc, forwarded=forwarded))

    def _smc(self, step: v.Smc) -> Observed:
        memory = self.machine.memory(step.domain)
        memory.begin(resuming=step.regs[0] & 0xFFFFFFFF == Function.RETURN_FROM_RPC)
        for write in step.mem_writes:
            self.machine.write(step.domain, write)
        before = {domain: self.machine.image(domain) for domain in self.machine.vms}
        self._recorded = {}
        self._look_at_call(step)
        request = self.checker.submit(VmId(step.domain + 1), 0, tuple(step.regs))
        reply, forwarded = self._drive(request, step.out.forwarded, step.domain)
        regs = list(step.regs) if reply is None else list(reply.regs)
        handled = bool(forwarded) or regs[0] != NOT_HANDLED  # OP-TEE may answer -1 itself
        self._look_back(step, memory, reply, forwarded)
        changes: list[v.Change] = []
        difference = None
        for domain, old in before.items():
            base = self.machine.described[domain].base_gfn << PAGE_SHIFT
            new = self.machine.image(domain)
            if new != old:
                changes.extend(changed_runs(domain, base, old, new))
            expected = bytearray(old)
            for change in step.out.mem_changes:
                if change.domain == domain and base <= change.ipa < base + len(old):
                    expected[change.ipa - base : change.ipa - base + len(change.hex)] = change.hex
            if expected != new:
                difference = difference or first_difference(base, bytes(expected), new)
                self._facts.differing += differing_runs(base, expected, new)
                self._recorded[domain] = bytes(expected)
        out = v.SmcOut(
            handled=handled,
            regs=regs if handled else [NOT_HANDLED, *step.regs[1:]],
            forwarded=forwarded,
            mem_changes=changes,
            pins=self._pins(step.domain),
            state=self._state(step.domain),
        )
        writes = [*self._adopted.pop(step.domain, ()), *step.mem_writes]
        done = v.Smc(op="smc", domain=step.domain, regs=step.regs, mem_writes=writes, out=out)
        return Observed(done, self._facts, difference)

    def _relinquish(self, step: v.Relinquish) -> v.Relinquish:
        vm = VmId(step.domain + 1)
        self.machine.memory(step.domain)
        reply, forwarded = self._drive(self.checker.destroy(vm), step.out.forwarded, None)
        guest = self.mediator.guests.get(vm)
        if guest is not None and guest.state is GuestState.QUARANTINED:
            # The host's word: a scripted secure world touches nothing.
            reply, _ = self._drive(self.checker.abandon(vm), [], None)
        rc = 0 if reply is not None and reply.regs[0] == 0 else -85
        (self._dying.discard if step.out.rc == 0 else self._dying.add)(step.domain)
        return v.Relinquish(
            op="relinquish",
            domain=step.domain,
            preempt_after=step.preempt_after,
            out=v.RelinquishOut(
                rc=rc, forwarded=forwarded, pins=self._pins(step.domain), state=self._state(step.domain)
            ),
        )

    # One request and its forwards

    def _drive(
        self, step: Step, recorded: list[v.Forwarded], domain: int | None
    ) -> tuple[Reply | None, list[v.Forwarded]]:
        """Give the recorded answers in order until the request is answered; None if it must come again."""
        done: list[v.Forwarded] = []
        while True:
            self._facts.not_delivered |= any(event.name == RPC_UNDELIVERED for event in step.events)
            if isinstance(step, Reply):
                break
            if isinstance(step, Queue):
                return None, done
            if isinstance(step, Preempt):
                step = self.checker.proceed(step.ticket)
                continue
            assert isinstance(step, Forward)
            record = recorded[len(done)] if len(done) < len(recorded) else None
            observed = self._forward(step, record, domain)
            done.append(observed)
            answer: Regs = _NO_ANSWER if record is None else tuple(record.answer.ret)
            if record is not None:
                self._secure.write(record.answer, self.mediator.guests.get(self._serving))
            self._note(step.ticket, answer)
            step = self.checker.returned(step.ticket, answer)
        if domain is not None and not done and step.regs[0] == RpcReturn.CMD:
            self._facts.asked_free = True
        return step, done

    def _forward(self, step: Forward, record: v.Forwarded | None, domain: int | None) -> v.Forwarded:
        regs = list(step.regs)
        pa = regs[1] << 32 | regs[2]
        symbol = None if record is None else record.sym.get("a1:a2")
        sym: dict[Literal["a1:a2"], str] = {}
        arg = rpc_arg = None
        cookie: int | None = None
        resumes: str | None = None
        guest = None if domain is None else self.mediator.guests.get(VmId(domain + 1))
        if guest is not None and regs[0] == Function.CALL_WITH_ARG:
            name, arg = self._secure.send(pa, symbol, self._own_result(domain))
            sym["a1:a2"] = name
        elif guest is not None and regs[0] == Function.RETURN_FROM_RPC:
            call = step.ticket
            assert isinstance(call, Call)
            resumes = _RESUMES.get(RpcReturn(call.rpc)) if call.rpc in _RESUMES else f"UNKNOWN{call.rpc & 0xFFFF:x}"
            if resumes == "ALLOC" and pa:
                given = _given(regs)
                argument = guest.arguments.get(given)
                if argument is not None and argument.page.pa == pa:
                    sym["a1:a2"] = f"rpc:{given:x}"
            elif resumes == "CMD" and call.argument is not None:
                cookie = call.argument.cookie
                rpc_arg = self._secure.shadow(call.argument.page.pa)
        return v.Forwarded(
            regs=regs,
            sym=sym,
            resumes=resumes,
            arg=arg,
            rpc_arg=rpc_arg,
            rpc_cookie=cookie,
            pins_during=None if domain is None else self._pins(domain),
            answer=v.Answer(ret=list(_NO_ANSWER)) if record is None else record.answer,
        )

    def _own_result(self, domain: int | None) -> bytes:
        message = None if domain is None else self.machine.memory(domain).message
        return bytes(4) if message is None else message[OFFSET_RET : OFFSET_RET + 4]

    # Facts for declarations

    def _look_at_call(self, step: v.Smc) -> None:
        facts = self._facts
        self._serving = VmId(step.domain + 1)
        self._request = None
        facts.function = step.regs[0] & 0xFFFFFFFF
        facts.words = tuple(step.regs)
        facts.dying = step.domain in self._dying
        facts.failing, facts.flipping = self.machine.failing, self.machine.memory(step.domain).flipping
        guest = self.mediator.guests.get(VmId(step.domain + 1))
        if guest is None:
            return
        pair = (step.regs[1] & 0xFFFFFFFF) << 32 | step.regs[2] & 0xFFFFFFFF
        if facts.function == Function.RETURN_FROM_RPC:
            call = guest.suspended.get(ThreadId(step.regs[3] & 0xFFFFFFFF))
            if call is not None:
                if call.rpc == RpcReturn.ALLOC and not pair & PAGE_MASK and _given(step.regs) in guest.arguments:
                    # The recorded mediator looks the page up before it sees that the cookie is in use.
                    self.machine.memory(step.domain).look_up(pair >> PAGE_SHIFT)
                facts.command = call.command
                facts.message = call.ipa
                if call.argument is not None and call.rpc == RpcReturn.CMD:
                    facts.other_cookie = pair != call.argument.cookie
                    self._request = bytes(call.argument.page.view)
                    self._look_at_reply(self._guest_bytes(step.domain, call.argument.ipa, PAGE_SIZE))
        elif facts.function == Function.CALL_WITH_ARG:
            facts.message = pair
            data = self._guest_bytes(step.domain, pair, PAGE_SIZE)
            if data is not None:
                note_message(facts, data)

    def _look_back(self, step: v.Smc, memory: VectorMemory, reply: Reply | None, forwarded: list[v.Forwarded]) -> None:
        facts = self._facts
        if memory.message is not None and facts.function == Function.CALL_WITH_ARG:
            note_message(facts, memory.message)
        elif memory.message is not None and self._request is not None and len(memory.message) >= HEADER_SIZE:
            self._look_at_reply(memory.message.ljust(PAGE_SIZE, b"\0"))
        if reply is not None and reply.regs[0] == 0 and not forwarded and facts.function == Function.CALL_WITH_ARG:
            facts.rejected = True
            facts.refused_list = lists_named(facts) > 0
            facts.left = memory.message or b""
        facts.still_failing = self.machine.failing
        facts.page_refused = any(each.resumes == "ALLOC" and not each.sym for each in forwarded)
        facts.unaligned, facts.null_page = memory.unaligned, memory.null
        facts.unreadable_reply, facts.changed_between = memory.unreadable, memory.changed_between
        own = None if facts.message is None else facts.message >> PAGE_SHIFT
        facts.not_written_back = any(ipa >> PAGE_SHIFT == own for ipa in memory.unwritable)
        facts.not_delivered |= any(ipa >> PAGE_SHIFT != own for ipa in memory.unwritable)
        guest = self.mediator.guests.get(VmId(step.domain + 1))
        facts.isolated = guest is not None and guest.state is GuestState.ISOLATED

    def _look_at_reply(self, reply: bytes | None) -> None:
        facts, request = self._facts, self._request
        assert request is not None
        facts.reply_strays = reply is not None and strays(request, reply)
        commands = {HEADER.unpack_from(data)[0] for data in (request, reply) if data is not None}
        facts.answers_shm_alloc = RpcCommand.SHM_ALLOC in commands
        if reply is not None and facts.answers_shm_alloc:
            note_parameters(facts, reply)

    def _guest_bytes(self, domain: int, ipa: int, size: int) -> bytes | None:
        try:
            return self.machine.vms[domain].read(ipa, size)
        except Stage2Fault:
            return None

    def _note(self, ticket: Ticket, answer: Regs) -> None:
        a0 = answer[0] & 0xFFFFFFFF
        facts = self._facts
        if isinstance(ticket, Call) and (a0 >> 16 != 0xFFFF or a0 == 0xFFFFFFFF):
            if a0:
                # We write nothing back; the recorded mediator looks the page up to write.
                self.machine.memory(ticket.guest.vm - 1).look_up(ticket.ipa >> PAGE_SHIFT)
            facts.final_answer = a0
            facts.command = ticket.command
            facts.message = ticket.ipa
            sent = None if ticket.shadow is None else self._secure.end(ticket.shadow.pa)
            if sent is not None:
                facts.result_left = a0 == 0 and not sent.has_result
                facts.rewritten, facts.addresses, facts.sent = sent.rewritten, sent.addresses, sent.text
                facts.left = self._secure.left(sent)
                facts.null_names_buffer = any(Cookie(each) in ticket.guest.buffers for each in sent.null_cookies)
            if ticket.command is Command.UNREGISTER_SHM and a0 == 0:
                self._look_at_name(ticket, ticket.cookie)
        elif isinstance(ticket, Call) and a0 == RpcReturn.CMD:
            argument = ticket.guest.arguments.get(Cookie((answer[1] & 0xFFFFFFFF) << 32 | answer[2] & 0xFFFFFFFF))
            if argument is not None and HEADER.unpack_from(argument.page.view)[0] == RpcCommand.SHM_FREE:
                self._look_at_name(ticket, Cookie(PARAM.unpack_from(argument.page.view, HEADER_SIZE)[2]))

    def _look_at_name(self, call: Call, cookie: Cookie) -> None:
        buffer = call.guest.buffers.get(cookie)
        if buffer is not None and buffer.state in (BufferState.PINNED, BufferState.REGISTERING):
            self._facts.names_another_calls_buffer = True

    # What we hold

    def _pins(self, domain: int) -> dict[str, dict[str, int]]:
        pins = {hex(gfn): count for gfn, count in sorted(self.machine.gfn_pins(domain).items())}
        return {str(domain): pins}

    def _state(self, domain: int) -> v.State:
        guest = self.mediator.guests.get(VmId(domain + 1))
        if guest is None:
            return v.State()
        return v.State(
            call_count=guest.ledger.calls,
            quota_pages=guest.ledger.pages,
            quota_bufs=guest.ledger.buffers,
            rpc_bufs=guest.ledger.rpc_arguments,
            shm_bufs=[
                v.SharedBuffer(cookie=cookie, pages=shared.pages[cookie], has_page_list=bool(shared.lists))
                for cookie, shared in guest.buffers.items()
            ],
        )


def _given(regs: Sequence[int]) -> Cookie:
    """The cookie that a guest gives with a page, in a4:a5."""
    return Cookie((regs[4] & 0xFFFFFFFF) << 32 | regs[5] & 0xFFFFFFFF)
