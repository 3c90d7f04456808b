"""The checker sees what it is there to see: each invariant, with the core broken in one small place.

`broken` replaces a few words in the source of one function of the core, for the time of a test.
"""

import ast
import inspect
import re
import textwrap
from contextlib import suppress

import pytest

from hv_models.machine import MEDIATOR_BASE
from mediator.core import fast, rpc, sharing, yielding
from mediator.core.faults import MediatorBug
from mediator.core.mediator import Mediator
from mediator.core.states import ARGUMENT_TABLE, BUFFER_TABLE, CALL_TABLE, GUEST_TABLE, CallState
from mediator.core.steps import SECURE_WORLD_FAULT, Event, Reply
from mediator.invariants import TITLES, lifecycles
from optee.abi.message import Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, RpcReturn, to_pair
from tests.core.pair import (
    RMEM_IN,
    TMEM_OUT,
    VALUE_IN,
    VALUE_INOUT,
    VALUE_OUT,
    Pair,
    ask_alloc,
    interrupt,
    invoke,
    policy_of,
    shm_alloc,
    smc,
    suspended_in_command,
)
from tests.core.test_calls import registered_pages


@pytest.fixture
def broken(monkeypatch):
    def replace(function, old, new):
        source = textwrap.dedent(inspect.getsource(function))
        changed, count = re.subn(old, new, source)
        assert count, f"{function.__qualname__} reads differently now: /{old}/ is not in it"
        tree = ast.parse(changed)
        namespace = {}
        exec(compile(tree, f"<broken {function.__qualname__}>", "exec"), function.__globals__, namespace)
        (made,) = namespace.values()
        monkeypatch.setattr(function, "__code__", made.__code__)

    return replace


@pytest.fixture
def loose():
    """A pair that nobody looks after at the end: its core is broken."""
    pairs = []

    def build(policy="default"):
        pair = Pair(policy)
        pairs.append(pair)
        return pair, pair.guest("kvm", 16 << 20)

    yield build
    for pair in pairs:
        pair.close()


def shared_buffer(pair, guest):
    guest.invoke(guest.tmem(3, cookie=1))


def registration(pair, guest):
    guest.register(guest.tmem(3, cookie=1))
    guest.unregister(1)


def end_of_guest(pair, guest):
    guest.register(guest.tmem(3, cookie=1))
    pair.destroy(guest)


def argument(pair, guest):
    pair.world.script += [ask_alloc(), interrupt()]
    guest.call(invoke())
    guest.give_page(0xC0)
    pair.world.fast[Function.DISABLE_SHM_CACHE] = (0, 0, 0xC0, 0)
    guest.smc(Function.DISABLE_SHM_CACHE)


def offered_buffer(pair, guest):
    at, _ = suspended_in_command(guest, shm_alloc(), behind=False)
    guest.write(Message(RpcCommand.SHM_ALLOC, params=[guest.tmem(3, cookie=0xB0, kind=TMEM_OUT)]), at)
    pair.world.script.append(interrupt())
    guest.resume()


def values(pair, guest):
    guest.call(invoke(Param(VALUE_INOUT, 1, 2, 3), Param(VALUE_IN, 4, 5, 6)))


def in_registered_buffer(pair, guest):
    first = registered_pages(guest)
    guest.ram.write(first, invoke(Param(VALUE_INOUT, 1, 2, 3)).pack())
    guest.smc(Function.CALL_WITH_REGD_ARG, 0, 9, 0)


def refused(pair, guest):
    guest.smc(Function.CALL_WITH_ARG, 0, 1)


def rejected(pair, guest):
    guest.invoke(Param(RMEM_IN, 0, 0, 0))


def rpc_reply(pair, guest):
    suspended_in_command(guest, Message(RpcCommand.GET_TIME, params=[Param(2)]), behind=False)
    guest.resume()


def long_list(pair, guest):
    guest.invoke(guest.tmem(16384))


def fast_call(pair, guest):
    guest.smc(Function.GET_OS_UUID)


def two_of_one_name(pair, guest):
    guest.register(guest.tmem(3, cookie=1))
    guest.invoke(guest.tmem(2, cookie=1))


def offered_twice(pair, guest):
    guest.register(guest.tmem(3, cookie=0xB0))
    offered_buffer(pair, guest)


def two_arguments_of_one_name(pair, guest):
    for thread in range(2):
        pair.world.script += [ask_alloc(thread), interrupt(thread)]
        guest.call(invoke())
        guest.give_page(0xC0, thread)


def resumption(pair, guest):
    pair.world.script.append(interrupt())
    guest.call(invoke())
    guest.resume()


def wrong_thread(pair, guest):
    pair.world.script.append(interrupt())
    guest.call(invoke())
    guest.resume(thread=5)
    guest.resume()


def suspension(pair, guest):
    pair.world.script.append(interrupt())
    guest.call(invoke())


BREAKAGES = {
    "an unpin is removed": (1, sharing.release_shared, r"guest\.memory\.unpin\(.*\)", "pass", shared_buffer),
    "an unpin is removed, registered": (1, sharing.release_shared, r"guest\.memory\.unpin\(.*\)", "pass", registration),
    "an unpin is removed, at the end": (2, sharing.release_shared, r"guest\.memory\.unpin\(.*\)", "pass", end_of_guest),
    "an RPC page stays pinned": (1, sharing.release_argument, r"guest\.memory\.unpin\(.*\)", "pass", argument),
    "a refund is skipped": (2, sharing.release_shared, r"shared\.charge\.refund\(\)", "pass", shared_buffer),
    "a refund is skipped at the end": (2, sharing.release_shared, r"shared\.charge\.refund\(\)", "pass", end_of_guest),
    "a call's refund is skipped": (2, yielding.end, r"call\.charge\.refund\(\)", "pass", values),
    "an RPC page's refund is skipped": (2, sharing.release_argument, r"argument\.charge\.refund\(\)", "pass", argument),
    "a call ends that OP-TEE holds": (
        3,
        Mediator._call_returned,
        r"if is_rpc:\n        return",
        "if 0:\n        return",
        suspension,
    ),
    "an IPA is forwarded": (4, sharing.translate, r"shadow\.words\[.*\] = .*", "pass", shared_buffer),
    "an IPA is forwarded in a reply": (4, sharing.translate, r"shadow\.words\[.*\] = .*", "pass", offered_buffer),
    "a list of IPAs is forwarded": (
        4,
        sharing._pin,
        r"= octets\[at : at \+ size\]",
        "= b''.join(entries)[at : at + size]",
        shared_buffer,
    ),
    "the guest's RPC page is forwarded": (4, rpc._allocate_argument, r"return page\.pa", "return ipa", argument),
    "a host address stands in a register": (
        4,
        yielding.completed,
        r"core\.completed\(regs, answer\)",
        "core.suspended(regs, (0, shadow.pa >> 32, shadow.pa & 0xFFFFFFFF, 0))",
        values,
    ),
    "a frame's address stands in a register": (
        4,
        yielding.completed,
        r"core\.completed\(regs, answer\)",
        "core.suspended(regs, (0, 0, guest.memory.memory.regions[0].bank.pa[5].item(), 0))",
        values,
    ),
    "a host address is written back": (
        4,
        yielding.completed,
        r"call\.outputs\)",
        "tuple(slice(field.start - 8, field.stop) for field in call.outputs))",
        shared_buffer,
    ),
    "a live cookie is taken again": (
        5,
        sharing._open_singly,
        r"if cookie not in guest\.buffers",
        "if True",
        two_of_one_name,
    ),
    "a live cookie is taken again, in a reply": (
        5,
        sharing._open_singly,
        r"if cookie not in guest\.buffers",
        "if True",
        offered_twice,
    ),
    "a live RPC argument is replaced": (
        5,
        rpc._allocate_argument,
        r"if cookie in guest\.arguments",
        "if False",
        two_arguments_of_one_name,
    ),
    "a call that waits is forgotten": (6, rpc.resume, r"guest\.suspended\.get\(thread\)", "None", resumption),
    "a call that waits is forgotten when told": (
        6,
        rpc.suspended,
        r"guest\.suspended\[thread\] = call\n    return",
        "return",
        resumption,
    ),
    "a call that nobody was told of is resumed": (
        6,
        rpc.resume,
        r"thread = ThreadId\(regs\[3\] & LOW\)",
        "thread = ThreadId(0)",
        wrong_thread,
    ),
    "the end of a call is told as an RPC": (
        6,
        Mediator._call_returned,
        r"return yielding\.completed\(self, call, answer\)",
        "yielding.completed(self, call, answer); return self.suspended(call.regs, (0xFFFF0004, 0, 0, 0))",
        values,
    ),
    "a state is assigned that the table does not have": (
        7,
        yielding._send,
        r"advance\(call, _FORWARD, CALL_TABLE\)",
        "call.state = type(call.state).FREEING",
        values,
    ),
    "a state is left as it was": (
        7,
        rpc._forward,
        r"advance\(call, CallEvent\.RESUME, CALL_TABLE\)",
        "call.state = CallState.TRANSLATING",
        resumption,
    ),
    "a released buffer is registered": (
        7,
        yielding._registered,
        r"advance\(buffer, BufferEvent\.KEEP, BUFFER_TABLE\)",
        "buffer.state = BufferState.UNREGISTERING",
        registration,
    ),
    "more pages are translated than are named": (
        10,
        sharing._pin,
        r"octets = ",
        "[guest.memory.unpin(guest.memory.pin(np.frombuffer(entries[0], 'u8'))) for _ in range(3)]; octets = ",
        shared_buffer,
    ),
    "a message is read twice": (
        8,
        yielding._take_message,
        r"data = guest\.memory\.read\(ipa, PAGE_SIZE\)",
        "data = guest.memory.read(ipa, PAGE_SIZE) and guest.memory.read(ipa, PAGE_SIZE)",
        values,
    ),
    "a word of a message is read again": (
        8,
        yielding._take_message,
        r"data = guest\.memory\.read\(ipa, PAGE_SIZE\)",
        "data = guest.memory.read(ipa, PAGE_SIZE); guest.memory.read(ipa + 28, 4)",
        values,
    ),
    "a registered message is read twice": (
        8,
        yielding._read_registered,
        r"return place\.read",
        "place.read(guest.memory, 28, 4); return place.read",
        in_registered_buffer,
    ),
    "an RPC reply is read twice": (
        8,
        rpc._resume_command,
        r"reply = _read\(call, size\)",
        "reply = _read(call, size) and _read(call, size)",
        rpc_reply,
    ),
    "a field that is no output is written": (
        8,
        yielding.completed,
        r"call\.outputs\)",
        "(slice(0, 4),))",
        values,
    ),
    "an input is written back": (
        8,
        yielding.completed,
        r"call\.outputs\)",
        "tuple(slice(field.start + 32, field.stop + 32) for field in call.outputs))",
        values,
    ),
    "a7 is another's": (9, yielding._send, r"call\.guest\.vm\)", "call.guest.vm + 1)", values),
    "a7 is the guest's word": (9, fast.enter, r"guest\.vm\)", "regs[7])", fast_call),
    "the guest's x0 is forwarded": (
        9,
        fast.enter,
        r"Forward\(\(int\(function\)",
        "Forward((regs[0] | 1 << 32",
        fast_call,
    ),
    "a list page is read very often": (
        10,
        sharing.translate,
        r"shared\.lists\.append\(page\)",
        "shared.lists.append(page); [memory.read(source, 8, writable=True) for _ in range(2000)]",
        long_list,
    ),
    "a refusal is an error event": (11, yielding._count, '"info"', '"error"', refused),
    "a rejection is an error event": (11, yielding._count, '"info"', '"error"', rejected),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_core_is_reported_with_invariant_guest_and_step(broken, loose, name):
    invariant, function, old, new, use = BREAKAGES[name]
    pair, guest = loose()
    use(pair, guest)
    assert pair.checker.violations == []  # the same use of the whole core
    pair, guest = loose()
    first = pair.checker.steps
    broken(function, old, new)
    with suppress(AssertionError, MediatorBug, KeyError):  # what is broken may break the rest
        use(pair, guest)
    pair.checker.scan()
    found = [violation for violation in pair.checker.violations if violation.invariant == invariant]
    assert found, pair.checker.violations
    assert found[0].guest == guest.id
    assert found[0].step > first
    text = str(found[0])
    assert f"invariant {invariant} ({TITLES[invariant]})" in text
    assert f"guest {guest.id}" in text and f"step {found[0].step}" in text
    assert found[0].as_data()["title"] == TITLES[invariant]


def test_a_function_that_is_not_allowed_is_reported(broken, loose):
    broken(Mediator.submit, r"self\._handlers\.get\(", "{int(known): known for known in Function}.get(")
    pair, guest = loose("minimal")
    guest.smc(Function.ENABLE_ASYNC_NOTIF)
    assert {(violation.invariant, violation.guest) for violation in pair.checker.violations} == {(9, guest.id)}


def test_an_answer_that_is_given_twice_is_reported(loose):
    pair, guest = loose()
    step = guest.submit(smc(Function.GET_OS_UUID))
    answer = pair.answer(step)
    pair.checker.returned(step.ticket, answer)
    assert pair.checker.violations == []
    pair.checker.returned(step.ticket, answer)
    assert {violation.invariant for violation in pair.checker.violations} == {6}


def test_a_call_that_comes_back_twice_stops_loudly(loose):
    """R25: a bug of ours, never a quiet one."""
    pair, guest = loose()
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke()))))
    pair.checker.returned(step.ticket, (0, 0, 0, 0))
    with pytest.raises((MediatorBug, AssertionError)):
        pair.checker.returned(step.ticket, (0, 0, 0, 0))


def test_a_request_that_is_never_answered_is_reported_at_the_end(loose):
    pair, guest = loose()
    step = guest.submit(smc(Function.GET_OS_UUID), 3)
    asked = pair.checker.steps
    pair.checker.finish()
    (found,) = pair.checker.violations
    assert (found.invariant, found.guest, found.got) == (6, guest.id, "none")
    assert f"vCPU 3 in step {asked}" in found.expected
    pair.returned(step.ticket, pair.answer(step))


def test_a_request_whose_ticket_stands_for_another_is_reported(broken, loose):
    pair, guest = loose()
    broken(
        fast.enter,
        r"FastCall\(guest, regs, function\)",
        "vars(core).setdefault('ticket', FastCall(guest, regs, function))",
    )
    guest.submit(smc(Function.GET_OS_UUID), 0)
    asked = pair.checker.steps
    guest.submit(smc(Function.CALLS_UID), 1)
    (found,) = pair.checker.violations
    assert (found.invariant, found.guest) == (6, guest.id)
    assert f"the request of step {asked}" in found.expected


def test_a_guest_that_is_gone_needs_no_answers(loose):
    pair, guest = loose()
    step = guest.submit(smc(Function.GET_OS_UUID))
    pair.checker.destroy(guest.id)
    pair.returned(step.ticket, pair.answer(step))
    pair.destroy(guest)
    pair.checker.finish()
    assert pair.checker.violations == []


def test_a_call_that_nobody_can_go_on_with_is_reported(loose):
    pair, guest = loose()
    suspension(pair, guest)
    (call,) = guest.record.calls.values()
    pair.checker._witnesses[guest.id].outside.waiting.clear()
    pair.checker.scan()
    (found,) = pair.checker.violations
    assert (found.invariant, found.guest) == (6, guest.id) and f"call {call.id}" in found.expected


def test_the_edges_that_the_checker_knows_are_those_of_the_core():
    """Written down twice, so that a mistake in one of them shows."""
    for table, edges in (
        (CALL_TABLE, lifecycles.CALL_EDGES),
        (BUFFER_TABLE, lifecycles.BUFFER_EDGES),
        (ARGUMENT_TABLE, lifecycles.ARGUMENT_EDGES),
        (GUEST_TABLE, lifecycles.GUEST_EDGES),
    ):
        moves = {(old.name, new.name) for old, events in table.items() for new in events.values()}
        assert moves == {edge for edge in edges if edge[0] != lifecycles.NEW}


def test_a_wrong_edge_in_a_table_is_reported(monkeypatch, loose):
    pair, guest = loose()
    monkeypatch.setitem(CALL_TABLE[CallState.RUNNING], rpc.CallEvent.RPC, CallState.FREEING)
    with suppress(MediatorBug):
        resumption(pair, guest)
    assert (7, guest.id) in {(found.invariant, found.guest) for found in pair.checker.violations}


def test_a_fault_of_the_secure_world_is_no_violation_and_a_made_up_one_is(monkeypatch, loose):
    """Invariant 11: who is to blame follows from what OP-TEE answered, not from the name of the event."""
    pair, guest = loose()
    for _ in range(2):
        pair.world.script.append(interrupt(4))
        guest.call(invoke())
    assert SECURE_WORLD_FAULT in pair.names()
    assert pair.checker.violations == []
    pair, guest = loose()

    def refused(core, guest, regs):
        guest.events.append(Event(SECURE_WORLD_FAULT, "error", guest.vm, {}))
        return Reply((3, *regs[1:]))

    monkeypatch.setattr(rpc, "resume", refused)
    guest.resume()
    assert {(found.invariant, found.guest) for found in pair.checker.violations} == {(11, guest.id)}


def test_a_move_that_no_table_has_stops_loudly(broken, loose):
    """Invariant 7, before the checker could see it."""
    _, guest = loose()
    broken(yielding._send, r"advance\((.*)\)", r"advance(\1); advance(\1)")
    with pytest.raises(MediatorBug, match="Call in RUNNING has no edge FORWARD"):
        guest.call(invoke())


def test_pins_of_the_right_number_on_the_wrong_pages_are_found_by_a_scan(loose):
    pair, guest = loose()
    guest.register(guest.tmem(3, cookie=1))
    bank = guest.vm.regions[0].bank
    page = next(iter(bank.pinned()))
    bank.pins[page] -= 1
    bank.pins[page + 50] += 1
    guest.smc(Function.CALLS_UID)
    pair.checker.scan()
    assert {(violation.invariant, violation.guest) for violation in pair.checker.violations} == {(1, guest.id)}


def test_a_call_of_a_preempted_guest_and_hostile_shapes_are_no_violations(loose):
    """The checker's own false alarms."""
    pair, guest = loose()
    message = invoke(*[guest.tmem(16384, cookie=n + 1) for n in range(3)])
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))))
    guest.smc(Function.CALLS_UID)
    pair.checker.scan()
    pair.drive(step)
    bad = guest.tmem(16384, cookie=1)
    at = bad.a
    for _ in range(32):
        at = int.from_bytes(guest.ram.read(at + 4088, 8), "little")
    guest.ram.write(at, (8).to_bytes(8, "little"))
    guest.invoke(bad)
    guest.invoke(*[guest.tmem(1, cookie=n + 1)._replace(a=8) for n in range(127)])
    assert pair.checker.violations == []


def test_what_a_guest_itself_says_is_no_host_address_that_it_was_told(loose):
    """A guest may guess where the mediator's pages are: to get its own word back is no disclosure."""
    pair, guest = loose()
    guess = MEDIATOR_BASE
    guest.smc(Function.BOOT_SECONDARY, guess, guess, guess)
    guest.smc(Function.BOOT_SECONDARY, guess >> 32, guess & 0xFFFFFFFF)
    guest.smc(Function.RETURN_FROM_RPC, guess, guess, guess)
    assert guest.invoke(Param(VALUE_INOUT, guess, guess, guess)).params == [Param(VALUE_INOUT, guess, guess, guess)]
    assert pair.checker.violations == []


@pytest.mark.parametrize("wrong", [False, True])
def test_a_fast_call_that_op_tee_answers_with_an_rpc_code_hides_no_thread(loose, broken, wrong):
    """A fast call has no thread: the one that its answer seems to name stays that of the call that waits."""
    pair, guest = loose()
    suspended_in_command(guest, Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT)]), thread=7)
    pair.world.fast[Function.CALLS_UID] = (int(RpcReturn.FOREIGN_INTR), 0, 0, 7, 0, 0, 0, 0)
    guest.smc(Function.CALLS_UID)
    assert pair.checker.violations == []
    if wrong:
        broken(rpc.resume, "if call is None:", "if call is not None:")
    guest.smc(Function.RETURN_FROM_RPC, 0, 0, 7)
    assert {found.invariant for found in pair.checker.violations} == ({6} if wrong else set())


def test_the_checker_is_quiet_and_counts_forwards_of_a_healthy_run(make):
    pair = make(policy_of())
    guest = pair.guest(ram=16 << 20)
    before = pair.checker.forwards
    shared_buffer(pair, guest)
    registration(pair, guest)
    long_list(pair, guest)
    assert pair.checker.forwards == before + 4
    assert pair.checker.translated >= 16384 + 6
    assert pair.checker.untranslated == 0


def test_each_invariant_has_something_that_breaks_it():
    assert {invariant for invariant, *_ in BREAKAGES.values()} == set(TITLES)
