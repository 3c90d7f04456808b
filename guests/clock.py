"""The guest's wall clock."""

from typing import Final

import trio

BOOT_TIME: Final = 1_700_000_000
"""Wall-clock seconds at which a guest boots unless told otherwise: fixed, so that a run can be repeated."""

_NANOSECONDS: Final = 1_000_000_000


class Clock:
    """Seconds since 1970 on trio's clock, so a test's `MockClock` moves it together with every sleep."""

    def __init__(self, boot_time: int = BOOT_TIME) -> None:
        self._boot_time = boot_time
        self._start = trio.current_time()

    def now(self) -> tuple[int, int]:
        """Return seconds and nanoseconds, as GET_TIME answers them."""
        elapsed = round((trio.current_time() - self._start) * _NANOSECONDS)
        seconds, nanoseconds = divmod(elapsed, _NANOSECONDS)
        return self._boot_time + seconds, nanoseconds
