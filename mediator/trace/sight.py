"""What a replayed guest and its secure world see of memory, beside what was recorded."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from hv_models.machine import Machine
from hv_models.memory import PAGE_MASK, PAGE_SIZE
from hv_models.vm import VirtualMachine
from mediator.trace.expected import TMEM, first_difference
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER_SIZE,
    NONCONTIG,
    OFFSET_RET,
    OFFSET_RET_ORIGIN,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    page_count,
)

Found: TypeAlias = tuple[str, Any, Any]
"""What is not as it should be, what was expected, what is there."""


class Sight:
    """Memory of the recorded guest on a machine, and the mediator's pages on it."""

    def __init__(self, machine: Machine, vm: VirtualMachine) -> None:
        self._machine = machine
        self._vm = vm

    def shadow(self, what: str, guests: bytes, page: int, base: int, *, preset: bool) -> Iterator[Found]:
        """OP-TEE sees what the guest wrote, but for addresses and, where it is preset, ret (R11)."""
        if page not in self._machine.pages:
            yield f"forwarded {what}", "a page of the mediator's", hex(page)
            return
        seen = bytearray(self._machine.memory.frame(page)[base : base + len(guests)])
        wanted = bytearray(guests)
        if preset:
            seen[OFFSET_RET:OFFSET_RET_ORIGIN] = wanted[OFFSET_RET:OFFSET_RET_ORIGIN] = bytes(4)
        for at in range(HEADER_SIZE, len(guests) - PARAM_SIZE + 1, PARAM_SIZE):
            attribute, pointer, size, _ = PARAM.unpack_from(guests, at)
            if attribute & TYPE_MASK in TMEM and attribute & NONCONTIG and pointer:
                yield from self._page_list(pointer, int.from_bytes(seen[at + 8 : at + 16], "little"), size)
                seen[at + 8 : at + 16] = wanted[at + 8 : at + 16] = bytes(8)
        if seen != wanted:
            yield f"forwarded {what}", *first_difference(bytes(wanted), bytes(seen))

    def _page_list(self, guests: int, ours: int, size: int) -> Iterator[Found]:
        """Each address is the stage-2 image of the guest's, its page is pinned, and none is left as it was."""
        if ours & PAGE_MASK != guests & PAGE_MASK:
            yield "offset of a buffer", guests & PAGE_MASK, ours & PAGE_MASK
        left = page_count(size, guests & PAGE_MASK)
        guest_page, page = guests & ~PAGE_MASK, ours & ~PAGE_MASK
        while left:
            if page not in self._machine.pages:
                yield "page list", "a page of the mediator's", hex(page)
                return
            words = np.frombuffer(self._machine.memory.frame(page), "<u8")
            recorded = np.frombuffer(self.read(guest_page, PAGE_SIZE), "<u8")
            part = min(left, ENTRIES_PER_PAGE)
            for entry, ipa in zip(words[:part].tolist(), recorded[:part].tolist(), strict=True):
                if self._vm.find(entry) != ipa or entry == ipa or not self._pinned(entry):
                    yield "translated page", f"the pinned image of {ipa:#x}", hex(entry)
                    return
            left -= part
            page, guest_page = int(words[ENTRIES_PER_PAGE]), int(recorded[ENTRIES_PER_PAGE])

    def forward(self, what: str, recorded: bytes, page: int) -> Iterator[Found]:
        """OP-TEE sees what another mediator showed it, but for addresses and a preset ret."""
        theirs, ours = bytearray(recorded), bytearray(self._machine.memory.frame(page)[: len(recorded)])
        if what == "message":
            ours[OFFSET_RET:OFFSET_RET_ORIGIN] = theirs[OFFSET_RET:OFFSET_RET_ORIGIN] = bytes(4)
        for at in range(HEADER_SIZE, len(theirs) - PARAM_SIZE + 1, PARAM_SIZE):
            attribute, pointer, _, _ = PARAM.unpack_from(theirs, at)
            if attribute & TYPE_MASK in TMEM and attribute & NONCONTIG and pointer:
                for side in (theirs, ours):
                    low = int.from_bytes(side[at + 8 : at + 16], "little") & PAGE_MASK
                    side[at + 8 : at + 16] = low.to_bytes(8, "little")
        if theirs != ours:
            yield f"forward.{what}", *first_difference(bytes(theirs), bytes(ours))

    def read(self, ipa: int, size: int) -> bytes:
        """Bytes of the guest; zeros where it has no RAM."""
        for ram in self._vm.ram:
            if ram.base <= ipa and ipa + size <= ram.base + ram.size:
                return ram.read(ipa, size)
        return bytes(size)

    def write(self, ipa: int, data: bytes) -> bool:
        """Write bytes of the guest, as the guest itself does; whether it has RAM there."""
        for ram in self._vm.ram:
            if ram.base <= ipa and ipa + len(data) <= ram.base + ram.size:
                ram.write(ipa, data)
                return True
        return False

    def _pinned(self, pa: int) -> bool:
        bank, number = self._machine.memory.find(pa)
        return bool(bank.pins[number] > 0)
