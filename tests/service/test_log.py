"""Lines that guests can cause: bounded for each, and never at the expense of errors."""

from __future__ import annotations

from structlog.testing import capture_logs

from mediator.core.steps import Event
from mediator.service.log import LINES_PER_SECOND, EventLog


def test_a_guest_that_floods_is_bounded_and_the_others_are_heard() -> None:
    now = 100.0
    log = EventLog(lambda: now, lambda: True)
    with capture_logs() as lines:
        for _ in range(1000):
            log(Event("call_denied", "info", 1, {"function": 7}))
        log(Event("call_denied", "info", 2, {"function": 8}))
        log(Event("guest_isolated", "error", 1, {}))
        for _ in range(1000):
            log.link_ended("stranger", "no")
    assert sum(line["guest"] == 1 and line["event"] == "call_denied" for line in lines) == LINES_PER_SECOND
    assert sum(line["guest"] == 2 for line in lines) == 1
    assert sum(line["log_level"] == "error" for line in lines) == 1
    assert sum(line["event"] == "link_ended" for line in lines) == LINES_PER_SECOND
    now = 101.0
    with capture_logs() as lines:
        log(Event("call_denied", "info", 1, {"function": 7}))
    assert [line["event"] for line in lines] == ["lines_left_out", "call_denied"]
    assert lines[0]["lines"] == 1000 - LINES_PER_SECOND


def test_what_the_host_changes_is_logged_always_and_whole() -> None:
    """A new policy for a hundred guests is a line for each, and takes no guest's share of lines."""
    log = EventLog(lambda: 0.0, lambda: False)
    with capture_logs() as lines:
        for guest in range(1, 101):
            log(Event("limits_changed", "info", guest, {"pages": [65536, 100]}))
        log(Event("pool_changed", "info", 0, {"pages": [None, 5000]}))
    wanted = [("limits_changed", guest, [65536, 100]) for guest in range(1, 101)]
    assert [(line["event"], line["guest"], line["pages"]) for line in lines] == [
        *wanted,
        ("pool_changed", 0, [None, 5000]),
    ]


def test_only_errors_unless_everything_is_asked_for() -> None:
    log = EventLog(lambda: 0.0, lambda: False)
    with capture_logs() as lines:
        for level in ("debug", "info", "error"):
            log(Event("something", level, 1, {}))
    assert [line["log_level"] for line in lines] == ["error"]
