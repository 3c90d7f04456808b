"""`mediator fuzz`: hostile and benign guests at full speed, with all invariants on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator.cli.options import Json, PolicyName
from mediator.cli.output import emit_json, heading, note, on_terminal, policy_of, show, table, verdict

if TYPE_CHECKING:
    from mediator.fuzz.engine import FuzzReport

DEFAULT_CALLS = 20_000
"""A quarter of a minute: enough to see the common mistakes."""
_SHOWN = 10


def fuzz(
    seed: Annotated[int, typer.Option(min=0, help="The same seed is the same run.")] = 0,
    calls: Annotated[int | None, typer.Option(min=1, metavar="N", help="SMCs of guests. Default: 20000.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, metavar="S", help="Stop after so much time.")] = None,
    guests: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="VMs, KVM and Xen mixed.")] = 4,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where a failure is written.")] = Path(),
    policy: PolicyName = "default",
    unguided: Annotated[bool, typer.Option("--unguided", help="Learn nothing of earlier episodes.")] = False,
    again: Annotated[
        Path | None, typer.Option("--reproduce", metavar="FILE", help="Make the moves of a written failure.")
    ] = None,
    json: Json = False,
) -> int:
    """Attack the core with guests and a secure world that mean harm, looking at all invariants."""
    from mediator.fuzz.engine import fuzz as search
    from mediator.fuzz.engine import reproduce, save

    if again is not None:
        report = reproduce(again)
    else:
        if calls is None and seconds is None:
            calls = DEFAULT_CALLS
        report = search(
            policy_of(policy),
            seed=seed,
            calls=calls,
            seconds=seconds,
            guests=guests,
            guided=not unguided,
            advance=_progress if on_terminal(sys.stderr) else lambda report: None,
        )
        if on_terminal(sys.stderr):
            print(file=sys.stderr)
        if report.failure is not None:
            note(f"written to {save(report, out)}")
    if json:
        emit_json(report.as_data())
    else:
        _show(report)
    return verdict(report.failure is None)


def _progress(report: "FuzzReport") -> None:
    rate = report.calls / report.seconds if report.seconds else 0
    edges = f"{len(report.edges)} edges, {len(report.items)} items"
    print(f"\r{report.calls} calls, {rate:.0f}/s, {edges}, {report.kept} kept", end="", file=sys.stderr, flush=True)


def _show(report: "FuzzReport") -> None:
    data = report.as_data()
    summary = table("calls", "calls/s", "episodes", "kept", "edges", "items", "features", "failures")
    numbers = (data["calls"], data["calls_per_second"], data["episodes"], data["kept"], len(data["edges"]))
    failed = int(report.failure is not None)
    summary.add_row(*map(str, (*numbers, data["items"], data["features"], failed)))
    title = heading(f"fuzz, seed {report.seed}, policy {report.policy}, {report.guests} guests")
    lines = [f"not taken: {what} {edge}" for what, edge in data["edges_missing"]]
    if report.failure is not None:
        lines.append(f"failed after {len(report.failure.moves)} moves, made short from {report.failure.shrunk_from}:")
        lines += report.failure.why[:_SHOWN]
    show(title, summary, *lines)
