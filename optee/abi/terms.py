"""The words of a message: commands, parameter types, attributes, logins.

`optee.abi.message` is where to import them from. They stand apart because the declarations of
`optee.abi.layout` use them, and `optee.abi.message` is derived from those. Source: OP-TEE's message interface
header.
"""

from typing import Final

from optee.abi.registers import Named, Register, bit, bits


class Command(Named):
    """`cmd` of a message."""

    OPEN_SESSION = 0
    INVOKE_COMMAND = 1
    CLOSE_SESSION = 2
    CANCEL = 3
    REGISTER_SHM = 4
    UNREGISTER_SHM = 5
    DO_BOTTOM_HALF = 6
    STOP_ASYNC_NOTIF = 7
    LEND_PROTMEM = 8
    RECLAIM_PROTMEM = 9
    GET_PROTMEM_CONFIG = 10
    ASSIGN_PROTMEM = 11


class ParamType(Named):
    """Low byte of a parameter's attribute; the FMEM types of FF-A share the numbers of RMEM."""

    NONE = 0x0
    VALUE_INPUT = 0x1
    VALUE_OUTPUT = 0x2
    VALUE_INOUT = 0x3
    RMEM_INPUT = 0x5
    RMEM_OUTPUT = 0x6
    RMEM_INOUT = 0x7
    FMEM_INPUT = 0x5
    FMEM_OUTPUT = 0x6
    FMEM_INOUT = 0x7
    TMEM_INPUT = 0x9
    TMEM_OUTPUT = 0xA
    TMEM_INOUT = 0xB


class Attr(Register):
    """A parameter's attribute word. OP-TEE ignores the cache bits; bit 9 was called FRAGMENT before 2.5.0."""

    type = bits(7, 0, ParamType)
    META = bit(8)
    NONCONTIG = bit(9)
    cache = bits(18, 16)


TYPE_MASK: Final = Attr.type.mask
META: Final = Attr.META.mask
NONCONTIG: Final = Attr.NONCONTIG.mask
CACHE_PREDEFINED: Final = 0


class Login(Named):
    """How a client identifies itself in OPEN_SESSION (GlobalPlatform TEEC_LOGIN_*, OP-TEE's own two last)."""

    PUBLIC = 0x0
    USER = 0x1
    GROUP = 0x2
    APPLICATION = 0x4
    APPLICATION_USER = 0x5
    APPLICATION_GROUP = 0x6
    REE_KERNEL = 0x80000000
    TRUSTED_APP = 0xF0000000


class ProtmemUseCase(Named):
    """First value of LEND_PROTMEM."""

    RESERVED = 0
    SECURE_VIDEO_PLAY = 1
    TRUSTED_UI = 2
    SECURE_VIDEO_RECORD = 3
