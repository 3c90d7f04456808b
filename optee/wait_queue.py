"""Mutexes and condition variables of OP-TEE: a contended one sleeps and wakes by RPC.

Source: OP-TEE core behaviour, section 9. A waiter asks the normal world to WAIT for a notification whose
value names its thread; who unlocks issues the SEND. A WAIT that returns without its SEND waits again.

Threads of the model change only where a generator yields, so short critical sections need no lock; they
only have to call `wake_next` at their end when the queue is not empty, as the unlocking thread would.
"""

from __future__ import annotations

from typing import TypeVar

from optee.abi.rpc import NotificationOperation, RpcCommand
from optee.config import NOTIFICATION_VALUES
from optee.errors import TeeError
from optee.rpc import VALUE_INPUT, rpc_command
from optee.steps import Steps
from optee.threads import Thread

T = TypeVar("T")

_NOTIFICATION = int(RpcCommand.NOTIFICATION)
_WAIT = int(NotificationOperation.WAIT)
_SEND = int(NotificationOperation.SEND)


class _Waiter:
    __slots__ = ("condition", "done", "reader", "value")

    def __init__(self, thread: Thread, *, reader: bool, condition: Condition | None) -> None:
        self.value = NOTIFICATION_VALUES + thread.index
        self.reader = reader
        self.condition = condition
        """What must be signalled before the waiter competes for the mutex."""
        self.done = False


class Mutex:
    """A lock for one writer or many readers, first come first served."""

    __slots__ = ("queue", "readers", "written")

    def __init__(self) -> None:
        self.written = False
        self.readers = 0
        self.queue: list[_Waiter] = []

    def lock(self, thread: Thread) -> Steps[None]:
        """Take the lock for writing."""
        while self.written or self.readers:
            yield from self._sleep(thread, reader=False)
        self.written = True

    def read_lock(self, thread: Thread) -> Steps[None]:
        """Take the lock for reading."""
        while self.written:
            yield from self._sleep(thread, reader=True)
        self.readers += 1

    def unlock(self, thread: Thread) -> Steps[None]:
        """Give up either kind of lock and wake who is next."""
        if self.written:
            self.written = False
        else:
            self.readers -= 1
        if self.queue and not self.readers:
            yield from self.wake_next(thread)

    def wake_next(self, thread: Thread) -> Steps[None]:
        """Wake the first waiter; if it is a reader, all waiting readers."""
        woken: _Waiter | None = None
        for waiter in list(self.queue):
            if waiter.condition is not None or waiter.done or (woken is not None and not waiter.reader):
                continue
            waiter.done = True
            woken = waiter
            yield from rpc_command(thread, _NOTIFICATION, ((VALUE_INPUT, _SEND, waiter.value, 0),))
            if not waiter.reader:
                return

    def _sleep(self, thread: Thread, *, reader: bool, condition: Condition | None = None) -> Steps[None]:
        waiter = _Waiter(thread, reader=reader, condition=condition)
        self.queue.append(waiter)
        if condition is not None:
            yield from self.wake_next(thread)
        while not waiter.done:
            yield from rpc_command(thread, _NOTIFICATION, ((VALUE_INPUT, _WAIT, waiter.value, 0),))
        self.queue.remove(waiter)


def while_locked(mutex: Mutex, thread: Thread, steps: Steps[T]) -> Steps[T]:
    """Run steps with a mutex held. No `finally`: a guest that dies meanwhile must not suspend again."""
    yield from mutex.lock(thread)
    try:
        result = yield from steps
    except TeeError:
        yield from mutex.unlock(thread)
        raise
    yield from mutex.unlock(thread)
    return result


class Condition:
    """A condition variable of one mutex whose critical sections never suspend (see above)."""

    __slots__ = ("_mutex",)

    def __init__(self, mutex: Mutex) -> None:
        self._mutex = mutex

    def wait(self, thread: Thread) -> Steps[None]:
        """Sleep until signalled; the caller checks what it waits for again."""
        yield from self._mutex._sleep(thread, reader=False, condition=self)

    def signal(self) -> None:
        """Let the first waiter compete for the mutex; `Mutex.wake_next` then wakes it."""
        for waiter in self._mutex.queue:
            if waiter.condition is self:
                waiter.condition = None
                return

    def broadcast(self) -> None:
        """Let all waiters compete for the mutex; each wakes the next when it leaves."""
        for waiter in self._mutex.queue:
            if waiter.condition is self:
                waiter.condition = None
