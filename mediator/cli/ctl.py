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
from mediator.cli.output import GOOD, BadInput, emit, emit_json, heading, on_terminal, show, table

if TYPE_CHECKING:
    from rich.table import Table

TIMEOUT_SECONDS: Final = 10.0
"""For an answer of a `serve` that may be busy."""
_STRANGER: Final = "whoever serves there is no mediator of this version"
_QUOTA_KEYS: Final = ("held", "limit", "reserved", "borrowed", "peak")
_COLUMNS: Final = (
    "id",
    "calls",
    "invokes",
    "RPCs",
    "denied",
    "refused",
    "rejected",
    "errors",
    "pages pinned",
    "threads",
)

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
    if not isinstance(answer, dict):
        raise BadInput(f"{control}: {_STRANGER}")
    if "error" in answer:
        raise BadInput(f"ctl: {answer['error']}")
    return answer


def _address(text: str) -> int:
    if not re.fullmatch("0x[0-9a-fA-F]{1,16}|[0-9]{1,20}", text):
        raise BadInput(f"{text!r} is no address: digits, or 0x and hexadecimal digits")
    return int(text, 0 if text.startswith("0x") else 10)


def _limits(texts: list[str]) -> dict[str, int | None]:
    """What `pages=100 buffers=8` says."""
    limits: dict[str, int | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch("[0-9]{1,20}|null", value):
            raise BadInput(f"{text!r} is no limit: a name, =, and a number")
        if name in limits:
            raise BadInput(f"{name} is given twice")
        limits[name] = None if value == "null" else int(value)
    return limits


def _table(status: dict[str, Any]) -> "Table":
    rows = [
        (
            guest["name"],
            guest["hypervisor"],
            *(
                str(guest[key])
                for key in ("vmid", "calls", "invokes", "rpcs", "denied", "refused", "rejected", "errors")
            ),
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
    if found.get("format") != "mediator-ctl/1":
        raise BadInput(f"{control}: {_STRANGER}")
    if json:
        emit_json(found)
        return
    show(_table(found), heading("\nquota"), _quota_table(found), *_refusals(found))
    if any(guest.get("flow") for guest in found["guests"]):
        show(heading("\nflow control"), _flow_table(found))
    if any(map(_pools, found["guests"])):
        show(heading("\nmemory of OP-TEE"), _memory_table(found))
    records = {guest["name"]: guest["storage_memory"] for guest in found["guests"] if guest.get("storage_memory")}
    if records:
        from mediator.cli.storage_memory import storage_memory

        show(heading("\nmemory manager of secure storage, bytes"), *storage_memory(records))


def _pools(guest: dict[str, Any]) -> list[dict[str, Any]]:
    pools: list[dict[str, Any]] = guest.get("memory", [])
    return pools


def _memory_table(status: dict[str, Any]) -> "Table":
    """OP-TEE's pools of each guest: bytes, but translation tables."""
    keys = ("allocated", "max_allocated", "size", "failed", "biggest_failure")
    rows = [
        (guest["name"], pool["pool"], *(str(pool[key]) for key in keys))
        for guest in status["guests"]
        for pool in _pools(guest)
    ]
    columns = ("allocated", "most", "size", "failures", "biggest failure")
    return table("guest", "pool", *columns, right=columns, rows=rows)


def _flow_table(status: dict[str, Any]) -> "Table":
    """How many calls of each guest wait, how long they waited, and how many a second go to each TA."""
    rows = []
    for guest in status["guests"]:
        flow = guest.get("flow")
        if flow:
            waited = flow["waited_us"]
            times = (f"< {waited['p50']} us", f"< {waited['p99']} us", f"{waited['max']} us")
            refused = guest["refusals"].get("queue", 0)
            numbers = (f"{flow['waiting']} of {flow['limit']}", flow["peak"], flow["queued"], *times, refused)
            rates = ", ".join(f"{each['ta'][:8]} {each['per_second']}/s" for each in flow["tas"] if each["per_second"])
            rows.append((guest["name"], *map(str, numbers), rates))
    columns = ("waiting", "peak", "had to wait", "p50", "p99", "longest", "refused")
    return table("guest", *columns, "calls by TA", right=columns, rows=rows)


def _quota_table(status: dict[str, Any]) -> "Table":
    """What each running guest holds of what it may hold, and the most that it ever held."""
    rows = []
    for guest in status["guests"]:
        if guest["ended"] or "quota" not in guest:
            continue
        for name, quota in guest["quota"].items():
            if "held" in quota:
                held = [str(quota[key]) if key in quota else "" for key in _QUOTA_KEYS]
                rows.append((guest["name"], name, *held, str(guest["refusals"].get(name, 0))))
    pool = status["pool"]
    if pool["capacity"] is not None:
        numbers = (str(pool[key]) for key in ("held", "capacity", "reserved", "borrowed"))
        refused = sum(guest.get("refusals", {}).get("host_pages", 0) for guest in status["guests"])
        rows.append(("(all)", "pages of the pool", *numbers, "", str(refused)))
    columns = ("held", "limit", "reserved", "borrowed", "peak", "refused")
    return table("guest", "resource", *columns, right=columns, rows=rows)


def _refusals(status: dict[str, Any]) -> list[str]:
    """The last refusal of each guest, in words."""
    from optee.abi.registers import name_of
    from optee.abi.smc import Function

    lines = []
    for guest in status["guests"]:
        last = guest.get("last_refusal")
        if last is not None:
            where = "a0" if last["origin"] is None else f"ret, origin {last['origin']}"
            call = [] if last["call"] is None else [f"call {last['call']}"]  # refused in registers, it has no number
            command = [last["command"]] if last.get("command") else []
            which = ", ".join([last["rule"], *call, *command, f"function {name_of(Function, last['function'])}"])
            lines.append(
                f"{guest['name']}: last refused ({which}): {last['why']}; answer {last['answer']:#x} in {where}"
            )
    return lines


@app.command()
def destroy(control: ControlPath, guest: Guest) -> int:
    """Cut a guest's power: its VM is destroyed, and everything of it given back."""
    emit(f"{_ask(control, ask='destroy', guest=guest)['destroyed']} is destroyed")
    return GOOD


@app.command()
def quota(
    control: ControlPath,
    guest: Guest,
    limits: Annotated[
        list[str], typer.Argument(metavar="LIMIT=N...", help="pages=, reserved_pages=, buffers=, calls= and so on.")
    ],
) -> int:
    """Change what a guest may hold; nothing that it holds is taken away."""
    found = _ask(control, ask="quota", guest=guest, limits=_limits(limits))
    now = found["limits"]
    emit(f"{found['guest']}: " + ", ".join(f"{name} {_shown(value)}" for name, value in now.items()))
    return GOOD


def _shown(value: int | None) -> str:
    return "as OP-TEE has threads" if value is None else str(value)


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
