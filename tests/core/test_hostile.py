"""Two hostile guests and a secure world that keeps the contract and does whatever it may (B1 to B15).

Each example is a list of moves: SMCs, writes to guest memory at any time, answers of OP-TEE in any order, pauses,
deaths. No exception leaves the core, all invariants hold, no event is an error, and at the end nothing is left.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind
from mediator.core.lifecycle import Lifecycle
from mediator.core.records import Call
from mediator.core.rpc import OWN_THREADS
from mediator.core.states import GuestState
from mediator.core.steps import Forward, Preempt, Queue, Reply
from optee.abi.message import HEADER, Message, Param, message_size
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, to_pair
from tests import strategies
from tests.core.pair import GENERIC, YIELDING, Conversation, Pair, policy_of
from tests.strategies import Place

PAGES = 12
THREADS = 3
RESULTS = [0, 0, 0, 0, 0xFFFF0006, 0xFFFF000C]


class Guest:
    """A guest's RAM with twelve pages that everything refers to."""

    def __init__(self, pair, kind):
        self.side = pair.guest(kind, ram=4 << 20)
        self.first = self.side.page(PAGES)
        self.frozen = {}
        # list pages that are good: of themselves, of each other
        for page in range(6):
            entries = [self.first + (page + n) % PAGES * PAGE_SIZE for n in range(511)]
            following = self.first + (page + 1) % 6 * PAGE_SIZE
            self.side.ram.write(self.first + page * PAGE_SIZE, np.array([*entries, following], np.uint64).tobytes())

    def address(self, place):
        return place if isinstance(place, int) else self.first + place.page * PAGE_SIZE + place.offset

    def write(self, page, message, count=None):
        resolved = [param._replace(a=self.address(param.a)) for param in message.params]
        packed = Message(*message.header[:7], resolved).pack()
        at = self.address(page)
        self.side.ram.write(at - max(0, at % PAGE_SIZE + len(packed) - PAGE_SIZE), packed)
        if count is not None:
            self.side.ram.write(at // PAGE_SIZE * PAGE_SIZE + 28, count.to_bytes(4, "little"))


class Tee:
    """OP-TEE as the contract lets it be."""

    def __init__(self, pair):
        self.pair = pair
        self.memory = pair.machine.memory
        self.suspended = {}
        self.arguments = {}

    def threads_held(self, vm):
        return sum(owner == vm for owner, _ in self.suspended)

    def answer(self, regs, choice):
        function, vm = regs[0], regs[7]
        if function == Function.VM_DESTROYED:
            self.suspended = {key: now for key, now in self.suspended.items() if key[0] != regs[1]}
            return (0, 0, 0, 0)
        if function == Function.DISABLE_SHM_CACHE:
            return (int(ReturnCode.ENOTAVAIL), 0, 0, 0)
        if function not in YIELDING and function != Function.RETURN_FROM_RPC:
            return self.pair.world.fast[function]
        if function == Function.RETURN_FROM_RPC:
            now, cookies, rpc = self.suspended.pop((vm, regs[3]))
            if rpc == RpcReturn.ALLOC and (regs[1] or regs[2]):
                cookie = regs[4] << 32 | regs[5]
                assert cookie not in cookies
                cookies[cookie] = regs[1] << 32 | regs[2]
        else:
            now = Conversation(vm, regs[1] << 32 | regs[2], function == Function.CALL_WITH_RPC_ARG)
            cookies = {}
        threads = [number for number in range(THREADS) if (vm, number) not in self.suspended]
        kind, ret, request = choice
        if kind == "end" or not threads or (kind == "cmd" and not now.behind and not cookies):
            if cookies:  # OP-TEE gives its page back before it ends a call
                return self.suspend(vm, threads[0], now, cookies, RpcReturn.FREE, cookies.popitem()[0])
            if ret == 1:
                return (int(ReturnCode.EBADADDR), 0, 0, 0)
            frame = self.memory.frame(now.pa)
            frame[20:28] = ret.to_bytes(4, "little") + b"\4\0\0\0"
            return (0, 0, 0, 0)
        if kind == "cmd":
            cookie = 0 if now.behind else next(iter(cookies))
            self.request(now, cookies.get(cookie), request)
            return self.suspend(vm, threads[0], now, cookies, RpcReturn.CMD, cookie)
        if kind == "alloc" and not now.behind:
            return self.suspend(vm, threads[0], now, cookies, RpcReturn.ALLOC, 160 << 32)
        return self.suspend(vm, threads[0], now, cookies, RpcReturn.FOREIGN_INTR, 0)

    def suspend(self, vm, thread, now, cookies, rpc, pair):
        self.suspended[vm, thread] = now, cookies, rpc
        return (int(rpc), *to_pair(pair), thread)

    def request(self, now, page, request):
        if page is None:
            page = now.pa + message_size(HEADER.unpack_from(self.memory.frame(now.pa))[7])
        params = [
            Param(param.attr & 0xFF, 0 if param.attr & 0xFF in (9, 10, 11) else 1, 8, param.c)
            for param in request.params
        ]
        if request.cmd in (RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE):
            params = [Param(1, 0, params[0].c if params else 4096, 8)]
        self.memory.write(page, Message(request.cmd, ret=GENERIC, params=params[:4]).pack())


REQUESTS = st.builds(
    Message,
    st.sampled_from([6, 6, 6, 7, 3, 2, 4, 20]),
    params=st.lists(st.builds(Param, st.sampled_from([0, 1, 2, 3, 5, 6, 7, 10]), c=st.integers(1, 4)), max_size=3),
)
CHOICES = st.tuples(
    st.sampled_from(["end", "end", "cmd", "cmd", "cmd", "alloc", "alloc", "interrupt"]),
    st.sampled_from([*RESULTS, 1]),
    REQUESTS,
)
"""What OP-TEE does next: kind, result, request."""
PAGE_PLACES = st.builds(Place, st.integers(6, 11), st.just(0))
LIST_PLACES = st.builds(Place, st.integers(0, 5), st.sampled_from([0, 0, 8]))
BUFFERS = st.builds(
    Param,
    st.sampled_from([0x209, 0x20A, 0x20A, 0x20B, 5, 6, 1, 3]),
    LIST_PLACES,
    st.sampled_from([1, 4096, 3 * 4096, 600 * 4096]),
    st.integers(1, 4),
)
GOOD_MESSAGES = st.builds(Message, st.sampled_from([1, 1, 4, 5]), params=st.lists(BUFFERS, min_size=1, max_size=2))
OFFERS = st.builds(
    Message,
    st.just(int(RpcCommand.SHM_ALLOC)),
    params=st.lists(
        st.builds(Param, st.just(0x20A), LIST_PLACES, st.sampled_from([1, 4096, 600 * 4096]), st.integers(1, 6)),
        min_size=1,
        max_size=1,
    ),
)
WHO = st.integers(0, 1)
HOLD = st.sampled_from([False, False, True])
"""Whether the secure world takes its time with the answer."""


def calls(places, messages, counts=strategies.NEAR_32):
    return st.tuples(
        st.just("call"),
        WHO,
        st.tuples(st.sampled_from(YIELDING), places, messages, st.none() | counts),
        CHOICES,
        HOLD,
    )


RESUMES = st.tuples(
    st.just("resume"),
    WHO,
    st.tuples(
        st.sampled_from([0, 0, 0, 0, 1, 2, 2**32 - 1, OWN_THREADS + 1]),
        PAGE_PLACES | strategies.ADDRESSES,
        strategies.COOKIES,
        st.none() | OFFERS | strategies.REPLIES,
    ),
    CHOICES,
    HOLD,
)
OTHERS = st.one_of(
    st.tuples(st.just("smc"), WHO, strategies.REGISTERS, CHOICES, HOLD),
    st.tuples(st.just("write"), WHO, st.tuples(strategies.PLACES, strategies.REPLIES), st.none(), st.none()),
    st.tuples(st.just("optee"), WHO, st.integers(0, 7), CHOICES, st.none()),
    st.tuples(
        st.just("kind"),
        WHO,
        st.tuples(st.integers(0, PAGES - 1), st.sampled_from([PageKind.RAM_RW, *list(PageKind)[:4]])),
        st.none(),
        st.none(),
    ),
    st.tuples(
        st.sampled_from(["pause", "reset", "destroy", "give-back"]), WHO, st.integers(0, 7), st.none(), st.none()
    ),
)
BENIGN = calls(PAGE_PLACES, GOOD_MESSAGES, st.nothing())
HOSTILE = calls(strategies.PLACES, strategies.MESSAGES)


class Play:
    """One example."""

    def __init__(self, policy):
        self.pair = Pair(policy, threads=THREADS)
        self.tee = Tee(self.pair)
        self.pair.checker.threads_held = self.tee.threads_held
        self.guests = [Guest(self.pair, "kvm"), Guest(self.pair, "xen")]
        self.waiting = []

    def keep(self, step, choice=None, hold=True):
        """Answer a step as `choice` says, or keep it for later."""
        self.pair.note(step)
        if isinstance(step, Forward | Preempt):
            if hold:
                self.waiting.append(step)
            else:
                self.go_on(step, choice, hold)

    def go_on(self, step, choice=("end", 0, None), hold=True):
        checker = self.pair.checker
        if isinstance(step, Preempt):
            self.keep(checker.proceed(step.ticket), choice, hold)
        else:
            self.keep(checker.returned(step.ticket, self.tee.answer(step.regs, choice)), ("end", 0, None), hold)

    def move(self, what, who, detail, choice, hold):
        guest, checker = self.guests[who], self.pair.checker
        number = guest.side.id
        if what == "smc":
            self.keep(guest.side.submit(detail), choice, hold)
        elif what == "call":
            function, place, message, count = detail
            guest.write(place, message, count)
            if function == Function.CALL_WITH_REGD_ARG:
                operands = (0, place.page % 5, place.offset)
            else:
                aligned = Place(place.page, 0) if place.offset != 1 else place
                operands = (*to_pair(guest.address(aligned)), 0)
            self.keep(guest.side.submit((int(function), *operands, 0, 0, 0, 0)), choice, hold)
        elif what == "write":
            guest.write(*detail)
        elif what == "optee" and self.waiting:
            self.go_on(self.waiting.pop(detail % len(self.waiting)), choice)
        elif what == "resume":
            thread, address, cookie, reply = detail
            if reply is not None:
                self.reply(guest, thread, reply)
            words = to_pair(guest.address(address))
            regs = (int(Function.RETURN_FROM_RPC), *words, thread, *to_pair(cookie), 0, 0)
            self.keep(guest.side.submit(regs), choice, hold)
        elif what == "kind":
            page, kind = detail
            guest.side.vm.set_kind(guest.first + page * PAGE_SIZE, kind)
        elif what == "pause":
            if not checker.pause(number):
                checker.resume(number)
        elif what == "give-back":
            for step in [step for step in self.waiting if isinstance(step, Preempt) and isinstance(step.ticket, Call)]:
                self.waiting.remove(step)
                self.keep(checker.give_back(step.ticket))
        elif what in ("reset", "destroy") and detail == 0:
            self.end(number, checker.reset if what == "reset" else checker.destroy)

    def reply(self, guest, thread, reply):
        """Write a reply where OP-TEE's request was delivered to."""
        record = self.pair.mediator.guests.get(guest.side.id)
        call = None if record is None else record.suspended.get(thread)
        if call is None:
            return
        if call.argument is not None:
            at = call.argument.ipa
        elif call.rpc_offset and call.place is None:
            at = call.ipa + call.rpc_offset
        else:
            return
        guest.write(Place((at - guest.first) // PAGE_SIZE, at % PAGE_SIZE), reply)

    def end(self, number, request):
        step = self.pair.note(request(number))
        while isinstance(step, Queue):
            assert self.waiting
            self.go_on(self.waiting.pop(0))
            step = self.pair.note(request(number))
        self.keep(step)
        for step in [step for step in self.waiting if isinstance(step.ticket, Lifecycle)]:
            self.waiting.remove(step)
            while not isinstance(step, Reply):
                if isinstance(step, Preempt):
                    step = self.pair.note(self.pair.checker.proceed(step.ticket))
                else:
                    answer = self.tee.answer(step.regs, None)
                    step = self.pair.note(self.pair.checker.returned(step.ticket, answer))

    def finish(self):
        while self.waiting:
            self.go_on(self.waiting.pop())
        for number in list(self.pair.mediator.guests):
            assert self.pair.mediator.guests[number].state in (GuestState.LIVE, GuestState.PAUSED)
            self.end(number, self.pair.checker.destroy)
        self.pair.check()
        self.pair.close()


POLICIES = {
    "default": policy_of(pages=3000, buffers=6, pages_per_buffer=1200, rpc_arguments=2),
    "xen": policy_of("xen"),
    "minimal": policy_of("minimal"),
}


def play(name, moves):
    game = Play(POLICIES[name])
    for move in moves:
        game.move(*move)
        assert game.pair.checker.violations == []
    game.finish()


@given(
    st.sampled_from(["default", "default", "xen", "minimal"]),
    st.lists(st.one_of(HOSTILE, HOSTILE, RESUMES, BENIGN, OTHERS), min_size=10, max_size=60),
)
def test_hostile_guests_break_nothing(name, moves):
    play(name, moves)


@given(st.lists(st.one_of(BENIGN, BENIGN, RESUMES, RESUMES, RESUMES, OTHERS), min_size=10, max_size=60))
def test_guests_that_often_succeed_break_nothing(moves):
    """The same with messages that mostly get through, so that more is alive at a time."""
    play("default", moves)
