"""Who looks on while a scenario runs: at each guest's conduit, and at OP-TEE's entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mediator.scenario.secure_side import SecureWitness
from optee.abi.smc import Registers

if TYPE_CHECKING:
    from mediator.scenario.guest import ScenarioGuest


class Witness(SecureWitness, Protocol):
    """Is told of every call in the order in which things happen."""

    def called(self, guest: ScenarioGuest, vcpu: int, regs: Registers) -> None:
        """A guest executed an SMC or HVC that is the mediator's."""
        ...

    def answered(self, guest: ScenarioGuest, vcpu: int, regs: Registers, answer: Registers) -> None:
        """The guest got the answer to that call."""
        ...
