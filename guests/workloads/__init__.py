"""Workloads: what a guest does when it is not a test. Each is an async function over a guest and a `Report`."""

from collections.abc import Awaitable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from guests.guest import Guest
from guests.workloads.hello import hello
from guests.workloads.mixed import mixed
from guests.workloads.ramp import ramp
from guests.workloads.report import Knee, LoadStep, Report
from guests.workloads.shm import shm

__all__ = ["TOURS", "WORKLOADS", "Knee", "LoadStep", "Report", "Workload", "hello", "mixed", "ramp", "shm"]


class Workload(Protocol):
    """Runs until `rounds` are done, or for ever; to stop it before, cancel it."""

    def __call__(self, guest: Guest, report: Report, *, rounds: int | None = None) -> Awaitable[None]:
        """Run the workload in a booted guest, counting into `report`."""
        ...


WORKLOADS: Final[Mapping[str, Workload]] = MappingProxyType({"mixed": mixed, "hello": hello, "shm": shm, "ramp": ramp})
"""By name, as the command line knows them."""
TOURS: Final = frozenset({"mixed"})
"""Those that show something at the least, and say in the report when that is done."""
