"""Moves: what guests, their hosts and the secure world may do, each drawn from one number.

A move is four small numbers: what, who, and two that decide the rest. So a run is a list of moves, the same list is the
same run, and a shorter list is a run as well.
"""

from functools import cache
from random import Random
from typing import Final, NamedTuple

from hv_models.memory import PAGE_SIZE
from mediator.fuzz.seeds import Exchange
from optee.abi.message import (
    ENTRIES_PER_PAGE,
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    NONCONTIG,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    ParamType,
    page_count,
)
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function


class Move(NamedTuple):
    """what: a name of `KINDS`; guest: which; choice, detail: numbers that decide the rest.

    recorded: what is said in the place of what would be drawn, and OP-TEE's answer.
    """

    what: str
    guest: int
    choice: int
    detail: int
    recorded: Exchange | None = None


KINDS: Final = {"call": 60, "resume": 50, "answer": 20, "fast": 30, "page": 10, "pause": 10, "destroy": 3, "reset": 3}
"""What moves there are, and how often they are made."""
_WHAT: Final = tuple(what for what, weight in KINDS.items() for _ in range(weight))

FUNCTIONS: Final = tuple(int(function) for function in Function)
YIELDING: Final = (Function.CALL_WITH_ARG,) * 2 + (Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG)
PAGES: Final = 64
"""Pages of a guest: 0-7 messages, 8-15 lists, 16-23 RPC arguments, the rest data."""
LISTS: Final = range(8, 15)
ENDLESS: Final = 15
"""A page list that names itself as the next page: as long as somebody says it is."""
LONG: Final = 0.004
"""How often a buffer is so long that its list takes more than one step."""
LONG_SIZES: Final = (600 * 4096, 16384 * 4096, 16385 * 4096)
FRIENDLY: Final = (1, 2, 3, 4, 5)
COOKIES: Final = (*FRIENDLY, 0, (1 << 64) - 1)
RPC_COOKIES: Final = tuple(range(0xC0, 0xCA))
SIZES: Final = (1, 4096, 4097, 3 * 4096, 5 * 4096, 0, 1 << 32, (1 << 44) + 4096, 1 << 63, (1 << 64) - 1)
_WORDS: Final = (0, 1, 4, 5, 7, 0x20A, 127, 128, 4096, 0xFFFF, 0xFFFF0006, 1 << 31, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
_ANSWERS: Final = (0, 0, 1, 2, 4, 5, 9, 0xFFFF0000, 0xFFFF0002, 0xFFFF0004, 0xFFFF0005, 0xFFFF0001, 0xFFFFFFFF)
_TMEM_TYPES: Final = tuple(int(kind) for kind in ParamType if kind.name.startswith("TMEM"))
_TMEM: Final = tuple(int(kind) | NONCONTIG for kind in ParamType if kind.name.startswith("TMEM"))
_OTHERS: Final = (1, 2, 3, 5, 6, 7, 0)


def draw(choose: Random, guests: int) -> Move:
    """Draw a move."""
    return Move(choose.choice(_WHAT), choose.randrange(guests), choose.getrandbits(32), choose.getrandbits(32))


def as_recorded(choose: Random, exchange: Exchange, guest: int) -> Move:
    """The move that says what was recorded; a message in a registered buffer lies in a page of its own here."""
    function = exchange.function
    if function == Function.CALL_WITH_REGD_ARG:
        function = Function.CALL_WITH_RPC_ARG
        exchange = exchange._replace(function=function)
    what = "resume" if function == Function.RETURN_FROM_RPC else "call" if function in YIELDING else "fast"
    return Move(what, guest, choose.getrandbits(32), choose.getrandbits(32), exchange)


def changed(choose: Random, move: Move) -> Move:
    """The same move otherwise: with a word of it changed, or with other luck."""
    exchange = move.recorded
    if exchange is None or choose.random() < 0.3:
        return move._replace(choice=choose.getrandbits(32))
    if exchange.said and choose.random() < 0.7:
        said = bytearray(exchange.said)
        width = choose.choice((1, 4, 8))
        at = choose.randrange(len(said) // width) * width
        said[at : at + width] = (choose.choice(_WORDS) & (1 << 8 * width) - 1).to_bytes(width, "little")
        return move._replace(recorded=exchange._replace(said=bytes(said)))
    return move._replace(recorded=exchange._replace(answer=choose.choice(_ANSWERS)))


def relocated(data: bytes, base: int) -> tuple[bytes, dict[int, bytes]]:
    """A recorded message with page lists in this guest's memory, and those lists by their page."""
    head, lists = data[:HEADER_SIZE], {}
    params = list(PARAM.iter_unpack(data[HEADER_SIZE : len(data) - (len(data) - HEADER_SIZE) % PARAM_SIZE]))
    for number, (attribute, pointer, size, _) in enumerate(params):
        if attribute & TYPE_MASK in _TMEM_TYPES and attribute & NONCONTIG and pointer:
            pages = page_count(size, pointer % PAGE_SIZE)
            page = ENDLESS
            if pages <= ENTRIES_PER_PAGE:
                page = LISTS[number % len(LISTS)]
                entries = (base + (24 + each % (PAGES - 24)) * PAGE_SIZE for each in range(pages))
                lists[page] = b"".join(entry.to_bytes(8, "little") for entry in entries)
            params[number] = (attribute, base + page * PAGE_SIZE + pointer % PAGE_SIZE, *params[number][2:])
    return head + b"".join(PARAM.pack(*param) for param in params), lists


def message(choose: Random, base: int, *, hostile: bool) -> bytes:
    """Draw a message of a guest whose RAM starts at `base`."""
    command = choose.choice((1, 1, 1, 0, 4, 4, 5, 5, 2, 3))
    if hostile and choose.random() < 0.1:
        command = choose.choice((6, 7, 15, 0xFFFFFFFF))
    if command == Command.REGISTER_SHM:
        params = [temporary(choose, base, hostile=hostile, kind=_TMEM[1])]
    elif command == Command.UNREGISTER_SHM:
        params = [(5, 0, 0, choose.choice(FRIENDLY))]
    else:
        params = [parameter(choose, base, hostile=hostile) for _ in range(choose.choice((0, 1, 1, 2, 3)))]
    count = len(params)
    if hostile and choose.random() < 0.1:
        count = choose.choice((0, 1, 2, 5, 126, MAX_PARAMS, 128, 0x07FFFFFF, 0x08000000, 0xFFFFFFFF))
    header = HEADER.pack(command, 7, 1, 0, 0, choose.choice((0, 0, 0xFFFF0006)), 0, count)
    return header + b"".join(PARAM.pack(*param) for param in params)


def parameter(choose: Random, base: int, *, hostile: bool) -> tuple[int, int, int, int]:
    """Draw a parameter."""
    if choose.random() < 0.5:
        return temporary(choose, base, hostile=hostile, kind=choose.choice(_TMEM))
    attribute = choose.randrange(0x400) if hostile and choose.random() < 0.3 else choose.choice(_OTHERS)
    return attribute, choose.choice((0, 8, 1 << 63)), choose.choice((8, 4096)), choose.choice(COOKIES)


def temporary(choose: Random, base: int, *, hostile: bool, kind: int) -> tuple[int, int, int, int]:
    """Draw a parameter with a page list."""
    if choose.random() < LONG:
        return kind, base + ENDLESS * 4096, choose.choice(LONG_SIZES), choose.choice(FRIENDLY)
    pointer = base + choose.choice(LISTS) * 4096
    size = choose.choice(SIZES[:5])
    if hostile:
        pointer += choose.choice((0, 0, 8, 4095))
        size = choose.choice(SIZES)
        if choose.random() < 0.2:
            kind, pointer = choose.choice(((kind, 0), (kind & 0xFF, pointer), (kind | 0x100, pointer), (kind, 1 << 45)))
    return kind, pointer, size, choose.choice(COOKIES if hostile else FRIENDLY)


def page_list(choose: Random, base: int, *, hostile: bool) -> bytes:
    """Draw the first entries of a list page."""
    entries = [base + choose.randrange(24, PAGES) * 4096 for _ in range(6)]
    if hostile:
        entries[choose.randrange(6)] = choose.choice(
            (0, base + 24 * 4096 + 8, 1 << 45, base, base + 8 * 4096, (1 << 64) - 1)
        )
    return b"".join(entry.to_bytes(8, "little") for entry in entries)


@cache
def endless_list(base: int) -> bytes:
    """A list page that names a data page as often as it can, and itself as the next one."""
    entries = [base + 24 * 4096] * ENTRIES_PER_PAGE
    return b"".join(word.to_bytes(8, "little") for word in (*entries, base + ENDLESS * 4096))


@cache
def first_lists(base: int) -> list[bytes]:
    """The page lists with which a guest begins."""
    choose = Random(0)
    return [page_list(choose, base, hostile=False) for _ in LISTS]


def request(choose: Random) -> bytes:
    """Draw what OP-TEE asks the guest for."""
    command = choose.choice((*(6,) * 16, *(7,) * 16, 3, 2, 4, 20, *map(int, RpcCommand)))
    if command == RpcCommand.SHM_ALLOC:
        params = [(1, 0, 4096, 8)]
    elif command == RpcCommand.SHM_FREE:
        params = [(1, 0, choose.choice(FRIENDLY), 0)]
    else:
        params = [(choose.choice(_OTHERS), 1, 8, choose.choice(COOKIES)) for _ in range(choose.choice((0, 1, 2)))]
    return HEADER.pack(command, 0, 0, 0, 0, 0xFFFF0000, 0, len(params)) + b"".join(PARAM.pack(*each) for each in params)


def reply(choose: Random, asked: bytes, base: int, *, hostile: bool) -> bytes:
    """Draw what a guest answers to a request."""
    command, _, _, _, _, _, _, count = HEADER.unpack_from(asked)
    if command == RpcCommand.SHM_ALLOC:
        params = PARAM.pack(*temporary(choose, base, hostile=hostile, kind=_TMEM[1]))
        count = 1
    else:
        params = asked[32 : 32 + 32 * min(count, 4)]
    if hostile and choose.random() < 0.5:
        command, count = choose.choice((command, 6, 7, 0xFFFFFFFF)), choose.choice((count, 0, 2, 127, 128, 0xFFFFFFFF))
    return HEADER.pack(command, 0, 0, 0, 0, choose.choice((0, 0, 0, 0xFFFF000C)), 0, count) + params
