"""`mediator bench`: what the core costs, beside what its bytes cost at the least."""

from typing import TYPE_CHECKING, Annotated

import typer

from mediator.cli.options import Json
from mediator.cli.output import GOOD, BadInput, emit_json, heading, note, policy_of, progress, show, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mediator.bench import Bench, Measured
    from mediator.bench.burst import BurstRow
    from mediator.bench.door import Door
    from mediator.bench.measure import Timing
    from mediator.bench.storage import StorageBench

_POLICY = "default"


def bench(
    name: Annotated[
        str, typer.Option("--filter", metavar="NAME", help="Only the measurements whose name contains this.")
    ] = "",
    batches: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Samples of each measurement (400 if not given, of the core's for 4 seconds)."
        ),
    ] = None,
    calls: Annotated[
        int | None, typer.Option(min=100, metavar="N", help="Calls over which memory must stay flat (200000).")
    ] = None,
    json: Json = False,
) -> int:
    """Measure the core alone, and whole calls end to end; targets are for a quiet machine with two cores."""
    from mediator.bench import CALLS, NAMES, run

    if not any(name in known for known in NAMES):
        raise BadInput(f"bench: no measurement's name contains {name!r}; there are {', '.join(NAMES)}")
    with progress("bench") as advance:
        done = run(
            policy_of(_POLICY),
            name,
            lambda what, count, total: advance(count, total),
            batches=batches,
            calls=calls or CALLS,
        )
    if json:
        emit_json(done.as_data())
    else:
        _show(done)
    return GOOD


def _show(done: "Bench") -> None:
    parts: list[RenderableType] = []
    if done.cases:
        columns = ("", "median (us)", "min (us)", "p95 (us)", "target (us)", "")
        times = table(*columns, right=columns[1:5])
        for measured in done.cases:
            times.add_row(measured.case.what, *_values(measured.timing), *_target(measured))
            for name, baseline in measured.baselines.items():
                times.add_row(f"  {name} alone", *_values(baseline), "", f"x {measured.ratio(name):.1f}")
        parts += [heading("the core, from a guest's SMC to its return"), times]
    if done.end_to_end:
        rates = ("", "per second", "target", "", "median (us)", "min (us)", "SMCs")
        whole = table(*rates, right=("per second", "target", "median (us)", "min (us)", "SMCs"))
        for entry in done.end_to_end:
            met = "" if entry.met is None else "met" if entry.met else "not met"
            target = "" if entry.case.target is None else f"{entry.case.target:.0f}"
            times_of = (_us(entry.timing.median), _us(entry.timing.minimum))
            whole.add_row(entry.case.what, f"{entry.rate:.0f}", target, met, *times_of, f"{entry.smcs:g}")
        parts += [heading("end to end, a client in a guest to a TA and back, one process"), whole]
    if done.prices:
        ways = ("", "median (us)", "SMCs", "pages pinned")
        prices = table(*ways, right=ways[1:])
        for price in done.prices:
            prices.add_row(price.how, _us(price.timing.median), f"{price.smcs:g}", f"{price.pages:g}")
        parts += [heading("the price of refusing reserved memory: an invoke with a 64 KiB buffer"), prices]
    if done.storage is not None:
        parts += _storage(done.storage)
    if done.fairness:
        latencies = ("alone p50 (us)", "p99 (us)", "beside the flood p50 (us)", "p99 (us) ", "p99, times as long")
        fair = table("", *latencies, right=latencies)
        for found in done.fairness:
            numbers = (found.alone.p50, found.alone.p99, found.beside.p50, found.beside.p99)
            how = "with flow control" if found.controlled else "without"
            fair.add_row(f"{found.time} time, {how}", *map(_us, numbers), f"{found.ratio:.1f}")
        parts += [heading("a guest's small calls, alone and beside a guest that floods"), fair]
    if done.bursts:
        parts += [heading("bursts of calls to one TA, in virtual time"), _bursts(done.bursts)]
    if done.fairness or done.bursts:
        from mediator.costs import costs_in_words

        parts.append(costs_in_words())
    if done.door is not None:
        parts += _door(done.door)
    if done.memory is not None:
        memory = done.memory
        met = "met" if memory.met else "not met"
        parts.append(
            f"{memory.calls} calls: memory grew by {memory.bytes} bytes, {memory.pages} mediator pages "
            f"(target below {memory.target} bytes, no page: {met})"
        )
    show(*parts)
    note("medians of short batches, Python's garbage collector at work; a machine with other work to do is slower")


def _storage(done: "StorageBench") -> "list[RenderableType]":
    columns = ("", "RPCs, optee", "managed", "saved", "us, optee", "managed", "times")
    costs = table(*columns, right=columns[1:])
    for name in dict.fromkeys(cost.name for cost in done.costs):
        plain, managed = done.of(name, "optee"), done.of(name, "managed")
        rpcs = f"{plain.rpcs:.1f}", f"{managed.rpcs:.1f}", f"{done.saved(name):.0%}"
        costs.add_row(plain.what, *rpcs, _us(plain.us), _us(managed.us), f"{done.faster(name):.1f}")
    from mediator.cli.storage_memory import storage_memory

    parts: list[RenderableType] = [heading("secure storage, from a client to its guest's files and back"), costs]
    parts += [heading("its memory manager after that, bytes"), *storage_memory({"managed": done.statistics})]
    patterns = list(done.sweep[0].rpcs)
    sizes = table("RPCs by size of a level", "size", "KiB of heap", *patterns, right=("size", "KiB of heap", *patterns))
    for point in done.sweep:
        counts = [str(point.rpcs[pattern]) for pattern in patterns]
        sizes.add_row(point.option, str(point.size), str(point.charged // 1024), *counts)
    return [*parts, sizes, heading("what follows from that"), *(str(advice) for advice in done.advice)]


def _bursts(rows: "list[BurstRow]") -> "RenderableType":
    columns = ("answered", "thread limits", "p50 (us)", "p99 (us)", "calls/s", "peak queue", "bound", "TA heap (KiB)")
    made = table("TA", "calls", "held back", *columns, right=columns)
    for row in rows:
        burst = row.burst
        numbers = (burst.answered, burst.thread_limits, f"{1e6 * burst.took(0.5):.0f}", f"{1e6 * burst.took(0.99):.0f}")
        bound = "none" if row.bound is None else row.bound
        more = (f"{burst.rate:.0f}", row.queue, bound, f"{row.heap / 1024:g}")
        made.add_row(row.ta, f"{burst.calls}, {row.load}", str(burst.form), *map(str, (*numbers, *more)))
    return made


def _door(door: "Door") -> "list[RenderableType]":
    columns = ("", "median (us)", "min (us)", "p95 (us)")
    times = table(*columns, right=columns[1:])
    for what, timing in (("a bare echo", door.echo), ("a fast call", door.fast), ("an invoke", door.invoke)):
        times.add_row(what, *_values(timing))
    met = {name: "met" if good else "not met" for name, good in door.as_data()["met"].items()}
    idle = ", ".join(f"{count} bytes under {hypervisor}" for hypervisor, count in door.idle.items())
    return [
        heading("by socket, a guest in a process of its own"),
        times,
        f"fast call to echo: x {door.ratio:.2f} ({met['ratio']}); {door.rate:.0f} invokes per second "
        f"({met['invokes_per_second']})\n"
        f"an idle guest, beside its RAM: {idle} ({met['idle_guest_bytes']})",
    ]


def _values(timing: "Timing") -> tuple[str, ...]:
    return tuple(map(_us, (timing.median, timing.minimum, timing.p95)))


def _target(measured: "Measured") -> tuple[str, str]:
    if measured.met is None:
        return "", ""
    return _us(measured.case.target or 0), "met" if measured.met else "not met"


def _us(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
