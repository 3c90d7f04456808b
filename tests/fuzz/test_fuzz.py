"""The fuzzer leaves a whole core alone, says the same for the same seed, and prints what it did."""

import json
from pathlib import Path

import pytest

from mediator.cli import run
from mediator.fuzz import fuzz
from mediator.policies import load_policy


@pytest.mark.parametrize("policy", ["default", "xen", "minimal"])
def test_the_core_survives(policy: str) -> None:
    report = fuzz(load_policy(policy), seed=1, calls=2500)
    assert report.failure is None
    assert report.calls >= 2500 and report.kept


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
