"""The shell around the core: a loop over steps for each call, and the requests of the host."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import trio

from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.ports import SecureWorld
from mediator.core.steps import Event, Forward, Preempt, Queue, Regs, Reply, Step
from mediator.invariants import Checker
from mediator.trace.record import Recorder, SmcRecord
from optee.abi.smc import HYPERVISOR_CLIENT_ID, Function, ReturnCode, SecCapability, VmId
from optee.errors import SecureWorldFault

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


class Witness(Protocol):
    """Who is told what goes to OP-TEE for one request, and what comes back."""

    def forward(self, regs: Regs) -> None:
        """OP-TEE is about to be called with x0..x7."""
        ...

    def answer(self, regs: Regs) -> None:
        """It answered x0..x3."""
        ...


@runtime_checkable
class DistantSecureWorld(Protocol):
    """A secure world whose answers have to be waited for."""

    async def forward(self, regs: Regs) -> Regs:
        """Execute one SMC: x0..x7 in, x0..x3 out. Not to be cancelled. Raises optee's SecureWorldFault."""
        ...


class Tale:
    """A witness that keeps what it was told: pairs of registers, call and answer."""

    def __init__(self) -> None:
        self.told: list[tuple[Regs, Regs]] = []
        self._asked: Regs = ()

    def forward(self, regs: Regs) -> None:
        """See `Witness`."""
        self._asked = regs

    def answer(self, regs: Regs) -> None:
        """See `Witness`."""
        self.told.append((self._asked, regs))


class Service:
    """One mediator, one secure world, any number of VMs, in one trio run.

    `on_event` is told every event of the core, `on_fault` why the secure world died. Nothing here holds a lock across
    a checkpoint: the core is synchronous, and a call is a loop over its steps.
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
        self.on_fault: Callable[[str], object] = lambda why: None
        self.recorders: dict[int, Recorder] = {}
        """Who writes down the calls of a guest, by client id."""
        self._distant = world if isinstance(world, DistantSecureWorld) else None
        self.memory_of: Callable[[VirtualMachine], GuestMemoryCount] = GuestMemoryCount
        """What the mediator gets as the memory of a VM."""
        self._on_event = on_event
        self._vms: dict[int, VirtualMachine] = {}
        self._changed = trio.lowlevel.ParkingLot()

    async def start(self, witness: Witness | None = None) -> bool:
        """Find OP-TEE; False if there is none that knows virtualization."""
        reply = await self._ask(lambda: self.mediator.probe(), witness)
        return reply[0] == ReturnCode.OK

    async def add(self, vm: VirtualMachine) -> bool:
        """Announce a VM (R24); False if OP-TEE has no room for it."""
        vm.allowed_shared_frames = self.mediator.policy.shared_pages
        memory = self.memory_of(vm)
        policy = self.mediator.policy
        limits, rpmb = policy.limits_of(vm.name), vm.name == policy.rpmb_owner
        reply = await self._ask(lambda: self.mediator.create(vm.client_id, memory, limits, rpmb=rpmb))
        if reply[0] != ReturnCode.OK:
            return False
        self.memories[vm.client_id] = memory
        self.seen[vm.client_id] = Seen()
        self._vms[vm.client_id] = vm
        return True

    async def remove(self, vm: VirtualMachine) -> bool:
        """End a VM, at whatever point it is (R24); False if OP-TEE did not let go of it."""
        reply = await self._ask(lambda: self.mediator.destroy(vm.client_id))
        self._vms.pop(vm.client_id, None)
        self.recorders.pop(vm.client_id, None)
        self._changed.unpark_all()
        return reply[0] == ReturnCode.OK

    async def reset(self, vm: VirtualMachine) -> bool:
        """A VM starts anew with the same memory (R28); False if OP-TEE did not let go of it, or not take it again."""
        reply = await self._ask(lambda: self.mediator.reset(vm.client_id))
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
        await trio.lowlevel.checkpoint()
        step = self.enter(vm, vcpu, regs)
        return step.regs if isinstance(step, Reply) else await self.finish(vm, vcpu, regs, step)

    def enter(self, vm: VirtualMachine, vcpu: int, regs: Regs) -> Step | None:
        """Begin a guest's call and do what needs no waiting; all but a `Reply` is to be given to `finish`."""
        client = vm.client_id
        if client in self.recorders:
            return None
        step = self._settle(self.mediator.submit(client, vcpu, regs), None)
        if isinstance(step, Reply):
            self._note(client, regs, step.regs)
        return step

    async def finish(self, vm: VirtualMachine, vcpu: int, regs: Regs, step: Step | None) -> Regs:
        """Go on with a guest's call until it has an answer."""
        client = vm.client_id
        recorder = self.recorders.get(client) if step is None else None
        record: SmcRecord | None = None

        def submit() -> Step:
            nonlocal record
            if recorder is not None:
                record = recorder.look(vcpu, regs)
            return self.mediator.submit(client, vcpu, regs)

        if step is None:
            step = submit()
            while isinstance(step, Queue):
                await self._changed.park()
                step = submit()
            if record is not None:
                record.begin()
            step = self._settle(step, record)
        answer = await self._finish(step, submit, record)
        if record is not None:
            record.back(answer)
        self._note(client, regs, answer)
        return answer

    def _note(self, client: int, regs: Regs, answer: Regs) -> None:
        """Count what a guest tried, and what it was told."""
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

    def notify(self, _: VmId = HYPERVISOR_CLIENT_ID) -> None:
        """OP-TEE raised its notification interrupt: inject it into the guests that asked for it."""
        for client in self.mediator.notified():
            vm = self._vms.get(client)
            if vm is not None:
                vm.inject(NOTIFICATION_INTERRUPT)

    async def _ask(self, request: Callable[[], Step], witness: Witness | None = None) -> Regs:
        """A request of the host. A checkpoint at least once."""
        await trio.lowlevel.checkpoint()
        return await self._finish(self._settle(request(), witness), request, witness)

    def _settle(self, step: Step, witness: Witness | None) -> Step:
        """Take the steps that need no waiting."""
        if step.events:
            self.tell(step.events)
        while isinstance(step, Forward) and self._distant is None:
            if witness is not None:
                witness.forward(step.regs)
            try:
                answer = self.world.call(step.regs)
            except SecureWorldFault as fault:
                return self._lost(step, fault)
            step = self._returned(step, answer, witness)
        return step

    async def _finish(self, step: Step, request: Callable[[], Step], witness: Witness | None) -> Regs:
        """Do what the steps say until there is an answer; `request` is made again where it has to wait."""
        while not isinstance(step, Reply):
            if isinstance(step, Forward):
                step = await self._far(step, witness)
            elif isinstance(step, Preempt):
                # Not to be cancelled: the guest's call has begun.
                await trio.lowlevel.cancel_shielded_checkpoint()
                step = self._settle(self.mediator.proceed(step.ticket), witness)
            else:
                assert isinstance(step, Queue)
                await self._changed.park()
                step = self._settle(request(), witness)
        return step.regs

    async def _far(self, step: Forward, witness: Witness | None) -> Step:
        """Have a secure world elsewhere execute an SMC."""
        assert self._distant is not None
        if witness is not None:
            witness.forward(step.regs)
        try:
            answer = await self._distant.forward(step.regs)
        except SecureWorldFault as fault:
            return self._lost(step, fault)
        return self._returned(step, answer, witness)

    def _returned(self, step: Forward, answer: Regs, witness: Witness | None) -> Step:
        if witness is not None:
            witness.answer(answer)
        after = self.mediator.returned(step.ticket, answer)
        if self._changed:
            self._changed.unpark_all()
        if after.events:
            self.tell(after.events)
        return after

    def _lost(self, step: Forward, fault: SecureWorldFault) -> Step:
        after = self.mediator.lost(step.ticket, str(fault))
        self._changed.unpark_all()
        self.tell(after.events)
        self.on_fault(str(fault))
        return after

    def tell(self, events: Sequence[Event]) -> None:
        """Pass on what happened in the core."""
        for event in events:
            self._on_event(event)
