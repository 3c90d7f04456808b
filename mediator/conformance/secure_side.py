"""What the scripted secure world sees of a message, and what it writes there."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from hv_models.memory import PAGE_SIZE
from mediator.conformance import vectors as v
from mediator.conformance.facts import TMEM, decides, within
from mediator.conformance.machine import VectorMachine
from mediator.core.records import Guest
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    NONCONTIG,
    OFFSET_RET,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    list_pages,
    page_count,
)
from optee.abi.smc import Cookie

OFFSET_BUF_PTR: Final = 8
_RESULT: Final = frozenset(range(OFFSET_RET, OFFSET_RET + 4))


@dataclass(slots=True)
class Sent:
    """A message that is with OP-TEE: where, and what of it OP-TEE has written.

    text: the message; decisive: ranges of it that decide what is done with it; addresses: where a physical one stands;
    null_cookies: of temporary references without a buffer; own: the guest's word where `ret` stands; result: offsets of
    it that OP-TEE wrote.
    """

    pa: int
    text: bytes
    own: bytes
    decisive: list[tuple[int, int]]
    addresses: list[tuple[int, int]]
    null_cookies: list[int]
    result: set[int] = field(default_factory=set)
    rewritten: bool = False

    @property
    def has_result(self) -> bool:
        """Whether OP-TEE wrote all of `ret`."""
        return self.result == _RESULT


class SecureSide:
    """Messages that are with OP-TEE, by the names that the record gives them."""

    def __init__(self, machine: VectorMachine) -> None:
        self._machine = machine
        self._sent: dict[str, Sent] = {}
        self._count = 0

    def send(self, pa: int, symbol: str | None, own: bytes) -> tuple[str, v.Shadow]:
        """A message goes to OP-TEE: its name, and what OP-TEE sees. `symbol` is what stands in the record for `pa`."""
        name = symbol if symbol is not None and symbol.startswith("arg:") else f"arg:{self._count}"
        self._count += 1
        arg = self.shadow(pa)
        params = list(PARAM.iter_unpack(arg.hex[HEADER_SIZE:]))
        null = [
            cookie
            for index, (attribute, _, _, cookie) in enumerate(params)
            if attribute & TYPE_MASK in TMEM and index not in arg.translated
        ]
        at = [HEADER_SIZE + PARAM_SIZE * index + OFFSET_BUF_PTR for index in arg.translated]
        addresses = [(first, first + 8) for first in at]
        self._sent[name] = Sent(pa, arg.hex, own, decides(arg.hex), addresses, null)
        return name, arg

    def end(self, pa: int) -> Sent | None:
        """The message in this page is with OP-TEE no more."""
        latest = reversed(self._sent.values())  # a page may have been that of a call whose domain ended
        sent = next((sent for sent in latest if sent.pa == pa), None)
        if sent is not None:
            self._sent = {name: each for name, each in self._sent.items() if each is not sent}
        return sent

    def left(self, sent: Sent) -> bytes:
        """A message as OP-TEE left it, with the guest's own `ret` where OP-TEE wrote none."""
        left = bytearray(self._machine.machine.memory.frame(sent.pa))
        for at in _RESULT - sent.result:
            left[at] = sent.own[at - OFFSET_RET]
        return bytes(left)

    def shadow(self, pa: int) -> v.Shadow:
        """A message or RPC argument as the secure world sees it."""
        frame = self._machine.machine.memory.frame(pa)
        num_params = HEADER.unpack_from(frame)[7]
        size = min(HEADER_SIZE + PARAM_SIZE * num_params, PAGE_SIZE)
        data = bytearray(frame[:size])
        lists: dict[int, v.Translated] = {}
        for index, (attribute, pointer, length, _) in enumerate(PARAM.iter_unpack(bytes(data[HEADER_SIZE:]))):
            if attribute & TYPE_MASK in TMEM and attribute & NONCONTIG and pointer:
                offset = pointer & (PAGE_SIZE - 1)
                pages = page_count(length, offset)
                at = HEADER_SIZE + PARAM_SIZE * index + OFFSET_BUF_PTR
                data[at : at + 8] = offset.to_bytes(8, "little")
                lists[index] = v.Translated(
                    offset=offset,
                    n_pages_from_size=pages,
                    list_pages=list_pages(pages),
                    pages=list(self._pages(pointer - offset, pages)),
                )
        return v.Shadow(
            owner="mediator" if pa in self._machine.machine.pages else "guest",
            hex=bytes(data),
            num_params=num_params,
            translated=lists,
        )

    def _pages(self, page: int, left: int) -> Iterator[tuple[int, int]]:
        """Domain and guest frame of each entry of a page list of ours; (-1, 0) for what is nobody's."""
        while left > 0 and page in self._machine.machine.pages:
            words = np.frombuffer(self._machine.machine.memory.frame(page), "<u8")
            part = min(left, ENTRIES_PER_PAGE)
            for word in words[:part].tolist():
                yield self._machine.owner(word) or (-1, 0)
            left -= part
            page = int(words[ENTRIES_PER_PAGE])

    def write(self, answer: v.Answer, guest: Guest | None) -> None:
        """What the scripted secure world writes before it answers a call of this guest."""
        for target, offset, data in answer.writes:
            kind, _, rest = target.partition(":")
            sent = self._sent.get(target)
            pa = _argument(guest, int(rest, 16)) if kind == "rpc" else None if sent is None else sent.pa
            if pa is None:
                continue
            frame = self._machine.machine.memory.frame(pa)
            if sent is not None:
                sent.result |= set(range(offset, offset + len(data))) & _RESULT
                changed = (at for at, byte in enumerate(data, offset) if frame[at] != byte)
                sent.rewritten |= any(within(at, sent.decisive) for at in changed)
            frame[offset : offset + len(data)] = data


def _argument(guest: Guest | None, cookie: int) -> int | None:
    """Our page for an RPC argument of a guest."""
    argument = None if guest is None else guest.arguments.get(Cookie(cookie))
    return None if argument is None else int(argument.page.pa)
