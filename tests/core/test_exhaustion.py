"""Every order of events of two guests with three calls between them, to the end: no state outside the tables.

The core is driven, not its tables: a state is what its guests, calls, buffers and RPC arguments are in, and each way to
it is walked on a machine of its own. What was seen before is not walked again.
"""

import os
from collections import deque

from mediator.core.states import GuestState
from mediator.core.steps import Forward, Queue, Reply
from mediator.invariants.lifecycles import ARGUMENT_EDGES, BUFFER_EDGES, CALL_EDGES, GUEST_EDGES
from optee.abi.message import Message
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, RpcReturn, is_rpc, to_pair
from tests.core.pair import (
    TMEM_OUT,
    Pair,
    ask,
    ask_alloc,
    interrupt,
    invoke,
    register,
    shm_alloc,
    smc,
    succeed,
    unregister,
)

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
BOUND = 6000 if NIGHTLY else 60
"""States to walk from. All orders to the end take the nightly run."""
CALLS = 3
RAM = 256 << 10
ANSWERS = ("end", "bad", "refuse", "alloc", "command", "interrupt")


class Walk:
    """One order of events."""

    def __init__(self):
        self.pair = Pair()
        self.guests = [self.pair.guest("kvm", RAM), self.pair.guest("xen", RAM)]
        self.made = 0
        self.held = []
        self.told = [[], []]

    def events(self):
        """What may happen next."""
        for who, guest in enumerate(self.guests):
            record = self.pair.mediator.guests.get(guest.id)
            if record is None:
                continue
            if record.state is GuestState.LIVE and self.made < CALLS:
                yield from (("call", who, kind) for kind in ("invoke", "register", "unregister"))
            yield from (("resume", who, index) for index in range(len(self.told[who])))
            yield ("destroy", who, 0)
        for index in range(len(self.held)):
            yield from (("answer", index, answer) for answer in ANSWERS)

    def do(self, event):
        what, who, detail = event
        world = self.pair.world
        if what == "call":
            guest = self.guests[who]
            self.made += 1
            made = {
                "invoke": lambda: invoke(guest.tmem(1, cookie=9)),
                "register": lambda: register(guest.tmem(1, cookie=1, kind=TMEM_OUT)),
                "unregister": lambda: unregister(1),
            }[detail]()
            self.keep(who, guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(made)))))
        elif what == "resume":
            guest = self.guests[who]
            thread, rpc = self.told[who].pop(detail)
            page = guest.page()
            if rpc == RpcReturn.CMD:
                request = guest.record.suspended[thread]
                offered = guest.tmem(1, cookie=0x20 + self.made, kind=TMEM_OUT)
                guest.write(Message(RpcCommand.SHM_ALLOC, params=[offered]), request.argument.ipa)
            words = (*to_pair(page), thread, *to_pair(0xC0 + thread))
            self.keep(who, guest.submit(smc(Function.RETURN_FROM_RPC, *words)))
        elif what == "answer":
            owner, step = self.held.pop(who)
            thread = next(n for n in range(8) if (self.guests[owner].id, n) not in world.suspended)
            cookies = [cookie for vm, cookie in world.arguments if vm == self.guests[owner].id]
            command = ask(shm_alloc(), cookies[0], thread) if cookies else interrupt(thread)
            world.script.append(
                {
                    "end": succeed(),
                    "bad": succeed(0xFFFF0006, 3),
                    "refuse": lambda world, now, regs: (5, 0, 0, 0),
                    "alloc": ask_alloc(thread),
                    "command": command,
                    "interrupt": interrupt(thread),
                }[detail]
            )
            self.keep(owner, self.pair.returned(step.ticket, world.call(step.regs)))
        else:
            guest = self.guests[who]
            step = self.pair.checker.destroy(guest.id)
            while isinstance(step, Queue):
                index = next(n for n, (owner, _) in enumerate(self.held) if owner == who)
                self.do(("answer", index, "end"))
                step = self.pair.checker.destroy(guest.id)
            self.pair.drive(step)
            self.told[who].clear()

    def keep(self, who, step):
        self.pair.note(step)
        if isinstance(step, Forward):
            self.held.append((who, step))
        elif isinstance(step, Reply) and is_rpc(step.regs[0]):
            self.told[who].append((step.regs[3], step.regs[0]))

    def state(self):
        """What is alike walks alike: names of states, without the numbers."""
        guests = []
        for who, guest in enumerate(self.guests):
            record = self.pair.mediator.guests.get(guest.id)
            if record is None:
                guests.append(("GONE",))
                continue
            calls = sorted(
                (str(call.command), call.state.name, call.rpc, any(one.ticket is call for _, one in self.held))
                for call in record.calls.values()
            )
            buffers = sorted((cookie, buffer.state.name) for cookie, buffer in record.buffers.items())
            guests.append((record.state.name, *calls, *buffers, len(record.arguments), len(self.told[who])))
        return self.made, *guests


def test_every_order_of_events_ends_well():
    first = Walk()
    seen = {first.state()}
    todo = deque([()])
    taken = set()
    first.pair.close()
    walked = 0
    while todo and walked < BOUND:
        path = todo.popleft()
        walked += 1
        walk = Walk()
        for event in path:
            walk.do(event)
        events = list(walk.events())
        walk.pair.close()
        for event in events:
            walk = Walk()
            for earlier in (*path, event):
                walk.do(earlier)
            assert walk.pair.checker.violations == [], (*path, event)
            taken |= walk.pair.checker.taken
            state = walk.state()
            if state not in seen:
                seen.add(state)
                todo.append((*path, event))
            walk.pair.close()
    known = {"guest": GUEST_EDGES, "call": CALL_EDGES, "buffer": BUFFER_EDGES, "RPC argument": ARGUMENT_EDGES}
    assert {(before, after) for what, before, after in taken} <= set().union(*known.values())
    print(f"{len(seen)} states, {len(taken)} edges, {'to the end' if not todo else f'{len(todo)} not walked from'}")
    assert not todo or len(seen) > BOUND
