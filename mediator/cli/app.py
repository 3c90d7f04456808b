"""The `mediator` command: its options, and the table of its commands."""

from typing import Annotated

import typer

from mediator import __version__
from mediator.cli import bench, conform, ctl, decode, fuzz, replay, run, secure_world, serve, show, size, store, trace
from mediator.cli.output import GOOD, emit

SETTINGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    help="A user-space TEE mediator for OP-TEE, with simulated hypervisors, guests and secure world.",
    epilog="Exit codes: 0 good, 1 the thing checked failed, 2 usage or bad file, 3 a bug of mediator itself.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=SETTINGS,
)


def _version(wanted: bool) -> None:
    if wanted:
        emit(f"mediator {__version__}")
        raise typer.Exit(GOOD)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(serve.serve)
app.command()(run.run)
app.command()(fuzz.fuzz)
app.command()(secure_world.secure_world)
app.command()(replay.replay)
app.command()(conform.conform)
app.command()(decode.decode)
app.command()(size.size)
app.command()(bench.bench)
app.add_typer(ctl.app, name="ctl")
app.add_typer(trace.app, name="trace")
app.add_typer(show.app, name="show")
app.add_typer(store.app, name="store")
