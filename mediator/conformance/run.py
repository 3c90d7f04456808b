"""Run a vector against our core: the guests' side and the recorded secure world in, what we did out.

What comes out has the vector format itself, so that comparing is a matter of two records, and our own run can
be written as a vector file.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from hv_models.memory import PAGE_SHIFT, PAGE_SIZE
from mediator.conformance import vectors as v
from mediator.conformance.machine import VectorMachine
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.records import Call
from mediator.core.states import BufferState, GuestState
from mediator.core.steps import Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.invariants import Checker
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    NONCONTIG,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    ParamType,
    list_pages,
    page_count,
)
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Cookie, Function, RpcReturn, ThreadId, VmId

NOT_HANDLED: Final = 0xFFFFFFFFFFFFFFFF
ENOMEM: Final = -12
ENODEV: Final = -19
_RC: Final = {0: 0, 6: ENOMEM}
_TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_RESUMES: Final = {
    RpcReturn.ALLOC: "ALLOC",
    RpcReturn.CMD: "CMD",
    RpcReturn.FOREIGN_INTR: "INTR",
    RpcReturn.FREE: "FREE",
}
_VALUE_OUTPUTS: Final = (ParamType.VALUE_OUTPUT, ParamType.VALUE_INOUT)
_SIZE_OUTPUTS: Final = (ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)
_NO_ANSWER: Final = (0, 0, 0, 0)
_MERGE: Final = 8
"""Changed runs that are closer than this are written as one, as in the recorded files."""


@dataclass(slots=True)
class Facts:
    """What a declaration of an intended difference may ask about a step."""

    function: int = 0
    command: int | None = None
    attributes: tuple[int, ...] = ()
    pointers: tuple[int, ...] = ()
    cookies: tuple[int, ...] = ()
    final_answer: int | None = None
    asked_free: bool = False
    reply_strays: bool = False
    """An RPC reply differs from the saved request in more than what normal world may write."""
    names_another_calls_buffer: bool = False
    """An UNREGISTER_SHM that succeeded, or a SHM_FREE, names a buffer that a live call made for itself."""


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
        self.extra_forwards = 0
        self._names: dict[int, str] = {}
        self._shadows: dict[str, int] = {}
        self._facts = Facts()
        self._serving = VmId(0)

    def close(self) -> None:
        """Give back the machine."""
        self.machine.close()

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
        request = self.checker.create(VmId(step.domain + 1), memory)
        reply, forwarded = self._drive(request, step.out.forwarded, None)
        rc = ENODEV if reply is None else _RC.get(reply.regs[0], ENODEV)
        return v.Create(op="create", domain=step.domain, out=v.CreateOut(rc=rc, forwarded=forwarded))

    def _smc(self, step: v.Smc) -> Observed:
        self.machine.memory(step.domain)
        for write in step.mem_writes:
            self.machine.write(step.domain, write)
        before = {domain: self.machine.image(domain) for domain in self.machine.vms}
        self._look_at_message(step)
        request = self.checker.submit(VmId(step.domain + 1), 0, tuple(step.regs))
        reply, forwarded = self._drive(request, step.out.forwarded, step.domain)
        regs = list(step.regs) if reply is None else list(reply.regs)
        handled = regs[0] != NOT_HANDLED
        changes: list[v.Change] = []
        difference = None
        for domain, old in before.items():
            base = self.machine.described[domain].base_gfn << PAGE_SHIFT
            new = self.machine.image(domain)
            if new != old:
                changes.extend(_changes(domain, base, old, new))
            expected = bytearray(old)
            for change in step.out.mem_changes:
                if change.domain == domain and base <= change.ipa < base + len(old):
                    expected[change.ipa - base : change.ipa - base + len(change.hex)] = change.hex
            if expected != new and difference is None:
                difference = _first(base, bytes(expected), new)
        out = v.SmcOut(
            handled=handled,
            regs=regs if handled else [NOT_HANDLED, *step.regs[1:]],
            forwarded=forwarded,
            mem_changes=changes,
            pins=self._pins(step.domain),
            state=self._state(step.domain),
        )
        done = v.Smc(op="smc", domain=step.domain, regs=step.regs, mem_writes=step.mem_writes, out=out)
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
        while not isinstance(step, Reply):
            if isinstance(step, Queue):
                return None, done
            if isinstance(step, Preempt):
                step = self.checker.proceed(step.ticket)
                continue
            assert isinstance(step, Forward)
            record = recorded[len(done)] if len(done) < len(recorded) else None
            observed = self._forward(step, record, domain)
            done.append(observed)
            if record is None:
                self.extra_forwards += 1
            answer: Regs = _NO_ANSWER if record is None else tuple(record.answer.ret)
            if record is not None:
                self._write(record.answer)
            self._note(step.ticket, answer)
            step = self.checker.returned(step.ticket, answer)
        if domain is not None and not done and step.regs[0] == RpcReturn.CMD:
            self._facts.asked_free = True
        return step, done

    def _forward(self, step: Forward, record: v.Forwarded | None, domain: int | None) -> v.Forwarded:
        regs = list(step.regs)
        pa = regs[1] << 32 | regs[2]
        symbol = None if record is None else record.sym.get("a1:a2")
        sym: dict[str, str] = {}
        arg = rpc_arg = None
        cookie: int | None = None
        resumes: str | None = None
        guest = None if domain is None else self.mediator.guests.get(VmId(domain + 1))
        if guest is not None and regs[0] == Function.CALL_WITH_ARG:
            name = symbol if symbol is not None and symbol.startswith("arg:") else f"arg:{len(self._shadows)}"
            self._names[pa] = name
            self._shadows[name] = pa
            sym["a1:a2"] = name
            arg = self._shadow(pa)
        elif guest is not None and regs[0] == Function.RETURN_FROM_RPC:
            call = step.ticket
            assert isinstance(call, Call)
            resumes = _RESUMES.get(RpcReturn(call.rpc)) if call.rpc in _RESUMES else f"UNKNOWN{call.rpc & 0xFFFF:x}"
            if resumes == "ALLOC" and pa:
                given = regs[4] << 32 | regs[5] & 0xFFFFFFFF
                argument = guest.arguments.get(Cookie(given))
                if argument is not None and argument.page.pa == pa:
                    sym["a1:a2"] = f"rpc:{given:x}"
            elif resumes == "CMD" and call.argument is not None:
                cookie = call.argument.cookie
                rpc_arg = self._shadow(call.argument.page.pa)
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

    def _shadow(self, pa: int) -> v.Shadow:
        """A message or RPC argument as the secure world sees it."""
        frame = self.machine.machine.memory.frame(pa)
        num_params = HEADER.unpack_from(frame)[7]
        size = min(HEADER_SIZE + PARAM_SIZE * num_params, PAGE_SIZE)
        data = bytearray(frame[:size])
        lists: dict[int, v.Translated] = {}
        for index, (attribute, pointer, length, _) in enumerate(PARAM.iter_unpack(bytes(data[HEADER_SIZE:]))):
            if attribute & TYPE_MASK in _TMEM and attribute & NONCONTIG and pointer:
                offset = pointer & (PAGE_SIZE - 1)
                pages = page_count(length, offset)
                at = HEADER_SIZE + PARAM_SIZE * index + 8
                data[at : at + 8] = offset.to_bytes(8, "little")
                lists[index] = v.Translated(
                    offset=offset,
                    n_pages_from_size=pages,
                    list_pages=list_pages(pages),
                    pages=list(self._pages(pointer - offset, pages)),
                )
        return v.Shadow(
            owner="mediator" if pa in self.machine.machine.pages else "guest",
            hex=bytes(data),
            num_params=num_params,
            translated=lists,
        )

    def _pages(self, page: int, left: int) -> Iterator[tuple[int, int]]:
        """Domain and guest frame of each entry of a page list of ours; (-1, 0) for what is nobody's."""
        while left > 0 and page in self.machine.machine.pages:
            words = np.frombuffer(self.machine.machine.memory.frame(page), "<u8")
            part = min(left, ENTRIES_PER_PAGE)
            for word in words[:part].tolist():
                yield self.machine.owner(word) or (-1, 0)
            left -= part
            page = int(words[ENTRIES_PER_PAGE])

    def _write(self, answer: v.Answer) -> None:
        """What the scripted secure world writes before it answers."""
        for target, offset, data in answer.writes:
            kind, _, rest = target.partition(":")
            pa = self._shadows.get(target)
            if kind == "rpc":
                pa = self._argument(int(rest, 16))
            if pa is not None:
                self.machine.machine.memory.frame(pa)[offset : offset + len(data)] = data

    def _argument(self, cookie: int) -> int | None:
        """Our page for an RPC argument of the guest that is being served."""
        guest = self.mediator.guests.get(self._serving)
        argument = None if guest is None else guest.arguments.get(Cookie(cookie))
        return None if argument is None else int(argument.page.pa)

    # Facts for declarations

    def _look_at_message(self, step: v.Smc) -> None:
        facts = self._facts
        self._serving = VmId(step.domain + 1)
        facts.function = step.regs[0] & 0xFFFFFFFF
        guest = self.mediator.guests.get(VmId(step.domain + 1))
        if guest is None:
            return
        if facts.function == Function.RETURN_FROM_RPC:
            call = guest.suspended.get(ThreadId(step.regs[3] & 0xFFFFFFFF))
            if call is not None:
                facts.command = call.command
                if call.argument is not None and call.rpc == RpcReturn.CMD:
                    reply = self._guest_bytes(step.domain, call.argument.ipa, PAGE_SIZE)
                    facts.reply_strays = reply is not None and _strays(bytes(call.argument.page.view), reply)
        elif facts.function == Function.CALL_WITH_ARG:
            ipa = (step.regs[1] & 0xFFFFFFFF) << 32 | step.regs[2] & 0xFFFFFFFF
            data = self._guest_bytes(step.domain, ipa, PAGE_SIZE)
            if data is not None:
                header = HEADER.unpack_from(data)
                facts.command = header[0]
                params = list(PARAM.iter_unpack(data[HEADER_SIZE:][: PARAM_SIZE * min(header[7], 127)]))
                facts.attributes = tuple(param[0] for param in params)
                facts.pointers = tuple(param[1] for param in params)
                facts.cookies = tuple(param[3] for param in params)

    def _guest_bytes(self, domain: int, ipa: int, size: int) -> bytes | None:
        vm = self.machine.vms[domain]
        for ram in vm.ram:
            if ram.base <= ipa and ipa + size <= ram.base + ram.size:
                return ram.read(ipa, size)
        return None

    def _note(self, ticket: Ticket, answer: Regs) -> None:
        a0 = answer[0] & 0xFFFFFFFF
        if isinstance(ticket, Call) and (a0 >> 16 != 0xFFFF or a0 == 0xFFFFFFFF):
            self._facts.final_answer = a0
            self._facts.command = ticket.command
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
                v.SharedBuffer(cookie=buffer.cookie, pages=buffer.pages, has_page_list=bool(buffer.lists))
                for buffer in guest.buffers.values()
            ],
        )


def _strays(request: bytes, reply: bytes) -> bool:
    """Whether a reply changes more than ret, ret_origin, output values and sizes (for SHM_ALLOC: its parameter)."""
    asked, answered = HEADER.unpack_from(request), HEADER.unpack_from(reply)
    if asked[:5] != answered[:5] or asked[7] != answered[7]:
        return True
    if asked[0] == RpcCommand.SHM_ALLOC and answered[5] == 0:
        return bool(asked[7] != 1 or PARAM.unpack_from(reply, HEADER_SIZE)[0] != ParamType.TMEM_OUTPUT | NONCONTIG)
    for at in range(HEADER_SIZE, HEADER_SIZE + PARAM_SIZE * asked[7], PARAM_SIZE):
        before, after = PARAM.unpack_from(request, at), PARAM.unpack_from(reply, at)
        kind = before[0] & TYPE_MASK
        if kind in _VALUE_OUTPUTS:
            before, after = before[:1], after[:1]
        elif kind in _SIZE_OUTPUTS:
            before, after = (*before[:2], before[3]), (*after[:2], after[3])
        if before != after:
            return True
    return False


def _changes(domain: int, base: int, old: bytes, new: bytes) -> Iterator[v.Change]:
    """Runs of bytes that differ; runs that are close together are one."""
    differing = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    if not len(differing):
        return
    gaps = np.flatnonzero(np.diff(differing) >= _MERGE)
    starts = [int(differing[0]), *differing[gaps + 1].tolist()]
    ends = [*differing[gaps].tolist(), int(differing[-1])]
    for start, end in zip(starts, ends, strict=True):
        yield v.Change(domain=domain, ipa=base + start, hex=new[start : end + 1])


def _first(base: int, expected: bytes, got: bytes) -> tuple[str, str]:
    at = int(np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(got, np.uint8))[0])
    return (
        f"{base + at:#x}: {expected[at : at + 16].hex()}",
        f"{base + at:#x}: {got[at : at + 16].hex()}",
    )
