"""RPMB: frames of a replay protected memory block, and the requests in which OP-TEE sends them (RPC command RPMB).

Source: JEDEC eMMC, RPMB data frame; OP-TEE secure storage, section 4. Numbers in a frame are big endian, those of the
request header little endian.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from optee.abi.registers import Named

FRAME_SIZE: Final = 512
RPMB_BLOCK_SIZE: Final = 256
"""Bytes of data in a frame: half a sector, the unit that an address counts."""
MAC_SIZE: Final = 32
NONCE_SIZE: Final = 16
CID_SIZE: Final = 16
SIZE_UNIT: Final = 128 << 10
"""Bytes of a device for each unit of EXT_CSD 168."""
COUNTER_EXPIRED: Final = 0x80
"""Bit of a result: the write counter has reached its end, and nothing can be written any more."""
RESULT_MASK: Final = 0x3F

_FRAME: Final = struct.Struct(">196x32s256s16sIHHHH")
_AUTHENTICATED: Final = 228  # offset of what the MAC covers, up to the end of the frame
_REQUEST: Final = struct.Struct("<HHH")
_DEVICE_INFO: Final = struct.Struct("<16sBBB")

REQUEST_SIZE: Final = _REQUEST.size
DEVICE_INFO_SIZE: Final = _DEVICE_INFO.size


class FrameType(Named):
    """`msg_type` of a request; that of its response is `response` of it."""

    PROGRAM_KEY = 1
    READ_COUNTER = 2
    WRITE = 3
    READ = 4
    READ_RESULT = 5

    @property
    def response(self) -> int:
        """`msg_type` of the response."""
        return self << 8


class FrameResult(Named):
    """`result` of a response, without COUNTER_EXPIRED."""

    OK = 0
    GENERAL = 1
    AUTHENTICATION = 2
    COUNTER = 3
    ADDRESS = 4
    WRITE = 5
    READ = 6
    NO_KEY = 7


class RpmbOperation(Named):
    """`cmd` of the header of an RPMB request."""

    DATA = 0
    DEVICE_INFO = 1


class Frame(NamedTuple):
    """A frame without its 196 bytes of stuffing."""

    kind: int
    """`msg_type`: a FrameType, or the response of one."""
    key_mac: bytes = bytes(MAC_SIZE)
    """The key to be programmed; else the MAC over all frames, in the last of them."""
    data: bytes = bytes(RPMB_BLOCK_SIZE)
    nonce: bytes = bytes(NONCE_SIZE)
    write_counter: int = 0
    address: int = 0
    """In blocks of 256 bytes: where the whole access begins, also in its later frames."""
    block_count: int = 0
    result: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        """Read 512 bytes."""
        key_mac, content, nonce, counter, address, count, result, kind = _FRAME.unpack(data)
        return cls(kind, key_mac, content, nonce, counter, address, count, result)

    def pack(self) -> bytes:
        """512 bytes."""
        numbers = self.write_counter, self.address, self.block_count, self.result, self.kind
        return _FRAME.pack(self.key_mac, self.data, self.nonce, *numbers)


class RpmbRequest(NamedTuple):
    """Header before the frames of RPC command RPMB."""

    operation: int
    device: int
    block_count: int

    @classmethod
    def unpack(cls, data: bytes) -> RpmbRequest:
        """Read 6 bytes."""
        return cls(*_REQUEST.unpack(data))

    def pack(self) -> bytes:
        """6 bytes."""
        return _REQUEST.pack(*self)


class DeviceInfo(NamedTuple):
    """Answer to DEVICE_INFO."""

    cid: bytes
    size_mult: int
    """EXT_CSD 168: the device's size in SIZE_UNIT."""
    reliable_write_sectors: int
    """EXT_CSD 222: sectors of 512 bytes that one reliable write may have."""
    status: int = 0
    """0 if the rest counts."""

    @classmethod
    def unpack(cls, data: bytes) -> DeviceInfo:
        """Read 19 bytes."""
        return cls(*_DEVICE_INFO.unpack(data))

    def pack(self) -> bytes:
        """19 bytes."""
        return _DEVICE_INFO.pack(*self)


def split_frames(data: bytes) -> list[Frame]:
    """Read whole frames; what is left over behind them is ignored."""
    last = len(data) - len(data) % FRAME_SIZE
    return [Frame.unpack(data[at : at + FRAME_SIZE]) for at in range(0, last, FRAME_SIZE)]


def frames_mac(key: bytes, frames: Iterable[Frame]) -> bytes:
    """HMAC-SHA256 over the data and everything behind it of all frames, in order."""
    return hmac.digest(key, b"".join(frame.pack()[_AUTHENTICATED:] for frame in frames), "sha256")


def authenticate(key: bytes, frames: list[Frame]) -> list[Frame]:
    """The same frames with their MAC in the last one."""
    return [*frames[:-1], frames[-1]._replace(key_mac=frames_mac(key, frames))]


def is_authentic(key: bytes, frames: list[Frame]) -> bool:
    """Tell whether the MAC in the last frame is that of all of them."""
    return hmac.compare_digest(frames[-1].key_mac, frames_mac(key, frames))
