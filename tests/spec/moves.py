"""What the moves of a history are made of: messages, replies, answers of OP-TEE, and what goes on around them."""

from itertools import product

from hypothesis import strategies as st

from optee.abi.message import Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function
from tests.spec.side_by_side import KINDS, PAGES
from tests.spec.specification.terms import OWN_THREADS, PAGE
from tests.strategies import Place

YIELDING = ("CALL_WITH_ARG", "CALL_WITH_ARG", "CALL_WITH_RPC_ARG", "CALL_WITH_REGD_ARG")
LISTS = 6
"""Pages of a guest that hold page lists to begin with; the others are for messages."""


class Items(list):
    """A list that prints itself in few words."""

    def __repr__(self):
        return f"{len(self)} items"

    def item(self, n):
        return self[n]


def pick(items):
    """One of these. The lists are made beforehand: a history is long, and what it may draw has a bound."""
    return st.integers(0, len(items) - 1).map(Items(items).item)


def weighted(*choices):
    """One of the items of one of several lists, each of which comes with its weight."""
    return pick([items for weight, items in choices for _ in range(weight)]).flatmap(pick)


WHO = st.integers(0, 2)
INDEX = st.integers(0, 7)
RETS = (0, 0, 0, 0xFFFF0006, 0xFFFF000C)
NOISE = (bytes(8), b"\1\2\3\4\5\6\7\x08", b"\xff" * 8)
WORDS = (0, 1, 2, 3, 4, PAGE, 2**32 - 1, 2**36 + 1, 2**64 - 1)
MESSAGE_PLACES = [Place(page, 0) for page in range(LISTS, PAGES)]
LIST_PLACES = [Place(page, offset) for page in range(LISTS) for offset in (0, 0, 0, 8)]
SIZES = (1, PAGE, 3 * PAGE, 600 * PAGE, 1100 * PAGE)
ATTRIBUTES = (0x209, 0x20A, 0x20A, 0x20B, 5, 6, 7, 1, 2, 3)
BUFFERS = [Param(*each) for each in product(ATTRIBUTES, LIST_PLACES, SIZES, range(1, 5))]
GOOD_MESSAGES = weighted(
    (2, [Message(command, params=[param]) for command, param in product((0, 1, 1, 2, 3), BUFFERS)]),
    (1, [Message(1, params=[first, second]) for first, second in zip(BUFFERS, BUFFERS[::-7], strict=False)]),
    (2, [Message(4, params=[param]) for param in BUFFERS if param.attr == 0x20A]),
    (1, [Message(5, params=[Param(5, 0, 0, cookie)]) for cookie in range(1, 5)]),
)
REQUESTS = [
    Message(command, params=[Param(kind, a, 2, 3)] * count)
    for command in (*map(int, RpcCommand), 99)
    for kind, a, count in ((1, 5, 1), (2, 0, 2), (3, 7, 4), (6, 0, 1), (10, 0, 2), (9, 8, 1), (0, 0, 5), (0, 0, 0))
]
ANSWERS = weighted(
    (4, [("end", ret, noise) for ret in RETS for noise in NOISE]),
    (5, [("command", Message(6, params=[Param(1, kind, PAGE, 8)])) for kind in (0, 1, 2)]),
    (2, [("command", Message(7, params=[Param(1, 1, cookie, 0)])) for cookie in range(1, 6)]),
    (2, [("command", request) for request in REQUESTS]),
    (1, [("alloc",)]),
    (2, [("free", cookie) for cookie in (1, 2, 3)]),
    (1, [("interrupt",)]),
    (
        1,
        [
            *(("thread", thread) for thread in (0, 1, 2, OWN_THREADS, 2**32 - 1)),
            *(("raw", (code, 2, 1, 3)) for code in (0, 1, 5, 0xFFFF0001, 0xFFFFFFFF, 2**32)),
            *[("unknown argument",), ("insist", True), ("insist", False), ("lost",)] * 2,
        ],
    ),
)
"""What OP-TEE does with a call; the last ones break its contract."""
OFFERED = list(
    product((0x20A, 0x20A, 0x20A, 0x20A, 0x209, 0), LIST_PLACES, (1, PAGE, 600 * PAGE, 2000 * PAGE), range(1, 6))
)
REPLIES = weighted(
    (4, [("offer", Param(*each)) for each in OFFERED]),
    (2, [("echo", (ret, noise)) for ret in RETS for noise in NOISE]),
    (1, [("other", request) for request in REQUESTS]),
    (1, [("nothing", None)]),
)
TROUBLE = weighted(
    (12, [None]),
    (
        1,
        [("flip", page, at, word) for page, at, word in product(range(1, PAGES), (0, 20, 28, 32, 40, 48, 56), WORDS)],
    ),
    (1, [("short", left) for left in range(5)]),
    (1, [("kind", page, kind) for page, kind in product(range(1, PAGES), KINDS)]),
    (2, [("well",)]),
)
"""What happens around a move: another vCPU writes once the message was read; the host runs out of pages; a page of the
guest changes its kind, or all are well again."""
STEPS = st.tuples(
    st.booleans(),
    INDEX,
    ANSWERS,
    REPLIES,
    weighted((5, MESSAGE_PLACES), (1, LIST_PLACES)),
    st.integers(1, 3),
    TROUBLE,
)
LIMITS = st.fixed_dictionaries(
    {
        "calls": st.sampled_from([1, 3, 3]),
        "buffers": st.sampled_from([1, 4, 4]),
        "pages": st.sampled_from([3, 2600, 2600]),
        "memory_kib": st.sampled_from([16, 96, 96]),
    }
)
FAST = [
    *map(int, (Function.CALLS_UID, Function.CALLS_COUNT, Function.GET_SHM_CONFIG, Function.GET_OS_REVISION)),
    *map(int, (Function.GET_THREAD_COUNT, Function.ENABLE_ASYNC_NOTIF, Function.ENABLE_SHM_CACHE)),
    *[int(Function.EXCHANGE_CAPABILITIES), int(Function.DISABLE_SHM_CACHE)] * 3,
]
FORGED_RETURNS = st.tuples(
    st.just(int(Function.RETURN_FROM_RPC)),
    *[pick(WORDS)] * 2,
    st.sampled_from([0, 1, 2, 2**32 - 1, OWN_THREADS + 1]),
    *[pick(WORDS)] * 2,
    st.just(0),
    st.just(0),
)
