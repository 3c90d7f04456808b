"""Benchmarks: the core alone, with a secure world that answers from a script; and whole calls end to end."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from mediator.bench.burst import BURST, ROWS, TIMES, BurstRow, bursts
from mediator.bench.cases import CASES, Case
from mediator.bench.door import DOOR, Door, measure_door
from mediator.bench.end_to_end import END_TO_END, PRICE, EndToEnd, Price, measure_case, price_of_no_reserved_memory
from mediator.bench.fairness import FAIRNESS, SMALL_CALLS, Fairness, fairness
from mediator.bench.measure import Timing, batch, measure, undone
from mediator.bench.memory import Growth, growth
from mediator.bench.stand import Stand
from mediator.bench.storage import STORAGE, StorageBench, measure_storage
from mediator.core.policy import Policy
from mediator.costs import Costs

__all__ = ["BATCHES", "CALLS", "FORMAT", "MEMORY", "NAMES", "Bench", "Measured", "run"]

FORMAT: Final = "mediator-bench/1"
MEMORY: Final = "memory"
NAMES: Final = (
    *(case.name for case in CASES),
    MEMORY,
    *(case.name for case in END_TO_END),
    PRICE,
    STORAGE,
    FAIRNESS,
    BURST,
    DOOR,
)
BATCHES: Final = 400
"""Samples of each measurement. Many short ones: what else the machine does then spoils a few, not the median."""
SECONDS: Final = 4.0
"""For how long a case of the core is measured at least: a machine that is shared has slow seconds."""
CALLS: Final = 200_000
"""Calls over which memory must stay flat."""
_FAIRNESS: Final = ((True, False), (True, True), (False, False), (False, True))
"""Virtual or real time, without and with flow control."""
_WARM_UP: Final = 5
"""One warm-up batch for so many that are counted: caches are filled, pages faulted in."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One case and the baselines beside it, all in microseconds."""

    case: Case
    timing: Timing
    baselines: dict[str, Timing]

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None where there is none."""
        return None if self.case.target is None else self.timing.median <= self.case.target

    def ratio(self, baseline: str) -> float:
        """How many times a baseline's median this takes."""
        return self.timing.median / self.baselines[baseline].median

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "name": self.case.name,
            "what": self.case.what,
            "unit": "us",
            **self.timing.as_data(),
            "target": self.case.target,
            "met": self.met,
            "baselines": [
                {"name": name, **timing.as_data(), "ratio": round(self.ratio(name), 2)}
                for name, timing in self.baselines.items()
            ],
        }


@dataclass(slots=True)
class Bench:
    """All that was measured."""

    cases: list[Measured] = field(default_factory=list)
    memory: Growth | None = None
    end_to_end: list[EndToEnd] = field(default_factory=list)
    prices: list[Price] = field(default_factory=list)
    storage: StorageBench | None = None
    fairness: list[Fairness] = field(default_factory=list)
    bursts: list[BurstRow] = field(default_factory=list)
    door: Door | None = None

    def as_data(self) -> dict[str, Any]:
        """The JSON document of `mediator bench`."""
        return {
            "format": FORMAT,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "cases": [measured.as_data() for measured in self.cases],
            "memory": None if self.memory is None else self.memory.as_data(),
            "end_to_end": [measured.as_data() for measured in self.end_to_end],
            "door": None if self.door is None else self.door.as_data(),
            "price_of_no_reserved_memory": [price.as_data() for price in self.prices],
            "storage": None if self.storage is None else self.storage.as_data(),
            "fairness": [found.as_data() for found in self.fairness],
            "burst": [row.as_data() for row in self.bursts],
            "costs": asdict(Costs()),
        }


def run(policy: Policy, wanted: str, progress: Progress, *, batches: int | None = None, calls: int = CALLS) -> Bench:
    """Measure everything whose name contains `wanted`; `progress` is told (name, done, of how many).

    batches: samples of each measurement; None for what is enough.
    """
    bench = Bench()
    seconds = SECONDS if batches is None else 0
    batches = batches or BATCHES
    for case in CASES:
        if wanted in case.name:
            progress(case.name, 0, 1)
            bench.cases.append(_measured(policy, case, batches, seconds))
            progress(case.name, 1, 1)
    if wanted in MEMORY:
        stand = Stand(policy)
        try:
            bench.memory = growth(stand, calls, lambda done, total: progress(MEMORY, done, total))
        finally:
            stand.close()
        progress(MEMORY, calls, calls)
    for whole in END_TO_END:
        if wanted in whole.name:
            progress(whole.name, 0, 1)
            bench.end_to_end.append(measure_case(policy, whole, batches))
            progress(whole.name, 1, 1)
    if wanted in PRICE:
        progress(PRICE, 0, 1)
        bench.prices = price_of_no_reserved_memory(policy, batches)
        progress(PRICE, 1, 1)
    if wanted in STORAGE:
        progress(STORAGE, 0, 1)
        bench.storage = measure_storage(policy, batches)
        progress(STORAGE, 1, 1)
    if wanted in FAIRNESS:
        small = min(SMALL_CALLS, -(-batches * SMALL_CALLS // BATCHES))
        for number, (virtual, controlled) in enumerate(_FAIRNESS):
            progress(FAIRNESS, number, len(_FAIRNESS))
            bench.fairness.append(fairness(policy, virtual=virtual, controlled=controlled, calls=small))
    if wanted in BURST:
        for row in bursts(policy, min(TIMES, -(-batches * TIMES // BATCHES))):
            bench.bursts.append(row)
            progress(BURST, len(bench.bursts), ROWS)
    if wanted in DOOR:
        progress(DOOR, 0, 1)
        bench.door = measure_door(policy, batches)
        progress(DOOR, 1, 1)
    return bench


def _measured(policy: Policy, case: Case, batches: int, seconds: float) -> Measured:
    """Measure a case and its baselines on a stand of its own, so that no case pays for another's leftovers."""
    stand = Stand(policy)
    try:
        ready = case.prepare(stand)
        operation, after = ready.operation, ready.after
        samples = [batch(operation, case.size) if after is None else undone(operation, after)]
        samples += [batch(baseline, case.size) for baseline in ready.baselines.values()]
        measure(samples, max(1, batches // _WARM_UP))
        timing, *compared = measure(samples, batches, seconds)
    finally:
        stand.close()
    return Measured(case, timing, dict(zip(ready.baselines, compared, strict=True)))
