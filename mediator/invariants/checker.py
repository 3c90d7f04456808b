"""A mediator with somebody looking over its shoulder: what each step touched, and everything now and then."""

from collections.abc import Callable
from typing import Final, TypeVar

from hv_models.memory import PAGE_MASK
from mediator.core.flow import Flow
from mediator.core.lifecycle import Lifecycle
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy, PolicyLimits
from mediator.core.ports import GuestMemory
from mediator.core.records import Guest
from mediator.core.states import GuestState
from mediator.core.steps import (
    GUEST_ISOLATED,
    GUEST_QUARANTINED,
    SECURE_WORLD_FAULT,
    Forward,
    Preempt,
    Queue,
    Regs,
    Reply,
    Step,
    Ticket,
)
from mediator.invariants.host import Addresses, Host
from mediator.invariants.lifecycles import Move
from mediator.invariants.outside import LOW, WITH_MESSAGE, addresses_in, is_rpc, read_text
from mediator.invariants.violations import Violation
from mediator.invariants.watched import WatchedMemory, Work
from mediator.invariants.witness import Witness, in_flight
from optee.abi.smc import Function, VmId

SCAN_EVERY: Final = 1000
"""Steps between two looks at everything; in between only what a step touched is looked at."""
EXAMINE_EVERY: Final = 64
"""Steps between two looks at all objects of the guest whose step it is."""
_NO_WORK: Final = Work()
_NOT_HANDLED: Final = 0xFFFFFFFFFFFFFFFF
_SERVED: Final = (GuestState.LIVE, GuestState.PAUSED)
_OF_THE_HOST: Final = frozenset(
    {int(Function.CALLS_UID), int(Function.GET_THREAD_COUNT), int(Function.VM_CREATED), int(Function.VM_DESTROYED)}
)
_SECURE_WORLD_EVENTS: Final = frozenset({SECURE_WORLD_FAULT, GUEST_ISOLATED, GUEST_QUARANTINED})


S = TypeVar("S", bound=Step)


class Request:
    """An SMC of a guest, or a request of the host, that is not answered yet."""

    __slots__ = ("regs", "step", "vcpu", "vm", "with_optee", "work")

    def __init__(self, vm: VmId | None, vcpu: int, step: int, regs: Regs | None, work: Work) -> None:
        self.vm = vm
        self.vcpu = vcpu
        self.step = step
        self.regs = regs
        self.work = work
        self.with_optee = False


class Checker:
    """A `Mediator` with somebody looking over its shoulder: the same requests, and `violations`.

    threads_held: how many threads OP-TEE holds for a client id; None if the secure world cannot be asked.
    thorough: look at everything that the invariants name. Otherwise only at what costs next to nothing: counts of
    objects against the ledger, registers, functions and client ids, where messages and page lists stand, answers,
    events, and that nothing is left.
    """

    def __init__(
        self,
        mediator: Mediator,
        host: Host,
        threads_held: Callable[[int], int] | None = None,
        *,
        thorough: bool = True,
    ) -> None:
        self.mediator = mediator
        self.host = host
        self.thorough = thorough
        self.violations: list[Violation] = []
        self.keep: int | None = None
        """Violations that are kept, the first ones; None: all."""
        self.violated = 0
        """How many there were, kept or not."""
        self.steps = 0
        self.forwards = 0
        self.translated = 0
        self.untranslated = 0
        self.addresses = Addresses(host)
        self.taken: set[Move] = set()
        """Edges of the state tables that were taken, as far as steps showed them one at a time."""
        self.threads_held = threads_held
        self._witnesses: dict[VmId, Witness] = {}
        self._guests: dict[VmId, Guest] = {}
        self._open: dict[Ticket, Request] = {}
        self._policy: Policy | None = None
        self._allowed: frozenset[int] = frozenset()

    @property
    def policy(self) -> Policy:
        """See `Mediator`."""
        return self.mediator.policy

    # The same requests as the mediator's

    def probe(self) -> Step:
        """See `Mediator.probe`."""
        return self._host_request(None, self.mediator.probe())

    def create(self, vm: VmId, memory: GuestMemory, limits: PolicyLimits | None = None, *, rpmb: bool = False) -> Step:
        """See `Mediator.create`."""
        if not self.thorough or vm in self.mediator.guests:
            return self._host_request(vm, self.mediator.create(vm, memory, limits, rpmb=rpmb))
        watched = WatchedMemory(memory)
        step = self.mediator.create(vm, watched, limits, rpmb=rpmb)
        if vm in self.mediator.guests:
            self.addresses.refresh()
            self._witnesses[vm] = Witness(self, vm, watched)
        return self._host_request(vm, step)

    def destroy(self, vm: VmId) -> Step:
        """See `Mediator.destroy`."""
        return self._host_request(vm, self.mediator.destroy(vm))

    def reset(self, vm: VmId) -> Step:
        """See `Mediator.reset`."""
        return self._host_request(vm, self.mediator.reset(vm))

    def abandon(self, vm: VmId) -> Step:
        """See `Mediator.abandon`."""
        return self._host_request(vm, self.mediator.abandon(vm))

    def pause(self, vm: VmId) -> bool:
        """See `Mediator.pause`."""
        done = self.mediator.pause(vm)
        self._after(vm, None)
        return done

    def resume(self, vm: VmId) -> bool:
        """See `Mediator.resume`."""
        done = self.mediator.resume(vm)
        self._after(vm, None)
        return done

    def give_back(self, ticket: Ticket) -> Reply:
        """See `Mediator.give_back`."""
        request = self._open[ticket]
        witness = None if request.vm is None else self._witnesses.get(request.vm)
        if witness is not None:
            witness.paused[ticket] = request.work
        return self._answered(ticket, request, self.mediator.give_back(ticket))

    @property
    def flow(self) -> Flow | None:
        """See `Mediator`."""
        return self.mediator.flow

    def turns(self, now: int) -> list[Ticket]:
        """See `Mediator.turns`."""
        return self.mediator.turns(now)

    def in_the_way(self, ticket: Ticket) -> bool:
        """See `Mediator.in_the_way`."""
        return self.mediator.in_the_way(ticket)

    def next_turn(self) -> int | None:
        """See `Mediator.next_turn`."""
        return self.mediator.next_turn()

    def notified(self) -> list[VmId]:
        """See `Mediator.notified`."""
        return self.mediator.notified()

    def submit(self, vm: VmId, vcpu: int, regs: Regs) -> Step:
        """See `Mediator.submit`."""
        self.steps += 1
        witness = self._witnesses.get(vm)
        resumed, work = (None, _NO_WORK) if witness is None else witness.begin(regs, self._guests.get(vm))
        request = Request(vm, vcpu, self.steps, regs, work)
        step = self.mediator.submit(vm, vcpu, regs)
        if witness is not None and not (isinstance(step, Queue) and step.ticket is None):
            witness.submitted(regs, resumed, step)
        return self._answered(None, request, step)

    def returned(self, ticket: Ticket, answer: Regs) -> Step:
        """See `Mediator.returned`."""
        self.steps += 1
        request = self._open.get(ticket)
        if request is None or not request.with_optee:
            self.report(6, None if request is None else request.vm, "a ticket that is with OP-TEE", "another one")
            request = request or Request(None, 0, self.steps, None, _NO_WORK)
        request.with_optee = False
        witness = None if request.vm is None else self._witnesses.get(request.vm)
        kept = True
        if witness is not None:
            request.work = Work()
            kept = witness.answered(request.work, ticket, answer, of_the_host=isinstance(ticket, Lifecycle))
        elif not self.thorough:
            kept = False
        step = self.mediator.returned(ticket, answer)
        if isinstance(ticket, Lifecycle):
            kept = answer[0] & LOW == 0
        elif witness is not None and isinstance(step, Reply):
            self._check_end(request, ticket, answer, step)
        return self._answered(ticket, request, step, blame=not kept)

    def lost(self, ticket: Ticket, why: str) -> Step:
        """See `Mediator.lost`: whatever comes of it, the secure world is to blame."""
        self.steps += 1
        request = self._open.get(ticket)
        if request is None or not request.with_optee:
            self.report(6, None if request is None else request.vm, "a ticket that is with OP-TEE", "another one")
            request = request or Request(None, 0, self.steps, None, _NO_WORK)
        request.with_optee = False
        return self._answered(ticket, request, self.mediator.lost(ticket, why), blame=True)

    def proceed(self, ticket: Ticket) -> Step:
        """See `Mediator.proceed`."""
        self.steps += 1
        request = self._open.get(ticket)
        if request is None:
            self.report(6, None, "a ticket that was preempted", "another one")
            request = Request(None, 0, self.steps, None, _NO_WORK)
        witness = None if request.vm is None else self._witnesses.get(request.vm)
        if witness is not None:
            witness.proceed(request.work, ticket)
        return self._answered(ticket, request, self.mediator.proceed(ticket))

    # Looking

    def scan(self, *, memory: bool = False) -> None:
        """Look at everything, whatever changed; with `memory` at all RAM of guests that write no addresses of ours."""
        if not self.thorough:
            return
        self.addresses.refresh()
        for vm, guest in list(self.mediator.guests.items()):
            witness = self._witnesses.get(vm)
            if witness is not None:
                witness.addresses_changed()
                witness.examine(guest)
                witness.check_pins(guest)
            if memory and (found := self.host.own_address_in_ram(vm)) is not None:
                self.report(4, vm, "no host address in guest memory", f"{found[1]:#x} at {found[0]:#x}")

    def finish(self, *, memory: bool = False) -> None:
        """Nothing more will happen: as `scan`, and every request of a guest that lives has its answer."""
        self.scan(memory=memory)
        for request in self._open.values():
            if request.vm is not None and request.regs is not None and self._lives(request.vm):
                what = f"an answer to {request.regs[0] & LOW:#x}, asked by vCPU {request.vcpu} in step {request.step}"
                self.report(6, request.vm, what, "none")

    def is_open(self, ticket: Ticket) -> bool:
        """Whether a ticket stands for a request that is with OP-TEE, or has its turn again."""
        return ticket in self._open

    def report(self, invariant: int, vm: VmId | None, expected: str, got: str) -> None:
        """Note a violation."""
        self.violated += 1
        if self.keep is None or len(self.violations) < self.keep:
            self.violations.append(Violation(invariant, vm, self.steps, expected, got))

    # Each step

    def _lives(self, vm: VmId) -> bool:
        guest = self.mediator.guests.get(vm)
        return guest is not None and guest.state in _SERVED

    def _host_request(self, vm: VmId | None, step: Step) -> Step:
        return self._answered(None, Request(vm, 0, self.steps, None, _NO_WORK), step)

    def _answered(self, ticket: Ticket | None, request: Request, step: S, *, blame: bool = False) -> S:
        """A request got a step: an answer, or a ticket by which it goes on."""
        vm = request.vm
        if ticket is not None:
            self._open.pop(ticket, None)
        if isinstance(step, Forward | Preempt | Queue) and step.ticket is not None:
            if step.ticket in self._open:
                lost = self._open[step.ticket]
                self.report(6, lost.vm, f"an answer to the request of step {lost.step}", "another one with its ticket")
            self._open[step.ticket] = request
            witness = None if vm is None else self._witnesses.get(vm)
            if isinstance(step, Preempt):
                if witness is not None:
                    witness.outside.translating.add(step.ticket)
            elif isinstance(step, Forward):
                request.with_optee = True
                self._check_forward(request, step)
        elif isinstance(step, Reply) and vm is not None and request.regs is not None:
            self._check_reply(vm, step, request.regs)
            witness = self._witnesses.get(vm)
            if witness is not None and ticket is not None:
                witness.outside.told(ticket, step.regs)
        for event in step.events:
            if event.level == "error" and not (event.name in _SECURE_WORLD_EVENTS and (blame or not self.thorough)):
                self.report(11, VmId(event.vm), "no error event while OP-TEE keeps its contract", event.name)
        self._after(vm, request)
        return step

    def _after(self, vm: VmId | None, request: Request | None) -> None:
        if vm is not None:
            guest = self.mediator.guests.get(vm)
            known = self._guests.get(vm)
            if guest is not known:
                self._changed(vm, known, guest)
            witness = self._witnesses.get(vm)
            if witness is not None and guest is not None:
                witness.check(guest, request.work if request is not None else None)
                if self.steps % EXAMINE_EVERY == 0:
                    witness.examine(guest)
            elif guest is not None:
                self._count(vm, guest)
        if self.steps % SCAN_EVERY == 0:
            self.scan()

    def _changed(self, vm: VmId, known: Guest | None, guest: Guest | None) -> None:
        """A guest came, went, or began anew."""
        witness = self._witnesses.get(vm)
        if known is not None:
            if count := self.host.pin_count(vm):
                self.report(2, vm, "no pinned page after the guest is gone", f"{count} pins")
            if any(known.ledger.sums().values()):
                self.report(2, vm, "all sums zero after the guest is gone", str(known.ledger.sums()))
            if witness is not None:
                witness.gone(known)
        if guest is None:
            self._guests.pop(vm, None)
            self._witnesses.pop(vm, None)
        else:
            self._guests[vm] = guest
            if known is not None and witness is not None:
                self._witnesses[vm] = Witness(self, vm, witness.memory)

    def _count(self, vm: VmId, guest: Guest) -> None:
        """What costs next to nothing."""
        ledger = guest.ledger
        counts = (len(guest.buffers), len(guest.arguments), in_flight(guest, self.flow))
        if (ledger.buffers, ledger.rpc_arguments, ledger.calls) != counts:
            self.report(2, vm, f"buffers, RPC arguments, calls in the ledger: {counts}", str(ledger.sums()))

    def _check_end(self, request: Request, ticket: Ticket, answer: Regs, step: Reply) -> None:
        """A call that OP-TEE ended has ended, and one that it suspended has not."""
        vm = request.vm
        witness = None if vm is None else self._witnesses.get(vm)
        if vm is None or witness is None or not witness.yielding or not self._lives(vm):
            return
        if not is_rpc(answer[0]):
            if is_rpc(step.regs[0]):
                self.report(6, vm, "the end of a call that OP-TEE ended", f"{step.regs[0]:#x}")
        elif not is_rpc(step.regs[0]) or step.regs[3] & LOW != answer[3] & LOW:
            self.report(6, vm, f"an RPC of thread {answer[3] & LOW:#x}", f"{step.regs[0]:#x}, {step.regs[3]:#x}")

    def _check_reply(self, vm: VmId, step: Reply, asked: Regs) -> None:
        lowest = self.addresses.lowest
        regs = step.regs
        pair = (regs[1] & LOW) << 32 | regs[2] & LOW
        if regs[1] < lowest and regs[2] < lowest and regs[3] < lowest and pair < lowest and regs[0] < lowest:
            return
        known = {*asked, (asked[1] & LOW) << 32 | asked[2] & LOW, (asked[4] & LOW) << 32 | asked[5] & LOW}
        known.update(self.mediator.guests[vm].arguments if vm in self.mediator.guests else ())
        known.add(_NOT_HANDLED)
        for word in self.addresses.among(word for word in (*regs[:4], pair) if word not in known):
            self.report(4, vm, "no host address in registers", f"{word:#x}")

    def _check_forward(self, request: Request, step: Forward) -> None:
        self.forwards += 1
        regs = step.regs
        function = regs[0]
        vm = request.vm
        if isinstance(step.ticket, Lifecycle):
            if function not in _OF_THE_HOST or regs[7] != 0:
                self.report(9, vm, "a call of the host with a7 = 0", f"{function:#x}, a7 = {regs[7]:#x}")
            return
        assert vm is not None
        if regs[7] != vm:
            self.report(9, vm, f"a7 = {vm}", f"{regs[7]:#x}")
        if self.mediator.policy is not self._policy:
            self._policy = self.mediator.policy
            self._allowed = frozenset(map(int, self._policy.functions))
        if function not in self._allowed:
            self.report(9, vm, "an allowed function", f"{function:#x}")
        witness = self._witnesses.get(vm)
        if witness is not None:
            witness.forwarded(request.work, step)
        elif function in WITH_MESSAGE:
            self._check_message(vm, regs[1] << 32 | regs[2])

    def _check_message(self, vm: VmId, pa: int) -> None:
        """What costs next to nothing of invariant 4: a message and its page lists stand in pages of the mediator's."""
        try:
            for address in addresses_in(read_text(self.host.frame(pa)).params):
                self.host.frame(pa := address & ~PAGE_MASK)
        except KeyError:
            self.report(4, vm, "a page of the mediator's own", f"{pa:#x}")
