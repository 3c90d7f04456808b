"""Fairness: what a guest's small calls take alone, and beside a guest that floods; in virtual time and in real time.

The flood is what hurts most: page lists of the largest buffer that is allowed, registered and released over and over,
and TA calls that compute for long.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final

import trio

from guests import Guest, Value
from guests.client_memory import Direction
from guests.workloads.applications import EXERCISE, HELLO_WORLD, Exercise, HelloWorld
from mediator.board import Board
from mediator.core.policy import FlowPolicy, Policy
from mediator.costs import Costs
from mediator.interleaving import run

FAIRNESS: Final = "fairness"
SMALL_CALLS: Final = 200
"""Small calls that are timed."""
FLOODING: Final = 4
"""Tasks of the flooding guest of each kind, and half as many vCPUs as there are of both."""
PORTIONS: Final = 40
"""Of work in each long call: 4 ms by the table of costs."""
FLOW: Final = FlowPolicy(queue=16, secure_cores=2)
_PAGE: Final = 4096
_SEED: Final = 1
_WARM_UP: Final = 0.05
"""Seconds that the flood is under way before the first small call."""
_THINK: Final = 0.0007
"""Seconds of virtual time between two small calls: no multiple of anything that the flood does."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Microseconds that 50 and 99 of 100 small calls took at most."""

    p50: float
    p99: float

    @classmethod
    def of(cls, times: list[float]) -> "Latency":
        """From seconds."""
        ordered = sorted(times)
        return cls(*(1e6 * ordered[ceil(share * len(ordered)) - 1] for share in (0.5, 0.99)))


@dataclass(frozen=True, slots=True)
class Fairness:
    """Small calls alone and beside the flood, in one kind of time, with or without flow control."""

    time: str
    controlled: bool
    alone: Latency
    beside: Latency

    @property
    def ratio(self) -> float:
        """How many times as long 99 of 100 calls take at most."""
        return self.beside.p99 / self.alone.p99

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        rounded = {
            f"{name}_{share}_us": round(getattr(latency, share), 1)
            for name, latency in (("alone", self.alone), ("beside", self.beside))
            for share in ("p50", "p99")
        }
        return {"time": self.time, "flow_control": self.controlled, **rounded, "p99_ratio": round(self.ratio, 2)}


def fairness(policy: Policy, *, virtual: bool, controlled: bool, calls: int = SMALL_CALLS) -> Fairness:
    """Measure on boards of their own: alone, then beside the flood."""
    if controlled:
        policy = replace(policy, flow=FLOW)
    found = []
    for flooded in (False, True):

        async def main(flooded: bool = flooded) -> list[float]:
            return await _measure(policy, calls, Costs() if virtual else None, flooded=flooded)

        times = run(main, _SEED) if virtual else trio.run(main)
        found.append(Latency.of(times))
    return Fairness("virtual" if virtual else "real", controlled, *found)


async def _measure(policy: Policy, calls: int, costs: Costs | None, *, flooded: bool) -> list[float]:
    times: list[float] = []
    async with (
        Board(policy, check=False, costs=costs) as board,
        board.guest("kvm", vcpus=FLOODING) as flooding,
        board.guest("xen") as small,
        trio.open_nursery() as nursery,
    ):
        if flooded:
            size = policy.limits.pages_per_buffer * _PAGE
            for _ in range(FLOODING):
                nursery.start_soon(_compute, flooding)
            nursery.start_soon(_share, flooding, size)
            await trio.sleep(_WARM_UP)
        async with small.context() as context, await context.open_session(HELLO_WORLD) as session:
            for number in range(calls):
                began = trio.current_time()
                await session.invoke(HelloWorld.INC_VALUE, Value(number))
                times.append(trio.current_time() - began)
                await trio.sleep(0 if costs is None else _THINK)
        nursery.cancel_scope.cancel()
    return times


async def _compute(guest: Guest) -> None:
    """Long TA calls, one after the other."""
    async with guest.context() as context, await context.open_session(EXERCISE) as session:
        while True:
            await session.invoke(Exercise.WORK, Value(PORTIONS, direction=Direction.INPUT))


async def _share(guest: Guest, size: int) -> None:
    """The longest page list that is allowed, over and over."""
    async with guest.context() as context:
        buffer = context.buffer(size)
        while True:
            await (await context.register(buffer)).release()
