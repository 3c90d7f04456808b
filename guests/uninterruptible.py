"""Waits in the guest's kernel that a signal to the process does not end, but that the VM's death does."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import trio

T = TypeVar("T")


class Uninterruptible:
    """Makes shielded scopes, and takes all shields away when the VM dies (Linux' TASK_UNINTERRUPTIBLE).

    Cancelling a client is a signal to a process: a call that OP-TEE has begun goes on to its end. Cancelling
    the guest as a whole is a power cut: whoever runs the guest calls `lift` then, and every wait ends.
    """

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self.dead = False

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Shield the block from cancellation until `lift`."""
        with trio.CancelScope(shield=not self.dead) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    async def finish(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Do something to its end, cancelled or not: where `Cancelled` comes out of it nothing was done, so it is done
        again in a `scope`. Most are not cancelled, and a scope costs more than a call.
        """
        try:
            return await operation()
        except trio.Cancelled:
            with self.scope():
                return await operation()

    def lift(self) -> None:
        """The VM is dead: nothing is shielded any more, now and later."""
        self.dead = True
        for scope in self._scopes:
            scope.shield = False
