"""Who does a step: a guest in a run, with the names that are known there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mediator.scenario.expressions import EvaluationError, Expression, Record, Value, as_number

if TYPE_CHECKING:
    from mediator.scenario.guest import ScenarioGuest
    from mediator.scenario.run import Run
    from mediator.scenario.steps import Step

WORLD: Final = ""
"""Whose names those are that no guest's step defines."""
MAX_SIZE: Final = 1 << 30
"""Bytes of one thing that a step makes: stops a file from filling memory."""


class Scope:
    """Names of one guest. A branch of `parallel` has one of its own, whose names are handed on at its end."""

    def __init__(self, parent: Scope | None = None) -> None:
        self.parent = parent
        self.names: dict[str, Value] = {}

    def get(self, name: str) -> Value | None:
        """What a name stands for here; None if nothing."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None


class Actor:
    """A guest (or nobody, for the world's steps) in one branch of a run."""

    def __init__(self, run: Run, scopes: dict[str, Scope], guest: ScenarioGuest | None) -> None:
        self.run = run
        self._scopes = scopes
        self._guest = guest

    @property
    def guest(self) -> ScenarioGuest:
        """Whose step it is. Raises EvaluationError for nobody's."""
        if self._guest is None:
            raise EvaluationError("whose step this is: guest is missing")
        return self._guest

    @property
    def guest_name(self) -> str | None:
        """Its name."""
        return None if self._guest is None else self._guest.name

    def of(self, name: str | None) -> Actor:
        """The same for another guest; for None as it is."""
        if name is None or name == self.guest_name:
            return self
        return Actor(self.run, self._scopes, self.run.guest(name))

    def branch(self) -> Actor:
        """The same with names of its own."""
        scopes = {name: Scope(scope) for name, scope in self._scopes.items()}
        return Actor(self.run, scopes, self._guest)

    def join(self, branches: Sequence[Actor]) -> None:
        """Take over the names of branches that have ended, in the order in which they are written."""
        for branch in branches:
            for name, scope in branch._scopes.items():
                self._scopes[name].names.update(scope.names)

    async def run_steps(self, steps: Sequence[Step]) -> None:
        """Do steps one after the other. Raises StepFailed, GuestDied."""
        for step in steps:
            await self.run.do(step, self)

    # Names

    def define(self, name: str | None, value: Value) -> None:
        """Give something a name: the guest's, or where it is nobody's step, everybody's."""
        if name is not None:
            self._scopes[self.guest_name or WORLD].names[name] = value

    def look_up(self, name: str) -> Value:
        """See `Names`: own names first, then everybody's, then `$guest`, then other guests."""
        if self._guest is not None:
            found = self._scopes[self._guest.name].get(name)
            if found is not None:
                return found
        found = self._scopes[WORLD].get(name)
        if found is not None:
            return found
        if self._guest is not None and name == "guest":
            return _facts(self._guest)
        if name in self._scopes:
            other = self.run.guest(name)
            scope: Scope | None = self._scopes[name]
            fields: dict[str, Value] = {"guest": _facts(other)}
            chain = []
            while scope is not None:
                chain.append(scope.names)
                scope = scope.parent
            for names in reversed(chain):
                fields.update(names)
            return Record("guest", other.number, fields)
        raise EvaluationError(f"${name} is not defined (yet)")

    def value(self, expression: Expression) -> Value:
        """What an expression stands for. Raises EvaluationError."""
        return expression.value(self)

    def number(self, expression: Expression) -> int:
        """A number of 64 bits. Raises EvaluationError."""
        return expression.number(self)

    def small(self, expression: Expression) -> int:
        """A number of 32 bits. Raises EvaluationError."""
        number = as_number(expression.value(self), expression.text)
        if not -(1 << 31) <= number < 1 << 32:
            raise EvaluationError(f"{expression.text} is {number:#x}, more than 32 bits")
        return number & 0xFFFFFFFF

    def size(self, expression: Expression) -> int:
        """A number of bytes or pages that is really to be made. Raises EvaluationError."""
        number = self.number(expression)
        if number > MAX_SIZE:
            raise EvaluationError(f"{expression.text} is {number}, more than {MAX_SIZE >> 30} GiB")
        return number

    def thing(self, expression: Expression, kind: str) -> Record:
        """A named thing of a kind. Raises EvaluationError for any other."""
        value = expression.value(self)
        if not isinstance(value, Record) or value.kind != kind:
            got = f"a {value.kind}" if isinstance(value, Record) else "a number or bytes"
            raise EvaluationError(f"{expression.text} is {got}, where a {kind} is wanted")
        return value

    def octets(self, expression: Expression) -> bytes:
        """Named bytes. Raises EvaluationError."""
        value = expression.value(self)
        if isinstance(value, Record):
            data = value.fields.get("data")
            if isinstance(data, bytes):
                return data
        if not isinstance(value, bytes):
            raise EvaluationError(f"{expression.text} is not bytes")
        return value

    def random_bytes(self, count: int) -> bytes:
        """Bytes that only the seed decides."""
        return self.guest.draw.randbytes(count)


def _facts(guest: ScenarioGuest) -> Record:
    """`$guest`: its number, and of its present VM id and RAM."""
    fields: dict[str, Value] = {"number": guest.number}
    if guest.alive:
        fields |= {"client_id": guest.client, "ram": guest.ram.base, "ram_size": guest.ram.size}
    return Record("guest", guest.number, fields)
