"""Sending and receiving the messages of a link under trio.

A record that the socket takes at once is sent without a checkpoint, and receiving is one: so a call and its answer
cost each end one round of the event loop, and no end can keep others of its process from their turn.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Final

import trio

from hv_models.link import MAX_RECORD, LinkError, Message, close_all, control_size, descriptors, pack, rights, unpack

HALT_POLL: Final = 200_000
"""Nanoseconds for which an end looks for a message before it sleeps, where its caller allows that: to be woken on
another CPU takes longer than most calls. Name and value are those of KVM's halt_poll_ns, for the same reason."""

_CONTROL = control_size()
_FLAGS = int(socket.MSG_CMSG_CLOEXEC)


class LinkClosed(Exception):
    """The other end is gone."""


class SocketLink:
    """One end of a link, which takes the socket over. Any number of tasks may send, one receives."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = socket.socket(fileno=sock.detach())
        self._fd = self._socket.fileno()
        self._sending = trio.Lock()
        self._prompt = True
        self._asleep = 0

    async def send(self, request: int, payload: bytes = b"", *, reply: bool = False, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises LinkClosed. Waits where the peer does not read, and only there."""
        record = pack(request, payload, reply=reply)
        if fds:
            async with self._sending:
                while not self._try(record, fds):
                    await self._writable()
        elif not self.send_nowait(record):
            async with self._sending:
                while not self._try(record):
                    await self._writable()

    def send_nowait(self, record: bytes) -> bool:
        """Send one record, if that does not have to wait; else False. Raises LinkClosed."""
        return not self._sending.locked() and self._try(record)

    async def receive(self, *, poll: bool = False) -> Message:
        """Wait for the next message. Raises LinkClosed at the end, LinkError for what is no message.

        poll: see `poll`.
        """
        if poll:
            await trio.lowlevel.checkpoint()
            message = self.poll()
            if message is not None:
                return message
        while True:
            await self.readable()
            message = self.receive_nowait()
            if message is not None:
                return message

    async def readable(self) -> None:
        """Wait until there is something to receive. Raises LinkClosed."""
        try:
            await trio.lowlevel.wait_readable(self._fd)
        except (OSError, ValueError, trio.ClosedResourceError):
            raise LinkClosed from None

    def poll(self) -> Message | None:
        """The next message if it comes within HALT_POLL, for which time nothing else of this process goes on; None if
        it does not, or the last one took longer than that. Raises LinkClosed, LinkError.
        """
        begun = perf_counter_ns()
        while self._prompt:
            message = self.receive_nowait()
            if message is not None:
                return message
            if perf_counter_ns() - begun > HALT_POLL:
                break
            os.sched_yield()  # the other end may want this CPU
        self._asleep = begun
        return None

    def receive_nowait(self) -> Message | None:
        """The next message; None if there is none yet. Raises LinkClosed, LinkError."""
        message = self._receive()
        if message is not None and self._asleep:
            self._prompt = perf_counter_ns() - self._asleep < HALT_POLL
            self._asleep = 0
        return message

    def _receive(self) -> Message | None:
        try:
            try:
                record, control, flags, _ = self._socket.recvmsg(MAX_RECORD, _CONTROL, _FLAGS)
            except ConnectionResetError:
                # The peer did not read all that we said; what it said last can still be read.
                record, control, flags, _ = self._socket.recvmsg(MAX_RECORD, _CONTROL, _FLAGS)
        except BlockingIOError:
            return None
        except OSError:
            raise LinkClosed from None
        if not record and not control:
            raise LinkClosed
        fds = descriptors(control) if control else ()
        try:
            return unpack(record, fds, flags=flags)
        except LinkError:
            close_all(fds)
            raise

    def close(self) -> None:
        """Close this end."""
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)
            self._fd = -1
            self._socket.close()

    def _try(self, record: bytes, fds: Sequence[int] = ()) -> bool:
        try:
            if fds:
                self._socket.sendmsg([record], rights(fds))
            else:
                self._socket.send(record)
        except BlockingIOError:
            return False
        except OSError:
            raise LinkClosed from None
        return True

    async def _writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except (OSError, ValueError, trio.ClosedResourceError):
            raise LinkClosed from None
