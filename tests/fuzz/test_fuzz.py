"""The fuzzer finds what is broken, says the same for the same seed, and writes what fails."""

import json
from pathlib import Path

import pytest

from mediator.cli import run
from mediator.documents import DocumentError
from mediator.fuzz import fuzz, reproduce
from mediator.fuzz.engine import save
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


def test_a_broken_core_is_found_made_short_and_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediator.core.ledger.Charge.refund", lambda self: None)
    report = fuzz(load_policy("default"), calls=20000)
    assert report.failure is not None
    assert len(report.failure.moves) <= 5 < report.failure.shrunk_from
    path = save(report, tmp_path / "out")
    again = reproduce(path)
    assert again.failure is not None and again.failure.why == report.failure.why
    monkeypatch.undo()
    assert reproduce(path).failure is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": "mediator-fuzz-case/2"}',
        '{"format": "mediator-fuzz-case/1", "moves": [["x", 1, 2, 3]]}',
    ],
)
def test_a_file_that_is_no_case_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(text)
    with pytest.raises(DocumentError, match="no case of mediator fuzz"):
        reproduce(path)


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuzz", "--calls", "500", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "mediator-fuzz/1" and data["violations"] == []
    assert run(["fuzz", "--calls", "500", "--unguided"]) == 0
    assert "fuzz, seed 0" in capsys.readouterr().out
