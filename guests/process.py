"""One guest in an OS process of its own: a small VMM that owns the RAM, and the guest in it.

It is told what to run by `Settings`, reaches the mediator over a link, and reports over another socket: JSON records
with the counters of its workload, the last of which says how it ended.
"""

import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import trio

import guests
from guests.errors import leaves
from guests.workloads import WORKLOADS, Report
from guests.workloads.applications import HELLO_WORLD, HelloWorld
from hv_models.conduit import ConduitClosed
from hv_models.link import Flavour, LinkError
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from hv_models.socket_conduit import LinkRefused, open_conduit

MAX_REPORT: Final = 16384
"""Bytes of a report: the reader has room for no more."""
BEGIN: Final = b"begin"
"""What the other side says when all guests are up: from then on the workload runs."""
STOP: Final = b"stop"
"""What the other side sends to have the guest end in order."""
REPORT_SECONDS: Final = 0.25
"""Between two reports."""
_NOTE: Final = 200
_METHODS: Final = {"kvm": guests.ConduitMethod.SMC, "xen": guests.ConduitMethod.HVC}


@dataclass(frozen=True, slots=True)
class Settings:
    """What a guest process is to be. ram: bytes; base: IPA of the RAM."""

    name: str
    hypervisor: str
    workload: str
    ram: int
    base: int
    vcpus: int


class _Reporter:
    """Tells the other side how the workload gets on."""

    def __init__(self, sock: trio.socket.SocketType, report: Report) -> None:
        self._socket = sock
        self._report = report
        self.driver: guests.Driver | None = None
        self.up = trio.Event()

    async def run(self) -> None:
        """Report as soon as the first invocation was answered, then regularly."""
        await self.up.wait()
        while True:
            await self.send()
            await trio.sleep(REPORT_SECONDS)

    async def send(self, ended: str = "") -> None:
        """Send the counters as they are now."""
        report = self._report
        data: dict[str, Any] = {
            "invokes": 0 if self.driver is None else self.driver.invokes,
            "errors": report.errors,
            "quota": report.refusals["quota"],
            "notes": [note[:_NOTE] for note in report.notes],
            "toured": report.toured,
            "ended": ended,
        }
        try:
            await self._socket.send(json.dumps(data).encode())
        except OSError:
            return  # nobody listens any more


async def run_guest(
    settings: Settings,
    link: trio.socket.SocketType,
    reports: trio.socket.SocketType,
    images: Mapping[UUID, bytes],
    ta_directory: Path | None = None,
) -> None:
    """Boot a guest, run its workload until it is done or told to stop, and end the VM in order."""
    report = Report()
    reporter = _Reporter(reports, report)
    store = PageStore(settings.name, settings.ram // PAGE_SIZE)
    ram = GuestRam(store, settings.base)
    begin = trio.Event()
    work = trio.CancelScope()
    flavour = Flavour[settings.hypervisor.upper()]
    supplicant = guests.Supplicant(images, ta_directory=ta_directory)
    method = _METHODS[settings.hypervisor]
    ended = "failed"
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reporter.run)
            nursery.start_soon(_listen, reports, begin, work)
            async with open_conduit(link, flavour, settings.name, settings.vcpus, [ram]) as conduit:
                async with guests.open(
                    ram, conduit, name=settings.name, vcpus=settings.vcpus, method=method, supplicant=supplicant
                ) as guest:
                    reporter.driver = guest.driver
                    with work:
                        await _invoke_once(guest)
                        reporter.up.set()
                        await begin.wait()
                        await WORKLOADS[settings.workload](guest, report)
                await conduit.stop()
            ended = "finished"
            nursery.cancel_scope.cancel()
    except* (guests.GuestError, ConduitClosed, LinkRefused, LinkError) as group:
        for error in leaves(group):
            report.unexpected(f"{type(error).__name__}: {error}")
    await reporter.send(ended)


async def _invoke_once(guest: guests.Guest) -> None:
    """Show that OP-TEE answers, before the workload begins; whether it has this TA is the workload's concern."""
    async with guest.context() as context:
        with suppress(guests.TeeError):
            session = await context.open_session(HELLO_WORLD)
            await session.invoke(HelloWorld.INC_VALUE, guests.Value(0))
            await session.close()


async def _listen(reports: trio.socket.SocketType, begin: trio.Event, work: trio.CancelScope) -> None:
    """BEGIN; then a word, or the end of who would read the reports: either way the work is over."""
    with suppress(OSError):
        while await reports.recv(len(BEGIN)) == BEGIN:
            begin.set()
    work.cancel()


def run(settings: Settings, link: socket.socket, reports: socket.socket, images: Mapping[UUID, bytes]) -> None:
    """Be a guest process: returns when the guest has ended."""

    async def main() -> None:
        await run_guest(settings, trio.socket.from_stdlib_socket(link), trio.socket.from_stdlib_socket(reports), images)

    trio.run(main)
