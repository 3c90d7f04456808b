"""One guest of a run: its VM, what the mediator and its workload counted, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import trio

from guests import Driver
from guests.workloads import Report
from hv_models.vm import VirtualMachine
from mediator.board import MediatedMachine
from mediator.core.ledger import Ledger
from mediator.core.records import Counters
from mediator.service.processes import GuestProcess
from mediator.shell import GuestMemoryCount, Seen


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
    """A guest as it is at this moment, or was at its end.

    pages_pinned: of pages_quota; threads: of OP-TEE; ended: empty while it runs. pages_translated: pages pinned so
    far; pages_identical: of these, how many had PA = IPA. reserved_seen: capability exchanges in which it saw the
    offer of reserved shared memory. forged_ids: calls with a client id in a7 that is not its own. stranger: somebody
    else started it.
    """

    name: str
    hypervisor: str
    ended: str
    invokes: int
    errors: int
    quota_refusals: int
    notes: tuple[str, ...]
    vmid: int = 0
    calls: int = 0
    rpcs: int = 0
    denied: int = 0
    refused: int = 0
    rejected: int = 0
    pages_pinned: int = 0
    pages_pinned_peak: int = 0
    pages_quota: int = 0
    threads: int = 0
    pages_translated: int = 0
    pages_identical: int = 0
    reserved_seen: int = 0
    forged_ids: int = 0
    thread_limits: int = 0
    stranger: bool = False

    def as_data(self, *names: str) -> dict[str, Any]:
        """Those of its fields, for JSON."""
        return {name: getattr(self, name) for name in names}


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
    stranger: bool = False
    """somebody else started it: nothing is known of what it wants to do"""
    work: trio.CancelScope = field(default_factory=trio.CancelScope)
    """its workload: cancelled, the guest ends in order"""
    life: trio.CancelScope = field(default_factory=trio.CancelScope)
    """all of it: cancelled, its power is cut"""

    @property
    def up(self) -> bool:
        """Whether its first invocation was answered (or it has ended)."""
        return bool(self.report.invokes or self.ended)

    @property
    def toured(self) -> bool:
        """Whether its workload has shown what it shows at the least (or it has ended)."""
        return bool(self.report.toured or self.ended)

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

    def born(self, vm: VirtualMachine, board: MediatedMachine) -> None:
        """OP-TEE knows the VM now."""
        record, service = board.core.guests[vm.client_id], board.service
        self.vm = vm
        self.accounts = Accounts(
            vm.client_id, record.ledger, record.counters, service.seen[vm.client_id], service.memories[vm.client_id]
        )

    def status(self) -> GuestStatus:
        """What is known of it now."""
        accounts, report = self.accounts, self.report
        known = GuestStatus(
            name=self.name,
            hypervisor=self.hypervisor,
            ended=self.ended,
            invokes=self.invokes,
            errors=report.errors,
            quota_refusals=report.refusals["quota"],
            notes=tuple(report.notes),
            stranger=self.stranger,
        )
        if accounts is None:
            return known
        ledger, counters, seen, memory = accounts.ledger, accounts.counters, accounts.seen, accounts.memory
        return replace(
            known,
            vmid=accounts.client_id,
            calls=counters.calls,
            rpcs=counters.rpcs,
            denied=counters.denied,
            refused=counters.refused,
            rejected=counters.rejected,
            pages_pinned=ledger.pages,
            pages_pinned_peak=ledger.pages_peak,
            pages_quota=ledger.limits.pages,
            threads=ledger.calls,
            pages_translated=memory.pages,
            pages_identical=memory.identical,
            reserved_seen=seen.reserved_seen,
            forged_ids=seen.forged,
            thread_limits=seen.thread_limits,
        )
