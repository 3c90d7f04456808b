"""`mediator secure-world`: OP-TEE's model alone, for a mediator in another process."""

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from mediator.cli.output import GOOD, BadInput

DEFAULT_ROOM: Final = 64
"""Guests that OP-TEE's board is sized for: as many as the mediator's own bench is tried with."""


def secure_world(
    socket: Annotated[Path, typer.Option("--socket", metavar="PATH", help="Socket for mediators, mode 0600.")],
    guests: Annotated[
        int, typer.Option(min=1, max=65535, metavar="N", help="Guests that its board has room for.")
    ] = DEFAULT_ROOM,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random in the model.")] = 0,
) -> int:
    """Serve OP-TEE's model to mediators, an OP-TEE for each, until Ctrl-C."""
    if sys.platform != "linux":
        raise BadInput("secure-world: needs Linux (sealed memfds, SOCK_SEQPACKET, SCM_RIGHTS)")
    import trio

    from mediator.service.secure_door import serve_secure_world
    from optee.config import Config

    trio.run(serve_secure_world, socket, Config(guests=guests, early_tas=frozenset(), seed=seed))
    return GOOD
