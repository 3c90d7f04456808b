"""A VM whose mediator is another process: what a VMM does at its end of the link."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Final

import trio

from hv_models import link
from hv_models.conduit import REGISTERS, ConduitClosed
from hv_models.link import FEATURES, Feature, Flavour, LinkError, Message, Request
from hv_models.memory import GuestRam
from hv_models.smccc import KVM, XEN, Hypervisor
from hv_models.socket_link import LinkClosed, SocketLink
from optee.abi.smc import Registers

IDLE_SECONDS: Final = 0.005
"""Without a call, until somebody receives who is not waiting for an answer: a notification is late by so much at
most, and a guest that is busy pays nothing for it."""

_HYPERVISORS: Final = {Flavour.KVM: KVM, Flavour.XEN: XEN}


class LinkRefused(Exception):
    """The mediator ended the link, and said why."""


class SocketConduit:
    """The trap of a VM whose calls go to a mediator at the other end of a socket. `open_conduit` makes one."""

    def __init__(self, peer: SocketLink, hypervisor: Hypervisor, vcpus: int, client_id: int) -> None:
        self.client_id = client_id
        """The id by which OP-TEE knows this VM."""
        self.hypervisor = hypervisor
        self.refusal: str | None = None
        """What the mediator said when it ended the link."""
        self._link = peer
        self._vcpus = tuple(trio.Lock() for _ in range(vcpus))
        self._answers: dict[int, Registers] = {}
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._leading = False
        self._last = 0.0
        self._rest = trio.CancelScope()
        self._idle = trio.CancelScope()
        self._idling = False
        self._closed = False
        self._interrupts: dict[int, None] = {}
        self._interrupted = trio.lowlevel.ParkingLot()
        self._stopped = trio.Event()

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        """Execute one SMC or HVC; the hypervisor answers what is not the mediator's. Raises ConduitClosed."""
        if len(regs) != REGISTERS or min(regs) < 0 or max(regs) >> 64:
            raise ValueError(f"a call takes {REGISTERS} registers of 64 bits, not {regs}")
        await trio.lowlevel.checkpoint_if_cancelled()
        lock = self._vcpus[vcpu]
        try:
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()
        try:
            if self._closed:
                raise ConduitClosed(self._why())
            routed = self.hypervisor.route(regs)
            if routed is not None:
                await trio.lowlevel.checkpoint()
                return routed
            # A vCPU that executes an SMC cannot be interrupted: once sent, the answer is waited for.
            try:
                if not self._link.send_nowait(link.call_record(vcpu, regs)):
                    with trio.CancelScope(shield=True):
                        await self._link.send(Request.CALL, link.call(vcpu, regs))
            except LinkClosed:
                raise ConduitClosed(self._why()) from None
            return await self._answer(vcpu)
        finally:
            lock.release()

    async def _answer(self, vcpu: int) -> Registers:
        """Wait for the answer of a vCPU's call. The first who waits receives for all, so that one who is alone need not
        be woken by another task; the next one takes over.
        """
        try:
            while (answer := self._answers.pop(vcpu, None)) is None:
                if self._closed:
                    raise ConduitClosed(self._why())
                if self._leading:
                    self._waiting[vcpu] = trio.lowlevel.current_task()
                    await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
                else:
                    self._leading = True
                    if self._idling:
                        self._idle.cancel()
                    try:
                        await self._lead()
                    except LinkClosed:
                        self._end()
                    except LinkError as error:
                        self.refusal = str(error)
                        self._end()
                    finally:
                        self._leading = False
        finally:
            if not self._leading:
                self._wake(next(iter(self._waiting), None))
                self._last = trio.current_time()
                if self._rest.deadline == inf:
                    self._rest.deadline = self._last + IDLE_SECONDS
        return answer

    async def _lead(self) -> None:
        """Receive one message. Raises LinkClosed, LinkError; a cancellation has to wait until the answer is there."""
        await trio.lowlevel.cancel_shielded_checkpoint()  # others' turn, while the mediator works
        message = self._link.poll()
        if message is None:
            try:
                await self._link.readable()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):  # costs more than all else here, so it is the exception
                    await self._link.readable()
            message = self._link.receive_nowait()
        if message is not None:
            self._take(message)

    def _wake(self, vcpu: int | None) -> None:
        task = None if vcpu is None else self._waiting.pop(vcpu, None)
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def wait_for_interrupt(self) -> int:
        """Wait for the interrupt that has been pending for longest, and acknowledge it. Raises ConduitClosed."""
        await trio.lowlevel.checkpoint()
        while not self._interrupts:
            if self._closed:
                raise ConduitClosed(self._why())
            await self._interrupted.park()
        interrupt = next(iter(self._interrupts))
        del self._interrupts[interrupt]
        return interrupt

    async def stop(self) -> None:
        """End the VM in order: returns when everything of it was given back. Raises ConduitClosed."""
        try:
            await self._link.send(Request.STOP)
        except LinkClosed:
            raise ConduitClosed(self._why()) from None
        await self._stopped.wait()

    async def run(self) -> None:
        """Take what the mediator sends while no call is under way, until it ends the link."""
        try:
            while not self._closed:
                await self._quiet()
                with trio.CancelScope() as self._idle:
                    self._idling = True
                    await self._link.readable()
                    self._idling = False
                    message = None if self._leading else self._link.receive_nowait()
                    if message is not None:
                        self._take(message)
        except LinkClosed:
            pass
        except LinkError as error:
            self.refusal = str(error)
        finally:
            self._end()

    async def _quiet(self) -> None:
        """Wait until nobody receives who waits for an answer, and nobody did for a while."""
        while self._leading or trio.current_time() < self._last + IDLE_SECONDS:
            with trio.CancelScope(deadline=inf if self._leading else self._last + IDLE_SECONDS) as self._rest:
                await trio.sleep_forever()

    def _end(self) -> None:
        """Nothing comes any more."""
        self._closed = True
        self._idle.cancel()
        self._rest.cancel()
        for vcpu in list(self._waiting):
            self._wake(vcpu)
        self._interrupted.unpark_all()
        self._stopped.set()

    def _take(self, message: Message) -> None:
        if message.fds:
            link.close_all(message.fds)
            link.refuse(message, "carries no file descriptors")
        if message.request == Request.CALL and message.reply:
            vcpu, regs = link.read_call(message)
            if vcpu >= len(self._vcpus):
                link.refuse(message, f"answers vCPU {vcpu}, which there is not")
            self._answers[vcpu] = regs
            self._wake(vcpu)
        elif message.request == Request.INTERRUPT:
            self._interrupts[link.read_interrupt(message)] = None
            self._interrupted.unpark_all()
        elif message.request == Request.STOP and message.reply:
            self._stopped.set()
        elif message.request == Request.ERROR:
            self.refusal = link.read_reason(message)
        else:
            link.refuse(message, "is not for a VMM")

    def _why(self) -> str:
        return self.refusal or "the mediator is gone"


async def _ask(peer: SocketLink, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
    try:
        await peer.send(request, payload, fds=fds)
        answer = await peer.receive()
    except LinkClosed:
        raise LinkRefused("the mediator is gone") from None
    if answer.request == Request.ERROR:
        raise LinkRefused(link.read_reason(answer))
    if answer.request != request or not answer.reply:
        link.refuse(answer, f"came where the answer to {request.name} is due")
    return link.read_number(answer)


@asynccontextmanager
async def open_conduit(
    sock: trio.socket.SocketType, flavour: Flavour, name: str, vcpus: int, ram: Sequence[GuestRam]
) -> AsyncIterator[SocketConduit]:
    """Announce a VM over a connected socket; it lives as long as the block.

    Raises LinkRefused where the mediator does not want it, LinkError where it does not speak the protocol.
    """
    peer = SocketLink(sock)
    try:
        offered = Feature(await _ask(peer, Request.GET_FEATURES) & FEATURES)
        await _ask(peer, Request.SET_FEATURES, link.number(offered))
        await _ask(peer, Request.SET_VM, link.vm(flavour, vcpus, name))
        regions = [link.MemoryRegion(part.base, part.size, 0, 0) for part in ram]
        await _ask(peer, Request.SET_MEM_TABLE, link.memory_table(regions), [part.store.fd for part in ram])
        client_id = await _ask(peer, Request.START)
        conduit = SocketConduit(peer, _HYPERVISORS[flavour], vcpus, client_id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(conduit.run)
            yield conduit
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # only the block's own: its caller need not know of our nursery
            raise group.exceptions[0] from None
        raise
    finally:
        peer.close()
