"""Flow control: whose call goes on next, and which wait (rules R22, R29).

A call needs two things: a place among its guest's calls in flight, which it keeps until it ends, and a secure core,
which it has while it runs in the secure world. What cannot go on at once waits in its guest's lane. When something is
free, calls that OP-TEE has begun (RETURN_FROM_RPC) and CANCEL come first, guest by guest in turn; they are bound by no
rate. Then come new calls, by deficit round robin over guests: a guest whose calls share many pages has its turn less
often. Where there are other guests, one guest never has all the secure cores: a call of another finds one free,
however long this one's calls are.

No clock: the shell says what time it is (`Flow.turns`), in nanoseconds. No call either: what waits is a `Place`.
"""

from collections import deque
from enum import Enum, auto
from math import ceil
from typing import Final

from mediator.core.ledger import Charge, Ledger, OverLimit
from mediator.core.policy import FlowPolicy
from mediator.core.rates import Traffic
from mediator.core.steps import Ticket

SECOND: Final = 1_000_000_000
PAGES_PER_UNIT: Final = 512
"""Shared pages that count as much as one call more, in the round robin: about what fits one page of a list."""


class Stand(Enum):
    """Where a call stands with flow control."""

    OUTSIDE = auto()
    """it neither waits nor runs"""
    WAITING = auto()
    AWAY = auto()
    """it waits, and its vCPU has gone back to the guest: it cannot have its turn"""
    INSIDE = auto()
    """it has a secure core"""


class Place:
    """One call's place. charge: takes up the call when it is let in. cost: in the round robin, at least 1.

    urgent: it goes before new calls. counted: it is one of its guest's calls in flight. let_go: the lane's `returns`
    when its vCPU was last let go.
    """

    __slots__ = ("charge", "cost", "counted", "lane", "let_go", "since", "stand", "ticket", "urgent")

    def __init__(self, lane: "Lane", ticket: Ticket, charge: Charge, pages: int, *, urgent: bool) -> None:
        self.lane = lane
        self.ticket = ticket
        self.charge = charge
        self.cost = 1 + pages // PAGES_PER_UNIT
        self.urgent = urgent
        self.counted = False
        self.let_go = 0
        self.stand = Stand.OUTSIDE
        self.since = 0


class Lane:
    """What flow control knows of one guest. Times are in nanoseconds.

    inside: calls that have a secure core. returns: how often a call was handed to the guest in its middle; outside:
    those that the guest has now. queued,
    peak: calls that had to wait to be let in, and the most at once. admitted: how often a call was given a core;
    waited, waited_longest: for it; waits: how many of them waited less than 2**n microseconds.
    """

    __slots__ = (
        "admitted",
        "calls",
        "credit",
        "credit_at",
        "deficit",
        "inside",
        "ledger",
        "outside",
        "peak",
        "queued",
        "returns",
        "traffic",
        "urgent",
        "waited",
        "waited_longest",
        "waits",
    )

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.urgent: deque[Place] = deque()
        self.calls: deque[Place] = deque()
        self.deficit = 0
        self.credit: int | None = None
        self.credit_at = 0
        self.inside = 0
        self.returns = 0
        self.outside = 0
        self.admitted = 0
        self.queued = 0
        self.peak = 0
        self.waited = 0
        self.waited_longest = 0
        self.waits = [0] * 40
        self.traffic = Traffic()

    @property
    def waiting(self) -> int:
        """Calls that wait to be let in, those whose vCPU is away included."""
        return len(self.calls) + sum(not place.counted for place in self.urgent)

    def wait_below(self, share: float) -> int:
        """Microseconds that this share of the calls waited less than, rounded up to a power of two."""
        left = share * self.admitted
        bucket = 0
        while left > self.waits[bucket]:
            left -= self.waits[bucket]
            bucket += 1
        return 1 << bucket


class Flow:
    """The lanes of all guests, and the secure cores.

    threads: of OP-TEE for each guest, once known; guests: how many there are, whether they call or not.
    """

    def __init__(self, policy: FlowPolicy) -> None:
        self.policy = policy
        self.threads = 1
        self.guests = 0
        self.now = 0
        self.running = 0
        """Calls that have a secure core."""
        self._lanes: dict[Lane, None] = {}
        """Those in which somebody waits, in the order of their turns."""
        self._granted: list[Place] = []

    # A call

    def enter(self, place: Place) -> bool:
        """Let a new call in (True), or put it into its lane.

        Raises OverLimit if as many wait there as may: then another call of that guest is in flight, which is what
        Linux needs to be told to try again (R29).
        """
        lane = place.lane
        if self._go(place):
            return True
        waiting = lane.waiting
        if waiting > self.policy.queue:
            self._remove(place)
            raise OverLimit("queue", 1, waiting - 1, self.policy.queue, "R29")
        lane.queued += 1
        lane.peak = max(lane.peak, waiting)
        return False

    def resume(self, place: Place) -> bool:
        """Let a call that OP-TEE has begun, or that has its place in flight, go on (True), or wait for a core."""
        place.urgent = True
        place.lane.outside -= 1
        return self._go(place)

    def leave(self, place: Place) -> None:
        """A call has come out of the secure world, or was answered without getting there."""
        if place.stand is Stand.INSIDE:
            self.running -= 1
            place.lane.inside -= 1
            place.stand = Stand.OUTSIDE
            if not place.charge.refunded:
                place.lane.outside += 1
                place.lane.returns += 1

    def away(self, place: Place) -> None:
        """The vCPU of a waiting call goes back to its guest; the call keeps its place."""
        place.stand = Stand.AWAY
        place.let_go = place.lane.returns

    def in_the_way(self, place: Place) -> bool:
        """Whether a waiting call keeps a vCPU from a call that the guest could go on with: once for each of those."""
        return place.lane.outside > 0 and place.let_go != place.lane.returns

    def back(self, place: Place) -> bool:
        """It has come back: its turn may be now (True)."""
        place.stand = Stand.WAITING
        self._let_in()
        return self._took(place)

    # The shell

    def turns(self, now: int) -> list[Ticket]:
        """It is `now`: the waiting calls whose turn has come, each to be gone on with once."""
        self.now = max(self.now, now)
        self._let_in()
        granted, self._granted = self._granted, []
        return [place.ticket for place in granted]

    def next_turn(self) -> int | None:
        """When a waiting call may go on for no other reason than that time has passed; None if none may."""
        if not self._has_core:
            return None
        times = [
            lane.credit_at + self._period - lane.credit
            for lane in self._lanes
            if lane.credit is not None and lane.credit < self._period and self._candidate(lane, rated=False) is not None
        ]
        return min(times, default=None)

    # A guest

    def drop(self, lane: Lane) -> None:
        """The guest goes, or starts anew: its places are free, and who waits there is to be answered."""
        for place in (*lane.urgent, *lane.calls):
            if place.stand is Stand.WAITING:
                self._granted.append(place)
            place.stand = Stand.OUTSIDE
        lane.urgent.clear()
        lane.calls.clear()
        self._tidy(lane)

    def pause(self, lane: Lane) -> None:
        """The guest, which makes no requests until `unpause`, has no turn; the order of its own calls stays."""
        lane.deficit = 0
        self._lanes.pop(lane, None)

    def unpause(self, lane: Lane) -> None:
        """The guest lines up again, behind the others."""
        if lane.urgent or lane.calls:
            self._lanes[lane] = None

    # Inside

    @property
    def _has_core(self) -> bool:
        cores = self.policy.secure_cores
        return cores is None or self.running < cores

    def _may_have_core(self, lane: Lane) -> bool:
        """Whether a free core may be this guest's: not where it would have all of them, and there are other guests."""
        cores = self.policy.secure_cores
        return cores is None or cores == 1 or self.guests < 2 or lane.inside < cores - 1

    @property
    def _period(self) -> int:
        """Nanoseconds between two calls at the full rate, never less."""
        return 0 if self.policy.rate is None else ceil(SECOND / self.policy.rate)

    def _go(self, place: Place) -> bool:
        """Line up, and see whether it is the place's turn."""
        lane = place.lane
        (lane.urgent if place.urgent else lane.calls).append(place)
        place.stand = Stand.WAITING
        place.since = self.now
        self._lanes.setdefault(lane, None)
        self._let_in()
        return self._took(place)

    def _took(self, place: Place) -> bool:
        if place.stand is Stand.INSIDE:
            self._granted.remove(place)
            return True
        return False

    def _let_in(self) -> None:
        """Give cores away while there are some, and somebody whose turn it is."""
        while self._lanes and self._has_core:
            place = self._next_urgent() or self._next_call()
            if place is None:
                return
            self._grant(place)

    def _next_urgent(self) -> Place | None:
        for lane in self._lanes:
            for place in lane.urgent if self._may_have_core(lane) else ():
                if place.stand is Stand.WAITING and (place.counted or lane.ledger.calls < self.threads):
                    return place
        return None

    def _next_call(self) -> Place | None:
        """Deficit round robin: as many rounds as it takes until the first guest can pay for its call."""
        found: list[Place] = []
        for lane in self._lanes:
            place = self._candidate(lane, rated=True)
            if place is not None:
                found.append(place)
        if not found:
            return None
        rounds, chosen = min(
            ((max(place.cost - place.lane.deficit, 0), place) for place in found), key=lambda pair: pair[0]
        )
        for place in found:
            place.lane.deficit += rounds
        chosen.lane.deficit -= chosen.cost
        if chosen.lane.credit is not None:
            chosen.lane.credit -= self._period
        return chosen

    def _candidate(self, lane: Lane, *, rated: bool) -> Place | None:
        """The new call that this guest would send next; `rated`: if it may by its rate."""
        if not lane.calls or lane.ledger.calls >= lane.ledger.limits.calls or not self._may_have_core(lane):
            return None
        if rated and not self._has_credit(lane):
            return None
        return next((place for place in lane.calls if place.stand is Stand.WAITING), None)

    def _has_credit(self, lane: Lane) -> bool:
        """Fill the guest's bucket up to now, and see whether there is a call's worth in it."""
        policy = self.policy
        if policy.rate is None:
            lane.credit = None
            return True
        period = self._period
        most = policy.burst * period
        credit = most if lane.credit is None else lane.credit + self.now - lane.credit_at
        lane.credit, lane.credit_at = min(credit, most), self.now
        return lane.credit >= period

    def _grant(self, place: Place) -> None:
        lane = place.lane
        self._remove(place)
        place.stand = Stand.INSIDE
        if not place.counted:
            place.counted = True
            place.charge.take_call()
        self.running += 1
        lane.inside += 1
        if lane in self._lanes:  # its next turn comes after all others'
            del self._lanes[lane]
            self._lanes[lane] = None
        waited = self.now - place.since
        lane.admitted += 1
        lane.waited += waited
        lane.waited_longest = max(lane.waited_longest, waited)
        lane.waits[min((waited // 1000).bit_length(), len(lane.waits) - 1)] += 1
        self._granted.append(place)

    def _remove(self, place: Place) -> None:
        lane = place.lane
        (lane.urgent if place.urgent else lane.calls).remove(place)
        place.stand = Stand.OUTSIDE
        self._tidy(lane)

    def _tidy(self, lane: Lane) -> None:
        if not lane.calls:
            lane.deficit = 0
            if not lane.urgent:
                self._lanes.pop(lane, None)
