"""`mediator conform`: the catalogue of cases, or step by step against what another mediator was observed to do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mediator.cli.options import Json, SecureWorldOfTarget, Target
from mediator.cli.output import BadInput, emit_json, heading, note, policy_of, progress, show, table, verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mediator.conformance.compare import Report
    from mediator.conformance.vectors import Document

_SHOWN = 10
_KEPT_KEYS = ("format", "ipa_base")
"""Top-level keys of the input that hold for our own run too: the machine's addresses are ours."""


def conform(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CASE|FILE]...", help="Cases of the catalogue, or YAML files; none: the catalogue."),
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option("--vectors", metavar="FILE", help="A vector file instead, gzip'd or not.")
    ] = None,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME|FILE", help="With --vectors: the policy to compare under.")
    ] = "xen",
    observed: Annotated[
        Path | None,
        typer.Option(
            "--observed",
            metavar="FILE",
            help="With --vectors: write what this mediator did, as a vector file (.gz: packed).",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the cases and run none.")] = False,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="Which case shows which item of the ABI; fails if an item has none.")
    ] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="CASE", help="Draw one case as a sequence diagram.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the verdicts as a JUnit report, too.")
    ] = None,
    target: Target = None,
    secure_world: SecureWorldOfTarget = None,
    json: Json = False,
) -> int:
    """Conformance to the SMC ABI: cases of the catalogue, or a comparison with recorded vectors."""
    from mediator.cli import cases

    if (target is None) is not (secure_world is None):
        raise BadInput("conform: --target and --secure-world belong together")
    if vectors is not None:
        if names or list_ or coverage or explain or junit or target:
            raise BadInput("conform: --vectors goes with --policy, --observed and --json only")
        return _compare(vectors, policy, observed, json)
    if observed is not None:
        raise BadInput("conform: --observed goes with --vectors")
    if target is not None and (list_ or coverage or explain):
        raise BadInput("conform: --target goes with --junit and --json only")
    if explain is not None:
        return cases.draw(explain)
    chosen = cases.choose(names)
    if list_:
        return cases.list_cases(chosen, json)
    if target is not None and secure_world is not None:
        return cases.check_outside(chosen, target, secure_world, junit, json=json)
    return cases.check(chosen, junit, coverage=coverage, json=json)


def _compare(vectors: Path, policy: str, observed: Path | None, json: bool) -> int:
    """Each step agrees, or differs as a declared rule demands."""
    from mediator.conformance.compare import compare
    from mediator.conformance.load import load_vectors

    chosen = policy_of(policy)
    document = load_vectors(vectors)
    with progress("conform") as advance:
        done = 0

        def count(name: str) -> None:
            nonlocal done
            done += 1
            advance(done, len(document.vectors))

        report = compare(document, chosen, observe=observed is not None, progress=count)
    if observed is not None:
        _write(observed, vectors, report.observed)
    if json:
        emit_json(report.as_data())
    else:
        _show(report, document, policy)
    return verdict(report.good)


def _write(path: Path, source: Path, vectors: list[dict[str, Any]]) -> None:
    """Write a vector document with our own `out`."""
    import gzip
    import json

    from mediator.conformance.load import read_json

    given = read_json(source)
    document = {key: given[key] for key in _KEPT_KEYS if key in given}
    text = json.dumps({**document, "count": len(vectors), "vectors": vectors}, separators=(",", ":"))
    data = text.encode()
    try:
        # No time stamp inside: the same run makes the same file.
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    note(f"{path}: {len(vectors)} vectors written")


def _show(report: "Report", document: "Document", policy: str) -> None:
    from mediator.conformance.intended import declarations

    counts = {
        "agree": report.agree,
        "differ as a rule demands": report.intended.total(),
        "not compared": report.not_compared,
        "differ": report.steps - report.agree - report.intended.total() - report.not_compared,
        "all": report.steps,
    }
    summary = table("steps", "", "share", right=("", "share"))
    for name, count in counts.items():
        summary.add_row(name, str(count), f"{100 * count / max(report.steps, 1):.1f} %")
    parts: list[RenderableType] = [heading(f"{report.vectors} vectors, policy {policy}"), summary]
    if report.intended:
        reasons: dict[str, list[str]] = {}
        for kind in declarations():
            reasons.setdefault(kind.rule, []).append(kind.why)
        rules = table("rule", "steps", "why", right=("steps",))
        for rule, count in sorted(report.intended.items()):
            rules.add_row(rule, str(count), "; ".join(reasons.get(rule, ())))
        parts += [heading("differences that a rule demands"), rules]
    parts += [_difference(document, difference) for difference in report.differ[:_SHOWN]]
    if len(report.differ) > _SHOWN:
        parts.append(f"... and {len(report.differ) - _SHOWN} more differences (--json has all)")
    parts += [f"{name}: {violation}" for name, violation in report.violations[:_SHOWN]]
    show(*parts)


def _difference(document: "Document", difference: dict[str, Any]) -> str:
    """One difference: where, what was done there, and the two values."""
    index = difference["step"]
    vector = next(vector for vector in document.vectors if vector.name == difference["vector"])
    step = vector.steps[index]
    words = step.op
    if step.op == "smc":
        from optee.abi.registers import name_of
        from optee.abi.smc import Function

        words = f"{step.op} {name_of(Function, step.regs[0] & 0xFFFFFFFF)}"
    return (
        f"{vector.name}, step {index} ({words}), {difference['field']}:\n"
        f"  recorded: {difference['expected']}\n  here:     {difference['got']}"
    )
