"""What a running bench shows on standard error: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

import trio

from mediator.service.served import GuestStatus, ServedGuest

if TYPE_CHECKING:
    from rich.table import Table

REFRESH_SECONDS: Final = 0.5
"""Between two tables: often enough to look alive, seldom enough to cost nothing."""
LINE_SECONDS: Final = 10.0
"""Between two plain lines."""
MAX_ROWS: Final = 40
"""Guests in the table; the rest is counted below it."""
_COLUMNS: Final = (
    "guest", "hyper-\nvisor", "VMID", "calls/s", "RPCs", "denied", "refused", "pages pinned", "threads", "errors"
)  # fmt: skip
"""All heads can be read on a terminal of 80 columns."""


async def display(guests: Sequence[ServedGuest], duration: float | None) -> None:
    """Show how the guests get on, until cancelled."""
    if sys.stderr.isatty():
        await _live(guests, duration)
    else:
        await _lines(guests)


async def _live(guests: Sequence[ServedGuest], duration: float | None) -> None:
    from rich.console import Console
    from rich.live import Live

    rates = _Rates()
    began = trio.current_time()
    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while True:
            seconds = trio.current_time() - began
            wanted = "" if duration is None else f" ({duration:g} s of work are wanted)"
            live.update(_table(rates.next(guests), f"{seconds:.0f} s{wanted}"), refresh=True)
            await trio.sleep(REFRESH_SECONDS)


async def _lines(guests: Sequence[ServedGuest]) -> None:
    rates = _Rates()
    rates.next(guests)
    began = trio.current_time()
    while True:
        await trio.sleep(LINE_SECONDS)
        found = rates.next(guests)
        statuses = [status for status, _ in found]
        calls = sum(rate for _, rate in found)
        invokes, errors = (sum(getattr(status, name) for status in statuses) for name in ("invokes", "errors"))
        running = sum(not status.ended for status in statuses)
        seconds = trio.current_time() - began
        print(
            f"{seconds:.0f} s: {running} guests, {calls:.0f} calls/s, {invokes} invokes, {errors} errors",
            file=sys.stderr,
            flush=True,
        )


class _Rates:
    """Calls per second since the last look."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._at = trio.current_time()

    def next(self, guests: Sequence[ServedGuest]) -> list[tuple[GuestStatus, float]]:
        now = trio.current_time()
        passed, self._at = now - self._at, now
        statuses = [guest.status() for guest in guests]
        before, self._calls = self._calls, {status.name: status.calls for status in statuses}
        return [(each, (each.calls - before.get(each.name, 0)) / passed if passed else 0.0) for each in statuses]


def _table(found: Sequence[tuple[GuestStatus, float]], title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    left_out = len(found) - MAX_ROWS
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, title=title, title_justify="left")
    table.caption = f"and {left_out} more" if left_out > 0 else None
    for column in _COLUMNS:
        side: Literal["left", "right"] = "left" if column in _COLUMNS[:2] else "right"
        table.add_column(column, justify=side, min_width=max(map(len, column.split())), overflow="fold")
    for status, rate in found[:MAX_ROWS]:
        pinned = f"{status.pages_pinned} of {status.pages_quota}"
        numbers = (status.vmid, f"{rate:.0f}", status.rpcs, status.denied, status.refused, pinned, status.threads)
        table.add_row(Text(status.name), status.hypervisor, *map(str, numbers), str(status.errors))
    return table
