"""The core does what the specification says, whatever guests and the secure world do, in any order.

Each example is a history of up to three guests: calls, replies, writes, answers of OP-TEE, pauses, deaths, benign and
hostile. After each move both sides hold the same: registers, memory of guests, what OP-TEE sees, pins, sums, records.
"""

import os
import struct
from itertools import product

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from optee.abi.message import Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, RpcReturn, to_pair
from tests import strategies
from tests.spec.side_by_side import BASES, KINDS, PAGES, THREADS, SideBySide
from tests.spec.specification import CMD, OWN_THREADS, PAGE, SERVED, header, outputs
from tests.strategies import Place

YIELDING = ("CALL_WITH_ARG", "CALL_WITH_ARG", "CALL_WITH_RPC_ARG", "CALL_WITH_REGD_ARG")
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
LISTS = 6
"""Pages of a guest that hold page lists to begin with; the others are for messages."""
POLICIES = {
    "default": {"pages": 2600, "buffers": 4, "pages_per_buffer": 1200, "rpc_arguments": 2, "memory_kib": 96},
    "xen": {"pages": 700, "rpc_arguments": 2},
    "minimal": {"pages": 600, "buffers": 3},
}


class Items(list):
    """A list that prints itself in few words."""

    def __repr__(self):
        return f"{len(self)} items"

    def item(self, n):
        return self[n]


def pick(items):
    """One of these. The lists are made beforehand: a history is long, and what it may draw has a bound."""
    return st.integers(0, len(items) - 1).map(Items(items).item)


def weighted(*choices):
    """One of the items of one of several lists, each of which comes with its weight."""
    return pick([items for weight, items in choices for _ in range(weight)]).flatmap(pick)


WHO = st.integers(0, 2)
INDEX = st.integers(0, 7)
RETS = (0, 0, 0, 0xFFFF0006, 0xFFFF000C)
NOISE = (bytes(8), b"\1\2\3\4\5\6\7\x08", b"\xff" * 8)
WORDS = (0, 1, 2, 3, 4, PAGE, 2**32 - 1, 2**36 + 1, 2**64 - 1)
MESSAGE_PLACES = [Place(page, 0) for page in range(LISTS, PAGES)]
LIST_PLACES = [Place(page, offset) for page in range(LISTS) for offset in (0, 0, 0, 8)]
SIZES = (1, PAGE, 3 * PAGE, 600 * PAGE, 1100 * PAGE)
ATTRIBUTES = (0x209, 0x20A, 0x20A, 0x20B, 5, 6, 7, 1, 2, 3)
BUFFERS = [Param(*each) for each in product(ATTRIBUTES, LIST_PLACES, SIZES, range(1, 5))]
GOOD_MESSAGES = weighted(
    (2, [Message(command, params=[param]) for command, param in product((0, 1, 1, 2, 3), BUFFERS)]),
    (1, [Message(1, params=[first, second]) for first, second in zip(BUFFERS, BUFFERS[::-7], strict=False)]),
    (2, [Message(4, params=[param]) for param in BUFFERS if param.attr == 0x20A]),
    (1, [Message(5, params=[Param(5, 0, 0, cookie)]) for cookie in range(1, 5)]),
)
REQUESTS = [
    Message(command, params=[Param(kind, a, 2, 3)] * count)
    for command in (*map(int, RpcCommand), 99)
    for kind, a, count in ((1, 5, 1), (2, 0, 2), (3, 7, 4), (6, 0, 1), (10, 0, 2), (9, 8, 1), (0, 0, 5), (0, 0, 0))
]
ANSWERS = weighted(
    (4, [("end", ret, noise) for ret in RETS for noise in NOISE]),
    (5, [("command", Message(6, params=[Param(1, kind, PAGE, 8)])) for kind in (0, 1, 2)]),
    (2, [("command", Message(7, params=[Param(1, 1, cookie, 0)])) for cookie in range(1, 6)]),
    (2, [("command", request) for request in REQUESTS]),
    (1, [("alloc",)]),
    (2, [("free", cookie) for cookie in (1, 2, 3)]),
    (1, [("interrupt",)]),
    (
        1,
        [
            *(("thread", thread) for thread in (0, 1, 2, OWN_THREADS, 2**32 - 1)),
            *(("raw", (code, 2, 1, 3)) for code in (0, 1, 5, 0xFFFF0001, 0xFFFFFFFF, 2**32)),
            *[("unknown argument",), ("insist", True), ("insist", False), ("lost",)] * 2,
        ],
    ),
)
"""What OP-TEE does with a call; the last ones break its contract."""
OFFERED = list(
    product((0x20A, 0x20A, 0x20A, 0x20A, 0x209, 0), LIST_PLACES, (1, PAGE, 600 * PAGE, 2000 * PAGE), range(1, 6))
)
REPLIES = weighted(
    (4, [("offer", Param(*each)) for each in OFFERED]),
    (2, [("echo", (ret, noise)) for ret in RETS for noise in NOISE]),
    (1, [("other", request) for request in REQUESTS]),
    (1, [("nothing", None)]),
)
TROUBLE = weighted(
    (12, [None]),
    (
        1,
        [("flip", page, at, word) for page, at, word in product(range(1, PAGES), (0, 20, 28, 32, 40, 48, 56), WORDS)],
    ),
    (1, [("short", left) for left in range(5)]),
    (1, [("kind", page, kind) for page, kind in product(range(1, PAGES), KINDS)]),
    (2, [("well",)]),
)
"""What happens around a move: another vCPU writes once the message was read; the host runs out of pages; a page of the
guest changes its kind, or all are well again."""
STEPS = st.tuples(
    st.booleans(),
    INDEX,
    ANSWERS,
    REPLIES,
    weighted((5, MESSAGE_PLACES), (1, LIST_PLACES)),
    st.integers(1, 3),
    TROUBLE,
)
LIMITS = st.fixed_dictionaries(
    {
        "calls": st.sampled_from([1, 3, 3]),
        "buffers": st.sampled_from([1, 4, 4]),
        "pages": st.sampled_from([3, 2600, 2600]),
        "memory_kib": st.sampled_from([16, 96, 96]),
    }
)
FAST = [
    *map(int, (Function.CALLS_UID, Function.CALLS_COUNT, Function.GET_SHM_CONFIG, Function.GET_OS_REVISION)),
    *map(int, (Function.GET_THREAD_COUNT, Function.ENABLE_ASYNC_NOTIF, Function.ENABLE_SHM_CACHE)),
    *[int(Function.EXCHANGE_CAPABILITIES), int(Function.DISABLE_SHM_CACHE)] * 3,
]
FORGED_RETURNS = st.tuples(
    st.just(int(Function.RETURN_FROM_RPC)),
    *[pick(WORDS)] * 2,
    st.sampled_from([0, 1, 2, 2**32 - 1, OWN_THREADS + 1]),
    *[pick(WORDS)] * 2,
    st.just(0),
    st.just(0),
)


class History(RuleBasedStateMachine):
    """One history of both."""

    @initialize(
        policy=st.sampled_from(["default", "default", "default", "xen", "minimal"]), pool=st.sampled_from([None, 3000])
    )
    def begin(self, policy, pool):
        self.sides = SideBySide(policy, pool, **POLICIES[policy])
        self.vms = list(self.sides.rams)
        for vm, base in zip(self.vms, BASES, strict=True):
            for page in range(LISTS):  # of data pages, each continued by the next one; one of them by itself
                entries = [base + (1 + (page + n) % (PAGES - 1)) * PAGE for n in range(511)]
                following = base + (page if page == 3 else (page + 1) % LISTS) * PAGE
                self.sides.write(vm, base + page * PAGE, struct.pack("<512Q", *entries, following))
            self.sides.create(vm)
            self.sides.answer(0, (0, 0, 0, 0))

    # What the moves are made of

    @property
    def spec(self):
        return self.sides.spec

    def address(self, who, place):
        return place if isinstance(place, int) else BASES[who] + place.page * PAGE + place.offset

    def pack(self, who, message):
        resolved = [param._replace(a=self.address(who, param.a)) for param in message.params]
        return Message(*message.header[:7], resolved).pack()

    def calls(self, who, state):
        guest = self.spec.guests.get(self.vms[who])
        return [] if guest is None else [call for call in guest["calls"] if call["state"] in state]

    def trouble(self, who, what=None, *detail):
        if what == "flip":
            page, at, word = detail
            self.sides.flip(self.vms[who], BASES[who] + page * PAGE + at, struct.pack("<Q", word))
        elif what == "short":
            self.sides.short_of_pages(*detail)
        elif what == "kind":
            self.sides.set_kind(self.vms[who], BASES[who] + detail[0] * PAGE, detail[1])
        elif what == "well":
            for page in range(PAGES):
                self.sides.set_kind(self.vms[who], BASES[who] + page * PAGE, "rw")

    # Guests

    @rule(
        who=WHO,
        function=st.sampled_from(YIELDING),
        place=pick(MESSAGE_PLACES),
        message=GOOD_MESSAGES,
        where=st.sampled_from([0, 0, 64, 4000]),
        trouble=TROUBLE,
        steps=st.lists(STEPS, min_size=2, max_size=8),
        revive=st.booleans(),
    )
    def call(self, who, function, place, message, where, trouble, steps, revive):
        """A call as a driver makes it; where it can be in a registered buffer, it is."""
        if revive:
            self.revive(who)
        vm, guest = self.vms[who], self.spec.guests.get(self.vms[who])
        at = self.address(who, place)
        words = (*to_pair(at), 0)
        registered = [] if guest is None else [one for one in guest["buffers"].values() if one["state"] == "REGISTERED"]
        if function == "CALL_WITH_REGD_ARG" and registered:
            buffer = registered[where % len(registered)]
            words = (*to_pair(buffer["cookie"]), where)
            self.write_pinned(vm, buffer, buffer["offset"] + where, self.pack(who, message))
        else:
            self.sides.write(vm, at, self.pack(who, message))
        self.trouble(who, *trouble or ())
        self.sides.smc(vm, (int(Function[function]), *words, 0, 0, 0, 0))
        self.follow(who, steps)

    def write_pinned(self, vm, buffer, start, data):
        """Write to a registered buffer, wherever its pages are."""
        for n in range(0, len(data), 8):
            if (start + n) // PAGE < len(buffer["pinned"]):
                self.sides.write(vm, buffer["pinned"][(start + n) // PAGE] + (start + n) % PAGE, data[n : n + 8])

    @rule(
        who=WHO,
        function=st.sampled_from(YIELDING),
        place=strategies.PLACES,
        message=strategies.MESSAGES,
        count=st.none() | strategies.NEAR_32,
        trouble=TROUBLE,
    )
    def hostile_call(self, who, function, place, message, count, trouble):
        vm, at = self.vms[who], self.address(who, place)
        self.sides.write(vm, at, self.pack(who, message))
        if count is not None:
            self.sides.write(vm, at + 28, struct.pack("<I", count))
        if function == "CALL_WITH_REGD_ARG":
            words = (0, place.page % 5, place.offset)
        else:
            words = (*to_pair(at if place.offset == 1 else at - at % PAGE), 0)
        self.trouble(who, *trouble or ())
        self.sides.smc(vm, (int(Function[function]), *words, 0, 0, 0, 2**64 - 1))

    @rule(who=WHO, function=pick(FAST), words=st.tuples(*[pick(WORDS)] * 7), answer=ANSWERS)
    def fast(self, who, function, words, answer):
        before = len(self.sides.pending)
        self.sides.smc(self.vms[who], (function, *words))
        if len(self.sides.pending) > before:
            self.answer(before, *answer)

    @rule(who=WHO, regs=strategies.REGISTERS | FORGED_RETURNS)
    def any_smc(self, who, regs):
        self.sides.smc(self.vms[who], regs)

    @rule(who=WHO, steps=st.lists(STEPS, min_size=4, max_size=12))
    def go_on(self, who, steps):
        self.follow(who, steps)

    def follow(self, who, steps):
        """Calls go on: OP-TEE answers, or the guest does what it is asked, as a driver or nearly so."""
        for secure, index, answer, reply, page, cookie, trouble in steps:
            waiting = [
                each for each in self.calls(who, ("SUSPENDED", "FREEING", "TRANSLATING")) if each["thread"] is not None
            ]
            pending = [n for n, each in enumerate(self.sides.pending) if each[1]["guest"]["vm"] == self.vms[who]]
            if pending and (secure or not waiting):
                self.trouble(who, *trouble or ())
                self.answer(pending[index % len(pending)], *answer)
            elif waiting:
                self.return_from_rpc(who, waiting[index % len(waiting)], page, cookie, reply, trouble)

    def return_from_rpc(self, who, call, page, cookie, reply, trouble):
        words = to_pair(self.address(who, page))
        if call["rpc"] == CMD and call["thread"] < OWN_THREADS:
            self.reply(who, call, *reply)
            words = call["saved"]
        self.trouble(who, *trouble or ())
        regs = (int(Function.RETURN_FROM_RPC), *words, call["thread"], *to_pair(cookie), 0, 0)
        self.sides.smc(self.vms[who], regs)

    def reply(self, who, call, what, detail):
        """Write a reply where the request was delivered to."""
        vm, spec = self.vms[who], self.spec
        request = spec.request(call["guest"], call)
        if request is None or what == "nothing":
            return
        page, base, _ = request
        asked = bytearray(page["bytes"][base : base + 32 + 32 * min(header(page["bytes"], base)[7], 8)])
        if what == "other":
            asked = self.pack(who, detail)
        elif what == "offer":
            asked[20:24] = bytes(4)
            asked[32:64] = self.pack(who, Message(0, params=[detail]))[32:]
        else:
            ret, noise = detail
            asked[20:24] = struct.pack("<I", ret)
            for n in range(32, len(asked), 32):
                asked[n + 8 : n + 16] = noise
        if call["rpc_at"] is None:
            self.sides.write(vm, call["argument"]["ipa"], bytes(asked))
        elif call["place"][0] is None:
            self.sides.write(vm, call["place"][1] + call["rpc_at"], bytes(asked))

    # The secure world

    def answer(self, index, what, *detail):
        _, ticket, regs = self.sides.pending[index]
        if regs is None:
            if what == "interrupt":
                self.sides.give_back(index)
            else:
                self.sides.proceed(index)
        elif what == "lost":
            self.sides.lose(index)
        elif ticket["what"] == "host":
            self.sides.answer(index, (7 if what == "raw" else 0, 0, 0, 0))
        elif ticket["what"] == "fast":
            self.sides.answer(index, detail[0] if what == "raw" else self.fast_answer(regs[0], what))
        else:
            self.answer_call(index, ticket, what, *detail)

    def fast_answer(self, function, what):
        plain = {
            Function.EXCHANGE_CAPABILITIES: (0, 0xFFFF, 0x42, {"command": 6, "free": 255}.get(what, 4)),
            Function.DISABLE_SHM_CACHE: (0, 0, 1, 0),
            Function.GET_THREAD_COUNT: (0, 9, 0, 0),
        }
        return plain.get(function, (0, 1, 2, 3))

    def answer_call(self, index, call, what, detail=None, noise=b""):
        sides, guest = self.sides, call["guest"]
        busy = {each["thread"] for each in guest["calls"]}
        thread = next(n for n in range(THREADS + 1) if n not in busy)
        if what == "end":
            shadow = call["shadow"]
            for first, end in outputs(call["types"]):
                sides.op_tee_writes(shadow, first, noise * ((end - first) // 8))
            sides.op_tee_writes(shadow, 8, noise[:4])
            sides.op_tee_writes(shadow, 20, struct.pack("<2I", detail, 4))
            sides.answer(index, (0, 7, 8, 9))
        elif what == "alloc" or (what == "command" and call["rpc_at"] is None and not guest["arguments"]):
            sides.answer(index, (int(RpcReturn.ALLOC), 160, 0, thread))
        elif what == "command":
            cookie = 0 if call["rpc_at"] is not None else min(guest["arguments"])
            self.ask(call, cookie, detail)
            sides.answer(index, (int(RpcReturn.CMD), *to_pair(cookie), thread))
        elif what == "unknown argument":
            sides.answer(index, (int(RpcReturn.CMD), 0, 5, thread))
        elif what == "free":
            cookie = min(guest["arguments"], default=detail) if detail < 3 else detail
            sides.answer(index, (int(RpcReturn.FREE), *to_pair(cookie), thread))
        elif what == "raw":
            sides.answer(index, detail)
        elif what == "insist":
            self.insist(index, call, thread, contract=detail)
        else:
            sides.answer(index, (int(RpcReturn.FOREIGN_INTR), 11, 12, detail if what == "thread" else thread))

    def ask(self, call, cookie, request):
        if call["rpc_at"] is not None:
            page, base, room = call["shadow"], call["rpc_at"], call["rpc_room"] + 64
        else:
            page, base, room = call["guest"]["arguments"][cookie]["page"], 0, PAGE
        data = request.pack()
        self.sides.op_tee_writes(page, base, data[: min(room, PAGE - base)])

    def insist(self, index, call, thread, contract):
        """OP-TEE asks again and again what nobody can deliver: it goes on, but not for ever (R18)."""
        cookies = sorted(call["guest"]["arguments"])
        cookie = 0 if call["rpc_at"] is not None else (cookies or [9])[0]
        wrong = Message(int(RpcCommand.BENCH_REG) if contract else int(RpcCommand.RPMB), params=[Param(1)])
        for _ in range(70):
            if cookie in call["guest"]["arguments"] or call["rpc_at"] is not None:
                self.ask(call, cookie, wrong)
            self.sides.answer(index, (int(RpcReturn.CMD), *to_pair(cookie), thread))
            index = next((n for n, each in enumerate(self.sides.pending) if each[1] is call), None)
            if index is None or call["guest"]["state"] not in SERVED:
                return

    # The host

    @rule(who=WHO, what=pick(["destroy", "reset", "pause", "abandon", "limits", "limits"]), limits=LIMITS)
    def host(self, who, what, limits):
        vm = self.vms[who]
        if what == "abandon":
            self.sides.abandon(vm)
        elif what == "pause":
            self.sides.pause(vm)
        elif what == "limits":
            self.sides.change_limits(vm, **limits)
        else:
            self.sides.destroy(vm, again=what == "reset")

    def revive(self, who):
        """A guest that cannot make calls can, as far as its host can help that."""
        vm = self.vms[who]
        guest = self.spec.guests.get(vm)
        if guest is None:
            self.sides.create(vm)
            self.sides.answer(len(self.sides.pending) - 1, (0, 0, 0, 0))
        elif guest["state"] == "PAUSED":
            self.sides.resume(vm)
        elif guest["state"] in ("ISOLATED", "QUARANTINED", "DYING"):
            self.sides.destroy(vm, again=True)

    def teardown(self):
        if hasattr(self, "sides"):
            try:
                if self.sides.agree:
                    self.sides.finish()
            finally:
                self.sides.pair.close()


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=3000 if NIGHTLY else 60, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)
