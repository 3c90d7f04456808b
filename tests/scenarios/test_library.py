"""What is shipped runs, says what it is for, and is the same each time."""

import json
import os
import subprocess
import sys

import pytest

from mediator.scenario import find_scenario, library, run_scenario
from tests.docs.pages import TOP

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SEEDS = range(1, 51) if NIGHTLY else (1,)
QUICK_SEEDS = range(1, 51) if NIGHTLY else range(1, 4)


@pytest.mark.parametrize("name", library())
def test_a_scenario_of_the_library(name: str) -> None:
    scenario = find_scenario(name)
    assert scenario.scenario == name and scenario.purpose.endswith(".")
    for seed in QUICK_SEEDS if scenario.quick else SEEDS:
        outcome = run_scenario(scenario, seed)
        assert outcome.good, outcome.as_data()


def test_the_same_seed_is_the_same_run_in_another_process_and_another_seed_is_another() -> None:
    def play(seed: int, hashes: str) -> object:
        done = subprocess.run(
            [sys.executable, "-m", "mediator", "run", "thread-limit", "--seed", str(seed), "--json"],
            cwd=TOP,
            env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": str(TOP)},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    assert play(3, "1") == play(3, "2")
