"""The driver's shared memory objects (struct tee_shm), their cookies and page lists.

Source: Linux 6.1 tee_shm.c and optee/call.c, as the recordings show them; OP-TEE's message interface header
for the page list.
"""

import struct
from collections.abc import Sequence

from guests.memory import Buffer
from hv_models.memory import GuestRam, Ipa
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    LIST_PAGE_SIZE,
    NONCONTIG,
    Param,
    ParamType,
    list_pages,
)
from optee.abi.smc import Cookie

_POINTER_BASE = 0xFFFF_0000_0000_0000
_OBJECT_SIZE = 0x100
_WORD = struct.Struct("<Q")
_NEXT_OFFSET = ENTRIES_PER_PAGE * _WORD.size
_LIST_ATTRIBUTE = ParamType.TMEM_OUTPUT | NONCONTIG


class SharedMemory:
    """One buffer that OP-TEE may know by its cookie.

    registered: OP-TEE has it by REGISTER_SHM. private: the kernel's own pages, named by address only (messages,
    and buffers given in answer to an RPC).
    """

    __slots__ = ("buffer", "cookie", "private", "references", "registered")

    def __init__(self, cookie: Cookie, buffer: Buffer, *, private: bool = False) -> None:
        self.cookie = cookie
        self.buffer = buffer
        self.private = private
        self.registered = False
        self.references = 1


class SharedMemoryTable:
    """All objects of one driver. A cookie is the object's address, and so the last one freed is used next."""

    def __init__(self) -> None:
        self._objects: dict[Cookie, SharedMemory] = {}
        self._free: list[Cookie] = []
        self._next = Cookie(_POINTER_BASE + _OBJECT_SIZE)

    def __len__(self) -> int:
        return len(self._objects)

    def add(self, buffer: Buffer, *, private: bool = False) -> SharedMemory:
        """Make an object for a buffer."""
        if self._free:
            cookie = self._free.pop()
        else:
            cookie = self._next
            self._next = Cookie(cookie + _OBJECT_SIZE)
        shm = self._objects[cookie] = SharedMemory(cookie, buffer, private=private)
        return shm

    def get(self, cookie: int) -> SharedMemory | None:
        """Look an object up; None for a cookie that names nothing."""
        return self._objects.get(Cookie(cookie))

    def discard(self, shm: SharedMemory) -> None:
        """Forget an object; the pages are its owner's to release. Raises KeyError the second time."""
        del self._objects[shm.cookie]
        self._free.append(shm.cookie)


def list_size(shm: SharedMemory) -> int:
    """Return how many pages the page list of a buffer takes."""
    return list_pages(len(shm.buffer.pages))


def write_page_list(ram: GuestRam, lists: Sequence[Ipa], shm: SharedMemory) -> Param:
    """Write a buffer's page list into `lists`; return the parameter that names it: TMEM_OUTPUT|NONCONTIG.

    OP-TEE copies a list, so its pages are needed until the call (or RPC) that names them is answered.
    """
    addresses = shm.buffer.addresses
    for number, page in enumerate(lists):
        ram.write(page, addresses[number * _NEXT_OFFSET : (number + 1) * _NEXT_OFFSET])
        if number:
            ram.write(lists[number - 1] + _NEXT_OFFSET, _WORD.pack(page))
    address = lists[0] | shm.buffer.offset % LIST_PAGE_SIZE
    return Param(_LIST_ATTRIBUTE, address, shm.buffer.size, shm.cookie)
