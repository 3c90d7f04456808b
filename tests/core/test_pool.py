"""The host's pool of pages: reservation, borrowing, live change and death, against a plain model (R21, R22, B14)."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from mediator.core.ledger import Ledger, Limits, OverLimit
from mediator.core.policy import PolicyLimits
from mediator.core.pool import Pool, PoolStatus, borrowed
from mediator.core.steps import CALL_REFUSED, GUEST_REFUSED, LIMITS_CHANGED, POOL_CHANGED
from optee.abi.message import Param
from optee.abi.smc import ReturnCode, VmId
from tests.core.pair import COMMS, OUT_OF_MEMORY, GuestSide, Pair, interrupt, invoke, policy_of

SIZES = (1, 2, 3, 5, 8)
PAGES = st.integers(6, 24)
RESERVED = st.integers(0, 8)
MESSAGES = 64
"""The page of a guest where its messages are written, each over the one before."""
CAPACITIES = st.none() | st.integers(8, 40)


def limits(pages: int, reserved: int) -> PolicyLimits:
    return replace(policy_of().limits, pages=pages, reserved_pages=reserved)


class PoolMachine(RuleBasedStateMachine):
    """Guests that register and unregister buffers while their limits and the pool change.

    The model: for each guest what it holds, its reservation and its limit; for the pool a number.
    """

    guests = Bundle("guests")

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.capacity: int | None = None
        self.held: dict[int, dict[int, int]] = {}
        self.bounds: dict[int, tuple[int, int]] = {}
        self.lists: dict[tuple[int, int], Param] = {}
        self.cookies = count(1)

    def taken(self) -> int:
        """Pages that nobody can borrow any more."""
        return sum(max(sum(held.values()), self.bounds[vm][1]) for vm, held in self.held.items())

    def reserved(self) -> int:
        return sum(reserved for _, reserved in self.bounds.values())

    @initialize(target=guests, capacity=st.integers(10, 30), reserved=st.tuples(RESERVED, RESERVED, RESERVED))
    def begin(self, capacity: int, reserved: tuple[int, ...]) -> object:
        self.pair.mediator.change_limits({}, capacity)
        self.capacity = capacity
        return multiple(*[guest for each in reserved for guest in self.born(24, each, "kvm")])

    @rule(target=guests, pages=PAGES, part=RESERVED, kind=st.sampled_from(["kvm", "xen"]))
    def create(self, pages: int, part: int, kind: str) -> object:
        return multiple(*self.born(pages, min(part, pages), kind))

    def born(self, pages: int, reserved: int, kind: str) -> list[GuestSide]:
        pair = self.pair
        create = pair.machine.create_kvm if kind == "kvm" else pair.machine.create_xen
        vm = create(f"{kind}-{next(self.cookies)}", 1 << 20)
        answer = pair.drive(pair.checker.create(vm.client_id, vm, limits(pages, reserved)))[0]
        if self.capacity is not None and reserved and self.taken() + reserved > self.capacity:
            assert answer == ReturnCode.ENOMEM and pair.names()[-1] == GUEST_REFUSED
            pair.machine.destroy(vm)
            return []
        assert answer == 0
        pair.records.append(pair.mediator.guests[vm.client_id])
        self.held[vm.client_id], self.bounds[vm.client_id] = {}, (pages, reserved)
        guest = GuestSide(pair, vm)
        data = [guest.page() for _ in range(max(SIZES))]
        for size in SIZES:
            self.lists[vm.client_id, size] = guest.tmem(0)._replace(a=guest.page_list(data[:size]), b=size * 4096)
        return [guest]

    @rule(guest=guests, size=st.sampled_from(SIZES))
    def share(self, guest: GuestSide, size: int) -> None:
        held = sum(self.held[guest.id].values())
        most, reserved = self.bounds[guest.id]
        loan = held + size - max(held, reserved)
        resource = None
        if held + size > most:
            resource = "pages"
        elif self.capacity is not None and loan > 0 and self.taken() + loan > self.capacity:
            resource = "host_pages"
        cookie = next(self.cookies)
        param = self.lists[guest.id, size]
        guest._used = MESSAGES
        answer = guest.register(param._replace(c=cookie))
        assert answer.ret == (0 if resource is None else OUT_OF_MEMORY)
        if resource is None:
            self.held[guest.id][cookie] = size
        else:
            event = [event for event in self.pair.events if event.name == CALL_REFUSED][-1]
            assert event.vm == guest.id and event.detail["resource"] == resource
            assert event.detail["answer"] == OUT_OF_MEMORY and event.detail["origin"] == COMMS
            assert event.detail["held"] + event.detail["asked"] > event.detail["limit"]
            assert guest.record.counters.last_refusal == event.detail

    @rule(guest=guests, pick=st.integers(0, 99))
    def unshare(self, guest: GuestSide, pick: int) -> None:
        if not self.held[guest.id]:
            return
        cookies = sorted(self.held[guest.id])
        cookie = cookies[pick % len(cookies)]
        guest._used = MESSAGES
        assert guest.unregister(cookie).ret == 0
        del self.held[guest.id][cookie]

    @rule(guest=guests, pages=PAGES, part=RESERVED)
    def change_guest(self, guest: GuestSide, pages: int, part: int) -> None:
        self.change(guest.id, (pages, min(part, pages)), self.capacity)

    @rule(capacity=CAPACITIES)
    def change_pool(self, capacity: int | None) -> None:
        self.change(None, None, capacity)

    @rule(guest=guests, pages=PAGES, part=RESERVED, capacity=CAPACITIES)
    def change_both(self, guest: GuestSide, pages: int, part: int, capacity: int | None) -> None:
        self.change(guest.id, (pages, min(part, pages)), capacity)

    def change(self, vm: int | None, wanted: tuple[int, int] | None, capacity: int | None) -> None:
        before, old = self.taken(), dict(self.bounds)
        if vm is not None and wanted is not None:
            self.bounds[vm] = wanted
        after = self.taken()
        possible = capacity is None or (self.reserved() <= capacity and (after <= before or after <= capacity))
        asked = {} if vm is None or wanted is None else {VmId(vm): limits(*wanted)}
        if not possible:
            self.bounds = old
            with pytest.raises(OverLimit):
                self.pair.mediator.change_limits(asked, capacity)
            return
        events = self.pair.mediator.change_limits(asked, capacity)
        names = [event.name for event in events]
        assert names == [POOL_CHANGED] * (capacity != self.capacity) + [LIMITS_CHANGED] * (old != self.bounds)
        self.capacity = capacity

    @rule(guest=consumes(guests), again=st.booleans())
    def die(self, guest: GuestSide, again: bool) -> None:
        """A VM ends, or its driver starts anew: with the limits that it had."""
        pair, record = self.pair, guest.record
        request = pair.checker.reset if again else pair.checker.destroy
        assert pair.drive(request(guest.id))[0] == 0
        assert not any(record.ledger.sums().values()) and guest.pins() == 0
        if again:
            assert guest.record is not record
            assert (guest.limits.pages, guest.limits.reserved_pages) == self.bounds[guest.id]
            assert pair.drive(pair.checker.destroy(guest.id))[0] == 0
        pair.machine.destroy(guest.vm)
        del self.held[guest.id], self.bounds[guest.id]

    @invariant()
    def agrees(self) -> None:
        for vm, held in self.held.items():
            ledger = self.pair.mediator.guests[VmId(vm)].ledger
            assert ledger.pages == sum(held.values()) <= ledger.pages_peak
            assert (ledger.limits.pages, ledger.limits.reserved_pages) == self.bounds[vm]
            assert borrowed(ledger) == max(ledger.pages - self.bounds[vm][1], 0)
        status = self.pair.mediator.pool.status()
        assert status.held == sum(sum(held.values()) for held in self.held.values())
        assert (status.capacity, status.reserved) == (self.capacity, self.reserved())

    @invariant()
    def reservations_can_be_honoured(self) -> None:
        """Whatever the others hold, each guest gets the whole of what is reserved for it, at this moment."""
        charges = []
        for vm, held in self.held.items():
            own = min(self.bounds[vm]) - sum(held.values())
            if own > 0:
                ledger = self.pair.mediator.guests[VmId(vm)].ledger
                peak = ledger.pages_peak
                charges.append(ledger.charge(pages=own))
                ledger.pages_peak = peak
        for charge in charges:
            charge.refund()

    def teardown(self) -> None:
        self.pair.check()
        status = self.pair.mediator.pool.status()
        assert (status.held, status.reserved, status.borrowed) == (0, 0, 0)
        self.pair.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=30)


def test_new_loans_are_refused_first(make):
    """The pool is lowered under what is lent: nobody loses anything, the borrower waits, the reservation holds."""
    pair = make()
    owner, borrower = pair.guest(), pair.guest("xen")
    mediator = pair.mediator
    mediator.change_limits({owner.id: limits(10, 6), borrower.id: limits(20, 0)}, 20)
    assert borrower.register(borrower.tmem(14, cookie=1)).ret == 0
    assert borrower.register(borrower.tmem(1, cookie=2)).ret == OUT_OF_MEMORY
    with pytest.raises(OverLimit):  # what is lent cannot be reserved as well
        mediator.change_limits({owner.id: limits(10, 7)}, 20)
    assert owner.limits.reserved_pages == 6
    mediator.change_limits({}, 8)
    assert borrower.pins() == 14
    assert owner.register(owner.tmem(6, cookie=1)).ret == 0
    assert owner.register(owner.tmem(1, cookie=2)).ret == OUT_OF_MEMORY
    assert borrower.record.counters.refusals == owner.record.counters.refusals == {"host_pages": 1}
    assert borrower.unregister(1).ret == 0
    assert borrower.register(borrower.tmem(2, cookie=1)).ret == 0
    assert borrower.register(borrower.tmem(1, cookie=2)).ret == OUT_OF_MEMORY


def test_a_refusal_names_itself(make):
    """Guest, call, rule, resource, asked, held, limit, answer, origin: for each resource, in the event."""
    pair = make(policy_of("default", pages=4, buffers=2, pages_per_buffer=3, calls=1, memory=40 << 10))
    guest = pair.guest()

    def last():
        event = [event for event in pair.events if event.name == CALL_REFUSED][-1]
        assert event.level == "info" and event.vm == guest.id and event.detail["rule"] == "R21"
        assert guest.record.counters.last_refusal == event.detail
        detail = event.detail
        return detail["resource"], detail["asked"], detail["held"], detail["limit"], detail["answer"], detail["origin"]

    assert guest.register(guest.tmem(3, cookie=1)).ret == 0
    assert guest.register(guest.tmem(2, cookie=2)).ret == OUT_OF_MEMORY
    assert last() == ("pages", 2, 3, 4, OUT_OF_MEMORY, COMMS)
    assert guest.register(guest.tmem(4, cookie=2)).ret == OUT_OF_MEMORY
    assert last() == ("pages_per_buffer", 4, None, 3, OUT_OF_MEMORY, COMMS)
    assert guest.register(guest.tmem(1, cookie=2)).ret == 0
    assert guest.invoke(guest.tmem(1, cookie=3)).ret == OUT_OF_MEMORY
    assert last() == ("buffers", 1, 2, 2, OUT_OF_MEMORY, COMMS)
    pair.world.script.append(interrupt())
    guest.call(invoke())
    assert guest.call(invoke())[0][0] == ReturnCode.ETHREAD_LIMIT
    assert last() == ("calls", 1, 1, 1, ReturnCode.ETHREAD_LIMIT, None)
    guest.resume()
    guest.limits.memory = guest.sums()["memory"] + 10
    assert guest.call(invoke())[0][0] == ReturnCode.ENOMEM
    resource, asked, held, limit, answer, origin = last()
    assert (resource, held + 10, answer, origin) == ("memory", limit, ReturnCode.ENOMEM, None) and asked > 10
    guest.limits.memory = 1 << 20
    pair.host.left = 0
    assert guest.call(invoke())[0][0] == ReturnCode.ENOMEM
    refused = guest.record.counters.last_refusal
    assert (refused["rule"], refused["resource"], refused["limit"]) == ("R22", "mediator_pages", None)
    assert sum(guest.record.counters.refusals.values()) == guest.record.counters.refused == 6
    assert guest.record.ledger.peaks()["pages"] == 4 and guest.record.ledger.peaks()["calls"] == 1


def test_a_policy_is_adopted_whole_or_not_at_all(make):
    pair = make()
    first, second = pair.guest(), pair.guest()
    core = pair.mediator
    old = core.policy
    other = replace(old, limits=limits(9, 3), pool_pages=7, guests={"somebody": limits(5, 1)})
    with pytest.raises(OverLimit):
        core.adopt(replace(other, pool_pages=5), {first.id: other.limits, second.id: other.limits})
    assert core.policy is old and first.limits.pages == 65536 and core.pool.capacity is None
    with pytest.raises(ValueError) as caught:
        core.adopt(replace(other, cookie_zero=True, rpmb_owner="kvm-1"), {})
    assert str(caught.value) == "policy default: cookie_zero, rpmb_owner cannot change while guests run"
    core.adopt(other, {first.id: other.limits, second.id: other.limits})
    assert core.policy is other
    assert (first.limits.pages, second.limits.reserved_pages, core.pool.capacity) == (9, 3, 7)
    vm = pair.machine.create_kvm("third", 1 << 20)
    assert pair.drive(pair.checker.create(vm.client_id, vm))[0] == ReturnCode.ENOMEM
    assert core.adopt(other, {}) == ()


def refused(request):
    """What an OverLimit says: its text, and its parts."""
    with pytest.raises(OverLimit) as caught:
        request()
    over = caught.value
    return str(over), (over.rule, over.resource, over.asked, over.held, over.limit)


def test_what_the_pool_cannot_give_is_named(make):
    """To the operator who asks for a reservation, and in the event of a guest that asks for pages."""
    pair = make()
    first, second = pair.guest(), pair.guest()
    core = pair.mediator
    core.change_limits({first.id: limits(20, 6), second.id: limits(20, 0)}, 10)
    assert refused(lambda: core.change_limits({second.id: limits(20, 5)}, 10)) == (
        "11 reserved_pages, 10 are allowed",
        ("R22", "reserved_pages", 11, None, 10),
    )
    assert second.register(second.tmem(3, cookie=1)).ret == 0
    assert refused(lambda: core.change_limits({first.id: limits(20, 8)}, 10)) == (
        "2 reserved_pages beside 9, 10 are allowed",
        ("R22", "reserved_pages", 2, 9, 10),
    )
    assert first.register(first.tmem(8, cookie=1)).ret == OUT_OF_MEMORY
    detail = first.record.counters.last_refusal
    assert [detail[key] for key in ("rule", "resource", "asked", "held", "limit", "why")] == [
        "R22", "host_pages", 2, 9, 10, "2 host_pages beside 9, 10 are allowed",
    ]  # fmt: skip
    assert core.pool.status() == PoolStatus(10, 3, 6, 3)
    assert first.register(first.tmem(7, cookie=1)).ret == 0
    assert core.pool.status() == PoolStatus(10, 10, 6, 4)
    assert first.unregister(1).ret == 0
    assert core.change_limits({first.id: limits(20, 7)}, 10)
    assert pair.destroy(first)[0] == 0
    assert core.pool.status() == PoolStatus(10, 3, 0, 3)
    assert second.register(second.tmem(7, cookie=2)).ret == 0
    assert second.register(second.tmem(1, cookie=3)).ret == OUT_OF_MEMORY


def test_a_pool_of_exactly_what_is_reserved_is_enough():
    pool = Pool(10)
    ledgers = [Ledger(Limits(20, 9, 9, 9, 9, 9, reserved)) for reserved in (6, 4, 0, 1)]
    for ledger in ledgers[:3]:
        pool.join(ledger)
    assert refused(lambda: pool.join(ledgers[3])) == (
        "1 reserved_pages beside 10, 10 are allowed",
        ("R22", "reserved_pages", 1, 10, 10),
    )
    assert ledgers[3].lender is None
    small = Pool(1)
    borrower = Ledger(Limits(20, 9, 9, 9, 9, 9))
    small.join(borrower)
    for _ in range(3):  # each loan comes back
        borrower.charge(pages=1).refund()
    charge = ledgers[0].charge(pages=6)
    assert refused(lambda: ledgers[2].charge(pages=1))[1] == ("R22", "host_pages", 1, 10, 10)
    charge.refund()
    pool.change(None, {})
    assert [ledger.lender for ledger in ledgers] == [None] * 4 and pool.status() == PoolStatus(None, 0, 10, 0)
    ledgers[2].charge(pages=20)
    pool.change(10, {})  # it is lowered over loans that are out, and below which nobody can go
    assert ledgers[2].lender is pool and pool.status() == PoolStatus(10, 20, 10, 20)
    assert refused(lambda: ledgers[1].charge(pages=5))[1] == ("R22", "host_pages", 1, 30, 10)
    ledgers[1].charge(pages=4)
    pool.leave(ledgers[2])
    assert ledgers[2].lender is None and pool.status() == PoolStatus(10, 4, 10, 0)


def test_the_policy_says_how_large_the_pool_is(make):
    pair = make(replace(policy_of(), pool_pages=3))
    guest = pair.guest()
    assert guest.register(guest.tmem(4, cookie=1)).ret == OUT_OF_MEMORY
    assert guest.register(guest.tmem(3, cookie=2)).ret == 0
    assert pair.mediator.pool.status() == PoolStatus(3, 3, 0, 3)
