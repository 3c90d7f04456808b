"""TAs under load: one takes memory for each call, one keeps what it has taken; and two with a mistake in them.

What they show is that the rate of calls is not what breaks a TA: an instance executes one command at a time, on an
empty stack. Source: memory sizing reference, section 6.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from optee.abi.results import TaFlag
from optee.tee import Allocation, Tee
from optee.trusted_application import Memref, ParamKind, Steps, TrustedApplication, Value, command

WORKING_MEMORY: Final = 16 * 1024
"""Bytes of heap that a command works with."""
PORTIONS: Final = 8
"""Portions of work that a command takes."""
_ARRAY: Final = 64  # bytes
_FRAME: Final = 256  # bytes of stack for one level of nesting


class AllocatingTa(TrustedApplication):
    """Takes its working memory for each command and gives it back at the end."""

    uuid = UUID("5b0a7c12-3d4e-4f60-8a91-b2c3d4e5f601")

    @command(0, ParamKind.VALUE_INOUT)
    def process(self, tee: Tee, number: Value) -> Steps[None]:
        """Work on a number: one more is the answer."""
        memory = tee.malloc(WORKING_MEMORY)
        yield from tee.work(PORTIONS)
        number.a = (number.a + 1) & 0xFFFFFFFF
        memory.free()


class ReusingTa(TrustedApplication):
    """Takes its working memory when it is loaded, and uses it for every command."""

    uuid = UUID("5b0a7c12-3d4e-4f60-8a91-b2c3d4e5f602")

    def __init__(self) -> None:
        self.memory: Allocation | None = None

    def create(self, tee: Tee) -> None:
        """See `TrustedApplication`."""
        self.memory = tee.malloc(WORKING_MEMORY)

    @command(0, ParamKind.VALUE_INOUT)
    def process(self, tee: Tee, number: Value) -> Steps[None]:
        """Work on a number: one more is the answer."""
        yield from tee.work(PORTIONS)
        number.a = (number.a + 1) & 0xFFFFFFFF


class StackSmashTa(TrustedApplication):
    """Copies its input into an array on the stack and does not look how long it is.

    One instance for all sessions: when some input is too long, its canary is found overwritten, and all of them die.
    """

    uuid = UUID("5b0a7c12-3d4e-4f60-8a91-b2c3d4e5f603")
    flags = TaFlag.SINGLE_INSTANCE | TaFlag.MULTI_SESSION

    @command(0, ParamKind.MEMREF_INPUT)
    def parse(self, tee: Tee, text: Memref) -> None:
        """Take a text of up to 64 bytes; the bound is not checked."""
        with tee.stack_buffer(_ARRAY) as array:
            array.write(text.read())


class StackExhaustionTa(TrustedApplication):
    """Calls itself for each level of nesting of its input, however deep that is."""

    uuid = UUID("5b0a7c12-3d4e-4f60-8a91-b2c3d4e5f604")
    flags = TaFlag.SINGLE_INSTANCE | TaFlag.MULTI_SESSION
    stack_size = 8192

    @command(0, ParamKind.VALUE_INPUT)
    def parse(self, tee: Tee, depth: Value) -> None:
        """Go `a` levels deep, 256 bytes of stack each."""
        with tee.stack(_FRAME * depth.a):
            return
