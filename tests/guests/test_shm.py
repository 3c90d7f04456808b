"""Page lists and cookies."""

import struct

import pytest

from guests.memory import Buffer, PageAllocator
from guests.shm import SharedMemoryTable, list_size, write_page_list
from hv_models.memory import PAGE_SIZE
from tests.guests.secure import BASE, make_ram


@pytest.mark.parametrize("count", [1, 2, 510, 511, 512, 1022, 1023])
@pytest.mark.parametrize("offset", [0, 0xDF0])
def test_page_list(count: int, offset: int) -> None:
    ram = make_ram(2048)
    pages = PageAllocator(BASE, ram.size)
    shm = SharedMemoryTable().add(Buffer(ram, pages.pages(count), count * PAGE_SIZE - offset, offset))
    lists = pages.pages(list_size(shm))
    assert len(lists) == -(-count // 511)
    param = write_page_list(ram, lists, shm)
    assert (param.attr, param.b, param.c) == (0x20A, count * PAGE_SIZE - offset, shm.cookie)
    assert param.a % PAGE_SIZE == offset
    found: list[int] = []
    at = param.a - offset
    for _ in lists:
        words = struct.unpack("<512Q", ram.read(at, PAGE_SIZE))
        found += words[:511]
        at = words[511]
    assert tuple(found[:count]) == shm.buffer.pages


def test_a_freed_cookie_is_reused_at_once_and_never_doubled() -> None:
    ram = make_ram()
    table = SharedMemoryTable()
    buffer = Buffer(ram, (), 0)
    first, second = table.add(buffer), table.add(buffer)
    assert first.cookie != second.cookie and 0 not in (first.cookie, second.cookie)
    table.discard(first)
    assert table.get(first.cookie) is None
    again = table.add(buffer)
    assert again.cookie == first.cookie and table.get(again.cookie) is again
    with pytest.raises(KeyError):
        table.discard(second)
        table.discard(second)
