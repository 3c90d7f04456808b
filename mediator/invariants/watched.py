"""A guest's memory with somebody looking on: which bytes the mediator reads, what it pins, and what it writes."""

from collections.abc import Iterator, Sequence
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
    NONCONTIG,
    OFFSET_RET,
    OFFSET_SESSION,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    ParamType,
    list_pages,
    page_count,
)

_VALUE_OUTPUTS: Final = (ParamType.VALUE_OUTPUT, ParamType.VALUE_INOUT)
_SIZE_OUTPUTS: Final = (ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)
_TMEM: Final = (ParamType.TMEM_INPUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)


class Work:
    """What one request made the mediator do: from an SMC, or an answer of OP-TEE, to what comes of it.

    reads: (IPA, bytes) of messages and RPC arguments; loads: (pin, offset, bytes); writes: (IPA, data), with IPA -1
    for what goes through a pin; accesses: how often the memory was asked; pinned: pages that were translated;
    named, lists: data pages and list pages that the messages read name, as far as a policy allows them.
    """

    __slots__ = ("accesses", "lists", "loaded", "loads", "named", "pinned", "pins", "reads", "writes")

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.loads: list[tuple[int, int, int]] = []
        self.loaded: list[bytes] = []
        self.writes: list[tuple[int, bytes]] = []
        self.pins: list[Pinned] = []
        self.accesses = 0
        self.pinned = 0
        self.named = 0
        self.lists = 0


class WatchedMemory:
    """A guest's memory that notes what the mediator reads, pins and writes of it; `work` is the request's.

    pins: what is pinned now, and `pages` how many pages that are; `limit` is the guest's, of pages for one buffer.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.limit = 0
        self.work = Work()
        self.outputs: dict[int, set[tuple[int, int]]] = {}
        """By IPA of a message: the fields (start, stop) of it that the guest gets back."""
        self.words: set[int] = set()
        """What the guest itself wrote in live messages and could be taken for a host address."""
        self.lowest = 1 << 64
        """The lowest host address."""
        self.pins: dict[int, Pinned] = {}
        self.pages = 0

    def read(self, ipa: Ipa, size: int, *, writable: bool = False) -> bytes:
        """See `GuestMemory.read`."""
        work = self.work
        work.accesses += 1
        data = self.memory.read(ipa, size, writable=writable)
        if not writable:
            # Messages and RPC arguments; each list page is a stage of its own, whatever page it names.
            work.reads.append((ipa, size))
            fields = self._look(data, work)
            if size == PAGE_SIZE:
                # Two live calls may have their messages in one page.
                self.outputs.setdefault(ipa, set()).update(fields)
                words = np.frombuffer(data, "<u8")
                if int(words.max()) >= self.lowest:
                    self.words.update(words[words >= self.lowest].tolist())
        return data

    def write_fields(self, ipa: Ipa, data: bytes, fields: Sequence[slice]) -> None:
        """See `GuestMemory.write_fields`."""
        self.work.accesses += 1
        self.memory.write_fields(ipa, data, fields)
        self.work.writes.extend([(ipa + field.start, data[field]) for field in fields])

    def pin(self, ipas: npt.NDArray[np.uint64]) -> Pinned:
        """See `GuestMemory.pin`."""
        work = self.work
        work.accesses += 1
        pinned = self.memory.pin(ipas)
        count = len(pinned.pas)
        work.pinned += count
        work.pins.append(pinned)
        self.pins[id(pinned)] = pinned
        self.pages += count
        return pinned

    def unpin(self, pinned: Pinned) -> None:
        """See `GuestMemory.unpin`."""
        self.memory.unpin(pinned)
        if self.pins.pop(id(pinned), None) is not None:
            self.pages -= len(pinned.pas)

    def load(self, pinned: Pinned, offset: int, size: int) -> bytes:
        """See `GuestMemory.load`."""
        self.work.accesses += 1
        self.work.loads.append((id(pinned), offset, size))
        data = self.memory.load(pinned, offset, size)
        self.work.loaded.append(data)
        return data

    def store_fields(self, pinned: Pinned, base: int, data: bytes, fields: Sequence[slice]) -> None:
        """See `GuestMemory.store_fields`."""
        self.work.accesses += 1
        self.memory.store_fields(pinned, base, data, fields)
        self.work.writes.extend([(-1, data[field]) for field in fields])

    def mark_dirty(self, pinned: Pinned) -> None:
        """See `GuestMemory.mark_dirty`."""
        self.memory.mark_dirty(pinned)

    def named(self, work: Work) -> tuple[int, int]:
        """Data pages and list pages that the messages of a request name."""
        if work.loaded:
            # A message in a registered buffer, perhaps in pieces.
            data = b"".join(work.loaded)
            work.loaded.clear()
            self._look(data, work)
        return work.named, work.lists

    def _look(self, message: bytes, work: Work) -> list[tuple[int, int]]:
        """What the guest gets back of a message: session, ret, origin, outputs, and what stands behind it."""
        if len(message) < HEADER_SIZE:
            return []
        count = min(HEADER.unpack_from(message)[7], MAX_PARAMS)
        fields = [(OFFSET_SESSION, OFFSET_SESSION + 4), (OFFSET_RET, OFFSET_RET + 8)]
        at = HEADER_SIZE
        whole = (len(message) - HEADER_SIZE) // PARAM_SIZE
        count = min(count, whole)
        for attribute, pointer, size, _ in PARAM.iter_unpack(message[HEADER_SIZE : HEADER_SIZE + PARAM_SIZE * count]):
            kind = attribute & TYPE_MASK
            if kind in _VALUE_OUTPUTS:
                fields.append((at + 8, at + 32))
            elif kind in _SIZE_OUTPUTS:
                fields.append((at + 16, at + 24))
            if kind in _TMEM and pointer and attribute & NONCONTIG:
                pages = page_count(size, pointer % PAGE_SIZE)
                if pages <= self.limit:
                    work.named += pages
                    work.lists += list_pages(pages)
            at += PARAM_SIZE
        return [*fields, (at, PAGE_SIZE)]


def words(writes: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, int]]:
    """(IPA of the write, word) for the 64-bit words of what was written, at the alignment of fields with addresses."""
    for at, data in writes:
        for word in np.frombuffer(data[: len(data) & ~7], "<u8").tolist() if len(data) > 24 else _few(data):
            yield at, word


def _few(data: bytes) -> Iterator[int]:
    for start in range(0, len(data) - 7, 8):
        yield int.from_bytes(data[start : start + 8], "little")
