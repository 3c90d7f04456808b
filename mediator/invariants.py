"""The invariants, checked from outside the core after every step.

The checker stands where the shell stands: it makes the requests, sees each step, and counts what the
hypervisor and the secure world hold, not what the core's own books say. Source: the list of eleven invariants
in the fault model.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np

from hv_models.memory import PAGE_SIZE
from mediator.core.ledger import Ledger
from mediator.core.mediator import Lifecycle, Mediator
from mediator.core.policy import Policy, PolicyLimits
from mediator.core.ports import GuestMemory
from mediator.core.records import Call, Guest, Pins
from mediator.core.sharing import LISTS_PER_STEP
from mediator.core.states import ArgumentState, CallState, GuestState
from mediator.core.steps import (
    GUEST_ISOLATED,
    GUEST_QUARANTINED,
    SECURE_WORLD_FAULT,
    Forward,
    Queue,
    Regs,
    Reply,
    Step,
    Ticket,
)
from mediator.watched import WatchedMemory, words
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    NONCONTIG,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    ParamType,
    page_count,
)
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, RpcReturn, VmId

SCAN_EVERY: Final = 1000
"""Steps between two looks at everything; in between only what changed is looked at."""
WORK_PER_REQUEST: Final = MAX_PARAMS + LISTS_PER_STEP + 8
WORK_PER_PAGE: Final = 2
"""Invariant 10: accesses of one request to guest memory <= WORK_PER_PAGE * pages + WORK_PER_REQUEST."""

TITLES: Final = {
    1: "pins of a page = live objects that contain it",
    2: "pages of live objects = ledger; all zero after the guest is gone",
    3: "live calls of a guest = OP-TEE threads that it holds",
    4: "no host address is visible to a guest; no forwarded address is outside pinned or own pages",
    5: "one live object per guest, name space and cookie",
    6: "every request got exactly one final answer",
    7: "states move only along table edges",
    8: "guest bytes are read once per stage, and written only where outputs are",
    9: "OP-TEE sees only allowed functions, with a7 = the caller's id",
    10: "work of a request is bounded by its pages",
    11: "no error event was caused by a guest",
}

_SERVED: Final = (GuestState.LIVE, GuestState.PAUSED)
_LOW: Final = 0xFFFFFFFF
_TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_WITH_MESSAGE: Final = frozenset({int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG)})
_OF_THE_HOST: Final = frozenset(
    {int(Function.CALLS_UID), int(Function.GET_THREAD_COUNT), int(Function.VM_CREATED), int(Function.VM_DESTROYED)}
)
_SECURE_WORLD_EVENTS: Final = frozenset({SECURE_WORLD_FAULT, GUEST_ISOLATED, GUEST_QUARANTINED})


class Host(Protocol):
    """What the checker asks of the hypervisor model."""

    def pins(self, vm: VmId) -> Mapping[int, int]:
        """References per physical page, of the pages of this VM that have any."""
        ...

    def pin_count(self, vm: VmId) -> int:
        """Sum of the same."""
        ...

    def frame(self, pa: int) -> memoryview:
        """The 4096 bytes of the mediator's page with this address; KeyError if it is not the mediator's."""
        ...

    def own_address_in_ram(self, vm: VmId) -> tuple[int, int] | None:
        """IPA and value of a word in this VM's RAM that is the address of a page of the mediator's; None if none is."""
        ...

    def host_addresses(self) -> Sequence[tuple[int, int]]:
        """Ranges [first, end) of addresses that no guest can know."""
        ...


@dataclass(frozen=True, slots=True)
class Violation:
    """One violation: which invariant, whose, at which step, what was expected and what was found."""

    invariant: int
    guest: int | None
    step: int
    expected: str
    got: str

    def __str__(self) -> str:
        whose = "" if self.guest is None else f" guest {self.guest},"
        return (
            f"invariant {self.invariant} ({TITLES[self.invariant]}):{whose} step {self.step}: "
            f"expected {self.expected}, got {self.got}"
        )

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "invariant": self.invariant,
            "title": TITLES[self.invariant],
            "guest": self.guest,
            "step": self.step,
            "expected": self.expected,
            "got": self.got,
        }


class Checker:
    """A `Mediator` with somebody looking over its shoulder: the same requests, and `violations`.

    threads_held: how many threads OP-TEE holds for a client id; None if the secure world cannot be asked.
    thorough: look at everything that the invariants name. Otherwise only at what costs next to nothing: counts of
    objects against the ledger, registers, functions and client ids, answers, events, and that nothing is left.
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
        self.steps = 0
        self.forwards = 0
        self.translated = 0
        self.untranslated = 0
        self._threads_held = threads_held
        self._watched: dict[VmId, WatchedMemory] = {}
        self._ledgers: dict[VmId, Ledger] = {}
        self._open: Counter[VmId] = Counter()
        self._with_optee: dict[int, VmId] = {}

    @property
    def policy(self) -> Policy:
        """See `Mediator`."""
        return self.mediator.policy

    # The same requests as the mediator's

    def probe(self) -> Step:
        """See `Mediator.probe`."""
        return self._after(None, self.mediator.probe())

    def create(self, vm: VmId, memory: GuestMemory, limits: PolicyLimits | None = None, *, rpmb: bool = False) -> Step:
        """See `Mediator.create`."""
        watched = WatchedMemory(memory)
        known = vm in self.mediator.guests
        step = self.mediator.create(vm, watched if self.thorough else memory, limits, rpmb=rpmb)
        if not known:
            if self.thorough:
                self._watched[vm] = watched
            guest = self.mediator.guests.get(vm)
            if guest is not None:
                self._ledgers[vm] = guest.ledger
            self._open[vm] = 0
        return self._after(vm, step)

    def destroy(self, vm: VmId) -> Step:
        """See `Mediator.destroy`."""
        return self._after(vm, self.mediator.destroy(vm))

    def reset(self, vm: VmId) -> Step:
        """See `Mediator.reset`."""
        return self._after(vm, self.mediator.reset(vm))

    def abandon(self, vm: VmId) -> Step:
        """See `Mediator.abandon`."""
        return self._after(vm, self.mediator.abandon(vm))

    def pause(self, vm: VmId) -> bool:
        """See `Mediator.pause`."""
        return self.mediator.pause(vm)

    def resume(self, vm: VmId) -> bool:
        """See `Mediator.resume`."""
        return self.mediator.resume(vm)

    def give_back(self, ticket: Ticket) -> Step:
        """See `Mediator.give_back`."""
        guest: Guest | None = getattr(ticket, "guest", None)
        assert guest is not None
        return self._after(guest.vm, self.mediator.give_back(ticket), _asked(ticket))

    def notified(self) -> list[VmId]:
        """See `Mediator.notified`."""
        return self.mediator.notified()

    def submit(self, vm: VmId, vcpu: int, regs: Regs) -> Step:
        """See `Mediator.submit`."""
        self._begin(vm)
        step = self.mediator.submit(vm, vcpu, regs)
        if not isinstance(step, Queue):
            self._open[vm] += 1
        return self._after(vm, step, regs)

    def returned(self, ticket: Ticket, answer: Regs) -> Step:
        """See `Mediator.returned`."""
        vm = self._with_optee.pop(id(ticket), None)
        if vm is None:
            self._report(6, None, "a ticket that is with OP-TEE", "another one")
        else:
            self._begin(vm)
        step = self.mediator.returned(ticket, answer)
        return self._after(vm, step, _asked(ticket))

    def lost(self, ticket: Ticket, why: str) -> Step:
        """See `Mediator.lost`."""
        vm = self._with_optee.pop(id(ticket), None)
        return self._after(vm, self.mediator.lost(ticket, why), _asked(ticket))

    def proceed(self, ticket: Ticket) -> Step:
        """See `Mediator.proceed`."""
        guest: Guest | None = getattr(ticket, "guest", None)
        vm = None if guest is None else guest.vm
        if vm is not None:
            self._begin(vm)
        return self._after(vm, self.mediator.proceed(ticket), _asked(ticket))

    # Looking

    def scan(self, *, memory: bool = False) -> None:
        """Look at everything, whatever changed; with `memory` at all RAM of guests that write no addresses of ours."""
        if not self.thorough:
            return
        for vm, guest in self.mediator.guests.items():
            self._check_pins(vm, guest)
            if memory and (found := self.host.own_address_in_ram(vm)) is not None:
                self._report(4, vm, "no host address in guest memory", f"{found[1]:#x} at {found[0]:#x}")

    def _begin(self, vm: VmId) -> None:
        self.steps += 1
        watched = self._watched.get(vm)
        if watched is not None:
            watched.begin()

    def _report(self, invariant: int, vm: VmId | None, expected: str, got: str) -> None:
        self.violations.append(Violation(invariant, vm, self.steps, expected, got))

    def _after(self, vm: VmId | None, step: Step, asked: Regs | None = None) -> Step:
        for event in step.events:
            if event.level == "error" and event.name not in _SECURE_WORLD_EVENTS:
                self._report(11, VmId(event.vm), "no error event", event.name)
        if isinstance(step, Forward):
            self._check_forward(vm, step)
        elif isinstance(step, Reply) and asked is not None and vm is not None:
            self._open[vm] -= 1
            self._check_reply(vm, step, asked)
        if vm is not None:
            self._check_guest(vm)
        if self.steps % SCAN_EVERY == 0:
            self.scan()
        return step

    def _check_guest(self, vm: VmId) -> None:
        guest = self.mediator.guests.get(vm)
        watched = self._watched.get(vm)
        if guest is None:
            self._watched.pop(vm, None)
            ledger = self._ledgers.pop(vm, None)
            if ledger is not None and (count := self.host.pin_count(vm)):
                self._report(2, vm, "no pinned page after the guest is gone", f"{count} pins")
            if ledger is not None and any(ledger.sums().values()):
                self._report(2, vm, "all sums zero after the guest is gone", str(ledger.sums()))
            return
        if guest.ledger is not self._ledgers.get(vm):
            self._ledgers[vm] = guest.ledger
        ledger = guest.ledger
        if not self.thorough:
            counts = (len(guest.buffers), len(guest.arguments), len(guest.calls))
            if (ledger.buffers, ledger.rpc_arguments, ledger.calls) != counts:
                self._report(2, vm, f"buffers, RPC arguments, calls in the ledger: {counts}", str(ledger.sums()))
            return
        pages = sum(buffer.pages for buffer in guest.buffers.values())
        held = {
            "pages": pages,
            "buffers": len(guest.buffers),
            "rpc_arguments": len(guest.arguments),
            "calls": len(guest.calls),
            "memory": sum(
                held.charge.memory
                for objects in (guest.calls, guest.buffers, guest.arguments)
                for held in objects.values()
            ),
        }
        for name, count in held.items():
            if getattr(ledger, name) != count:
                self._report(2, vm, f"{count} {name} in the ledger", str(getattr(ledger, name)))
        expected = sum(len(pins.pinned.pas) for pins in _groups(guest)) + len(guest.arguments)
        count = self.host.pin_count(vm)
        if count != expected and not self.mediator.policy.shared_pages:
            self._report(1, vm, f"{expected} pins", str(count))
        translating = any(call.work is not None for call in guest.calls.values())
        if guest.state in _SERVED and not translating and expected != pages + len(guest.arguments):
            self._report(1, vm, f"{pages + len(guest.arguments)} pages in live objects", str(expected))
        for cookie, buffer in guest.buffers.items():
            if buffer.cookie != cookie:
                self._report(5, vm, f"the buffer {cookie:#x}", f"{buffer.cookie:#x}")
        for cookie, argument in guest.arguments.items():
            if argument.cookie != cookie:
                self._report(5, vm, f"the RPC argument {cookie:#x}", f"{argument.cookie:#x}")
        if self._threads_held is not None and guest.state in _SERVED:
            live = sum(call.state is not CallState.TRANSLATING for call in guest.calls.values())
            threads = self._threads_held(vm)
            with_optee = sum(owner == vm for owner in self._with_optee.values())
            if not live - with_optee <= threads <= live:
                self._report(3, vm, f"{live} threads", str(threads))
        if watched is not None:
            self._check_accesses(vm, guest, watched)

    def _check_accesses(self, vm: VmId, guest: Guest, watched: WatchedMemory) -> None:
        end = -1
        for start, size in sorted(watched.reads):
            if start < end:
                self._report(8, vm, "each byte read once", f"bytes at {start:#x} twice")
            end = max(end, start + size)
        for (pinned, start, size), (other, second, _) in pairwise(sorted(watched.loads)):
            if pinned == other and second < start + size:
                self._report(8, vm, "each byte read once", f"byte {second:#x} of a message's buffer twice")
        bound = WORK_PER_PAGE * watched.pages + WORK_PER_REQUEST
        if watched.accesses > bound:
            self._report(10, vm, f"at most {bound} accesses", str(watched.accesses))
        ranges = self.host.host_addresses()
        if not guest.calls and not watched.writes:
            watched.outputs.clear()
            watched.words.clear()
        arguments = {argument.ipa for argument in guest.arguments.values()}
        for at, data in watched.writes:
            page, offset = at - at % PAGE_SIZE, at % PAGE_SIZE
            fields = watched.outputs.get(page, ())
            written = offset + len(data)
            if at >= 0 and page not in arguments and not any(a <= offset and written <= b for a, b in fields):
                self._report(8, vm, "writes of outputs only", f"{len(data)} bytes at {at:#x}")
            for word in words(data):
                if word not in watched.words and any(first <= word < end for first, end in ranges):
                    self._report(4, vm, "no host address in guest memory", f"{word:#x} at {at:#x}")

    def _check_pins(self, vm: VmId, guest: Guest) -> None:
        expected: Counter[int] = Counter()
        for pins in _groups(guest):
            expected.update(pins.pinned.pas.tolist())
        for argument in guest.arguments.values():
            expected.update(argument.pinned.pas.tolist())
        held = dict(self.host.pins(vm))
        if held != expected:
            wrong = sorted(pa for pa in held.keys() | expected.keys() if held.get(pa, 0) != expected[pa])
            first = wrong[0]
            self._report(
                1, vm, f"{expected[first]} pins of {first:#x}", f"{held.get(first, 0)} ({len(wrong)} pages differ)"
            )

    def _check_reply(self, vm: VmId, step: Reply, asked: Regs) -> None:
        if self._open[vm] < 0 and vm in self.mediator.guests:
            self._report(6, vm, "one answer for each request", "one more")
            self._open[vm] = 0
        ranges = self.host.host_addresses()
        known = {*asked, (asked[1] & _LOW) << 32 | asked[2] & _LOW, (asked[4] & _LOW) << 32 | asked[5] & _LOW}
        known.update(self.mediator.guests[vm].arguments if vm in self.mediator.guests else ())
        pair = (step.regs[1] & _LOW) << 32 | step.regs[2] & _LOW
        for word in (*step.regs[:4], pair):
            if word not in known and any(first <= word < end for first, end in ranges):
                self._report(4, vm, "no host address in registers", f"{word:#x}")

    def _check_forward(self, vm: VmId | None, step: Forward) -> None:
        self.forwards += 1
        regs = step.regs
        function = regs[0]
        if isinstance(step.ticket, Lifecycle):
            self._with_optee[id(step.ticket)] = vm or VmId(0)
            if function not in _OF_THE_HOST or regs[7] != 0:
                self._report(9, vm, "a call of the host with a7 = 0", f"{function:#x}, a7 = {regs[7]:#x}")
            return
        assert vm is not None
        self._with_optee[id(step.ticket)] = vm
        if regs[7] != vm:
            self._report(9, vm, f"a7 = {vm}", f"{regs[7]:#x}")
        allowed = self.mediator.policy.functions
        if not any(int(known) == function for known in allowed):
            self._report(9, vm, "an allowed function", f"{function:#x}")
        if not self.thorough:
            return
        if function in _WITH_MESSAGE:
            self._check_message(vm, (regs[1] << 32) | regs[2], 0)
        elif isinstance(step.ticket, Call) and step.ticket.rpc == RpcReturn.CMD:
            self._check_argument(vm, step.ticket)
        elif isinstance(step.ticket, Call) and step.ticket.rpc == RpcReturn.ALLOC and (regs[1] or regs[2]):
            self._own(vm, (regs[1] << 32) | regs[2])

    def _own(self, vm: VmId, pa: int) -> memoryview | None:
        try:
            return self.host.frame(pa)
        except KeyError:
            self._report(4, vm, "a page of the mediator's own", f"{pa:#x}")
            self.untranslated += 1
            return None

    def _check_argument(self, vm: VmId, call: Call) -> None:
        """The answer to SHM_ALLOC that OP-TEE finds: it has a page list."""
        page, base = None, 0
        if call.rpc_offset:
            page, base = call.shadow, call.rpc_offset
        elif call.argument is not None and call.argument.state is ArgumentState.LIVE:
            page = call.argument.page
        if page is not None:
            header = HEADER.unpack_from(page.view, base)
            if header[0] == RpcCommand.SHM_ALLOC and header[5] == Result.SUCCESS:
                self._check_message(vm, page.pa, base)

    def _check_message(self, vm: VmId, pa: int, base: int) -> None:
        frame = self._own(vm, pa)
        if frame is None:
            return
        count = HEADER.unpack_from(frame, base)[7]
        pins: Mapping[int, int] | None = None
        for attribute, pointer, size, _ in PARAM.iter_unpack(
            frame[base + HEADER_SIZE : base + HEADER_SIZE + PARAM_SIZE * count]
        ):
            if attribute & TYPE_MASK not in _TMEM or pointer == 0:
                continue
            if not attribute & NONCONTIG:
                self._report(4, vm, "a page list", f"the address {pointer:#x}")
                continue
            pins = self.host.pins(vm) if pins is None else pins
            self._check_list(vm, pointer, size, pins)

    def _check_list(self, vm: VmId, pointer: int, size: int, pins: Mapping[int, int]) -> None:
        left = page_count(size, pointer % PAGE_SIZE)
        page = pointer - pointer % PAGE_SIZE
        while left:
            frame = self._own(vm, page)
            if frame is None:
                return
            words = np.frombuffer(frame, np.uint64)
            part = min(left, ENTRIES_PER_PAGE)
            for entry in words[:part].tolist():
                self.translated += 1
                if entry not in pins:
                    self.untranslated += 1
                    self._report(4, vm, "a pinned page of this guest", f"{entry:#x}")
                    return
            left -= part
            page = int(words[ENTRIES_PER_PAGE])


def _asked(ticket: Ticket) -> Regs | None:
    """The registers of the guest's call that a ticket stands for; None for a request of the host."""
    regs: Regs | None = getattr(ticket, "regs", None)
    return regs


def _groups(guest: Guest) -> list[Pins]:
    """What was pinned for the live buffers, each pin once."""
    return list({id(pins): pins for buffer in guest.buffers.values() for pins in buffer.pins}.values())
