"""What a workload counts while it runs."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from guests.client import Context, Session
from guests.errors import GuestError
from guests.operation import TeeError
from optee.abi.registers import name_of
from optee.abi.results import Origin, Result

MAX_NOTES: Final = 32
"""Distinct unexpected results that are described; further ones are only counted."""


OUT_OF_MEMORY: Final = "out of memory"
"""Name of refusals that no workload provokes but any may meet: a quota or OP-TEE's memory is used up."""


@dataclass(frozen=True, slots=True)
class LoadStep:
    """One step of a ramp: seconds it took, and the latency that 99 of 100 operations stayed below."""

    callers: int
    operations: int
    seconds: float
    p99: float
    refusals: int

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Knee:
    """The last load that was carried well, and the bound that more would cross: p99, refusals, or callers."""

    callers: int
    rate: float
    bound: str


@dataclass(slots=True)
class Report:
    """Counters of one guest's workload; they can be read at any time.

    invokes: operations that were answered as expected. errors: answers that were not expected. refusals: how often
    something that must be refused was tried and refused, by name. tried: everything that was tried, by name.
    absent: TAs that this OP-TEE does not have, so what needs them was left out. notes: descriptions of the first
    unexpected answers. toured: what the workload shows at the least is done. steps, knee: of a ramp.
    """

    invokes: int = 0
    errors: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    absent: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    toured: bool = False
    steps: list[LoadStep] = field(default_factory=list)
    knee: Knee | None = None

    def unexpected(self, what: str) -> None:
        """Count an answer that was not expected, and describe it if few others were."""
        self.errors += 1
        if len(self.notes) < MAX_NOTES and what not in self.notes:
            self.notes.append(what)

    def refused(self, name: str, *, good: bool, answer: str) -> None:
        """Note that something forbidden was tried: counted as a refusal if it was refused as it should be."""
        self.tried[name] += 1
        if good:
            self.refusals[name] += 1
        else:
            self.unexpected(f"{name}: not refused as expected: {answer}")

    @contextmanager
    def operation(self, name: str, *, result: int = Result.SUCCESS, origin: int | None = None) -> Iterator[None]:
        """Count the block as one operation which ends with `result`, and from `origin` if that is given."""
        self.tried[name] += 1
        try:
            yield
        except TeeError as error:
            if error.result == result and origin in (None, error.origin):
                self.invokes += 1
            elif error.result == Result.OUT_OF_MEMORY:
                self.refusals[OUT_OF_MEMORY] += 1
            else:
                self.unexpected(f"{name}: {error}")
        except GuestError as error:
            self.unexpected(f"{name}: {type(error).__name__}: {error}")
        else:
            if result == Result.SUCCESS:
                self.invokes += 1
            else:
                self.unexpected(f"{name}: no {name_of(Result, result)}, from {_origin(origin)}")

    async def open_if_present(self, context: Context, ta: UUID, name: str) -> Session | None:
        """Open a session, or note that the TA is absent; any other answer is an error."""
        self.tried[f"{name} open"] += 1
        try:
            session = await context.open_session(ta)
        except TeeError as error:
            if error.result == Result.ITEM_NOT_FOUND:
                self.absent.add(name)
            elif error.result == Result.OUT_OF_MEMORY:
                self.refusals[OUT_OF_MEMORY] += 1
            else:
                self.unexpected(f"{name} open: {error}")
            return None
        self.invokes += 1
        return session

    def expect(self, name: str, condition: bool) -> None:
        """Count an error if a checked answer was wrong."""
        if not condition:
            self.unexpected(f"{name}: wrong answer")


def _origin(origin: int | None) -> str:
    return "anywhere" if origin is None else name_of(Origin, origin)
