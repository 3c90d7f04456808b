"""`mediator run`: what guests do is written in a file; what comes of it is printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mediator.cli.options import Json
from mediator.cli.output import GOOD, BadInput, emit_json, progress, show, table, verdict

if TYPE_CHECKING:
    from mediator.scenario.language import Scenario
    from mediator.scenario.run import Outcome

FORMAT: Final = "mediator-run/1"
LIST_FORMAT: Final = "mediator-scenarios/1"


def run(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME|FILE]...",
            help="Scenarios of the library, the first word of several, or YAML files; none: the library.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Decides all that is random.")] = 1,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="So many seeds, from --seed on, until one fails.")
    ] = 1,
    guests: Annotated[
        int | None,
        typer.Option("--guests", metavar="N", min=1, max=1000, help="How many, in scenarios for any number of guests."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Write a trace of the run, one for each guest (.gz: packed)."),
    ] = None,
    board: Annotated[
        str | None, typer.Option("--board", metavar="NAME", help="OP-TEE's board, such as qemu_armv8a, in all of them.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of the library, those marked quick.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the library and do nothing.")] = False,
    json: Json = False,
) -> int:
    """Run scenarios in virtual time: the same seed makes the same run, another seed another interleaving."""
    from mediator.scenario.catalogue import find_scenarios, library

    chosen = [scenario for name in names or library() for scenario in find_scenarios(name)]
    if quick:
        chosen = [scenario for scenario in chosen if scenario.quick]
    if list_:
        _list(chosen, json)
        return GOOD
    if guests is not None and not any(scenario.parametrised for scenario in chosen):
        raise BadInput("run: --guests is for scenarios that are written for any number of guests")
    if record is not None and len(chosen) != 1:
        raise BadInput("run: --record is for one scenario")
    if board is not None:
        chosen = [_on_board(scenario, board) for scenario in chosen]
    outcomes = _run(chosen, range(seed, seed + seeds), guests, record)
    failed = [outcome for outcome in outcomes if not outcome.good]
    if json:
        emit_json(
            {
                "format": FORMAT,
                "good": not failed,
                "failed": len(failed),
                "scenarios": [outcome.as_data() | {"seeds": outcome.seed - seed + 1} for outcome in outcomes],
            }
        )
    else:
        _show(outcomes, seed)
    return verdict(not failed)


def _on_board(scenario: "Scenario", board: str) -> "Scenario":
    from optee.memory.boards import BOARDS

    if board not in BOARDS:
        raise BadInput(f"run: the board {board!r} is none of {', '.join(BOARDS)}")
    optee = scenario.machine.optee.model_copy(update={"board": board})
    return scenario.model_copy(update={"machine": scenario.machine.model_copy(update={"optee": optee})})


def _run(scenarios: "list[Scenario]", seeds: range, guests: int | None, record: Path | None) -> "list[Outcome]":
    """The last outcome of each scenario: the first seed that fails ends its sweep."""
    from mediator.scenario.run import run_scenario

    outcomes = []
    with progress("run") as advance:
        for number, scenario in enumerate(scenarios):
            count = guests if scenario.parametrised else None
            for done, seed in enumerate(seeds):
                advance(number * len(seeds) + done, len(scenarios) * len(seeds))
                outcome = run_scenario(scenario, seed, count, record)
                if not outcome.good:
                    break
            outcomes.append(outcome)
    return outcomes


def _list(scenarios: "list[Scenario]", json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "scenario": scenario.scenario,
            "purpose": scenario.purpose,
            "quick": scenario.quick,
            "any_number_of_guests": scenario.parametrised,
            "guests": list(scenario.machine.specs(None)),
            "rules": scenario.rules,
            "classes": scenario.classes,
        }
        for scenario in scenarios
    ]
    if json:
        emit_json({"format": LIST_FORMAT, "scenarios": rows})
        return
    columns = ("scenario", "purpose", "rules", "classes", "quick")
    words = [
        (row["scenario"], row["purpose"], " ".join(row["rules"]), " ".join(row["classes"]), "quick" * row["quick"])
        for row in rows
    ]
    show(table(*columns, rows=words))


def _show(outcomes: "list[Outcome]", first: int) -> None:
    counts = ("guests", "seeds", "steps", "SMCs", "virtual s")
    summary = table("scenario", *counts, "", right=counts)
    for outcome in outcomes:
        numbers = (outcome.guests, outcome.seed - first + 1, outcome.steps, outcome.smcs, f"{outcome.seconds:.3f}")
        word = "good" if outcome.good else f"failed with seed {outcome.seed}"
        summary.add_row(outcome.scenario.scenario, *map(str, numbers), word)
    show(summary, *_bursts(outcomes), *(_report(outcome) for outcome in outcomes if not outcome.good))


def _bursts(outcomes: "list[Outcome]") -> list[Any]:
    """One table of all bursts of calls, if there were any, and what takes how long in it."""
    if not any(outcome.bursts for outcome in outcomes):
        return []
    from mediator.costs import costs_in_words

    numbers = ("answered", "thread limits", "p50 (us)", "p99 (us)", "calls/s", "peak queue", "TA heap (KiB)")
    rows = table("scenario", "guest", "TA", "calls", "held back", *numbers, right=numbers)
    for outcome in outcomes:
        for row in outcome.bursts:
            calls = f"{row['calls']}" + (f" in {row['within']:g} s" if row["within"] else " at once")
            found = [row[name] for name in ("answered", "thread_limits", "p50_us", "p99_us", "per_second", "queue")]
            words = (outcome.scenario.scenario, row["guest"], row["ta"], calls, row["form"])
            rows.add_row(*words, *map(str, found), str(row["ta_heap"] // 1024))
    return [rows, costs_in_words()]


def _report(outcome: "Outcome") -> str:
    """Why a run failed: where, what was expected, what came, and what went before."""
    lines = []
    failure = outcome.failure
    if failure is not None:
        step = f"{failure.step}{f' ({failure.guest})' if failure.guest else ''}: " if failure.step else ""
        lines += [
            f"{failure.place or outcome.scenario.scenario}: {step}{failure.what}",
            f"  expected: {failure.expected}",
            f"  got:      {failure.got}",
        ]
        if outcome.events:
            lines += [f"  the last of {failure.guest}:", *(f"    {event}" for event in outcome.events)]
    lines += [f"{outcome.scenario.scenario}: {violation}" for violation in outcome.violations]
    if outcome.left:
        held = ", ".join(f"{what} {count}" for what, count in outcome.left.items())
        lines.append(f"{outcome.scenario.scenario}: left behind: {held}")
    lines.append(f"  again: {_command(outcome)}")
    return "\n".join(lines)


def _command(outcome: "Outcome") -> str:
    """What shows the same run once more."""
    scenario = outcome.scenario
    name = scenario.scenario if scenario.place == f"library/{scenario.scenario}.yaml" else scenario.place
    guests = f" --guests {outcome.guests}" if scenario.parametrised else ""
    return f"mediator run {name} --seed {outcome.seed}{guests}"
