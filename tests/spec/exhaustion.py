"""Every order of events of two guests and a few calls, to the end: a small explicit-state exploration of the core.

The core runs on the smallest machine that there is: `Memory` and `Host` are its two ports, a page is a number. A state
is what the core's objects are in, up to the names of calls and threads and up to which guest is which; what is left out
of it (`canonical`) decides nothing. Each way to a state is the shortest one, and is walked anew for each event that may
happen next, so nothing is ever copied. The search is breadth first and ends when no state is new.
"""

from collections import Counter, deque
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import Reason, Stage2Fault
from mediator.core import sharing
from mediator.core.mediator import Mediator
from mediator.core.records import Call
from mediator.core.states import (
    ARGUMENT_TABLE,
    BUFFER_TABLE,
    CALL_TABLE,
    GUEST_TABLE,
    BufferState,
    CallState,
    GuestState,
)
from mediator.core.steps import Forward, Preempt, Queue, Reply
from optee.abi.message import Message, Param
from optee.abi.smc import API_UID, Function, RpcReturn, to_pair
from tests.core.pair import policy_of

TRANSLATING = CallState.TRANSLATING
TABLES = {"guest": GUEST_TABLE, "call": CALL_TABLE, "buffer": BUFFER_TABLE, "RPC argument": ARGUMENT_TABLE}
DATA, LIST, LONG_LIST, LONGER = 0x10000, 0x20000, 0x21000, 0x22000
MESSAGE, ARGUMENT = 0x1000, 0x30000
TEMPORARY, REGISTERED, OFFERED, ARGUMENT_COOKIE = 9, 1, 2, 0xC0
HOST_BASE = 1 << 40


def tmem(kind, cookie, at=LIST, pages=1):
    return Param(kind | 0x200, at, pages * PAGE_SIZE, cookie)


MESSAGES = {
    "invoke": (Function.CALL_WITH_RPC_ARG, Message(1, params=[tmem(9, TEMPORARY)])),
    "invoke long": (Function.CALL_WITH_ARG, Message(1, params=[tmem(11, TEMPORARY, LONG_LIST, 512)])),
    "open": (Function.CALL_WITH_ARG, Message(0)),
    "register": (Function.CALL_WITH_ARG, Message(4, params=[tmem(10, REGISTERED)])),
    "unregister": (Function.CALL_WITH_ARG, Message(5, params=[Param(5, 0, 0, REGISTERED)])),
}
REQUESTS = {
    "ask for a buffer": Message(6, params=[Param(1, 0, PAGE_SIZE, 8)]),
    "free the buffer": Message(7, params=[Param(1, 0, OFFERED, 0)]),
}
ORDER = frozenset({"invoke", "register", "unregister", "end", "fail", "interrupt", "destroy"})
"""The alphabet for many calls: three kinds, suspended as often as OP-TEE likes, good and bad ends, death at any
moment."""
BUFFERS = ORDER - {"interrupt"} | set(REQUESTS)
"""The same with RPCs that bring buffers and take them away; one that is offered twice is asked to be freed again."""
EVERYTHING = BUFFERS | {
    "invoke long", "open", "alloc", "free", "thread in use", "error", "lost", "give back", "pause", "refuse",
}  # fmt: skip
"""Everything that has an edge in a table, with a call that is preempted."""
ENTRIES = DATA.to_bytes(8, "little") * 511
PAGES = {
    **dict.fromkeys((LIST, LONGER), ENTRIES + bytes(8)),
    LONG_LIST: ENTRIES + LONGER.to_bytes(8, "little"),
    **dict.fromkeys((MESSAGE, ARGUMENT), bytes(PAGE_SIZE)),
}


class Pinned:
    def __init__(self, ipas):
        self.pas = ipas + np.uint64(HOST_BASE)


class Memory:
    """A guest's memory: which pages it has, which are pinned how often."""

    def __init__(self):
        self.pages = dict(PAGES)
        self.pins = {}

    def put(self, ipa, data):
        page = self.pages[ipa - ipa % PAGE_SIZE]
        at = ipa % PAGE_SIZE
        self.pages[ipa - at] = page[:at] + data + page[at + len(data) :]

    def read(self, ipa, size, *, writable=False):
        if ipa - ipa % PAGE_SIZE not in self.pages:
            raise Stage2Fault(ipa, Reason.UNMAPPED)
        return self.pages[ipa - ipa % PAGE_SIZE][ipa % PAGE_SIZE :][:size]

    def write_fields(self, ipa, data, fields):
        self.read(ipa, 0)

    def pin(self, ipas):
        pinned = Pinned(ipas)
        self.pins[pinned] = len(ipas)
        return pinned

    def unpin(self, pinned):
        del self.pins[pinned]

    def mark_dirty(self, pinned):
        assert pinned in self.pins


class Page:
    def __init__(self, number):
        self.pa = 2 * HOST_BASE + number * PAGE_SIZE
        self.view = memoryview(bytearray(PAGE_SIZE))
        self.words = np.frombuffer(self.view, np.uint64)


class Host:
    """The mediator's pages."""

    def __init__(self):
        self.lent = {}
        self.count = 0

    def lend(self):
        self.count += 1
        page = Page(self.count)
        self.lent[page] = page
        return page

    def take_back(self, page):
        del self.lent[page]


class Walk:
    """One order of events. away: tickets that OP-TEE has, by call or by guest; turns: calls that were preempted."""

    def __init__(self, guests, most, alphabet):
        self.vms = range(1, guests + 1)
        self.most = most
        self.alphabet = alphabet
        self.host = Host()
        self.mediator = Mediator(policy_of(), self.host)
        self.memories = {vm: Memory() for vm in self.vms}
        self.away = {}
        self.turns = {}
        step = self.mediator.probe()
        for answer in (API_UID, (0, 8, 0, 0), (0, 0, 0, 0)):
            step = self.mediator.returned(step.ticket, answer)
        for vm in self.vms:
            self.do(("create", vm))
            self.do(("host", vm, "end"))

    def events(self):
        """What may happen next."""
        guests = self.mediator.guests
        room = sum(len(guest.calls) for guest in guests.values()) < self.most
        for vm in self.vms:
            guest = guests.get(vm)
            if guest is None:
                yield "create", vm
                continue
            yield from self.of_host(vm, guest)
            if guest.state is GuestState.LIVE:
                if room:
                    yield from (("call", vm, kind) for kind in MESSAGES if kind in self.alphabet)
                for call in guest.suspended.values():
                    yield "resume", vm, call.id
            for call in guest.calls.values():
                if call in self.away:
                    yield from (("answer", vm, call.id, what) for what in self.answers(guest, call))
                elif call in self.turns:
                    yield "proceed", vm, call.id
                    if "give back" in self.alphabet:
                        yield "give back", vm, call.id

    def of_host(self, vm, guest):
        if vm in self.away:
            yield from (("host", vm, what) for what in ("end", "refuse", "lost") if what in self.alphabet)
        elif guest.state is GuestState.LIVE and "pause" in self.alphabet:
            yield "pause", vm
        elif guest.state is GuestState.PAUSED:
            yield "unpause", vm
        elif guest.state is GuestState.QUARANTINED:
            yield "abandon", vm
        if "destroy" in self.alphabet:
            yield "destroy", vm

    def answers(self, guest, call):
        """What OP-TEE may say: any of it, at any time."""
        possible = ["end", "fail", "error", "lost", "thread in use"]
        if call.rpc_offset:
            possible += ["interrupt", *REQUESTS]
        else:
            possible += ["free"] if guest.arguments else ["alloc"]
        return [what for what in possible if what in self.alphabet]

    def do(self, event):
        what, vm, *detail = event
        mediator = self.mediator
        if what == "create":
            self.keep(vm, mediator.create(vm, self.memories[vm]))
        elif what == "host":
            answer = (0 if detail[0] == "end" else 5, 0, 0, 0)
            ticket = self.away.pop(vm)
            lost = detail[0] == "lost"
            self.keep(vm, mediator.lost(ticket, "lost") if lost else mediator.returned(ticket, answer))
        elif what == "pause":
            assert mediator.pause(vm)
        elif what == "unpause":
            assert mediator.resume(vm)
        elif what in ("destroy", "abandon"):
            self.keep(vm, getattr(mediator, what)(vm))
        elif what == "call":
            function, message = MESSAGES[detail[0]]
            self.memories[vm].put(MESSAGE, message.pack())
            self.smc(vm, function, *to_pair(MESSAGE))
        else:
            call = mediator.guests[vm].calls[detail[0]]
            if what == "resume":
                if call.rpc == RpcReturn.CMD:
                    reply = Message(6, params=[tmem(10, OFFERED)])
                    self.memories[vm].put(MESSAGE + call.rpc_offset, reply.pack())
                self.smc(vm, Function.RETURN_FROM_RPC, *to_pair(ARGUMENT), call.thread, *to_pair(ARGUMENT_COOKIE))
            elif what == "answer":
                self.answer(vm, call, detail[1])
            else:
                del self.turns[call]
                self.keep(vm, mediator.proceed(call) if what == "proceed" else mediator.give_back(call))

    def smc(self, vm, *regs):
        self.keep(vm, self.mediator.submit(vm, 0, (*map(int, regs), *[0] * (8 - len(regs)))))

    def keep(self, vm, step):
        while isinstance(step, Preempt) and not isinstance(step.ticket, Call):
            step = self.mediator.proceed(step.ticket)
        if isinstance(step, Forward):
            owner = step.ticket if isinstance(step.ticket, Call) else vm
            assert owner not in self.away
            self.away[owner] = step.ticket
        elif isinstance(step, Preempt):
            self.turns[step.ticket] = step
        else:
            assert isinstance(step, Reply | Queue)

    def answer(self, vm, call, what):
        guest = self.mediator.guests[vm]
        ticket = self.away.pop(call)
        thread = min(set(range(9)) - set(guest.suspended))
        regs = (0, 0, 0, 0)
        if what in ("end", "fail"):
            call.shadow.view[20:24] = (0 if what == "end" else 0xFFFF0006).to_bytes(4, "little")
        elif what == "error":
            regs = (5, 0, 0, 0)
        elif what == "alloc":
            regs = (int(RpcReturn.ALLOC), 160, 0, thread)
        elif what == "free":
            regs = (int(RpcReturn.FREE), *to_pair(ARGUMENT_COOKIE), thread)
        elif what == "interrupt":
            regs = (int(RpcReturn.FOREIGN_INTR), 0, 0, thread)
        elif what == "thread in use":
            regs = (int(RpcReturn.FOREIGN_INTR), 0, 0, 0xFFFFFFFF)
        elif what in REQUESTS:
            request = REQUESTS[what].pack()
            call.shadow.view[call.rpc_offset : call.rpc_offset + len(request)] = request
            regs = (int(RpcReturn.CMD), 0, 0, thread)
        if what == "lost":
            self.keep(vm, self.mediator.lost(ticket, "lost"))
        else:
            self.keep(vm, self.mediator.returned(ticket, regs))

    def check(self):
        """What is held is what there is: pins, sums, pages of the mediator; and nobody waits for nothing."""
        pages = 0
        for vm in self.vms:
            guest = self.mediator.guests.get(vm)
            pins = sum(self.memories[vm].pins.values())
            if guest is None:
                assert pins == 0
                continue
            partly = [call.shared for call in guest.calls.values() if call.state is TRANSLATING]
            held = 0
            for shared in set(guest.buffers.values()):
                held += sum(shared.pages.values())
                pinned = sum(len(each.pas) for each in shared.pinned)
                assert pinned == sum(shared.pages.values()) or shared in partly
                pins -= pinned
            assert pins == len(guest.arguments)
            counts = (held, len(guest.buffers), len(guest.arguments), len(guest.calls))
            sums = guest.ledger.sums()
            assert tuple(sums[name] for name in ("pages", "buffers", "rpc_arguments", "calls")) == counts
            assert set(guest.suspended.values()) <= set(guest.calls.values())
            pages += sum(call.shadow is not None for call in guest.calls.values()) + len(guest.arguments)
            pages += sum(len(shared.lists) for shared in set(guest.buffers.values()))
            for call in guest.calls.values():
                waits = [call in self.away, call in self.turns, call.thread is not None]
                assert sum(waits) == 1 or guest.state not in (GuestState.LIVE, GuestState.PAUSED), call.state
        assert len(self.host.lent) == pages

    def canonical(self):
        """What this state is, whatever calls and threads are called, and whichever guest is which.

        Left out: what only numbers or counts (ids, counters, peaks, registers of the guest), and what follows from
        the kind of a call (its message, outputs, cookies, and how far its work is).
        """
        return tuple(sorted(map(self._guest, self.vms)))

    def _guest(self, vm):
        guest = self.mediator.guests.get(vm)
        if guest is None:
            return ("GONE", vm in self.away)
        calls = sorted(self._call(call) for call in guest.calls.values())
        buffers = sorted(
            (cookie, each.state.name, len(each.lists), len(each.pinned)) for cookie, each in guest.buffers.items()
        )
        return (guest.state.name, vm in self.away, guest.in_flight, tuple(calls), tuple(buffers), len(guest.arguments))

    def _call(self, call):
        def of(shared):
            if shared is None or shared.state is BufferState.RELEASED:
                return "none"
            return f"{sorted(shared.pages)} {shared.state.name} {len(shared.lists)}"

        where = "away" if call in self.away else "turn" if call in self.turns else ""
        own = call.thread is not None and call.work is not None
        waits = call.thread is not None and not own
        rpc = (call.rpc, call.shadow.view[call.rpc_offset] if call.rpc_offset else 0) if waits else ()
        buffers = tuple(map(of, (call.registering, call.unregistering, call.allocated, call.shared)))
        return (call.command.name, call.function.name, call.state.name, where, own, rpc, call.work is not None, buffers)


class Taken(dict):
    """One state's row of a table, which notes what edges of it were taken."""

    def __init__(self, name, state, row, taken):
        super().__init__(row)
        self.name, self.state, self.taken = name, state, taken

    def __getitem__(self, event):
        found = super().__getitem__(event)
        self.taken[self.name, self.state.name, event.name] += 1
        return found


@contextmanager
def noted():
    """The edges that are taken meanwhile; a list page is a turn's work meanwhile."""
    taken = Counter()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sharing, "LISTS_PER_STEP", 1))
        for name, table in TABLES.items():
            rows = {state: Taken(name, state, row, taken) for state, row in table.items()}
            stack.enter_context(mock.patch.dict(table, rows))
        yield taken


class Found(NamedTuple):
    """States, moves between them, and the edges (table, state, event) that were taken."""

    states: int
    moves: int
    taken: frozenset[tuple[str, str, str]]


def explore(guests, calls, alphabet):
    """Walk to the end: `calls` live at a time, of all guests together. Prints which events go wrong."""
    with noted() as taken:
        first = Walk(guests, calls, alphabet)
        seen = {first.canonical()}
        todo = deque([((), list(first.events()))])
        moves = 0
        while todo:
            path, events = todo.popleft()
            for event in events:
                walk = Walk(guests, calls, alphabet)
                for earlier in path:
                    walk.do(earlier)
                well = False
                try:
                    walk.do(event)
                    walk.check()
                    well = True
                finally:
                    if not well:
                        print(f"after {path}: {event}")
                moves += 1
                state = walk.canonical()
                if state not in seen:
                    seen.add(state)
                    todo.append(((*path, event), list(walk.events())))
    return Found(len(seen), moves, frozenset(taken))
