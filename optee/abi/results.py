"""Codes of the GlobalPlatform TEE specifications as OP-TEE uses them.

Sources: TEE Internal Core API and TEE Client API, return codes and origins; OP-TEE's user TA header for the
flags of a TA and the storage ids.
"""

from enum import IntFlag
from typing import Final

from optee.abi.registers import Named


class Result(Named):
    """`ret` of a message or RPC argument (TEE_Result, TEEC_Result; prefixes TEE_ERROR_ left out)."""

    SUCCESS = 0x00000000
    CORRUPT_OBJECT = 0xF0100001
    CORRUPT_OBJECT_2 = 0xF0100002
    STORAGE_NOT_AVAILABLE = 0xF0100003
    STORAGE_NOT_AVAILABLE_2 = 0xF0100004
    UNSUPPORTED_VERSION = 0xF0100005
    CIPHERTEXT_INVALID = 0xF0100006
    GENERIC = 0xFFFF0000
    ACCESS_DENIED = 0xFFFF0001
    CANCEL = 0xFFFF0002
    ACCESS_CONFLICT = 0xFFFF0003
    EXCESS_DATA = 0xFFFF0004
    BAD_FORMAT = 0xFFFF0005
    BAD_PARAMETERS = 0xFFFF0006
    BAD_STATE = 0xFFFF0007
    ITEM_NOT_FOUND = 0xFFFF0008
    NOT_IMPLEMENTED = 0xFFFF0009
    NOT_SUPPORTED = 0xFFFF000A
    NO_DATA = 0xFFFF000B
    OUT_OF_MEMORY = 0xFFFF000C
    BUSY = 0xFFFF000D
    COMMUNICATION = 0xFFFF000E
    SECURITY = 0xFFFF000F
    SHORT_BUFFER = 0xFFFF0010
    EXTERNAL_CANCEL = 0xFFFF0011
    TIMEOUT = 0xFFFF3001
    OVERFLOW = 0xFFFF300F
    TARGET_DEAD = 0xFFFF3024
    STORAGE_NO_SPACE = 0xFFFF3041
    MAC_INVALID = 0xFFFF3071
    SIGNATURE_INVALID = 0xFFFF3072
    TIME_NOT_SET = 0xFFFF5000
    TIME_NEEDS_RESET = 0xFFFF5001
    DEFER_DRIVER_INIT = 0x80000000
    NODE_DISABLED = 0x80000001


class Origin(Named):
    """`ret_origin`: which layer produced `ret`."""

    API = 1
    COMMS = 2
    TEE = 3
    TRUSTED_APP = 4


class TaFlag(IntFlag):
    """Flags in a TA's header."""

    SINGLE_INSTANCE = 0x4
    MULTI_SESSION = 0x8
    INSTANCE_KEEP_ALIVE = 0x10
    SECURE_DATA_PATH = 0x20
    CACHE_MAINTENANCE = 0x80
    CONCURRENT = 0x100
    DEVICE_ENUM = 0x200
    DEVICE_ENUM_SUPP = 0x400
    DONT_CLOSE_HANDLE_ON_CORRUPT_OBJECT = 0x800
    DEVICE_ENUM_TEE_STORAGE_PRIVATE = 0x1000
    INSTANCE_KEEP_CRASHED = 0x2000


TA_FLAGS_MASK: Final = 0x3FFF
"""The bits that the flags of a TA are made of; those of it that have no name above are retired."""


class StorageId(Named):
    """First argument of the TEE_*PersistentObject functions."""

    PRIVATE = 0x1
    PRIVATE_REE = 0x80000000
    PRIVATE_RPMB = 0x80000100
    PRIVATE_SQL_RESERVED = 0x80000200
