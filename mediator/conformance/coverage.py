"""Which item of the ABI, and which rule, is shown by which case.

An item of the ABI counts for a case if a run of the case has shown it at the guest's conduit or at OP-TEE's entry,
and an expectation of the case mentions it. A rule counts if the case names it and passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from mediator.conformance.run_cases import Verdict
from mediator.scenario.client import Allocate, Cancel, ClientStep, Close, Invoke, Open, Register, Release
from mediator.scenario.driver import Smc
from mediator.scenario.expressions import Expression
from mediator.scenario.language import Scenario, all_steps
from mediator.scenario.steps import Step, Strict
from optee.abi.message import Command, ParamType
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, NsecCapability, ReturnCode, RpcReturn, SecCapability

RULES: Final = tuple(f"R{number}" for number in range(1, 30))
_KINDS: Final = {
    "SMC functions": Function,
    "return codes": ReturnCode,
    "capabilities of the normal world": NsecCapability,
    "capabilities of the secure world": SecCapability,
    "RPC codes": RpcReturn,
    "RPC commands": RpcCommand,
    "message commands": Command,
    "attribute types": ParamType,
}
_RESULTS: Final = frozenset({"ret", "ret_origin", "result", "origin"})
"""Keys whose names are results: some are called like commands."""
_VERBS: Final[Mapping[type[Step], Command]] = {
    Open: Command.OPEN_SESSION,
    Invoke: Command.INVOKE_COMMAND,
    Close: Command.CLOSE_SESSION,
    Cancel: Command.CANCEL,
    Register: Command.REGISTER_SHM,
    Allocate: Command.REGISTER_SHM,
    Release: Command.UNREGISTER_SHM,
}


def items() -> dict[str, list[str]]:
    """All items that a catalogue has to show, by kind; an item is named as in `Journal.shown`."""
    found = {title: [f"{kind.__name__}.{member.name}" for member in kind] for title, kind in _KINDS.items()}
    found["attribute types"] += ["META", "NONCONTIG"]
    found["rules"] = list(RULES)
    return found


def coverage(verdicts: Iterable[Verdict]) -> dict[str, dict[str, list[str]]]:
    """For each item, by kind, the ids of the cases that show it."""
    matrix: dict[str, dict[str, list[str]]] = {
        title: {item: [] for item in members} for title, members in items().items()
    }
    for verdict in verdicts:
        if not verdict.passed:
            continue
        mentioned = mentions(verdict.case)
        for title, members in matrix.items():
            for item, cases in members.items():
                if title == "rules":
                    counts = item in verdict.case.rules
                else:
                    counts = item in verdict.shown and bool({item, item.rpartition(".")[2]} & mentioned)
                if counts:
                    cases.append(verdict.case.scenario)
    return matrix


def missing(matrix: Mapping[str, Mapping[str, Sequence[str]]]) -> list[str]:
    """The items that no case shows."""
    return [item for members in matrix.values() for item, cases in members.items() if not cases]


def mentions(case: Scenario) -> set[str]:
    """Names of the ABI in what a case expects, and what the steps that expect something do."""
    found: set[str] = set()
    for step in all_steps(case.steps):
        expected = [getattr(step, name, None) for name in ("expect", "wait_until")]
        if not any(isinstance(one, Strict) for one in expected):
            continue
        if isinstance(step, ClientStep) and "expect" not in step.model_fields_set:
            continue
        if isinstance(step, Smc):
            found.update(step.smc.names)
        elif type(step) in _VERBS:
            found.add(_VERBS[type(step)].name)
        for one in expected:
            found.update(_names(one))
    return found


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Expression):
        yield from value.names
    elif isinstance(value, Strict):
        for name in value.model_fields_set - _RESULTS:
            yield from _names(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key.partition(".")[0]
            yield from _names(item)
