"""A guest of a scenario: its VM, its driver, its processes, and what happened to it lately."""

from __future__ import annotations

from collections import Counter, deque
from random import Random
from typing import TYPE_CHECKING, Final

import trio

import guests
from guests.files import MemoryFiles
from guests.memory import PageAllocator
from hv_models.conduit import InProcessConduit
from hv_models.memory import GuestRam
from hv_models.vm import VirtualMachine
from mediator.core.steps import Event
from mediator.scenario.steps import StepFailed
from optee.abi.registers import name_of
from optee.abi.smc import Function, Registers, ReturnCode, RpcReturn, is_rpc

if TYPE_CHECKING:
    from mediator.scenario.flips import FlippingMemory
    from mediator.scenario.machine import GuestSpec
    from mediator.scenario.run import Run

SHOWN_EVENTS: Final = 12
"""Events of a guest that a failure prints."""
_LOW: Final = 0xFFFFFFFF
_VARIANTS: Final = {variant.name.lower(): variant for variant in guests.Misbehaviour}
SUPPLICANTS: Final = ("usual", "none", "slow", *_VARIANTS)


class GuestDied(Exception):
    """The guest of a step is gone: the step, and the sequence that it stands in, end there."""


class PowerCut:
    """The guest dies at its nth SMC from now: before the mediator has it, or before the guest sees the answer."""

    def __init__(self, calls: int, *, answered: bool) -> None:
        self.calls = calls
        self.answered = answered

    def due(self, *, answered: bool) -> bool:
        """Whether this is the moment; counts SMCs."""
        if not answered:
            self.calls -= 1
        return self.calls == 0 and answered is self.answered


class ScenarioGuest:
    """One guest by name. It can be created, killed and created again; `vm` is that of its present life."""

    def __init__(self, run: Run, name: str, number: int, spec: GuestSpec) -> None:
        self.run = run
        self.name = name
        self.number = number
        self.spec = spec
        self.events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self.event_counts: Counter[str] = Counter()
        self.events_mark: Counter[str] = Counter()
        self.traffic_mark: Counter[str] = Counter()
        self.draw = Random(f"{run.seed} {name}")
        self.files = MemoryFiles()
        """What its tee-supplicant keeps for OP-TEE: the disk is there before and after the VM."""
        self.saved_files: dict[str, dict[tuple[str, ...], bytes]] = {}
        self.lives = 0
        self.smcs = 0
        self.cut: PowerCut | None = None
        self.memory: FlippingMemory | None = None
        self.driver: guests.Driver | None = None
        self._vm: VirtualMachine | None = None
        self._conduit: InProcessConduit | None = None
        self._allocator: PageAllocator | None = None
        self._contexts: dict[str, guests.Context] = {}
        self._guest: guests.Guest | None = None
        self._power = trio.CancelScope()
        self._off = trio.Event()
        self._gone = trio.Event()
        self.destroyed = trio.Event()
        """Its VM is gone: OP-TEE has let go of it, and its memory is given back."""
        self.destroyed.set()
        self._steps: set[trio.CancelScope] = set()

    @property
    def alive(self) -> bool:
        """Whether it has a VM now."""
        return self._vm is not None

    @property
    def vm(self) -> VirtualMachine:
        """Its VM. Raises GuestDied when it has none."""
        if self._vm is None:
            raise GuestDied(self.name)
        return self._vm

    @property
    def client(self) -> int:
        """OP-TEE's id of its present VM."""
        return self.vm.client_id

    @property
    def ram(self) -> GuestRam:
        """Its first piece of RAM."""
        return self.vm.ram[0]

    @property
    def allocator(self) -> PageAllocator:
        """Where its pages come from: the driver's allocator, if there is a driver."""
        if self.driver is not None:
            return self.driver.allocator
        assert self._allocator is not None
        return self._allocator

    @property
    def linux(self) -> guests.Driver:
        """Its driver. Raises GuestDied, ValueError where it has none."""
        _ = self.vm
        if self.driver is None:
            raise ValueError(f"{self.name} has no driver")
        return self.driver

    def note(self, text: str) -> None:
        """Keep a line of what happened."""
        self.events.append(f"{trio.current_time() - self.run.began:10.6f} s  {text}")

    def told(self, event: Event) -> None:
        """The core says that something happened to this guest."""
        self.event_counts[event.name] += 1
        detail = ", ".join(f"{key} {_shown(value)}" for key, value in event.detail.items() if value is not None)
        self.note(f"event {event.name}{': ' + detail if detail else ''}")

    # Its life

    async def create(self) -> None:
        """Make the VM and announce it to OP-TEE. Raises BoardError."""
        if self.alive:
            raise ValueError(f"{self.name} is alive already")
        await self.destroyed.wait()
        self._vm = await self._make_vm()
        self.run.by_client[self._vm.client_id] = self
        self.run.world.inboxes[self._vm.client_id].said = ""
        self.destroyed = trio.Event()
        self.lives += 1
        self.cut = None
        self.traffic_mark = Counter()
        self._conduit = InProcessConduit(self._vm, self._mediate)
        self._allocator = PageAllocator(self.ram.base, self.ram.size)
        self._allocator.page()  # the first page of RAM is the kernel's own, as with Linux
        self.run.limit(self)
        self.record()
        self.note(f"created, client id {self._vm.client_id}")

    async def _make_vm(self) -> VirtualMachine:
        """Make the VM, and announce it. Raises BoardError."""
        spec = self.spec
        return await self.run.board.create(spec.flavour(self.number), self.name, ram=spec.ram_blocks, vcpus=spec.vcpus)

    async def _end_vm(self, vm: VirtualMachine, *, in_order: bool) -> None:
        """Take the VM away. in_order: the guest has shut down; else its power was cut."""
        # Pins that a wrong mediator keeps shall be told as what is left, not stop the run.
        await self.run.board.destroy(vm, force=True)

    async def _trapped(self, vm: VirtualMachine, vcpu: int, regs: Registers) -> Registers:
        """Have the mediator answer a call."""
        return await self.run.board.service.mediate(vm, vcpu, regs)

    # Where its memory lies

    def frame_of(self, ipa: int) -> int | None:
        """PA of the page at this IPA as OP-TEE would have to name it; None if nothing is there."""
        self.vm.touch(ipa, 1)
        pa = self.vm.stage2.walk(ipa).pa
        return None if pa is None else int(pa)

    def has_frame(self, pa: int) -> bool:
        """Whether a PA lies in a frame of its RAM."""
        found = self.run.board.machine.find(pa)
        return found is not None and found[0] is self.vm

    def record(self) -> None:
        """Begin a trace of this life, if one is wanted."""
        if self.run.recordings is not None:
            self.run.recordings.begin(self.vm)

    async def boot(self, nursery: trio.Nursery) -> None:
        """Start the kernel, its driver and tee-supplicant. Raises ProbeError."""
        self._power, self._off, self._gone = trio.CancelScope(), trio.Event(), trio.Event()
        if not self.spec.has_driver:
            self._gone.set()
            return
        await nursery.start(self._live)

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        """The guest from boot to its end, in order or by power cut."""
        vm, spec = self.vm, self.spec
        assert self._conduit is not None
        method = guests.ConduitMethod(vm.hypervisor.conduit)
        boot = guests.boot(self.ram, self._conduit, name=self.name, vcpus=spec.vcpus, method=method)
        started = ended = False
        try:
            with self._power:
                async with boot as guest:
                    self._guest, self.driver = guest, guest.driver
                    supplicant = self._supplicant()
                    if supplicant is not None:
                        await guest.driver.start_supplicant(supplicant)
                    started = True
                    task_status.started()
                    await self._off.wait()
                    for context in self._contexts.values():
                        await context.close()
            ended = True
            if not started:
                task_status.started()
        except* guests.GuestError as group:
            if self._power.cancel_called:
                ended = True  # what a kernel says while its power is cut is heard by nobody
                if not started:
                    task_status.started()
            else:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                what = "end" if started else "boot"
                raise StepFailed(f"{what} of {self.name}", "no error", f"{type(error).__name__}: {error}") from None
        finally:
            if not ended:
                self.run.abort()
            self._gone.set()

    def _supplicant(self) -> guests.Supplicant | None:
        variant, images = self.spec.supplicant, self.run.images
        if variant == "none":
            return None
        if variant == "slow":
            return guests.SlowSupplicant(self.spec.supplicant_delay, images, files=self.files)
        if variant in _VARIANTS:
            return guests.MisbehavingSupplicant(_VARIANTS[variant], images, files=self.files)
        return guests.Supplicant(images, files=self.files, rpmb=self.run.rpmb)

    @property
    def booted(self) -> guests.Guest:
        """The guest as a whole. Raises EvaluationError for one without a driver."""
        _ = self.linux
        assert self._guest is not None
        return self._guest

    def context(self, process: str) -> guests.Context:
        """A process of the guest: its connection to the TEE is made when it is first needed."""
        if process not in self._contexts:
            self._contexts[process] = self.booted.context()
        return self._contexts[process]

    async def shut_down(self) -> None:
        """End in order: sessions closed, memory released, driver unloaded, VM destroyed."""
        if not self.alive:
            return
        self._off.set()
        await self._gone.wait()
        await self._destroy("shut down", in_order=True)

    async def kill(self) -> None:
        """Cut the power: whatever is under way in the guest ends."""
        if not self.alive:
            return
        if self.driver is not None:
            self.driver.uninterruptible.lift()
        self._power.cancel()
        for scope in list(self._steps):
            scope.cancel()
        with trio.CancelScope(shield=True):
            await self._gone.wait()
            await self._destroy("killed", in_order=False)

    async def kexec(self, nursery: trio.Nursery) -> None:
        """Start a new kernel in the same VM, without a word to OP-TEE; the hypervisor resets the VM (R28)."""
        if self.driver is not None:
            self.driver.uninterruptible.lift()
        self._power.cancel()
        for scope in list(self._steps):
            scope.cancel()
        await self._gone.wait()
        self._forget_kernel()
        await self.run.board.service.reset(self.vm)
        self._conduit = InProcessConduit(self.vm, self._mediate)
        self.note("kexec")
        self.record()
        await self.boot(nursery)

    def _forget_kernel(self) -> None:
        self.driver = self._guest = None
        self._contexts.clear()

    async def _destroy(self, word: str, *, in_order: bool) -> None:
        vm = self._vm
        if vm is None:
            return
        self.note(word)
        self._forget_kernel()
        self._vm = None
        await self._end_vm(vm, in_order=in_order)
        self._ended(vm)

    def _ended(self, vm: VirtualMachine) -> None:
        """The VM is gone; or it stays, in quarantine, until it is ended once more, or abandoned."""
        ended = self.destroyed
        if vm.alive:
            self._vm, self.destroyed = vm, trio.Event()
            self.note("in quarantine")
        else:
            self.run.by_client.pop(vm.client_id, None)
        ended.set()

    async def abandon(self) -> bool:
        """Have all released that a VM in quarantine holds; False if it is not in quarantine."""
        vm = self.vm
        if not await self.run.board.abandon(vm):
            return False
        self.note("abandoned")
        self._vm = None
        self._ended(vm)
        return True

    # What its steps do

    def enter_step(self) -> trio.CancelScope:
        """A scope that a power cut cancels."""
        scope = trio.CancelScope()
        self._steps.add(scope)
        return scope

    def leave_step(self, scope: trio.CancelScope) -> None:
        """The step is over."""
        self._steps.discard(scope)

    async def smc(self, vcpu: int, regs: Registers) -> Registers:
        """Execute one SMC on a vCPU, past the driver."""
        _ = self.vm
        assert self._conduit is not None
        if vcpu >= self.spec.vcpus:
            raise ValueError(f"{self.name} has {self.spec.vcpus} vCPUs, none with the number {vcpu}")
        return await self._conduit.call(vcpu, regs)

    async def _mediate(self, vm: VirtualMachine, vcpu: int, regs: Registers) -> Registers:
        """A trapped call on its way to the mediator and back."""
        self.smcs += 1
        if self.cut is not None and self.cut.due(answered=False):
            await self._die_here()
        witness = self.run.witness
        if witness is not None:
            witness.called(self, vcpu, regs)
        answer = await self._trapped(vm, vcpu, regs)
        if witness is not None:
            witness.answered(self, vcpu, regs, answer)
        # From OP-TEE's answer to here nobody else has a turn: what was said last was said to this call.
        inbox = self.run.world.inboxes[vm.client_id]
        said, inbox.said = inbox.said, ""
        status = _status(answer[0] & _LOW)
        self.note(f"vCPU {vcpu}: {name_of(Function, regs[0] & _LOW)} → {status}{f' (OP-TEE: {said})' if said else ''}")
        if self.cut is not None and self.cut.due(answered=True):
            await self._die_here()
        return answer

    async def _die_here(self) -> None:
        """The power cut that was asked for: somebody else pulls the plug, this vCPU stops where it is."""
        self.cut = None
        self.run.nursery.start_soon(self.kill)
        await trio.sleep_forever()


def _shown(value: object) -> str:
    """A detail of an event; codes and addresses in hexadecimal."""
    return hex(value) if isinstance(value, int) and value >= 1 << 16 else str(value)


def _status(code: int) -> str:
    return name_of(RpcReturn, code) if is_rpc(code) else name_of(ReturnCode, code)
