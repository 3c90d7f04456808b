"""Shared buffers: page lists replaced by the mediator's own, pages pinned, found by cookie, released (R6 to R13)."""

import struct

from tests.spec.specification.books import Books
from tests.spec.specification.terms import (
    BAD_PARAMETERS,
    NONCONTIG,
    OUT_OF_MEMORY,
    PAGE,
    PIN,
    RECORD,
    SIZE_BACK,
    TMEM,
    BadAddress,
    Rejected,
    params,
)


class Buffers(Books):
    """A guest's buffers, by number; a cookie is the name of one live buffer."""

    def translate(self, guest, call, data, base, page, made):
        """Replace each page list by one of the mediator's own (R6 to R8). Nothing is left of one that fails (R12)."""
        opened, failed = [], None
        for n, param in enumerate(params(data)):
            if param[0] & 0xFF not in TMEM or param[1] == 0:
                continue
            try:
                opened.append((n, self.open(guest, *param)))
            except Rejected as rejected:
                failed = rejected  # but what is wrong with the lists before it comes first
                break
            made.append(guest["objects"])
        done = 0
        for n, buffer in opened:
            pages = buffer["pages"]
            for _ in range((pages + 510) // 511):
                if not self.lend():
                    raise Rejected(OUT_OF_MEMORY, True)
                buffer["lists"] += 1
            at = params(data)[n][1] - buffer["offset"]
            while len(buffer["pinned"]) < pages:  # a list ends by count (R7)
                if done == self.lists_per_turn:
                    yield
                    done = 0
                done += 1
                left = pages - len(buffer["pinned"])
                try:
                    words = struct.unpack("<512Q", guest["ram"].read(at, PAGE, True))
                    for ipa in words[: min(left, 511)]:
                        guest["ram"].check_shareable(ipa)
                        buffer["pinned"].append(ipa)
                    if left > 511 and words[511] % PAGE:
                        raise BadAddress
                except BadAddress:
                    raise Rejected(BAD_PARAMETERS, False) from None
                at = words[511]
            place = base + 40 + 32 * n
            page["bytes"][place : place + 8] = bytes(8)
            page["lists"][place] = buffer
        if failed is not None:
            raise failed
        for number in made:  # from now on OP-TEE may write it
            guest["buffers"][number]["written"] = guest["buffers"][number]["output"]

    def open(self, guest, attribute, pointer, size, cookie):
        """A buffer with its name: the limits are looked at first, as the reference does."""
        if not attribute & NONCONTIG:
            raise Rejected(BAD_PARAMETERS, False)
        offset = pointer % PAGE
        pages = (size + offset + PAGE - 1) // PAGE
        lists = (pages + 510) // 511
        if pages > guest["limits"]["pages_per_buffer"]:
            raise Rejected(OUT_OF_MEMORY, True)
        if pages == 0:
            raise Rejected(BAD_PARAMETERS, False)
        memory = RECORD + PIN * pages + PAGE * lists
        if not self.allows(guest, buffers=1, pages=pages, memory=memory) or not self.pool_allows(guest, pages):
            raise Rejected(OUT_OF_MEMORY, True)
        if self.find(guest, cookie) is not None:
            raise Rejected(BAD_PARAMETERS, False)
        guest["objects"] += 1
        buffer = {"cookie": cookie, "state": "PINNED", "offset": offset, "written": False}
        buffer |= {"pages": pages, "lists": 0, "pinned": [], "output": attribute & 0xFF in SIZE_BACK}
        guest["buffers"][guest["objects"]] = buffer
        return buffer

    def find(self, guest, cookie, *states):
        """The number of the one live buffer with a cookie (R13), if it is in one of these states."""
        number = next((number for number, each in guest["buffers"].items() if each["cookie"] == cookie), None)
        return None if states and number is not None and guest["buffers"][number]["state"] not in states else number

    def release(self, guest, number):
        buffer = guest["buffers"].pop(number, None)
        if buffer is not None:
            self.unpin(guest, buffer)

    def unpin(self, guest, buffer):
        buffer["lists"] = 0
        if buffer["written"]:
            guest["dirty"].update(buffer["pinned"])

    def mark_dirty(self, guest, cookie):
        """OP-TEE may have written what is registered with this cookie (R27)."""
        number = self.find(guest, cookie)
        if number is not None:
            guest["dirty"].update(guest["buffers"][number]["pinned"])
