"""How code of the secure world suspends: generators that yield what the normal world has to do.

A step is either the first three registers of an RPC return (a0, a1, a2; a3 is the thread's index) or
`WORK`, a moment in long work at which a foreign interrupt may come in. The generator is sent the registers
of RETURN_FROM_RPC, or an empty tuple after `WORK`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final, TypeAlias, TypeVar

from optee.abi.smc import Registers

T = TypeVar("T")

RpcRegisters: TypeAlias = tuple[int, int, int]
Step: TypeAlias = RpcRegisters | None
Steps: TypeAlias = Generator[Step, Registers, T]
"""Code that may suspend and in the end returns a T. Run it with `yield from`."""

WORK: Final[Step] = None
"""Yielded by a TA between two portions of long work."""
