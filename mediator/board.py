"""A whole board in one process: machine, OP-TEE, mediator, and guests that are booted by one line.

    async with Board() as board, board.guest("kvm") as guest, guest.context() as context:
        session = await context.open_session(HELLO_WORLD)

`mediator serve` runs on the same board. All parts of it are there to be looked at.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from types import MappingProxyType, TracebackType
from typing import Final, Self
from uuid import UUID

import trio

import guests
from hv_models.conduit import Conduit, InProcessConduit
from hv_models.machine import DEFAULT_RAM, DEFAULT_VCPUS, Machine, RamBlock
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.states import GuestState
from mediator.core.steps import Event
from mediator.costs import Costs, VirtualTime
from mediator.invariants import Checker
from mediator.policies import load_policy
from mediator.shell import Service, Tale
from mediator.world import LocalSecureWorld, SecureWorldEnd
from optee.config import DEFAULT, Config
from optee.secure_world import SecureWorld
from optee.ta_image import build_image
from optee.trusted_application import TrustedApplication

FLAVOURS: Final = ("kvm", "xen")
NOTHING_LEFT: Final[Mapping[str, int]] = MappingProxyType(
    {"pins": 0, "calls": 0, "buffers": 0, "sessions": 0, "mediator_pages": 0}
)
"""What `Board.left` answers when every guest is gone and has left nothing behind."""


class BoardError(Exception):
    """OP-TEE could not be used, or had no room for a guest."""


class MediatedMachine:
    """A machine with a mediator on it, before a secure world that is wherever it is; use it with `async with`.

    threads_held: what the checker asks for the threads that OP-TEE has for a client; the rest as for `Board`.
    """

    def __init__(
        self,
        world: SecureWorldEnd,
        policy: Policy | str = "default",
        *,
        threads_held: Callable[[int], int] | None = None,
        check: bool = True,
        thorough: bool = True,
        on_event: Callable[[Event], None] = lambda event: None,
        time: VirtualTime | None = None,
    ) -> None:
        self.machine = world.machine
        self.world = world
        """The secure world as the mediator sees it."""
        chosen = load_policy(policy) if isinstance(policy, str) else policy
        self.core = Mediator(chosen, world, world.ledger)
        self.checker = Checker(self.core, world, threads_held, thorough=thorough) if check else None
        self.service = Service(self.checker or self.core, world, on_event, time)
        self.clients: set[int] = set()
        """Client ids of all VMs so far."""
        self.probed = Tale()
        """How OP-TEE was found."""
        self.split = ""
        """How secure RAM is split, said where a guest is refused."""
        self._numbers = count(1)

    @property
    def violations(self) -> list[str]:
        """Invariants that were violated so far, in words; empty without `check`."""
        return [] if self.checker is None else [str(violation) for violation in self.checker.violations]

    def scan(self) -> None:
        """Let the checker look at everything once more, when nothing more will happen."""
        if self.checker is not None:
            self.checker.finish()

    def left(self) -> dict[str, int]:
        """What all guests so far hold: pins on their pages, calls, buffers and sessions at OP-TEE, mediator pages."""
        held = [self.world.counts_of(client) for client in self.clients]
        return {
            "pins": sum(self.machine.pinned_frames().values()),
            "calls": sum(found.threads for found in held),
            "buffers": sum(found.buffers for found in held),
            "sessions": sum(found.sessions for found in held),
            "mediator_pages": self.machine.pages.allocated,
        }

    async def create(
        self,
        flavour: str = "kvm",
        name: str | None = None,
        *,
        ram: int | Sequence[RamBlock] = DEFAULT_RAM,
        vcpus: int = DEFAULT_VCPUS,
        client_id: int | None = None,
    ) -> VirtualMachine:
        """Make a VM and announce it to OP-TEE. Its client id is the next free one unless given.

        Raises BoardError if OP-TEE has no room for it; ValueError for an unknown flavour, an id or RAM in use.
        """
        if flavour not in FLAVOURS:
            raise ValueError(f"{flavour!r} is none of {', '.join(FLAVOURS)}")
        name = name or f"{flavour}-{next(self._numbers)}"
        vm: VirtualMachine
        if flavour == "kvm":
            vm = self.machine.create_kvm(name, ram, vcpus, client_id=client_id)
        else:
            domain = None if client_id is None else client_id - 1
            vm = self.machine.create_xen(name, ram, vcpus, domain=domain, build=False)
        known = False
        try:
            for _ in vm.build():
                await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True):
                known = await self.service.add(vm)
        finally:
            if not known:
                self.machine.destroy(vm)
        if not known:
            raise BoardError(f"OP-TEE has no room for {vm.name}{self.split}")
        self.clients.add(vm.client_id)
        return vm

    def conduit(self, vm: VirtualMachine) -> Conduit:
        """The way of that VM's calls to the mediator."""
        return InProcessConduit(vm, self.service.mediate)

    @asynccontextmanager
    async def guest(
        self,
        flavour: str = "kvm",
        name: str | None = None,
        *,
        ram: int = DEFAULT_RAM,
        vcpus: int = DEFAULT_VCPUS,
        tas: tuple[type[TrustedApplication], ...] = (),
        supplicant: guests.Supplicant | None = None,
    ) -> AsyncIterator[guests.Guest]:
        """Boot a guest in a new VM; at the end of the block it is shut down and the VM destroyed.

        tas: TAs whose images its tee-supplicant has, for those that are not part of OP-TEE's image; a `supplicant`
        of your own replaces that one. Raises BoardError, and `guests.ProbeError`.
        """
        vm = await self.create(flavour, name, ram=ram, vcpus=vcpus)
        try:
            async with self.boot(vm, supplicant or guests.Supplicant(images(*tas))) as guest:
                yield guest
        finally:
            await self.destroy(vm)

    def boot(self, vm: VirtualMachine, supplicant: guests.Supplicant) -> AbstractAsyncContextManager[guests.Guest]:
        """Boot a guest in a VM that exists, as `guests.open` does."""
        return guests.open(
            vm.ram[0],
            self.conduit(vm),
            name=vm.name,
            vcpus=len(vm.vcpus),
            method=guests.ConduitMethod(vm.hypervisor.conduit),
            supplicant=supplicant,
        )

    async def destroy(self, vm: VirtualMachine, *, force: bool = False) -> None:
        """End a VM at whatever point it is, and give its memory back if OP-TEE lets go of it.

        Raises ValueError if pages of it are still pinned; forced, they stay part of physical memory and of `left`.
        """
        with trio.CancelScope(shield=True):
            released = await self.service.remove(vm)
        if released and vm.alive:
            self.machine.destroy(vm, force=force)

    def _quarantined(self, vm: VirtualMachine) -> bool:
        guest = self.core.guests.get(vm.client_id)
        return guest is not None and guest.state is GuestState.QUARANTINED

    async def abandon(self, vm: VirtualMachine) -> bool:
        """Give back the memory of a VM of which OP-TEE did not let go; False if there is no such VM (R24)."""
        with trio.CancelScope(shield=True):
            abandoned = await self.service.abandon(vm)
        if abandoned:
            self.machine.destroy(vm, force=True)
        return abandoned

    async def __aenter__(self) -> Self:
        if not await self.service.start(self.probed):
            raise BoardError("OP-TEE does not know virtualization")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for vm in list(self.machine.vms.values()):
            if not (self.service.died and self._quarantined(vm)):  # a dead secure world does not change its mind
                await self.destroy(vm)
        self.scan()
        self.machine.close()


class Board(MediatedMachine):
    """A machine with OP-TEE on it and a mediator before it; use it with `async with`.

    policy: what the mediator allows, or the name of a built-in policy. config: how OP-TEE was built. check: look at
    every step with the invariant checker, whose findings are `violations`; thorough: at all invariants, not the
    cheap ones only. on_event: told what happens in the mediator. world: what stands before OP-TEE's model, if it is
    more than a counter of calls. threads_held: what the checker asks for the threads that OP-TEE has for a client, if
    some answers are not the model's, so that its threads say nothing.
    costs: what takes how long in virtual time; None: nothing takes any.
    """

    world: LocalSecureWorld

    def __init__(
        self,
        policy: Policy | str = "default",
        config: Config = DEFAULT,
        *,
        check: bool = True,
        thorough: bool = True,
        on_event: Callable[[Event], None] = lambda event: None,
        world: Callable[[Machine, SecureWorld], LocalSecureWorld] = LocalSecureWorld,
        threads_held: Callable[[int], int] | None = None,
        costs: Costs | None = None,
    ) -> None:
        machine = Machine()
        self.model = SecureWorld(machine.memory, config)
        end = world(machine, self.model)
        super().__init__(
            end,
            policy,
            threads_held=threads_held or self.model.threads_held,
            check=check,
            thorough=thorough,
            on_event=on_event,
            time=None if costs is None else VirtualTime(end, self.model, costs),
        )
        self.model.on_notification = self.service.notify
        self.split = f": VM_CREATED answered ENOTAVAIL, {split_in_words(config)}"


def split_in_words(config: Config) -> str:
    """How the board's secure RAM is split."""
    build = config.build
    ram = (build.ta_ram or 0) / (1 << 20)
    return f"secure RAM is split for {build.guest_count} guests (CFG_VIRT_GUEST_COUNT), {ram:.1f} MiB of TA RAM each"


def images(*tas: type[TrustedApplication]) -> dict[UUID, bytes]:
    """Return the signed image of each TA, as `guests.Supplicant` takes them."""
    return {ta.uuid: build_image(ta) for ta in tas}
