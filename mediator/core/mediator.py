"""The mediator: a sans-IO state machine between guests and OP-TEE.

No clock, no socket, no log: requests go in, steps come out, and the shell around it does what they say. See
`mediator.core.steps` for the steps and `mediator.core.ports` for the two ports.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from mediator.core import fast, lifecycle, rpc, yielding
from mediator.core.faults import SecureWorldFault
from mediator.core.flow import Flow, Stand
from mediator.core.ledger import Ledger, Limits
from mediator.core.lifecycle import Lifecycle
from mediator.core.limits import change, check_same
from mediator.core.policy import Policy, PolicyLimits, Word, Words
from mediator.core.pool import Pool
from mediator.core.ports import GuestMemory, SecureWorld
from mediator.core.records import Call, Guest
from mediator.core.states import GUEST_TABLE, CallEvent, GuestEvent, GuestState, advance
from mediator.core.steps import (
    CALL_ADMITTED,
    CALL_DENIED,
    GUEST_ISOLATED,
    SECURE_WORLD_FAULT,
    Event,
    Forward,
    Preempt,
    Queue,
    Regs,
    Reply,
    Step,
    Ticket,
)
from optee.abi.message import HEADER_SIZE, PARAM_SIZE
from optee.abi.smc import Function, ReturnCode, RpcReturn, ThreadId, VmId

LOW: Final = 0xFFFFFFFF
NOT_HANDLED: Final = 0xFFFFFFFFFFFFFFFF
"""x0 of a call that nobody handles: all 64 bits set (R2)."""
DEFAULT_RPC_PARAMS: Final = 4
"""Parameters of an RPC argument behind a message until OP-TEE has said it (EXCHANGE_CAPABILITIES a3)."""

_YIELDING: Final = frozenset({Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG})
HANDLED: Final = _YIELDING | fast.FORWARDED | fast.LOCAL | {Function.RETURN_FROM_RPC}
"""Functions that a policy may allow."""
_PASS: Final = Word.PASS
_KEEP: Final = Word.KEEP
_LIVE: Final = GuestState.LIVE
_SERVED: Final = (GuestState.LIVE, GuestState.PAUSED)
_RETURN: Final = Function.RETURN_FROM_RPC
_UNKNOWN: Final = int(ReturnCode.UNKNOWN_FUNCTION)


class Mediator:
    """Between the guests of one host and its OP-TEE.

    Requests of guests are `submit`; requests of the host are `probe`, `create`, `destroy`, `reset`, `pause`,
    `resume`. Each returns a `Step`; `returned` and `proceed` go on with one.
    """

    def __init__(self, policy: Policy, world: SecureWorld, ledger: Callable[[Limits], Ledger] = Ledger) -> None:
        unhandled = policy.functions - HANDLED
        if unhandled:
            names = ", ".join(sorted(function.name for function in unhandled))
            raise ValueError(f"policy {policy.name}: the mediator does not handle {names}")
        self.policy = policy
        self.world = world
        self.threads = 0
        self.tracing = False
        """Whether events of level "debug" are wanted: which pages were pinned for what."""
        self.new_ledger = ledger
        self.pool = Pool(policy.pool_pages)
        self.flow = None if policy.flow is None else Flow(policy.flow)
        """Which calls wait, and for what; None without flow control."""
        self.learn_rpc_params(DEFAULT_RPC_PARAMS)
        self.commands = {int(command): command for command in policy.commands}
        self._guests: dict[VmId, Guest] = {}
        self._handlers = {int(function): function for function in policy.functions}
        self._words: dict[str, tuple[Words, bool]] = {
            name: (words, words == (Word.PASS, Word.PASS, Word.PASS)) for name, words in policy.answers.items()
        }
        self._identities = {function: self._words[function.name] for function in fast.FORWARDED}

    @property
    def guests(self) -> Mapping[VmId, Guest]:
        """The guests that are not gone, by client id; to look at, not to change."""
        return MappingProxyType(self._guests)

    def learn_rpc_params(self, count: int) -> None:
        """OP-TEE said how many parameters an RPC argument behind a message has room for."""
        self.rpc_argument_size = HEADER_SIZE + PARAM_SIZE * count

    # Requests of the host

    def probe(self) -> Step:
        """Find OP-TEE, its number of threads per guest, and whether it knows virtualization.

        Ends in a `Reply`: a0 is OK or ENOTAVAIL. Nothing else may be asked before it ended well.
        """
        return lifecycle.probe()

    def create(self, vm: VmId, memory: GuestMemory, limits: PolicyLimits | None = None, *, rpmb: bool = False) -> Step:
        """Announce a VM (R24). Ends in a `Reply`: a0 is OK, or ENOTAVAIL and there is no such guest.

        `vm` is 1..65535 and not in use (R1); `limits` are its own, if not the policy's. ENOMEM: there is no memory,
        or not enough in the host's pool for what is reserved for it. rpmb: the policy says that the RPMB device is this
        guest's; it has it unless another guest that lives does.
        """
        return lifecycle.create(self, vm, memory, limits, rpmb=rpmb)

    def change_limits(self, limits: Mapping[VmId, PolicyLimits], pool_pages: int | None) -> tuple[Event, ...]:
        """Give guests other limits, and the pool another size, all at once; say what has changed.

        Nothing that is held is revoked: what is new is refused until enough was given back (R21). A client id that
        is not in use is left out. Raises OverLimit, and changes nothing, where the pool cannot hold what is to be
        reserved.
        """
        return change(self, limits, pool_pages)

    def adopt(self, policy: Policy, limits: Mapping[VmId, PolicyLimits]) -> tuple[Event, ...]:
        """Go on under another policy, which differs from this one in limits and in how its flow control is
        set; `limits` are those of the guests.

        Raises ValueError for one that differs in more, OverLimit as `change_limits`; the old one stays then.
        """
        check_same(self.policy, policy)
        events = self.change_limits(limits, policy.pool_pages)
        self.policy = policy
        if self.flow is not None and policy.flow is not None:
            self.flow.policy = policy.flow
        return events

    def destroy(self, vm: VmId) -> Step:
        """End a VM at whatever point it is (R24). Ends in a `Reply`; an unknown id is answered OK.

        A `Queue` asks to come again when the calls that are with OP-TEE have returned.
        """
        return lifecycle.destroy(self, vm, again=False)

    def reset(self, vm: VmId) -> Step:
        """The VM starts anew with the same memory: everything of the old one is released (R28)."""
        return lifecycle.destroy(self, vm, again=True)

    def abandon(self, vm: VmId) -> Step:
        """The host's word that OP-TEE no longer touches a quarantined guest's memory: release it (R24)."""
        return lifecycle.abandon(self, vm)

    def pause(self, vm: VmId) -> bool:
        """Let the guest's calls wait (R28); False if it is not live."""
        guest = self._guests.get(vm)
        if guest is None or guest.state is not GuestState.LIVE:
            return False
        advance(guest, GuestEvent.PAUSE, GUEST_TABLE)
        if self.flow is not None:
            self.flow.pause(guest.lane)
        return True

    def resume(self, vm: VmId) -> bool:
        """End a pause; False if the guest is not paused."""
        guest = self._guests.get(vm)
        if guest is None or guest.state is not GuestState.PAUSED:
            return False
        advance(guest, GuestEvent.RESUME, GUEST_TABLE)
        if self.flow is not None:
            self.flow.unpause(guest.lane)
        return True

    def why_not_saved(self, vm: VmId) -> str | None:
        """Why this VM cannot be saved or migrated now; None if nothing of it is with OP-TEE (R28)."""
        guest = self._guests.get(vm)
        if guest is None:
            return None
        held = [f"{count} {name}" for name, count in guest.ledger.sums().items() if count and name != "memory"]
        return f"VM {vm} shares memory with OP-TEE: {', '.join(held)}" if held else None

    def notified(self) -> list[VmId]:
        """OP-TEE raised its notification interrupt: the guests to inject it into.

        OP-TEE has one interrupt for all guests and does not say whose it is; a guest without a pending
        value reads VALID = 0 from GET_ASYNC_NOTIF_VALUE.
        """
        return [vm for vm, guest in self._guests.items() if guest.notifications]

    # Requests of guests

    def submit(self, vm: VmId, vcpu: int, regs: Regs) -> Step:
        """A guest executed an SMC or HVC with x0..x7. Total: every input has an answer (R2, R25).

        vcpu: which one it was, for whoever looks on; calls are told apart by their tickets.
        """
        guest = self._guests.get(vm)
        if guest is None:
            return Reply((NOT_HANDLED, *regs[1:]))
        if guest.state is not _LIVE:
            if guest.state is GuestState.PAUSED:
                return Queue("the guest is resumed")
            return Reply((NOT_HANDLED, *regs[1:]))
        guest.counters.calls += 1
        function = self._handlers.get(regs[0] & LOW)
        if function is None:
            guest.counters.denied += 1
            step: Step = Reply((NOT_HANDLED, *regs[1:]))
            detail = {"function": regs[0] & LOW, "rule": "R2", "answer": _UNKNOWN}
            step.events = (Event(CALL_DENIED, "info", vm, detail),)
            return step
        if function in _YIELDING:
            step = yielding.enter(self, guest, regs, function)
        elif function is _RETURN:
            step = rpc.resume(self, guest, regs)
        else:
            step = fast.enter(self, guest, regs, function)
        if guest.events:
            _tell(guest, step)
        return step

    def returned(self, ticket: Ticket, answer: Regs) -> Step:
        """OP-TEE answered a `Forward` with x0..x3."""
        if isinstance(ticket, Call):
            guest = ticket.guest
            guest.in_flight -= 1
            try:
                step = self._call_returned(ticket, answer)
            except SecureWorldFault as fault:
                step = self._isolate(guest, ticket.regs, fault)
            if self.flow is not None and isinstance(step, Reply):
                self._leave(ticket)
        elif isinstance(ticket, fast.FastCall):
            guest = ticket.guest
            guest.in_flight -= 1
            if guest.state in _SERVED:
                step = fast.returned(self, ticket, answer)
            else:
                step = Reply((NOT_HANDLED, *ticket.regs[1:]))
        else:
            assert isinstance(ticket, Lifecycle)
            return lifecycle.returned(self, ticket, answer)
        if guest.events:
            _tell(guest, step)
        return step

    def lost(self, ticket: Ticket, why: str) -> Step:
        """OP-TEE died of a `Forward`, or cannot be reached any more: a fault of the secure world (R25)."""
        if isinstance(ticket, Lifecycle):
            return lifecycle.lost(self, ticket, why)
        assert isinstance(ticket, Call | fast.FastCall)
        guest = ticket.guest
        guest.in_flight -= 1
        if isinstance(ticket, Call):
            self._leave(ticket)
        if guest.state not in _SERVED:
            return Reply((NOT_HANDLED, *ticket.regs[1:]))
        step = self._isolate(guest, ticket.regs, SecureWorldFault(why))
        _tell(guest, step)
        return step

    def proceed(self, ticket: Ticket) -> Step:
        """Go on after a `Preempt`."""
        assert isinstance(ticket, Call | Lifecycle)
        guest = ticket.guest
        assert guest is not None
        step = self.work(ticket)
        if guest.events:
            _tell(guest, step)
        return step

    def turns(self, now: int) -> list[Ticket]:
        """Flow control: it is `now` nanoseconds; the waiting calls that `proceed` shall go on with, each once.

        To be asked before each `submit`, after each step that ends a call or a stay in the secure world, and at
        `next_turn`.
        """
        if self.flow is None:
            return []
        tickets = self.flow.turns(now)
        for ticket in tickets if self.tracing else ():
            assert isinstance(ticket, Call) and ticket.turn is not None
            detail = {"call": ticket.id, "waited_us": (self.flow.now - ticket.turn.since) // 1000}
            ticket.guest.events.append(Event(CALL_ADMITTED, "debug", ticket.guest.vm, detail))
        return tickets

    def in_the_way(self, ticket: Ticket) -> bool:
        """Flow control: give the vCPU of this waiting call back at once if the guest has no other left."""
        assert isinstance(ticket, Call)
        return self.flow is not None and ticket.turn is not None and self.flow.in_the_way(ticket.turn)

    def next_turn(self) -> int | None:
        """Flow control: when to ask for `turns` though nothing else happens."""
        return None if self.flow is None else self.flow.next_turn()

    def give_back(self, ticket: Ticket) -> Reply:
        """After a `Preempt`, or while the call waits: let the guest take its interrupts (R29).

        The guest comes back with RETURN_FROM_RPC and a thread id of our own, that OP-TEE gives nobody.
        """
        assert isinstance(ticket, Call)
        guest = ticket.guest
        if guest.state not in _SERVED or ticket.work is None:
            self._leave(ticket)
            return Reply((NOT_HANDLED, *ticket.regs[1:]))
        thread = ThreadId(rpc.OWN_THREADS + ticket.id % rpc.OWN_THREADS)
        ticket.thread = thread
        guest.suspended[thread] = ticket
        reply = self.suspended(ticket.regs, (int(RpcReturn.FOREIGN_INTR), 0, 0, thread))
        if self.flow is not None and ticket.turn is not None and ticket.turn.stand is Stand.WAITING:
            self.flow.away(ticket.turn)
        else:
            self._leave(ticket)
        return reply

    # For the modules of the core

    def work(self, ticket: Call | Lifecycle) -> Step:
        """Run a bounded piece of a call's or a request's work."""
        work = ticket.work
        if isinstance(ticket, Call) and (work is None or ticket.guest.state not in _SERVED):
            # Its guest died while others had their turn; what the call holds is released with the guest.
            ticket.work = None
            self._leave(ticket)
            return Reply((NOT_HANDLED, *ticket.regs[1:]))
        assert work is not None
        try:
            next(work)
        except StopIteration as stop:
            ticket.work = None
            step: Step = stop.value
            if self.flow is not None and isinstance(ticket, Call) and isinstance(step, Reply):
                self._leave(ticket)
            return step
        return Preempt(ticket)

    def _leave(self, call: Call) -> None:
        """A call goes back to its guest: its secure core, if flow control gave it one, is free."""
        if self.flow is not None and call.turn is not None:
            self.flow.leave(call.turn)

    def forward(self, call: Call, regs: Regs) -> Forward:
        """Send a yielding call on to OP-TEE."""
        guest = call.guest
        guest.in_flight += 1
        guest.counters.forwarded += 1
        return Forward(regs, call)

    def answer(self, function: Function, regs: Regs, answer: Regs) -> Reply:
        """What the guest sees of OP-TEE's answer to a fast call."""
        return _reply(self._identities[function], regs, answer)

    def completed(self, regs: Regs, answer: Regs) -> Reply:
        """What the guest sees when its yielding call ended."""
        return _reply(self._words["completed"], regs, answer)

    def suspended(self, regs: Regs, answer: Regs) -> Reply:
        """What the guest sees when its yielding call asks for an RPC."""
        return _reply(self._words["suspended"], regs, answer)

    def failed(self, regs: Regs, answer: Regs) -> Reply:
        """What the guest sees beside an error of OP-TEE in a0."""
        return _reply(self._words["failed"], regs, answer)

    def local(self, regs: Regs, code: int, *, keep: bool = False) -> Reply:
        """What the guest sees when the mediator answers itself."""
        if keep:
            return Reply((int(code), *regs[1:]))
        return _reply(self._words["local"], regs, (int(code), 0, 0, 0))

    def drop(self, guest: Guest) -> None:
        """None of the guest's calls waits any more."""
        if self.flow is not None:
            self.flow.drop(guest.lane)

    def enroll(self, guest: Guest) -> None:
        """A client id is in use from now on; what is reserved for it is in the pool already."""
        self._guests[guest.vm] = guest
        self._count_guests()

    def forget(self, guest: Guest) -> None:
        """A client id is free again, and so is what the pool kept for it."""
        del self._guests[guest.vm]
        self.pool.leave(guest.ledger)
        self._count_guests()

    def _count_guests(self) -> None:
        if self.flow is not None:
            self.flow.guests = len(self._guests)

    # The rest

    def _call_returned(self, call: Call, answer: Regs) -> Step:
        guest = call.guest
        a0 = answer[0] & LOW
        is_rpc = a0 >> 16 == 0xFFFF and a0 != _UNKNOWN
        if guest.state not in _SERVED:
            # The guest died meanwhile. A call that ended holds nothing more; one that waits for an RPC
            # is OP-TEE's until VM_DESTROYED.
            regs = call.regs
            if not is_rpc:
                yielding.end(self, call, CallEvent.COMPLETE)
            return Reply((NOT_HANDLED, *regs[1:]))
        if is_rpc:
            return rpc.suspended(self, call, answer)
        return yielding.completed(self, call, answer)

    def _isolate(self, guest: Guest, regs: Regs, fault: SecureWorldFault) -> Step:
        advance(guest, GuestEvent.ISOLATE, GUEST_TABLE)
        self.drop(guest)
        guest.events.append(Event(SECURE_WORLD_FAULT, "error", guest.vm, {"why": str(fault)}))
        guest.events.append(Event(GUEST_ISOLATED, "error", guest.vm, {}))
        return Reply((NOT_HANDLED, *regs[1:]))


def _reply(words: tuple[Words, bool], regs: Regs, answer: Regs) -> Reply:
    (w1, w2, w3), straight = words
    if straight:
        return Reply((answer[0], answer[1], answer[2], answer[3], regs[4], regs[5], regs[6], regs[7]))
    return Reply(
        (
            answer[0],
            answer[1] if w1 is _PASS else regs[1] if w1 is _KEEP else 0,
            answer[2] if w2 is _PASS else regs[2] if w2 is _KEEP else 0,
            answer[3] if w3 is _PASS else regs[3] if w3 is _KEEP else 0,
            *regs[4:],
        )
    )


def _tell(guest: Guest, step: Step) -> None:
    step.events = (*step.events, *guest.events)
    guest.events.clear()
