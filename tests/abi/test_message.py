"""Sizes, counts and refusals of messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optee.abi.message import MAX_PARAMS, Message, Param, list_pages, message_size, page_count

LIMIT = 16384 * 4096
SIZES = [
    *(0, 1, 4095, 4096, 4097, LIMIT - 1, LIMIT, LIMIT + 1),
    *(2**32 - 4096, 2**32, 2**32 + 4096, 2**44 + 4096, 2**63, 2**64 - 4096, 2**64 - 1),
]
COUNTS = [*range(6), 126, 127, 128, 0x07FFFFFF, 0x08000000, 0xFFFFFFFF]


@pytest.mark.parametrize("size", SIZES, ids=hex)
@pytest.mark.parametrize("offset", [0, 1, 4095])
def test_page_count_is_the_least_that_covers_the_buffer(size, offset):
    pages = page_count(size, offset)
    assert (pages - 1) * 4096 < offset + size <= pages * 4096
    assert pages == (size + offset - 1) // 4096 + 1


@given(st.integers(0, 2**64), st.integers(0, 4095))
def test_page_count_is_the_number_of_pages_touched(size, offset):
    first, last = 0, (offset + size - 1) // 4096
    assert page_count(size, offset) == last - first + 1


@pytest.mark.parametrize("pages", [0, 1, 2, 510, 511, 512, 1021, 1022, 1023, 2**52])
def test_list_pages_is_the_least_that_names_all(pages):
    count = list_pages(pages)
    assert (count - 1) * 511 < pages <= count * 511


@pytest.mark.parametrize("count", COUNTS, ids=hex)
def test_a_message_of_count_parameters(count):
    assert message_size(count) == 32 + 32 * count
    data = bytes(28) + count.to_bytes(4, "little") + bytes(32 * 128)
    if count > MAX_PARAMS:
        with pytest.raises(ValueError, match=f"{count} parameters, at most 127"):
            Message.unpack(data)
    else:
        assert Message.unpack(data).params == [Param(0)] * count
        with pytest.raises(ValueError, match="bytes given"):
            Message.unpack(data[: message_size(count) - 1])


def test_refusals_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"^message: 20 bytes given, a header has 32$"):
        Message.unpack(bytes(20))
    with pytest.raises(ValueError, match=r"^message: 63 bytes given, 1 parameters make 64$"):
        Message.unpack(Message(cmd=0, params=[Param(0)]).pack()[:63])
    with pytest.raises(ValueError, match=r"^message: 128 parameters, at most 127"):
        Message(cmd=0, params=[Param(0)] * 128).pack()


def test_bytes_behind_the_message_are_not_looked_at():
    original = Message(cmd=1, func=2, session=3, params=[Param(1, 2, 3, 4)])
    assert Message.unpack(original.pack() + b"\xff" * 100) == original
