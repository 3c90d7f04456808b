"""The shell around the core: a loop over steps for each call, and the requests of the host."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import trio

from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.ports import SecureWorld
from mediator.core.steps import Event, Forward, Preempt, Queue, Regs, Reply, Step
from mediator.invariants import Checker
from optee.abi.smc import Function, ReturnCode, SecCapability, VmId

_LOW = 0xFFFFFFFF
_FAST = 1 << 31
NOTIFICATION_INTERRUPT = 219
"""The SPI that guests get for a pending notification: interrupt 187 of QEMU's virt board, counted from 32."""


class GuestMemoryCount:
    """A VM's memory as the mediator reaches it, counting what is translated.

    pages: pages pinned so far; identical: those whose physical address equals their IPA (none, ever).
    """

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm
        self.pages = 0
        self.identical = 0
        self.read = vm.read
        self.write_fields = vm.write_fields
        self.unpin = vm.unpin
        self.load = vm.load
        self.store_fields = vm.store_fields
        self.mark_dirty = vm.mark_dirty

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """See `GuestMemory.pin`."""
        pinned = self.vm.pin(ipas)
        self.pages += len(ipas)
        self.identical += int(np.count_nonzero(pinned.pas == ipas))
        return pinned


class Seen:
    """What one guest tried and was told, as seen at its conduit."""

    __slots__ = ("answers", "forged", "reserved_seen", "shm_config_refused", "thread_limits")

    def __init__(self) -> None:
        self.forged = 0
        self.reserved_seen = 0
        self.shm_config_refused = 0
        self.thread_limits = 0
        self.answers: Counter[int] = Counter()


class Service:
    """One mediator, one secure world, any number of VMs, in one trio run.

    `on_event` is told every event of the core. Nothing here holds a lock across a checkpoint: the core is
    synchronous, and a call is a loop over its steps.
    """

    def __init__(
        self,
        mediator: Mediator | Checker,
        world: SecureWorld,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.mediator = mediator
        self.world = world
        self.memories: dict[int, GuestMemoryCount] = {}
        self.seen: dict[int, Seen] = {}
        self._on_event = on_event
        self._vms: dict[int, VirtualMachine] = {}
        self._changed = trio.lowlevel.ParkingLot()

    async def start(self) -> bool:
        """Find OP-TEE; False if there is none that knows virtualization."""
        reply = await self._finish(lambda: self.mediator.probe())
        return reply[0] == ReturnCode.OK

    async def add(self, vm: VirtualMachine) -> bool:
        """Announce a VM (R24); False if OP-TEE has no room for it."""
        vm.allowed_shared_frames = self.mediator.policy.shared_pages
        memory = GuestMemoryCount(vm)
        reply = await self._finish(lambda: self.mediator.create(vm.client_id, memory))
        if reply[0] != ReturnCode.OK:
            return False
        self.memories[vm.client_id] = memory
        self.seen[vm.client_id] = Seen()
        self._vms[vm.client_id] = vm
        return True

    async def remove(self, vm: VirtualMachine) -> bool:
        """End a VM, at whatever point it is (R24); False if OP-TEE did not let go of it."""
        reply = await self._finish(lambda: self.mediator.destroy(vm.client_id))
        self._vms.pop(vm.client_id, None)
        self._changed.unpark_all()
        return reply[0] == ReturnCode.OK

    def pause(self, vm: VirtualMachine) -> bool:
        """Let a VM's calls wait (R28); False if it is not live."""
        return self.mediator.pause(vm.client_id)

    def resume(self, vm: VirtualMachine) -> bool:
        """End a pause: calls that waited go on; False if the VM is not paused."""
        resumed = self.mediator.resume(vm.client_id)
        self._changed.unpark_all()
        return resumed

    async def mediate(self, vm: VirtualMachine, vcpu: int, regs: Regs) -> Regs:
        """A call that a guest's hypervisor routed to the mediator."""
        client = vm.client_id
        answer = await self._finish(lambda: self.mediator.submit(client, vcpu, regs))
        seen = self.seen.get(client)
        if seen is not None:
            function = regs[0] & _LOW
            if regs[7] and regs[7] != client:
                seen.forged += 1
            if function == Function.EXCHANGE_CAPABILITIES and answer[0] == 0:
                seen.reserved_seen += bool(answer[1] & SecCapability.HAVE_RESERVED_SHM)
            elif answer[0] == ReturnCode.ETHREAD_LIMIT and not function & _FAST:
                seen.thread_limits += 1
            elif function == Function.GET_SHM_CONFIG:
                seen.shm_config_refused += answer[0] == ReturnCode.ENOTAVAIL
        return answer

    def notify(self, _: VmId) -> None:
        """OP-TEE raised its notification interrupt: inject it into the guests that asked for it."""
        for client in self.mediator.notified():
            vm = self._vms.get(client)
            if vm is not None:
                vm.inject(NOTIFICATION_INTERRUPT)

    async def _finish(self, request: Callable[[], Step]) -> Regs:
        """Do what the steps say until there is an answer. A checkpoint at least once."""
        await trio.lowlevel.checkpoint()
        step = request()
        while True:
            if step.events:
                self._tell(step.events)
            if isinstance(step, Reply):
                return step.regs
            if isinstance(step, Forward):
                step = self.mediator.returned(step.ticket, self.world.call(step.regs))
                if self._changed:
                    self._changed.unpark_all()
            elif isinstance(step, Preempt):
                # Not to be cancelled: the guest's call has begun.
                await trio.lowlevel.cancel_shielded_checkpoint()
                step = self.mediator.proceed(step.ticket)
            else:
                assert isinstance(step, Queue)
                await self._changed.park()
                step = request()

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            self._on_event(event)
