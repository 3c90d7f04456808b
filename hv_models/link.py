"""The wire format between a VMM, the mediator and a secure world: records of a Unix socket of type SOCK_SEQPACKET.

Vocabulary and layout are those of vhost-user: a header of three little-endian u32 (request, flags, size), feature
negotiation first, then a memory table whose file descriptors travel as ancillary data (SCM_RIGHTS), then calls. One
record holds one message. `docs/attach.md` describes every byte for those who write an end of their own.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, NoReturn

from hv_models.memory import PAGE_SIZE
from optee.abi.smc import Registers

VERSION: Final = 1
"""Bits 0 and 1 of a header's flags."""
REPLY: Final = 1 << 2
"""Flag of a message that answers one."""

MAX_RECORD: Final = 512
"""Bytes of a record. Stops a peer from having us buffer what no message needs (the memory table is the longest)."""
MAX_REGIONS: Final = 8
"""Regions of guest RAM, as vhost-user has them. Stops a peer from using up our file descriptors and mappings."""
MAX_VCPUS: Final = 64
"""vCPUs of a VM, hence calls that one peer can have under way. Stops it from filling memory with pending calls."""
MAX_RAM: Final = 16 << 30
"""Bytes of RAM of a VM. Stops a sparse file of terabytes from costing us tables in proportion."""
MAX_NAME: Final = 32
"""Bytes of a VM's name, which is printed. Stops a peer from flooding logs with it."""
MAX_REASON: Final = 200
"""Bytes of the line with which the mediator ends a link."""
IPA_BITS: Final = 39
"""What the stage-2 tables of the machine translate."""

PA_BITS: Final = 48
"""What an address of the memory that a secure world is told of has at most."""
MAX_FRAMES: Final = 4096
"""Regions of physical memory that a mediator can announce: a guest has up to eight, its own pages come by 4 MiB."""
MAX_MEMORY: Final = 256 << 30
"""Bytes of all of them. Stops a mediator from costing a secure world tables in proportion to sparse files."""

_TRUNCATED: Final = int(socket.MSG_TRUNC)
_FDS_TRUNCATED: Final = int(socket.MSG_CTRUNC)
_HEADER: Final = struct.Struct("<3I")
_U64: Final = struct.Struct("<Q")
_VM: Final = struct.Struct(f"<2I{MAX_NAME}s")
_TABLE: Final = struct.Struct("<2I")
_REGION: Final = struct.Struct("<4Q")
_CALL: Final = struct.Struct("<2I8Q")
_CALL_RECORD: Final = struct.Struct("<5I8Q")
_INTERRUPT: Final = struct.Struct("<2I")
_FRAMES: Final = struct.Struct("<3Q2I")
_CLIENT: Final = struct.Struct("<2I")
_COUNTS: Final = struct.Struct("<6Q")
_CONTROL: Final = socket.CMSG_SPACE(MAX_REGIONS * 4)
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Request(IntEnum):
    """What a message is. Numbers below 64 are vhost-user's."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_MEM_TABLE = 5
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_VM = 64
    START = 65
    CALL = 66
    INTERRUPT = 67
    STOP = 68
    ERROR = 69
    GET_COUNTS = 70


class Feature(IntFlag):
    """What both ends must agree on before anything else."""

    INTERRUPTS = 1 << 0
    """INTERRUPT messages come unasked."""
    COUNTS = 1 << 1
    """A secure world says what it holds of a guest."""


FEATURES: Final = Feature.INTERRUPTS
"""What a mediator offers a VMM in this version."""
SECURE_FEATURES: Final = Feature.INTERRUPTS | Feature.COUNTS
"""What our secure world offers a mediator."""


class Flavour(IntEnum):
    """The hypervisor of a VM, as SET_VM names it."""

    KVM = 1
    XEN = 2


class LinkError(Exception):
    """The peer broke the protocol; the text is one line that says how."""


class Message(NamedTuple):
    """One record: what it asks or answers, its payload, and the file descriptors that came with it."""

    request: int
    reply: bool
    payload: bytes
    fds: tuple[int, ...] = ()


class MemoryRegion(NamedTuple):
    """One entry of the memory table, in vhost-user's order."""

    guest_address: int
    """First IPA."""
    size: int
    """Bytes."""
    user_address: int
    """Where the VMM has it mapped; not used by the mediator."""
    offset: int
    """Bytes into the file."""


class FrameRegion(NamedTuple):
    """A region of physical memory: page i of `size` bytes has PA base + ((i XOR permutation) * stride) * 4096."""

    base: int
    size: int
    offset: int
    """Bytes into the file."""
    stride: int
    permutation: int


class Counts(NamedTuple):
    """What a secure world holds of one guest, and what it has counted of all."""

    threads: int
    buffers: int
    sessions: int
    ta_invokes: int
    panics: int
    cancels: int


def pack(request: int, payload: bytes = b"", *, reply: bool = False) -> bytes:
    """Make a record."""
    return _HEADER.pack(request, VERSION | (REPLY if reply else 0), len(payload)) + payload


def unpack(record: bytes, fds: Sequence[int] = (), *, flags: int = 0) -> Message:
    """Take a record apart. `flags` are those of recvmsg. Raises LinkError; the descriptors are the caller's then."""
    if flags & _TRUNCATED:
        raise LinkError(f"a record of more than {MAX_RECORD} bytes")
    if flags & _FDS_TRUNCATED:
        raise LinkError(f"more than {MAX_REGIONS} file descriptors in a record")
    if len(record) < _HEADER.size:
        raise LinkError(f"a record of {len(record)} bytes is shorter than a header")
    request, bits, size = _HEADER.unpack_from(record)
    if bits & 3 != VERSION:
        raise LinkError(f"protocol version {bits & 3}, not {VERSION}")
    if bits & ~(3 | REPLY):
        raise LinkError(f"unknown flags {bits:#x}")
    if size != len(record) - _HEADER.size:
        raise LinkError(f"a payload of {len(record) - _HEADER.size} bytes where the header says {size}")
    return Message(request, bits & REPLY != 0, record[_HEADER.size :], tuple(fds) if fds else ())


def descriptors(control: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """File descriptors in the ancillary data of recvmsg."""
    found = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def close_all(fds: Sequence[int]) -> None:
    """Close file descriptors."""
    for fd in fds:
        os.close(fd)


def rights(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    """Ancillary data of sendmsg that carries file descriptors."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def control_size() -> int:
    """Bytes of ancillary data to make room for in recvmsg."""
    return _CONTROL


def number(value: int) -> bytes:
    """The payload of a message that carries one u64."""
    return _U64.pack(value)


def read_number(message: Message) -> int:
    """The same, read. Raises LinkError."""
    (value,) = _exact(_U64, message)
    return int(value)


def vm(flavour: int, vcpus: int, name: str) -> bytes:
    """The payload of SET_VM."""
    return _VM.pack(flavour, vcpus, name.encode()[:MAX_NAME])


def read_vm(message: Message) -> tuple[Flavour, int, str]:
    """The same, read: flavour, number of vCPUs, name. Raises LinkError."""
    _exact(_VM, message)
    flavour, vcpus, raw = _VM.unpack(message.payload)
    if flavour not in Flavour.__members__.values():
        raise LinkError(f"SET_VM: {flavour} is no hypervisor")
    if not 0 < vcpus <= MAX_VCPUS:
        raise LinkError(f"SET_VM: {vcpus} vCPUs are not in 1..{MAX_VCPUS}")
    name = raw.rstrip(b"\0").decode("ascii", "replace")
    if not name or not all(" " < character <= "~" for character in name):
        raise LinkError("SET_VM: a name of printable ASCII is wanted")
    return Flavour(flavour), vcpus, name


def memory_table(regions: Sequence[MemoryRegion]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return _TABLE.pack(len(regions), 0) + b"".join(_REGION.pack(*region) for region in regions)


def read_memory_table(message: Message) -> list[MemoryRegion]:
    """The same, read and checked, with a file descriptor for each region. Raises LinkError."""
    payload = message.payload
    if len(payload) < _TABLE.size:
        raise LinkError("SET_MEM_TABLE: no table")
    count, padding = _TABLE.unpack_from(payload)
    if not 0 < count <= MAX_REGIONS or padding:
        raise LinkError(f"SET_MEM_TABLE: {count} regions are not in 1..{MAX_REGIONS}")
    if len(payload) != _TABLE.size + count * _REGION.size:
        raise LinkError(f"SET_MEM_TABLE: {len(payload)} bytes are not those of {count} regions")
    if len(message.fds) != count:
        raise LinkError(f"SET_MEM_TABLE: {len(message.fds)} file descriptors for {count} regions")
    regions = [MemoryRegion(*fields) for fields in _REGION.iter_unpack(payload[_TABLE.size :])]
    end = 0
    for region in sorted(regions):
        if region.guest_address % PAGE_SIZE or region.size % PAGE_SIZE or not region.size or region.offset % PAGE_SIZE:
            raise LinkError(f"SET_MEM_TABLE: the region at {region.guest_address:#x} is not whole pages")
        if region.guest_address < end:
            raise LinkError(f"SET_MEM_TABLE: the region at {region.guest_address:#x} overlaps another")
        end = region.guest_address + region.size
        if end > 1 << IPA_BITS:
            raise LinkError(f"SET_MEM_TABLE: addresses have at most {IPA_BITS} bits")
    if sum(region.size for region in regions) > MAX_RAM:
        raise LinkError(f"SET_MEM_TABLE: more than {MAX_RAM >> 30} GiB")
    for region, fd in zip(regions, message.fds, strict=True):
        _check_file("SET_MEM_TABLE", region, fd)
    return regions


def _check_file(name: str, region: MemoryRegion | FrameRegion, fd: int) -> None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise LinkError(f"{name}: guest memory must be a memfd") from None
    if ~seals & _SEALS:
        raise LinkError(f"{name}: guest memory must be sealed against shrinking and growing")
    if seals & fcntl.F_SEAL_WRITE:
        raise LinkError(f"{name}: guest memory must be writable")
    if region.offset + region.size > os.fstat(fd).st_size:
        raise LinkError(f"{name}: a region reaches beyond the end of its file")


def frames(region: FrameRegion) -> bytes:
    """The payload of ADD_MEM_REG."""
    return _FRAMES.pack(*region)


def read_frames(message: Message) -> FrameRegion:
    """The same, read and checked, with one file descriptor. Raises LinkError."""
    region = FrameRegion(*_exact(_FRAMES, message))
    if len(message.fds) != 1:
        raise LinkError(f"ADD_MEM_REG: {len(message.fds)} file descriptors for one region")
    if region.base % PAGE_SIZE or region.size % PAGE_SIZE or not region.size or region.offset % PAGE_SIZE:
        raise LinkError(f"ADD_MEM_REG: the region at {region.base:#x} is not whole pages")
    pages = region.size // PAGE_SIZE
    places = 1 << max((pages - 1).bit_length(), region.permutation.bit_length())
    if (
        not region.base
        or region.stride.bit_count() != 1
        or region.base + places * region.stride * PAGE_SIZE > 1 << PA_BITS
    ):
        raise LinkError(f"ADD_MEM_REG: the region at {region.base:#x} has no frames in {PA_BITS} bits")
    if region.size > MAX_RAM:
        raise LinkError(f"ADD_MEM_REG: more than {MAX_RAM >> 30} GiB")
    _check_file("ADD_MEM_REG", region, message.fds[0])
    return region


def client(number: int) -> bytes:
    """The payload of GET_COUNTS."""
    return _CLIENT.pack(number, 0)


def read_client(message: Message) -> int:
    """The same, read. Raises LinkError."""
    number, _ = _exact(_CLIENT, message)
    return int(number)


def counts(found: Counts) -> bytes:
    """The payload of the answer to GET_COUNTS."""
    return _COUNTS.pack(*found)


def read_counts(message: Message) -> Counts:
    """The same, read. Raises LinkError."""
    return Counts(*_exact(_COUNTS, message))


def call_record(vcpu: int, regs: Registers, *, reply: bool = False) -> bytes:
    """The whole record of CALL, or of its answer."""
    return _CALL_RECORD.pack(Request.CALL, VERSION | (REPLY if reply else 0), _CALL.size, vcpu, 0, *regs)


def call(vcpu: int, regs: Registers) -> bytes:
    """The payload of CALL and of its answer."""
    return _CALL.pack(vcpu, 0, *regs)


def read_call(message: Message) -> tuple[int, Registers]:
    """The same, read: vCPU, x0..x7. Raises LinkError."""
    vcpu, padding, *regs = _exact(_CALL, message)
    if padding:
        raise LinkError("CALL: the word behind the vCPU is not 0")
    return vcpu, tuple(regs)


def interrupt(line: int) -> bytes:
    """The payload of INTERRUPT."""
    return _INTERRUPT.pack(line, 0)


def read_interrupt(message: Message) -> int:
    """The same, read. Raises LinkError."""
    line, _ = _exact(_INTERRUPT, message)
    return int(line)


def reason(text: str) -> bytes:
    """The payload of ERROR."""
    return text.encode("ascii", "replace")[:MAX_REASON]


def read_reason(message: Message) -> str:
    """The same, read: printable characters only."""
    return "".join(c if " " <= c <= "~" else "?" for c in message.payload[:MAX_REASON].decode("ascii", "replace"))


def nothing(message: Message) -> None:
    """Check that a message has no payload. Raises LinkError."""
    if message.payload:
        refuse(message, "has no payload")


def refuse(message: Message, why: str) -> NoReturn:
    """Complain about a message. Raises LinkError."""
    raise LinkError(f"{name_of(message.request)} {why}")


def name_of(request: int) -> str:
    """A request in words."""
    return Request(request).name if request in Request.__members__.values() else f"request {request}"


def _exact(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    """The fields of a payload that is exactly one layout. Raises LinkError."""
    if len(message.payload) != layout.size:
        refuse(message, f"has a payload of {layout.size} bytes, not {len(message.payload)}")
    return layout.unpack(message.payload)
