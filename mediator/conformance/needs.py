"""What a case needs of a mediator that is tested from outside, and what cannot be seen there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mediator.core.records import Counters
from mediator.scenario.driver import Smc
from mediator.scenario.expectations import StateExpectation
from mediator.scenario.language import Scenario, all_steps
from mediator.scenario.machine import Machine, OpteeSpec
from mediator.scenario.world import Abandon, DirtyLogging, Fail, Flip, Kexec, Pause, Quota, Resume, Stage2
from optee.abi.smc import Function, SecCapability

UNSEEN: Final[Mapping[str, str]] = {
    "ledger": "what a mediator holds for a guest is its own affair",
    "statistics": "a mediator's counters are its own affair",
    "events": "events happen inside",
    "pins": "pins are counted in the hypervisor",
    "dirty-log": "the dirty log is the hypervisor's",
    "policy": "the policy is the target's own",
    "optee": "it wants an OP-TEE that is built otherwise",
    "stage2": "the guest's memory map stays as it was announced",
    "faults": "faults inside the mediator and between two of its reads cannot be caused",
    "reset": "the door has no word for a reset",
    "pause": "the door has no word for a pause",
    "quarantine": "the door has no word for what OP-TEE did not let go of",
    "time": "answers that take virtual time are not given there",
}
"""Needs that nobody outside can meet, and why."""
CAPABILITIES: Final = ("RPC_ARG", "ASYNC_NOTIF", "MEMREF_NULL")
"""Needs that are met by a target that offers this capability."""
_STEPS: Final = {
    Quota: "policy",
    Stage2: "stage2",
    Fail: "faults",
    Flip: "faults",
    Kexec: "reset",
    Pause: "pause",
    Resume: "pause",
    DirtyLogging: "dirty-log",
    Abandon: "quarantine",
}
_FUNCTIONS: Final = {
    Function.CALL_WITH_RPC_ARG: "RPC_ARG",
    Function.CALL_WITH_REGD_ARG: "RPC_ARG",
    Function.ENABLE_ASYNC_NOTIF: "ASYNC_NOTIF",
    Function.GET_ASYNC_NOTIF_VALUE: "ASYNC_NOTIF",
}


def needs_of(case: Scenario) -> set[str]:
    """What the steps and the machine of a case need; `needs` of its file says the same."""
    machine = case.machine
    found = set()
    if machine.policy != Machine().policy or any(spec.quotas for spec in machine.specs(None).values()):
        found.add("policy")
    if machine.optee != OpteeSpec() or machine.interrupts:
        found.add("optee")
    if case.answers_take_time:
        found.add("time")
    for step in all_steps(case.steps):
        found.update(need for kind, need in _STEPS.items() if isinstance(step, kind))
        if isinstance(step, Smc):
            found.update(_FUNCTIONS[Function[name]] for name in step.smc.names if Function[name] in _FUNCTIONS)
        for expected in (getattr(step, "expect", None), getattr(step, "wait_until", None)):
            if isinstance(expected, StateExpectation):
                found.update(_unseen(expected))
    return found


def _unseen(expected: StateExpectation) -> set[str]:
    found = {name for name in ("ledger", "events", "pins") if getattr(expected, name)}
    if expected.dirty:
        found.add("dirty-log")
    if set(expected.statistics) & set(Counters.__slots__):
        found.add("statistics")
    return found


def why_skipped(case: Scenario, offered: SecCapability) -> str | None:
    """Why a case cannot be run against a target with these capabilities; None if it can."""
    for need in sorted(needs_of(case) | set(case.needs)):
        if need in UNSEEN:
            return f"{need}: {UNSEEN[need]}"
        if need in SecCapability.__members__ and not offered & SecCapability[need]:
            return f"the target does not offer {need}"
    return None
