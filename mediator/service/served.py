"""One guest of a run: its VM, what the mediator and its workload counted, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import trio

from guests import Driver
from guests.workloads import Report
from hv_models.vm import VirtualMachine
from mediator.core.ledger import Ledger
from mediator.core.mediator import Mediator
from mediator.core.records import Counters
from mediator.service.processes import GuestProcess
from mediator.service.service import GuestMemoryCount, Seen, Service
from mediator.service.summary import GuestSummary


class Translated(NamedTuple):
    """What remains of a `GuestMemoryCount` when its VM is gone."""

    pages: int
    identical: int


@dataclass(frozen=True, slots=True)
class Accounts:
    """What is counted for one VM; it outlives the VM."""

    client_id: int
    ledger: Ledger
    counters: Counters
    seen: Seen
    memory: GuestMemoryCount | Translated


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """A guest as it is at this moment. pages_pinned: of pages_quota; threads: of OP-TEE; ended: empty while it runs."""

    name: str
    hypervisor: str
    vmid: int
    calls: int
    invokes: int
    rpcs: int
    denied: int
    refused: int
    rejected: int
    errors: int
    pages_pinned: int
    pages_quota: int
    threads: int
    ended: str


@dataclass(slots=True)
class ServedGuest:
    """A guest from its announcement to the summary. `accounts` are None until OP-TEE knows it."""

    name: str
    hypervisor: str
    vm: VirtualMachine | None = None
    accounts: Accounts | None = None
    process: GuestProcess | None = None
    report: Report = field(default_factory=Report)
    driver: Driver | None = None
    """of a guest in this process"""
    ended: str = ""
    """finished, killed or failed; empty while it runs"""
    work: trio.CancelScope = field(default_factory=trio.CancelScope)
    """its workload: cancelled, the guest ends in order"""
    life: trio.CancelScope = field(default_factory=trio.CancelScope)
    """all of it: cancelled, its power is cut"""

    @property
    def up(self) -> bool:
        """Whether its first invocation was answered (or it has ended)."""
        return bool(self.report.invokes or self.ended)

    def buried(self) -> None:
        """The VM is gone: keep what was counted, and nothing of the VM itself."""
        self.vm = None
        if self.accounts is not None:
            memory = self.accounts.memory
            self.accounts = replace(self.accounts, memory=Translated(memory.pages, memory.identical))

    @property
    def invokes(self) -> int:
        """Commands that reached a TA, as the guest knows it."""
        return self.report.invokes if self.driver is None else self.driver.invokes

    def born(self, vm: VirtualMachine, mediator: Mediator, service: Service) -> None:
        """OP-TEE knows the VM now."""
        record = mediator.guests[vm.client_id]
        self.vm = vm
        self.accounts = Accounts(
            vm.client_id, record.ledger, record.counters, service.seen[vm.client_id], service.memories[vm.client_id]
        )

    def status(self) -> GuestStatus:
        """What is known of it now."""
        accounts, report = self.accounts, self.report
        if accounts is None:
            return GuestStatus(self.name, self.hypervisor, 0, 0, 0, 0, 0, 0, 0, report.errors, 0, 0, 0, self.ended)
        ledger, counters = accounts.ledger, accounts.counters
        return GuestStatus(
            name=self.name,
            hypervisor=self.hypervisor,
            vmid=accounts.client_id,
            calls=counters.calls,
            invokes=self.invokes,
            rpcs=counters.rpcs,
            denied=counters.denied,
            refused=counters.refused,
            rejected=counters.rejected,
            errors=report.errors,
            pages_pinned=ledger.pages,
            pages_quota=ledger.limits.pages,
            threads=ledger.calls,
            ended=self.ended,
        )

    def row(self, *, offered: bool) -> GuestSummary:
        """Its row of the summary. offered: OP-TEE offered it reserved shared memory."""
        accounts, report = self.accounts, self.report
        assert accounts is not None
        ledger, counters = accounts.ledger, accounts.counters
        return GuestSummary(
            name=self.name,
            hypervisor=self.hypervisor,
            vmid=accounts.client_id,
            calls=counters.calls,
            invokes=self.invokes,
            rpcs=counters.rpcs,
            denied=counters.denied,
            refused=counters.refused,
            rejected=counters.rejected,
            errors=report.errors,
            pages_pinned_peak=ledger.pages_peak,
            ended=self.ended or "killed",
            pages_translated=accounts.memory.pages,
            pages_identical=accounts.memory.identical,
            reserved_offered=offered,
            reserved_seen=accounts.seen.reserved_seen,
            forged_ids=accounts.seen.forged,
            quota_refusals=report.refusals["quota"],
            notes=tuple(report.notes),
        )
