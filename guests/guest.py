"""A guest as a whole: driver, tee-supplicant and processes, from boot to power-off."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum

import trio

from guests.client import Context
from guests.clock import BOOT_TIME
from guests.driver import Driver
from guests.supplicant import Supplicant
from guests.supplicant_device import SupplicantProcess
from hv_models.conduit import Conduit
from hv_models.memory import GuestRam


class ConduitMethod(StrEnum):
    """The instruction that the guest's device tree names: KVM guests use SMC, Xen's HVC."""

    SMC = "smc"
    HVC = "hvc"


class Guest:
    """A running guest; `open` boots one."""

    def __init__(self, name: str, method: ConduitMethod, driver: Driver) -> None:
        self.name = name
        self.method = method
        self.driver = driver

    def context(self, *, uid: int = 0, gid: int = 0) -> Context:
        """Return a new process's connection to the TEE (TEEC_InitializeContext); use it with `async with`."""
        return Context(self.driver, uid=uid, gid=gid)

    async def watch_power(self) -> None:
        """Run beside the guest's work: when the guest as a whole is cancelled, nothing in it is shielded."""
        try:
            await trio.sleep_forever()
        finally:
            self.driver.uninterruptible.lift()


@asynccontextmanager
async def open(
    ram: GuestRam,
    conduit: Conduit,
    *,
    name: str = "guest",
    vcpus: int = 2,
    method: ConduitMethod = ConduitMethod.SMC,
    supplicant: SupplicantProcess | None = None,
    boot_time: int = BOOT_TIME,
) -> AsyncIterator[Guest]:
    """Boot a guest, and unload its driver in order at the end of the block.

    supplicant: its tee-supplicant; a plain one without TA images unless given (start an absent one later: see
    `guests.driver.Driver.start_supplicant`, and `boot` which starts none). A block that ends by an exception or is
    cancelled from outside is a power cut: nothing is sent any more. Raises ProbeError.
    """
    async with boot(ram, conduit, name=name, vcpus=vcpus, method=method, boot_time=boot_time) as guest:
        await guest.driver.start_supplicant(supplicant or Supplicant())
        yield guest


@asynccontextmanager
async def boot(
    ram: GuestRam,
    conduit: Conduit,
    *,
    name: str = "guest",
    vcpus: int = 2,
    method: ConduitMethod = ConduitMethod.SMC,
    boot_time: int = BOOT_TIME,
) -> AsyncIterator[Guest]:
    """Boot a guest as `open` does, without tee-supplicant."""
    guest = Guest(name, method, Driver(ram, conduit, vcpus=vcpus, boot_time=boot_time))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.watch_power)
            await guest.driver.probe()
            nursery.start_soon(guest.driver.handle_interrupts)
            yield guest
            await guest.driver.remove()
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # only the block's own: its caller need not know of our nursery
            raise group.exceptions[0] from None
        raise
