"""What `mediator serve` makes of its options for sockets."""

from __future__ import annotations

import socket
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mediator.cli import run
from mediator.service import display
from mediator.service.served import ServedGuest

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--external", "--external and --socket PATH belong together"),
        ("--socket {door}", "--external and --socket PATH belong together"),
        ("--guests 0", "--guests 0 leaves nobody to serve"),
        ("--external --socket {door}/no/such/folder", "no/such/folder: No"),
        ("--external --socket " + "x" * 200, "AF_UNIX path too long"),
        ("--control {busy} --guests 1 --in-process", "Address already in use"),
        ("--external --socket {file}", "Address already in use"),
    ],
)
def test_a_socket_that_cannot_be_is_one_line(arguments: str, words: str, tmp_path: Path, capsys: Capture) -> None:
    file, busy = tmp_path / "file", tmp_path / "busy"
    file.write_text("mine")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as served:
        served.bind(str(busy))
        served.listen()
        line = arguments.format(door=tmp_path / "door", busy=busy, file=file).split()
        assert run(["serve", "--duration", "0.01", *line]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert file.read_text() == "mine"


def test_the_heads_of_the_table_can_be_read_on_80_columns() -> None:
    guest = ServedGuest("a-guest-of-a-long-name", "kvm").status()
    console = Console(width=80, file=StringIO(), record=True)
    console.print(display._table([(guest, 12345.6)], "3 s"))
    text = console.export_text()
    heads = ("guest", "hyper-", "VMID", "calls/s", "RPCs", "denied", "refused", "pinned", "threads", "errors")
    assert all(head in text for head in heads), text
    assert max(map(len, text.splitlines())) <= 80


def test_the_table_shows_many_guests_and_counts_the_rest() -> None:
    guests = [ServedGuest(f"kvm-{number}", "kvm") for number in range(display.MAX_ROWS + 3)]
    table = display._table([(guest.status(), 1234.5) for guest in guests], "3 of 5 s")
    assert table.row_count == display.MAX_ROWS and table.caption == "and 3 more" and table.title == "3 of 5 s"
    assert next(iter(table.columns[3].cells)) == "1234"
