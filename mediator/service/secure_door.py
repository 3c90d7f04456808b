"""`mediator secure-world`: OP-TEE's model behind the door, turned round, for a mediator in another process.

Each connection is a machine of its own, with an OP-TEE of its own: what a mediator does to it is nobody else's
concern. What breaks the protocol ends the link with one line; what OP-TEE dies of does, too.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from hv_models import link
from hv_models.link import MAX_FRAMES, MAX_MEMORY, SECURE_FEATURES, Feature, LinkError, Message, Request
from hv_models.memory import PAGE_SIZE, Bank, Frames, PageStore, PhysicalMemory
from hv_models.socket_link import LinkClosed, SocketLink
from mediator.service.listener import listening
from mediator.shell import NOTIFICATION_INTERRUPT
from mediator.world import count
from optee.abi.smc import Registers
from optee.config import Config
from optee.errors import SecureWorldFault
from optee.secure_world import SecureWorld

HANDSHAKE_SECONDS: Final = 10.0
"""From connection to SET_FEATURES. Stops idle connections from holding our file descriptors for ever."""
FAREWELL_SECONDS: Final = 1.0
"""For the last line to a peer. Stops one that does not read from keeping its link open."""


class SecureDoor:
    """One mediator's link to an OP-TEE of its own."""

    def __init__(self, sock: trio.socket.SocketType, config: Config) -> None:
        self.reason = ""
        """Why the link was ended, in one line; empty if the mediator left."""
        self.memory = PhysicalMemory()
        self.model = SecureWorld(self.memory, config)
        self.entry: Callable[[Registers], Registers] = self.model.call
        """What a call is given to; somebody may stand before the model."""
        self._link = SocketLink(sock)
        self._features = Feature(0)
        self._banks: dict[int, Bank] = {}
        self._notified = trio.Event()
        self.model.on_notification = lambda _: self._notified.set()

    async def serve(self) -> None:
        """Do what the mediator asks, until it is gone."""
        try:
            await self._greet()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_interrupts)
                while True:
                    await self._do(await self._link.receive())
        except* LinkClosed:
            pass
        except* LinkError as group:
            self.reason = str(group.exceptions[0])
        except* SecureWorldFault as group:
            self.reason = f"OP-TEE died: {group.exceptions[0]}"
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(FAREWELL_SECONDS):
                await self._say_farewell()
            self._link.close()
            for bank in self._banks.values():
                bank.store.close()

    async def _greet(self) -> None:
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                for expected in (Request.GET_FEATURES, Request.SET_FEATURES):
                    message = await self._link.receive()
                    link.close_all(message.fds)
                    if message.request != expected or message.reply:
                        link.refuse(message, f"came where {expected.name} is due")
                    if message.fds:
                        link.refuse(message, "carries no file descriptors")
                    answer = 0
                    if expected is Request.GET_FEATURES:
                        link.nothing(message)
                        answer = SECURE_FEATURES
                    else:
                        self._features = Feature(link.read_number(message))
                        if self._features & ~SECURE_FEATURES:
                            wanted = int(self._features)
                            link.refuse(message, f"asks for features {wanted:#x} that were not offered")
                    await self._link.send(expected, link.number(answer), reply=True)
        except trio.TooSlowError:
            raise LinkError(f"nothing was asked within {HANDSHAKE_SECONDS:g} seconds") from None

    async def _do(self, message: Message) -> None:
        """Answer one message. Raises LinkError, LinkClosed, SecureWorldFault."""
        try:
            if message.reply:
                link.refuse(message, "answers what was not asked")
            if message.fds and message.request != Request.ADD_MEM_REG:
                link.refuse(message, "carries no file descriptors")
            handler = self._HANDLERS.get(message.request)
            if handler is None or (message.request == Request.GET_COUNTS and Feature.COUNTS not in self._features):
                link.refuse(message, "is not for a secure world")
            answer = handler(self, message)
        finally:
            link.close_all(message.fds)
        await self._interrupt()
        await self._link.send(message.request, answer, reply=True)

    def _call(self, message: Message) -> bytes:
        number, regs = link.read_call(message)
        return link.call(number, (*self.entry(regs), *regs[4:]))

    def _add(self, message: Message) -> bytes:
        region = link.read_frames(message)
        if region.base in self._banks:
            link.refuse(message, f"names the region at {region.base:#x}, which there is")
        if len(self._banks) >= MAX_FRAMES:
            link.refuse(message, f"is one more than {MAX_FRAMES} regions")
        pages = region.size // PAGE_SIZE
        held = sum(bank.store.pages for bank in self._banks.values())
        if (held + pages) * PAGE_SIZE > MAX_MEMORY:
            link.refuse(message, f"goes beyond {MAX_MEMORY >> 30} GiB in all")
        fd = os.dup(message.fds[0])
        try:
            store = PageStore.attach(fd, offset=region.offset, pages=pages)
        except (ValueError, OSError) as error:
            os.close(fd)
            why = f"the file cannot be mapped: {error.strerror}" if isinstance(error, OSError) else error
            raise LinkError(f"ADD_MEM_REG: {why}") from None
        bank = Bank("normal world", store, Frames(region.base, pages, region.stride, region.permutation))
        self.memory.add(bank)
        self._banks[region.base] = bank
        return link.number(0)

    def _remove(self, message: Message) -> bytes:
        base = link.read_number(message)
        bank = self._banks.pop(base, None)
        if bank is None:
            link.refuse(message, f"names a region at {base:#x}, which there is not")
        self.memory.remove(bank)
        bank.store.close()
        return link.number(0)

    def _count(self, message: Message) -> bytes:
        return link.counts(count(self.model, link.read_client(message)))

    _HANDLERS: Final[dict[int, Callable[[SecureDoor, Message], bytes]]] = {
        Request.CALL: _call,
        Request.ADD_MEM_REG: _add,
        Request.REM_MEM_REG: _remove,
        Request.GET_COUNTS: _count,
    }

    async def _interrupt(self) -> None:
        """Tell of a notification, before the answer of the call in which it was raised."""
        if self._notified.is_set():
            self._notified = trio.Event()
            if Feature.INTERRUPTS in self._features:
                await self._link.send(Request.INTERRUPT, link.interrupt(NOTIFICATION_INTERRUPT))

    async def _send_interrupts(self) -> None:
        while True:
            await self._notified.wait()
            await self._interrupt()

    async def _say_farewell(self) -> None:
        try:
            await self._link.send(Request.ERROR, link.reason(self.reason or "the secure world ends"))
        except LinkClosed:
            return


async def serve_secure_world(path: Path, config: Config) -> None:
    """Serve at a new socket until SIGINT or SIGTERM. Raises DocumentError where there can be no socket."""

    async def serve(sock: trio.socket.SocketType) -> None:
        door = SecureDoor(sock, config)
        await door.serve()
        if door.reason:
            print(f"a mediator's link ended: {door.reason}", file=sys.stderr, flush=True)

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with listening(path, socket.SOCK_SEQPACKET, serve):
            print(f"OP-TEE is served at {path}", file=sys.stderr, flush=True)
            async for _ in signals:
                return
