"""What the fuzzer finds is told again as a scenario: it shows the same, on the core in which it was found."""

import json
import os
from pathlib import Path
from random import Random

import pytest

from hv_models.smccc import KVM
from mediator.cli import run
from mediator.fuzz.arena import Arena, flavour
from mediator.fuzz.journal import Called, Journal
from mediator.fuzz.moves import draw
from mediator.fuzz.story import Story
from mediator.fuzz.world import THREADS
from mediator.policies import load_policy
from mediator.scenario import load_scenario, run_scenario
from tests.wrong_mediators import FAULTS, broken

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TOLD = (
    [name for name in FAULTS if FAULTS[name].by == "fuzz"]
    if NIGHTLY
    else ["a live cookie is taken again", "SHM_FREE frees nothing", "the guest's RPC page is forwarded"]
)
"""The first needs two calls at once; the last one leads OP-TEE to an address that is none."""


@pytest.mark.parametrize("name", TOLD)
def test_a_broken_core_fails_again_by_the_scenario_that_was_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    with broken(FAULTS[name]):
        assert run(["fuzz", "--calls", "100000", "--out", str(out), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["reproduced"]
        (file,) = out.iterdir()
        assert found["written"] == str(file)
        assert run(["run", str(file), "--json"]) == 1
        again = json.loads(capsys.readouterr().out)["scenarios"][0]
    seen = {f"invariant {violation['invariant']}" for violation in again["violations"]}
    assert seen & {violation.split(" (")[0] for violation in found["violations"]} or again["left"]
    assert run(["run", str(file)]) == 0


@pytest.mark.parametrize("seed", range(200 if NIGHTLY else 8))
def test_whatever_happens_can_be_told(seed: int) -> None:
    choose, journal = Random(seed), Journal()
    arena = Arena(load_policy("default"), 2, journal)
    for _ in range(60):
        arena.do(draw(choose, 2))
    arena.finish()
    journal.close()
    arena.close()
    story = Story("told", "p", "default", {f"guest-{n}": {"hypervisor": flavour(n)} for n in range(2)}, THREADS)
    story.tell(journal)
    outcome = run_scenario(load_scenario(story.text(), "told.yaml"))
    assert outcome.good, outcome.as_data()
    called = [what.regs for _, what in journal.happenings if isinstance(what, Called)]
    assert outcome.smcs == sum(KVM.route(regs) is None for regs in called)  # of other owners the hypervisor's own
    assert outcome.smcs > 10
