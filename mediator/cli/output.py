"""What commands print and how they end: one place for standard output, standard error and exit codes.

Standard output carries what was asked for (with `--json` exactly one document); everything else goes to standard
error. Colour and progress are for terminals; NO_COLOR is respected (by rich).
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from mediator.core.policy import Policy

GOOD: Final = 0
FAILED: Final = 1
"""What was checked is not as it should be."""
USAGE: Final = 2
"""The command line, or a file it names, is wrong."""
BUG: Final = 3
"""A fault of this program."""
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""
CLOSED_PIPE: Final = 141
"""128 + SIGPIPE: nobody reads what is printed any more."""

TRACEBACK_VARIABLE: Final = "MEDIATOR_TRACEBACK"
PIPE_WIDTH: Final = 160
"""Columns of a table that does not go to a terminal: no line of ours is folded there."""

_CLICK_ERROR: Final = typer.BadParameter.__mro__[2]
"""Base of every complaint about a command line, which typer has no public name for."""


class BadInput(Exception):
    """The user's input is wrong; one clear line says what."""


class _OutputClosed(Exception):
    """Standard output is a pipe that nobody reads."""


def verdict(good: bool) -> int:
    """Exit code of a check."""
    return GOOD if good else FAILED


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def emit(text: str) -> None:
    """Print text on standard output."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is buffered goes nowhere, so that the interpreter's last flush does not fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise _OutputClosed from None
        raise BadInput(f"standard output: {error.strerror}") from None


def on_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks at a stream; a closed one is None."""
    return stream is not None and stream.isatty()


def emit_json(document: dict[str, Any]) -> None:
    """Print the one JSON document of `--json`."""
    emit(json.dumps(document, indent=2, allow_nan=False))


def show(*parts: "RenderableType") -> None:
    """Print tables and text on standard output, as wide as the terminal."""
    from rich.console import Console

    console = Console(width=None if on_terminal(sys.stdout) else PIPE_WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    emit("\n".join(line.rstrip() for line in captured.get().split("\n")).strip("\n"))


def heading(text: str) -> "Text":
    """Make the line that stands above a table."""
    from rich.text import Text

    return Text(text, style="bold")


def table(*columns: str, right: Sequence[str] = (), rows: Iterable[Sequence[str]] = ()) -> "Table":
    """Make a table; columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


Advance = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Show a bar on standard error while work goes on; nothing unless that is a terminal."""
    if not on_terminal(sys.stderr):
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def policy_of(name: str) -> "Policy":
    """The policy that `--policy` names."""
    from mediator.policies import load_policy

    return load_policy(name)


class Boundary:
    """The outermost frame of a command: whatever leaves it becomes an exit code and a line."""

    def __init__(self) -> None:
        self.code = GOOD

    def __enter__(self) -> "Boundary":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, SystemExit | GeneratorExit):
            return False
        self.code = _explain(_innermost(error))
        if self.code == BUG and os.environ.get(TRACEBACK_VARIABLE):
            sys.excepthook(type(error), error, traceback)
        return True


def _innermost(error: BaseException) -> BaseException:
    """What a nursery wrapped: groups of one are opened."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _explain(error: BaseException) -> int:
    from mediator.documents import DocumentError

    if isinstance(error, _OutputClosed):
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        note("interrupted")
        return INTERRUPTED
    if isinstance(error, DocumentError):
        for line in error.lines:
            note(f"error: {line}")
        return USAGE
    if isinstance(error, BadInput):
        note(f"error: {error}")
        return USAGE
    if isinstance(error, _CLICK_ERROR):
        note(f"error: {_complaint(error)}")
        return USAGE
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        note(f"error: {error.strerror}")
        return USAGE
    text = " ".join(str(error).split())
    note(
        f"error: this is a bug of mediator itself: {type(error).__name__}: {text}; please report it with the command "
        f"line to the project's issue tracker ({TRACEBACK_VARIABLE}=1 shows where it happened)"
    )
    return BUG


def _complaint(error: Any) -> str:
    """What typer says about a command line, in one line, and where to look."""
    text = " ".join(error.format_message().replace("Value error, ", "").split())
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "mediator"
    return f"{text.rstrip('.')} (see {command} --help)"
