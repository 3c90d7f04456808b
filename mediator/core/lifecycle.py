"""Guests that come and go, and the search for OP-TEE before the first: the requests of the host."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Final

from mediator.core import yielding
from mediator.core.ledger import OverLimit
from mediator.core.limits import bounds
from mediator.core.policy import ANY_GUEST, PolicyLimits
from mediator.core.ports import GuestMemory
from mediator.core.records import Guest
from mediator.core.sharing import PAGES_PER_STEP, release_argument, release_shared
from mediator.core.states import GUEST_TABLE, CallEvent, GuestEvent, GuestState, advance
from mediator.core.steps import (
    GUEST_CREATED,
    GUEST_DESTROYED,
    GUEST_QUARANTINED,
    GUEST_REFUSED,
    SECURE_WORLD_FAULT,
    Event,
    Forward,
    Queue,
    Regs,
    Reply,
    Step,
    Ticket,
)
from optee.abi.smc import API_UID, HYPERVISOR_CLIENT_ID, Function, ReturnCode, VmId

if TYPE_CHECKING:
    from mediator.core.mediator import Mediator

MAX_VM: Final = 65535
"""OP-TEE looks at 16 bits of a client id."""
SMALLEST_RELEASE: Final = 512
"""Pages that the release of any buffer counts for: records cost time too."""

_LOW: Final = 0xFFFFFFFF
_UNKNOWN: Final = int(ReturnCode.UNKNOWN_FUNCTION)


class Lifecycle(Ticket):
    """A request of the host: probe, create, destroy or reset."""

    __slots__ = ("again", "guest", "stage", "threads", "work")

    def __init__(self, guest: Guest | None = None, *, again: bool = False) -> None:
        self.guest = guest
        self.stage = 0
        self.threads = 0
        self.again = again
        self.work: Generator[None, None, Step] | None = None


def probe() -> Step:
    """Begin to look for OP-TEE."""
    return _ask(Function.CALLS_UID, Lifecycle())


def create(core: "Mediator", vm: VmId, memory: GuestMemory, limits: PolicyLimits | None, *, rpmb: bool) -> Step:
    """Announce a VM to OP-TEE."""
    if not core.threads or not 0 < vm <= MAX_VM or vm in core.guests:
        return _reply(ReturnCode.ENOTAVAIL, Event(GUEST_REFUSED, "info", vm, {"why": "id in use or out of range"}))
    limits = limits or core.policy.limits
    try:
        ledger = core.new_ledger(bounds(limits, core.threads))
        core.pool.join(ledger)
    except OverLimit as over:
        why = "no memory for another guest" if over.resource == "memory" else f"the host's pool: {over}"
        detail = {"why": why, **over.words(), "answer": int(ReturnCode.ENOMEM)}
        return _reply(ReturnCode.ENOMEM, Event(GUEST_REFUSED, "info", vm, detail))
    owned = any(other.rpmb for other in core.guests.values())
    rpmb = core.policy.rpmb_owner == ANY_GUEST or (rpmb and not owned)
    guest = Guest(vm, memory, ledger, limits, rpmb=rpmb)
    core.enroll(guest)
    return _ask(Function.VM_CREATED, Lifecycle(guest))


def destroy(core: "Mediator", vm: VmId, *, again: bool) -> Step:
    """End a VM; again: and begin it anew with the same memory."""
    guest = core.guests.get(vm)
    if guest is None:
        return _reply(ReturnCode.OK)
    if guest.state is GuestState.CREATING:
        return Queue("the guest is created")
    if guest.state is GuestState.QUARANTINED and guest.in_flight:
        return Queue("the guest is released")
    if guest.state is not GuestState.DYING:
        advance(guest, GuestEvent.DESTROY, GUEST_TABLE)
        core.drop(guest)
    if guest.in_flight:
        return Queue("the calls that are with OP-TEE have returned")
    guest.in_flight += 1
    return _ask(Function.VM_DESTROYED, Lifecycle(guest, again=again))


def abandon(core: "Mediator", vm: VmId) -> Step:
    """Release a quarantined guest on the host's word."""
    guest = core.guests.get(vm)
    if guest is None or guest.state is not GuestState.QUARANTINED:
        return _reply(ReturnCode.ENOTAVAIL)
    if guest.in_flight:
        return Queue("the guest is released")
    guest.in_flight += 1
    ticket = Lifecycle(guest)
    ticket.work = _release(core, ticket, guest, GuestEvent.ABANDON)
    return core.proceed(ticket)


def returned(core: "Mediator", ticket: Lifecycle, answer: Regs) -> Step:
    """OP-TEE answered a request of the host."""
    guest = ticket.guest
    if guest is None:
        return _probe_returned(core, ticket, answer)
    ok = answer[0] & _LOW == 0
    if guest.state is GuestState.CREATING:
        advance(guest, GuestEvent.CREATED if ok else GuestEvent.REFUSED, GUEST_TABLE)
        if ok:
            return _reply(ReturnCode.OK, Event(GUEST_CREATED, "info", guest.vm, {}))
        core.forget(guest)
        return _reply(
            ReturnCode.ENOTAVAIL,
            Event(GUEST_REFUSED, "info", guest.vm, {"why": f"OP-TEE answered {answer[0] & _LOW:#x}"}),
        )
    if not ok:
        return _not_released(guest, f"VM_DESTROYED was answered {answer[0] & _LOW:#x}: pins are kept")
    ticket.work = _release(core, ticket, guest, GuestEvent.DESTROYED)
    return core.proceed(ticket)


def lost(core: "Mediator", ticket: Lifecycle, why: str) -> Step:
    """OP-TEE died of a request of the host, or cannot be reached any more."""
    if ticket.guest is not None and ticket.guest.state is not GuestState.CREATING:
        return _not_released(ticket.guest, f"{why}: pins are kept")
    return returned(core, ticket, (int(ReturnCode.ENOTAVAIL), 0, 0, 0))


def _probe_returned(core: "Mediator", ticket: Lifecycle, answer: Regs) -> Step:
    ticket.stage += 1
    words = tuple(word & _LOW for word in answer)
    if ticket.stage == 1 and words[:4] == API_UID:
        return _ask(Function.GET_THREAD_COUNT, ticket)
    if ticket.stage == 2 and words[0] == 0 and words[1]:
        ticket.threads = words[1]
        return _ask(Function.VM_DESTROYED, ticket)
    if ticket.stage == 3 and words[0] != _UNKNOWN:
        core.threads = ticket.threads
        if core.flow is not None:
            core.flow.threads = core.threads
        return _reply(ReturnCode.OK)
    return _reply(ReturnCode.ENOTAVAIL)


def _not_released(guest: Guest, why: str) -> Step:
    """OP-TEE did not let go of a guest (R24)."""
    guest.in_flight -= 1
    advance(guest, GuestEvent.DESTROY_REFUSED, GUEST_TABLE)
    return _reply(
        ReturnCode.EBUSY,
        Event(SECURE_WORLD_FAULT, "error", guest.vm, {"why": why}),
        Event(GUEST_QUARANTINED, "error", guest.vm, guest.ledger.sums()),
    )


def _release(core: "Mediator", ticket: Lifecycle, guest: Guest, event: GuestEvent) -> Generator[None, None, Step]:
    """OP-TEE has let go of the guest: release all it held, a bounded number of buffers at a time."""
    for call in list(guest.calls.values()):
        yielding.end(core, call, CallEvent.ABORT)
    for argument in list(guest.arguments.values()):
        release_argument(core.world, guest, argument)
    done = 0
    for shared in list(guest.buffers.values()):
        pages = sum(shared.pages.values())
        if done and done + pages > PAGES_PER_STEP:
            yield
            done = 0
        release_shared(core, guest, shared)
        done += max(pages, SMALLEST_RELEASE)
    guest.in_flight -= 1
    advance(guest, event, GUEST_TABLE)
    core.forget(guest)
    guest.events.append(Event(GUEST_DESTROYED, "info", guest.vm, guest.ledger.sums()))
    if ticket.again:
        return create(core, guest.vm, guest.memory, guest.limits, rpmb=guest.rpmb)
    return _reply(ReturnCode.OK)


def _ask(function: Function, ticket: Lifecycle) -> Step:
    """Ask OP-TEE in the host's name: about the guest, or about none."""
    vm = 0 if ticket.guest is None else ticket.guest.vm
    return Forward((int(function), vm, 0, 0, 0, 0, 0, HYPERVISOR_CLIENT_ID), ticket)


def _reply(code: ReturnCode, *events: Event) -> Reply:
    reply = Reply((int(code), 0, 0, 0, 0, 0, 0, 0))
    reply.events = events
    return reply
