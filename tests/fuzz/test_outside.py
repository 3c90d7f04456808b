"""The fuzzer at both ends of a mediator in another process, which sees nothing of it but what passes its doors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mediator.cli import run

PROGRAM = "import sys; {}; from mediator.cli import run; sys.exit(run(sys.argv[1:]))"
FAULTS = {
    "another guest's id": (
        "from mediator.core import yielding as y; f = y._send; "
        "y._send = lambda core, call: (lambda s: setattr(s, 'regs', (*s.regs[:7], s.regs[7] + 1)) or s)(f(core, call))",
        "invariant 9",
    ),
    "IPAs in page lists": (
        "from mediator.core import sharing as s; import numpy as n; "
        "f = s._pin; s._pin = lambda guest, shared, runs: (lambda first, kept: f(guest, shared, runs) or "
        "[p.view.__setitem__(slice(0, len(e)), e) for p, e in zip(shared.lists[first:], kept)] and None)"
        "(shared.filled, list(runs))",
        "invariant 4",
    ),
    "RPCs that are forgotten": (
        "from mediator.core import rpc; f = rpc.suspended; "
        "rpc.suspended = lambda core, call, answer: core.completed(call.regs, (0, 0, 0, 0)) "
        "if answer[0] == 0xFFFF0004 else f(core, call, answer)",
        "invariant 6",
    ),
}
"""One mistake each, made before the mediator starts, and by what it shows at its doors."""


class Attack:
    """Runs the command, and starts a mediator in a process of its own when there is a secure world for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._folder = folder
        self._capsys = capsys
        self._command: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        monkeypatch.setattr("mediator.cli.fuzz.note", self._start)

    def __call__(self, calls: int, before: str = "pass") -> tuple[int, dict[str, Any]]:
        """Exit code and document. before: what is done to the mediator before it starts."""
        door, optee = str(self._folder / "door"), str(self._folder / "optee")
        options = ["serve", "--guests", "0", "--external", "--socket", door, "--secure-world", optee]
        self._command = [sys.executable, "-c", PROGRAM.format(before), *options]
        try:
            attack = [
                "fuzz",
                "--target",
                door,
                "--secure-world",
                optee,
                "--guests",
                "2",
                "--calls",
                str(calls),
                "--json",
            ]
            code = run(attack)
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
        Path(door).unlink(missing_ok=True)
        return code, json.loads(self._capsys.readouterr().out)

    def _start(self, text: str) -> None:
        """In the place of the note that the secure world is served."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Attack:
    return Attack(tmp_path, monkeypatch, capsys)


def test_our_own_serve_survives_and_the_same_seed_makes_the_same_moves(attack: Attack) -> None:
    found = [attack(300), attack(300)]
    assert [code for code, _ in found] == [0, 0], found
    once, again = ({**data, "calls_per_second": 0} for _, data in found)
    assert once == again
    assert once["violations"] == [] and once["calls"] >= 300 and once["items"] > 40


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_mediator_shows_at_its_doors(name: str, attack: Attack) -> None:
    before, invariant = FAULTS[name]
    code, data = attack(4000, before)
    assert code == 1 and data["violations"][0].startswith(invariant), data


def test_a_target_wants_both_doors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuzz", "--target", str(tmp_path / "door")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
