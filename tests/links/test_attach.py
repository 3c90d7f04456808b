"""Somebody else's VMM against `mediator serve --external`: the example of the documentation, as it stands there."""

from __future__ import annotations

import ast
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hv_models import link
from tests.progress import without_progress

TOP = Path(__file__).parent.parent.parent
CLIENT = TOP / "docs" / "how-to" / "attach_client.py"
PAGE = TOP / "docs" / "attach.md"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    path = tmp_path / "door"
    command = [sys.executable, "-m", "mediator", "serve", "--external", "--socket", str(path), "--check", "--json"]
    process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and any("0 guests are up" in line for line in process.stderr)
    yield process, path
    process.kill()
    process.communicate()


def client(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", str(CLIENT), str(path)], capture_output=True, text=True, timeout=60)


def test_the_example_runs_and_leaves_nothing(served: tuple[subprocess.Popen[str], Path]) -> None:
    process, path = served
    for _ in range(2):
        ended = client(path)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert ended.stdout.splitlines() == [
            "features offered: 0x1",
            "client id: 1",
            "API UID: 384fb3e0-e7f811e3-af630002-a5d5c51b",
            *ended.stdout.splitlines()[3:4],
            "a call that is not for guests: 0xffffffffffffffff",
            "open session: 0x0",
            *ended.stdout.splitlines()[6:7],
            "close session: 0x0",
        ]
        assert re.fullmatch("capabilities: 0x[0-9a-f]+", ended.stdout.splitlines()[3])
        assert ended.stdout.splitlines()[6].startswith("list of TAs: 0xffff0010, ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, without_progress(err)) == (0, "")
    told = json.loads(out)
    assert [(guest["name"], guest["vmid"], guest["ended"]) for guest in told["guests"]] == [
        ("by-hand", 1, "finished")
    ] * 2
    assert told["violations"] == 0 and not any(told["left"].values())
    assert not path.exists()


def test_the_example_is_plain_and_short() -> None:
    source = CLIENT.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    imported = {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names
    }
    assert imported <= set(sys.stdlib_module_names)
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(source)))


def test_a_socket_of_nobody(tmp_path: Path) -> None:
    assert client(tmp_path / "nobody").returncode != 0


def test_the_page_names_every_request_and_bound_with_its_value() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| (\d+) \| `([A-Z_]+)` \|", text, re.MULTILINE))
    assert shown == {str(int(request)): request.name for request in link.Request}
    bounds = dict(re.findall(r"^\| `(MAX_[A-Z]+)` \| (\d+)", text, re.MULTILINE))
    assert bounds == {
        name: str(value >> 30 if name in ("MAX_RAM", "MAX_MEMORY") else value)
        for name, value in vars(link).items()
        if name.startswith("MAX_")
    }
