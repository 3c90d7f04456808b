"""A guest's memory with somebody looking on: which bytes the mediator reads, and what it writes."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from hv_models.memory import PAGE_SIZE, Ipa
from hv_models.stage2 import Pinned
from mediator.core.ports import GuestMemory
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    OFFSET_RET,
    OFFSET_SESSION,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    ParamType,
)

_VALUE_OUTPUTS: Final = (ParamType.VALUE_OUTPUT, ParamType.VALUE_INOUT)
_SIZE_OUTPUTS: Final = (ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)


class WatchedMemory:
    """A guest's memory that notes what the mediator reads and writes of it during one request.

    reads: (IPA, bytes) of messages and RPC arguments; loads: (pin, offset, bytes); writes: (IPA, data), with IPA -1
    for what goes through a pin; accesses, pages: how often it was asked, and for how many pages.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.reads: list[tuple[int, int]] = []
        self.loads: list[tuple[int, int, int]] = []
        self.outputs: dict[int, set[tuple[int, int]]] = {}
        """By IPA of a message: the fields (start, stop) of it that the guest gets back."""
        self.words: set[int] = set()
        """What the guest itself wrote in live messages and could be taken for an address."""
        self.writes: list[tuple[int, bytes]] = []
        self.accesses = 0
        self.pages = 0

    def begin(self) -> None:
        """A request begins: forget the one before."""
        self.reads.clear()
        self.loads.clear()
        self.writes.clear()
        self.accesses = 0
        self.pages = 0

    def read(self, ipa: Ipa, size: int, *, writable: bool = False) -> bytes:
        """See `GuestMemory.read`."""
        self.accesses += 1
        data = self.memory.read(ipa, size, writable=writable)
        if not writable:
            # Messages and RPC arguments; each list page is a stage of its own, whatever page it names.
            self.reads.append((ipa, size))
            if size == PAGE_SIZE:
                # Two live calls may have their messages in one page.
                self.outputs.setdefault(ipa, set()).update(output_fields(data))
                self.words.update(word for word in words(data) if word >> 32)
        return data

    def write_fields(self, ipa: Ipa, data: bytes, fields: Sequence[slice]) -> None:
        """See `GuestMemory.write_fields`."""
        self.accesses += 1
        self.memory.write_fields(ipa, data, fields)
        self.writes.extend((ipa + field.start, data[field]) for field in fields)

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """See `GuestMemory.pin`."""
        self.accesses += 1
        self.pages += len(ipas)
        return self.memory.pin(ipas)

    def unpin(self, pinned: Pinned) -> None:
        """See `GuestMemory.unpin`."""
        self.memory.unpin(pinned)

    def load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        """See `GuestMemory.load`."""
        self.accesses += 1
        self.loads.append((id(pinned), offset, size))
        return self.memory.load(pinned, offset, size)

    def store_fields(self, pinned: Pinned, base: int, data: bytes, fields: Sequence[slice]) -> None:
        """See `GuestMemory.store_fields`."""
        self.accesses += 1
        self.memory.store_fields(pinned, base, data, fields)
        self.writes.extend((-1, data[field]) for field in fields)

    def mark_dirty(self, pinned: Pinned) -> None:
        """See `GuestMemory.mark_dirty`."""
        self.memory.mark_dirty(pinned)


def output_fields(message: bytes) -> list[tuple[int, int]]:
    """What the guest gets back of a message: session, ret, origin, outputs, and what stands behind it."""
    count = min(HEADER.unpack_from(message)[7], MAX_PARAMS)
    fields = [(OFFSET_SESSION, OFFSET_SESSION + 4), (OFFSET_RET, OFFSET_RET + 8)]
    at = HEADER_SIZE
    for attribute, _, _, _ in PARAM.iter_unpack(message[HEADER_SIZE : HEADER_SIZE + PARAM_SIZE * count]):
        kind = attribute & TYPE_MASK
        if kind in _VALUE_OUTPUTS:
            fields.append((at + 8, at + 32))
        elif kind in _SIZE_OUTPUTS:
            fields.append((at + 16, at + 24))
        at += PARAM_SIZE
    return [*fields, (at, PAGE_SIZE)]


def words(data: bytes) -> list[int]:
    """The 64-bit words of what was written, at the alignment of the fields that hold addresses."""
    whole = len(data) - len(data) % 8
    found: list[int] = np.frombuffer(data[:whole], "<u8").tolist()
    return found
