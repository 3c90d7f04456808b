"""`mediator serve`: a machine, OP-TEE, and simulated guests that use it through the mediator."""

import signal
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
import trio

import guests
from guests.workloads import WORKLOADS, Report
from hv_models.conduit import InProcessConduit
from hv_models.machine import Machine
from hv_models.vm import VirtualMachine
from mediator.core.mediator import Mediator
from mediator.core.policy import Policy
from mediator.core.steps import Event
from mediator.documents import DocumentError
from mediator.invariants import Checker
from mediator.policies import load_policy
from mediator.service.options import ServeOptions
from mediator.service.service import Service
from mediator.service.summary import GuestSummary, Summary
from mediator.service.world import LocalSecureWorld
from optee.config import Config
from optee.secure_world import SecureWorld
from optee.ta_image import build_image
from optee.tas.catalogue import BUILT_IN

SHUTDOWN_SECONDS: Final = 10.0
"""What guests get to end their work, close their sessions and unload their drivers before their power is cut."""


@dataclass(slots=True)
class _Guest:
    vm: VirtualMachine
    report: Report = field(default_factory=Report)
    ended: str = "killed"
    work: trio.CancelScope = field(default_factory=trio.CancelScope)


def _flavour(hypervisor: str, index: int) -> str:
    return hypervisor if hypervisor != "mixed" else ("kvm", "xen")[index % 2]


def _images() -> dict[Any, bytes]:
    return {ta.uuid: build_image(ta) for ta in BUILT_IN if not ta.is_pseudo}


class Bench:
    """The machine of one run."""

    def __init__(self, options: ServeOptions, policy: Policy) -> None:
        self.options = options
        self.machine = Machine()
        config = Config(guests=max(options.guests, 1), early_tas=frozenset(), seed=options.seed)
        self.model = SecureWorld(self.machine.memory, config)
        self.world = LocalSecureWorld(self.machine, self.model)
        self.core = Mediator(policy, self.world)
        self.checker = Checker(self.core, self.world, self.model.threads_held) if options.check else None
        self.log = structlog.get_logger()
        self.service = Service(self.checker or self.core, self.world, self._event)
        self.model.on_notification = self.service.notify
        self.guests: list[_Guest] = []
        self.ledgers: dict[int, Any] = {}
        self.counters: dict[int, Any] = {}
        self.images = _images()
        self.refused_guests: list[str] = []
        self._stopping = trio.Event()

    def _event(self, event: Event) -> None:
        if event.level == "error":
            self.log.error(event.name, guest=event.vm, **event.detail)

    async def run(self) -> Summary:
        """Up, work, down; whatever happens, everything is given back."""
        started = trio.current_time()
        if not await self.service.start():
            raise DocumentError(["OP-TEE does not know virtualization"])
        for index in range(self.options.guests):
            flavour = _flavour(self.options.hypervisor, index)
            name = f"{flavour}-{index + 1}"
            create = self.machine.create_kvm if flavour == "kvm" else self.machine.create_xen
            vm = create(name)
            if await self.service.add(vm):
                record = self.core.guests[vm.client_id]
                self.ledgers[vm.client_id], self.counters[vm.client_id] = record.ledger, record.counters
                self.guests.append(_Guest(vm))
            else:
                self.refused_guests.append(name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_on_signal)
            nursery.start_soon(self._progress)
            async with trio.open_nursery() as running:
                for guest in self.guests:
                    running.start_soon(self._run_guest, guest)
                nursery.start_soon(self._cut_power, running.cancel_scope)
                up = trio.current_time() - started
                if self.options.duration is not None:
                    running.start_soon(self._stop_after, self.options.duration)
            nursery.cancel_scope.cancel()
        for guest in self.guests:
            await self.service.remove(guest.vm)
        if self.checker is not None:
            self.checker.scan()
        return self._summary(up, trio.current_time() - started)

    async def _run_guest(self, guest: _Guest) -> None:
        vm = guest.vm
        conduit = InProcessConduit(vm, self.service.mediate)
        workload = WORKLOADS[self.options.workload]
        method = guests.ConduitMethod(vm.hypervisor.conduit)
        supplicant = guests.Supplicant(self.images)
        try:
            async with guests.open(
                vm.ram[0], conduit, name=vm.name, vcpus=len(vm.vcpus), method=method, supplicant=supplicant
            ) as running:
                with guest.work:
                    await workload(running, guest.report)
            guest.ended = "finished"
        except guests.GuestError as error:
            guest.ended = "failed"
            guest.report.unexpected(f"{type(error).__name__}: {error}")

    async def _stop_after(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.stop()

    def stop(self) -> None:
        """Let every guest end its work in order; a second time, or after a while, cut the power."""
        for guest in self.guests:
            guest.work.cancel()
        self._stopping.set()

    async def _cut_power(self, guests_scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        await trio.sleep(SHUTDOWN_SECONDS)
        guests_scope.cancel()

    async def _stop_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self.stop()

    async def _progress(self) -> None:
        """One line that is rewritten, on a terminal only."""
        if not sys.stderr.isatty():
            return
        began = trio.current_time()
        try:
            while True:
                invokes = sum(guest.report.invokes for guest in self.guests)
                seconds = trio.current_time() - began
                limit = "" if self.options.duration is None else f" of {self.options.duration:g}"
                sys.stderr.write(f"\r{len(self.guests)} guests, {invokes} invokes, {seconds:.0f}{limit} s ")
                sys.stderr.flush()
                await trio.sleep(0.5)
        finally:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _summary(self, up: float, seconds: float) -> Summary:
        inbox = self.world.inbox
        rows = []
        for guest in self.guests:
            client = guest.vm.client_id
            ledger, counters = self.ledgers[client], self.counters[client]
            seen, memory = self.service.seen[client], self.service.memories[client]
            rows.append(
                GuestSummary(
                    name=guest.vm.name,
                    hypervisor=guest.vm.hypervisor.name,
                    vmid=client,
                    calls=counters.calls,
                    invokes=guest.report.invokes,
                    rpcs=counters.rpcs,
                    denied=counters.denied,
                    refused=counters.refused,
                    rejected=counters.rejected,
                    errors=guest.report.errors,
                    pages_pinned_peak=ledger.pages_peak,
                    ended=guest.ended,
                    pages_translated=memory.pages,
                    pages_identical=memory.identical,
                    reserved_offered=client in self.world.reserved_offered,
                    reserved_seen=seen.reserved_seen,
                    forged_ids=seen.forged,
                    quota_refusals=guest.report.refusals["quota"],
                    notes=tuple(guest.report.notes),
                )
            )
        clients = {guest.vm.client_id for guest in self.guests}
        strangers = sum(count for (_, client), count in inbox.items() if client and client not in clients)
        pins = sum(self.machine.pins().values())
        return Summary(
            guests=tuple(rows),
            strangers=strangers,
            violations=None if self.checker is None else [str(v) for v in self.checker.violations],
            left={
                "pages": pins,
                "calls": sum(self.model.threads_held(client) for client in clients),
                "buffers": sum(len(self.model.shared_objects(client)) for client in clients),
                "rpc_arguments": self.machine.pages.allocated,
            },
            ta_invokes=self.model.ta_invokes,
            panics=self.model.panics,
            cancels=self.model.cancels,
            thread_limits=self.model.thread_limits,
            up_seconds=up,
            seconds=seconds,
            refused_guests=tuple(self.refused_guests),
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
