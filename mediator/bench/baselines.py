"""What the same bytes cost at the least: the yardsticks that each measurement stands beside, taken in the same run."""

import struct
from collections.abc import Callable
from typing import Final

import numpy as np

from hv_models.memory import PAGE_SIZE
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, HEADER_SIZE, PARAM, list_pages

_REGISTERS: Final = struct.Struct("<8Q")
_TABLE_PAGES: Final = 65536
"""Pages of the table that `take` looks addresses up in: those of a guest's RAM."""


def registers() -> Callable[[], object]:
    """Pack and unpack the registers of a call and of its answer."""
    words = tuple(range(8))

    def run() -> None:
        for _ in range(2):
            _REGISTERS.unpack(_REGISTERS.pack(*words))

    return run


def message(params: int) -> Callable[[], object]:
    """Copy a page, read header and parameters, write them to another page, and write the answer back."""
    guest, shadow = memoryview(bytearray(PAGE_SIZE)), memoryview(bytearray(PAGE_SIZE))
    HEADER.pack_into(guest, 0, 1, 0, 1, 0, 0, 0, 0, params)
    end = HEADER_SIZE + PARAM.size * params

    def run() -> None:
        data = guest.tobytes()
        header = HEADER.unpack_from(data)
        found = list(PARAM.iter_unpack(data[HEADER_SIZE:end]))
        shadow[:] = data
        HEADER.pack_into(shadow, 0, *header)
        at = HEADER_SIZE
        for param in found:
            PARAM.pack_into(shadow, at, *param)
            at += PARAM.size
        guest[:end] = shadow[:end].tobytes()

    return run


def lists(buffers: int, pages: int) -> Callable[[], object]:
    """`message`, and for each buffer: copy its list pages, read the addresses and write them to other pages."""
    whole = message(buffers)
    lengths = [min(ENTRIES_PER_PAGE, pages - at) for at in range(0, pages, ENTRIES_PER_PAGE)]
    codecs = [struct.Struct(f"<{length}Q") for length in lengths] * buffers
    source = [memoryview(bytearray(PAGE_SIZE)) for _ in range(list_pages(pages))] * buffers
    target = memoryview(bytearray(PAGE_SIZE))

    def run() -> None:
        whole()
        for codec, page in zip(codecs, source, strict=True):
            codec.pack_into(target, 0, *codec.unpack_from(page.tobytes()))

    return run


def take(buffers: int, pages: int) -> Callable[[], object]:
    """Look each buffer's addresses up in a dense table by `numpy.take`, one call for a buffer."""
    table = np.arange(_TABLE_PAGES, dtype=np.uint64)
    spread = np.arange(pages, dtype=np.int64) * 40503 % _TABLE_PAGES

    def run() -> None:
        for _ in range(buffers):
            table.take(spread)

    return run
