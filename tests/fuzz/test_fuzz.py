"""The fuzzer leaves a whole core alone, says the same for the same seed, and prints what it did."""

import json
import os
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from mediator import policies
from mediator.cli import run
from mediator.core.flow import Flow
from mediator.core.policy import FlowPolicy
from mediator.documents import DocumentError
from mediator.fuzz import fuzz
from mediator.fuzz.arena import Arena
from mediator.fuzz.moves import as_recorded
from mediator.fuzz.seeds import conversations, distil, lines, read_seeds, shipped
from mediator.policies import load_policy
from mediator.scenario import load_scenario
from mediator.trace.format import read_trace
from optee.abi.message import HEADER
from optee.abi.smc import is_rpc
from tests.shared import SHARED, needs_shared

POLICY = Path(policies.__file__).with_name("default.yaml")
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


@pytest.mark.parametrize("policy", ["default", "xen", "minimal"])
def test_the_core_survives(policy: str) -> None:
    report = fuzz(load_policy(policy), seed=1, calls=2500)
    assert report.failure is None
    assert report.calls >= 2500 and report.kept


@pytest.mark.skipif(not NIGHTLY, reason="takes a minute or two")
def test_every_edge_of_the_state_tables_is_taken_in_ten_minutes() -> None:
    report = fuzz(load_policy("default"), calls=400_000, recorded=shipped())
    assert report.failure is None and report.missing == []


def test_the_same_seed_is_the_same_run() -> None:
    def once(seed: int) -> dict[str, object]:
        return {**fuzz(load_policy("default"), seed=seed, calls=1500).as_data(), "calls_per_second": 0}

    assert once(5) == once(5)
    assert once(5) != once(6)


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuzz", "--calls", "500", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "mediator-fuzz/1" and data["violations"] == []
    assert run(["fuzz", "--calls", "500", "--unguided"]) == 0
    assert "fuzz, seed 0" in capsys.readouterr().out


def test_a_directory_that_cannot_be_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["fuzz", "--calls", "500", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_shipped_seeds_are_whole_calls(tmp_path: Path) -> None:
    seeds = shipped()
    assert len(seeds) >= 20 and all(not is_rpc(talk[-1].answer) for talk in seeds)
    assert all(is_rpc(exchange.answer) for talk in seeds for exchange in talk[:-1])
    path = tmp_path / "again.jsonl"
    path.write_text("\n".join(lines(seeds)) + "\n")
    assert read_seeds(path) == seeds


@needs_shared
def test_the_shipped_seeds_are_what_the_documented_command_makes_of_the_recording() -> None:
    _, events = read_trace(SHARED / "traces" / "native.jsonl.gz")
    assert list(distil(conversations(events))) == shipped()


def test_a_search_begins_from_a_recording_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    assert run(["run", "register-use-unregister", "--record", str(trace)]) == 0
    assert len(read_seeds(trace)) > 5
    assert run(["fuzz", "--calls", "300", "--corpus", str(trace), "--json"]) == 0
    trace.write_text(trace.read_text().splitlines()[0] + "\n")
    with pytest.raises(DocumentError, match="no event"):
        read_seeds(trace)
    capsys.readouterr()
    assert run(["fuzz", "--corpus", str(trace)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_was_recorded_is_said_again() -> None:
    """Alone, the shipped calls lead a guest through what they show: nothing else is drawn."""
    choose = Random(1)
    arena = Arena(load_policy("default"), 1)
    for talk in shipped():
        for exchange in talk:
            arena.do(as_recorded(choose, exchange, 0))
    assert not arena.checker.violations
    commands = {number for what, number in arena.items if what == "command"}
    assert commands >= {0, 1, 2, 4, 5}
    asked = {number for what, number in arena.items if what == "RPC command"}
    assert asked >= {HEADER.unpack_from(e.told)[0] for talk in shipped() for e in talk if e.answer == 0xFFFF0005}
    arena.finish()
    arena.close()


FLOWS = {
    "a place for each": FlowPolicy(queue=4),
    "one core, one place": FlowPolicy(queue=1, secure_cores=1),
    "a rate": FlowPolicy(queue=2, rate=2000.0, burst=2, secure_cores=2),
}


@pytest.mark.parametrize("name", FLOWS)
def test_nobody_waits_too_long_or_for_nothing(name: str) -> None:
    policy = replace(load_policy("default"), flow=FLOWS[name])
    reports = [fuzz(policy, seed=2, calls=1000, recorded=shipped()) for _ in range(2)]
    assert reports[0].failure is None
    assert ("waiting", FLOWS[name].queue) in reports[0].depths
    assert reports[0].edges == reports[1].edges and reports[0].items == reports[1].items


def test_a_failure_under_flow_control_is_made_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "flow.yaml"
    policy.write_text(POLICY.read_text().replace("flow: null", "flow: {queue: 8, secure_cores: 1}"))
    assert run(["fuzz", "--calls", "300", "--policy", str(policy)]) == 0
    monkeypatch.setattr(Flow, "leave", lambda self, place: None)
    assert run(["fuzz", "--calls", "300", "--policy", str(policy), "--out", str(tmp_path)]) == 1
    (written,) = tmp_path.glob("fuzz-*.yaml")
    scenario = load_scenario(written.read_text(), "fuzz")
    assert scenario.machine.policy is not None and "secure_cores" in written.read_text()
