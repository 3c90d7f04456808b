"""`mediator ctl`: look into a running `serve`, and change it."""

import json as jsonlib
import os
import re
import socket
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from mediator.cli.options import Json
from mediator.cli.output import GOOD, BadInput, emit, emit_json, on_terminal, show, table

if TYPE_CHECKING:
    from rich.table import Table

TIMEOUT_SECONDS: Final = 10.0
"""For an answer of a `serve` that may be busy."""
_COLUMNS: Final = ("id", "calls", "invokes", "RPCs", "denied", "refused", "errors", "pages pinned", "threads")

app = typer.Typer(help="Look into a running serve, and change it.", no_args_is_help=True)

ControlPath: TypeAlias = Annotated[
    Path, typer.Option("--control", metavar="PATH", envvar="MEDIATOR_CONTROL", help="The socket of serve --control.")
]
Guest: TypeAlias = Annotated[str, typer.Argument(metavar="GUEST", help="Its name, or its client id.")]


class Switch(StrEnum):
    """On or off."""

    ON = "on"
    OFF = "off"


def _ask(control: Path, **request: Any) -> dict[str, Any]:
    """Send one request and return the answer. Raises BadInput."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT_SECONDS)
            sock.connect(os.fspath(control))
            sock.sendall(jsonlib.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer = jsonlib.loads(file.read())
    except OSError as error:
        raise BadInput(f"{control}: {error.strerror or error}") from None
    except ValueError:
        raise BadInput(f"{control}: the answer was cut short") from None
    if "error" in answer:
        raise BadInput(f"ctl: {answer['error']}")
    return dict(answer)


def _address(text: str) -> int:
    if not re.fullmatch("0x[0-9a-fA-F]{1,16}|[0-9]{1,20}", text):
        raise BadInput(f"{text!r} is no address: digits, or 0x and hexadecimal digits")
    return int(text, 0 if text.startswith("0x") else 10)


def _table(status: dict[str, Any]) -> "Table":
    rows = [
        (
            guest["name"],
            guest["hypervisor"],
            *(str(guest[key]) for key in ("vmid", "calls", "invokes", "rpcs", "denied", "refused", "errors")),
            f"{guest['pages_pinned']} of {guest['pages_quota']}",
            str(guest["threads"]),
            guest["ended"] or "running",
        )
        for guest in status["guests"]
    ]
    return table("guest", "hypervisor", *_COLUMNS, "state", right=_COLUMNS, rows=rows)


@app.command()
def status(
    control: ControlPath,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
    json: Json = False,
) -> int:
    """Print what the guests do and hold."""
    if not watch:
        _print_status(control, json)
        return GOOD
    import trio

    async def again() -> None:
        while True:
            if on_terminal(sys.stdout) and not json:
                emit("\x1b[H\x1b[2J")
            _print_status(control, json)
            await trio.sleep(1)

    trio.run(again)
    return GOOD


def _print_status(control: Path, json: bool) -> None:
    found = _ask(control, ask="status")
    if json:
        emit_json(found)
    else:
        show(_table(found))


@app.command()
def destroy(control: ControlPath, guest: Guest) -> int:
    """Cut a guest's power: its VM is destroyed, and everything of it given back."""
    emit(f"{_ask(control, ask='destroy', guest=guest)['destroyed']} is destroyed")
    return GOOD


@app.command()
def trace(control: ControlPath, switch: Annotated[Switch, typer.Argument(help="Log every event.")]) -> int:
    """Have the running serve log every event of the core, or errors only."""
    _ask(control, ask="trace", on=switch is Switch.ON)
    return GOOD


@app.command()
def translate(
    control: ControlPath,
    guest: Guest,
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="An IPA of the guest.")],
    pa: Annotated[bool, typer.Option("--pa", help="It is a physical address: find the IPA.")] = False,
) -> int:
    """Walk a guest's stage-2 tables for an address, and say what each level holds."""
    found = _ask(control, ask="translate", guest=guest, address=_address(address), pa=pa)
    emit("\n".join(found["lines"]))
    return GOOD
