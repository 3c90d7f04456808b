"""`mediator serve`: a machine, OP-TEE, and simulated guests that use it through the mediator."""

import signal
import socket
import sys
from collections import deque
from contextlib import AsyncExitStack
from typing import Any, Final

import trio

import guests
from guests.process import Settings
from guests.workloads import WORKLOADS
from hv_models.conduit import InProcessConduit
from hv_models.machine import DEFAULT_RAM, DEFAULT_VCPUS, RAM_BASE, Machine
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.documents import DocumentError
from mediator.invariants import Checker
from mediator.policies import load_policy
from mediator.service.control import Control
from mediator.service.display import display
from mediator.service.links import Ending, Link
from mediator.service.listener import listening
from mediator.service.log import EventLog
from mediator.service.options import ServeOptions
from mediator.service.processes import GuestProcess, WarmParent, open_warm_parent
from mediator.service.served import ServedGuest
from mediator.service.service import Service
from mediator.service.summary import Summary
from mediator.service.world import LocalSecureWorld
from optee.config import Config
from optee.secure_world import SecureWorld
from optee.ta_image import build_image
from optee.tas.catalogue import BUILT_IN

SHOWN_PANICS: Final = 8
"""TA panics whose report the summary keeps: the newest."""
SHUTDOWN_SECONDS: Final = 10.0
"""What guests get to end their work, close their sessions and unload their drivers before their power is cut."""
LAST_WORDS_SECONDS: Final = 5.0
"""What a guest process gets from the end of its VM to its last report."""
UP_SECONDS: Final = 60.0
"""What guest processes get to come up before the time of `--duration` begins."""
EXTERNAL_ROOM: Final = 64
"""VMs of others that OP-TEE's board is sized for."""
MAX_STRANGERS: Final = 1024
"""VMs of others that have ended and are kept for the summary. Stops one that comes and goes from filling memory."""
UP_POLL_SECONDS: Final = 0.02
"""Between two looks at whether all guests are up."""


def _flavour(hypervisor: str, index: int) -> str:
    return hypervisor if hypervisor != "mixed" else ("kvm", "xen")[index % 2]


def _images() -> dict[Any, bytes]:
    return {ta.uuid: build_image(ta) for ta in BUILT_IN if not ta.is_pseudo}


class Bench:
    """The machine of one run."""

    def __init__(self, options: ServeOptions, policy: Policy) -> None:
        self.options = options
        self.machine = Machine()
        room = options.guests + options.host_client + (EXTERNAL_ROOM if options.external is not None else 0)
        config = Config(guests=max(room, 1), early_tas=frozenset(), seed=options.seed)
        self.model = SecureWorld(self.machine.memory, config)
        self.world = LocalSecureWorld(self.machine, self.model)
        self.core = Mediator(policy, self.world)
        self.checker = Checker(self.core, self.world, self.model.threads_held, thorough=options.check)
        self._events = EventLog(trio.current_time, lambda: self.core.tracing)
        self.service = Service(self.checker, self.world, self._events)
        self.model.on_notification = self.service.notify
        self.guests: list[ServedGuest] = []
        self.clients: set[int] = set()
        self._strangers: deque[ServedGuest] = deque()
        self.images = _images()
        self.refused_guests: list[str] = []
        self.up: float | None = None
        self._stopping = trio.Event()
        self._cut = trio.Event()
        self._is_up = trio.Event()

    async def run(self) -> Summary:
        """Up, work, down; whatever happens, everything is given back."""
        started = trio.current_time()
        if not await self.service.start():
            raise DocumentError(["OP-TEE does not know virtualization"])
        async with AsyncExitStack() as stack:
            if self.options.external is not None:
                door = listening(self.options.external, socket.SOCK_SEQPACKET, self._serve_external)
                await stack.enter_async_context(door)
            if self.options.control is not None:
                control = listening(self.options.control, socket.SOCK_STREAM, Control(self).serve)
                await stack.enter_async_context(control)
            await self._work(await self._warm_parent(stack), started)
        for guest in self.guests:
            await self._remove(guest)
        self.checker.scan()
        seconds = trio.current_time() - started
        return self._summary(seconds if self.up is None else self.up, seconds)

    async def _work(self, parent: WarmParent | None, started: float) -> None:
        """Start the guests, and wait until they have ended and nobody else is wanted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_on_signal)
            nursery.start_soon(display, self.guests, self.options.duration)
            nursery.start_soon(self._watch_up, started)
            async with trio.open_nursery() as running:
                nursery.start_soon(self._cut_power, running.cancel_scope)
                if self.options.host_client:
                    await self._start_in_process(ServedGuest("host", _flavour(self.options.hypervisor, 0)), running)
                for index in range(self.options.guests):
                    flavour = _flavour(self.options.hypervisor, index)
                    guest = ServedGuest(f"{flavour}-{index + 1}", flavour)
                    if parent is None:
                        await self._start_in_process(guest, running)
                    else:
                        await self._start_process(guest, parent, running)
                if self.options.external is not None:
                    running.start_soon(self._stopping.wait)
                if self.options.duration is not None:
                    running.start_soon(self._stop_after, self.options.duration)
            nursery.cancel_scope.cancel()

    async def _warm_parent(self, stack: AsyncExitStack) -> WarmParent | None:
        if self.options.in_process or not self.options.guests:
            return None
        return await stack.enter_async_context(open_warm_parent(self.images))

    async def _start_process(self, guest: ServedGuest, parent: WarmParent, running: trio.Nursery) -> None:
        self.guests.append(guest)
        settings = Settings(guest.name, guest.hypervisor, self.options.workload, DEFAULT_RAM, RAM_BASE, DEFAULT_VCPUS)
        guest.process = await parent.spawn(settings)
        running.start_soon(self._run_process, guest, guest.process, len(self.guests))

    async def _start_in_process(self, guest: ServedGuest, running: trio.Nursery) -> None:
        create = self.machine.create_kvm if guest.hypervisor == "kvm" else self.machine.create_xen
        vm = create(guest.name)
        if await self.service.add(vm):
            self._born(guest, vm)
            self.guests.append(guest)
            running.start_soon(self._run_in_process, guest, vm)
        else:
            self.machine.destroy(vm)
            self.refused_guests.append(guest.name)

    def _born(self, guest: ServedGuest, vm: VirtualMachine) -> None:
        guest.born(vm, self.core, self.service)
        self.clients.add(vm.client_id)

    async def _remove(self, guest: ServedGuest) -> None:
        """Take a guest's VM away; pins that are left then show in the summary."""
        if guest.vm is not None:
            with trio.CancelScope(shield=True):
                await self.service.remove(guest.vm)
            self.machine.destroy(guest.vm, force=True)
        guest.buried()

    async def _run_in_process(self, guest: ServedGuest, vm: VirtualMachine) -> None:
        conduit = InProcessConduit(vm, self.service.mediate)
        workload = WORKLOADS[self.options.workload]
        method = guests.ConduitMethod(vm.hypervisor.conduit)
        supplicant = guests.Supplicant(self.images)
        try:
            with guest.life:
                async with guests.open(
                    vm.ram[0], conduit, name=vm.name, vcpus=len(vm.vcpus), method=method, supplicant=supplicant
                ) as running:
                    guest.driver = running.driver
                    with guest.work:
                        await workload(running, guest.report)
                guest.ended = "finished"
        except guests.GuestError as error:
            guest.ended = "failed"
            guest.report.unexpected(f"{type(error).__name__}: {error}")
        finally:
            guest.ended = guest.ended or "killed"
            await self._remove(guest)

    async def _run_process(self, guest: ServedGuest, process: GuestProcess, client_id: int) -> None:
        """Serve a guest process until it and its VM have ended; the death of either is that of the other."""
        link = Link(self.service, self.machine, process.link, client_id)
        said: list[str] = []

        async def listen() -> None:
            said.append(await process.read_reports(guest.report))

        try:
            with guest.life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(listen)
                    ending = await link.serve(lambda vm: self._born(guest, vm))
                    nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS
                guest.ended = "failed" if said == ["failed"] else str(ending)
                if ending is Ending.FAILED:
                    guest.report.unexpected(link.reason)
        finally:
            guest.ended = guest.ended or "killed"
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            process.close()
            guest.buried()
            if guest.accounts is None:  # OP-TEE never knew it
                self.guests.remove(guest)
                if guest.ended == "failed":
                    self.refused_guests.append(guest.name)

    async def _serve_external(self, sock: trio.socket.SocketType) -> None:
        """Serve a VM that somebody else started."""
        link = Link(self.service, self.machine, sock)
        guest: ServedGuest | None = None

        def born(vm: VirtualMachine) -> None:
            nonlocal guest
            guest = ServedGuest(vm.name, vm.hypervisor.name, life=life)
            self._born(guest, vm)
            self.guests.append(guest)

        ending = Ending.KILLED
        try:
            with trio.CancelScope() as life:
                ending = await link.serve(born)
        finally:
            if guest is not None:
                guest.ended = str(ending)
                guest.buried()
                self._strangers.append(guest)
                if len(self._strangers) > MAX_STRANGERS:
                    self.guests.remove(self._strangers.popleft())
        if ending is Ending.FAILED:
            name = "a connection" if guest is None else guest.name
            self._events.link_ended(name, link.reason)

    async def _stop_after(self, seconds: float) -> None:
        if not self.options.in_process:
            with trio.move_on_after(UP_SECONDS):
                await self.wait_until_up()
        await trio.sleep(seconds)
        self.stop()

    def stop(self) -> None:
        """Let every guest end its work in order; a second time, or after a while, cut the power."""
        if self._stopping.is_set():
            self._cut.set()
        for guest in self.guests:
            guest.work.cancel()
        self._stopping.set()

    async def _cut_power(self, guests_scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        with trio.move_on_after(SHUTDOWN_SECONDS):
            for guest in self.guests:
                if guest.process is not None:
                    await guest.process.stop()
            await self._cut.wait()
        guests_scope.cancel()

    async def wait_until_up(self) -> None:
        """Wait until the first invocation of every guest was answered."""
        await self._is_up.wait()

    async def _watch_up(self, started: float) -> None:
        """Note when the first invocation of every guest was answered."""
        while True:
            wanted = self.options.guests + self.options.host_client
            started_all = len(self.guests) + len(self.refused_guests) >= wanted
            if started_all and all(guest.up for guest in self.guests):
                break
            await trio.sleep(UP_POLL_SECONDS)
        self.up = trio.current_time() - started
        self._is_up.set()
        if not sys.stderr.isatty():
            print(f"{len(self.guests)} guests are up after {self.up:.2f} s", file=sys.stderr, flush=True)

    async def _stop_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self.stop()

    def _summary(self, up: float, seconds: float) -> Summary:
        inbox = self.world.inbox
        rows = [
            guest.row(offered=guest.accounts.client_id in self.world.reserved_offered)
            for guest in self.guests
            if guest.accounts is not None
        ]
        clients = self.clients
        strangers = sum(count for (_, client), count in inbox.items() if client and client not in clients)
        pins = sum(self.machine.pinned_frames().values())
        return Summary(
            guests=tuple(rows),
            strangers=strangers,
            violations=[str(violation) for violation in self.checker.violations],
            checked=self.options.check,
            left={
                "pages": pins,
                "calls": sum(self.model.threads_held(client) for client in clients),
                "buffers": sum(len(self.model.shared_objects(client)) for client in clients),
                "rpc_arguments": self.machine.pages.allocated,
            },
            ta_invokes=self.model.ta_invokes,
            panics=self.model.panics,
            cancels=self.model.cancels,
            thread_limits=sum(guest.accounts.seen.thread_limits for guest in self.guests if guest.accounts is not None),
            up_seconds=up,
            seconds=seconds,
            refused_guests=tuple(self.refused_guests),
            panic_reports=tuple(self.model.panic_reports)[-SHOWN_PANICS:],
        )


def run_bench(options: ServeOptions) -> Summary:
    """Run the guests that `options` ask for and return what happened.

    Raises:
        DocumentError: the policy is wrong, or OP-TEE cannot be used.

    """
    bench = Bench(options, load_policy(options.policy))
    try:
        return trio.run(bench.run)
    finally:
        bench.machine.close()
