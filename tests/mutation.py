"""A plugin of pytest for `.ci/mutation`: few cases of each test, and first those that will notice a mutant soonest.

mutmut forks a process for each mutant, and begins pytest in it. Here such a process takes over what its parent has
collected, which saves most of its time; it tries the tests first that noticed other mutants of the same function, then
the fastest ones, for any failure is enough.
"""

import json
import os
import signal
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType

import pytest

MANY, FEW = 20, 4
"""A parametrized test of more cases than MANY is a sweep: only FEW of them, spread over its list."""
TEST_SECONDS = 10.0
"""Processor time of a test, of which none takes more than one: a mutant that goes round in circles is noticed."""
TIMEOUT = 36
"""The exit code by which mutmut knows that."""
STATISTICS = Path("mutmut-stats.json")
NOTICED = Path("noticed.txt")
"""Pairs of function and test, one for each mutant that was noticed."""

_parent = os.getpid()
_collected: dict[str, pytest.Item] = {}


def _of_mutant() -> bool:
    """Whether this process is one that was forked for a mutant."""
    return os.getpid() != _parent


def _function() -> str:
    """In which function the mutant is."""
    return os.environ["MUTANT_UNDER_TEST"].partition("__mutmut_")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> bool | None:
    """Take over the tests of the parent that come by the function, instead of collecting them once more."""
    if not _of_mutant():
        return None
    items = [_collected[name] for name in session.config.args]
    session._fixturemanager = items[0].session._fixturemanager
    for item in items:
        for node in item.listchain()[1:]:
            if node.parent is node.session:
                node.parent = session
            node.session, node.config = session, session.config
    pytest_collection_modifyitems(items)
    session.items = items
    session.testscollected = len(items)
    signal.signal(signal.SIGPROF, _give_up)
    return True


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
        noticed = _noticed() if _of_mutant() else Counter()
        chosen.sort(key=lambda item: (-noticed[item.nodeid], seconds.get(item.nodeid, 0.0)))
    items[:] = chosen
    _collected.update((item.nodeid, item) for item in items)


def _noticed() -> Counter[str]:
    """How many other mutants of the function each test has noticed so far."""
    pairs = [line.split("\t") for line in NOTICED.read_text().splitlines()] if NOTICED.exists() else []
    return Counter(test for function, test in pairs if function == _function())


def pytest_runtest_logstart(nodeid: str) -> None:
    """Measure the test's time."""
    if _of_mutant():
        signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tell the processes after this one who noticed."""
    if report.failed and _of_mutant():
        with NOTICED.open("a") as file:
            file.write(f"{_function()}\t{report.nodeid}\n")


def _give_up(signum: int, frame: FrameType | None) -> None:
    os._exit(TIMEOUT)
