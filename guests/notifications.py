"""Waiting for a notification value, and sending one (Linux 6.1 optee/notif.c)."""

import trio

from guests.uninterruptible import Uninterruptible

MAX_WITHOUT_ASYNC = 255
"""Greatest value where EXCHANGE_CAPABILITIES announces none (Linux' OPTEE_DEFAULT_MAX_NOTIF_VALUE)."""


class Notifications:
    """Who waits for which value. A value that is sent before anyone waits is remembered, once.

    maximum: greatest value that OP-TEE may use; it bounds what is remembered.
    """

    def __init__(self, uninterruptible: Uninterruptible, maximum: int = MAX_WITHOUT_ASYNC) -> None:
        self._uninterruptible = uninterruptible
        self.maximum = maximum
        self._posted: set[int] = set()
        self._waiters: dict[int, trio.Event] = {}

    @property
    def waiting(self) -> frozenset[int]:
        """The values that somebody waits for."""
        return frozenset(self._waiters)

    async def wait(self, value: int) -> bool:
        """Return True when the value was sent, at once if it was posted before; a signal does not end the wait.

        False (Linux' EINVAL and EBUSY) for a value above the maximum and one that is already waited for.
        """
        if value > self.maximum:
            return False
        if value in self._posted:
            self._posted.discard(value)
            return True
        if value in self._waiters:
            return False
        event = self._waiters[value] = trio.Event()
        with self._uninterruptible.scope():
            await event.wait()
        return True

    def send(self, value: int) -> bool:
        """Wake the one who waits for the value, or remember it; False for a value above the maximum."""
        if value > self.maximum:
            return False
        waiter = self._waiters.pop(value, None)
        if waiter is None:
            self._posted.add(value)
        else:
            waiter.set()
        return True
