"""Cores with one mistake each, and what must notice: a named fast subset of the tests' stories, or the fuzzer."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mediator.core.policy import FlowPolicy
from mediator.fuzz import fuzz
from mediator.policies import load_policy
from tests.wrong_mediators import FAULTS, broken

SECONDS = 60.0
"""Time for the fuzzer to find a fault."""


def found_by_fuzz() -> bool:
    """Whether the fuzzer finds something wrong."""
    return fuzz(load_policy("default"), seed=0, seconds=SECONDS, shrink_it=False).failure is not None


def found_with_flow_control() -> bool:
    """Whether the fuzzer finds something wrong where calls wait for turns."""
    policy = replace(load_policy("default"), flow=FlowPolicy(queue=2, rate=2000.0, burst=2, secure_cores=2))
    return fuzz(policy, seed=0, seconds=SECONDS, shrink_it=False).failure is not None


def found_when_exhausted() -> bool:
    """Whether it is found when the mediator has no page left for an RPC argument."""
    from tests.core.pair import Pair, ask_alloc, interrupt, invoke

    pair = Pair()
    try:
        guest = pair.guest()
        pair.world.script += [ask_alloc(), interrupt()]
        guest.call(invoke())
        pair.host.left = 0
        guest.give_page(0xC0)
        return bool(pair.checker.violations)
    finally:
        pair.close()


BY: dict[str, Callable[[], bool]] = {
    "fuzz": found_by_fuzz,
    "flow": found_with_flow_control,
    "exhausted": found_when_exhausted,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_core_is_caught(name: str) -> None:
    fault = FAULTS[name]
    with broken(fault):
        assert BY[fault.by]()


def test_there_are_enough_faults_and_each_can_still_be_made() -> None:
    assert len(FAULTS) >= 30
    for fault in FAULTS.values():
        with broken(fault):
            pass


def test_a_whole_core_is_not_accused() -> None:
    assert not found_when_exhausted()
