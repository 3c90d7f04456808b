"""A plugin of pytest for `.ci/mutation`: few cases of each test, the fastest first, since any failure is enough."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

MANY, FEW = 20, 4
"""A parametrized test of more cases than MANY is a sweep: only FEW of them, spread over its list."""
STATISTICS = Path("mutmut-stats.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose and sort. Which tests reach which function is known by then, but for the run that finds it out."""
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    chosen = []
    for found in cases.values():
        last = len(found) - 1
        numbers = range(len(found)) if last < MANY else [number * last // (FEW - 1) for number in range(FEW)]
        chosen += [found[number] for number in numbers]
    if STATISTICS.exists():
        seconds = json.loads(STATISTICS.read_text())["duration_by_test"]
        chosen.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
    items[:] = chosen
