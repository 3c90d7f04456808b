"""The RPMB device: what it does with each request, by the frames of the standard."""

import hashlib
import hmac
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests.rpmb import LAST_COUNTER, RpmbDevice, answer_request
from optee.abi.results import Result

KEY = bytes(range(32))
NONCE = b"n" * 16
OK, GENERAL, AUTHENTICATION, COUNTER, ADDRESS, WRITE, _, NO_KEY = range(8)


def frame(kind: int, *, mac=bytes(32), data=b"", nonce=bytes(16), counter=0, address=0, count=0) -> bytes:
    body = data.ljust(256, b"\0") + nonce + struct.pack(">IHHHH", counter, address, count, 0, kind)
    return bytes(196) + mac + body


def signed(*frames: bytes, key: bytes = KEY) -> bytes:
    mac = hmac.new(key, b"".join(each[228:] for each in frames), hashlib.sha256).digest()
    return b"".join(frames[:-1]) + frames[-1][:196] + mac + frames[-1][228:]


def fields(response: bytes) -> dict[str, int]:
    names = "counter", "address", "count", "result", "kind"
    return dict(zip(names, struct.unpack(">IHHHH", response[-12:]), strict=True))


def ask(device: RpmbDevice, frames: bytes, responses: int = 1) -> bytes:
    result, response = answer_request(device, struct.pack("<HHH", 0, 0, 0) + frames, 512 * responses)
    assert result == Result.SUCCESS
    return response


def write(device: RpmbDevice, address: int, *blocks: bytes, counter: int | None = None, key: bytes = KEY) -> int:
    counter = device.write_counter if counter is None else counter
    frames = [frame(3, data=block, counter=counter, address=address, count=len(blocks)) for block in blocks]
    response = ask(device, signed(*frames, key=key))
    assert fields(response)["kind"] == 0x300
    if device.key is not None:
        assert response == signed(response), "a refusal is authenticated too"
    return fields(response)["result"]


def read(device: RpmbDevice, address: int, count: int = 1) -> bytes:
    response = ask(device, frame(4, nonce=NONCE, address=address), count)
    frames = [response[at : at + 512] for at in range(0, len(response), 512)]
    assert response == signed(*frames)
    for each in frames:
        assert fields(each) == {"counter": 0, "address": address, "count": count, "result": OK, "kind": 0x400}
        assert each[484:500] == NONCE
    return b"".join(each[228:484] for each in frames)


@pytest.fixture
def device() -> RpmbDevice:
    device = RpmbDevice()
    assert fields(ask(device, frame(1, mac=KEY))) == {
        "counter": 0,
        "address": 0,
        "count": 0,
        "result": OK,
        "kind": 0x100,
    }
    return device


def test_nothing_works_without_a_key() -> None:
    device = RpmbDevice()
    for request in (frame(2), frame(3, count=1), frame(4)):
        assert fields(ask(device, request))["result"] == NO_KEY
    assert not any(device.content)


def test_the_key_is_programmed_once(device: RpmbDevice) -> None:
    assert fields(ask(device, frame(1, mac=bytes(32))))["result"] == GENERAL
    assert write(device, 0, b"data") == OK


def test_the_counter_is_read_with_a_nonce(device: RpmbDevice) -> None:
    assert write(device, 0, b"data") == OK
    response = ask(device, frame(2, nonce=NONCE))
    assert response == signed(response)
    assert response[484:500] == NONCE
    assert fields(response)["counter"] == 1


def test_reading_what_was_written(device: RpmbDevice) -> None:
    assert write(device, 5, b"five", b"six") == OK
    assert read(device, 5, 2) == b"five".ljust(256, b"\0") + b"six".ljust(256, b"\0")
    assert device.write_counter == 1, "one request"


def test_a_write_is_refused_as_a_whole(device: RpmbDevice) -> None:
    assert write(device, 5, b"five") == OK
    before = bytes(device.content)
    assert write(device, 5, b"replayed", counter=0) == COUNTER
    assert write(device, 5, b"ahead", counter=2) == COUNTER
    assert write(device, 5, b"forged", key=bytes(32)) == AUTHENTICATION
    assert write(device, device.blocks, b"beyond") == ADDRESS
    assert write(device, device.blocks - 1, b"last", b"beyond") == ADDRESS
    assert write(device, 5, b"1", b"2", b"3") == GENERAL, "a reliable write has two blocks here"
    request = signed(frame(3, counter=1, address=5, count=2))
    assert fields(ask(device, request))["result"] == GENERAL, "one block, where two are announced"
    assert bytes(device.content) == before
    assert device.write_counter == 1


def test_reading_beyond_the_end(device: RpmbDevice) -> None:
    response = ask(device, frame(4, nonce=NONCE, address=device.blocks - 1), 2)
    assert fields(response)["result"] == ADDRESS
    assert response[228:484] == bytes(256)


def test_an_expired_counter_ends_all_writing(device: RpmbDevice) -> None:
    device.write_counter = LAST_COUNTER - 1
    assert write(device, 0, b"last") == 0x80 | OK
    assert write(device, 0, b"more") == 0x80 | WRITE
    assert fields(ask(device, frame(4)))["result"] == 0x80
    assert bytes(device.content[:4]) == b"last"


def test_device_info() -> None:
    device = RpmbDevice(bytes(range(16)), size_mult=3, reliable_write_sectors=4)
    request = struct.pack("<HHH", 1, 0, 0)
    assert answer_request(device, request, 19) == (Result.SUCCESS, bytes(range(16)) + bytes([3, 4, 0]))
    assert answer_request(None, request, 19)[0] == Result.ITEM_NOT_FOUND
    assert answer_request(device, struct.pack("<HHH", 1, 1, 0), 19)[0] == Result.ITEM_NOT_FOUND
    assert answer_request(device, request, 18)[0] == Result.BAD_PARAMETERS
    assert answer_request(device, request + b"x", 19)[0] == Result.BAD_PARAMETERS
    assert device.blocks == 3 * 512


def test_what_the_supplicant_refuses(device: RpmbDevice) -> None:
    def result(operation: int, number: int, frames: bytes, size: int) -> int:
        return answer_request(device, struct.pack("<HHH", operation, number, 0) + frames, size)[0]

    assert answer_request(device, b"short", 512)[0] == Result.BAD_PARAMETERS
    assert result(2, 0, frame(4), 512) == Result.BAD_PARAMETERS
    assert result(0, 1, frame(4), 512) == Result.BAD_PARAMETERS, "another device"
    assert answer_request(None, struct.pack("<HHH", 0, 0, 0) + frame(4), 512)[0] == Result.BAD_PARAMETERS
    assert result(0, 0, frame(3) + frame(4), 512) == Result.BAD_PARAMETERS, "requests of two kinds"
    assert result(0, 0, frame(4) + frame(4), 512) == Result.BAD_PARAMETERS
    assert result(0, 0, frame(3), 1024) == Result.BAD_PARAMETERS
    assert result(0, 0, frame(4), 511) == Result.BAD_PARAMETERS
    assert result(0, 0, b"", 512) == Result.BAD_PARAMETERS
    assert result(0, 0, frame(5), 512) == Result.GENERIC
    assert result(0, 0, frame(9), 512) == Result.GENERIC
    assert device.write_counter == 0


@given(data=st.binary(max_size=1200), size=st.integers(0, 3000))
def test_any_request_gets_an_answer_that_fits(data: bytes, size: int) -> None:
    device = RpmbDevice()
    device.key = KEY
    result, response = answer_request(device, data, size)
    assert len(response) <= size
    assert result in iter(Result)
    assert not any(device.content)
