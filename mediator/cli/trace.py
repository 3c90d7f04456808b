"""`mediator trace`: look into a recording."""

from typing import Annotated

import typer

from mediator.cli.options import PolicyName, Trace
from mediator.cli.output import GOOD, BadInput, emit, note, policy_of, progress, show, table

app = typer.Typer(help="Look into recorded traffic.", rich_markup_mode="rich")


@app.callback()
def _trace() -> None:
    pass


@app.command("show")
def show_trace(
    trace: Trace,
    call: Annotated[
        int | None, typer.Option("--call", metavar="N", help="The call to draw, by its id; none: list the calls.")
    ] = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Draw it as a Mermaid sequence diagram.")] = False,
    policy: PolicyName = "default",
) -> int:
    """List the calls of a recording, or draw one call's way from the guest to OP-TEE and back."""
    from mediator.trace.show import Recording

    if mermaid and call is None:
        raise BadInput("trace show: --mermaid goes with --call")
    recording = Recording(trace)
    if call is None:
        columns = ("call", "line", "vCPU", "function", "what", "rounds", "end")
        show(table(*columns, right=("call", "line", "vCPU", "rounds"), rows=recording.rows()))
        return GOOD
    root = recording.root_of(call)
    with progress(f"replay up to call {root}") as advance:
        journey = recording.follow(root, policy_of(policy), advance)
    if root != call:
        note(f"call {call} is a part of call {root}, which is shown")
    if journey.unexpected:
        note(f"the replay met {journey.unexpected} differences from the recording up to here (see mediator replay)")
    emit(journey.mermaid() if mermaid else journey.text())
    return GOOD
