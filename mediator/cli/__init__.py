"""The command line. Commands import what they need when they run: `--help` and `--version` stay quick."""

import sys

from typer.main import get_command

from mediator.cli.app import app
from mediator.cli.output import INTERRUPTED, Boundary, note

__all__ = ["main"]


def main() -> None:
    """Run `mediator` with the arguments of this process, and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show an arrow shows a question mark.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with Boundary() as boundary:
        boundary.code = get_command(app)(args=arguments, prog_name="mediator", standalone_mode=False) or 0
        if boundary.code == INTERRUPTED:
            note("interrupted")
    return boundary.code
