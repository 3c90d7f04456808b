"""Who answers a trapped SMC or HVC: the SMC Calling Convention's split by owning entity (Arm DEN0028).

Calls of trusted applications (owners 48 and 49) and of the trusted OS (50 to 63) are the mediator's; the
rest is the hypervisor's own, of which the few calls that a guest's boot needs are modelled. Only the low 32
bits of x0 say which call it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from optee.abi.smc import Registers

NOT_SUPPORTED: Final = (1 << 64) - 1
"""x0 for a function that nobody has: -1, all 64 bits."""

SMCCC_VERSION: Final = 0x80000000
SMCCC_ARCH_FEATURES: Final = 0x80000001
PSCI_VERSION: Final = 0x84000000
PSCI_FEATURES: Final = 0x8400000A
XEN_CALL_UID: Final = 0x8500FF01
KVM_CALL_UID: Final = 0x8600FF01

_TRUSTED: Final = range(48, 64)
_FUNCTION = 0xFFFFFFFF
_VERSION_1_1 = 0x10001


@dataclass(frozen=True, slots=True)
class Hypervisor:
    """A flavour of hypervisor as its guests see it."""

    name: Literal["kvm", "xen"]
    conduit: Literal["smc", "hvc"]
    """The instruction that the guest's device tree names (`method` of /firmware/optee)."""
    services: Mapping[int, Registers]
    """x0.. of the answer to each function that it has."""

    def route(self, regs: Registers) -> Registers | None:
        """Answer a call of a guest; None if it is for the mediator. Registers not set keep their values."""
        function = regs[0] & _FUNCTION
        if function >> 24 & 0x3F in _TRUSTED:
            return None
        if function in (SMCCC_ARCH_FEATURES, PSCI_FEATURES):
            return 0 if regs[1] & _FUNCTION in self.services else NOT_SUPPORTED, *regs[1:]
        answer = self.services.get(function, (NOT_SUPPORTED,))
        return *answer, *regs[len(answer) :]


_COMMON: Final[Mapping[int, Registers]] = {
    SMCCC_VERSION: (_VERSION_1_1,),
    SMCCC_ARCH_FEATURES: (0,),
    PSCI_VERSION: (_VERSION_1_1,),
    PSCI_FEATURES: (0,),
}

KVM: Final = Hypervisor("kvm", "smc", {**_COMMON, KVM_CALL_UID: (0xB66FB428, 0xE911C52E, 0x564BCAA9, 0x743A004D)})
"""KVM: call UID 28b46fb6-2ec5-11e9-a9ca-4b564d003a74 (Linux, arm-smccc.h)."""

XEN: Final = Hypervisor("xen", "hvc", {**_COMMON, XEN_CALL_UID: (0xDC1218A7, 0x694398C6, 0xD179CF9A, 0x67E6DE8D)})
"""Xen: call UID a71812dc-c698-4369-9acf-79d18ddee667 (Xen, public/arch-arm/smccc.h)."""
