"""The kill sweep: a guest dies at any SMC of any quick scenario, before it is mediated or before it is answered (B10).

Afterwards no invariant is violated, the other guests end in order, a new guest of the same name lives, and nothing is
left. What the others expected of the dead one is not held against them. A sample runs here, more in the nightly run.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from mediator.core import lifecycle
from mediator.interleaving import run as run_seeded
from mediator.scenario import find_scenario, library
from mediator.scenario.actor import Actor
from mediator.scenario.guest import GuestDied, PowerCut, ScenarioGuest
from mediator.scenario.language import Scenario
from mediator.scenario.run import Outcome, Run
from mediator.scenario.steps import Step, StepFailed
from optee.abi.smc import Function

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
CUTS = 150 if NIGHTLY else 1
"""Cuts of each guest in each scenario, spread over its SMCs."""
APART = {
    "life-cycle": "who has room depends on who lives",
    "pause": "the one that dies would have resumed the other",
}
"""Scenarios in which a death has consequences of its own."""
LONG = {
    *("attribute-types", "death-in-rpc", "long-list", "long-message", "page-lists", "register-until-heap-is-full"),
    *("rpc-replies", "stack-canary", "stack-smash", "storage-concurrent", "storage-two-guests"),
    *("xtest-1004", "xtest-1005", "xtest-1007", "xtest-1013"),
}
"""Not quick: for the nightly run."""
SWEPT = [name for name in library() if name not in APART and (find_scenario(name).quick or (NIGHTLY and name in LONG))]
ALIVE = (int(Function.CALLS_REVISION), 0, 0, 0, 0, 0, 0, 0)


class Mortal(ScenarioGuest):
    """A guest whose first life may end early."""

    async def create(self) -> None:
        await super().create()
        assert isinstance(self.run, KillRun)
        if self.lives == 1 and self.name == self.run.victim:
            self.cut = PowerCut(self.run.calls, answered=self.run.answered)

    async def kill(self) -> None:
        if self.alive:
            self.run.world.inboxes[self.client].scripts.clear()  # they were meant for calls that it does not make
        await super().kill()


class KillRun(Run):
    """A run in which one guest dies at its nth SMC."""

    guest_kind = Mortal

    def __init__(self, scenario: Scenario, victim: str = "", calls: int = 0, *, answered: bool = False) -> None:
        super().__init__(scenario, 1, None)
        self.victim, self.calls, self.answered = victim, calls, answered

    async def do(self, step: Step, actor: Actor) -> None:
        """What a step expects in vain once the guest is dead ends its branch."""
        try:
            await super().do(step, actor)
        except StepFailed as failed:
            if not self.dead or failed.what.startswith("invariant"):
                raise
            raise GuestDied(self.victim) from None

    @property
    def dead(self) -> bool:
        """Whether the power of the victim was cut."""
        guest = self.guests.get(self.victim)
        return guest is not None and guest.lives > 0 and guest.cut is None

    def abort(self) -> None:
        """What fails after a death is no failure of the run."""
        if not self.dead:
            super().abort()

    async def _do_all(self, actor: Actor) -> None:
        with suppress(GuestDied):
            await actor.run_steps(self.scenario.steps)

    def _look_at_all(self) -> None:
        super()._look_at_all()
        if self.victim:
            self.nursery.start_soon(self._live_again)

    async def _live_again(self) -> None:
        """A new guest of this name finds nothing of the old one."""
        guest = self.guests[self.victim]
        model = self.model
        if guest.alive or len(model.partitions()) >= model.config.guests:
            return
        await self.create(guest)
        assert not model.threads_held(guest.client) and not model.session_count(guest.client)
        await guest.boot(self.nursery)
        answer = await guest.smc(0, ALIVE)
        assert answer[0] == 2
        await guest.shut_down()


def play(run: KillRun) -> Outcome:
    return run_seeded(run.play, 1)


def cuts(scenario: Scenario) -> Iterator[tuple[str, int, bool]]:
    """Guests, SMCs and moments at which they die, of a run in which nobody does."""
    run = KillRun(scenario)
    assert play(run).good
    for name, guest in run.guests.items():
        yield from ((name, calls, answered) for calls, answered in _spread(guest.smcs))


def _spread(smcs: int) -> Sequence[tuple[int, bool]]:
    points = [(calls, answered) for calls in range(1, smcs + 1) for answered in (False, True)]
    stride = max(len(points) // CUTS, 1)
    return points[stride // 2 :: stride][:CUTS]


@pytest.mark.parametrize("name", SWEPT)
def test_a_guest_may_die_at_any_call(name: str) -> None:
    scenario = find_scenario(name)
    for victim, calls, answered in list(cuts(scenario)):
        outcome = play(KillRun(scenario, victim, calls, answered=answered))
        assert outcome.good, (victim, calls, answered, outcome.as_data())


def test_the_sweep_notices_what_a_dead_guest_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    release, scenario = lifecycle.release_shared, find_scenario("same-cookies")
    monkeypatch.setattr(
        lifecycle, "release_shared", lambda core, guest, one: guest.vm == 2 or release(core, guest, one)
    )
    assert play(KillRun(scenario)).good, "in order it takes its buffer back itself"
    outcome = play(KillRun(scenario, "bob", 1, answered=True))
    assert outcome.left == {"pins": 3}
    assert {(one.invariant, one.guest) for one in outcome.violations} == {(2, 2)}
