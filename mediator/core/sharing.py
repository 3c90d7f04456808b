"""Shared buffers: made from a guest's page list, undone as a whole (rules R6-R9, R12, R13, R15, R27)."""

from collections.abc import Generator
from typing import Final

import numpy as np

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import Reason, Stage2Fault
from mediator.core.faults import MessageRejected
from mediator.core.ledger import OverLimit
from mediator.core.ports import SecureWorld, SharedPage
from mediator.core.records import Buffer, Call, Guest, RpcArgument
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
    HEADER_SIZE,
    NONCONTIG,
    PARAM_SIZE,
    TYPE_MASK,
    ParamType,
    list_pages,
    page_count,
)
from optee.abi.results import Result

OFFSET_MASK: Final = PAGE_SIZE - 1
RECORD_MEMORY: Final = 256
"""Bytes of mediator memory that a record is charged with; keeps record floods within the guest's own share."""
PIN_MEMORY: Final = 16
"""Bytes of mediator memory per pinned page: its physical address and its place in the guest's memory."""
LISTS_PER_STEP: Final = 33
"""List pages handled before others get a turn: one buffer of the default limit, 16384 pages, in one step.
Stops a guest from holding everybody up with long lists (rule R23)."""
PAGES_PER_STEP: Final = LISTS_PER_STEP * ENTRIES_PER_PAGE

TMEM_INPUT: Final = int(ParamType.TMEM_INPUT)
TMEM_OUTPUT: Final = int(ParamType.TMEM_OUTPUT)
TMEM_INOUT: Final = int(ParamType.TMEM_INOUT)
RMEM_INPUT: Final = int(ParamType.RMEM_INPUT)
RMEM_INOUT: Final = int(ParamType.RMEM_INOUT)
_BUF_PTR: Final = HEADER_SIZE + 8

Params = list[tuple[int, int, int, int]]
Work = Generator[None, None, None]


def translate(
    world: SecureWorld, call: Call, shadow: SharedPage, base: int, params: Params, buffers: list[Buffer]
) -> Work:
    """Replace each page list that `params` name by one of ours with physical addresses.

    `shadow` holds the message at offset `base`; new buffers are appended to `buffers` as they are made, so that
    whoever catches the exception can undo them. Yields whenever a bounded number of pages is done.

    Raises:
        MessageRejected: the first parameter that cannot be translated says why.

    """
    guest = call.guest
    done = 0
    at = base + _BUF_PTR - PARAM_SIZE
    for attribute, pointer, size, cookie in params:
        at += PARAM_SIZE
        kind = attribute & TYPE_MASK
        if kind < TMEM_INPUT or kind > TMEM_INOUT or pointer == 0:
            continue
        if not attribute & NONCONTIG:
            raise MessageRejected(Result.BAD_PARAMETERS, "a contiguous buffer outside reserved memory")
        offset = pointer & OFFSET_MASK
        buffer = _open(guest, cookie, offset, size, kind != TMEM_INPUT)
        buffers.append(buffer)
        _lend_lists(world, guest, buffer)
        source = pointer - offset
        filled = 0
        while filled < buffer.pages:
            count = min(buffer.pages - filled, PAGES_PER_STEP)
            if done and done + count > PAGES_PER_STEP:
                yield
                done = 0
            source = _pin(guest, buffer, source, filled, count)
            filled += count
            done += count
        list_pa = buffer.lists[0].pa | offset
        shadow.view[at : at + 8] = list_pa.to_bytes(8, "little")
        guest.counters.translated += buffer.pages
        guest.events.append(
            Event(
                PAGES_PINNED,
                "debug",
                guest.vm,
                {"call": call.id, "cookie": cookie, "pages": buffer.pages, "from": pointer, "to": list_pa},
            )
        )


def _open(guest: Guest, cookie: int, offset: int, size: int, written: bool) -> Buffer:
    """Charge a buffer and give it its name; limits are looked at before the name, as the reference does."""
    limits = guest.ledger.limits
    pages = page_count(size, offset)
    if pages > limits.pages_per_buffer:
        raise MessageRejected(
            Result.OUT_OF_MEMORY,
            f"a buffer of {pages} pages, {limits.pages_per_buffer} are allowed",
            limit="pages_per_buffer",
        )
    if pages == 0:
        raise MessageRejected(Result.BAD_PARAMETERS, "a page list for no pages")
    try:
        charge = guest.ledger.charge(pages, 1, 0, 0, RECORD_MEMORY + PIN_MEMORY * pages)
    except OverLimit as over:
        raise MessageRejected(Result.OUT_OF_MEMORY, f"{over.resource} at their limit", limit=over.resource) from None
    if cookie in guest.buffers:
        charge.refund()
        raise MessageRejected(Result.BAD_PARAMETERS, "a buffer with this cookie is live")
    buffer = Buffer(cookie, offset, size, pages, written, charge)
    guest.buffers[cookie] = buffer
    return buffer


def _lend_lists(world: SecureWorld, guest: Guest, buffer: Buffer) -> None:
    count = list_pages(buffer.pages)
    try:
        buffer.list_charge = guest.ledger.charge(0, 0, 0, 0, count * PAGE_SIZE)
    except OverLimit as over:
        raise MessageRejected(Result.OUT_OF_MEMORY, f"{over.resource} at their limit", limit=over.resource) from None
    for _ in range(count):
        page = world.lend()
        if page is None:
            raise MessageRejected(Result.OUT_OF_MEMORY, "no page left for a page list")
        buffer.lists.append(page)


def _pin(guest: Guest, buffer: Buffer, source: int, first: int, count: int) -> int:
    """Pin `count` pages from entry `first` on, listed in guest pages from `source`; returns the next list page.

    The list ends by count, never by trust (R7).
    """
    memory = guest.memory
    lists = buffer.lists
    number = first // ENTRIES_PER_PAGE
    try:
        if count <= ENTRIES_PER_PAGE:
            more = first + count < buffer.pages
            raw = memory.read(source, PAGE_SIZE if more else count * 8, writable=True)
            entries = np.frombuffer(raw, np.uint64, count)
            if more:
                source = int.from_bytes(raw[-8:], "little")
        else:
            entries = np.empty(count, np.uint64)
            at = 0
            while at < count:
                part = min(count - at, ENTRIES_PER_PAGE)
                more = first + at + part < buffer.pages
                if source & OFFSET_MASK:
                    raise Stage2Fault(source, Reason.UNALIGNED)
                raw = memory.read(source, PAGE_SIZE if more else part * 8, writable=True)
                entries[at : at + part] = np.frombuffer(raw, np.uint64, part)
                if more:
                    source = int.from_bytes(raw[-8:], "little")
                at += part
        pinned = memory.pin(entries)
    except Stage2Fault as fault:
        raise MessageRejected(Result.BAD_PARAMETERS, str(fault)) from None
    buffer.pinned.append(pinned)
    pas = pinned.pas
    for at in range(0, count, ENTRIES_PER_PAGE):
        part = min(count - at, ENTRIES_PER_PAGE)
        words = lists[number].words
        words[:part] = pas[at : at + part]
        number += 1
        if number < len(lists):
            words[ENTRIES_PER_PAGE] = lists[number].pa
    return source


def return_lists(world: SecureWorld, buffer: Buffer) -> None:
    """Take the page list back: OP-TEE has read it, or never will."""
    for page in buffer.lists:
        world.take_back(page)
    buffer.lists.clear()
    if buffer.list_charge is not None:
        buffer.list_charge.refund()
        buffer.list_charge = None


def release_buffer(world: SecureWorld, guest: Guest, buffer: Buffer) -> None:
    """Unpin, refund and forget one buffer."""
    advance(buffer, BufferEvent.RELEASE, BUFFER_TABLE)
    memory = guest.memory
    for pinned in buffer.pinned:
        if buffer.written:
            memory.mark_dirty(pinned)
        memory.unpin(pinned)
    buffer.pinned.clear()
    return_lists(world, buffer)
    buffer.charge.refund()
    del guest.buffers[buffer.cookie]
    guest.events.append(Event(PAGES_UNPINNED, "debug", guest.vm, {"cookie": buffer.cookie, "pages": buffer.pages}))


def release_argument(world: SecureWorld, guest: Guest, argument: RpcArgument) -> None:
    """Unpin, refund and forget one RPC argument."""
    advance(argument, ArgumentEvent.RELEASE, ARGUMENT_TABLE)
    guest.memory.unpin(argument.pinned)
    world.take_back(argument.page)
    argument.charge.refund()
    del guest.arguments[argument.cookie]


def mark_written(guest: Guest, cookie: int) -> None:
    """Report the pages of the buffer with this cookie dirty: OP-TEE may have written them (R27)."""
    buffer = guest.buffers.get(cookie)
    if buffer is not None:
        for pinned in buffer.pinned:
            guest.memory.mark_dirty(pinned)
