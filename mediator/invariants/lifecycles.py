"""Invariant 7: states move only along table edges.

The edges are written down here a second time, by name, and not taken from the core's tables: so a wrong edge
there, or a state that was assigned past the tables, is seen in what an object was before a step and is after it.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cache
from typing import Final, NamedTuple, Protocol

NEW: Final = "(new)"
"""What an object is before it exists."""

CALL_EDGES: Final = frozenset(
    {
        (NEW, "TRANSLATING"),
        ("TRANSLATING", "RUNNING"),
        ("TRANSLATING", "ENDED"),
        ("RUNNING", "SUSPENDED"),
        ("RUNNING", "ENDED"),
        ("SUSPENDED", "RUNNING"),
        ("SUSPENDED", "FREEING"),
        ("SUSPENDED", "ENDED"),
        ("FREEING", "RUNNING"),
        ("FREEING", "ENDED"),
    }
)
BUFFER_EDGES: Final = frozenset(
    {
        (NEW, "PINNED"),
        ("PINNED", "REGISTERING"),
        ("PINNED", "REGISTERED"),
        ("PINNED", "RELEASED"),
        ("REGISTERING", "REGISTERED"),
        ("REGISTERING", "RELEASED"),
        ("REGISTERED", "UNREGISTERING"),
        ("REGISTERED", "RELEASED"),
        ("UNREGISTERING", "REGISTERED"),
        ("UNREGISTERING", "RELEASED"),
    }
)
ARGUMENT_EDGES: Final = frozenset({(NEW, "LIVE"), ("LIVE", "RELEASED")})
GUEST_EDGES: Final = frozenset(
    {
        (NEW, "CREATING"),
        ("CREATING", "LIVE"),
        ("CREATING", "GONE"),
        ("LIVE", "PAUSED"),
        ("LIVE", "ISOLATED"),
        ("LIVE", "DYING"),
        ("PAUSED", "LIVE"),
        ("PAUSED", "ISOLATED"),
        ("PAUSED", "DYING"),
        ("ISOLATED", "DYING"),
        ("DYING", "GONE"),
        ("DYING", "QUARANTINED"),
        ("QUARANTINED", "DYING"),
        ("QUARANTINED", "GONE"),
    }
)

LAST: Final = frozenset({"ENDED", "RELEASED", "GONE"})
"""States of objects that are in no table of the core's any more."""
MADE: Final = frozenset({"TRANSLATING", "RUNNING", "PINNED", "REGISTERING", "REGISTERED", "LIVE", "CREATING", *LAST})
"""Where an object may stand at the end of the step that made it: a buffer is pinned and registered in one."""

FIRST: Final = {"RUNNING": "TRANSLATING", "REGISTERING": "PINNED", "REGISTERED": "PINNED"}
"""What such an object was just before, inside of the step."""

Edges = frozenset[tuple[str, str]]


class HasState(Protocol):
    """Anything that has a life cycle."""

    @property
    def state(self) -> Enum:
        """Where it stands."""
        ...


class Move(NamedTuple):
    """From one state to another."""

    what: str
    before: str
    after: str


class LifeCycle:
    """The objects of one kind that one guest has, and the state in which each was seen last.

    In one step an object moves along one edge; one that is made in the step may have gone further (it is
    translated, then registered). Objects that a step seemed to have nothing to do with are looked at now and then,
    and may have gone any way of the table meanwhile.
    """

    __slots__ = ("_edges", "_name", "_seen", "_taken", "_touched", "_ways")

    def __init__(self, name: str, edges: Edges, taken: "set[Move]") -> None:
        self._taken = taken
        self._name = name
        self._edges = edges
        self._ways = _closure(edges)
        self._seen: dict[HasState, Enum] = {}
        self._touched: list[HasState] = []

    def before(self, things: Iterable[HasState]) -> None:
        """A step begins that has to do with these."""
        self._touched.clear()
        for thing in things:
            self._touched.append(thing)
            self._seen[thing] = thing.state

    def after(self, things: Iterable[HasState]) -> Iterator[Move]:
        """The step is done; it had to do with these also."""
        touched = self._touched
        for thing in touched:
            if thing.state is not self._seen[thing]:
                yield from self._moved(thing, self._edges)
        for thing in things:
            if thing.state is not self._seen.get(thing) and thing not in touched:
                if thing not in self._seen and thing.state.name not in MADE:
                    yield Move(self._name, NEW, thing.state.name)
                yield from self._moved(thing, self._ways)
        touched.clear()

    def examine(self, live: Iterable[HasState]) -> Iterator[Move]:
        """Look at all objects: those in the core's table, and those that have left it."""
        here = set(live)
        for thing in [thing for thing in self._seen if thing not in here]:
            if thing.state.name not in LAST:
                yield Move(self._name, thing.state.name, "in no table")
            elif thing.state is not self._seen[thing]:
                yield from self._moved(thing, self._ways)
            self._seen.pop(thing, None)
        for thing in here:
            if thing.state.name in LAST:
                yield Move(self._name, thing.state.name, "still in a table")
            elif thing.state is not self._seen.get(thing):
                yield from self._moved(thing, self._ways)

    def _moved(self, thing: HasState, ways: Edges) -> Iterator[Move]:
        old = self._seen.get(thing)
        move = (NEW if old is None else old.name, thing.state.name)
        if move not in ways:
            yield Move(self._name, *move)
        elif move in self._edges:
            self._taken.add(Move(self._name, *move))
        elif old is None and move[1] in FIRST:
            self._taken.add(Move(self._name, FIRST[move[1]], move[1]))
        if thing.state.name in LAST:
            self._seen.pop(thing, None)
        else:
            self._seen[thing] = thing.state


@cache
def _closure(edges: Edges) -> Edges:
    """Every way of one edge or more."""
    ways = set(edges)
    while True:
        more = {(a, d) for a, b in ways for c, d in edges if b == c} - ways
        if not more:
            return frozenset(ways)
        ways |= more
