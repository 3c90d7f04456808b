"""`mediator fuzz`: hostile and benign guests at full speed, with all invariants on."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mediator.cli.options import Json, PolicyName, SecureWorldOfTarget, Target
from mediator.cli.output import BadInput, emit_json, heading, note, on_terminal, policy_of, show, table, verdict

if TYPE_CHECKING:
    from mediator.fuzz.engine import FuzzReport, Search

DEFAULT_CALLS = 20_000
"""A quarter of a minute: enough to see the common mistakes."""
_SHOWN = 10


def fuzz(
    seed: Annotated[int, typer.Option(min=0, help="The same seed is the same run.")] = 0,
    calls: Annotated[int | None, typer.Option(min=1, metavar="N", help="SMCs of guests. Default: 20000.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, metavar="S", help="Stop after so much time.")] = None,
    guests: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="VMs, KVM and Xen mixed.")] = 4,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where a failure is written, as a scenario.")] = Path(),
    policy: PolicyName = "default",
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", metavar="TRACE", help="Begin from the calls of this trace, too; may be repeated."),
    ] = None,
    unguided: Annotated[bool, typer.Option("--unguided", help="Learn nothing of earlier episodes.")] = False,
    target: Target = None,
    secure_world: SecureWorldOfTarget = None,
    json: Json = False,
) -> int:
    """Attack the core with guests and a secure world that mean harm, looking at all invariants."""
    from mediator.documents import read_document
    from mediator.fuzz.engine import fuzz as search
    from mediator.fuzz.engine import save
    from mediator.fuzz.seeds import read_seeds, shipped
    from mediator.policies import BUILT_IN

    if (target is None) is not (secure_world is None):
        raise BadInput("fuzz: --target and --secure-world belong together")
    if calls is None and seconds is None:
        calls = DEFAULT_CALLS
    try:  # now, and not when there is something to write
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out}: {error.strerror or error}") from None
    common: Search = {
        "seed": seed,
        "guests": guests,
        "calls": calls,
        "seconds": seconds,
        "guided": not unguided,
        "recorded": [*shipped(), *(talk for path in corpus or () for talk in read_seeds(path))],
        "advance": _progress if on_terminal(sys.stderr) else lambda report: None,
    }
    if target is not None and secure_world is not None:
        report = _search_outside(target, secure_world, common)
    else:
        policy_text = "" if policy in BUILT_IN else read_document(Path(policy))
        report = search(policy_of(policy), policy_text=policy_text, **common)
    if on_terminal(sys.stderr):
        print(file=sys.stderr)
    written = ""
    if report.failure is not None and report.failure.scenario:
        try:
            written = str(save(report, out))
        except OSError as error:
            raise BadInput(f"{out}: {error.strerror or error}") from None
        note(f"written to {written}: mediator run {written}")
    if json:
        emit_json(report.as_data() | {"written": written or None})
    else:
        _show(report)
    return verdict(report.failure is None)


def _search_outside(target: Path, secure_world: Path, common: "Search") -> "FuzzReport":
    import trio

    from mediator.conformance.outside import TargetError
    from mediator.fuzz.outside import fuzz_outside

    def served() -> None:
        note(f"the secure world is served at {secure_world}; start the mediator now")

    try:
        return trio.run(lambda: fuzz_outside(target, secure_world, served=served, **common))
    except* TargetError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise BadInput(f"fuzz: {error}") from None


def _progress(report: "FuzzReport") -> None:
    rate = report.calls / report.seconds if report.seconds else 0
    edges = f"{len(report.edges)} edges, {len(report.items)} items"
    print(f"\r{report.calls} calls, {rate:.0f}/s, {edges}, {report.kept} kept", end="", file=sys.stderr, flush=True)


def _show(report: "FuzzReport") -> None:
    data = report.as_data()
    edges = table("state table", "edge", "moves that took it", right=("moves that took it",))
    for what, edge, count in data["edges"]:
        edges.add_row(what, edge, str(count))
    for what, edge in data["edges_missing"]:
        edges.add_row(what, edge, "not taken")
    inside = [edges] if data["edges"] else []  # a target's tables are its own
    summary = table("calls", "calls/s", "episodes", "kept", "edges", "items", "depths", "failures")
    numbers = (data["calls"], data["calls_per_second"], data["episodes"], data["kept"], len(data["edges"]))
    failed = int(report.failure is not None)
    summary.add_row(*map(str, (*numbers, data["items"], data["depths"], failed)))
    title = heading(f"fuzz, seed {report.seed}, policy {report.policy}, {report.guests} guests")
    lines = []
    if report.failure is not None:
        lines.append(f"failed after {len(report.failure.moves)} of {report.failure.shrunk_from} moves:")
        lines += report.failure.why[:_SHOWN]
    show(title, *inside, summary, *lines)
