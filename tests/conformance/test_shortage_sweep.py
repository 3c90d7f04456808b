"""The shortage sweep: any page and any record that the mediator wants is not there once, in any case (B3).

What the case expected is not held against it then; but no invariant is violated, every call has an answer, and when the
guests are gone nothing is left. A sample runs here, all of it in the nightly run.
"""

import os

import pytest

from mediator.conformance.catalogue import catalogue, find_case
from mediator.core import sharing
from mediator.failures import Countdown
from mediator.interleaving import run as run_seeded
from mediator.scenario.actor import Actor
from mediator.scenario.guest import ScenarioGuest
from mediator.scenario.language import Scenario
from mediator.scenario.run import Outcome, Run
from mediator.scenario.steps import Step, StepFailed

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
POINTS = 1000 if NIGHTLY else 2
"""Failures of each kind in each case."""
ENDLESS = 1 << 40
CASES = [
    case.scenario
    for case in catalogue()
    if not any(spec.has_driver for spec in case.machine.specs(None).values()) and "faults" not in case.needs
]


class ShortRun(Run):
    """A run in which the nth allocation of a kind fails, counted from 0 and from the first guest on."""

    def __init__(self, case: Scenario, kind: str, nth: int) -> None:
        super().__init__(case, 1, None)
        self.kind, self.nth = kind, nth
        self.countdown: Countdown | None = None

    async def create(self, guest: ScenarioGuest) -> None:
        await super().create(guest)
        if self.countdown is None:
            self.countdown = self.host.pages if self.kind == "page" else self.host.records
            self.countdown.left = self.nth

    async def do(self, step: Step, actor: Actor) -> None:
        """What is expected in vain is no matter, but for invariants."""
        try:
            await super().do(step, actor)
        except StepFailed as failed:
            if failed.what.startswith("invariant"):
                raise

    def give_up(self, failure: StepFailed) -> None:
        """A script that does not fit is one that nobody follows any more."""

    def _look_at_all(self) -> None:
        super()._look_at_all()
        for inbox in self.world.inboxes.values():
            inbox.scripts.clear()


def play(case: str, kind: str, nth: int) -> tuple[ShortRun, Outcome]:
    run = ShortRun(find_case(case), kind, nth)
    return run, run_seeded(run.play, 1)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_behind_whatever_there_is_too_little_of(case: str) -> None:
    for kind in ("page", "record"):
        golden, outcome = play(case, kind, ENDLESS)
        assert outcome.good and golden.countdown is not None, outcome.failure
        wanted = ENDLESS - golden.countdown.left
        stride = max(wanted // POINTS, 1)
        for nth in list(range(stride // 2, wanted, stride))[:POINTS]:
            _, outcome = play(case, kind, nth)
            assert outcome.good, (kind, nth, outcome.failure, outcome.violations, outcome.left)


def test_the_sweep_notices_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that is half made keeps its pages."""
    release = sharing.release_shared

    def keep(core: object, guest: object, shared: sharing.Shared) -> None:
        shared.lists.clear()
        release(core, guest, shared)

    monkeypatch.setattr("mediator.core.yielding.release_shared", keep)
    assert any(not play("list-lengths", "page", nth)[1].good for nth in range(4, 12))
