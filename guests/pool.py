"""A bounded pool of sessions on the client's side: so many at once, so many waiting, not faster than so."""

from types import TracebackType
from typing import Self
from uuid import UUID

import trio

from guests.client import Context, Session
from guests.errors import GuestError
from guests.operation import TeeError
from guests.parameters import Output, Parameter
from optee.abi.results import Result


class PoolFullError(GuestError):
    """As many callers wait already as the pool's queue holds."""


class SessionPool:
    """Sessions with one TA for any number of callers.

    limit: sessions, and so operations at once; they are opened when first needed. Keep it below OP-TEE's number
    of threads where other work shall not wait. queue: callers that may wait for one; further ones get
    `PoolFullError` at once. interval: least time in seconds between the beginnings of two operations.
    """

    def __init__(self, context: Context, ta: UUID, *, limit: int, queue: int, interval: float = 0.0) -> None:
        if limit < 1 or queue < 0 or interval < 0:
            raise ValueError("a pool has at least one session, and neither queue nor interval is negative")
        self._context = context
        self._ta = ta
        self._queue = queue
        self._interval = interval
        self._limiter = trio.CapacityLimiter(limit)
        self._idle: list[Session] = []
        self._next_start = float("-inf")

    @property
    def waiting(self) -> int:
        """Callers that wait for a session."""
        return self._limiter.statistics().tasks_waiting

    async def invoke(self, command: int, *parameters: Parameter) -> tuple[Output, ...]:
        """Invoke a command in a session of the pool. Raises PoolFullError, and TeeError as `Session.invoke`.

        A session whose TA has died is closed and replaced when next one is needed.
        """
        statistics = self._limiter.statistics()
        if statistics.borrowed_tokens >= statistics.total_tokens and statistics.tasks_waiting >= self._queue:
            raise PoolFullError(f"{statistics.tasks_waiting} callers wait")
        async with self._limiter:
            await self._pace()
            session = self._idle.pop() if self._idle else await self._context.open_session(self._ta)
            try:
                return await session.invoke(command, *parameters)
            except TeeError as error:
                if error.result == Result.TARGET_DEAD:
                    await session.close()
                raise
            finally:
                if session.is_open:
                    self._idle.append(session)

    async def _pace(self) -> None:
        """Wait until this operation may begin."""
        now = trio.current_time()
        start = max(now, self._next_start)
        self._next_start = start + self._interval
        if start > now:
            await trio.sleep_until(start)

    async def close(self) -> None:
        """Close the sessions that no caller uses: wait for callers first."""
        while self._idle:
            await self._idle.pop().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
