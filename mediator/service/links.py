"""The door for VMs of other processes: one task per link, one per vCPU call in flight.

A peer can do as it likes: what breaks the protocol ends its own link with one line, its VM is destroyed, and
nobody else notices. What a link may hold is bounded by the constants of `hv_models.link` and those here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Set
from enum import StrEnum
from typing import Final

import trio

from hv_models import link
from hv_models.link import FEATURES, Feature, Flavour, LinkError, MemoryRegion, Message, Request
from hv_models.machine import MAX_CLIENT_ID, RamBlock
from hv_models.memory import PAGE_SIZE, PageStore
from hv_models.socket_link import LinkClosed, SocketLink
from hv_models.vm import VirtualMachine
from mediator.board import BoardError, MediatedMachine
from mediator.core.steps import Reply, Step
from optee.abi.smc import Registers

HANDSHAKE_SECONDS: Final = 10.0
"""From connection to START. Stops idle connections from holding our file descriptors for ever."""
FAREWELL_SECONDS: Final = 1.0
"""For the last line to a peer. Stops one that does not read from keeping its link open."""
_ASKED: Final = (
    Request.GET_FEATURES, Request.SET_FEATURES, Request.SET_VM, Request.SET_MEM_TABLE, Request.START
)  # fmt: skip


class Ending(StrEnum):
    """How the life of a VM behind a link ended."""

    FINISHED = "finished"
    """it said STOP"""
    KILLED = "killed"
    """its end of the link was gone"""
    FAILED = "failed"
    """it broke the protocol, or was refused"""


class Link:
    """One VM's link, from its first message to its last.

    Its client id is the lowest free one that is not `reserved` unless given.
    """

    def __init__(
        self,
        board: MediatedMachine,
        sock: trio.socket.SocketType,
        client_id: int | None = None,
        *,
        reserved: Set[int] = frozenset(),
    ) -> None:
        self.vm: VirtualMachine | None = None
        self.reason = ""
        """Why the link was ended, in one line; empty if it was ended in order."""
        self._board = board
        self._client_id = client_id
        self._reserved = reserved
        self._link = SocketLink(sock)
        self._busy: set[int] = set()
        self._interrupt = trio.Event()

    async def serve(self, born: Callable[[VirtualMachine], None] = lambda vm: None) -> Ending:
        """Do what the peer asks, until its VM has ended and everything of it is given back."""
        ending = Ending.FAILED
        try:
            interrupts = await self._set_up()
            assert self.vm is not None
            ending, self.reason = Ending.KILLED, "the mediator ends the VM"  # unless something else is found out
            born(self.vm)
            async with trio.open_nursery() as calls:
                if interrupts:
                    self.vm.on_interrupt = lambda: self._interrupt.set()
                    calls.start_soon(self._send_interrupts, self.vm)
                try:
                    await self._take_calls(self.vm, calls)
                    ending, self.reason = Ending.FINISHED, ""
                except LinkClosed:
                    self.reason = "the peer is gone"
                except LinkError as error:
                    ending, self.reason = Ending.FAILED, str(error)
                calls.cancel_scope.cancel()
        except LinkClosed:
            ending = Ending.KILLED
            self.reason = "the peer is gone"
        except LinkError as error:
            self.reason = str(error)
        finally:
            with trio.CancelScope(shield=True):
                await self._bury()
                with trio.move_on_after(FAREWELL_SECONDS):
                    await self._say_farewell(ending)
            self._link.close()
        return ending

    async def _set_up(self) -> bool:
        """Features, VM, memory, START, in this order; True if the peer wants interrupts."""
        features = Feature(0)
        what: tuple[Flavour, int, str] | None = None
        blocks: list[RamBlock] = []
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                for expected in _ASKED:
                    message = await self._link.receive()
                    try:
                        answer = 0
                        if message.request != expected or message.reply:
                            link.refuse(message, f"came where {expected.name} is due")
                        if message.fds and expected is not Request.SET_MEM_TABLE:
                            link.refuse(message, "carries no file descriptors")
                        if expected is Request.GET_FEATURES:
                            link.nothing(message)
                            answer = FEATURES
                        elif expected is Request.SET_FEATURES:
                            features = Feature(link.read_number(message))
                            if features & ~FEATURES:
                                link.refuse(message, f"asks for features {int(features):#x} that were not offered")
                        elif expected is Request.SET_VM:
                            what = link.read_vm(message)
                        elif expected is Request.SET_MEM_TABLE:
                            blocks = _attach(message, link.read_memory_table(message))
                        else:
                            link.nothing(message)
                            assert what is not None
                            answer = await self._announce(*what, blocks)
                            blocks = []
                    finally:
                        link.close_all(message.fds)
                    await self._link.send(message.request, link.number(answer), reply=True)
        except trio.TooSlowError:
            raise LinkError(f"no VM was started within {HANDSHAKE_SECONDS:g} seconds") from None
        finally:
            for block in blocks:
                if block.store is not None:
                    block.store.close()
        return Feature.INTERRUPTS in features

    async def _announce(self, flavour: Flavour, vcpus: int, name: str, blocks: list[RamBlock]) -> int:
        """Make the VM, and tell OP-TEE."""
        client = self._client_id
        if client is None:
            if any(vm.name == name for vm in self._board.machine.vms.values()):
                raise LinkError(f"START: a VM {name} runs already")
            taken = self._board.machine.vms.keys() | self._reserved
            client = next((n for n in range(1, MAX_CLIENT_ID + 1) if n not in taken), 0)
        try:
            self.vm = await self._board.create(flavour.name.lower(), name, ram=blocks, vcpus=vcpus, client_id=client)
        except (ValueError, BoardError) as error:
            raise LinkError(f"START: {error}") from None
        return self.vm.client_id

    async def _take_calls(self, vm: VirtualMachine, calls: trio.Nursery) -> None:
        """Until the peer says STOP. Raises LinkClosed, LinkError."""
        service = self._board.service
        alone = False
        while True:
            message = await self._link.receive(poll=alone and not service.under_way and not self._busy)
            if message.fds:
                link.close_all(message.fds)
                link.refuse(message, "carries no file descriptors")
            if message.request == Request.CALL and not message.reply:
                alone = service.latest is vm
                vcpu, regs = link.read_call(message)
                if vcpu not in vm.vcpus:
                    link.refuse(message, f"names vCPU {vcpu}, which there is not")
                if vcpu in self._busy:
                    link.refuse(message, f"names vCPU {vcpu}, whose last call has not returned")
                step = service.enter(vm, vcpu, regs)
                if not isinstance(step, Reply) or not self._link.send_nowait(
                    link.call_record(vcpu, step.regs, reply=True)
                ):
                    self._busy.add(vcpu)
                    calls.start_soon(self._call, vm, vcpu, regs, step)
            elif message.request == Request.STOP and not message.reply:
                link.nothing(message)
                return
            else:
                link.refuse(message, "came where CALL or STOP is due")

    async def _call(self, vm: VirtualMachine, vcpu: int, regs: Registers, step: Step | None) -> None:
        """What is left of a call that has to wait, for its answer or for the peer to read that."""
        answer = step.regs if isinstance(step, Reply) else await self._board.service.finish(vm, vcpu, regs, step)
        self._busy.discard(vcpu)
        try:
            await self._link.send(Request.CALL, link.call(vcpu, answer), reply=True)
        except LinkClosed:
            return  # whoever receives finds out, too

    async def _send_interrupts(self, vm: VirtualMachine) -> None:
        while True:
            await self._interrupt.wait()
            self._interrupt = trio.Event()
            while (interrupt := vm.acknowledge()) is not None:
                try:
                    await self._link.send(Request.INTERRUPT, link.interrupt(interrupt))
                except LinkClosed:
                    return

    async def _bury(self) -> None:
        """End the VM for OP-TEE and for the machine; pages that stay pinned stay part of physical memory."""
        if self.vm is not None:
            self.vm.on_interrupt = None
            await self._board.destroy(self.vm, force=True)

    async def _say_farewell(self, ending: Ending) -> None:
        try:
            if ending is Ending.FINISHED:
                await self._link.send(Request.STOP, link.number(0), reply=True)
            elif self.reason:
                await self._link.send(Request.ERROR, link.reason(self.reason))
        except LinkClosed:
            return


def _attach(message: Message, regions: list[MemoryRegion]) -> list[RamBlock]:
    """Map each region; the descriptors of the message stay the caller's. Raises LinkError."""
    blocks: list[RamBlock] = []
    try:
        for region, fd in zip(regions, message.fds, strict=True):
            own = os.dup(fd)
            try:
                store = PageStore.attach(own, offset=region.offset, pages=region.size // PAGE_SIZE)
            except (ValueError, OSError):
                os.close(own)
                raise
            blocks.append(RamBlock(region.guest_address, region.size, store))
    except (ValueError, OSError) as error:
        for block in blocks:
            if block.store is not None:
                block.store.close()
        why = f"the file cannot be mapped: {error.strerror}" if isinstance(error, OSError) else error
        raise LinkError(f"SET_MEM_TABLE: {why}") from None
    return blocks
