"""`mediator replay`: recorded traffic of a real driver and a real OP-TEE through the mediator."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from mediator.cli.options import Json, PolicyName, Traces
from mediator.cli.output import emit_json, note, policy_of, progress, show, table, verdict

if TYPE_CHECKING:
    from mediator.trace.replay import ReplayReport

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
    columns = ("trace", "events", "SMCs", "forwarded", "returned", "pages pinned (peak)", "unexpected", "violations")
    summary = table(f"replay, policy {policy}", *columns, right=columns[1:])
    expected: Counter[str] = Counter()
    for name, report in reports.items():
        numbers = (report.events, report.calls, report.forwarded, report.returned, report.peak_pages_pinned)
        summary.add_row(name, *map(str, numbers), str(report.unexpected), str(len(report.violations)))
        expected.update(report.expected)
    show(summary)
    if expected:
        kinds = table("differences that the policy intends", "kind", "times", right=("times",))
        for kind, count in sorted(expected.items()):
            kinds.add_row(kind, str(count))
        show(kinds)
    for name, report in reports.items():
        held = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in report.left.items() if count)
        if held:
            note(f"{name}: the recording ends while the guest holds {held}; released when the VM was destroyed")
        if report.first_unexpected is not None:
            first = report.first_unexpected
            show(
                f"{name}:{first['line']}: call {first['call']}, {first['what']}\n"
                f"  recorded: {first['expected']}\n  here:     {first['got']}"
            )
        for violation in report.violations[:_SHOWN_VIOLATIONS]:
            show(f"{name}: {violation}")
