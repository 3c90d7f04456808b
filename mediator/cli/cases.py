"""What `mediator conform` prints of the catalogue: the list, verdicts, the coverage, one case as a diagram."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mediator.cli.output import (
    GOOD,
    BadInput,
    emit,
    emit_json,
    heading,
    note,
    progress,
    show,
    table,
    verdict,
)

if TYPE_CHECKING:
    from rich.table import Table

    from mediator.conformance.run_cases import Verdict
    from mediator.scenario.language import Scenario

FORMAT: Final = "mediator-cases/1"
LIST_FORMAT: Final = "mediator-catalogue/1"
COVERAGE_FORMAT: Final = "mediator-coverage/1"
_SHOWN: Final = 4
"""Cases that the table of the coverage names for an item."""
_SUITE: Final = "mediator conform"


def choose(names: Sequence[str] | None) -> "list[Scenario]":
    """The cases that were asked for; all if none were. Raises DocumentError."""
    from mediator.conformance.catalogue import catalogue, find_case

    return [find_case(name) for name in names] if names else catalogue()


def list_cases(cases: "Sequence[Scenario]", json: bool) -> int:
    """Print what there is."""
    keys = ("purpose", "source", "rules", "needs")
    if json:
        rows = [{"case": case.scenario} | {key: getattr(case, key) for key in keys} for case in cases]
        emit_json({"format": LIST_FORMAT, "cases": rows})
        return GOOD
    words = [(case.scenario, case.purpose, case.source or "", " ".join(case.rules)) for case in cases]
    show(table("case", "purpose", "source", "rules", rows=words))
    return GOOD


def draw(name: str) -> int:
    """Print one case as a sequence diagram."""
    from mediator.conformance.catalogue import find_case
    from mediator.conformance.explain import explain
    from mediator.conformance.journal import Journal
    from mediator.conformance.run_cases import run_case

    case, journal = find_case(name), Journal()
    outcome = run_case(case, journal)
    emit(explain(case, journal).text())
    if not outcome.passed:
        note(f"{case.scenario}: {outcome.why}")
    return verdict(outcome.passed)


def check(cases: "Sequence[Scenario]", junit: Path | None, *, coverage: bool, json: bool) -> int:
    """Run cases in this process, and print how they ended, or what they cover."""
    from mediator.conformance.run_cases import run_cases

    with progress("conform") as advance:
        verdicts = run_cases(cases, lambda done: advance(done, len(cases)))
    if junit is not None:
        write_junit(junit, verdicts)
    return show_coverage(verdicts, json) if coverage else show_verdicts(verdicts, json)


def check_outside(
    cases: "Sequence[Scenario]", target: Path, secure_world: Path, junit: Path | None, *, json: bool
) -> int:
    """Run cases against a mediator that somebody else runs, and print how they ended."""
    import trio

    from mediator.conformance.outside import TargetError, run_outside

    try:
        with progress("conform") as advance:
            verdicts = trio.run(
                run_outside,
                cases,
                target,
                secure_world,
                lambda done: advance(done, len(cases)),
                lambda: note(f"the secure world is served at {secure_world}; start the mediator now"),
            )
    except* TargetError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise BadInput(f"conform: {error}") from None
    if junit is not None:
        write_junit(junit, verdicts)
    return show_verdicts(verdicts, json)


def write_junit(path: Path, verdicts: "Sequence[Verdict]") -> None:
    """Write the report. Raises BadInput."""
    from mediator.conformance.junit import junit

    try:
        path.write_bytes(junit(verdicts, _SUITE))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None


def show_verdicts(verdicts: "Sequence[Verdict]", json: bool) -> int:
    """Print how cases ended."""
    counts = {word: sum(one.word == word for one in verdicts) for word in ("passed", "failed", "skipped")}
    good = not counts["failed"]
    if json:
        emit_json({"format": FORMAT, "good": good, **counts, "cases": [one.as_data() for one in verdicts]})
        return verdict(good)
    summary = table("case", "rules", "")
    for one in verdicts:
        summary.add_row(one.case.scenario, " ".join(one.case.rules), one.word)
    reasons = [f"{one.case.scenario}: {one.word}: {one.why}" for one in verdicts if not one.passed]
    show(summary, *reasons, ", ".join(f"{count} {word}" for word, count in counts.items()))
    return verdict(good)


def show_coverage(verdicts: "Sequence[Verdict]", json: bool) -> int:
    """Print which case shows which item; good if each item has a case, and each case passed."""
    from mediator.conformance.coverage import coverage, missing

    matrix = coverage(verdicts)
    uncovered = missing(matrix)
    failed = [one for one in verdicts if not one.passed]
    good = not uncovered and not failed
    if json:
        emit_json(
            {
                "format": COVERAGE_FORMAT,
                "good": good,
                "cases": len(verdicts),
                "failed": [one.case.scenario for one in failed],
                "missing": uncovered,
                "items": matrix,
            }
        )
        return verdict(good)
    parts = [part for title, members in matrix.items() for part in (heading(title), _matrix(members))]
    lines = [f"{one.case.scenario}: {one.word}: {one.why}" for one in failed]
    lines += [f"no case shows {item}" for item in uncovered]
    total = sum(map(len, matrix.values()))
    show(*parts, *lines, f"{total - len(uncovered)} of {total} items are shown by {len(verdicts)} cases")
    return verdict(good)


def _matrix(members: Mapping[str, Sequence[str]]) -> "Table":
    rows = table("item", "cases", "", right=("cases",))
    for item, cases in members.items():
        more = f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
        rows.add_row(item.rpartition(".")[2], str(len(cases)), ", ".join(cases[:_SHOWN]) + more)
    return rows
