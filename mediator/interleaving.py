"""Choose by a seed in which order tasks run: the same seed gives the same run, another seed another order.

Trio shuffles what is runnable in each round of its loop, from a random source of its own that nothing public sets.
Under Hypothesis, pytest-trio makes that order repeatable; this does the same for any run. It relies on two private
names of trio, and refuses to work where they are not what they were.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from random import Random
from typing import Final, TypeVar

import trio
from trio.testing import MockClock

T = TypeVar("T")

_SWITCH: Final = "_ALLOW_DETERMINISTIC_SCHEDULING"
_SOURCE: Final = "_r"


class UnknownScheduler(RuntimeError):
    """Trio is of a version that orders tasks in a way not known here."""


def _scheduler() -> dict[str, object]:
    """Return the names of trio's scheduler module. Raises UnknownScheduler."""
    names = vars(import_module("trio._core._run"))
    if not isinstance(names.get(_SWITCH), bool) or not isinstance(names.get(_SOURCE), Random):
        raise UnknownScheduler(f"trio {trio.__version__} has no {_SWITCH} and {_SOURCE}: its order cannot be seeded")
    return names


@contextmanager
def interleaving(seed: int) -> Iterator[None]:
    """Order the tasks of the `trio.run` inside the block by `seed`; afterwards trio is as it was.

    What else is random in the run is not covered, nor are threads and what comes from outside the process; with
    trio's `MockClock` no time is. Raises UnknownScheduler.
    """
    names = _scheduler()
    before = names[_SWITCH], names[_SOURCE]
    names[_SWITCH], names[_SOURCE] = True, Random(seed)
    try:
        yield
    finally:
        names[_SWITCH], names[_SOURCE] = before


def run(main: Callable[[], Awaitable[T]], seed: int) -> T:
    """Run `main` in virtual time, its tasks ordered by `seed`: a sleep takes no time, and nothing depends on speed.

    Raises UnknownScheduler, and what `main` raises.
    """
    with interleaving(seed):
        return trio.run(main, clock=MockClock(autojump_threshold=0))
