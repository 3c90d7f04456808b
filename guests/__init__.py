"""What runs in a VM: the OP-TEE driver, tee-supplicant, the GlobalPlatform client API, and workloads.

async with guests.open(ram, conduit) as guest, guest.context() as context: ...
"""

from guests.client import Context, Session
from guests.client_memory import Direction, SharedMemory
from guests.driver import Driver
from guests.errors import (
    GuestError,
    KernelPanicError,
    OutOfGuestMemoryError,
    PowerOffError,
    ProbeError,
    RegistrationError,
)
from guests.guest import ConduitMethod, Guest, boot, open
from guests.operation import TeeError
from guests.parameters import (
    MemoryResult,
    Null,
    Parameter,
    Partial,
    Temporary,
    Value,
    Values,
    Whole,
)
from guests.rpmb import RpmbDevice
from guests.supplicant import MisbehavingSupplicant, Misbehaviour, SlowSupplicant, Supplicant

__all__ = [
    "ConduitMethod",
    "Context",
    "Direction",
    "Driver",
    "Guest",
    "GuestError",
    "KernelPanicError",
    "MemoryResult",
    "MisbehavingSupplicant",
    "Misbehaviour",
    "Null",
    "OutOfGuestMemoryError",
    "Parameter",
    "Partial",
    "PowerOffError",
    "ProbeError",
    "RegistrationError",
    "RpmbDevice",
    "Session",
    "SharedMemory",
    "SlowSupplicant",
    "Supplicant",
    "TeeError",
    "Temporary",
    "Value",
    "Values",
    "Whole",
    "boot",
    "open",
]
