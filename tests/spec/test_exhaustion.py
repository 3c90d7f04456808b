"""Every order of events, to the end: no state outside the tables, no invariant broken, so many states."""

import os

import pytest

from tests.spec.exhaustion import EVERYTHING, ORDER, TABLES, explore

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
WALKS = [(2, 3, ORDER, 2775, 20527), (1, 1, EVERYTHING, 892, 3305)]
"""Guests, calls that live at a time, the events that may happen; states, and moves between them."""
if NIGHTLY:
    WALKS += [(1, 2, EVERYTHING, 12990, 60161)]


@pytest.mark.timeout(7200 if NIGHTLY else 120)
@pytest.mark.parametrize(("guests", "calls", "alphabet", "states", "moves"), WALKS)
def test_every_order_of_events_ends_well(guests, calls, alphabet, states, moves):
    found = explore(guests, calls, alphabet)
    assert (found.states, found.moves) == (states, moves)
    if alphabet is EVERYTHING:
        assert found.taken == {
            (name, state.name, event.name)
            for name, table in TABLES.items()
            for state in table
            for event in table[state]
        }
