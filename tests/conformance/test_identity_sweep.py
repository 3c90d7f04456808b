"""The identity sweep: two guests do the same at once, with the same cookies, threads, sessions and addresses (B6).

It is generated: every case of the catalogue that one guest plays alone is played by a KVM guest and a Xen guest side
by side. Each must find what it would find alone.
"""

import os

import pytest

from mediator.conformance.catalogue import catalogue, find_case
from mediator.core import rpc
from mediator.interleaving import run as run_seeded
from mediator.scenario.flow import InOrder
from mediator.scenario.language import EVERY, Scenario
from mediator.scenario.machine import GuestSpec
from mediator.scenario.run import Outcome, Run

SEEDS = range(1, 21) if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else (1,)
ALONE = {"faults", "reset", "pause"}
"""Needs of cases that name their guest, or do something to the whole machine."""


def doubled(case: Scenario) -> Scenario:
    """The case with a twin of its guest, of the other hypervisor."""
    (name, spec), *_ = case.machine.specs(None).items()
    other = "kvm" if spec.hypervisor == "xen" or "dirty-log" in case.needs else "xen"
    twin = spec.model_copy(update={"hypervisor": other})
    machine = case.machine.model_copy(update={"guests": {name: spec, "twin": twin}, "each": GuestSpec()})
    steps = [InOrder.model_construct(guest=EVERY, sequence=case.steps)]
    return case.model_copy(update={"machine": machine, "steps": steps})


CASES = [
    case.scenario for case in catalogue() if len(case.machine.specs(None)) == 1 and not ALONE.intersection(case.needs)
]


def play(case: str, seed: int) -> Outcome:
    return run_seeded(Run(doubled(find_case(case)), seed, None).play, seed)


@pytest.mark.parametrize("case", CASES)
def test_twins_do_not_notice_each_other(case: str) -> None:
    for seed in SEEDS:
        outcome = play(case, seed)
        assert outcome.good and outcome.guests == 2, (outcome.failure, outcome.violations, outcome.left)


def test_the_sweep_notices_what_twins_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of suspended calls for all guests, say, is found by the cases of resumes."""
    shared: dict[object, object] = {}
    suspended = rpc.suspended

    def together(core: object, call: object, answer: object) -> object:
        object.__setattr__(call.guest, "suspended", shared)
        return suspended(core, call, answer)

    monkeypatch.setattr(rpc, "suspended", together)
    assert len(CASES) > 90
    assert any(not play(case, 1).good for case in ("foreign-interrupt", "resume-wrong-thread"))
