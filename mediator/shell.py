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
from mediator.core.steps import Event, Forward, Preempt, Queue, Regs, Reply, Step, Ticket
from mediator.costs import SECOND, VirtualTime
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
        self.charged = 0
        """Of these, how many were already counted in virtual time."""
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


class Turn:
    """A call that waits for its turn: what it is woken by, and whether the turn has come."""

    __slots__ = ("come", "vm", "woken")

    def __init__(self, vm: VirtualMachine) -> None:
        self.vm = vm
        self.woken = trio.Event()
        self.come = False


class Service:
    """One mediator, one secure world, any number of VMs, in one trio run.

    `on_event` is told every event of the core, `on_fault` why the secure world died. Nothing here holds a lock across
    a checkpoint: the core is synchronous, and a call is a loop over its steps. `time` says what takes how long in
    virtual time, None: nothing does.
    """

    def __init__(
        self,
        mediator: Mediator | Checker,
        world: SecureWorld,
        on_event: Callable[[Event], None] = lambda event: None,
        time: VirtualTime | None = None,
    ) -> None:
        self.mediator = mediator
        self.world = world
        self.memories: dict[int, GuestMemoryCount] = {}
        self.seen: dict[int, Seen] = {}
        self.on_fault: Callable[[str], object] = lambda why: None
        self.died = False
        """Whether the secure world has died: it answers nothing any more."""
        self.recorders: dict[int, Recorder] = {}
        """Who writes down the calls of a guest, by client id."""
        self.memory_of: Callable[[VirtualMachine], GuestMemoryCount] = GuestMemoryCount
        """What the mediator gets as the memory of a VM."""
        self.latest: VirtualMachine | None = None
        """Whose call came last."""
        self.under_way = 0
        """Calls of guests and requests of the host that have to wait before they are answered."""
        self._time = time
        self._distant: DistantSecureWorld | None = time
        if time is None and isinstance(world, DistantSecureWorld):
            self._distant = world
        self._on_event = on_event
        self._vms: dict[int, VirtualMachine] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self._turns: dict[Ticket, Turn] = {}
        self._come: set[Ticket] = set()
        """Calls whose turn came before they began to wait."""
        self._kicked: dict[tuple[int, int], int] = {}
        """Interrupts of the VM for which this vCPU, by client id and number, was let go."""

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
        vm.on_kick = lambda: self._kick(vm)
        return True

    async def remove(self, vm: VirtualMachine) -> bool:
        """End a VM, at whatever point it is (R24); False if OP-TEE did not let go of it."""
        reply = await self._ask(lambda: self.mediator.destroy(vm.client_id))
        self._vms.pop(vm.client_id, None)
        vm.on_kick = None
        self.recorders.pop(vm.client_id, None)
        self._changed.unpark_all()
        return reply[0] == ReturnCode.OK

    async def abandon(self, vm: VirtualMachine) -> bool:
        """Release a VM of which OP-TEE did not let go, on the host's word (R24); False if there is no such VM."""
        reply = await self._ask(lambda: self.mediator.abandon(vm.client_id))
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
        self._give_turns()
        self._changed.unpark_all()
        return resumed

    async def mediate(self, vm: VirtualMachine, vcpu: int, regs: Regs) -> Regs:
        """A call that a guest's hypervisor routed to the mediator."""
        await trio.lowlevel.checkpoint()
        step = self.enter(vm, vcpu, regs)
        return step.regs if isinstance(step, Reply) else await self.finish(vm, vcpu, regs, step)

    def enter(self, vm: VirtualMachine, vcpu: int, regs: Regs) -> Step | None:
        """Begin a guest's call and do what needs no waiting; all but a `Reply` is to be given to `finish`."""
        self.latest = vm
        client = vm.client_id
        if client in self.recorders:
            return None
        self._give_turns()
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
            self._give_turns()
            return self.mediator.submit(client, vcpu, regs)

        if step is None:
            step = submit()
            while isinstance(step, Queue) and step.ticket is None:
                await self._changed.park()
                step = submit()
            if record is not None:
                record.begin()
            step = self._settle(step, record)
        answer = await self._finish(step, submit, record, (vm, vcpu))
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
        self._give_turns()
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

    async def _finish(
        self,
        step: Step,
        request: Callable[[], Step],
        witness: Witness | None,
        whose: tuple[VirtualMachine, int] | None = None,
    ) -> Regs:
        """Do what the steps say until there is an answer; `request` is made again where it has to wait.

        whose: VM and vCPU of a guest's call, None for a request of the host.
        """
        began = self.now()
        self.under_way += 1
        try:
            while not isinstance(step, Reply):
                if self._time is not None and whose is not None:
                    await self._time.translate(self._translated(whose[0]))
                if isinstance(step, Forward):
                    step = await self._far(step, witness)
                elif isinstance(step, Preempt):
                    # Not to be cancelled: the guest's call has begun.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    if whose is not None and self._park is not None and self.now() >= began + self._park:
                        step = self._settle(self.mediator.give_back(step.ticket), witness)
                    else:
                        step = self._settle(self.mediator.proceed(step.ticket), witness)
                elif isinstance(step, Queue) and step.ticket is not None:
                    assert whose is not None and self._park is not None
                    step = self._settle(await self._wait(step.ticket, *whose, began + self._park), witness)
                else:
                    assert isinstance(step, Queue)
                    await self._changed.park()
                    step = self._settle(request(), witness)
        finally:
            self.under_way -= 1
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
        self._give_turns()
        if self._changed:
            self._changed.unpark_all()
        if after.events:
            self.tell(after.events)
        return after

    def _lost(self, step: Forward, fault: SecureWorldFault) -> Step:
        after = self.mediator.lost(step.ticket, str(fault))
        self._give_turns()
        self._changed.unpark_all()
        self.tell(after.events)
        self.died = True
        self.on_fault(str(fault))
        return after

    # Flow control

    def now(self) -> int:
        """Nanoseconds, for flow control."""
        return round(trio.current_time() * SECOND)

    @property
    def _park(self) -> int | None:
        """How long a waiting call may hold its vCPU, in nanoseconds; None without flow control."""
        flow = self.mediator.policy.flow
        return None if flow is None else flow.park

    def _translated(self, vm: VirtualMachine) -> int:
        """Pages that were translated for this VM since the last time."""
        memory = self.memories[vm.client_id]
        pages, memory.charged = memory.pages - memory.charged, memory.pages
        return pages

    async def _wait(self, ticket: Ticket, vm: VirtualMachine, vcpu: int, until: int) -> Step:
        """Let a call wait for its turn, and give its vCPU back if that does not come soon (R29).

        Not to be cancelled: the call has its place. It is not for long.
        """
        whose = vm.client_id, vcpu
        turn = Turn(vm)
        if ticket in self._come:
            self._come.discard(ticket)
            turn.come = True
        else:
            self._turns[ticket] = turn
        interrupted = (vm.pending and vm.injected != self._kicked.get(whose)) or self._is_last(ticket, vm)
        while not turn.come and not interrupted:
            following = self.mediator.next_turn()
            deadline = until if following is None else min(until, following)
            with trio.CancelScope(deadline=deadline / SECOND, shield=True):
                await turn.woken.wait()
            interrupted = turn.woken.is_set()
            self._give_turns()
            if self.now() >= until:
                break
        if turn.come:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return self.mediator.proceed(ticket)
        del self._turns[ticket]
        self._kicked[whose] = vm.injected
        return self.mediator.give_back(ticket)

    def _is_last(self, ticket: Ticket, vm: VirtualMachine) -> bool:
        """Whether all vCPUs of a guest would wait here, though it has calls to go on with."""
        held = sum(turn.vm is vm for turn in self._turns.values())
        return held >= len(vm.vcpus) and self.mediator.in_the_way(ticket)

    def _give_turns(self) -> None:
        """Tell flow control what time it is, and wake those whose turn it is."""
        if self.mediator.flow is None:
            return
        for ticket in self.mediator.turns(self.now()):
            turn = self._turns.pop(ticket, None)
            if turn is None:
                self._come.add(ticket)
            else:
                turn.come = True
                turn.woken.set()

    def _kick(self, vm: VirtualMachine) -> None:
        """An interrupt is pending: the VM's calls that wait let their vCPUs go."""
        for turn in self._turns.values():
            if turn.vm is vm:
                turn.woken.set()

    def tell(self, events: Sequence[Event]) -> None:
        """Pass on what happened in the core."""
        for event in events:
            self._on_event(event)
