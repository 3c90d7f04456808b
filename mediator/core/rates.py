"""How many calls a guest makes, by session and by TA; counted while flow control is on."""

from typing import Final

WINDOW: Final = 1_000_000_000
"""Nanoseconds that a rate looks back."""
MAX_SESSIONS: Final = 1024
MAX_TAS: Final = 256
"""Sessions and TAs of a guest that are told apart. Stops it from filling memory with either."""


class Rate:
    """Calls so far, and per second: of the window that runs and, for what is missing of it, the one before."""

    __slots__ = ("_before", "_now", "_window", "calls")

    def __init__(self) -> None:
        self.calls = 0
        self._window = 0
        self._now = 0
        self._before = 0

    def count(self, now: int) -> None:
        """One call at `now` nanoseconds."""
        self._turn(now)
        self.calls += 1
        self._now += 1

    def per_second(self, now: int) -> float:
        """The rate at `now`."""
        self._turn(now)
        return self._now + self._before * (1 - now % WINDOW / WINDOW)

    def _turn(self, now: int) -> None:
        window = now // WINDOW
        if window != self._window:
            self._before = self._now if window == self._window + 1 else 0
            self._window, self._now = window, 0


class Traffic:
    """Calls of one guest. sessions: by session id, with the TA's UUID as 16 bytes; tas: by that UUID."""

    __slots__ = ("sessions", "tas")

    def __init__(self) -> None:
        self.sessions: dict[int, tuple[bytes, Rate]] = {}
        self.tas: dict[bytes, Rate] = {}

    def opened(self, session: int, ta: bytes) -> None:
        """A session to a TA is open."""
        if len(self.sessions) < MAX_SESSIONS and (ta in self.tas or len(self.tas) < MAX_TAS):
            self.sessions[session] = ta, Rate()
            self.tas.setdefault(ta, Rate())

    def invoked(self, session: int, now: int) -> None:
        """A command is sent to a session."""
        known = self.sessions.get(session)
        if known is not None:
            ta, rate = known
            rate.count(now)
            self.tas[ta].count(now)

    def closed(self, session: int) -> None:
        """A session is closed."""
        self.sessions.pop(session, None)
