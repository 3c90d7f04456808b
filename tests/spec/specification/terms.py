"""What the specification is written in: numbers of the ABI, faults, messages, and a guest's memory."""

import struct

from optee.abi.message import Command
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function

PAGE, LOW, NOT_HANDLED = 4096, 2**32 - 1, 2**64 - 1
OK, ETHREAD_LIMIT, EBUSY, ERESUME, EBADADDR, EBADCMD, ENOMEM, ENOTAVAIL = range(8)
GENERIC, BAD_PARAMETERS, NOT_SUPPORTED, OUT_OF_MEMORY = 0xFFFF0000, 0xFFFF0006, 0xFFFF000A, 0xFFFF000C
STORAGE_NOT_AVAILABLE, COMMS = 0xF0100003, 2
ALLOC, FREE, FOREIGN_INTR, CMD = 0xFFFF0000, 0xFFFF0002, 0xFFFF0004, 0xFFFF0005
VALUE_BACK, SIZE_BACK, RMEM, TMEM, NONCONTIG = (2, 3), (6, 7, 10, 11), (5, 6, 7), (9, 10, 11), 0x200
FUNCTIONS = {int(function): function.name for function in Function}
COMMANDS = {int(command): command.name for command in Command}
RPC_COMMANDS = {int(command): command.name for command in RpcCommand}
IDENTITIES = ("CALLS_UID", "CALLS_REVISION", "GET_OS_UUID", "GET_OS_REVISION")
SERVED = ("LIVE", "PAUSED")
OWN_THREADS = 0x40000000
"""Thread ids from here on are the mediator's own (R29)."""
UNDELIVERED = 64
"""RPCs of a call that fail to reach the guest, one after the other, before OP-TEE is stopped (R18)."""
RECORD, PIN = 256, 16
"""Bytes of the mediator's memory that a record, and a pinned page, count for (R21)."""


class BadAddress(Exception):
    """There is no such memory, or it may not be used so (R7)."""


class Refused(Exception):
    """The call fails in a0 (R10): `args` are the code, and whether a limit was passed."""


class Rejected(Exception):
    """The message fails in `ret` (R10): `args` are the result, and whether a limit was passed."""


class Undeliverable(Exception):
    """An RPC does not go to the guest (R18): `args` are what OP-TEE is told, and whether its contract is broken."""


class OutOfContract(Exception):
    """OP-TEE did what it must not do (R25)."""


def pair(high, low):
    return (high & LOW) << 32 | low & LOW


def header(data, at=0):
    return struct.unpack_from("<8I", data, at)  # cmd, func, session, cancel_id, pad, ret, ret_origin, num_params


def params(data, at=0):
    count = header(data, at)[7]
    return [struct.unpack_from("<4Q", data, at + 32 + 32 * n) for n in range(count)]


def outputs(types):
    """Where whoever receives a message answers: values, and sizes of memory references. (start, stop) each."""
    fields = []
    for n, kind in enumerate(types):
        if kind in VALUE_BACK:
            fields.append((40 + 32 * n, 64 + 32 * n))
        elif kind in SIZE_BACK:
            fields.append((48 + 32 * n, 56 + 32 * n))
    return fields


def fresh_page():
    return {"bytes": bytearray(PAGE), "lists": {}}


def set_ret(page, result, base=0):
    page["bytes"][base + 20 : base + 24] = struct.pack("<I", result)


class Ram:
    """A guest's memory: `pages` by IPA, and what each is to it; only "rw" and "ro" are RAM."""

    def __init__(self, pages):
        self.pages = {ipa: bytearray(PAGE) for ipa in pages}
        self.kinds = dict.fromkeys(pages, "rw")
        self.after_read = None  # what another vCPU does once the message of a move was read

    def page(self, ipa, writable=False):
        at = ipa - ipa % PAGE
        if self.kinds.get(at) not in (("rw",) if writable else ("rw", "ro")):
            raise BadAddress
        return self.pages[at]

    def read(self, ipa, size, writable=False):
        return bytes(self.page(ipa, writable)[ipa % PAGE : ipa % PAGE + size])

    def write(self, ipa, data):
        self.page(ipa, True)[ipa % PAGE : ipa % PAGE + len(data)] = data

    def check_shareable(self, ipa):
        """Only normal read-write RAM, named exactly, and not at address 0 (R7, R9)."""
        if ipa % PAGE or ipa == 0:
            raise BadAddress
        self.page(ipa, True)


def not_handled(regs):
    return ("reply", (NOT_HANDLED, *regs[1:]))
