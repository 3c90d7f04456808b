"""Steps that hold other steps: sequence, parallel, repeat, for_each, wait_until."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Self

import trio
from pydantic import Field, model_validator

from mediator.scenario.expectations import StateExpectation
from mediator.scenario.expressions import EvaluationError, Expression, Number, Seconds, Value, where_constant
from mediator.scenario.guest import GuestDied
from mediator.scenario.steps import Content, Name, Octets, Step, StepFailed, octets

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor
    from mediator.scenario.language import AnyStep

MAX_TURNS: Final = 1_000_000
"""Turns of all loops of a run together: stops a file from running for ever."""
_POLL: Final = 0.001


def _turns(count: int) -> int:
    """A number of turns. Raises EvaluationError for what is none."""
    if not 0 <= count <= MAX_TURNS:
        raise EvaluationError(f"{count} turns, where 0 to {MAX_TURNS} are possible")
    return count


class Flow(Step):
    """A step that holds others; `guest` is theirs unless they say otherwise. `guest: every` does it for each guest
    at the same time.
    """

    needs_guest: ClassVar[bool] = False

    def turns(self) -> int:
        """How often the steps inside are done; 1 where that is known only when it runs."""
        return 1


class InOrder(Flow):
    """One step after the other."""

    verb = "sequence"
    sequence: list[AnyStep]

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        await actor.run_steps(self.sequence)


class Parallel(Flow):
    """All steps at the same time; it ends when the last one has ended.

    The death of a guest ends its branch. Names that a branch defines are known after the end of all.
    """

    verb = "parallel"
    parallel: list[AnyStep]

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        await side_by_side([(actor.branch(), [step]) for step in self.parallel], actor)


async def side_by_side(branches: Sequence[tuple[Actor, Sequence[Step]]], joined: Actor) -> None:
    """Run branches at the same time. Raises what the first one raises that fails."""
    async with trio.open_nursery() as nursery:
        for branch, steps in branches:
            nursery.start_soon(_branch, branch, steps)
    joined.join([branch for branch, _ in branches])


async def _branch(actor: Actor, steps: Sequence[Step]) -> None:
    try:
        await actor.run_steps(steps)
    except GuestDied:
        return


def _numbers(first: int, last: int) -> range:
    """All numbers first ... last. Raises EvaluationError for too many."""
    _turns(max(last - first + 1, 0))
    return range(first, last + 1)


class Repeat(Flow):
    """Do steps so many times, one turn after the other."""

    verb = "repeat"
    repeat: Annotated[Number, where_constant(_turns)]
    do: list[AnyStep]

    def turns(self) -> int:
        """See `Flow`."""
        return 1 if self.repeat.constant is None else self.repeat.constant

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        for _ in range(actor.run.take_turns(_turns(actor.number(self.repeat)))):
            await actor.run_steps(self.do)


class ForEach(Flow):
    """Do steps for each of some values: a list, or all numbers `from` ... `to`, both included.

    at_once: all turns at the same time.
    """

    verb = "for_each"
    for_each: Name
    values: Annotated[list[Octets] | None, Field(alias="in")] = None
    first: Annotated[Number | None, Field(alias="from")] = None
    last: Annotated[Number | None, Field(alias="to")] = None
    at_once: bool = False
    do: list[AnyStep]

    @model_validator(mode="after")
    def _of_something(self) -> Self:
        if (self.values is None) is (self.last is None) or (self.values is not None and self.first is not None):
            raise ValueError("for_each: either in, or to (and from), is wanted")
        first = 1 if self.first is None else self.first.constant
        if self.last is not None and self.last.constant is not None and first is not None:
            if min(first, self.last.constant) < 0:
                raise ValueError("for_each: from and to are 0 or more")
            _numbers(first, self.last.constant)
        return self

    def turns(self) -> int:
        """See `Flow`."""
        if self.values is not None:
            return len(self.values)
        first = 1 if self.first is None else self.first.constant
        last = None if self.last is None else self.last.constant
        return 1 if first is None or last is None else max(last - first + 1, 0)

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        if self.values is not None:
            values = [
                actor.value(value) if isinstance(value, Expression) else octets(value, actor) for value in self.values
            ]
        else:
            assert self.last is not None
            values = list(_numbers(1 if self.first is None else actor.number(self.first), actor.number(self.last)))
        actor.run.take_turns(len(values))
        if not self.at_once:
            for value in values:
                actor.define(self.for_each, value)
                await actor.run_steps(self.do)
            return
        branches = [(actor.branch(), self.do) for _ in values]
        for (branch, _), value in zip(branches, values, strict=True):
            branch.define(self.for_each, value)
        await side_by_side(branches, actor)

    def definitions(self) -> Sequence[str]:
        """See `Step`."""
        return [self.for_each]


def _value(source: Content | Expression, actor: Actor) -> Value:
    return actor.value(source) if isinstance(source, Expression) else octets(source, actor)


class WaitUntil(Step):
    """Wait in virtual time until what is expected is so; looks at it every millisecond."""

    verb = "wait_until"
    wait_until: StateExpectation
    within: Seconds = 10.0

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        deadline = trio.current_time() + self.within
        while True:
            try:
                self.wait_until.check(actor)
            except StepFailed:
                if trio.current_time() >= deadline:
                    raise
                await trio.sleep(_POLL)
            else:
                return


STEPS: Final = (InOrder, Parallel, Repeat, ForEach, WaitUntil)
