"""The way of a trapped call: from a vCPU's SMC or HVC to whoever answers it, and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

import trio

from hv_models.vm import VirtualMachine
from optee.abi.smc import Registers

REGISTERS: Final = 8
"""x0 to x7 take part in a call (Arm DEN0028)."""

Mediate: TypeAlias = Callable[[VirtualMachine, int, Registers], Awaitable[Registers]]
"""What answers the calls that are the mediator's: (vm, vCPU, x0..x7) to x0..x7."""


class ConduitClosed(Exception):
    """There is no VM any more to make the call, or nobody to answer it."""


class Conduit(Protocol):
    """What a guest driver calls where a real one executes an instruction."""

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        """Execute one SMC or HVC on a vCPU: x0..x7 in, x0..x7 out, each of 64 bits.

        A vCPU does one call at a time; a second one waits. Raises ConduitClosed.
        """
        ...

    async def wait_for_interrupt(self) -> int:
        """Wait until a virtual interrupt is pending, acknowledge it, and give its number."""
        ...


class InProcessConduit:
    """The trap of a VM whose hypervisor and mediator run in the same process."""

    def __init__(self, vm: VirtualMachine, mediate: Mediate) -> None:
        self._vm = vm
        self._mediate = mediate
        self._vcpus = tuple(trio.Lock() for _ in vm.vcpus)
        self._interrupted = trio.lowlevel.ParkingLot()
        vm.on_interrupt = self._interrupted.unpark_all

    async def call(self, vcpu: int, regs: Registers) -> Registers:
        """Execute one SMC or HVC; the hypervisor answers what is not the mediator's."""
        if len(regs) != REGISTERS or min(regs) < 0 or max(regs) >> 64:
            raise ValueError(f"a call takes {REGISTERS} registers of 64 bits, not {regs}")
        lock = self._vcpus[vcpu]
        try:
            # Acquiring is a checkpoint, and so is what follows: one is enough for a vCPU that is free.
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()
        try:
            if not self._vm.alive:
                raise ConduitClosed(self._vm.name)
            answer = self._vm.hypervisor.route(regs)
            if answer is None:
                return await self._mediate(self._vm, vcpu, regs)
            await trio.lowlevel.checkpoint()
            return answer
        finally:
            lock.release()

    async def wait_for_interrupt(self) -> int:
        """Wait for the interrupt that has been pending for longest, and acknowledge it."""
        await trio.lowlevel.checkpoint()
        while (interrupt := self._vm.acknowledge()) is None:
            await self._interrupted.park()
        return interrupt
