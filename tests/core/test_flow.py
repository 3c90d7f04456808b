"""Flow control: whose turn it is, who waits, and what gives a place back (R22, R29; B9, B10)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator.core.flow import PAGES_PER_UNIT, Flow, Lane, Place, Stand
from mediator.core.ledger import Ledger, Limits, OverLimit
from mediator.core.policy import FlowPolicy
from mediator.core.rates import MAX_SESSIONS, Rate, Traffic
from mediator.core.rpc import OWN_THREADS
from mediator.core.steps import CALL_ADMITTED, CALL_QUEUED, CALL_REFUSED, Forward, Preempt, Queue, Reply, Ticket
from optee.abi.message import Command, Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, to_pair
from tests.core.pair import (
    BAD_PARAMETERS,
    COMMS,
    NOT_HANDLED,
    RMEM_IN,
    TMEM_INOUT,
    VALUE_OUT,
    ask,
    ask_alloc,
    interrupt,
    invoke,
    policy_of,
    raw,
    smc,
    succeed,
    suspended_in_command,
)

SECOND = 1_000_000_000
INTERRUPTED = int(RpcReturn.FOREIGN_INTR)


def controlled(calls: int | None = None, **settings):
    policy = policy_of("default", **({} if calls is None else {"calls": calls}))
    return replace(policy, flow=FlowPolicy(**{"queue": 4, **settings}))


# The choice alone


class Model:
    """Lanes of guests with calls, and what was let in, in order."""

    def __init__(self, calls, **settings):
        self.flow = Flow(FlowPolicy(**{"queue": 1000, **settings}))
        self.flow.threads = 8
        self.lanes = [Lane(Ledger(Limits(100, 100, 100, each, 1 << 30, 100))) for each in calls]
        self.places = {}

    def place(self, number, pages=0, urgent=False):
        lane, ticket = self.lanes[number], Ticket()
        place = Place(lane, ticket, lane.ledger.charge(), pages, urgent=urgent)
        self.places[ticket] = place
        return place

    def turns(self, now=0):
        return [self.places[ticket] for ticket in self.flow.turns(now)]


@given(st.data())
def test_bounds_hold_and_nobody_waits_for_nothing(data):
    """Whatever calls come, leave, go away and come back: caps, cores and queues hold, and what is free is used."""
    calls = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    cores = data.draw(st.none() | st.integers(1, 3))
    rate = data.draw(st.none() | st.integers(1, 50))
    model = Model(calls, queue=data.draw(st.integers(1, 3)), secure_cores=cores, rate=rate, burst=2)
    flow, live, now = model.flow, [], 0
    for _ in range(data.draw(st.integers(0, 40))):
        match data.draw(st.sampled_from("eeeelbatr")):
            case "e":
                place = model.place(data.draw(st.integers(0, len(calls) - 1)), data.draw(st.integers(0, 2000)))
                try:
                    flow.enter(place)
                    live.append(place)
                except OverLimit as over:
                    assert over.held == over.limit == flow.policy.queue == place.lane.waiting
            case "l":
                inside = [place for place in live if place.stand is Stand.INSIDE]
                if inside:
                    place = data.draw(st.sampled_from(inside))
                    if data.draw(st.booleans()):
                        place.charge.refund()
                        live.remove(place)
                    flow.leave(place)
            case "a":
                waiting = [place for place in live if place.stand is Stand.WAITING]
                if waiting:
                    flow.away(data.draw(st.sampled_from(waiting)))
            case "b":
                away = [place for place in live if place.stand is Stand.AWAY]
                if away:
                    flow.back(data.draw(st.sampled_from(away)))
            case "r":
                outside = [place for place in live if place.stand is Stand.OUTSIDE]
                if outside:
                    flow.resume(data.draw(st.sampled_from(outside)))
            case "t":
                now += data.draw(st.integers(0, SECOND // 20))
        model.turns(now)
        inside = [place for place in live if place.stand is Stand.INSIDE]
        assert flow.running == len(inside) and (cores is None or flow.running <= cores)
        for number, lane in enumerate(model.lanes):
            own = [place for place in live if place.lane is lane]
            assert lane.ledger.calls == sum(place.counted for place in own) <= calls[number]
            assert lane.waiting <= flow.policy.queue
            assert lane.outside == sum(place.stand is Stand.OUTSIDE for place in own)
            if cores is not None and flow.running == cores:
                continue
            waiting = [place for place in own if place.stand is Stand.WAITING]
            assert not any(place.counted for place in waiting)
            if waiting and lane.ledger.calls < calls[number]:
                following = flow.next_turn()
                assert rate is not None and following is not None and now < following <= now + SECOND / rate + 1


def test_a_call_that_leaves_gives_its_guest_its_share_of_the_cores_back():
    model = Model([4, 4], secure_cores=2)
    model.flow.guests = 2
    for _ in range(3):
        place = model.place(0)
        assert model.flow.enter(place)
        place.charge.refund()
        model.flow.leave(place)
        assert model.lanes[0].inside == 0


def test_calls_that_op_tee_has_begun_go_on_one_after_the_other():
    """The first of them leaves the second in the line, though its guest has no new call."""
    model = Model([4, 4], secure_cores=1)
    flow = model.flow
    begun = [model.place(0), model.place(0)]
    for place in begun:
        assert flow.enter(place)
        flow.leave(place)
    holder = model.place(1)
    assert flow.enter(holder)
    assert not any(flow.resume(place) for place in begun)
    for place in begun:
        flow.leave(holder)
        assert model.turns() == [place]
        holder = place


@given(st.lists(st.integers(0, 40), min_size=2, max_size=4), st.integers(1, 3))
def test_guests_that_wait_get_equal_shares(costs, cores):
    """Deficit round robin by guest: whatever each call costs, nobody gets ahead by more than the dearest call."""
    model = Model([1000] * len(costs), secure_cores=cores)
    model.flow.threads = 1000
    holders = [model.place(0) for _ in range(cores)]
    assert all(model.flow.enter(place) for place in holders)
    for number, cost in enumerate(costs):
        for _ in range(200):
            assert not model.flow.enter(model.place(number, cost * PAGES_PER_UNIT))
    served = Counter()
    for _ in range(len(costs) * 40):
        model.flow.leave(holders.pop(0))
        (place,) = model.turns()
        holders.append(place)
        served[place.lane] += place.cost
        shares = [served[lane] for lane in model.lanes]
        assert max(shares) - min(shares) <= max(costs) + 1


def test_what_optee_has_begun_and_cancel_come_before_new_calls():
    model = Model([4, 4, 4], secure_cores=1)
    first = model.place(0)
    begun = model.place(0)
    assert model.flow.enter(first)
    assert not model.flow.enter(begun)
    model.flow.leave(first)
    assert model.turns() == [begun]
    new = [model.place(number) for number in (1, 2, 1, 0)]
    assert not any(model.flow.enter(place) for place in new)
    assert not model.flow.resume(first)
    cancel = model.place(2, urgent=True)
    assert not model.flow.enter(cancel)
    order = []
    holder = begun
    for _ in range(6):
        model.flow.leave(holder)
        (holder,) = model.turns()
        order.append(holder)
    assert set(order[:2]) == {first, cancel}
    assert set(order[2:5]) == {new[0], new[1], new[3]} and order[5] is new[2]


def test_one_guest_never_has_all_cores_while_there_are_others():
    """Neither by new calls, nor by those that OP-TEE has begun, nor by CANCEL; alone it may have them all."""
    model = Model([4, 4], secure_cores=3)
    flow = model.flow
    flow.guests = 2
    inside = [model.place(0), model.place(0)]
    assert all(flow.enter(place) for place in inside)
    third, cancel, other = model.place(0), model.place(0, urgent=True), model.place(1)
    assert not flow.enter(third) and not flow.enter(cancel) and flow.next_turn() is None
    assert flow.enter(other) and flow.running == 3
    flow.leave(inside[0])
    assert model.turns() == [cancel] and not flow.resume(inside[0])
    flow.leave(other)
    assert model.turns() == []
    flow.guests = 1
    assert model.turns() == [inside[0]] and flow.running == 3


@pytest.mark.parametrize(("cores", "guests"), [(1, 2), (2, 1), (None, 2)])
def test_cores_are_kept_for_nobody_where_that_helps_nobody(cores, guests):
    model = Model([4], secure_cores=cores)
    model.flow.guests = guests
    assert all(model.flow.enter(model.place(0)) for _ in range(cores or 4))


def test_the_core_says_how_many_guests_there_are(make):
    pair = make(controlled(secure_cores=2))
    first = pair.guest()
    assert pair.mediator.flow.guests == 1
    second = pair.guest("xen")
    assert pair.mediator.flow.guests == 2
    pair.drive(pair.checker.destroy(second.id))
    assert pair.mediator.flow.guests == 1 and first.call(invoke())[0][0] == 0


def test_cancel_goes_beyond_the_cap_while_optee_has_threads():
    model = Model([1])
    model.flow.threads = 2
    assert model.flow.enter(model.place(0))
    assert not model.flow.enter(model.place(0))
    cancel, second = model.place(0, urgent=True), model.place(0, urgent=True)
    assert model.flow.enter(cancel)
    assert not model.flow.enter(second)
    cancel.charge.refund()
    model.flow.leave(cancel)
    assert model.turns() == [second]


@given(st.integers(1, 1000), st.integers(1, 10), st.lists(st.integers(0, SECOND), min_size=1, max_size=30))
def test_no_more_calls_than_rate_and_burst(rate, burst, pauses):
    """In any span of t seconds at most burst + rate * t calls; and where `next_turn` says, there is one."""
    model = Model([1000], rate=rate, burst=burst)
    now, starts = 0, []
    for pause in pauses:
        now += pause
        starts += [now] * len(model.turns(now))
        starts += [now] * model.flow.enter(model.place(0))
        following = model.flow.next_turn()
        if following is not None:
            assert following > now
            now = following
            turns = model.turns(now)
            assert turns
            starts += [now] * len(turns)
    for first, began in enumerate(starts):
        for last in range(first, len(starts)):
            assert last - first + 1 <= burst + rate * (starts[last] - began) / SECOND + 1e-6


def test_who_is_away_keeps_its_place_but_holds_nothing_up():
    model = Model([1], secure_cores=1)
    holder, first, second, third = (model.place(0) for _ in range(4))
    assert model.flow.enter(holder)
    for place in (first, second, third):
        assert not model.flow.enter(place)
    model.flow.away(first)
    model.flow.leave(holder)
    holder.charge.refund()
    assert model.turns() == [second]
    assert not model.flow.back(first)
    model.flow.leave(second)
    second.charge.refund()
    assert model.turns() == [first]


def test_a_guest_that_waited_for_nothing_has_saved_nothing():
    """Its share of the rounds is of those in which it wants something: an empty lane begins anew."""
    model = Model([4, 4], secure_cores=1)
    holder = model.place(0)
    assert model.flow.enter(holder)
    dear, cheap = model.place(0, PAGES_PER_UNIT), model.place(1)
    assert not model.flow.enter(dear) and not model.flow.enter(cheap)
    model.flow.leave(holder)
    assert model.turns() == [cheap]
    model.flow.leave(cheap)
    assert model.turns() == [dear]


def test_an_urgent_call_that_is_away_keeps_its_lane():
    """New calls of its guest pass it; when it is back and a core is free, it goes first."""
    model = Model([4], secure_cores=1)
    flow = model.flow
    begun, holder, new, last = (model.place(0) for _ in range(4))
    assert flow.enter(begun)
    assert not flow.enter(holder)
    flow.leave(begun)
    assert model.turns() == [holder]
    assert not flow.resume(begun)
    flow.away(begun)
    assert not flow.enter(new)
    flow.leave(holder)
    assert model.turns() == [new]
    assert not flow.enter(last)
    assert not flow.back(begun)
    flow.leave(new)
    assert model.turns() == [begun]
    flow.leave(begun)
    assert model.turns() == [last]


def test_a_paused_guest_has_no_turn_and_lines_up_behind_the_others():
    model = Model([4, 4], secure_cores=1)
    flow, (paused, other) = model.flow, model.lanes
    holder = model.place(1)
    assert flow.enter(holder)
    first, second, mine = model.place(0), model.place(0), model.place(1)
    assert not any(flow.enter(place) for place in (first, second, mine))
    flow.pause(paused)
    flow.leave(holder)
    assert model.turns() == [mine]
    flow.leave(mine)
    assert model.turns() == []
    late = model.place(1)
    assert flow.enter(late)
    flow.unpause(paused)
    flow.leave(late)
    assert model.turns() == [first]
    flow.leave(first)
    assert model.turns() == [second]
    flow.leave(second)
    for lane in (paused, other):  # a pause in which nobody waits leaves no turn behind
        flow.pause(lane)
        flow.unpause(lane)
    assert model.turns() == [] and flow.enter(model.place(1))


def test_a_guest_whose_calls_are_all_away_is_passed():
    model = Model([4, 4], secure_cores=1)
    flow = model.flow
    holder, away, other = model.place(1), model.place(0), model.place(1)
    assert flow.enter(holder)
    assert not flow.enter(away) and not flow.enter(other)
    flow.away(away)
    flow.leave(holder)
    assert model.turns() == [other]
    flow.leave(other)
    assert model.turns() == [] and flow.next_turn() is None
    assert flow.back(away)


def test_who_comes_late_lines_up_with_those_who_wait():
    """However many rounds there were before it came."""
    model = Model([100] * 3, secure_cores=1)
    flow, served = model.flow, Counter()
    holder = model.place(0)
    assert flow.enter(holder)
    assert not any(flow.enter(model.place(number)) for number in (0, 1) * 20)
    for _ in range(10):
        flow.leave(holder)
        (holder,) = model.turns()
    assert not any(flow.enter(model.place(2)) for _ in range(9))
    for _ in range(6):
        flow.leave(holder)
        (holder,) = model.turns()
        served[holder.lane] += 1
    assert [served[lane] for lane in model.lanes] == [2, 2, 2]


def test_a_guest_that_wanted_nothing_lines_up_behind_those_that_wait():
    model = Model([4, 4], secure_cores=1)
    flow = model.flow
    holder, first, late = model.place(0), model.place(1), model.place(0)
    assert flow.enter(holder)
    assert not flow.enter(first) and not flow.enter(late)
    flow.leave(holder)
    assert model.turns() == [first]
    flow.leave(first)
    assert model.turns() == [late]


def test_a_pause_saves_nothing_up():
    model = Model([4, 4], secure_cores=1)
    flow = model.flow
    holder, mine, other = model.place(1), model.place(0), model.place(1)
    assert flow.enter(holder)
    assert not flow.enter(mine) and not flow.enter(other)
    flow.pause(model.lanes[0])
    flow.unpause(model.lanes[0])
    flow.leave(holder)
    assert model.turns() == [other]
    flow.leave(other)
    assert model.turns() == [mine]


def test_time_is_named_only_for_calls_that_wait_for_nothing_else():
    """Not for a guest that has as many calls in flight as it may, nor for one that may go on at once."""
    model = Model([1], rate=10)
    assert model.flow.enter(model.place(0)) and not model.flow.enter(model.place(0))
    assert model.flow.next_turn() is None
    model = Model([4], rate=10, burst=2, secure_cores=1)
    flow, (lane,) = model.flow, model.lanes
    holder, waits = model.place(0), model.place(0)
    assert flow.enter(holder) and not flow.enter(waits)
    flow.pause(lane)
    flow.leave(holder)
    flow.unpause(lane)
    assert lane.credit == SECOND // 10 and flow.next_turn() is None
    assert model.turns() == [waits]


def test_no_time_is_named_while_every_core_is_taken():
    """A rate alone would say when; a call that waits for a core is let in by whoever leaves."""
    model = Model([4], secure_cores=1, rate=10, burst=1)
    holder, waits = model.place(0), model.place(0)
    assert model.flow.enter(holder)
    assert not model.flow.enter(waits)
    assert model.flow.next_turn() is None
    model.flow.leave(holder)
    assert model.turns() == [] and model.flow.next_turn() == SECOND // 10
    assert model.turns(SECOND // 10) == [waits]


def test_a_lane_says_how_long_its_calls_waited():
    """Each bucket is a power of two of microseconds, and what waited longer than all of them is in the last."""
    model = Model([1000], secure_cores=1)
    flow, (lane,) = model.flow, model.lanes
    assert lane.wait_below(0.5) == 1
    holder = model.place(0)
    assert flow.enter(holder)
    assert (lane.admitted, lane.waited, lane.waited_longest) == (1, 0, 0)
    now = 0
    for pause in (999, 1000, 3_000, 100_000, 1 << 60):
        waits = model.place(0)
        assert not flow.enter(waits)
        now += pause
        flow.turns(now)
        flow.leave(holder)
        assert model.turns(now) == [waits]
        holder = waits
    assert [number for number, count in enumerate(lane.waits) if count] == [0, 1, 2, 7, 39]
    assert (lane.admitted, lane.waited, lane.waited_longest) == (6, now, 1 << 60)
    assert [lane.wait_below(share) for share in (0.2, 0.5, 0.6, 0.8, 1)] == [1, 2, 4, 128, 1 << 39]


def test_rates_look_back_a_second():
    rate = Rate()
    for tenth in range(20):
        rate.count(tenth * SECOND // 10)
    assert rate.calls == 20 and rate.per_second(2 * SECOND - 1) == pytest.approx(10, abs=0.1)
    assert rate.per_second(2 * SECOND + SECOND // 2) == pytest.approx(5, abs=0.1)
    assert rate.per_second(9 * SECOND) == 0
    rate.count(9 * SECOND)
    rate.count(11 * SECOND)
    assert rate.per_second(11 * SECOND) == 1  # nothing in the second before
    idle = Rate()
    idle.count(0)
    assert idle.per_second(SECOND) == 1


def test_a_guest_cannot_fill_memory_with_sessions_and_tas():
    traffic = Traffic()
    for number in range(3 * MAX_SESSIONS):
        traffic.opened(number, number.to_bytes(16, "little"))
        traffic.invoked(number, 0)
    assert len(traffic.sessions) == len(traffic.tas) == 256
    for number in range(3 * MAX_SESSIONS):
        traffic.opened(number, bytes(16))
    assert len(traffic.sessions) == MAX_SESSIONS and len(traffic.tas) == 256
    for number in range(3 * MAX_SESSIONS):
        traffic.closed(number)
    assert not traffic.sessions


# In the core


def waiting(guest, message, function=Function.CALL_WITH_ARG):
    """Make a call that has to wait: the step and the IPA of its message."""
    ipa = guest.write(message)
    step = guest.pair.note(guest.submit(smc(function, *to_pair(ipa))))
    assert isinstance(step, Queue) and step.ticket is not None, step
    return step, ipa


def turn(pair, step, now=0):
    """It is the turn of this one."""
    assert pair.checker.turns(now) == [step.ticket]
    return pair.drive(pair.checker.proceed(step.ticket))


def test_a_call_waits_and_goes_on_where_the_cap_allows(make):
    pair = make(controlled(calls=1))
    pair.mediator.tracing = True
    guest = pair.guest()
    pair.world.script.append(interrupt())
    assert guest.call(invoke())[0][0] == INTERRUPTED
    step, ipa = waiting(guest, invoke(guest.tmem(3)))
    assert guest.pins() == 0 and guest.sums()["calls"] == 1
    assert pair.checker.turns(1000) == []
    assert guest.resume()[0] == 0
    assert turn(pair, step, 5_000_000)[0] == 0
    assert guest.read(ipa).ret == 0
    assert pair.names().count(CALL_QUEUED) == 1
    (admitted,) = [event for event in pair.events if event.name == CALL_ADMITTED]
    assert admitted.detail["waited_us"] == 5000 and guest.record.lane.waited_longest == 5_000_000
    pair.settle(guest)


def test_thread_limit_only_while_another_call_of_the_guest_is_in_flight(make):
    """R29: the queue of another guest does not count, and a guest with no call in flight can always wait."""
    pair = make(controlled(calls=1, queue=1, secure_cores=1))
    busy, other = pair.guest(), pair.guest()
    ipa = busy.write(invoke())
    first = busy.submit(smc(Function.CALL_WITH_ARG, *to_pair(ipa)))
    assert isinstance(first, Forward)
    step, _ = waiting(busy, invoke())
    mine, _ = waiting(other, invoke())
    assert busy.call(invoke())[0][0] == other.call(invoke())[0][0] == ReturnCode.ETHREAD_LIMIT
    refused = [event for event in pair.events if event.name == CALL_REFUSED][-1]
    assert refused.detail == {
        "call": 2, "function": int(Function.CALL_WITH_ARG), "answer": int(ReturnCode.ETHREAD_LIMIT), "origin": None,
        "rule": "R29", "resource": "queue", "asked": 1, "held": 1, "limit": 1,
        "why": "1 queue beside 1, 1 are allowed",
    }  # fmt: skip
    assert other.record.calls and other.record.counters.refusals == {"queue": 1}
    pair.drive(pair.returned(first.ticket, pair.answer(first)))
    for waits in (step, mine):
        assert turn(pair, waits)[0] == 0


def test_a_waiting_call_gives_its_vcpu_back_and_finds_its_place_again(make):
    """FOREIGN_INTR with a thread id that OP-TEE cannot have given; the guest's a4..a7 stay its own."""
    pair = make(controlled(calls=1))
    guest = pair.guest()
    pair.world.script.append(interrupt())
    guest.call(invoke())
    first, ipa = waiting(guest, invoke(session=7))
    second, _ = waiting(guest, invoke())
    reply = pair.checker.give_back(first.ticket)
    assert reply.regs[0] == INTERRUPTED and reply.regs[3] >= OWN_THREADS
    assert guest.smc(Function.RETURN_FROM_RPC, 0, 0, 1)[0] == ReturnCode.ERESUME
    again = pair.checker.submit(guest.id, 1, smc(Function.RETURN_FROM_RPC, 0, 0, reply.regs[3], 0x44, 0x55, 0x66, 0x77))
    assert isinstance(again, Queue) and again.ticket is first.ticket
    assert guest.smc(Function.RETURN_FROM_RPC, 0, 0, reply.regs[3])[0] == ReturnCode.ERESUME
    guest.resume()
    regs = turn(pair, first)
    assert regs[0] == 0 and regs[4:] == (0x44, 0x55, 0x66, 0x77) and guest.read(ipa).ret == 0
    assert turn(pair, second)[0] == 0
    pair.settle(guest)


def test_what_the_guest_answered_outlasts_the_wait(make):
    """An RPC ALLOC answered with a page: the call waits for a core, gives its vCPU back, and has the page still."""
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(), pair.guest()
    pair.world.script.append(ask_alloc())
    assert guest.call(invoke())[0][0] == RpcReturn.ALLOC
    holder = other.submit(smc(Function.CALL_WITH_ARG, *to_pair(other.write(invoke()))))
    page = guest.page()
    step = guest.submit(smc(Function.RETURN_FROM_RPC, *to_pair(page), 0, *to_pair(0xC0)))
    assert isinstance(step, Queue) and guest.sums()["rpc_arguments"] == 0
    reply = pair.checker.give_back(step.ticket)
    again = guest.submit(smc(Function.RETURN_FROM_RPC, 0, 0, reply.regs[3]))
    assert isinstance(again, Queue) and again.ticket is step.ticket
    pair.drive(pair.returned(holder.ticket, pair.answer(holder)))
    pair.world.script.append(interrupt())
    assert turn(pair, again)[0] == INTERRUPTED
    assert guest.sums()["rpc_arguments"] == 1 and guest.record.arguments[0xC0].ipa == page
    pair.world.script.append(raw(int(RpcReturn.FREE), *to_pair(0xC0), 0))
    guest.resume()
    guest.resume()
    pair.settle(guest)


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("how", ["destroy", "reset", "isolate"])
def test_the_end_of_a_guest_frees_its_places(make, how, away):
    """A guest that dies, or whose driver starts anew, while its calls wait: others have its turn, all sums are zero."""
    pair = make(controlled(calls=1, queue=3, secure_cores=1))
    guest, other = pair.guest(), pair.guest()
    pair.world.script.append(interrupt())
    guest.call(invoke())
    steps = [waiting(guest, invoke(guest.tmem(2, cookie=n)))[0] for n in (1, 2)]
    if away:
        pair.checker.give_back(steps[0].ticket)
    if how == "isolate":
        pair.errors_expected = True
        pair.world.script.append(raw(INTERRUPTED, 0, 0, 0xFFFFFFFF))
        assert guest.resume()[0] == NOT_HANDLED
    else:
        request = pair.checker.destroy(guest.id) if how == "destroy" else pair.checker.reset(guest.id)
        assert pair.drive(request)[0] == 0
        if how == "reset":
            pair.records.append(pair.mediator.guests[guest.id])
    woken = pair.checker.turns(0)
    assert woken == [step.ticket for step in steps][away:]
    for ticket in woken:
        assert pair.drive(pair.checker.proceed(ticket))[0] == NOT_HANDLED
    assert pair.mediator.flow.running == 0
    assert other.invoke(other.tmem(1)).ret == 0
    if how == "reset":
        assert guest.invoke(guest.tmem(1)).ret == 0


def test_a_paused_guest_has_no_turn(make):
    pair = make(controlled(secure_cores=1))
    paused, other = pair.guest(), pair.guest()
    holder = other.submit(smc(Function.CALL_WITH_ARG, *to_pair(other.write(invoke()))))
    step, _ = waiting(paused, invoke())
    mine, _ = waiting(other, invoke())
    assert pair.checker.pause(paused.id)
    pair.drive(pair.returned(holder.ticket, pair.answer(holder)))
    assert turn(pair, mine)[0] == 0
    assert pair.checker.turns(0) == []
    reply = pair.checker.give_back(step.ticket)
    regs = smc(Function.RETURN_FROM_RPC, 0, 0, reply.regs[3])
    asked = paused.submit(regs)
    assert isinstance(asked, Queue) and asked.ticket is None
    assert pair.checker.resume(paused.id)
    assert pair.drive(paused.submit(regs))[0] == 0


def test_long_translations_give_their_core_back_with_their_vcpu(make):
    """A guest that does not come back after it was let go holds no secure core meanwhile."""
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(ram=16 << 20), pair.guest()
    message = invoke(*[guest.tmem(16384, cookie=n + 1) for n in range(2)])
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))))
    assert isinstance(step, Preempt)
    waits, _ = waiting(other, invoke())
    reply = pair.checker.give_back(step.ticket)
    assert reply.regs[0] == INTERRUPTED
    assert turn(pair, waits)[0] == 0
    assert guest.smc(Function.RETURN_FROM_RPC, 0, 0, reply.regs[3])[0] == 0
    pair.settle(guest)


def test_a_rejected_call_holds_no_core(make):
    pair = make(controlled(secure_cores=1, calls=1))
    guest = pair.guest()
    bad = guest.tmem(1)._replace(a=guest.tmem(1).a + (1 << 40))
    for _ in range(3):
        assert guest.invoke(bad).ret != 0
        assert guest.call(Message(99))[0][0] == ReturnCode.EBADCMD
    assert pair.mediator.flow.running == 0
    pair.settle(guest)


def test_a_call_that_is_rejected_when_it_comes_back_for_its_turn_has_ended(make):
    """OP-TEE never heard of it: nobody, the checker included, may count it as live."""
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(), pair.guest()
    holder = other.submit(smc(Function.CALL_WITH_ARG, *to_pair(other.write(invoke()))))
    step, ipa = waiting(guest, invoke(guest.tmem(1)._replace(a=1 << 40)))
    thread = pair.checker.give_back(step.ticket).regs[3]
    pair.drive(pair.returned(holder.ticket, pair.answer(holder)))
    assert guest.smc(Function.RETURN_FROM_RPC, 0, 0, thread)[0] == 0
    assert guest.read(ipa).ret == BAD_PARAMETERS
    assert guest.invoke().ret == 0
    assert pair.checker.violations == []
    pair.settle(guest)


def test_cancel_is_not_held_up(make):
    """Its command is known before it could wait: it passes calls that came before it."""
    pair = make(controlled(calls=2, queue=2))
    guest = pair.guest()
    for thread in (0, 1):
        pair.world.script.append(interrupt(thread))
        guest.call(invoke())
    waits, _ = waiting(guest, invoke())
    assert guest.call(Message(Command.CANCEL, session=1))[0][0] == 0
    guest.resume(0)
    assert turn(pair, waits)[0] == 0
    guest.resume(1)


def test_sessions_and_tas_are_told_apart(make):
    pair = make(controlled())
    guest = pair.guest()
    uuid = bytes(range(16))
    meta = [(0x101, int.from_bytes(uuid[:8], "little"), int.from_bytes(uuid[8:], "little"), 0), (0x101, 0, 0, 0)]
    params = [guest.tmem(0)._make(words) for words in meta]
    pair.world.script.append(succeed(session=5))
    guest.run(Message(Command.OPEN_SESSION, 0, 0, 0xFF, params=params))  # the word behind the session is another
    guest.run(Message(Command.INVOKE_COMMAND, 0, 5))
    guest.run(Message(Command.INVOKE_COMMAND, 0, 6))
    traffic = guest.record.lane.traffic
    assert traffic.tas[uuid].calls == 1 and traffic.sessions[5][1].per_second(0) == 1
    guest.run(Message(Command.CLOSE_SESSION, 0, 5))
    assert not traffic.sessions


def test_calls_that_wait_are_charged_for_their_memory_only(make):
    pair = make(replace(controlled(calls=1, queue=100), limits=policy_of("default", calls=1, memory=20 << 10).limits))
    guest = pair.guest()
    pair.world.script.append(interrupt())
    guest.call(invoke())
    answers = [guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke())))) for _ in range(10)]
    refused = [step for step in answers if isinstance(step, Reply)]
    assert refused and all(step.regs[0] == ReturnCode.ENOMEM for step in refused)
    assert guest.sums()["calls"] == 1
    guest.resume()
    for step in answers:
        if isinstance(step, Queue):
            assert turn(pair, step)[0] == 0
    assert not guest.record.calls


def test_a_call_that_waits_is_in_the_way_once_for_each_call_the_guest_could_go_on_with(make):
    """R29: a guest with one vCPU must be able to come back with the call that would end the wait."""
    pair = make(controlled(calls=1))
    guest = pair.guest()
    core = pair.mediator
    pair.world.script += [interrupt(), interrupt()]
    guest.call(invoke())
    step, _ = waiting(guest, invoke())
    assert core.in_the_way(step.ticket)
    thread = pair.checker.give_back(step.ticket).regs[3]
    again = guest.submit(smc(Function.RETURN_FROM_RPC, 0, 0, thread))
    assert isinstance(again, Queue) and not core.in_the_way(step.ticket)
    assert guest.resume()[0] == INTERRUPTED
    assert core.in_the_way(step.ticket)
    assert guest.resume()[0] == 0
    assert not core.in_the_way(step.ticket)
    assert turn(pair, step)[0] == 0


def test_without_flow_control_sessions_are_not_counted(make):
    pair = make()
    guest = pair.guest()
    pair.world.script.append(succeed(session=5))
    guest.run(Message(Command.OPEN_SESSION, params=[Param(0x101, 1, 2), Param(0x101)]))
    guest.run(Message(Command.INVOKE_COMMAND, 0, 5))
    traffic = guest.record.lane.traffic
    assert not traffic.sessions and not traffic.tas


def test_a_call_whose_request_is_answered_for_the_guest_keeps_its_core(make):
    """It has not left the secure world: nobody else goes there meanwhile."""
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(), pair.guest()
    pair.world.script.append(ask(Message(RpcCommand.RPMB)))
    step = guest.submit(smc(Function.CALL_WITH_RPC_ARG, *to_pair(guest.write(invoke()))))
    waits, _ = waiting(other, invoke())
    step = pair.returned(step.ticket, pair.answer(step))
    assert isinstance(step, Forward)
    assert pair.checker.turns(0) == [] and pair.mediator.flow.running == 1
    assert pair.drive(step)[0] == 0
    assert turn(pair, waits)[0] == 0
    assert not {CALL_QUEUED, CALL_ADMITTED} & set(pair.names()), "they are for tracing"


def test_a_call_that_is_lost_gives_its_core_back(make):
    pair = make(controlled(secure_cores=1))
    pair.errors_expected = True
    guest, other = pair.guest(), pair.guest()
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke()))))
    waits, _ = waiting(other, invoke())
    assert pair.note(pair.checker.lost(step.ticket, "it is gone")).regs[0] == NOT_HANDLED
    assert turn(pair, waits)[0] == 0


def test_the_core_says_when_the_rate_lets_a_call_go_on(make):
    pair = make(controlled(rate=10))
    guest = pair.guest()
    assert guest.invoke().ret == 0
    step, _ = waiting(guest, invoke())
    assert pair.mediator.next_turn() == SECOND // 10
    assert turn(pair, step, SECOND // 10)[0] == 0


def test_without_flow_control_nobody_has_a_turn_or_is_in_the_way(make):
    pair = make()
    guest = pair.guest(ram=16 << 20)
    message = invoke(*[guest.tmem(16384, cookie=n) for n in (1, 2)])
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))))
    assert isinstance(step, Preempt)
    core = pair.mediator
    assert core.turns(SECOND) == [] and core.next_turn() is None and not core.in_the_way(step.ticket)
    assert pair.drive(step)[0] == 0


def test_a_call_whose_guest_ends_in_the_middle_of_long_work_gives_its_core_back(make):
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(ram=16 << 20), pair.guest()
    message = invoke(*[guest.tmem(16384, cookie=n) for n in (1, 2)])
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))))
    assert isinstance(step, Preempt)
    waits, _ = waiting(other, invoke())
    ending = pair.checker.destroy(guest.id)
    assert pair.checker.give_back(step.ticket).regs[0] == NOT_HANDLED
    assert turn(pair, waits)[0] == 0
    assert pair.drive(ending)[0] == 0
    assert pair.mediator.flow.running == 0


def test_a_message_that_is_rejected_before_its_turn_says_so(make):
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(), pair.guest()
    holder = other.submit(smc(Function.CALL_WITH_ARG, *to_pair(other.write(invoke()))))
    answer = guest.invoke(Param(RMEM_IN, 0, 8, 0))
    assert (answer.ret, answer.ret_origin) == (BAD_PARAMETERS, COMMS)
    assert guest.record.lane.waiting == 0 and not any(guest.sums().values())
    assert pair.drive(holder)[0] == 0


def test_a_reply_to_a_command_that_waited_for_a_core_is_taken(make):
    pair = make(controlled(secure_cores=1))
    guest, other = pair.guest(), pair.guest()
    request = Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT)])
    at, _ = suspended_in_command(guest, request)
    holder = other.submit(smc(Function.CALL_WITH_ARG, *to_pair(other.write(invoke()))))
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), at)
    step = guest.submit(smc(Function.RETURN_FROM_RPC))
    assert isinstance(step, Queue)
    pair.drive(pair.returned(holder.ticket, pair.answer(holder)))
    seen = []

    def look(world, now, regs):
        at = world.argument(now)
        seen.append(Message.unpack(world.memory.read(at, 256)).params)
        return succeed()(world, now, regs)

    pair.world.script.append(look)
    assert turn(pair, step)[0] == 0
    assert seen == [[Param(VALUE_OUT, 1, 2, 3)]]


def test_how_flow_control_is_set_can_be_changed_but_not_whether_there_is_any(make):
    pair = make(controlled(queue=4))
    core = pair.mediator
    other = replace(core.policy, flow=replace(core.policy.flow, queue=9, secure_cores=2))
    assert core.adopt(other, {}) == ()
    assert core.policy is other and core.flow.policy is other.flow
    with pytest.raises(ValueError, match="flow cannot change"):
        core.adopt(replace(other, flow=None), {})
    assert core.policy is other
    with pytest.raises(ValueError, match="flow cannot change"):
        make().mediator.adopt(controlled(), {})


def test_the_cost_of_a_call_is_what_its_message_wants_to_share(make):
    """One, and one more for each 512 pages, of which no buffer counts for more than it may have."""
    pair = make(replace(controlled(secure_cores=1), limits=policy_of("default", pages_per_buffer=600).limits))
    guest, other = pair.guest(), pair.guest()
    holder = other.submit(smc(Function.CALL_WITH_ARG, *to_pair(other.write(invoke()))))
    page = guest.page()
    for sizes, cost in (
        ((), 1),
        ((511,), 1),
        ((512,), 2),
        ((511, 1), 2),
        ((600,), 2),
        ((9999, 424), 3),
        ((424, 599), 2),
    ):
        step, _ = waiting(guest, invoke(*[Param(TMEM_INOUT, page | 8, n * 4096 - 8, 1) for n in sizes]))
        assert step.ticket.turn.cost == cost
        assert not step.ticket.turn.urgent
        pair.drive(pair.checker.reset(guest.id))
        pair.records.append(guest.record)
        assert pair.checker.turns(0) == [step.ticket]
        pair.drive(pair.checker.proceed(step.ticket))
    assert pair.drive(holder)[0] == 0


def test_what_waits_is_counted(make):
    pair = make(controlled(calls=1, queue=3))
    guest = pair.guest()
    lane = guest.record.lane
    pair.world.script.append(interrupt())
    guest.call(invoke())
    assert (lane.admitted, lane.queued, lane.peak, lane.waiting, lane.returns, lane.outside) == (1, 0, 0, 0, 1, 1)
    steps = [waiting(guest, invoke())[0] for _ in range(3)]
    assert (lane.queued, lane.peak, lane.waiting) == (3, 3, 3)
    assert guest.call(invoke())[0][0] == ReturnCode.ETHREAD_LIMIT
    assert (lane.queued, lane.peak, lane.waiting) == (3, 3, 3)
    guest.resume()
    assert (lane.returns, lane.outside) == (1, 0)
    assert turn(pair, steps[0], 7_000)[0] == 0
    assert (lane.admitted, lane.waiting, lane.waited, lane.waited_longest) == (3, 2, 7_000, 7_000)
    assert turn(pair, steps[1], 9_000)[0] == turn(pair, steps[2], 9_000)[0] == 0
    assert (lane.waited, lane.waited_longest, lane.waits[:6]) == (25_000, 9_000, [2, 0, 0, 1, 2, 0])
    assert guest.record.ledger.peaks()["calls"] == 1


def test_calls_that_a_guest_could_go_on_with_are_counted(make):
    pair = make(controlled())
    guest = pair.guest()
    lane = guest.record.lane
    seen = []
    for thread in (0, 1, 2):
        pair.world.script.append(interrupt(thread))
        guest.call(invoke())
        seen.append((lane.outside, lane.returns))
    for thread in (2, 0, 1):
        guest.resume(thread)
        seen.append((lane.outside, lane.returns))
    assert seen == [(1, 1), (2, 2), (3, 3), (2, 3), (1, 3), (0, 3)]
