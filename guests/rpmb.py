"""An eMMC's RPMB partition: a few blocks that only the holder of its key can write, and nobody can roll back.

Source: JEDEC eMMC, replay protected memory block; OP-TEE secure storage, section 4. The device is hardware: it outlives
guests, and guests that are given the same object share it.
"""

from typing import Final

from optee.abi.results import Result
from optee.abi.rpmb import (
    COUNTER_EXPIRED,
    DEVICE_INFO_SIZE,
    FRAME_SIZE,
    REQUEST_SIZE,
    RPMB_BLOCK_SIZE,
    SIZE_UNIT,
    DeviceInfo,
    Frame,
    FrameResult,
    FrameType,
    RpmbOperation,
    RpmbRequest,
    authenticate,
    is_authentic,
    split_frames,
)

DEFAULT_CID: Final = bytes.fromhex("70010053494d5250421001020304a500")
"""Manufacturer, OEM, "SIMRPB", revision 1.0, serial number, date; without a checksum."""
LAST_COUNTER: Final = 0xFFFFFFFF
_BLOCKS_IN_SECTOR: Final = 2
_NO_FRAME: Final = Frame(0)
_SINGLE_RESPONSE: Final = (FrameType.PROGRAM_KEY, FrameType.READ_COUNTER, FrameType.WRITE)
_SINGLE_REQUEST: Final = (FrameType.READ_COUNTER, FrameType.READ)
_CHANGES: Final = (FrameType.PROGRAM_KEY, FrameType.WRITE)


class RpmbDevice:
    """The partition, and the card's registers that describe it.

    size_mult: size in 128 KiB (EXT_CSD 168), at most 128: an address has 16 bits. reliable_write_sectors: sectors of
    512 bytes that one write may have at most (EXT_CSD 222). A write is done as a whole or not at all.
    """

    def __init__(self, cid: bytes = DEFAULT_CID, *, size_mult: int = 1, reliable_write_sectors: int = 1) -> None:
        self.cid = cid
        self.size_mult = size_mult
        self.reliable_write_sectors = reliable_write_sectors
        self.key: bytes | None = None
        """Programmed once and for all."""
        self.write_counter = 0
        self.content = bytearray(size_mult * SIZE_UNIT)
        self._request = _NO_FRAME
        self._result = 0

    @property
    def info(self) -> DeviceInfo:
        """What the kernel tells of the card."""
        return DeviceInfo(self.cid, self.size_mult, self.reliable_write_sectors)

    @property
    def blocks(self) -> int:
        """Blocks of 256 bytes."""
        return len(self.content) // RPMB_BLOCK_SIZE

    def write(self, data: bytes) -> None:
        """Take request frames (WRITE_MULTIPLE_BLOCK). A response is then to be read, of writes after READ_RESULT."""
        frames = split_frames(data)
        if not frames:
            return
        request = frames[-1]
        if request.kind == FrameType.READ_RESULT:
            return
        self._request = request
        if request.kind == FrameType.PROGRAM_KEY:
            self._result = self._program(request)
        elif request.kind == FrameType.WRITE:
            self._result = self._store(frames)
        elif request.kind in (FrameType.READ, FrameType.READ_COUNTER):
            self._result = FrameResult.NO_KEY if self.key is None else FrameResult.OK
        else:
            self._result = FrameResult.GENERAL

    def read(self, count: int) -> bytes:
        """Give `count` response frames (READ_MULTIPLE_BLOCK)."""
        request, result = self._request, self._result
        if self.write_counter == LAST_COUNTER:
            result |= COUNTER_EXPIRED
        frame = Frame((request.kind << 8) & 0xFFFF, result=result)
        frames = [frame] * count
        if request.kind == FrameType.READ:
            frames = self._load(frame, request, count)
        elif request.kind == FrameType.READ_COUNTER:
            frames[-1:] = [frame._replace(nonce=request.nonce, write_counter=self.write_counter)]
        elif request.kind == FrameType.WRITE:
            frames[-1:] = [frame._replace(write_counter=self.write_counter, address=request.address)]
        if self.key is not None and request.kind != FrameType.PROGRAM_KEY:
            frames = authenticate(self.key, frames)
        return b"".join(each.pack() for each in frames)

    def _program(self, request: Frame) -> int:
        if self.key is not None:
            return FrameResult.GENERAL
        self.key = request.key_mac
        return FrameResult.OK

    def _store(self, frames: list[Frame]) -> int:
        last = frames[-1]
        if self.key is None:
            return FrameResult.NO_KEY
        if len(frames) > self.reliable_write_sectors * _BLOCKS_IN_SECTOR or last.block_count != len(frames):
            return FrameResult.GENERAL
        if self.write_counter == LAST_COUNTER:
            return FrameResult.WRITE
        if last.address + len(frames) > self.blocks:
            return FrameResult.ADDRESS
        if not is_authentic(self.key, frames):
            return FrameResult.AUTHENTICATION
        if last.write_counter != self.write_counter:
            return FrameResult.COUNTER
        at = last.address * RPMB_BLOCK_SIZE
        self.content[at : at + len(frames) * RPMB_BLOCK_SIZE] = b"".join(frame.data for frame in frames)
        self.write_counter += 1
        return FrameResult.OK

    def _load(self, frame: Frame, request: Frame, count: int) -> list[Frame]:
        frame = frame._replace(nonce=request.nonce, address=request.address, block_count=count)
        if self.key is None:
            return [frame] * count
        if request.address + count > self.blocks:
            return [frame._replace(result=FrameResult.ADDRESS)] * count
        places = range(request.address * RPMB_BLOCK_SIZE, (request.address + count) * RPMB_BLOCK_SIZE, RPMB_BLOCK_SIZE)
        return [frame._replace(data=bytes(self.content[at : at + RPMB_BLOCK_SIZE])) for at in places]


def answer_request(device: RpmbDevice | None, request: bytes, size: int) -> tuple[int, bytes]:
    """What tee-supplicant makes of RPC command RPMB: a result, and at most `size` bytes of response.

    request: header, then frames. Source: optee_client, rpmb.c: without a device there is nothing to tell of it, and
    frames have nowhere to go.
    """
    if len(request) < REQUEST_SIZE:
        return Result.BAD_PARAMETERS, b""
    header, data = RpmbRequest.unpack(request[:REQUEST_SIZE]), request[REQUEST_SIZE:]
    if header.device:
        device = None
    if header.operation == RpmbOperation.DEVICE_INFO:
        if data or size != DEVICE_INFO_SIZE:
            return Result.BAD_PARAMETERS, b""
        return (Result.ITEM_NOT_FOUND, b"") if device is None else (Result.SUCCESS, device.info.pack())
    if header.operation != RpmbOperation.DATA or device is None:
        return Result.BAD_PARAMETERS, b""
    frames, responses = split_frames(data), size // FRAME_SIZE
    kinds = {frame.kind for frame in frames}
    if len(kinds) != 1 or not responses:
        return Result.BAD_PARAMETERS, b""
    kind = kinds.pop()
    if kind not in (*_SINGLE_RESPONSE, *_SINGLE_REQUEST):
        return Result.GENERIC, b""
    if (kind in _SINGLE_RESPONSE and responses != 1) or (kind in _SINGLE_REQUEST and len(frames) != 1):
        return Result.BAD_PARAMETERS, b""
    device.write(data)
    if kind in _CHANGES:
        device.write(Frame(FrameType.READ_RESULT).pack())
    return Result.SUCCESS, device.read(responses)
