"""Run cases against a mediator that somebody else runs: our guests at its one end, our secure world at its other.

The target serves the door for VMMs (`docs/attach.md`), and calls the secure world that we serve. What a case sees
through the two doors it can expect; virtual time and the checker are not there.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from hv_models.conduit import ConduitClosed
from hv_models.link import Flavour, LinkError
from hv_models.machine import Machine, RamBlock
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore, PhysicalFault
from hv_models.socket_conduit import LinkRefused, SocketConduit, open_conduit
from hv_models.vm import VirtualMachine
from mediator.conformance.journal import Journal
from mediator.conformance.needs import why_skipped
from mediator.conformance.run_cases import Verdict
from mediator.scenario.guest import ScenarioGuest
from mediator.scenario.language import Scenario
from mediator.scenario.run import Outcome, Run
from mediator.scenario.secure_side import SecureSide
from mediator.scenario.steps import StepFailed
from mediator.service.listener import listening
from mediator.service.secure_door import SecureDoor
from optee.abi.smc import Function, Registers, ReturnCode, SecCapability
from optee.config import Config
from optee.secure_world import SecureWorld

COMES_SECONDS: Final = 60.0
"""For the target to connect to the secure world, and to serve its guests' door."""
CASE_SECONDS: Final = 20.0
"""For one case: all of them take milliseconds, a call that is never answered takes for ever."""
_RETRY_SECONDS: Final = 0.05
_ROOM: Final = 16
"""VMs at once that our OP-TEE takes: those of a case, and those of cases before that have not ended yet."""


class TargetError(Exception):
    """There is no target to test, in one line."""


class Target:
    """The two doors of a mediator under test. `reached` makes one."""

    def __init__(self, guests: Path) -> None:
        self.guests = guests
        self._doors: list[tuple[SecureDoor, SecureSide]] = []
        self._came = trio.Event()
        self._links: set[trio.socket.SocketType] = set()

    @property
    def side(self) -> SecureSide:
        """What stands before our OP-TEE's model."""
        return self._doors[-1][1]

    @property
    def door(self) -> SecureDoor:
        """The link by which the target calls it."""
        return self._doors[-1][0]

    async def serve(self, sock: trio.socket.SocketType) -> None:
        """Be the secure world of a mediator that has connected."""
        door = SecureDoor(sock, Config(guests=_ROOM))
        began = trio.current_time()
        door.model.clock = lambda: round((trio.current_time() - began) * 1000)
        side = SecureSide(door.memory, door.model.call)
        door.entry = side.call
        self._doors.append((door, side))
        self._came.set()
        await door.serve()

    async def wait(self) -> None:
        """Until the target has connected, and serves guests. Raises TargetError."""
        with trio.move_on_after(COMES_SECONDS) as waiting:
            await self._came.wait()
            await self._knock()
        if waiting.cancelled_caught:
            what = f"nobody serves guests at {self.guests}" if self._doors else "nobody has come for the secure world"
            raise TargetError(f"{what} within {COMES_SECONDS:g} seconds")

    async def _knock(self) -> None:
        """Until somebody serves guests."""
        while True:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                try:
                    await sock.connect(str(self.guests))
                except OSError:
                    await trio.sleep(_RETRY_SECONDS)
                else:
                    return

    @asynccontextmanager
    async def linked(self, flavour: Flavour, name: str, vcpus: int, ram: GuestRam) -> AsyncIterator[SocketConduit]:
        """Announce a VM. Raises StepFailed where the target does not want it."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            self._links.add(sock)
            try:
                await sock.connect(str(self.guests))
                async with open_conduit(sock, flavour, name, vcpus, [ram]) as conduit:
                    yield conduit
            except (OSError, LinkRefused, LinkError) as error:
                raise StepFailed(f"the link of {name}", "a VM", str(error)) from None
            finally:
                self._links.discard(sock)

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Hang up after a while: a vCPU whose call is never answered cannot be called off in another way."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hang_up)
            yield
            nursery.cancel_scope.cancel()

    async def _hang_up(self) -> None:
        await trio.sleep(CASE_SECONDS)
        for sock in self._links:
            with suppress(OSError):  # the target has hung up already
                sock.shutdown(socket.SHUT_RDWR)

    async def capabilities(self) -> SecCapability:
        """What the target offers a guest. Raises TargetError."""
        ram = GuestRam(PageStore("probe", 16), 0x4000_0000)
        answer: Registers = (int(ReturnCode.ENOTAVAIL), 0)
        try:
            async with self.in_time(), self.linked(Flavour.KVM, "probe", 1, ram) as conduit:
                answer = await conduit.call(0, (int(Function.EXCHANGE_CAPABILITIES), 0, 0, 0, 0, 0, 0, 0))
                await conduit.stop()
        except* (StepFailed, ConduitClosed) as group:
            raise TargetError(f"{self.guests}: {_first(group)}") from None
        return SecCapability(answer[1] & 0xFFFFFFFF) if not answer[0] else SecCapability(0)


@asynccontextmanager
async def reached(guests: Path, secure_world: Path, served: Callable[[], object]) -> AsyncIterator[Target]:
    """Serve a secure world at a socket, and wait for a mediator to use it. Raises TargetError, DocumentError."""
    target = Target(guests)
    async with listening(secure_world, socket.SOCK_SEQPACKET, target.serve):
        served()
        await target.wait()
        yield target


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


class OutsideGuest(ScenarioGuest):
    """A guest whose calls go to the target: we are its VMM."""

    run: OutsideRun
    _socket: SocketConduit
    _link_scope: trio.CancelScope
    _unlinked: trio.Event

    async def _make_vm(self) -> VirtualMachine:
        spec, machine = self.spec, self.run.machine
        (block,) = spec.ram_blocks
        store = PageStore(self.name, block.size // PAGE_SIZE)
        xen = spec.flavour(self.number) == "xen"
        flavour = Flavour.XEN if xen else Flavour.KVM
        ram = GuestRam(store, block.base)
        client: int = await self.run.nursery.start(self._link, flavour, ram)
        blocks = [RamBlock(block.base, block.size, store)]
        vm: VirtualMachine
        if xen:
            vm = machine.create_xen(self.name, blocks, spec.vcpus, domain=client - 1)
        else:
            vm = machine.create_kvm(self.name, blocks, spec.vcpus, client_id=client)
        self.run.nursery.start_soon(self._inject, vm, self._socket)
        return vm

    async def _link(self, flavour: Flavour, ram: GuestRam, task_status: trio.TaskStatus[int]) -> None:
        """Hold the link to the target until the VM ends."""
        self._unlinked = trio.Event()
        try:
            with trio.CancelScope() as self._link_scope:
                async with self.run.target.linked(flavour, self.name, self.spec.vcpus, ram) as conduit:
                    self._socket = conduit
                    task_status.started(conduit.client_id)
                    await trio.sleep_forever()
        finally:
            self._unlinked.set()

    async def _inject(self, vm: VirtualMachine, conduit: SocketConduit) -> None:
        try:
            while True:
                vm.inject(await conduit.wait_for_interrupt())
        except ConduitClosed:
            return

    async def _end_vm(self, vm: VirtualMachine, *, in_order: bool) -> None:
        try:
            if in_order:
                await self._socket.stop()
        except ConduitClosed as error:
            raise StepFailed(f"the end of {self.name}", "STOP is answered", str(error)) from None
        finally:
            self._link_scope.cancel()
            with trio.CancelScope(shield=True):
                await self._unlinked.wait()
            self.run.machine.destroy(vm)

    async def _trapped(self, vm: VirtualMachine, vcpu: int, regs: Registers) -> Registers:
        try:
            return await self._socket.call(vcpu, regs)
        except ConduitClosed as error:
            if self._vm is not vm:
                raise
            raise StepFailed(f"the link of {self.name}", "open", str(error)) from None

    def frame_of(self, ipa: int) -> int | None:
        """Where the target has announced this page to the secure world."""
        region = next((ram for ram in self.vm.ram if ram.base <= ipa < ram.base + ram.size), None)
        if region is None:
            return None
        for bank in self.run.target.door.memory.banks:
            page = (ipa - region.base - bank.store.offset) // PAGE_SIZE
            if bank.store.file == region.store.file and 0 <= page < bank.store.pages:
                return bank.frames.address(page)
        return None

    def has_frame(self, pa: int) -> bool:
        """Whether a PA is one that was announced for its RAM."""
        try:
            bank, _ = self.run.target.door.memory.find(pa)
        except PhysicalFault:
            return False
        return bank.store.file == self.vm.ram[0].store.file


class OutsideRun(Run):
    """One run of a case against a target, in real time."""

    guest_kind = OutsideGuest

    def __init__(self, case: Scenario, target: Target) -> None:
        super().__init__(case, 1, None)
        self.target = target
        self.machine = Machine()
        """Where our own VMs live."""

    @property
    def world(self) -> SecureSide:
        """What stands before our OP-TEE's model."""
        return self.target.side

    @property
    def model(self) -> SecureWorld:
        """Our OP-TEE."""
        return self.target.door.model

    def limit(self, guest: ScenarioGuest) -> None:
        """Limits are the target's own."""

    def _look_at_all(self) -> None:
        """There is no checker."""

    def _check_invariants(self) -> None:
        """There is no checker."""

    async def play(self) -> Outcome:
        """Do all of it."""
        outcome = Outcome(self.scenario, self.seed, len(self.guests))
        self.began = trio.current_time()
        self.world.inboxes.clear()
        self.world.witness = self.witness
        try:
            async with self.target.in_time():
                with trio.fail_after(CASE_SECONDS) as self._play_scope:
                    await self._play()
        except* (StepFailed, trio.TooSlowError) as group:
            outcome.failure = self._given_up or self._failure(group)
            outcome.events = list(self.guests[outcome.failure.guest].events) if outcome.failure.guest else []
        finally:
            self.world.witness = None
            self.machine.close()
        if self.target.door.reason:
            outcome.failure = StepFailed("the secure world's door", "its protocol is kept", self.target.door.reason)
        return self._counted(outcome)


async def run_outside(
    cases: Sequence[Scenario],
    guests: Path,
    secure_world: Path,
    progress: Callable[[int], None] = lambda done: None,
    served: Callable[[], object] = lambda: None,
) -> list[Verdict]:
    """Run cases one after the other against the mediator that serves at `guests` and calls `secure_world`.

    progress: told how many are done; served: called when a mediator can come.

    Raises TargetError, and DocumentError where there can be no socket.
    """
    verdicts = []
    async with reached(guests, secure_world, served) as target:
        offered = await target.capabilities()
        for done, case in enumerate(cases):
            progress(done)
            why = why_skipped(case, offered)
            if why is not None:
                verdicts.append(Verdict(case, skipped=why))
                continue
            journal = Journal()
            run = OutsideRun(case, target)
            run.witness = journal
            verdicts.append(Verdict(case, await run.play(), shown=journal.shown))
    return verdicts
