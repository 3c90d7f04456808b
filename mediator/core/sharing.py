"""Shared buffers: made from a guest's page list, undone as a whole (rules R6-R9, R12, R13, R15, R27)."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Final

import numpy as np

from hv_models.memory import PAGE_SIZE, Ipa
from hv_models.stage2 import Reason, Stage2Fault
from mediator.core.faults import MessageRejected
from mediator.core.ledger import OverLimit
from mediator.core.parameters import TMEM_INPUT
from mediator.core.ports import GuestMemory, SecureWorld, SharedPage
from mediator.core.records import Buffer, Call, Guest, Pins, RpcArgument
from mediator.core.states import (
    ARGUMENT_TABLE,
    BUFFER_TABLE,
    ArgumentEvent,
    BufferEvent,
    advance,
)
from mediator.core.steps import PAGES_PINNED, PAGES_UNPINNED, Event
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    NONCONTIG,
    PARAM,
    TYPE_MASK,
    list_pages,
    page_count,
)
from optee.abi.results import Result
from optee.abi.smc import Cookie

if TYPE_CHECKING:
    from mediator.core.mediator import Mediator

OFFSET_MASK: Final = PAGE_SIZE - 1
RECORD_MEMORY: Final = 256
"""Bytes of mediator memory that a record is charged with; keeps record floods within the guest's own share."""
PIN_MEMORY: Final = 16
"""Bytes of mediator memory per pinned page: its physical address and its place in the guest's memory."""
MEDIATOR_PAGES: Final = "mediator_pages"
"""The resource that has run out when `SecureWorld.lend` has no page: the host's, in numbers that only it knows."""
LISTS_PER_STEP: Final = 33
"""List pages handled before others get a turn: one buffer of the default limit, 16384 pages, in one step.
Stops a guest from holding everybody up with long lists (rule R23)."""
PAGES_PER_STEP: Final = LISTS_PER_STEP * ENTRIES_PER_PAGE

_RELEASE: Final = BufferEvent.RELEASE
_ADDRESSES: Final = np.dtype(np.uint64)
_BUF_PTR: Final = 8
"""Offset of the address in a parameter."""

Work = Generator[None, None, None]


class _Batch:
    """Page lists that are read but not pinned yet: one pin serves all buffers of a message.

    `entries` are the addresses that stand in the guest's lists, one run of bytes for each of our own `lists`;
    `written`: OP-TEE may write some of these pages.
    """

    __slots__ = ("entries", "lists", "written")

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.lists: list[SharedPage] = []
        self.written = False

    def read(self, memory: GuestMemory, source: Ipa, left: int, page: SharedPage) -> Ipa:
        """Copy the guest's list page at `source`, once, for a page of ours; returns the address of the next one.

        The list ends after the `left` entries that are left, by count and never by trust (R7).

        Raises:
            MessageRejected: there is no such list page.

        """
        try:
            if source & OFFSET_MASK:
                raise Stage2Fault(source, Reason.UNALIGNED)
            if left <= ENTRIES_PER_PAGE:
                entries = memory.read(source, left * 8, writable=True)
            else:
                data = memory.read(source, PAGE_SIZE, writable=True)
                entries = data[:-8]
                source = Ipa(int.from_bytes(data[-8:], "little"))
        except Stage2Fault as fault:
            raise MessageRejected(Result.BAD_PARAMETERS, str(fault)) from None
        self.entries.append(entries)
        self.lists.append(page)
        return source

    def pin(self, guest: Guest, pins: Pins) -> None:
        """Translate and pin what was read, in one step, and fill in our own lists (R6).

        Raises:
            MessageRejected: some page cannot be shared; nothing of the batch is pinned then.

        """
        if not self.entries:
            return
        try:
            pinned = guest.memory.pin(np.frombuffer(b"".join(self.entries), _ADDRESSES))
        except Stage2Fault as fault:
            raise MessageRejected(Result.BAD_PARAMETERS, str(fault)) from None
        pins.pinned.append(pinned)
        if self.written:
            pins.written.append(pinned)
        octets = pinned.pas.data.cast("B")
        at = 0
        for page, entries in zip(self.lists, self.entries, strict=True):
            size = len(entries)
            page.view[:size] = octets[at : at + size]
            at += size
        guest.counters.translated += len(pinned.pas)


def translate(
    core: "Mediator",
    call: Call,
    message: bytes,
    temporary: tuple[int, ...],
    shadow: SharedPage,
    base: int,
    buffers: list[Buffer],
) -> Work:
    """Replace each page list that a message names by one of ours with physical addresses.

    The parameters at the offsets `temporary` are TMEM references. `shadow` holds the same message at offset `base`;
    new buffers are appended to `buffers` as they are made, so that whoever catches the exception can undo them.
    Yields whenever a bounded number of pages is done.

    Raises:
        MessageRejected: the first parameter that cannot be translated says why.

    """
    guest = call.guest
    pins = Pins()
    batch = _Batch()
    try:
        for at in temporary:
            attribute, pointer, size, cookie = PARAM.unpack_from(message, at)
            if pointer == 0:
                continue
            if not attribute & NONCONTIG:
                raise MessageRejected(Result.BAD_PARAMETERS, "a contiguous buffer outside reserved memory")
            offset = pointer & OFFSET_MASK
            written = attribute & TYPE_MASK != TMEM_INPUT
            buffer = _open(core.world, guest, cookie, offset, size, pins, buffers)
            source = pointer - offset
            left = buffer.pages
            for page in buffer.lists:
                if len(batch.lists) == LISTS_PER_STEP:
                    batch.pin(guest, pins)
                    batch = _Batch()
                    yield
                batch.written |= written
                source = batch.read(guest.memory, source, left, page)
                left -= ENTRIES_PER_PAGE
            list_pa = buffer.lists[0].pa | offset
            shadow.words[base + at + _BUF_PTR >> 3] = list_pa
            if core.tracing:
                guest.events.append(
                    Event(
                        PAGES_PINNED,
                        "debug",
                        guest.vm,
                        {"call": call.id, "cookie": cookie, "pages": buffer.pages, "from": pointer, "to": list_pa},
                    )
                )
    except MessageRejected:
        # A page of an earlier parameter that cannot be shared comes first.
        batch.pin(guest, pins)
        raise
    batch.pin(guest, pins)


def _open(
    world: SecureWorld, guest: Guest, cookie: Cookie, offset: int, size: int, pins: Pins, buffers: list[Buffer]
) -> Buffer:
    """Charge a buffer, give it its name and list pages; limits are looked at before the name, as the reference does."""
    limits = guest.ledger.limits
    pages = page_count(size, offset)
    if pages > limits.pages_per_buffer:
        over = OverLimit("pages_per_buffer", pages, None, limits.pages_per_buffer)
        raise MessageRejected(Result.OUT_OF_MEMORY, over)
    if pages == 0:
        raise MessageRejected(Result.BAD_PARAMETERS, "a page list for no pages")
    lists = 1 if pages <= ENTRIES_PER_PAGE else list_pages(pages)
    try:
        charge = guest.ledger.charge(pages, 1, 0, 0, RECORD_MEMORY + PIN_MEMORY * pages + PAGE_SIZE * lists)
    except OverLimit as over:
        raise MessageRejected(Result.OUT_OF_MEMORY, over) from None
    if cookie in guest.buffers:
        charge.refund()
        raise MessageRejected(Result.BAD_PARAMETERS, "a buffer with this cookie is live")
    buffer = Buffer(cookie, offset, pages, charge, pins)
    guest.buffers[cookie] = buffer
    buffers.append(buffer)
    while lists:
        page = world.lend()
        if page is None:
            raise MessageRejected(Result.OUT_OF_MEMORY, OverLimit(MEDIATOR_PAGES, lists, rule="R22"))
        if buffer.lists:
            buffer.lists[-1].words[ENTRIES_PER_PAGE] = page.pa
        buffer.lists.append(page)
        lists -= 1
    return buffer


def return_lists(core: "Mediator", buffer: Buffer) -> None:
    """Take the page list back before the buffer ends: OP-TEE has read it."""
    buffer.charge.reduce_memory(len(buffer.lists) * PAGE_SIZE)
    for page in buffer.lists:
        core.world.take_back(page)
    buffer.lists.clear()


def release_buffer(core: "Mediator", guest: Guest, buffer: Buffer) -> None:
    """Unpin, refund and forget one buffer."""
    advance(buffer, _RELEASE, BUFFER_TABLE)
    pins = buffer.pins
    if pins.pinned:
        for pinned in pins.written:
            guest.memory.mark_dirty(pinned)
        for pinned in pins.pinned:
            guest.memory.unpin(pinned)
        pins.written.clear()
        pins.pinned.clear()
    for page in buffer.lists:
        core.world.take_back(page)
    buffer.lists.clear()
    buffer.charge.refund()
    del guest.buffers[buffer.cookie]
    if core.tracing:
        guest.events.append(Event(PAGES_UNPINNED, "debug", guest.vm, {"cookie": buffer.cookie, "pages": buffer.pages}))


def release_argument(world: SecureWorld, guest: Guest, argument: RpcArgument) -> None:
    """Unpin, refund and forget one RPC argument."""
    advance(argument, ArgumentEvent.RELEASE, ARGUMENT_TABLE)
    guest.memory.unpin(argument.pinned)
    world.take_back(argument.page)
    argument.charge.refund()
    del guest.arguments[argument.cookie]


def mark_written(guest: Guest, cookie: Cookie) -> None:
    """Report the pages of the buffer with this cookie dirty: OP-TEE may have written them (R27)."""
    buffer = guest.buffers.get(cookie)
    if buffer is not None:
        for pinned in buffer.pins.pinned:
            guest.memory.mark_dirty(pinned)
