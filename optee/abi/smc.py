"""Registers of an SMC to OP-TEE: function ids, return codes, capabilities.

Sources: OP-TEE's SMC interface header; the Arm SMC Calling Convention (DEN0028) for the parts of an id.
Registers are 32 bits wide; a 64-bit value travels as a pair (upper 32 bits, lower 32 bits). a7 carries the
hypervisor's client id; on return only a0..a3 are written.
"""

from enum import IntFlag
from typing import Final, NewType, TypeAlias

from optee.abi.registers import Named, Register, bit, bits

VmId = NewType("VmId", int)
"""OP-TEE's client id of a VM, as a7 carries it; 16 bits are significant."""

ThreadId = NewType("ThreadId", int)
"""Index of a secure thread, as a3 carries it out with an RPC and back in with RETURN_FROM_RPC."""

Cookie = NewType("Cookie", int)
"""The normal world's 64-bit name of a shared buffer (`shm_ref`)."""

Registers: TypeAlias = tuple[int, ...]
"""x0..x7, each a 64-bit number."""

HYPERVISOR_CLIENT_ID: Final = VmId(0)
CLIENT_ID_MASK: Final = 0xFFFF
SHM_CACHED: Final = 1

API_UID: Final = (0x384FB3E0, 0xE7F811E3, 0xAF630002, 0xA5D5C51B)
OS_UUID: Final = (0x486178E0, 0xE7F811E3, 0xBC5E0002, 0xA5D5C51B)
API_REVISION: Final = (2, 0)


class Owner(Named):
    """Who answers a function id: bits 29:24 (DEN0028, owning entity numbers)."""

    ARM_ARCHITECTURE = 0
    CPU_SERVICE = 1
    SIP_SERVICE = 2
    OEM_SERVICE = 3
    STANDARD_SECURE_SERVICE = 4
    STANDARD_HYPERVISOR_SERVICE = 5
    VENDOR_HYPERVISOR_SERVICE = 6
    TRUSTED_OS = 50
    TRUSTED_OS_API = 63


class FunctionId(Register):
    """a0 of a call: a fast call runs to its end with interrupts masked, a yielding one gets a thread."""

    fast = bit(31)
    smc64 = bit(30)
    owner = bits(29, 24, Owner)
    number = bits(15, 0)


class Function(Named):
    """Every function id of OP-TEE's SMC ABI."""

    CALLS_COUNT = 0xBF00FF00
    CALLS_UID = 0xBF00FF01
    CALLS_REVISION = 0xBF00FF03
    GET_OS_UUID = 0xB2000000
    GET_OS_REVISION = 0xB2000001
    LOAD_IMAGE = 0xB2000002
    RETURN_FROM_RPC = 0x32000003
    CALL_WITH_ARG = 0x32000004
    CALL_WITH_RPC_ARG = 0x32000012
    CALL_WITH_REGD_ARG = 0x32000013
    GET_SHM_CONFIG = 0xB2000007
    L2CC_MUTEX = 0xB2000008
    EXCHANGE_CAPABILITIES = 0xB2000009
    DISABLE_SHM_CACHE = 0xB200000A
    ENABLE_SHM_CACHE = 0xB200000B
    BOOT_SECONDARY = 0xB200000C
    VM_CREATED = 0xB200000D
    VM_DESTROYED = 0xB200000E
    GET_THREAD_COUNT = 0xB200000F
    ENABLE_ASYNC_NOTIF = 0xB2000010
    GET_ASYNC_NOTIF_VALUE = 0xB2000011
    GET_PROTMEM_CONFIG = 0xB2000014


class ReturnCode(Named):
    """a0 of an answer that is no RPC. OK says that the message was processed, not that it succeeded."""

    OK = 0x0
    ETHREAD_LIMIT = 0x1
    EBUSY = 0x2
    ERESUME = 0x3
    EBADADDR = 0x4
    EBADCMD = 0x5
    ENOMEM = 0x6
    ENOTAVAIL = 0x7
    UNKNOWN_FUNCTION = 0xFFFFFFFF


class RpcReturn(Named):
    """a0 of a yielding call that suspends to ask something of the normal world; a3 is the thread."""

    ALLOC = 0xFFFF0000
    FREE = 0xFFFF0002
    FOREIGN_INTR = 0xFFFF0004
    CMD = 0xFFFF0005


RPC_PREFIX: Final = 0xFFFF0000


def is_rpc(a0: int) -> bool:
    """Tell whether an answer's a0 (its low 32 bits) is an RPC, known or not, and not an end of the call."""
    word = a0 & 0xFFFFFFFF
    return word != ReturnCode.UNKNOWN_FUNCTION and word & RPC_PREFIX == RPC_PREFIX


class NsecCapability(IntFlag):
    """a1 of EXCHANGE_CAPABILITIES as called; any other bit makes OP-TEE answer ENOTAVAIL."""

    UNIPROCESSOR = 1 << 0


class SecCapability(IntFlag):
    """a1 of EXCHANGE_CAPABILITIES as answered."""

    HAVE_RESERVED_SHM = 1 << 0
    UNREGISTERED_SHM = 1 << 1
    DYNAMIC_SHM = 1 << 2
    VIRTUALIZATION = 1 << 3
    MEMREF_NULL = 1 << 4
    ASYNC_NOTIF = 1 << 5
    RPC_ARG = 1 << 6
    RPMB_PROBE = 1 << 7
    PROTMEM = 1 << 8
    DYNAMIC_PROTMEM = 1 << 9


class NotificationStatus(Register):
    """a2 of GET_ASYNC_NOTIF_VALUE: is a1 a value, and are there more."""

    VALID = bit(0)
    PENDING = bit(1)


def to_pair(value: int) -> tuple[int, int]:
    """Split a 64-bit value into the register pair (upper 32 bits, lower 32 bits)."""
    return value >> 32 & 0xFFFFFFFF, value & 0xFFFFFFFF


def from_pair(upper: int, lower: int) -> int:
    """Join a register pair, of which the low 32 bits each count, into a 64-bit value."""
    return (upper & 0xFFFFFFFF) << 32 | lower & 0xFFFFFFFF
