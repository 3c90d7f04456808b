"""The tables of life cycles: total, reachable, and ended where they end (invariant 7)."""

import pytest

from mediator.core.faults import MediatorBug
from mediator.core.states import (
    ARGUMENT_TABLE,
    BUFFER_TABLE,
    CALL_TABLE,
    GUEST_TABLE,
    ArgumentEvent,
    ArgumentState,
    BufferEvent,
    BufferState,
    CallEvent,
    CallState,
    GuestEvent,
    GuestState,
    advance,
)

TABLES = [
    (GUEST_TABLE, GuestState, GuestEvent, GuestState.CREATING, GuestState.GONE),
    (CALL_TABLE, CallState, CallEvent, CallState.TRANSLATING, CallState.ENDED),
    (BUFFER_TABLE, BufferState, BufferEvent, BufferState.PINNED, BufferState.RELEASED),
    (ARGUMENT_TABLE, ArgumentState, ArgumentEvent, ArgumentState.LIVE, ArgumentState.RELEASED),
]
EACH = pytest.mark.parametrize(("table", "states", "events", "first", "last"), TABLES)


class Thing:
    def __init__(self, state):
        self.state = state


@EACH
def test_every_event_in_every_state_moves_or_is_a_bug(table, states, events, first, last):
    assert set(table) == set(states)
    for state in states:
        for event in events:
            thing = Thing(state)
            if event in table[state]:
                advance(thing, event, table)
                assert thing.state is table[state][event]
            else:
                with pytest.raises(MediatorBug, match=f"^Thing in {state.name} has no edge {event.name}$"):
                    advance(thing, event, table)
                assert thing.state is state


@EACH
def test_every_state_is_reached_every_event_is_used_and_the_end_is_an_end(table, states, events, first, last):
    reached, fresh = {first}, [first]
    while fresh:
        for state in table[fresh.pop()].values():
            if state not in reached:
                reached.add(state)
                fresh.append(state)
    assert reached == set(states)
    assert {event for edges in table.values() for event in edges} == set(events)
    assert [state for state in states if not table[state]] == [last]


@EACH
def test_the_end_can_be_reached_from_everywhere(table, states, events, first, last):
    ending = {last}
    while True:
        more = {state for state in states if set(table[state].values()) & ending} - ending
        if not more:
            break
        ending |= more
    assert ending == set(states)


def test_an_event_of_another_table_is_a_bug():
    with pytest.raises(MediatorBug):
        advance(Thing(CallState.RUNNING), GuestEvent.DESTROY, CALL_TABLE)
