"""A VM whose mediator is another process: what a VMM does at its end of the link."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from hv_models import link
from hv_models.conduit import REGISTERS, ConduitClosed
from hv_models.link import FEATURES, Feature, Flavour, LinkError, Message, Request
from hv_models.memory import GuestRam
from hv_models.smccc import KVM, XEN, Hypervisor
from hv_models.socket_link import LinkClosed, SocketLink
from optee.abi.smc import Registers

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
        self._waiting = tuple(trio.lowlevel.ParkingLot() for _ in range(vcpus))
        self._closed = False
        self._interrupts: dict[int, None] = {}
        self._interrupted = trio.lowlevel.ParkingLot()
        self._stopped = trio.Event()

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        """Execute one SMC or HVC; the hypervisor answers what is not the mediator's. Raises ConduitClosed."""
        if len(regs) != REGISTERS or any(value < 0 or value >> 64 for value in regs):
            raise ValueError(f"a call takes {REGISTERS} registers of 64 bits, not {regs}")
        async with self._vcpus[vcpu]:
            if self._closed:
                raise ConduitClosed(self._why())
            routed = self.hypervisor.route(regs)
            if routed is not None:
                return routed
            # A vCPU that executes an SMC cannot be interrupted: once sent, the answer is waited for.
            with trio.CancelScope(shield=True):
                try:
                    await self._link.send(Request.CALL, link.call(vcpu, regs))
                except LinkClosed:
                    raise ConduitClosed(self._why()) from None
                while vcpu not in self._answers:
                    if self._closed:
                        raise ConduitClosed(self._why())
                    await self._waiting[vcpu].park()
            return self._answers.pop(vcpu)

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
        """Take what the mediator sends, until it ends the link."""
        try:
            while True:
                self._take(await self._link.receive())
        except LinkClosed:
            pass
        except LinkError as error:
            self.refusal = str(error)
        finally:
            self._closed = True
            for lot in self._waiting:
                lot.unpark_all()
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
            self._waiting[vcpu].unpark_all()
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
