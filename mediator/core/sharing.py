"""Shared buffers: made from a guest's page list, undone as a whole (rules R6-R9, R12, R13, R15, R27)."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Final

import numpy as np

from hv_models.memory import PAGE_SIZE, Ipa
from hv_models.stage2 import Reason, Stage2Fault
from mediator.core.faults import MessageRejected
from mediator.core.ledger import OverLimit
from mediator.core.parameters import TMEM_INPUT
from mediator.core.ports import SecureWorld, SharedPage
from mediator.core.records import Call, Guest, RpcArgument, Shared
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
_Wanted = tuple[int, Ipa, int, int, int, Cookie]
"""A page list that a message names: offset of the parameter, where the list begins, where the buffer begins in its
first page, pages of the buffer, pages of the list, cookie."""


def translate(
    core: "Mediator",
    call: Call,
    message: bytes,
    temporary: tuple[int, ...],
    shadow: SharedPage,
    base: int,
    shared: Shared,
) -> Work:
    """Replace each page list that a message names by one of ours with physical addresses.

    The parameters at the offsets `temporary` are TMEM references. `shadow` holds the same message at offset `base`. All
    that is made is noted in `shared`, so that whoever catches the exception can undo it. Yields whenever a bounded
    number of pages is done.

    Raises:
        MessageRejected: the first parameter that cannot be translated says why.

    """
    guest = call.guest
    memory = guest.memory
    entries: list[bytes] = []
    wanted, refused = _open(guest, message, temporary, shared)
    try:
        for at, source, offset, pages, lists, cookie in wanted:
            shared.offset = offset
            for number in range(lists):
                page = core.world.lend()
                if page is None:
                    over = OverLimit(MEDIATOR_PAGES, lists - number, rule="R22")
                    raise MessageRejected(Result.OUT_OF_MEMORY, over)
                if number:
                    shared.lists[-1].words[ENTRIES_PER_PAGE] = page.pa
                else:
                    shadow.words[base + at + _BUF_PTR >> 3] = page.pa | offset
                shared.lists.append(page)
            left = pages
            while left > 0:
                if len(entries) == LISTS_PER_STEP:
                    _pin(guest, shared, entries)
                    yield
                if source & OFFSET_MASK:
                    raise Stage2Fault(source, Reason.UNALIGNED)
                # The list ends by count and never by trust (R7); each page of it is copied once.
                if left <= ENTRIES_PER_PAGE:
                    entries.append(memory.read(source, left * 8, writable=True))
                else:
                    data = memory.read(source, PAGE_SIZE, writable=True)
                    entries.append(data[:-8])
                    source = Ipa(int.from_bytes(data[-8:], "little"))
                left -= ENTRIES_PER_PAGE
            if core.tracing:
                _, pointer, _, _ = PARAM.unpack_from(message, at)
                list_pa = shadow.words[base + at + _BUF_PTR >> 3]
                guest.events.append(
                    Event(
                        PAGES_PINNED,
                        "debug",
                        guest.vm,
                        {"call": call.id, "cookie": cookie, "pages": pages, "from": pointer, "to": list_pa},
                    )
                )
        if refused is not None:
            raise refused
    except (MessageRejected, Stage2Fault) as error:
        # A page of an earlier parameter that cannot be shared comes first.
        _pin(guest, shared, entries)
        if isinstance(error, Stage2Fault):
            raise MessageRejected(Result.BAD_PARAMETERS, str(error)) from None
        raise
    _pin(guest, shared, entries)


def _open(
    guest: Guest, message: bytes, temporary: tuple[int, ...], shared: Shared
) -> tuple[list[_Wanted], MessageRejected | None]:
    """Charge and name the buffers of a message, at once if all can be: all up to the first that cannot, and why not."""
    ledger = guest.ledger
    most = ledger.limits.pages_per_buffer
    wanted: list[_Wanted] = []
    refused = None
    pages = lists = 0
    for at in temporary:
        attribute, pointer, size, cookie = PARAM.unpack_from(message, at)
        if pointer == 0:
            continue
        if not attribute & NONCONTIG:
            refused = MessageRejected(Result.BAD_PARAMETERS, "a contiguous buffer outside reserved memory")
            break
        offset = pointer & OFFSET_MASK
        count = page_count(size, offset)
        if count > most:
            refused = MessageRejected(Result.OUT_OF_MEMORY, OverLimit("pages_per_buffer", count, None, most))
            break
        if count == 0:
            refused = MessageRejected(Result.BAD_PARAMETERS, "a page list for no pages")
            break
        if attribute & TYPE_MASK != TMEM_INPUT:
            shared.written = True
        needed = 1 if count <= ENTRIES_PER_PAGE else list_pages(count)
        pages += count
        lists += needed
        wanted.append((at, pointer - offset, offset, count, needed, cookie))
        shared.pages[cookie] = count
    buffers = len(wanted)
    if buffers > 1 and len(shared.pages) == buffers and guest.buffers.keys().isdisjoint(shared.pages):
        memory = buffers * RECORD_MEMORY + pages * PIN_MEMORY + lists * PAGE_SIZE
        try:
            shared.charge = ledger.charge(pages, buffers, 0, 0, memory)
        except OverLimit:
            pass
        else:
            for cookie in shared.pages:
                guest.buffers[cookie] = shared
            return wanted, refused
    return wanted, _open_singly(guest, wanted, shared) or refused


def _open_singly(guest: Guest, wanted: list[_Wanted], shared: Shared) -> MessageRejected | None:
    """Do it one by one: the first that cannot be says why, and is left out with those behind it.

    Limits are looked at before the name, as the reference does.
    """
    shared.pages.clear()
    for number, (_, _, _, count, needed, cookie) in enumerate(wanted):
        try:
            charge = guest.ledger.charge(count, 1, 0, 0, RECORD_MEMORY + count * PIN_MEMORY + needed * PAGE_SIZE)
        except OverLimit as over:
            refused = MessageRejected(Result.OUT_OF_MEMORY, over)
        else:
            if cookie not in guest.buffers:
                shared.charge = charge if shared.charge is None else shared.charge.join(charge)
                guest.buffers[cookie] = shared
                shared.pages[cookie] = count
                continue
            charge.refund()
            refused = MessageRejected(Result.BAD_PARAMETERS, "a buffer with this cookie is live")
        del wanted[number:]
        return refused
    return None


def _pin(guest: Guest, shared: Shared, entries: list[bytes]) -> None:
    """Translate and pin what was read, in one step, and fill in our own lists (R6).

    `entries` are the addresses that stand in the guest's lists, one run of bytes for each of ours; none is left then.

    Raises:
        MessageRejected: some page cannot be shared; none of them is pinned then.

    """
    if not entries:
        return
    try:
        pinned = guest.memory.pin(np.frombuffer(b"".join(entries), _ADDRESSES))
    except Stage2Fault as fault:
        raise MessageRejected(Result.BAD_PARAMETERS, str(fault)) from None
    shared.pinned.append(pinned)
    guest.counters.translated += len(pinned.pas)
    octets = pinned.pas.tobytes()
    at = 0
    for page, run in zip(shared.lists[shared.filled :], entries, strict=False):
        size = len(run)
        page.view[:size] = octets[at : at + size]
        at += size
    shared.filled += len(entries)
    entries.clear()


def return_lists(core: "Mediator", shared: Shared) -> None:
    """Take the page list back before the buffer ends: OP-TEE has read it."""
    assert shared.charge is not None
    shared.charge.reduce_memory(len(shared.lists) * PAGE_SIZE)
    for page in shared.lists:
        core.world.take_back(page)
    shared.lists.clear()


def release_shared(core: "Mediator", guest: Guest, shared: Shared) -> None:
    """Unpin, refund and forget what one message shares."""
    advance(shared, _RELEASE, BUFFER_TABLE)
    told = core.tracing and bool(shared.pinned)
    for pinned in shared.pinned:
        if shared.written:
            guest.memory.mark_dirty(pinned)
        guest.memory.unpin(pinned)
    shared.pinned.clear()
    for page in shared.lists:
        core.world.take_back(page)
    shared.lists.clear()
    if shared.charge is not None:
        shared.charge.refund()
    for cookie, pages in shared.pages.items():
        del guest.buffers[cookie]
        if told:
            guest.events.append(Event(PAGES_UNPINNED, "debug", guest.vm, {"cookie": cookie, "pages": pages}))


def release_argument(world: SecureWorld, guest: Guest, argument: RpcArgument) -> None:
    """Unpin, refund and forget one RPC argument."""
    advance(argument, ArgumentEvent.RELEASE, ARGUMENT_TABLE)
    guest.memory.unpin(argument.pinned)
    world.take_back(argument.page)
    argument.charge.refund()
    del guest.arguments[argument.cookie]


def mark_written(guest: Guest, cookie: Cookie) -> None:
    """Report the pages of the buffer with this cookie dirty: OP-TEE may have written them (R27)."""
    shared = guest.buffers.get(cookie)
    if shared is not None:
        for pinned in shared.pinned:
            guest.memory.mark_dirty(pinned)
