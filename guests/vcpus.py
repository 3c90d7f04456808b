"""The vCPUs of a guest: each executes one SMC at a time."""

import trio

from guests.errors import PowerOffError
from guests.uninterruptible import Uninterruptible
from hv_models.conduit import Conduit
from optee.abi.smc import Registers


class Vcpus:
    """Runs SMCs on whichever vCPU is free; callers beyond the number of vCPUs wait in order.

    An SMC cannot be interrupted from inside the guest: a signal does not end the wait for a vCPU, and of a
    conduit it is expected that `Cancelled` comes out of it only if the SMC was not executed (or the VM is dead).
    """

    def __init__(self, conduit: Conduit, count: int, uninterruptible: Uninterruptible) -> None:
        if count < 1:
            raise ValueError("a guest has at least one vCPU")
        self._conduit = conduit
        self._uninterruptible = uninterruptible
        self._idle = list(range(count - 1, -1, -1))
        self._handed: list[int] = []
        self._waiting = trio.lowlevel.ParkingLot()
        self.count = count
        self.smcs = 0

    async def call(self, regs: Registers) -> Registers:
        """Execute one SMC: x0..x7 in, x0..x7 out. Raises PowerOffError when the VM does not run any more."""
        if self._uninterruptible.dead:
            await trio.lowlevel.checkpoint()
            raise PowerOffError("this guest does not run any more")
        if self._idle:
            vcpu = self._idle.pop()
        else:
            with self._uninterruptible.scope():
                await self._waiting.park()
            vcpu = self._handed.pop()
        self.smcs += 1
        try:
            return await self._conduit.call(vcpu, regs)
        finally:
            if self._waiting:
                self._handed.append(vcpu)
                self._waiting.unpark()
            else:
                self._idle.append(vcpu)
