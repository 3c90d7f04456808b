"""Options that several commands have, declared once."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
PolicyName: TypeAlias = Annotated[
    str, typer.Option("--policy", metavar="NAME|FILE", help="A built-in policy (see `show policy`) or a YAML file.")
]
Trace: TypeAlias = Annotated[Path, typer.Argument(metavar="TRACE", help="A trace file, gzip'd or not.")]
Traces: TypeAlias = Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Trace files, gzip'd or not.")]
Target: TypeAlias = Annotated[
    Path | None,
    typer.Option("--target", metavar="SOCKET", help="The mediator under test serves guests at this socket."),
]
SecureWorldOfTarget: TypeAlias = Annotated[
    Path | None,
    typer.Option("--secure-world", metavar="SOCKET", help="With --target: where it finds its secure world, ours."),
]
