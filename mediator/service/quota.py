"""What guests may hold, changed while they run: of one by `mediator ctl quota`, of all by the file of their policy."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from mediator.board import MediatedMachine
from mediator.core.ledger import RESOURCES, Ledger, OverLimit
from mediator.core.policy import PolicyLimits
from mediator.core.pool import borrowed
from mediator.core.records import Counters
from mediator.documents import DocumentError
from mediator.policies import load_policy, read_quota
from optee.abi.smc import VmId


def change(board: MediatedMachine, client: int, changes: object) -> PolicyLimits:
    """Give one guest other limits; `changes` are keys of a policy's `limits`. Raises DocumentError, one line each."""
    core = board.core
    guest = core.guests.get(VmId(client))
    if guest is None:
        raise DocumentError([f"no guest has the client id {client}"])
    try:
        limits = read_quota(changes).apply(guest.limits)
        board.service.tell(core.change_limits({guest.vm: limits}, core.pool.capacity))
    except (ValueError, OverLimit) as error:
        raise DocumentError([f"quota: {error}"]) from None
    return limits


def adopt(board: MediatedMachine, name_or_file: str) -> None:
    """Read a policy again and give every guest the limits that stand there. Raises DocumentError; nothing changes then.

    What `change` gave single guests ends with it: the file says what holds.
    """
    policy = load_policy(name_or_file)
    limits = {vm: policy.limits_of(board.machine.vms[vm].name) for vm in board.core.guests if vm in board.machine.vms}
    try:
        board.service.tell(board.core.adopt(policy, limits))
    except (ValueError, OverLimit) as error:
        raise DocumentError([f"{name_or_file}: {error}"]) from None


def describe_flow(board: MediatedMachine, client: int) -> dict[str, Any] | None:
    """What flow control says of one guest, as `mediator ctl status` prints it; None without either."""
    flow, guest = board.core.flow, board.core.guests.get(VmId(client))
    if flow is None or guest is None:
        return None
    lane, now = guest.lane, board.service.now()
    return {
        "waiting": lane.waiting,
        "limit": flow.policy.queue,
        "peak": lane.peak,
        "queued": lane.queued,
        "admitted": lane.admitted,
        "waited_us": {
            "p50": lane.wait_below(0.5),
            "p99": lane.wait_below(0.99),
            "max": lane.waited_longest // 1000,
            "sum": lane.waited // 1000,
        },
        "tas": [
            {"ta": str(UUID(bytes=ta)), "calls": rate.calls, "per_second": round(rate.per_second(now), 1)}
            for ta, rate in lane.traffic.tas.items()
        ],
        "sessions": [
            {
                "session": session,
                "ta": str(UUID(bytes=ta)),
                "calls": rate.calls,
                "per_second": round(rate.per_second(now), 1),
            }
            for session, (ta, rate) in lane.traffic.sessions.items()
        ],
    }


def describe(ledger: Ledger, counters: Counters) -> dict[str, Any]:
    """One guest's accounts, as `mediator ctl status` prints them. `memory` is in bytes."""
    sums, peaks, limits = ledger.sums(), ledger.peaks(), ledger.limits
    quota: dict[str, dict[str, int]] = {
        name: {"held": sums[name], "limit": getattr(limits, name), "peak": peaks[name]} for name in RESOURCES
    }
    quota["pages"].update(reserved=limits.reserved_pages, borrowed=borrowed(ledger))
    quota["pages_per_buffer"] = {"limit": limits.pages_per_buffer}
    return {"quota": quota, "refusals": dict(counters.refusals), "last_refusal": counters.last_refusal}
