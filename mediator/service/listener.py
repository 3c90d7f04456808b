"""Unix sockets that others connect to: who may, how many, and what happens to the file."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from mediator.documents import DocumentError

MAX_CONNECTIONS: Final = 2048
"""Connections at once to one socket. Stops a peer from using up our file descriptors by connecting over and over."""
BACKLOG: Final = 128
RETRY_SECONDS: Final = 0.1
"""After a connection that could not be accepted."""
_CREDENTIALS: Final = 12
_UID: Final = slice(4, 8)

Serve = Callable[[trio.socket.SocketType], Awaitable[object]]


@asynccontextmanager
async def listening(path: Path, kind: socket.SocketKind, serve: Serve) -> AsyncIterator[None]:
    """Serve each connection to a new Unix socket in a task of its own while the block runs.

    The file has mode 0600, and a peer must be of this user (or root); it goes when the block ends, and so do all
    connections. `serve` closes the socket that it is given. Raises DocumentError where there can be no socket.
    """
    with trio.socket.socket(socket.AF_UNIX, kind) as listener:
        await _bind(listener, path)
        bound = _identity(path)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_accept, listener, serve)
                yield
                nursery.cancel_scope.cancel()
        finally:
            if _identity(path) == bound:  # else somebody has taken it away, and perhaps put another there
                _remove(path)


async def _bind(listener: trio.socket.SocketType, path: Path) -> None:
    await _remove_stale(listener, path)
    mask = os.umask(0o177)
    try:
        await listener.bind(str(path))
    except OSError as error:
        raise DocumentError([f"{path}: {error.strerror or error}"]) from None
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)


def _identity(path: Path) -> tuple[int, int] | None:
    """Of the file that is there now, if there is one; nobody else's is the same as long as the socket is open."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _is_socket(path: Path) -> bool:
    return path.is_socket() and not path.is_symlink()


async def _remove_stale(listener: trio.socket.SocketType, path: Path) -> None:
    """Remove the socket of a process that was killed; one that somebody serves stays."""
    if _is_socket(path):
        with trio.socket.socket(socket.AF_UNIX, listener.type) as probe:
            try:
                await probe.connect(str(path))
            except ConnectionRefusedError:
                _remove(path)
            except OSError:
                return  # `bind` says what is wrong


async def _accept(listener: trio.socket.SocketType, serve: Serve) -> None:
    room = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def one(sock: trio.socket.SocketType) -> None:
        try:
            with sock:
                await serve(sock)
        finally:
            room.release_on_behalf_of(sock)

    async with trio.open_nursery() as nursery:
        while True:
            try:
                sock, _ = await listener.accept()
            except OSError:  # out of file descriptors, or the peer is gone again
                await trio.sleep(RETRY_SECONDS)
                continue
            if not same_user(sock):
                sock.close()
                continue
            await room.acquire_on_behalf_of(sock)
            nursery.start_soon(one, sock)


def same_user(sock: trio.socket.SocketType) -> bool:
    """Whether the process at the other end is of this user, or root's (SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS)
    return int.from_bytes(credentials[_UID], "little") in (os.geteuid(), 0)
