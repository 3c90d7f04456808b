"""Write your own TA: a class with a UUID, flags, and a method for each command.

    class Adder(TrustedApplication):
        uuid = UUID("0a0b0c0d-0001-4002-8003-0a0b0c0d0e0f")

        @command(0, ParamKind.VALUE_INPUT, ParamKind.VALUE_INPUT, ParamKind.VALUE_OUTPUT)
        def add(self, tee: Tee, first: Value, second: Value, total: Value) -> None:
            total.a = (first.a + second.a) & 0xFFFFFFFF

        @command(1, ParamKind.VALUE_INPUT)
        def add_later(self, tee: Tee, delay: Value) -> Steps[None]:
            yield from tee.wait(delay.a)

A method that needs nothing of the normal world is a plain function. One that waits, calls another TA, asks
the time or works for long is a generator: `yield from` a service of `tee`, or `yield WORK` between portions
of work, where interrupts may come in. It succeeds by returning, fails by raising `TeeError(Result.…)` and
dies by `tee.panic(code)`. Give the class to `Config(extra_tas=(Adder,))`.

Source: GP TEE Internal Core API, TA interface; OP-TEE core behaviour, section 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, TypeVar
from uuid import UUID

from optee.abi.results import Result, TaFlag
from optee.errors import TeeError
from optee.parameters import NO_PARAMS, Memref, Param, ParamKind, Params, Value
from optee.steps import WORK, Steps

if TYPE_CHECKING:
    from optee.tee import Tee

__all__ = [
    "NO_PARAMS",
    "WORK",
    "Memref",
    "Outcome",
    "Param",
    "ParamKind",
    "Params",
    "PseudoTa",
    "Steps",
    "TaFlag",
    "TeeError",
    "TrustedApplication",
    "Value",
    "command",
    "expect",
]

Outcome: TypeAlias = int | Steps[int | None] | None
"""What an entry point returns: nothing or a TEE_Result, at once or after suspending."""

_Handler = TypeVar("_Handler", bound=Callable[..., Any])

ENTRY_STACK: Final = 512
"""Bytes of stack that the way into any command takes."""


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """A command of a TA: what runs, and which parameters it takes."""

    function: Callable[..., Any]
    kinds: tuple[int, ...]
    count: int
    stack: int


def command(number: int, *kinds: ParamKind, stack: int = 0) -> Callable[[_Handler], _Handler]:
    """Make a method the handler of a command with exactly these parameters, passed behind `tee`.

    Other parameter types answer BAD_PARAMETERS. `stack` is the bytes of stack that the method needs beside
    what it claims itself with `tee.stack`.
    """

    def mark(handler: _Handler) -> _Handler:
        padded = (*map(int, kinds), *([0] * (4 - len(kinds))))
        entry = CommandEntry(handler, padded, len(kinds), ENTRY_STACK + stack)
        handler.__dict__.setdefault("commands", {})[number] = entry
        return handler

    return mark


def expect(params: Params, *kinds: ParamKind) -> None:
    """Raise TeeError(BAD_PARAMETERS) unless the parameters have these kinds, and there are no more."""
    if [0 if param is None else param.kind for param in params] != [
        *kinds,
        *[0] * (len(params) - len(kinds)),
    ]:
        raise TeeError(Result.BAD_PARAMETERS)


class TrustedApplication:
    """A user TA. One object is one instance; `open_session` and the rest are the TA_*EntryPoint functions."""

    uuid: ClassVar[UUID]
    flags: ClassVar[TaFlag] = TaFlag(0)
    version: ClassVar[int] = 0
    """Of the image; an older one than the newest ever loaded is refused."""
    stack_size: ClassVar[int] = 2048
    """TA_STACK_SIZE in bytes."""
    data_size: ClassVar[int] = 32 * 1024
    """TA_DATA_SIZE: bytes of heap."""
    code_size: ClassVar[int] = 0x13000
    """Bytes of code and constants."""
    image_size: ClassVar[int] = 0x1BDD0
    """Bytes of the signed image."""
    unknown_command: ClassVar[Result] = Result.BAD_PARAMETERS
    """What a command without a method answers."""
    commands: ClassVar[dict[int, CommandEntry]] = {}
    is_pseudo: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.commands = dict(cls.commands)
        for member in vars(cls).copy().values():
            cls.commands.update(getattr(member, "__dict__", {}).get("commands", {}))

    def create(self, tee: Tee) -> Outcome:
        """TA_CreateEntryPoint: once in the life of an instance, inside its first open."""

    def destroy(self, tee: Tee) -> Outcome:
        """TA_DestroyEntryPoint: when the last session closes, unless the instance is kept alive."""

    def open_session(self, tee: Tee, params: Params) -> Outcome:
        """TA_OpenSessionEntryPoint."""

    def close_session(self, tee: Tee) -> Outcome:
        """TA_CloseSessionEntryPoint."""

    def invoke(self, tee: Tee, number: int, params: Params) -> Outcome:
        """TA_InvokeCommandEntryPoint: as a rule leave it alone and mark methods with `command`."""
        entry = self.commands.get(number)
        if entry is None:
            raise TeeError(self.unknown_command)
        for param, kind in zip(params, entry.kinds, strict=True):
            if (0 if param is None else param.kind) != kind:
                raise TeeError(Result.BAD_PARAMETERS)
        tee.enter_stack(entry.stack)
        outcome: Outcome = entry.function(self, tee, *params[: entry.count])
        return outcome


class PseudoTa(TrustedApplication):
    """A TA inside OP-TEE's core: never loaded, and a panic in it is a panic of the core."""

    flags = TaFlag.SINGLE_INSTANCE | TaFlag.MULTI_SESSION | TaFlag.INSTANCE_KEEP_ALIVE
    is_pseudo = True
