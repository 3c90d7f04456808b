"""What is shipped runs, says what it is for, and is the same each time."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mediator.cli import run
from mediator.scenario import find_scenario, library, run_scenario
from tests.docs.pages import DOCS, TOP, rows

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.mark.parametrize("name", library())
def test_a_scenario_of_the_library(name: str) -> None:
    scenario = find_scenario(name)
    assert scenario.scenario == name and scenario.purpose.endswith(".")
    outcome = run_scenario(scenario, 1)
    assert outcome.good, outcome.as_data()


@pytest.mark.parametrize("guests", [2, 8])
@pytest.mark.parametrize("name", [name for name in library() if name.startswith("xtest-")])
def test_xtest_with_more_guests(name: str, guests: int) -> None:
    outcome = run_scenario(find_scenario(name), guests, guests)
    assert outcome.good and outcome.guests == guests, outcome.as_data()


def test_every_rule_and_every_class_of_mistakes_has_a_scenario_and_the_page_says_so() -> None:
    made = runpy.run_path(str(DOCS / "library.py"))
    scenarios = [find_scenario(name) for name in library()]
    assert all(made["showing"](name, scenarios) for name in (*made["RULES"], *made["CLASSES"]))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "python docs/library.py --write mends this"
    rules = {row[0] for row in rows(DOCS / "design.md")}
    assert set(made["RULES"]) <= rules


def _traces(scenario: str, seed: int, hashes: str, folder: Path) -> list[bytes]:
    """The traces of a run in a process of its own, one for each guest."""
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "mediator", "run", scenario, "--seed", str(seed), "--record", str(folder / "t.jsonl")],
        cwd=TOP,
        env={**os.environ, "PYTHONHASHSEED": hashes, "PYTHONPATH": str(TOP)},
        capture_output=True,
        check=True,
    )
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", library() if NIGHTLY else ["notifications"])
def test_the_same_seed_makes_the_same_trace_byte_for_byte(name: str, tmp_path: Path) -> None:
    first, again = _traces(name, 3, "1", tmp_path / "1"), _traces(name, 3, "2", tmp_path / "2")
    assert first == again and all(first)


def test_another_seed_makes_another_interleaving(tmp_path: Path) -> None:
    traces = set()
    for seed in range(8):
        file = tmp_path / f"{seed}.jsonl"
        assert run_scenario(find_scenario("thread-limit"), seed, record=file).good
        traces.add(file.read_bytes())
    assert len(traces) == 8


def test_a_recorded_run_can_be_replayed(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl.gz"
    assert run(["run", "thread-limit", "--record", str(file)]) == 0
    assert run(["replay", str(file)]) == 0
    assert run(["run", "hello", "thread-limit", "--record", str(file)]) == 2
