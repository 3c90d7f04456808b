"""Sending and receiving the messages of a link under trio."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from hv_models.link import MAX_RECORD, LinkError, Message, close_all, control_size, descriptors, pack, rights, unpack


class LinkClosed(Exception):
    """The other end is gone."""


class SocketLink:
    """One end of a link. Any number of tasks may send, one receives."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._sending = trio.Lock()

    async def send(self, request: int, payload: bytes = b"", *, reply: bool = False, fds: Sequence[int] = ()) -> None:
        """Send one message. Raises LinkClosed. Waits where the peer does not read."""
        record = pack(request, payload, reply=reply)
        async with self._sending:
            try:
                if fds:
                    await self._socket.sendmsg([record], rights(fds))
                else:
                    await self._socket.send(record)
            except (OSError, trio.ClosedResourceError):
                raise LinkClosed from None

    async def receive(self) -> Message:
        """Wait for the next message. Raises LinkClosed at the end, LinkError for what is no message."""
        try:
            try:
                record, control, flags, _ = await self._receive()
            except ConnectionResetError:
                # The peer did not read all that we said; what it said last can still be read.
                record, control, flags, _ = await self._receive()
        except (OSError, trio.ClosedResourceError):
            raise LinkClosed from None
        if not record and not control:
            raise LinkClosed
        fds = descriptors(control) if control else ()
        try:
            return unpack(record, fds, flags=flags)
        except LinkError:
            close_all(fds)
            raise

    async def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        return await self._socket.recvmsg(MAX_RECORD, control_size(), socket.MSG_CMSG_CLOEXEC)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
