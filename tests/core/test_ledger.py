"""Accounting: rules R21 to R23 (B3, B9, B14)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator.core import lifecycle
from mediator.core.ledger import RESOURCES, Ledger, Limits, OverLimit
from mediator.core.sharing import PAGES_PER_STEP
from mediator.core.steps import Forward, Preempt, Reply
from optee.abi.message import ENTRIES_PER_PAGE, Command, Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, to_pair
from tests.core.pair import (
    BAD_PARAMETERS,
    COMMS,
    OUT_OF_MEMORY,
    RMEM_IN,
    TMEM_INOUT,
    TMEM_OUT,
    VALUE_INOUT,
    Pair,
    ask_alloc,
    interrupt,
    invoke,
    policy_of,
    refuse,
    register,
    shm_alloc,
    smc,
    succeed,
    suspended_in_command,
)

CHARGES = st.lists(st.tuples(*[st.integers(0, 6)] * 5), max_size=40)


@given(st.tuples(*[st.integers(0, 12)] * 5), CHARGES, st.data())
def test_a_ledger_is_the_sum_of_its_live_charges(bounds, wanted, data):
    """Against plain arithmetic: all or nothing, the same object refunds, a second refund does nothing."""
    pages, buffers, arguments, calls, memory = bounds
    ledger = Ledger(Limits(pages, buffers, arguments, calls, memory, 1000))
    live = []
    for amounts in wanted:
        named = dict(zip(RESOURCES, amounts, strict=True))
        sums = ledger.sums()
        fits = all(sums[name] + named[name] <= getattr(ledger.limits, name) or not named[name] for name in RESOURCES)
        try:
            live.append((named, ledger.charge(**named)))
            assert fits
        except OverLimit as over:
            assert not fits
            assert sums[over.resource] + named[over.resource] > getattr(ledger.limits, over.resource)
            assert ledger.sums() == sums
        if live and data.draw(st.booleans()):
            _, charge = live.pop(data.draw(st.integers(0, len(live) - 1)))
            charge.refund()
            charge.refund()
        assert ledger.sums() == {name: sum(named[name] for named, _ in live) for name in RESOURCES}
    for _, charge in live:
        charge.refund()
    assert not any(ledger.sums().values())


def test_what_is_not_asked_for_is_not_charged():
    ledger = Ledger(Limits(9, 9, 9, 9, 9, 9))
    charge = ledger.charge()
    assert not any(ledger.sums().values()) and not any(ledger.peaks().values())
    charge.refund()


def test_memory_of_a_charge_is_given_back_once():
    """A buffer that is gone may still be asked for its page lists: what was refunded is not refunded again."""
    ledger = Ledger(Limits(10, 10, 10, 10, 1000, 10))
    ledger.charge(memory=50)
    charge = ledger.charge(memory=300)
    charge.reduce_memory(100)
    assert (ledger.memory, charge.memory, charge.refunded) == (250, 200, False)
    charge.refund()
    assert (ledger.memory, charge.refunded) == (50, True)
    charge.reduce_memory(100)
    assert ledger.memory == 50 and ledger.memory_peak == 350


def watching(other):
    """What a guest sees of itself while others are at their limits: a healthy run, register by register."""
    seen = [other.smc(Function.EXCHANGE_CAPABILITIES), other.smc(Function.GET_THREAD_COUNT)]
    seen.append(other.call(invoke(other.tmem(3, cookie=1), Param(VALUE_INOUT, 1, 2, 3)))[0])
    seen.append(other.register(other.tmem(2, cookie=9)).ret)
    seen.append(other.unregister(9).ret)
    seen.append(other.sums())
    return seen


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("resource", ["pages", "buffers", "calls", "rpc_arguments", "memory", "pages_per_buffer"])
def test_each_limit_holds_exactly_and_others_see_nothing_of_it(make, resource, busy):
    """B14: limit - 1 and limit are granted, limit + 1 is not; a second guest sees what it saw before."""
    limits = {"pages": 12, "buffers": 6, "pages_per_buffer": 8, "calls": 3, "rpc_arguments": 3, "memory": 64 << 10}
    pair = make(policy_of("default", **limits))
    guest, other = pair.guest(), pair.guest("xen")
    if busy:
        for cookie in range(100, 105):
            other.register(other.tmem(1, cookie=cookie))
        other.limits.pages, other.limits.buffers = 40, 20
    before = watching(other)
    match resource:
        case "pages":
            assert guest.register(guest.tmem(8, cookie=1)).ret == 0
            assert guest.invoke(guest.tmem(5, cookie=2)).ret == OUT_OF_MEMORY
            assert guest.invoke(guest.tmem(2, cookie=2), guest.tmem(3, cookie=3)).ret == OUT_OF_MEMORY
            assert guest.invoke(guest.tmem(3, cookie=2)).ret == 0
            assert guest.invoke(guest.tmem(2, cookie=2), guest.tmem(2, cookie=3)).ret == 0
        case "buffers":
            for cookie in range(1, 6):
                assert guest.register(guest.tmem(1, cookie=cookie)).ret == 0
            assert guest.invoke(guest.tmem(1, cookie=6), guest.tmem(1, cookie=7)).ret == OUT_OF_MEMORY
            assert guest.invoke(guest.tmem(1, cookie=6)).ret == 0
            assert guest.register(guest.tmem(1, cookie=6)).ret == 0
            assert guest.register(guest.tmem(1, cookie=7)).ret == OUT_OF_MEMORY
        case "pages_per_buffer":
            assert [guest.invoke(guest.tmem(count)).ret for count in (7, 8, 9)] == [0, 0, OUT_OF_MEMORY]
        case "calls":
            for thread in range(3):
                pair.world.script.append(interrupt(thread))
                guest.call(invoke())
            assert guest.call(invoke())[0][0] == ReturnCode.ETHREAD_LIMIT
        case "rpc_arguments":
            pair.world.script += [ask_alloc()] * 4
            guest.call(invoke())
            for cookie in range(1, 4):
                guest.give_page(cookie)
                assert guest.sums()["rpc_arguments"] == cookie
            pair.world.script.append(interrupt())
            guest.give_page(4)
            assert guest.sums()["rpc_arguments"] == 3
            assert pair.world.inbox[-1][1:3] == (0, 0)
            guest.resume()
        case "memory":
            count = 0
            while guest.register(guest.tmem(1, cookie=count + 1)).ret == 0:
                count += 1
                assert count < 300
                guest.limits.pages = guest.limits.buffers = 1000
            assert count > 10
            assert guest.sums()["memory"] <= guest.limits.memory
            assert guest.unregister(1).ret == 0
            assert guest.register(guest.tmem(1, cookie=1)).ret == 0
    assert guest.record.counters.refused >= 1
    assert watching(other) == before
    for thread in range(3):
        if (guest.id, thread) in pair.world.suspended:
            guest.resume(thread)


def test_lowering_a_limit_refuses_what_is_new_and_revokes_nothing(make):
    pair = make()
    guest = pair.guest()
    guest.register(guest.tmem(5, cookie=1))
    guest.register(guest.tmem(5, cookie=2))
    pair.world.script.append(interrupt())
    guest.call(invoke())
    guest.limits.pages = guest.limits.buffers = guest.limits.calls = guest.limits.memory = 1
    assert guest.call(invoke())[0][0] == ReturnCode.ETHREAD_LIMIT
    guest.limits.calls = 8
    assert guest.call(invoke())[0][0] == ReturnCode.ENOMEM
    assert guest.pins() == 10
    assert guest.resume()[0] == 0
    guest.limits.memory = 1 << 20
    assert guest.invoke(guest.tmem(1, cookie=3)).ret == OUT_OF_MEMORY
    assert guest.unregister(1).ret == guest.unregister(2).ret == 0
    assert guest.register(guest.tmem(1, cookie=1)).ret == 0


def failing_requests(guest):
    """Requests that are refused, each at another place."""
    big = guest.tmem(1200, cookie=3)
    bad_entry = guest.tmem(2, cookie=2)
    guest.ram.write(bad_entry.a + 8, (12).to_bytes(8, "little"))
    bad_next = guest.tmem(600, cookie=2)
    guest.ram.write(bad_next.a + 4088, (8).to_bytes(8, "little"))
    good = guest.tmem(2, cookie=1)
    messages = [
        invoke(good, bad_entry),
        invoke(good, bad_next),
        invoke(big, good, good),
        invoke(good, Param(TMEM_INOUT, good.a, 2**63, 5)),
        invoke(good, Param(RMEM_IN, 0, 0, 0)),
        register(good),
        register(bad_next._replace(attr=TMEM_OUT)),
        Message(Command.UNREGISTER_SHM, params=[good]),
        Message(9),
        invoke(good, good._replace(attr=0xB)),
    ]
    return [guest.write(message) for message in messages]


def drift(rounds):
    """The same failing requests again and again: nothing drifts (B3)."""
    pair = Pair()
    guest = pair.guest()
    places = failing_requests(guest)
    for number in range(rounds):
        ipa = places[number % len(places)]
        if number % 3 == 2:
            pair.world.script.append(refuse(ReturnCode.EBADADDR))
        pair.drive(guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(ipa))))
        pair.world.script.clear()
        pair.events.clear()
        guest.pair.settle(guest)
    pair.check()
    pair.close()


def test_nothing_drifts_over_many_failing_requests():
    drift(2000)


def test_long_lists_let_others_have_a_turn_after_a_bounded_number_of_pages(make):
    """R23, B9: between two turns never more than PAGES_PER_STEP pages."""
    pair = make()
    guest, other = pair.guest(ram=16 << 20), pair.guest()
    message = invoke(*[guest.tmem(16384, cookie=n + 1) for n in range(4)])
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))))
    turns, pins = 0, 0
    while isinstance(step, Preempt):
        turns += 1
        assert guest.pins() - pins <= PAGES_PER_STEP
        pins = guest.pins()
        assert other.invoke(other.tmem(2)).ret == 0
        step = pair.note(pair.checker.proceed(step.ticket))
    assert turns == 3
    assert isinstance(step, Forward)
    assert guest.pins() == 65536
    assert pair.drive(step)[0] == 0
    pair.settle(guest)


def test_a_short_list_is_done_in_one_step(make):
    guest = make().guest()
    for pages in (1, ENTRIES_PER_PAGE, ENTRIES_PER_PAGE + 1, 16384):
        step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(pages))))))
        assert isinstance(step, Forward)
        guest.pair.drive(step)


def test_the_end_of_a_guest_with_many_buffers_lets_others_have_a_turn(make):
    pair = make()
    guest, other = pair.guest(), pair.guest()
    for cookie in range(200):
        guest.register(guest.tmem(1, cookie=cookie + 1))
    step = pair.checker.destroy(guest.id)
    step = pair.returned(step.ticket, pair.answer(step))
    turns = 0
    while isinstance(step, Preempt):
        turns += 1
        assert other.invoke(other.tmem(2)).ret == 0
        step = pair.note(pair.checker.proceed(step.ticket))
    assert isinstance(step, Reply) and step.regs[0] == 0
    assert turns == 6  # 33 buffers each time
    assert guest.pins() == 0


def test_the_end_of_a_guest_with_large_buffers_is_bounded_in_pages(make):
    """R23 counts pages, not buffers."""
    pair = make()
    guest = pair.guest(ram=16 << 20)
    for cookie in range(4):
        guest.register(guest.tmem(16384, cookie=cookie + 1))
    step = pair.checker.destroy(guest.id)
    step = pair.returned(step.ticket, pair.answer(step))
    pins = 65536
    while isinstance(step, Preempt):
        assert pins - guest.pins() <= PAGES_PER_STEP
        pins = guest.pins()
        step = pair.note(pair.checker.proceed(step.ticket))
    assert pins <= PAGES_PER_STEP


def test_the_end_of_a_guest_takes_as_many_pages_in_one_step_as_may_be(make, monkeypatch):
    monkeypatch.setattr(lifecycle, "PAGES_PER_STEP", 1024)
    pair = make()
    guest = pair.guest()
    for cookie in (1, 2, 3, 4):
        guest.register(guest.tmem(512, cookie=cookie))
    step = pair.checker.destroy(guest.id)
    step = pair.returned(step.ticket, pair.answer(step))
    assert isinstance(step, Preempt) and guest.pins() == 1024
    step = pair.note(pair.checker.proceed(step.ticket))
    assert isinstance(step, Reply) and guest.pins() == 0


def test_the_flood_of_one_guest_takes_no_more_steps_of_another(make):
    """B9: in steps between a request and its answer, the other guest's request costs what it did when idle."""
    pair = make()
    guest, other = pair.guest(ram=16 << 20), pair.guest()

    def cost():
        before = len(pair.world.inbox), pair.checker.steps
        assert other.invoke(other.tmem(8)).ret == 0
        return len(pair.world.inbox) - before[0], pair.checker.steps - before[1]

    idle = cost()
    flood = []
    for vcpu in range(4):
        message = invoke(*[guest.tmem(8000, cookie=10 * vcpu + n) for n in range(3)])
        flood.append(guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))), vcpu))
        assert cost() == idle
    for step in flood:
        pair.drive(step)
        assert cost() == idle
    pair.settle(guest)


def test_an_exhausted_page_pool_refuses_and_recovers(make):
    pair = make()
    guest = pair.guest()
    for left in range(6):
        pair.host.left = left
        regs, ipa = guest.call(invoke(guest.tmem(1, cookie=1), guest.tmem(1100, cookie=2)))
        if left == 0:
            assert regs[0] == ReturnCode.ENOMEM
        else:
            ret = 0 if left >= 5 else OUT_OF_MEMORY
            assert (regs[0], guest.read(ipa).ret) == (0, ret)
        pair.settle(guest)


def test_counters_tell_denied_refused_and_rejected_apart(make):
    pair = make()
    guest = pair.guest()
    fresh = {name: getattr(guest.record.counters, name) for name in guest.record.counters.__slots__}
    assert fresh == dict.fromkeys(fresh, 0) | {"refusals": {}, "last_refusal": None}
    guest.smc(Function.VM_CREATED)
    guest.invoke(Param(TMEM_INOUT, guest.page(), 2**40, 1))
    message = guest.invoke(Param(TMEM_INOUT, 8, 1, 1))
    assert (message.ret, message.ret_origin) == (BAD_PARAMETERS, COMMS)
    pair.world.script.append(succeed())
    guest.invoke()
    counters = guest.record.counters
    assert (counters.denied, counters.refused, counters.rejected) == (1, 1, 1)
    assert (counters.calls, counters.forwarded) == (4, 1)


def test_what_a_guest_does_is_counted_each_time(make):
    pair = make()
    guest = pair.guest()
    pair.world.script += [interrupt(), interrupt()]
    guest.call(invoke())
    guest.resume()
    guest.resume()
    for pages in (2, 3):
        guest.invoke(guest.tmem(pages))
    counters = guest.record.counters
    assert (counters.calls, counters.forwarded, counters.rpcs, counters.translated) == (5, 5, 2, 5)
    for rejected in (1, 2):
        at, _ = suspended_in_command(guest, shm_alloc())
        guest.write(Message(RpcCommand.SHM_ALLOC, params=[Param(0)] * 2), at)  # replaced by an error
        guest.resume()
        assert counters.rejected == rejected


def test_what_a_buffer_and_a_call_are_charged_for(make):
    """Records, addresses of pinned pages, lists for OP-TEE and the shadow: bytes of the mediator's own memory."""
    pair = make()
    guest = pair.guest()
    record, page, address = 256, 4096, 16
    for pages, lists in ((1, 1), (511, 1), (512, 2), (1022, 2), (1023, 3)):
        step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(register(guest.tmem(pages, cookie=3))))))
        assert isinstance(step, Reply)
        param = guest.tmem(pages, cookie=3, kind=TMEM_OUT)
        step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(register(param)))))
        buffer, call = record + address * pages, record + page
        assert guest.sums() == {
            "pages": pages, "buffers": 1, "rpc_arguments": 0, "calls": 1, "memory": buffer + lists * page + call,
        }  # fmt: skip
        assert pair.machine.pages.allocated == lists + 1
        pair.drive(step)
        assert guest.sums() == {"pages": pages, "buffers": 1, "rpc_arguments": 0, "calls": 0, "memory": buffer}
        assert pair.machine.pages.allocated == 0
        assert guest.unregister(3).ret == 0
    pair.world.script += [ask_alloc(), interrupt()]
    guest.call(invoke())
    guest.give_page(0xC0)
    assert guest.sums() == {
        "pages": 0, "buffers": 0, "rpc_arguments": 1, "calls": 1, "memory": 2 * (record + page) + address,
    }  # fmt: skip
    peaks = guest.record.ledger.peaks()
    most = record + address * 1023 + 3 * page + record + page
    assert peaks == {"pages": 1023, "buffers": 1, "rpc_arguments": 1, "calls": 1, "memory": most}
    guest.resume()
