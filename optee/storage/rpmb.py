"""The RPMB device as OP-TEE uses it: frames by RPC to tee-supplicant, authenticated in both directions.

Source: OP-TEE secure storage, section 4. Methods raise TeeError: what the supplicant answered; GENERIC for an answer
that does not fit; SECURITY for one that is not the device's; STORAGE_NOT_AVAILABLE for a device without a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from hv_models.memory import PAGE_MASK
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.abi.rpmb import (
    DEVICE_INFO_SIZE,
    FRAME_SIZE,
    NONCE_SIZE,
    RESULT_MASK,
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
from optee.errors import TeeError
from optee.rpc import RMEM_INPUT, RMEM_OUTPUT, VALUE_OUTPUT, cached_payload, rpc_command
from optee.steps import Steps
from optee.storage.keys import RpmbFileCipher, StorageKeys
from optee.threads import Thread

MAX_TRIES: Final = 10
"""Requests to write one block, before the device is given up until OP-TEE starts anew."""

_RPMB: Final = int(RpcCommand.RPMB)
_PROBE_RESET: Final = int(RpcCommand.RPMB_PROBE_RESET)
_UNKNOWN: Final = (Result.NOT_SUPPORTED, Result.NOT_IMPLEMENTED)
_USER: Final = "RPMB"
_DEVICE: Final = 0  # CFG_RPMB_FS_DEV_ID
_PLACED: Final = (FrameType.READ, FrameType.WRITE)
_NO_INFO: Final = 1  # status of a device info that nobody filled in


class Rpmb:
    """The device for one guest, block by block. What is held in RAM is the key, the counter and the size.

    One block goes with each write (OP-TEE's RPMB_DRIVER_MULTIPLE_WRITE_FIXED is not set), so each is atomic.
    """

    def __init__(self, keys: StorageKeys, random: Callable[[int], bytes], *, write_key: bool) -> None:
        self._keys = keys
        self._random = random
        self._write_key = write_key
        self._key = b""
        self._counter = 0
        self._ready = False
        self.dead = False
        """A write got no authentic answer: nobody knows whether it was done, so nothing is asked any more."""
        self.last_block = 0
        """Index of the last block of the device."""
        self.is_set_up = False
        """The file system on it is known, and writes that were held back earlier are void."""

    def start(self, thread: Thread) -> Steps[None]:
        """Find the device, and see that its key is ours; the first call of all others."""
        if self.dead:
            raise TeeError(Result.COMMUNICATION)
        if self._ready:
            return
        if not self._write_key:
            yield from self._probe(thread)
        if not self.last_block:
            yield from self._get_device_info(thread)
        try:
            self._counter = yield from self._read_counter(thread)
        except TeeError as error:
            if error.result != Result.ITEM_NOT_FOUND:
                raise
            yield from self._program_key(thread)
            self._counter = yield from self._read_counter(thread)
        self._ready = True

    def _probe(self, thread: Thread) -> Steps[None]:
        """Ask whether the kernel itself has RPMB devices. One that does not know the question has tee-supplicant."""
        reply = yield from rpc_command(thread, _PROBE_RESET, ((VALUE_OUTPUT, 0, 0, 0),))
        if reply.ret not in _UNKNOWN:
            raise TeeError(reply.ret or Result.NOT_SUPPORTED)

    def _get_device_info(self, thread: Thread) -> Steps[None]:
        request = RpmbRequest(RpmbOperation.DEVICE_INFO, _DEVICE, 0).pack()
        unanswered = DeviceInfo(b"", 0, 0, _NO_INFO).pack()
        info = DeviceInfo.unpack((yield from self._send(thread, request, DEVICE_INFO_SIZE, unanswered)))
        if info.status or not info.size_mult:
            raise TeeError(Result.GENERIC)
        self.last_block = info.size_mult * (SIZE_UNIT // RPMB_BLOCK_SIZE) - 1
        self._key = self._keys.rpmb_key(info.cid)

    def _send(self, thread: Thread, request: bytes, size: int, preset: bytes = b"") -> Steps[bytes]:
        """One request; request and response begin at pages of one buffer."""
        start = (len(request) + PAGE_MASK) & ~PAGE_MASK
        payload = yield from cached_payload(thread, _USER, start + ((size + PAGE_MASK) & ~PAGE_MASK))
        payload.store(0, request)
        payload.store(start, preset or bytes(size))
        params = (RMEM_INPUT, 0, len(request), payload.cookie), (RMEM_OUTPUT, start, size, payload.cookie)
        reply = yield from rpc_command(thread, _RPMB, params)
        if reply.ret:
            raise TeeError(reply.ret)
        return payload.load(start, size)

    def _exchange(
        self, thread: Thread, frames: Sequence[Frame], count: int = 1, *, header: int = 0
    ) -> Steps[list[Frame]]:
        """Send frames and receive `count`; the last of them must be a good response of the same kind and place."""
        request = RpmbRequest(RpmbOperation.DATA, _DEVICE, header).pack() + b"".join(frame.pack() for frame in frames)
        received = split_frames((yield from self._send(thread, request, count * FRAME_SIZE)))
        asked, last = frames[-1], received[-1]
        result = last.result & RESULT_MASK
        if result == FrameResult.NO_KEY:
            raise TeeError(Result.ITEM_NOT_FOUND)
        if result or last.kind != asked.kind << 8 or (asked.kind in _PLACED and last.address != asked.address):
            raise TeeError(Result.GENERIC)
        return received

    def _read_counter(self, thread: Thread) -> Steps[int]:
        request = Frame(FrameType.READ_COUNTER, nonce=self._random(NONCE_SIZE))
        received = yield from self._exchange(thread, (request,))
        self._verify(received, request)
        return received[-1].write_counter

    def _program_key(self, thread: Thread) -> Steps[None]:
        if not self._write_key:
            raise TeeError(Result.STORAGE_NOT_AVAILABLE)
        yield from self._exchange(thread, (Frame(FrameType.PROGRAM_KEY, key_mac=self._key),))

    def _verify(self, received: list[Frame], request: Frame) -> None:
        if received[-1].nonce != request.nonce or not is_authentic(self._key, received):
            raise TeeError(Result.SECURITY)

    def read(self, thread: Thread, offset: int, size: int, cipher: RpmbFileCipher | None = None) -> Steps[bytes]:
        """Read bytes of the device, with one request; with a cipher they are decrypted."""
        yield from self.start(thread)
        first, start = divmod(offset, RPMB_BLOCK_SIZE)
        count = -(-(start + size) // RPMB_BLOCK_SIZE)
        self._check_range(first, count=1)
        blocks = yield from self._read_blocks(thread, first, count)
        if cipher is not None:
            blocks = [cipher.open(index, block) for index, block in enumerate(blocks, first)]
        return b"".join(blocks)[start : start + size]

    def _read_blocks(self, thread: Thread, first: int, count: int) -> Steps[list[bytes]]:
        request = Frame(FrameType.READ, nonce=self._random(NONCE_SIZE), address=first)
        received = yield from self._exchange(thread, (request,), count, header=count)
        self._verify(received, request)
        return [frame.data for frame in received]

    def write(self, thread: Thread, offset: int, data: bytes, cipher: RpmbFileCipher | None = None) -> Steps[None]:
        """Write bytes of the device, block by block in order; blocks of which only a part is written are read first."""
        yield from self.start(thread)
        first, start = divmod(offset, RPMB_BLOCK_SIZE)
        count = -(-(start + len(data)) // RPMB_BLOCK_SIZE)
        self._check_range(first, count)
        if start or len(data) % RPMB_BLOCK_SIZE:
            old = yield from self.read(thread, first * RPMB_BLOCK_SIZE, count * RPMB_BLOCK_SIZE, cipher)
            data = old[:start] + data + old[start + len(data) :]
        for index in range(count):
            block = data[index * RPMB_BLOCK_SIZE : (index + 1) * RPMB_BLOCK_SIZE]
            if cipher is not None:
                block = cipher.seal(first + index, block)
            yield from self._write_block(thread, first + index, block)

    def _check_range(self, first: int, count: int) -> None:
        if first + count - 1 > self.last_block:
            raise TeeError(Result.GENERIC)

    def _write_block(self, thread: Thread, index: int, block: bytes) -> Steps[None]:
        """Write until the device says so. Only the counter's next value is ever believed of what is not authentic."""
        for _ in range(MAX_TRIES):
            frame = Frame(FrameType.WRITE, data=block, write_counter=self._counter, address=index, block_count=1)
            try:
                (response,) = yield from self._exchange(thread, authenticate(self._key, [frame]))
            except TeeError:
                continue
            if response.write_counter == self._counter + 1:
                self._counter += 1
                if is_authentic(self._key, [response]):
                    return
        self.dead = True
        raise TeeError(Result.COMMUNICATION)

    def flush(self, thread: Thread) -> Steps[None]:
        """An operation ends well: see that all it wrote is on the device. Nothing is kept here."""
        yield from ()

    def drop(self) -> None:
        """An operation failed: forget what it wrote and is not on the device yet."""

    def is_atomic(self, offset: int, size: int) -> bool:
        """Tell whether a write is done by one request, so that it is done as a whole or not at all."""
        return offset % RPMB_BLOCK_SIZE + size <= RPMB_BLOCK_SIZE
