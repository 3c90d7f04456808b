"""`mediator replay`: recorded traffic of a real driver and a real OP-TEE through the mediator."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from mediator.cli.options import Json, PolicyName, Traces
from mediator.cli.output import emit_json, heading, note, policy_of, progress, show, table, verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mediator.trace.report import ReplayReport

_SUMS = ("events", "calls", "forwarded", "returned", "unexpected")
_SHOWN_VIOLATIONS = 5


def replay(traces: Traces, policy: PolicyName = "default", json: Json = False) -> int:
    """Replay recordings: what OP-TEE and the guest see must be what they saw."""
    from mediator.trace.replay import replay as replay_trace

    chosen = policy_of(policy)
    reports: dict[str, ReplayReport] = {}
    for path in traces:
        with progress(f"replay {path.name}") as advance:
            reports[str(path)] = replay_trace(path, chosen, advance)
    if json:
        documents = [{"trace": name, **report.as_data()} for name, report in reports.items()]
        emit_json(next(iter(reports.values())).as_data() if len(reports) == 1 else _together(documents))
    else:
        _show(reports, policy)
    return verdict(all(report.good for report in reports.values()))


def _together(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several: sums, the first thing that was unexpected, and each trace's own."""
    expected: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for document in documents:
        expected.update(document["expected"])
        left.update(document["left"])
    return {
        "format": documents[0]["format"],
        **{name: sum(document[name] for document in documents) for name in _SUMS},
        "expected": dict(sorted(expected.items())),
        "first_unexpected": next(
            (
                {"trace": document["trace"], **document["first_unexpected"]}
                for document in documents
                if document["first_unexpected"] is not None
            ),
            None,
        ),
        "peak_pages_pinned": max(document["peak_pages_pinned"] for document in documents),
        "left": dict(left),
        "violations": [violation for document in documents for violation in document["violations"]],
        "traces": documents,
    }


def _show(reports: "dict[str, ReplayReport]", policy: str) -> None:
    counts = ("events", "SMCs", "forwarded", "returned", "pages pinned (peak)", "unexpected", "violations")
    summary = table("trace", *counts, right=counts)
    expected: Counter[str] = Counter()
    for name, report in reports.items():
        numbers = (report.events, report.calls, report.forwarded, report.returned, report.peak_pages_pinned)
        summary.add_row(name, *map(str, numbers), str(report.unexpected), str(len(report.violations)))
        expected.update(report.expected)
    parts: list[RenderableType] = [heading(f"replay, policy {policy}"), summary]
    if expected:
        kinds = [(kind, str(count)) for kind, count in sorted(expected.items())]
        parts += [heading("differences that the policy intends"), table("kind", "times", right=("times",), rows=kinds)]
    for name, report in reports.items():
        held = ", ".join(f"{what.replace('_', ' ')}: {count}" for what, count in report.left.items() if count)
        if held:
            note(f"{name}: the recording ends while the guest holds {held} (released with the VM)")
        if report.first_unexpected is not None:
            first = report.first_unexpected
            parts.append(
                f"{name}:{first['line']}: call {first['call']}, {first['what']}\n"
                f"  recorded: {first['expected']}\n  here:     {first['got']}"
            )
        parts += [f"{name}: {violation}" for violation in report.violations[:_SHOWN_VIOLATIONS]]
    show(*parts)
