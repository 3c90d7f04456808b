"""The search: episodes of moves, those that show something new are begun from again, and a failure is made short."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Final

from hv_models.memory import PhysicalFault
from hv_models.stage2 import Stage2Fault
from mediator.core.faults import MediatorBug
from mediator.core.policy import Policy
from mediator.documents import DocumentError
from mediator.fuzz.arena import Arena
from mediator.fuzz.moves import KINDS, Move, draw
from mediator.invariants import Violation
from mediator.invariants.lifecycles import ARGUMENT_EDGES, BUFFER_EDGES, CALL_EDGES, GUEST_EDGES, NEW
from mediator.policies import load_policy

FORMAT: Final = "mediator-fuzz-case/1"
EPISODE: Final = 400
"""Moves from the birth of the guests to their end. Long enough for quotas to fill; short enough to be made short."""
FROM_CORPUS: Final = 0.6
"""How often an episode begins as one that showed something new did."""
SHRINK_RUNS: Final = 600
EDGES: Final = {
    "guest": GUEST_EDGES,
    "call": CALL_EDGES,
    "buffer": BUFFER_EDGES,
    "RPC argument": ARGUMENT_EDGES,
}
_LOUD: Final = (
    MediatorBug,
    PhysicalFault,
    Stage2Fault,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What leaves a broken core, or a model that was led by one to an address that is none."""
Advance = Callable[["FuzzReport"], None]


@dataclass(slots=True)
class Failure:
    """Moves that lead to a violation, or to an exception that leaves the core."""

    moves: list[Move]
    why: list[str]
    shrunk_from: int


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
        }


def fuzz(
    policy: Policy,
    *,
    seed: int = 0,
    guests: int = 4,
    calls: int | None = None,
    seconds: float | None = None,
    guided: bool = True,
    shrink: bool = True,
    advance: Advance = lambda report: None,
) -> FuzzReport:
    """Search until so many calls are made, so much time is over, or something fails. The same seed is the same run."""
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
            shrunk = _shrink(policy, guests, moves, why) if shrink else moves
            report.failure = Failure(shrunk, _play(policy, guests, shrunk, None) or why, len(moves))
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


def _play(policy: Policy, guests: int, moves: list[Move], report: FuzzReport | None) -> list[str]:
    """Make the moves; what is wrong then."""
    arena = Arena(policy, guests)
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
    except _LOUD as error:
        return [f"{type(error).__name__} left the core: {error}", *map(str, found)]
    finally:
        if report is not None:
            report.calls += arena.calls
            report.edges |= arena.checker.taken
            report.items |= arena.items
            features |= {("edge", *edge) for edge in arena.checker.taken} | {("item", *item) for item in arena.items}
        arena.close()
    return list(map(str, found))


def _shrink(policy: Policy, guests: int, moves: list[Move], why: list[str]) -> list[Move]:
    """Leave out what is not needed to fail, in ever smaller pieces."""
    runs, size = 0, max(len(moves) // 2, 1)
    while size and runs < SHRINK_RUNS:
        at, changed = 0, False
        while at < len(moves) and runs < SHRINK_RUNS:
            shorter = moves[:at] + moves[at + size :]
            runs += 1
            if _play(policy, guests, shorter, None):
                moves, changed = shorter, True
            else:
                at += size
        size = size if changed and size == 1 else size // 2
        if size == 1 and not changed:
            break
    return moves


def save(report: FuzzReport, directory: Path) -> Path:
    """Write a failure where `reproduce` can take it. Raises OSError."""
    assert report.failure is not None
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"seed-{report.seed}-calls-{report.calls}.json"
    document = {
        "format": FORMAT,
        "policy": report.policy,
        "guests": report.guests,
        "why": report.failure.why,
        "moves": [list(move) for move in report.failure.moves],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def reproduce(path: Path) -> FuzzReport:
    """Make the moves of a file. Raises DocumentError, OSError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r} is not {FORMAT}")
        moves = [
            Move(str(what), int(guest), int(choice), int(detail)) for what, guest, choice, detail in document["moves"]
        ]
        guests = int(document["guests"])
        unknown = {move.what for move in moves} - set(KINDS)
        if unknown or not 0 < guests <= 64:
            raise ValueError(f"unknown moves {', '.join(sorted(unknown))}" if unknown else f"{guests} guests")
        policy = load_policy(str(document["policy"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DocumentError([f"{path}: no case of mediator fuzz: {error}"]) from None
    report = FuzzReport(0, policy.name, guests, guided=False, episodes=1)
    why = _play(policy, guests, moves, report)
    if why:
        report.failure = Failure(moves, why, len(moves))
    return report
