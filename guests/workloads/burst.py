"""Workload `burst`: many calls to one TA, by clients that hold themselves back in one way or another, or not at all."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Final, TypeAlias
from uuid import UUID

import trio

from guests.guest import Guest
from guests.parameters import Value
from guests.pool import SessionPool

CLIENTS: Final = 16
"""Processes that call, each with a session of its own."""
DELAY: Final = 0.005
"""Seconds between the beginnings of two calls, as people put there when a TA dies under load."""
POOL_SESSIONS: Final = 2
_PROCESS: Final = 0  # the command of the TAs that are called

Invoke: TypeAlias = Callable[..., Awaitable[object]]


class Form(StrEnum):
    """How calls are held back."""

    BARE = "bare"
    """not at all"""
    DELAY = "delay"
    """by a fixed delay between two calls"""
    POOL = "pool"
    """by a bounded pool of sessions in the client"""
    BACK_PRESSURE = "back-pressure"
    """not by the clients: the mediator lets them wait"""


@dataclass(frozen=True, slots=True)
class Burst:
    """What became of a burst. Times are seconds: from the wish to call to the answer.

    thread_limits: answers ETHREAD_LIMIT to the driver. queue: the most that waited for their time, for a session of the
    pool, or for a thread, as the form is. seconds: until the last answer. times: of calls that were answered as they
    should be.
    """

    form: Form
    calls: int
    thread_limits: int
    queue: int
    seconds: float
    times: tuple[float, ...]

    @property
    def answered(self) -> int:
        """Calls that were answered, of `calls`."""
        return len(self.times)

    @property
    def bound(self) -> int | None:
        """The most that may wait in the clients, None if nothing bounds it."""
        return CLIENTS if self.form is Form.POOL else None

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.answered / self.seconds if self.seconds else 0.0

    def took(self, share: float) -> float:
        """The time that this share of the calls took at most."""
        return self.times[max(ceil(share * len(self.times)) - 1, 0)] if self.times else 0.0


async def burst(guest: Guest, ta: UUID, form: Form, *, calls: int, within: float = 0.0) -> Burst:
    """Make `calls` calls, evenly over `within` seconds; with 0 each client calls again as soon as it has its answer."""
    return await _Load(guest, form, calls, within).run(ta)


class _Load:
    def __init__(self, guest: Guest, form: Form, calls: int, within: float) -> None:
        self._guest = guest
        self._form = form
        self._calls = calls
        self._within = within
        self._waiting: Callable[[], int] = lambda: guest.driver.statistics().waiting_for_thread
        self._queue = 0
        self._times: list[float] = []
        self._next_start = 0.0
        self._delayed = 0

    async def run(self, ta: UUID) -> Burst:
        before = self._guest.driver.statistics().thread_limits
        async with self._guest.context() as context:
            if self._form is Form.POOL:
                async with SessionPool(context, ta, limit=POOL_SESSIONS, queue=CLIENTS) as pool:
                    self._waiting = lambda: pool.waiting
                    seconds = await self._clients([pool.invoke] * CLIENTS)
            else:
                if self._form is Form.DELAY:
                    self._waiting = lambda: self._delayed
                sessions = [await context.open_session(ta) for _ in range(CLIENTS)]
                seconds = await self._clients([session.invoke for session in sessions])
                for session in sessions:
                    await session.close()
        thread_limits = self._guest.driver.statistics().thread_limits - before
        return Burst(self._form, self._calls, thread_limits, self._queue, seconds, tuple(sorted(self._times)))

    async def _clients(self, invokes: list[Invoke]) -> float:
        began = self._next_start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number, invoke in enumerate(invokes):
                nursery.start_soon(self._client, invoke, began, range(number, self._calls, len(invokes)))
        return trio.current_time() - began

    async def _client(self, invoke: Invoke, began: float, numbers: range) -> None:
        for number in numbers:
            if self._within:
                await trio.sleep_until(began + self._within * number / self._calls)
            wished = trio.current_time()
            if self._form is Form.DELAY:
                await self._delay(wished)
            answer = await invoke(_PROCESS, Value(number))
            self._queue = max(self._queue, self._waiting())
            if answer == ((number + 1, 0),):
                self._times.append(trio.current_time() - wished)

    async def _delay(self, now: float) -> None:
        start = max(self._next_start, now)
        self._next_start = start + DELAY
        self._delayed += 1
        await trio.sleep_until(start)
        self._delayed -= 1
