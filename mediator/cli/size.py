"""`mediator size`: what a configuration of OP-TEE can hold, and what to change when it does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from mediator.cli.options import Json
from mediator.cli.output import GOOD, BadInput, emit, emit_json, heading, show, table, verdict

if TYPE_CHECKING:
    from mediator.sizing.request import Request
    from optee.memory.sizing import Sizing

T = TypeVar("T")
_MOST_STEPS: Final = 256  # of a sweep


def _size_option(help_: str) -> Any:
    return typer.Option(metavar="SIZE", help=help_)


def size(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A YAML file that says what is asked.")] = None,
    board: Annotated[str | None, typer.Option(metavar="NAME", help="A preset: qemu_armv8a, hikey960, ...")] = None,
    conf: Annotated[Path | None, typer.Option(metavar="CONF.MK", help="CFG_* of a build of your own.")] = None,
    ta: Annotated[Path | None, typer.Option(metavar="FILE", help="user_ta_header_defines.h, or a TA's ELF.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CFG_NUM_THREADS.")] = None,
    heap: Annotated[str | None, _size_option("CFG_CORE_HEAP_SIZE.")] = None,
    nexus_heap: Annotated[str | None, _size_option("CFG_CORE_NEX_HEAP_SIZE.")] = None,
    prealloc: Annotated[bool | None, typer.Option(help="CFG_CORE_PREALLOC_EL0_TBLS.")] = None,
    lpae: Annotated[bool | None, typer.Option(help="CFG_WITH_LPAE; AArch64 always has it.")] = None,
    ram: Annotated[str | None, _size_option("CFG_TZDRAM_SIZE, secure RAM of the board.")] = None,
    guests: Annotated[int | None, typer.Option(min=1, max=65535, help="Guests that shall fit.")] = None,
    ta_heap: Annotated[str | None, _size_option("TA_DATA_SIZE of the TA.")] = None,
    ta_stack: Annotated[str | None, _size_option("TA_STACK_SIZE of the TA.")] = None,
    ta_code: Annotated[str | None, _size_option("Code and constants of the TA.")] = None,
    parameter: Annotated[list[str] | None, _size_option("A memory reference of a call; up to four.")] = None,
    sessions: Annotated[int | None, typer.Option(min=1, max=65535, help="Sessions of the TA at once.")] = None,
    single_instance: Annotated[bool, typer.Option("--single-instance", help="All sessions share an instance.")] = False,
    rsa: Annotated[int, typer.Option(min=0, max=65535, help="RSA signing set-ups that each session holds.")] = 0,
    buffer: Annotated[str | None, _size_option("Size of each shared buffer.")] = None,
    buffers: Annotated[int | None, typer.Option(min=0, max=1 << 20, help="Such buffers of each guest.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic line by line.")] = False,
    solve: Annotated[bool, typer.Option("--solve", help="Only the changes that make it fit.")] = False,
    quota: Annotated[bool, typer.Option("--quota", help="Print a policy whose limits the heap can bear.")] = False,
    static_split: Annotated[
        str | None, _size_option("Beside it: a reserved carve-out of this size, split among guests.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME=V,V,...", help="Several values of threads, heap, prealloc, ram, guests.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="F.SVG", help="Draw the sweep (needs matplotlib).")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="issue-6596", help="The published measurements beside this arithmetic.")
    ] = None,
    log: Annotated[Path | None, typer.Option(metavar="CONSOLE.TXT", help="Say which limit OP-TEE's log shows.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run OP-TEE's model at each limit, and one unit beyond.")
    ] = False,
    json: Json = False,
) -> int:
    """Say what fits a build of OP-TEE: TA memory, sessions, keys, shared memory, guests; and what binds first."""
    from mediator.sizing.request import Options, make_request
    from optee.memory.sizing import size as work_out

    given = {
        name: value
        for name, value in locals().items()
        if value not in (None, False, 0, []) and name not in ("json", "make_request", "work_out", "Options")
    }
    _one_question(given)
    if compare is not None:
        return _compare(compare, json=json)
    if log is not None:
        return _log(log, json=json)
    build = {
        "threads": threads,
        "heap": _bytes("--heap", heap),
        "nexus_heap": _bytes("--nexus-heap", nexus_heap),
        "prealloc": prealloc,
        "lpae": lpae,
        "secure_ram": _bytes("--ram", ram),
    }
    profile: dict[str, Any] = {
        "heap": _bytes("--ta-heap", ta_heap),
        "stack": _bytes("--ta-stack", ta_stack),
        "code": _bytes("--ta-code", ta_code),
        "parameters": _parameters(parameter),
        "sessions": sessions,
        "single_instance": single_instance or None,
    }
    request = make_request(
        Options(
            file,
            board,
            conf,
            ta,
            guests,
            {name: value for name, value in build.items() if value is not None},
            {name: value for name, value in profile.items() if value is not None},
            rsa,
            _bytes("--buffer", buffer),
            buffers,
        )
    )
    if sweep is not None:
        return _sweep(request, sweep, plot, json=json)
    sizing = work_out(request.build, request.load)
    if quota:
        return _quota(request, sizing, json=json)
    if verify:
        return _verify(request, sizing, json=json)
    if static_split is not None:
        return _static_split(request, sizing, _bytes("--static-split", static_split) or 0, json=json)
    return _answer(request, sizing, explain=explain, only_solve=solve, json=json)


_QUESTIONS: Final = ("compare", "log", "sweep", "quota", "verify", "static_split", "solve")
"""Options that ask for something else than the table; one at a time."""


def _one_question(given: dict[str, Any]) -> None:
    """Options that do not go together are said, not ignored. Raises BadInput."""

    def option(name: str) -> str:
        return "FILE" if name == "file" else "--" + name.replace("_", "-")

    asked = [name for name in _QUESTIONS if name in given]
    if len(asked) > 1:
        raise BadInput(f"{option(asked[0])} and {option(asked[1])} ask for different things: one at a time")
    if asked and asked[0] in ("compare", "log"):
        for name in given.keys() - set(asked):
            raise BadInput(f"{option(asked[0])} goes with --json only, not with {option(name)}")
    if "plot" in given and "sweep" not in given:
        raise BadInput("--plot draws a --sweep")
    if "explain" in given and asked and asked != ["solve"]:
        raise BadInput(f"--explain goes with the table, not with {option(asked[0])}")


def _bytes(option: str, text: str | None) -> int | None:
    from mediator.sizing.request import parse_size

    return None if text is None else _checked(option, parse_size, text)


def _checked(option: str, parse: Callable[[str], T], text: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise BadInput(f"{option}: {error}") from None


def _parameters(texts: list[str] | None) -> tuple[int, ...] | None:
    if not texts:
        return None
    if len(texts) > 4:
        raise BadInput("--parameter: a call has four parameters at most")
    return tuple(_bytes("--parameter", text) or 0 for text in texts)


def _answer(request: "Request", sizing: "Sizing", *, explain: bool, only_solve: bool, json: bool) -> int:
    from mediator.sizing import report
    from optee.memory.changes import solve as find
    from optee.memory.explain import explain as arithmetic

    changes = find(request.build, request.load)
    lines = arithmetic(sizing) if explain else []
    if json:
        data = {"format": report.FORMAT, **report.document(request, sizing)}
        if not sizing.fits:
            data["changes"] = [report.change_document(change) for change in changes]
        if explain:
            data["explanation"] = [line._asdict() for line in lines]
        emit_json(data)
        return verdict(sizing.fits)
    parts: list[Any] = []
    if not only_solve:
        parts.append(table("what", "how much", "decided by", rows=report.rows(sizing)))
    if explain:
        parts += ["the arithmetic", *report.explanation(lines), ""]
    if sizing.fits:
        parts.append(f"It fits. What binds first: {report.binding(sizing)}.")
    else:
        parts += [f"Does not fit. {report.broken(limit)}." for limit in sizing.failing]
        parts.append("")
        parts.append("What would make it fit:" if changes else "No option of the build makes it fit.")
        parts += [f"  {line}" for change in changes for line in report.change_lines(change)]
    show(*parts)
    return verdict(sizing.fits)


def _quota(request: "Request", sizing: "Sizing", *, json: bool) -> int:
    from mediator.sizing import report
    from mediator.sizing.quota import derive, policy_yaml

    derived = derive(sizing)
    if derived is None:
        raise BadInput("--quota: the core heap holds no shared buffer beside these TAs")
    if json:
        limits = {name: getattr(derived, name) for name in ("pages", "buffers", "pages_per_buffer")}
        emit_json({"format": report.FORMAT, **report.document(request, sizing), "quota": limits})
    else:
        emit(policy_yaml(derived).rstrip("\n"))
    return GOOD


def _verify(request: "Request", sizing: "Sizing", *, json: bool) -> int:
    from dataclasses import asdict

    from mediator.sizing import report
    from mediator.sizing.verify import verify

    checks = list(verify(sizing))
    good = all(check.good for check in checks)
    if json:
        found = [{**asdict(check), "good": check.good} for check in checks]
        emit_json({"format": report.FORMAT, **report.document(request, sizing), "verified": found})
        return verdict(good)
    rows = [
        (check.what, f"{check.limit} {check.unit}", check.expected, check.seen, "good" if check.good else "WRONG")
        for check in checks
    ]
    columns = ("limit", "holds", "one unit more, predicted", "OP-TEE's model", "")
    show(table(*columns, right=("holds",), rows=rows))
    return verdict(good)


def _static_split(request: "Request", sizing: "Sizing", carve_out: int, *, json: bool) -> int:
    from dataclasses import asdict

    from mediator.sizing import report
    from mediator.sizing.quota import static_split

    splits = static_split(sizing, carve_out)
    if json:
        data = {"format": report.FORMAT, **report.document(request, sizing)}
        emit_json({**data, "static_split": [asdict(split) for split in splits]})
        return GOOD
    rows = [
        (str(split.guests), *map(report.amount, (split.static_bytes, split.dynamic_buffer, split.dynamic_bytes)))
        for split in splits
    ]
    columns = ("guests", "static: for each", "dynamic: largest buffer", "dynamic: in all, each guest")
    note = "Static memory is taken from every guest, used or not; dynamic sharing takes 16 bytes of core heap a page."
    show(table(*columns, right=columns, rows=rows), note)
    return GOOD


_SWEPT: Final = {"threads": "threads", "heap": "heap", "prealloc": "prealloc", "ram": "secure_ram", "guests": "guests"}


def _sweep(request: "Request", text: str, plot: Path | None, *, json: bool) -> int:
    from mediator.sizing import report
    from optee.memory.sizing import size as work_out

    name, values = _swept(text)
    answers = []
    for value in values:
        build, load = request.build, request.load
        if name == "guests":
            build, load = replace(build, guest_count=value), replace(load, guests=value)
        else:
            build = replace(build, **{_SWEPT[name]: value})
        answers.append((value, replace(request, build=build, load=load), work_out(build, load)))
    if plot is not None:
        from mediator.sizing.plot import draw

        usable: list[float | None] = [max(each.usable, 0) / (1 << 20) for _, _, each in answers]
        series: dict[str, list[float | None]] = {
            "largest TA heap, MiB": usable,
            "RSA signing set-ups": [float(each.rsa_operations) for _, _, each in answers],
            "largest shared buffer, MiB": [each.largest_buffer / 256 for _, _, each in answers],
        }
        draw(plot, name, values, series)
    if json:
        documents = [{name: value, **report.document(made, sizing)} for value, made, sizing in answers]
        emit_json({"format": report.FORMAT, "sweep": name, "rows": documents})
        return GOOD
    rows = [
        (
            str(value),
            "yes" if sizing.fits else "no",
            str(report.usable_mib(sizing)),
            str(sizing.rsa_operations),
            f"{sizing.largest_buffer / 256:.1f}",
            "any" if sizing.guests is None else str(sizing.guests),
            sizing.usable_binding if sizing.fits else sizing.failing[0].name,
        )
        for value, _, sizing in answers
    ]
    columns = (name, "fits", "TA heap, MiB", "RSA set-ups", "largest buffer, MiB", "guests", "binds first")
    show(table(*columns, right=columns[2:6], rows=rows))
    return GOOD


def _swept(text: str) -> tuple[str, list[Any]]:
    from mediator.sizing.request import parse_size
    from optee.memory.build_files import BOUNDS

    name, _, listed = text.partition("=")
    words = [word.strip() for word in listed.split(",") if word.strip()]
    if name not in _SWEPT or not words:
        raise BadInput(f"--sweep: {text!r} is not NAME=VALUE,VALUE,... with NAME of {', '.join(_SWEPT)}")
    if len(words) > _MOST_STEPS:
        raise BadInput(f"--sweep: more than {_MOST_STEPS} values")
    if name == "prealloc":
        if not set(words) <= {"y", "n"}:
            raise BadInput("--sweep: prealloc is y or n")
        return name, [word == "y" for word in words]
    values = [_checked("--sweep", parse_size, word) for word in words]
    low, high = (1, 65535) if name == "guests" else BOUNDS[_SWEPT[name]]
    for value in values:
        if not low <= value <= high:
            raise BadInput(f"--sweep: {name} {value} is not from {low} to {high}")
    return name, values


def _compare(what: str, *, json: bool) -> int:
    from mediator.sizing import report
    from optee.memory.measurements import TITLE, rows

    if what != "issue-6596":
        raise BadInput(f"--compare: {what!r} is not issue-6596")
    if json:
        found = [report.row_document(row) for row in rows()]
        emit_json({"format": report.FORMAT, "compare": what, "title": TITLE, "rows": found})
        return GOOD
    reasons: list[str] = []
    lines = []
    for row in rows():
        if row.why not in reasons:
            reasons.append(row.why)
        model = "-" if row.model is None else str(row.model)
        number = f"[{reasons.index(row.why) + 1}]"
        setting = ("y" if row.prealloc else "n", row.program)
        lines.append((str(row.threads), *setting, row.measured, model, row.kind, number))
    columns = ("threads", "prealloc", "program", "measured", "model", "kind", "why")
    right = ("threads", "measured", "model")
    made = table(*columns, right=right, rows=lines)
    show(heading(TITLE), made, *(f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)))
    return GOOD


def _log(path: Path, *, json: bool) -> int:
    from dataclasses import asdict

    from mediator.documents import read_bytes
    from mediator.sizing import report
    from optee.memory.console import read_console

    findings = read_console(read_bytes(path).decode(errors="replace"))
    if json:
        emit_json({"format": report.FORMAT, "log": str(path), "findings": [asdict(finding) for finding in findings]})
    elif not findings:
        emit(f"{path}: no message about memory that is known here")
    else:
        emit("\n".join(f"{path}:{finding.line}: {finding.limit}: {finding.text}" for finding in findings))
    return GOOD
