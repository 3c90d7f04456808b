"""Scenarios with the seeds 1 to 50: those marked quick with each change, all of them in the nightly run.

Ten seeds to a test, so that workers can share them; they are many, so that a scheduler that begins with the file of
most tests does not keep them for the end. Coverage has seen the scenarios with their first seed (`test_library`).
"""

import os

import pytest

from mediator.scenario import find_scenario, library, run_scenario

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SWEPT = [name for name in library() if NIGHTLY or find_scenario(name).quick]


@pytest.mark.parametrize("first", range(1, 51, 10))
@pytest.mark.parametrize("name", SWEPT)
def test_a_scenario_with_ten_seeds(name: str, first: int) -> None:
    scenario = find_scenario(name)
    for seed in range(first, first + 10):
        outcome = run_scenario(scenario, seed)
        assert outcome.good, outcome.as_data()


def test_what_is_quick_is_most_of_what_there_is() -> None:
    """So that the mark is not taken away from what should be swept with each change."""
    assert len([name for name in library() if find_scenario(name).quick]) > len(library()) / 2
