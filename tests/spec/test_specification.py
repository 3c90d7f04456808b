"""The core does what the specification says, whatever guests and the secure world do, in any order.

Each example is a history of up to three guests: calls, replies, writes, answers of OP-TEE, pauses, deaths, benign and
hostile. After each move both sides hold the same: registers, memory of guests, what OP-TEE sees, pins, sums, records.
"""

import os
import struct

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from optee.abi.message import Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, RpcReturn, to_pair
from tests import strategies
from tests.spec.moves import (
    ANSWERS,
    FAST,
    FORGED_RETURNS,
    GOOD_MESSAGES,
    LIMITS,
    LISTS,
    MESSAGE_PLACES,
    STEPS,
    TROUBLE,
    WHO,
    WORDS,
    YIELDING,
    pick,
)
from tests.spec.side_by_side import BASES, PAGES, THREADS, SideBySide
from tests.spec.specification.terms import CMD, OWN_THREADS, PAGE, SERVED, header, outputs

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
POLICIES = {
    "default": {"pages": 2600, "buffers": 4, "pages_per_buffer": 1200, "rpc_arguments": 2, "memory_kib": 96},
    "xen": {"pages": 700, "rpc_arguments": 2},
    "minimal": {"pages": 600, "buffers": 3},
}


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
