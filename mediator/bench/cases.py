"""The measurements: what each is, what it should cost, and what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mediator.bench import baselines
from mediator.bench.measure import Operation
from mediator.bench.stand import (
    LARGE_COOKIE,
    LARGE_PAGES,
    SMALL_BUFFERS,
    SMALL_PAGES,
    Stand,
    buffer_call,
    fast_call,
    register_call,
    unregister_call,
    value_call,
)

STRUCT: Final = "struct"
"""Bare pack and unpack, and a copy of each page, in the amount of the case."""
TAKE: Final = "numpy.take"
"""Table look-ups of the same length."""


@dataclass(frozen=True, slots=True)
class Operations:
    """A case, ready to run: `after` undoes `operation` where it cannot be repeated as it stands."""

    operation: Operation
    after: Operation | None
    baselines: dict[str, Operation]


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement; `target` is the median in microseconds that it should not pass, `size` the calls of a batch."""

    name: str
    what: str
    target: float | None
    size: int
    prepare: Callable[[Stand], Operations]


def _fast(stand: Stand) -> Operations:
    regs = fast_call()
    stand.succeeds(regs)
    return Operations(lambda: stand.call(regs), None, {STRUCT: baselines.registers()})


def _values(stand: Stand) -> Operations:
    regs = value_call(stand)
    stand.succeeds(regs)
    return Operations(lambda: stand.call(regs), None, {STRUCT: baselines.message(SMALL_BUFFERS)})


def _buffers(stand: Stand) -> Operations:
    regs = buffer_call(stand)
    stand.succeeds(regs)
    compared = {
        STRUCT: baselines.lists(SMALL_BUFFERS, SMALL_PAGES),
        TAKE: baselines.take(SMALL_BUFFERS, SMALL_PAGES),
    }
    return Operations(lambda: stand.call(regs), None, compared)


def _large(stand: Stand) -> tuple[Operation, Operation, dict[str, Operation]]:
    register = register_call(stand, LARGE_PAGES, LARGE_COOKIE)
    unregister = unregister_call(stand, LARGE_COOKIE)
    stand.succeeds(register)
    stand.succeeds(unregister)
    compared = {STRUCT: baselines.lists(1, LARGE_PAGES), TAKE: baselines.take(1, LARGE_PAGES)}
    return (lambda: stand.call(register)), (lambda: stand.call(unregister)), compared


def _register(stand: Stand) -> Operations:
    return Operations(*_large(stand))


def _unregister(stand: Stand) -> Operations:
    register, unregister, _ = _large(stand)
    register()
    return Operations(unregister, register, {TAKE: baselines.take(1, LARGE_PAGES)})


CASES: Final = (
    Case("fast-call", "forwarded fast call (GET_ASYNC_NOTIF_VALUE)", 5, 50, _fast),
    Case("values", f"INVOKE_COMMAND with {SMALL_BUFFERS} values", 15, 20, _values),
    Case("buffers", f"INVOKE_COMMAND with {SMALL_BUFFERS} buffers of {SMALL_PAGES} pages", 60, 5, _buffers),
    Case("register", f"REGISTER_SHM of {LARGE_PAGES} pages, none twice", 500, 1, _register),
    Case("unregister", f"UNREGISTER_SHM of {LARGE_PAGES} pages", None, 1, _unregister),
)
