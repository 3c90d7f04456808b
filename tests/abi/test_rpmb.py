"""Frames and requests of RPMB, compared with their layout in the standard and with HMAC by its definition."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from optee.abi.rpmb import (
    DEVICE_INFO_SIZE,
    REQUEST_SIZE,
    DeviceInfo,
    Frame,
    FrameType,
    RpmbOperation,
    RpmbRequest,
    authenticate,
    frames_mac,
    is_authentic,
    split_frames,
)

WORDS = st.integers(0, 0xFFFF)
FRAMES = st.builds(
    Frame,
    kind=WORDS,
    key_mac=st.binary(min_size=32, max_size=32),
    data=st.binary(min_size=256, max_size=256),
    nonce=st.binary(min_size=16, max_size=16),
    write_counter=st.integers(0, 0xFFFFFFFF),
    address=WORDS,
    block_count=WORDS,
    result=WORDS,
)
KEYS = st.binary(min_size=32, max_size=32)


def hmac_sha256(key: bytes, text: bytes) -> bytes:
    """RFC 2104, for keys of at most 64 bytes."""
    key = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in key) + text).digest()
    return hashlib.sha256(bytes(byte ^ 0x5C for byte in key) + inner).digest()


@given(FRAMES)
def test_fields_of_a_frame_are_where_the_standard_has_them(frame: Frame) -> None:
    raw = frame.pack()
    assert len(raw) == 512 and raw[:196] == bytes(196)
    assert (raw[196:228], raw[228:484], raw[484:500]) == (frame.key_mac, frame.data, frame.nonce)
    assert struct.unpack(">IHHHH", raw[500:]) == (
        frame.write_counter, frame.address, frame.block_count, frame.result, frame.kind,
    )  # fmt: skip
    assert Frame.unpack(raw) == frame


@given(st.lists(FRAMES, max_size=4), st.binary(max_size=511))
def test_frames_are_split_and_what_is_left_over_is_ignored(frames: list[Frame], rest: bytes) -> None:
    assert split_frames(b"".join(frame.pack() for frame in frames) + rest) == frames


@given(KEYS, st.lists(FRAMES, min_size=1, max_size=3), st.integers(0, 283))
def test_the_mac_covers_data_and_what_follows_of_every_frame_and_stands_in_the_last(key, frames, at) -> None:
    signed = authenticate(key, frames)
    expected = hmac_sha256(key, b"".join(frame.pack()[228:] for frame in frames))
    assert signed[:-1] == frames[:-1] and signed[-1] == frames[-1]._replace(key_mac=expected)
    assert frames_mac(key, signed) == expected and is_authentic(key, signed)
    for number in range(len(signed)):
        raw = bytearray(signed[number].pack())
        raw[228 + at] ^= 1
        assert not is_authentic(key, [*signed[:number], Frame.unpack(bytes(raw)), *signed[number + 1 :]])
    assert not is_authentic(bytes(32) if any(key) else b"\1" * 32, signed)


def test_requests_and_device_information_are_packed_as_op_tee_reads_them() -> None:
    request = RpmbRequest(RpmbOperation.DEVICE_INFO, 0x102, 0x304)
    assert request.pack() == b"\1\0\2\1\4\3" and RpmbRequest.unpack(request.pack()) == request
    info = DeviceInfo(bytes(range(16)), 0x20, 1, 2)
    assert info.pack() == bytes(range(16)) + b"\x20\1\2" and DeviceInfo.unpack(info.pack()) == info
    assert (REQUEST_SIZE, DEVICE_INFO_SIZE) == (6, 19)


def test_a_response_has_the_type_of_its_request_in_the_high_byte() -> None:
    assert [kind.response for kind in FrameType] == [0x100, 0x200, 0x300, 0x400, 0x500]
