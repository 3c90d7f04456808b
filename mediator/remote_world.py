"""A secure world in another process: the door for VMs, turned round. `docs/attach.md` describes every byte.

The mediator calls, the secure world answers. Before a call goes out, whatever physical memory came or went since
the last one is announced, so that OP-TEE reaches by address what it would reach on the same machine. A peer that
breaks the protocol, or is gone, is a fault of the secure world (R25): no call is answered any more.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Final

import trio

from hv_models import link
from hv_models.link import SECURE_FEATURES, Counts, Feature, FrameRegion, LinkError, Message, Request
from hv_models.machine import MEDIATOR_BASE, TABLES_BASE, Machine
from hv_models.memory import PAGE_SIZE, Bank
from hv_models.socket_link import LinkClosed, SocketLink
from mediator.core.steps import Regs
from mediator.world import SecureWorldEnd
from optee.errors import SecureWorldFault

HANDSHAKE_SECONDS: Final = 10.0
"""For a secure world to say what it offers."""
ANSWER_SECONDS: Final = 30.0
"""For the answer to one SMC: OP-TEE gives the CPU back at every interrupt, so what takes seconds hangs."""
ANSWER: Final = 4
"""x0 to x3 of an answer are OP-TEE's."""
_NUMBERS: Final = 1 << 32
_NO_COUNTS: Final = Counts(0, 0, 0, 0, 0, 0)


class RemoteSecureWorld(SecureWorldEnd):
    """The secure world that serves at a socket; it answers within `connected`."""

    def __init__(self, machine: Machine, path: Path) -> None:
        super().__init__(machine)
        self.died = ""
        """Why nothing is answered any more, in one line."""
        self.on_notification: Callable[[], object] = lambda: None
        """Called when OP-TEE raises its notification interrupt."""
        self.on_death: Callable[[str], object] = lambda why: None
        """Called when the link has ended without our doing."""
        self.counted = False
        self.counts: dict[int, Counts] = {}
        """What OP-TEE said of each client when it was last asked; nothing if it cannot be asked."""
        self._path = path
        self._link: SocketLink | None = None
        self._features = Feature(0)
        self._numbers = count()
        self._answers: dict[int, Regs | None] = {}
        """Calls that are with OP-TEE, and the answers that nobody has taken yet."""
        self._asked: dict[int, int] = {}
        """How many answers of other kinds are due."""
        self._told: list[Counts] = []
        self._came = trio.lowlevel.ParkingLot()
        self._banks: dict[Bank, int] = {}
        self._seen = -1
        self._sending = trio.Lock()

    async def forward(self, regs: Regs) -> Regs:
        """Execute one SMC: x0..x7 in, x0..x3 out. Raises SecureWorldFault."""
        number = next(self._numbers) % _NUMBERS
        answer: Regs | None = None
        # OP-TEE cannot be called off, and the core waits for its answer.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_SECONDS):
            self._answers[number] = None
            try:
                async with self._sending:
                    await self._announce_memory()
                    self.note_call(regs)
                    await self._send(Request.CALL, link.call(number, regs))
                while (answer := self._answers[number]) is None:
                    self._check()
                    await self._came.park()
            finally:
                del self._answers[number]
        if answer is None:
            self._die(f"no answer within {ANSWER_SECONDS:g} seconds")
            raise SecureWorldFault(self.died)
        self.note_answer(regs, answer)
        return answer

    def counts_of(self, client: int) -> Counts:
        """See `SecureWorldEnd`; as OP-TEE said it in `settle`, and 0 if it does not."""
        return self.counts.get(client, _NO_COUNTS)

    async def settle(self, clients: set[int]) -> None:
        """Announce what memory came or went, and ask what OP-TEE holds of these clients, if it is still there."""
        try:
            async with self._sending:
                await self._announce_memory()
            if Feature.COUNTS in self._features:
                for client in sorted({0, *clients}):
                    await self._ask(Request.GET_COUNTS, link.client(client))
                    while self._asked.get(Request.GET_COUNTS, 0):
                        self._check()
                        await self._came.park()
                    self.counts[client] = self._told.pop()
                self.counted = True
        except SecureWorldFault:
            self.counted = False

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Be connected while the block runs.

        Raises:
            LinkError: nobody serves there, or somebody who does not speak the protocol.

        """
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                await sock.connect(str(self._path))
            except OSError as error:
                raise self._fault(error.strerror or str(error)) from None
            self._link = peer = SocketLink(sock)
        try:
            await self._greet(peer)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run, peer)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
                    self.close()
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1:  # only the block's own: its caller need not know of our nursery
                raise group.exceptions[0] from None
            raise
        finally:
            peer.close()

    async def _greet(self, peer: SocketLink) -> None:
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                self._features = Feature(await _ask(peer, Request.GET_FEATURES) & SECURE_FEATURES)
                if await _ask(peer, Request.SET_FEATURES, link.number(self._features)):
                    raise LinkError("it refuses the features that it offered")
        except trio.TooSlowError:
            raise self._fault(f"no answer within {HANDSHAKE_SECONDS:g} seconds") from None
        except LinkClosed:
            raise self._fault("it is gone") from None
        except LinkError as error:
            raise self._fault(str(error)) from None

    def _fault(self, why: str) -> LinkError:
        return LinkError(f"the secure world at {self._path}: {why}")

    async def _run(self, peer: SocketLink) -> None:
        """Take what the secure world says, until it is gone."""
        try:
            while True:
                self._take(await peer.receive())
        except LinkClosed:
            self._die("it is gone")
        except LinkError as error:
            self._die(str(error))
        self.on_death(self.died)

    def close(self) -> None:
        """End the link: whoever waits for an answer learns that there is none."""
        self._die("the mediator ends")
        if self._link is not None:
            self._link.close()

    def _die(self, why: str) -> None:
        self.died = self.died or str(self._fault(why))
        self._came.unpark_all()

    def _check(self) -> None:
        if self.died:
            raise SecureWorldFault(self.died)

    async def _send(self, request: Request, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        self._check()
        assert self._link is not None
        try:
            await self._link.send(request, payload, fds=fds)
        except LinkClosed:
            while not self.died:  # what it said last may not have been read yet
                await self._came.park()
            self._check()

    async def _ask(self, request: Request, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        self._asked[request] = self._asked.get(request, 0) + 1
        await self._send(request, payload, fds)

    async def _announce_memory(self) -> None:
        memory = self.machine.memory
        if memory.changes == self._seen:
            return
        self._seen = memory.changes
        banks = {bank: None for bank in memory.banks if not TABLES_BASE <= bank.frames.base < MEDIATOR_BASE}
        for bank in [bank for bank in self._banks if bank not in banks]:
            await self._ask(Request.REM_MEM_REG, link.number(self._banks.pop(bank)))
        for bank in [bank for bank in banks if bank not in self._banks]:
            frames, store = bank.frames, bank.store
            size = frames.pages * PAGE_SIZE
            region = FrameRegion(frames.base, size, store.offset, frames.stride, frames.permutation)
            self._banks[bank] = frames.base
            await self._ask(Request.ADD_MEM_REG, link.frames(region), (store.fd,))

    def _take(self, message: Message) -> None:
        if message.fds:
            link.close_all(message.fds)
            link.refuse(message, "carries no file descriptors")
        if message.request == Request.CALL and message.reply:
            number, regs = link.read_call(message)
            if self._answers.get(number, ()) is not None:
                link.refuse(message, f"answers call {number}, which is not under way")
            self._answers[number] = regs[:ANSWER]
            self._came.unpark_all()
        elif message.request == Request.INTERRUPT and not message.reply and Feature.INTERRUPTS in self._features:
            link.read_interrupt(message)
            self.on_notification()
        elif message.request == Request.ERROR:
            raise LinkError(link.read_reason(message))
        elif message.reply and self._asked.get(message.request, 0):
            if message.request == Request.GET_COUNTS:
                self._told.append(link.read_counts(message))
            elif link.read_number(message):
                link.refuse(message, "was refused")
            self._asked[message.request] -= 1
            self._came.unpark_all()
        else:
            link.refuse(message, "is not for a mediator")


async def _ask(peer: SocketLink, request: Request, payload: bytes = b"") -> int:
    await peer.send(request, payload)
    answer = await peer.receive()
    if answer.fds:
        link.close_all(answer.fds)
        link.refuse(answer, "carries no file descriptors")
    if answer.request == Request.ERROR:
        raise LinkError(link.read_reason(answer))
    if answer.request != request or not answer.reply:
        link.refuse(answer, f"came where the answer to {request.name} is due")
    return link.read_number(answer)
