"""The search: episodes of moves, those that show something new are begun from again, and a failure is made short."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final

from mediator.core.policy import Policy
from mediator.fuzz.arena import THREADS, Arena, flavour
from mediator.fuzz.failure import LOUD, Failure, kinds_of, make_short, shrink
from mediator.fuzz.journal import Journal
from mediator.fuzz.moves import Move, draw
from mediator.fuzz.story import Story
from mediator.invariants import Violation
from mediator.invariants.lifecycles import ARGUMENT_EDGES, BUFFER_EDGES, CALL_EDGES, GUEST_EDGES, NEW

EPISODE: Final = 400
"""Moves from the birth of the guests to their end. Long enough for quotas to fill; short enough to be made short."""
FROM_CORPUS: Final = 0.6
"""How often an episode begins as one that showed something new did."""
EDGES: Final = {
    "guest": GUEST_EDGES,
    "call": CALL_EDGES,
    "buffer": BUFFER_EDGES,
    "RPC argument": ARGUMENT_EDGES,
}
Advance = Callable[["FuzzReport"], None]


@dataclass(slots=True)
class FuzzReport:
    """What a search did. edges: of the state tables, as (object, before, after); items: parts of the ABI."""

    seed: int
    policy: str
    guests: int
    guided: bool
    calls: int = 0
    episodes: int = 0
    kept: int = 0
    seconds: float = 0.0
    edges: set[tuple[str, str, str]] = field(default_factory=set)
    items: set[tuple[str, int]] = field(default_factory=set)
    features: set[tuple[Any, ...]] = field(default_factory=set)
    failure: Failure | None = None

    @property
    def missing(self) -> list[tuple[str, str, str]]:
        """Edges of the tables that were not taken."""
        known = {(what, *edge) for what, edges in EDGES.items() for edge in edges if edge[0] != NEW}
        return sorted(known - self.edges)

    def as_data(self) -> dict[str, Any]:
        """The JSON document of `mediator fuzz`."""
        return {
            "format": "mediator-fuzz/1",
            "seed": self.seed,
            "policy": self.policy,
            "guests": self.guests,
            "guided": self.guided,
            "calls": self.calls,
            "episodes": self.episodes,
            "kept": self.kept,
            "calls_per_second": round(self.calls / self.seconds) if self.seconds else 0,
            "edges": sorted([what, f"{old} -> {new}"] for what, old, new in self.edges if old != NEW),
            "edges_missing": [[what, f"{old} -> {new}"] for what, old, new in self.missing],
            "items": len(self.items),
            "features": len(self.features),
            "violations": [] if self.failure is None else self.failure.why,
            "reproduced": None if self.failure is None else self.failure.reproduced,
        }


def fuzz(
    policy: Policy,
    *,
    seed: int = 0,
    guests: int = 4,
    calls: int | None = None,
    seconds: float | None = None,
    guided: bool = True,
    shrink_it: bool = True,
    policy_text: str = "",
    advance: Advance = lambda report: None,
) -> FuzzReport:
    """Search until so many calls are made, so much time is over, or something fails. The same seed is the same run.

    policy_text: the policy as YAML, for the scenario of a failure, if it is not built in.
    """
    report = FuzzReport(seed, policy.name, guests, guided)
    choose = Random(seed)
    corpus: list[list[Move]] = []
    started = monotonic()
    while (calls is None or report.calls < calls) and (seconds is None or report.seconds < seconds):
        moves = _episode(choose, corpus if guided else [], guests)
        before = len(report.features)
        why = _play(policy, guests, moves, report)
        report.episodes += 1
        if len(report.features) > before:
            corpus.append(moves)
            report.kept += 1
        report.seconds = monotonic() - started
        advance(report)
        if why:
            whole = Failure(moves, why, len(moves))
            report.failure = _failure(policy, report, moves, why, policy_text) if shrink_it else whole
            break
    return report


def _episode(choose: Random, corpus: list[list[Move]], guests: int) -> list[Move]:
    """Draw an episode: anew, or as one that showed something new, with some moves changed and a new end."""
    if not corpus or choose.random() >= FROM_CORPUS:
        return [draw(choose, guests) for _ in range(EPISODE)]
    moves = list(choose.choice(corpus))
    del moves[choose.randrange(len(moves) // 2, len(moves) + 1) :]
    for _ in range(choose.randrange(4)):
        moves[choose.randrange(len(moves))] = draw(choose, guests)
    return moves + [draw(choose, guests) for _ in range(EPISODE - len(moves))]


def _play(
    policy: Policy, guests: int, moves: list[Move], report: FuzzReport | None, journal: Journal | None = None
) -> list[str]:
    """Make the moves; what is wrong then."""
    arena = Arena(policy, guests, journal)
    found: list[Violation] = arena.checker.violations
    features = set() if report is None else report.features
    try:
        for move in moves:
            taken = len(arena.checker.taken)
            arena.do(move)
            if len(arena.checker.taken) > taken:
                features |= {("edge by", move.what, *edge) for edge in arena.checker.taken}
            if found:
                break
        if not found:
            arena.finish()
    except LOUD as error:
        return [f"{type(error).__name__} left the core: {error}", *map(str, found)]
    finally:
        if report is not None:
            report.calls += arena.calls
            report.edges |= arena.checker.taken
            report.items |= arena.items
            features |= {("edge", *edge) for edge in arena.checker.taken} | {("item", *item) for item in arena.items}
        arena.close()
    return list(map(str, found))


def _failure(policy: Policy, report: FuzzReport, moves: list[Move], why: list[str], policy_text: str) -> Failure:
    """Make a failure short, and a scenario of it."""
    kinds = kinds_of(why)
    shrunk = shrink(moves, lambda shorter: bool(kinds_of(_play(policy, report.guests, shorter, None)) & kinds))
    journal = Journal()
    why = _play(policy, report.guests, shrunk, None, journal) or why
    story = Story(
        f"fuzz-{report.seed}-{report.calls}",
        f"What mediator fuzz found with seed {report.seed}.",
        policy_text or policy.name,
        {f"guest-{number}": {"hypervisor": flavour(number)} for number in range(report.guests)},
        THREADS,
    )
    journal.close()
    story.tell(journal)
    reproduced = make_short(story, kinds)
    story.comment = [
        f"mediator fuzz --seed {report.seed} --guests {report.guests}, after {report.calls} calls:",
        *why[:1],
        *([] if reproduced else ["This scenario does not show it: it hangs on an order of events that none can say."]),
    ]
    return Failure(shrunk, why, len(moves), story.text(), reproduced=reproduced)


def save(report: FuzzReport, directory: Path) -> Path:
    """Write a failure as a scenario, for `mediator run`. Raises OSError."""
    assert report.failure is not None
    path = directory / f"fuzz-{report.seed}-{report.calls}.yaml"
    path.write_text(report.failure.scenario, encoding="utf-8")
    return path
