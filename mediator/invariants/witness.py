"""One guest, as the checker sees it: its memory, its objects, and what OP-TEE knows of it."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import Pinned
from mediator.core.fast import FastCall
from mediator.core.flow import Flow
from mediator.core.records import Call, Guest, Shared
from mediator.core.states import GuestState
from mediator.core.steps import Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.invariants.lifecycles import ARGUMENT_EDGES, BUFFER_EDGES, CALL_EDGES, GUEST_EDGES, LifeCycle, Move
from mediator.invariants.outside import (
    LOW,
    SHM_ALLOC,
    WITH_MESSAGE,
    Outside,
    Params,
    Text,
    is_rpc,
    page_lists,
    read_text,
)
from mediator.invariants.watched import WatchedMemory, Work, words
from optee.abi.message import ENTRIES_PER_PAGE, MAX_PARAMS, NONCONTIG, TYPE_MASK, ParamType
from optee.abi.smc import Function, ReturnCode, RpcReturn, VmId

if TYPE_CHECKING:
    from mediator.invariants.checker import Checker

WORK_PER_REQUEST: Final = MAX_PARAMS + 16
WORK_PER_LIST: Final = 3
"""Invariant 10: accesses of one request to guest memory <= WORK_PER_LIST * list pages that its message names
+ WORK_PER_REQUEST; pages that it has translated <= the data pages that the message names, and one RPC argument."""

_SERVED: Final = (GuestState.LIVE, GuestState.PAUSED)
_TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_RETURN: Final = int(Function.RETURN_FROM_RPC)
_DISABLE: Final = Function.DISABLE_SHM_CACHE

_Words = npt.NDArray[np.uint64]


class Witness:
    """See the module. The checker tells it each step; it reports to the checker."""

    def __init__(self, checker: "Checker", vm: VmId, memory: WatchedMemory) -> None:
        self.checker = checker
        self.vm = vm
        self.memory = memory
        self.outside = Outside(self._frame)
        self.yielding = False
        """Whether the ticket that came back last is one of a call that OP-TEE has, or had, a thread for."""
        self.paused: dict[Ticket, Work] = {}
        """The work of calls that gave their vCPU back."""
        self._guest = LifeCycle("guest", GUEST_EDGES, checker.taken)
        self._calls = LifeCycle("call", CALL_EDGES, checker.taken)
        self._buffers = LifeCycle("buffer", BUFFER_EDGES, checker.taken)
        self._arguments = LifeCycle("RPC argument", ARGUMENT_EDGES, checker.taken)
        self._call: Call | None = None
        self._state: GuestState | None = None
        self._running = 0
        self.addresses_changed()

    def addresses_changed(self) -> None:
        """See `Addresses.refresh`."""
        self.memory.lowest = self.checker.addresses.lowest

    def _report(self, invariant: int, expected: str, got: str) -> None:
        self.checker.report(invariant, self.vm, expected, got)

    def _wrong(self, moves: Iterable[Move]) -> None:
        for what, before, after in moves:
            self._report(7, f"an edge of the {what}'s table", f"{before} -> {after}")

    def _frame(self, pa: int) -> memoryview | None:
        try:
            return self.checker.host.frame(pa)
        except KeyError:
            return None

    # A step begins

    def begin(self, regs: Regs, guest: Guest | None) -> tuple[Ticket | None, Work]:
        """A vCPU executes an SMC: the ticket of the call that it resumes, and the work that it goes on with."""
        self.yielding = False
        if guest is not None:
            self.memory.limit = guest.ledger.limits.pages_per_buffer
        resumed = self.outside.waiting.get(regs[3] & LOW) if regs[0] & LOW == _RETURN else None
        work = None if resumed is None else self.paused.get(resumed)
        self.memory.work = work or Work()
        self._touch(resumed)
        return resumed, self.memory.work

    def answered(self, work: Work, ticket: Ticket, answer: Regs, *, of_the_host: bool) -> bool:
        """OP-TEE answers; whether what it says is within its contract."""
        self.memory.work = work
        self._touch(ticket)
        outside = self.outside
        self.yielding = ticket in outside.calls
        if self.yielding:
            self._running -= 1
            return outside.answered(ticket, answer)
        if isinstance(ticket, FastCall) and ticket.function is _DISABLE and answer[0] & LOW == 0:
            outside.arguments.pop((answer[1] & LOW) << 32 | answer[2] & LOW, None)
        return True

    def proceed(self, work: Work, ticket: Ticket) -> None:
        """A request goes on that was preempted."""
        self.memory.work = work
        self.yielding = False
        self._touch(ticket)

    def _touch(self, ticket: Ticket | None) -> None:
        call = ticket if isinstance(ticket, Call) else None
        self._call = call
        if call is not None:
            self._calls.before((call,))
            self._buffers.before(_buffers_of(call))

    # What came of it

    def submitted(self, regs: Regs, resumed: Ticket | None, step: Step) -> None:
        """What became of an SMC: invariant 6 for calls that wait."""
        outside = self.outside
        ticket = step.ticket if isinstance(step, Forward | Preempt | Queue) else None
        if isinstance(ticket, Call) and ticket is not resumed:
            self._call = ticket
            if ticket not in outside.calls:
                outside.fresh.add(ticket)
        if regs[0] & LOW != _RETURN:
            return
        if resumed is None:
            if ticket is not None:
                self._report(6, f"ERESUME: nobody was told of thread {regs[3] & LOW:#x}", "a call that goes on")
            return
        thread = regs[3] & LOW
        if isinstance(step, Reply):
            if is_rpc(step.regs[0]):
                outside.waiting.pop(thread, None)
                outside.told(resumed, step.regs)
            elif resumed in outside.fresh:
                # It had waited for its turn, and ended before OP-TEE heard of it.
                outside.waiting.pop(thread, None)
                self.paused.pop(resumed, None)
                outside.told(resumed, step.regs)
            elif step.regs[0] & LOW == ReturnCode.ERESUME:
                self._refused(regs, resumed)
        else:
            outside.waiting.pop(thread, None)
            self.paused.pop(resumed, None)
            if ticket is not resumed:
                self._report(6, f"the call of thread {thread:#x} to go on", "another one")

    def _refused(self, regs: Regs, resumed: Ticket) -> None:
        call = self.outside.calls.get(resumed)
        compared = self.checker.policy.compare_resume_cookie and call is not None and call.rpc == RpcReturn.CMD
        if not compared or call is None or (regs[1] & LOW, regs[2] & LOW) == call.words:
            self._report(6, f"the call of thread {regs[3] & LOW:#x} to go on", "ERESUME")

    def forwarded(self, work: Work, step: Forward) -> None:
        """Look at what OP-TEE will see: addresses (invariant 4) and names (invariant 5)."""
        regs, ticket, outside = step.regs, step.ticket, self.outside
        function = regs[0]
        text: Text | None = None
        if function in WITH_MESSAGE:
            frame = self._own(regs[1] << 32 | regs[2])
            if frame is not None:
                text = read_text(frame)
        elif function == _RETURN:
            found = outside.text_of(ticket)
            if found is not None:
                text = found if found.command == SHM_ALLOC and found.ret == 0 else None
            call = outside.calls.get(ticket)
            if call is not None and call.rpc == RpcReturn.ALLOC and (regs[1] or regs[2]):
                self._own(regs[1] << 32 | regs[2])
            if call is not None:
                call.bounced = call.bounced + 1 if self.yielding else 0
        else:
            return
        if text is not None:
            self._check_lists(work, text.params)
        for name in outside.forwarded(ticket, regs, text):
            self._report(5, "no other live object with this name", name)
        self._running += 1

    # After each step: what it touched, and the sums

    def check(self, guest: Guest, work: Work | None) -> None:
        """Compare the core's books with what is known outside of it, and look at what the step did."""
        call = self._call
        if call is not None:
            self._wrong(self._calls.after((call,)))
            self._wrong(self._buffers.after(_buffers_of(call)))
            self._call = None
        if guest.state is not self._state:
            self._state = guest.state
            self._wrong(self._guest.after((guest,)))
            self._guest.before((guest,))
        if guest.state in _SERVED:
            self._compare(guest)
        if work is not None and (work.accesses or self.memory.outputs):
            self._check_accesses(guest, work)

    def _compare(self, guest: Guest) -> None:
        """Invariants 1 to 3: what OP-TEE knows, what is pinned at the port, and what the core has written down."""
        outside, ledger = self.outside, guest.ledger
        if outside.unsure:
            outside.reconcile(guest)
        calls = len(outside.calls)
        if len(guest.calls) != calls + len(outside.fresh):
            self._report(3, f"{calls + len(outside.fresh)} live calls", str(len(guest.calls)))
        if ledger.calls != (charged := in_flight(guest, self.checker.flow)):
            self._report(2, f"{charged} calls in the ledger", str(ledger.calls))
        if self.checker.threads_held is not None:
            live = len(guest.calls) - len(outside.fresh)
            threads = self.checker.threads_held(self.vm)
            if not live - self._running <= threads <= live:
                self._report(3, f"{live} threads", str(threads))
        if outside.translating:
            return  # it has pinned and charged what OP-TEE has not been told of yet
        if ledger.buffers != len(outside.buffers):
            self._report(2, f"{len(outside.buffers)} buffers in the ledger", str(ledger.buffers))
        if ledger.pages != outside.pages:
            self._report(2, f"{outside.pages} pages in the ledger", str(ledger.pages))
        if ledger.rpc_arguments != len(outside.arguments):
            self._report(2, f"{len(outside.arguments)} RPC arguments in the ledger", str(ledger.rpc_arguments))
        expected = outside.pages + len(outside.arguments)
        if self.memory.pages != expected:
            self._report(1, f"{expected} pins", str(self.memory.pages))
        if len(guest.buffers) != len(outside.buffers) or len(guest.arguments) != len(outside.arguments):
            names = f"{len(outside.buffers)} buffers and {len(outside.arguments)} RPC arguments by name"
            self._report(5, names, f"{len(guest.buffers)} and {len(guest.arguments)}")

    def _check_accesses(self, guest: Guest, work: Work) -> None:
        memory = self.memory
        if len(work.reads) > 1:
            end = -1
            for start, size in sorted(work.reads):
                if start < end:
                    self._report(8, "each byte read once", f"bytes at {start:#x} twice")
                end = max(end, start + size)
        if len(work.loads) > 1:
            for (pinned, start, size), (other, second, _) in pairwise(sorted(work.loads)):
                if pinned == other and second < start + size:
                    self._report(8, "each byte read once", f"byte {second:#x} of a message's buffer twice")
        pages, lists = memory.named(work)
        if work.pinned > pages + 1:
            self._report(10, f"at most {pages + 1} pages translated", str(work.pinned))
        bound = WORK_PER_LIST * lists + WORK_PER_REQUEST
        if work.accesses > bound:
            self._report(10, f"at most {bound} accesses", str(work.accesses))
        if work.writes:
            self._check_writes(guest, work)
            work.writes.clear()
        elif not guest.calls:
            memory.outputs.clear()
            memory.words.clear()

    def _check_writes(self, guest: Guest, work: Work) -> None:
        memory = self.memory
        for at, data in work.writes:
            page, offset = at - at % PAGE_SIZE, at % PAGE_SIZE
            written = offset + len(data)
            fields = memory.outputs.get(page, ())
            if at < 0 or (offset, written) in fields or any(a <= offset and written <= b for a, b in fields):
                continue
            if all(argument.ipa != page for argument in guest.arguments.values()):
                self._report(8, "writes of outputs only", f"{len(data)} bytes at {at:#x}")
        suspects = {word: at for at, word in words(work.writes) if word >= memory.lowest and word not in memory.words}
        for word in self.checker.addresses.among(suspects):
            self._report(4, "no host address in guest memory", f"{word:#x} at {suspects[word]:#x}")

    # Everything

    def examine(self, guest: Guest) -> None:
        """Look at every object of the guest."""
        self._wrong(self._calls.examine(guest.calls.values()))
        self._wrong(self._buffers.examine(guest.buffers.values()))
        self._wrong(self._arguments.examine(guest.arguments.values()))
        shared = set(guest.buffers.values())
        names = sorted(cookie for each in shared for cookie in each.pages)
        if names != sorted(guest.buffers):
            self._report(5, f"buffers {_in_words(names)}", _in_words(sorted(guest.buffers)))
        for cookie, argument in guest.arguments.items():
            if argument.cookie != cookie:
                self._report(5, f"the RPC argument {cookie:#x}", f"{argument.cookie:#x}")
        if guest.state not in _SERVED:
            return
        held = {
            "buffers": len(guest.buffers),
            "rpc_arguments": len(guest.arguments),
            "pages": sum(sum(each.pages.values()) for each in shared),
            "memory": sum(
                charge.memory
                for charge in (
                    *(call.charge for call in guest.calls.values()),
                    *(each.charge for each in shared),
                    *(argument.charge for argument in guest.arguments.values()),
                )
                if charge is not None
            ),
        }
        for name, count in held.items():
            if getattr(guest.ledger, name) != count:
                self._report(2, f"{count} {name} in the ledger", str(getattr(guest.ledger, name)))
        expected = sum(len(pinned.pas) for pinned in _pinned(guest)) + len(guest.arguments)
        count = self.checker.host.pin_count(self.vm)
        if count != expected and not self.checker.policy.shared_pages:
            self._report(1, f"{expected} pins", str(count))
        waiting = set(self.outside.waiting.values())
        for call in guest.calls.values():
            if call not in waiting and not self.checker.is_open(call):
                self._report(6, f"call {call.id} to wait for its guest, for OP-TEE or for its turn", "none of them")

    def check_pins(self, guest: Guest) -> None:
        """Invariant 1, page by page."""
        expected: Counter[int] = Counter()
        for pinned in _pinned(guest):
            expected.update(pinned.pas.tolist())
        for argument in guest.arguments.values():
            expected.update(argument.pinned.pas.tolist())
        held = dict(self.checker.host.pins(self.vm))
        if held != expected:
            wrong = sorted(pa for pa in held.keys() | expected.keys() if held.get(pa, 0) != expected[pa])
            first = wrong[0]
            got = f"{held.get(first, 0)} ({len(wrong)} pages differ)"
            self._report(1, f"{expected[first]} pins of {first:#x}", got)

    def gone(self, guest: Guest) -> None:
        """The guest is no more: nor is anything of it."""
        self._wrong(self._guest.after((guest,)))
        if self._call is not None:
            self._wrong(self._calls.after((self._call,)))
        for cycle, things in (
            (self._calls, guest.calls.values()),
            (self._buffers, guest.buffers.values()),
            (self._arguments, guest.arguments.values()),
        ):
            self._wrong(cycle.examine(things))

    # Addresses

    def _own(self, pa: int) -> memoryview | None:
        frame = self._frame(pa)
        if frame is None:
            self._report(4, "a page of the mediator's own", f"{pa:#x}")
            self.checker.untranslated += 1
        return frame

    def _check_lists(self, work: Work, params: Params) -> None:
        """Invariant 4: each page list that OP-TEE finds names pages that are pinned for this guest."""
        for attribute, pointer, _, _ in params:
            if attribute & TYPE_MASK in _TMEM and pointer and not attribute & NONCONTIG:
                self._report(4, "a page list", f"the address {pointer:#x}")
        parts: list[_Words] = []
        for _, pointer, pages in page_lists(params):
            parts += self._entries(pointer - pointer % PAGE_SIZE, pages)
        if not parts:
            return
        entries = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.checker.translated += len(entries)
        # What pin returned may be wrong itself, so the hypervisor is asked as well where the guest's RAM is.
        strange = self.checker.host.outside_ram(self.vm, entries)
        if len(strange) and not self.checker.policy.shared_pages:
            self._untranslated(strange)
            return
        live = self.memory.pins
        if all(id(pinned) in live for pinned in work.pins):
            made = [pinned.pas for pinned in work.pins]
            if made and np.array_equal(made[0] if len(made) == 1 else np.concatenate(made), entries):
                return
        known = np.concatenate([pinned.pas for pinned in live.values()]) if live else np.zeros(0, np.uint64)
        strange = entries[~np.isin(entries, known)]
        if len(strange):
            self._untranslated(strange)

    def _untranslated(self, strange: _Words) -> None:
        self.checker.untranslated += len(strange)
        self._report(4, "a pinned page of this guest", f"{int(strange[0]):#x}")

    def _entries(self, page: int, left: int) -> list[_Words]:
        parts = []
        while left > 0:
            frame = self._own(page)
            if frame is None:
                break
            entries = np.frombuffer(frame, np.uint64)
            parts.append(entries[: min(left, ENTRIES_PER_PAGE)])
            left -= ENTRIES_PER_PAGE
            page = int(entries[ENTRIES_PER_PAGE])
        return parts


def in_flight(guest: Guest, flow: Flow | None) -> int:
    """Calls that the ledger has: all but those that flow control has not let in yet."""
    if flow is None:
        return len(guest.calls)
    return sum(call.turn is None or call.turn.counted for call in guest.calls.values())


def _buffers_of(call: Call) -> list[Shared]:
    """The buffers that a call has to do with; a message of NULL references shares none."""
    shared = (call.shared, call.registering, call.unregistering, call.allocated)
    return [each for each in shared if each is not None and each.pages]


def _pinned(guest: Guest) -> list[Pinned]:
    """What was pinned for the live buffers, each pin once."""
    return [pinned for shared in set(guest.buffers.values()) for pinned in shared.pinned]


def _in_words(cookies: Iterable[int]) -> str:
    return ", ".join(f"{cookie:#x}" for cookie in cookies)
