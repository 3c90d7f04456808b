"""`mediator serve`: a machine, OP-TEE, and simulated guests that use it through the mediator."""

import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from typing import Final

import trio

import guests
from guests.errors import leaves
from guests.process import Settings
from guests.workloads import TOURS, WORKLOADS
from hv_models.link import LinkError
from hv_models.machine import DEFAULT_RAM, DEFAULT_VCPUS, RAM_BASE, Machine
from hv_models.vm import VirtualMachine
from mediator.board import Board, BoardError, MediatedMachine, images, split_in_words
from mediator.core.policy import Policy
from mediator.documents import DocumentError
from mediator.invariants import Violation
from mediator.policies import load_policy
from mediator.remote_world import RemoteSecureWorld
from mediator.service.config import load_config
from mediator.service.control import Control
from mediator.service.display import display
from mediator.service.links import Ending, Link
from mediator.service.listener import listening
from mediator.service.log import EventLog
from mediator.service.options import ServeOptions
from mediator.service.processes import GuestProcess, NoProcess, WarmParent, open_warm_parent
from mediator.service.quota import adopt
from mediator.service.recording import Recordings
from mediator.service.served import ServedGuest
from mediator.service.summary import Summary
from optee.config import Config
from optee.memory.boards import BOARDS
from optee.tas.catalogue import BUILT_IN

KEPT_VIOLATIONS: Final = 100
"""Violations that the summary keeps: the first. All are counted; stops what repeats itself from filling memory."""
SHOWN_PANICS: Final = 8
"""TA panics whose report the summary keeps: the newest."""
IDLE_SECONDS: Final = 10.0
"""Without a call of any guest, until nobody waits any longer for guests to end their tour, or their work in order."""
SHUTDOWN_SECONDS: Final = 300.0
"""What guests get at most to end their work, close sessions and unload drivers before their power is cut."""
LAST_WORDS_SECONDS: Final = 5.0
"""What a guest process gets from the end of its VM to its last report."""
UP_SECONDS: Final = 60.0
"""What guest processes get to come up before workloads, and the time of `--duration`, begin."""
EXTERNAL_ROOM: Final = 64
"""VMs of others that OP-TEE's board is sized for."""
MAX_STRANGERS: Final = 1024
"""VMs of others that have ended and are kept for the summary. Stops one that comes and goes from filling memory."""
TOUR_SECONDS: Final = 300.0
"""What guests get at most beyond `--duration` to end their tour: there may be many on a slow machine."""
POLL_SECONDS: Final = 0.02
"""Between two looks at whether all guests are up, or have ended their tour."""


def _flavour(hypervisor: str, index: int) -> str:
    return hypervisor if hypervisor != "mixed" else ("kvm", "xen")[index % 2]


async def _until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await trio.sleep(POLL_SECONDS)


class Bench:
    """The machine of one run."""

    def __init__(self, options: ServeOptions, policy: Policy) -> None:
        self.options = options
        self._events = EventLog(trio.current_time, lambda: self.board.core.tracing)
        self._room = ""  # in words, for whom OP-TEE has room, if it is ours
        self.board, self._reach = self._assemble(policy)
        self.board.service.on_fault = self._secure_world_died
        if self.board.checker is not None:
            self.board.checker.keep = KEPT_VIOLATIONS
        self.guests: list[ServedGuest] = []
        self._strangers: deque[ServedGuest] = deque()
        self.images = images(*(ta for ta in BUILT_IN if not ta.is_pseudo))
        self.refused_guests: list[str] = []
        self._reserved = set(range(1, options.guests + options.host_client + 1))
        """Client ids of our own guests that are not there yet: no stranger gets one of these."""
        self._all_started = False
        self.up: float | None = None
        self._recordings: Recordings | None = None
        self._stopping = trio.Event()
        self._cut = trio.Event()
        self._timer = trio.CancelScope()
        self._begun = trio.Event()
        self._is_up = trio.Event()
        self._fault = ""

    def _assemble(self, policy: Policy) -> tuple[MediatedMachine, AbstractAsyncContextManager[None]]:
        """The machine, and what its secure world needs to be reached."""
        options = self.options
        if options.secure_world is None:
            room = options.guests + options.host_client + (EXTERNAL_ROOM if options.external is not None else 0)
            config = Config(guests=max(room, 1), early_tas=frozenset(), seed=options.seed)
            if options.board is not None:
                config = config.built(BOARDS[options.board].build)
            if options.config is not None:
                config = load_config(options.config).over(config)
            self._room = split_in_words(config)
            board = Board(policy, config, thorough=options.check, on_event=self._events)
            board.model.on_low_memory = self._events.memory_low
            return board, nullcontext()
        world = RemoteSecureWorld(Machine(), options.secure_world)
        machine = MediatedMachine(world, policy, thorough=options.check, on_event=self._events)
        world.on_notification = machine.service.notify
        world.on_death = self._secure_world_died
        return machine, world.connected()

    def _secure_world_died(self, why: str) -> None:
        """Nothing can be answered any more, so nobody can end in order: say so once, and cut the power."""
        if not self._fault:
            self._fault = why
            self._cut.set()
            self.stop()

    async def run(self) -> Summary:
        """Up, work, down; whatever happens, everything is given back. Raises BoardError, DocumentError."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            return await self._run(signals)

    async def _run(self, signals: AsyncIterator[int]) -> Summary:
        started = trio.current_time()
        async with self._reach, self.board:
            async with AsyncExitStack() as stack:
                await self._open_doors(stack)
                if self._room and not self.options.json:
                    print(f"board: {self._room}", file=sys.stderr, flush=True)
                await self._work(await self._warm_parent(stack), signals, started)
            for guest in self.guests:
                await self._remove(guest)
            self.board.scan()
            await self.board.world.settle(self.board.clients)
            seconds = trio.current_time() - started
            return self._summary(seconds if self.up is None else self.up, seconds)

    async def _open_doors(self, stack: AsyncExitStack) -> None:
        options = self.options
        if options.record is not None:
            alone = options.external is None and options.guests + options.host_client == 1
            driver = f"guests of mediator serve, workload {options.workload}"
            self._recordings = stack.enter_context(Recordings(self.board, options.record, driver, alone=alone))
        if options.external is not None:
            door = listening(options.external, socket.SOCK_SEQPACKET, self._serve_external)
            await stack.enter_async_context(door)
        if options.control is not None:
            control = listening(options.control, socket.SOCK_STREAM, Control(self).serve)
            await stack.enter_async_context(control)

    async def _work(self, parent: WarmParent | None, signals: AsyncIterator[int], started: float) -> None:
        """Start the guests, and wait until they have ended and nobody else is wanted."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed, signals)
            nursery.start_soon(display, self.guests, self.options.duration)
            nursery.start_soon(self._watch_up, started)
            async with trio.open_nursery() as running:
                nursery.start_soon(self._cut_power, running.cancel_scope)
                if self.options.host_client:
                    await self._start_in_process(ServedGuest("host", _flavour(self.options.hypervisor, 0)), 1, running)
                for index in range(self.options.guests):
                    if self._stopping.is_set():
                        break
                    flavour = _flavour(self.options.hypervisor, index)
                    guest = ServedGuest(f"{flavour}-{index + 1}", flavour)
                    client_id = index + 1 + self.options.host_client
                    if parent is None:
                        await self._start_in_process(guest, client_id, running)
                    else:
                        await self._start_process(guest, client_id, parent, running)
                else:
                    self._all_started = True
                if self.options.external is not None:
                    running.start_soon(self._stopping.wait)
                if self.options.duration is not None:
                    running.start_soon(self._stop_after, self.options.duration)
            nursery.cancel_scope.cancel()

    async def _warm_parent(self, stack: AsyncExitStack) -> WarmParent | None:
        if self.options.in_process or not self.options.guests:
            return None
        return await stack.enter_async_context(open_warm_parent(self.images))

    async def _start_process(
        self, guest: ServedGuest, client_id: int, parent: WarmParent, running: trio.Nursery
    ) -> None:
        self.guests.append(guest)
        settings = Settings(guest.name, guest.hypervisor, self.options.workload, DEFAULT_RAM, RAM_BASE, DEFAULT_VCPUS)
        try:
            guest.process = await parent.spawn(settings)
        except NoProcess as error:
            self.guests.remove(guest)
            self._fault = self._fault or str(error)
            self.stop()
            return
        if self._stopping.is_set():
            await guest.process.stop()
        running.start_soon(self._run_process, guest, guest.process, client_id)

    async def _start_in_process(self, guest: ServedGuest, client_id: int, running: trio.Nursery) -> None:
        try:
            vm = await self.board.create(guest.hypervisor, guest.name, client_id=client_id)
        except BoardError:
            self.refused_guests.append(guest.name)
            self._reserved.discard(client_id)
            return
        self._born(guest, vm)
        self.guests.append(guest)
        running.start_soon(self._run_in_process, guest, vm)

    def _born(self, guest: ServedGuest, vm: VirtualMachine) -> None:
        guest.born(vm, self.board)
        self._reserved.discard(vm.client_id)
        if self._recordings is not None:
            self._recordings.begin(vm)

    async def _remove(self, guest: ServedGuest) -> None:
        """Take a guest's VM away; pins that are left then show in the summary."""
        if guest.vm is not None:
            await self.board.destroy(guest.vm, force=True)
        guest.buried()

    async def _run_in_process(self, guest: ServedGuest, vm: VirtualMachine) -> None:
        workload = WORKLOADS[self.options.workload]
        try:
            with guest.life:
                async with self.board.boot(vm, guests.Supplicant(self.images)) as running:
                    guest.driver = running.driver
                    with guest.work:
                        await workload(running, guest.report)
                guest.ended = "finished"
        except* guests.GuestError as group:
            guest.ended = "failed"
            for error in leaves(group):
                guest.report.unexpected(f"{type(error).__name__}: {error}")
        finally:
            guest.ended = guest.ended or "killed"
            await self._remove(guest)

    async def _run_process(self, guest: ServedGuest, process: GuestProcess, client_id: int) -> None:
        """Serve a guest process until it and its VM have ended; the death of either is that of the other."""
        link = Link(self.board, process.link, client_id)
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
                self._reserved.discard(client_id)
                self.guests.remove(guest)
                if guest.ended == "failed":
                    self.refused_guests.append(guest.name)

    async def _serve_external(self, sock: trio.socket.SocketType) -> None:
        """Serve a VM that somebody else started."""
        link = Link(self.board, sock, reserved=self._reserved)
        guest: ServedGuest | None = None

        def born(vm: VirtualMachine) -> None:
            nonlocal guest
            guest = ServedGuest(vm.name, vm.hypervisor.name, life=life, stranger=True)
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
        """End the run, but let each guest end its tour."""
        with self._timer:
            if not self.options.in_process:
                await self._begun.wait()
            await trio.sleep(seconds)
            if self.options.workload in TOURS:
                await self._until_or_idle(self._all_toured, TOUR_SECONDS)
            self.stop()

    async def _until_or_idle(self, condition: Callable[[], bool], most: float) -> None:
        """Wait for a condition while guests make calls, and so many seconds at most."""
        made, at = -1, trio.current_time()
        with trio.move_on_after(most):
            while not condition():
                calls = sum(guest.accounts.counters.calls for guest in self.guests if guest.accounts is not None)
                if calls != made:
                    made, at = calls, trio.current_time()
                elif trio.current_time() > at + IDLE_SECONDS:
                    return
                await trio.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Let every guest end its work in order; a second time, or after a while, cut the power."""
        if self._stopping.is_set():
            self._cut.set()
        for guest in self.guests:
            guest.work.cancel()
        self._timer.cancel()
        self._stopping.set()

    async def _cut_power(self, guests_scope: trio.CancelScope) -> None:
        await self._stopping.wait()
        with trio.move_on_after(IDLE_SECONDS):
            for guest in self.guests:
                if guest.process is not None:
                    await guest.process.stop()
        await self._until_or_idle(self._cut.is_set, SHUTDOWN_SECONDS)
        guests_scope.cancel()

    async def wait_until_up(self) -> None:
        """Wait until the first invocation of every guest was answered."""
        await self._is_up.wait()

    async def _watch_up(self, started: float) -> None:
        """Note when the first invocation of every guest was answered. Only then do workloads begin, so that guests
        which are up do not keep the others from coming up, and all have the same time.
        """
        with trio.move_on_after(UP_SECONDS):
            await _until(self._all_up)
        for guest in list(self.guests):
            if guest.process is not None:
                await guest.process.begin()
        self._begun.set()
        await _until(self._all_up)
        self.up = trio.current_time() - started
        self._is_up.set()
        if not sys.stderr.isatty():
            print(f"{len(self.guests)} guests are up after {self.up:.2f} s", file=sys.stderr, flush=True)

    def _all_up(self) -> bool:
        return self._all_started and all(guest.up for guest in self.guests if not guest.stranger)

    def _all_toured(self) -> bool:
        return all(guest.toured for guest in self.guests if not guest.stranger)

    async def _heed(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                self.read_policy()
            else:
                self.stop()

    def read_policy(self) -> None:
        """Read the policy again; what is wrong with it is one line, and the old one stays."""
        name = self.options.policy
        try:
            adopt(self.board, name)
        except DocumentError as error:
            more = f" (and {len(error.lines) - 1} more)" if len(error.lines) > 1 else ""
            text = f"{error.lines[0]}{more}; the old policy stays"
        else:
            text = f"policy {name} was read again"
        print(text, file=sys.stderr, flush=True)

    def _untranslated(self, guests: list[ServedGuest]) -> list[str]:
        """Pages that were pinned under the address that the guest gave them: with `--check` that was found before."""
        found = [] if self.options.check else [guest.status() for guest in guests]
        return [
            str(
                Violation(
                    4, each.vmid, each.calls, f"{each.pages_translated} pages by PA", f"{each.pages_identical} by IPA"
                )
            )
            for each in found
            if each.pages_identical
        ]

    def _summary(self, up: float, seconds: float) -> Summary:
        board = self.board
        world, clients = board.world, board.clients
        guests = [guest for guest in self.guests if guest.accounts is not None]
        left, counts = board.left(), world.counts_of(0)
        untranslated = self._untranslated(guests)
        faults = [self._fault] if self._fault else []
        if self._recordings is not None:
            faults += self._recordings.failures
        return Summary(
            guests=tuple(guest.status() for guest in guests),
            reserved_offered=sum(guest.status().vmid in world.reserved_offered for guest in guests),
            strangers=sum(n for (_, client), n in world.inbox.items() if client and client not in clients),
            violations=[*board.violations, *untranslated][:KEPT_VIOLATIONS],
            violated=(0 if board.checker is None else board.checker.violated) + len(untranslated),
            checked=self.options.check,
            left={
                "pages": left["pins"],
                "calls": left["calls"] if world.counted else None,
                "buffers": left["buffers"] if world.counted else None,
                "rpc_arguments": left["mediator_pages"],
            },
            ta_invokes=counts.ta_invokes if world.counted else None,
            panics=counts.panics if world.counted else None,
            cancels=counts.cancels if world.counted else None,
            thread_limits=sum(guest.status().thread_limits for guest in guests),
            up_seconds=up,
            seconds=seconds,
            refused_guests=tuple(self.refused_guests),
            split=board.split,
            faults=tuple(faults),
            panic_reports=world.panic_reports()[-SHOWN_PANICS:],
        )


def run_bench(options: ServeOptions) -> Summary:
    """Run the guests that `options` ask for and return what happened.

    Raises:
        DocumentError: the policy is wrong, or OP-TEE cannot be used.

    """
    bench = Bench(options, load_policy(options.policy))
    try:
        return trio.run(bench.run)
    except (BoardError, LinkError) as error:
        raise DocumentError([str(error)]) from None
