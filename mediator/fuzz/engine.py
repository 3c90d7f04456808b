"""The search: episodes of moves; what shows something new is begun from again, and a failure is made short."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final, TypedDict

from mediator.core.policy import Policy
from mediator.fuzz.arena import Arena, flavour
from mediator.fuzz.corpus import Corpus
from mediator.fuzz.failure import LOUD, Failure, kinds_of, make_short, shrink
from mediator.fuzz.journal import Journal
from mediator.fuzz.moves import Move
from mediator.fuzz.seeds import Conversation
from mediator.fuzz.story import Story
from mediator.fuzz.world import THREADS
from mediator.invariants import Violation
from mediator.invariants.lifecycles import ARGUMENT_EDGES, BUFFER_EDGES, CALL_EDGES, GUEST_EDGES, NEW

EDGES: Final = {
    "guest": GUEST_EDGES,
    "call": CALL_EDGES,
    "buffer": BUFFER_EDGES,
    "RPC argument": ARGUMENT_EDGES,
}
Edge = tuple[str, str, str]
Advance = Callable[["FuzzReport"], None]


class Search(TypedDict):
    """What every search is told; see `fuzz`."""

    seed: int
    guests: int
    calls: int | None
    seconds: float | None
    guided: bool
    recorded: Sequence[Conversation]
    advance: Advance


@dataclass(slots=True)
class FuzzReport:
    """What a search did.

    edges: of the state tables, as (object, before, after), by the moves in which they were taken; items: parts of the
    ABI, and reasons of the core's; depths: eighths of its quotas that a guest held.
    """

    seed: int
    policy: str
    guests: int
    guided: bool
    calls: int = 0
    episodes: int = 0
    kept: int = 0
    seconds: float = 0.0
    edges: Counter[Edge] = field(default_factory=Counter)
    items: set[tuple[str, int | str]] = field(default_factory=set)
    depths: set[tuple[str, int]] = field(default_factory=set)
    failure: Failure | None = None

    @property
    def found(self) -> int:
        """How much was seen of all that counts as new."""
        return len(self.edges) + len(self.items) + len(self.depths)

    @property
    def missing(self) -> list[Edge]:
        """Edges of the tables that were not taken."""
        known = {(what, *edge) for what, edges in EDGES.items() for edge in edges if edge[0] != NEW}
        return sorted(known - self.edges.keys())

    def learn(self, arena: Arena) -> bool:
        """Take what an arena has shown since the last time; whether anything of it is new."""
        before = self.found
        taken = arena.checker.taken
        if taken:
            self.edges.update((move.what, move.before, move.after) for move in taken)
            taken.clear()
        self.items |= arena.items
        arena.items.clear()
        self.depths |= arena.depths
        arena.depths.clear()
        return self.found > before

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
            "edges": [
                [what, f"{old} -> {new}", count] for (what, old, new), count in sorted(self.edges.items()) if old != NEW
            ],
            "edges_missing": [[what, f"{old} -> {new}"] for what, old, new in self.missing],
            "items": len(self.items),
            "depths": len(self.depths),
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
    recorded: Sequence[Conversation] = (),
    shrink_it: bool = True,
    policy_text: str = "",
    advance: Advance = lambda report: None,
) -> FuzzReport:
    """Search until so many calls are made, so much time is over, or something fails. The same seed is the same run.

    recorded: calls to begin from. policy_text: the policy as YAML, for the scenario of a failure, if not built in.
    """
    report = FuzzReport(seed, policy.name, guests, guided)
    corpus = Corpus(Random(seed), guests, recorded)
    started = monotonic()
    while (calls is None or report.calls < calls) and (seconds is None or report.seconds < seconds):
        moves = corpus.episode()
        why, last = _play(policy, guests, moves, report)
        report.episodes += 1
        if guided and last:
            corpus.keep(moves[:last])
            report.kept += 1
        report.seconds = monotonic() - started
        advance(report)
        if why:
            whole = Failure(moves, why, len(moves))
            report.failure = _failure(policy, report, moves, why, policy_text) if shrink_it else whole
            break
    return report


def _play(
    policy: Policy, guests: int, moves: list[Move], report: FuzzReport | None = None, journal: Journal | None = None
) -> tuple[list[str], int]:
    """Make the moves; what is wrong then, and after how many of them something new was seen for the last time."""
    arena = Arena(policy, guests, journal)
    found: list[Violation] = arena.checker.violations
    last = 0
    try:
        for number, move in enumerate(moves, 1):
            arena.do(move)
            if report is not None and report.learn(arena):
                last = number
            if found:
                break
        if not found:
            arena.finish()
    except LOUD as error:
        return [f"{type(error).__name__} left the core: {error}", *map(str, found)], last
    finally:
        if report is not None:
            report.calls += arena.calls
            report.learn(arena)
        arena.close()
    return list(map(str, found)), last


def _failure(policy: Policy, report: FuzzReport, moves: list[Move], why: list[str], policy_text: str) -> Failure:
    """Make a failure short, and a scenario of it."""
    kinds = kinds_of(why)
    shrunk = shrink(moves, lambda shorter: bool(kinds_of(_play(policy, report.guests, shorter)[0]) & kinds))
    journal = Journal()
    why = _play(policy, report.guests, shrunk, journal=journal)[0] or why
    journal.close()
    story = Story(
        f"fuzz-{report.seed}-{report.calls}",
        f"What mediator fuzz found with seed {report.seed}.",
        policy_text or policy.name,
        {f"guest-{number}": {"hypervisor": flavour(number)} for number in range(report.guests)},
        THREADS,
    )
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
