"""Words, messages and registers as a hostile guest makes them: near every boundary that the ABI has.

Addresses stand for places of a guest's RAM (`Place`), so that whoever uses them decides where that is.
"""

from dataclasses import dataclass

from hypothesis import strategies as st

from optee.abi.message import META, NONCONTIG, Command, Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
NEAR_32 = st.sampled_from([0, 1, 2, 5, 127, 128, 2**27, 2**31, 2**32 - 1])
NEAR_64 = st.sampled_from([0, 1, 7, 4095, 4096, 2**32 - 1, 2**32, 2**47, 2**63, 2**64 - 4096, 2**64 - 1])
COOKIES = st.sampled_from([0, 1, 2, 3, 4, 2**64 - 1])
SIZES = st.sampled_from(
    [0, 1, 4095, 4096, 4097, 3 * 4096, 511 * 4096, 512 * 4096, 1100 * 4096, 2**32 + 4096, 2**63, 2**64 - 1]
)
OFFSETS = st.sampled_from([0, 0, 0, 1, 8, 64, 4032, 4095])
TYPES = st.sampled_from([0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 4, 8, 12, 0xFF])
ATTRIBUTES = st.builds(
    lambda kind, flags: kind | flags,
    TYPES,
    st.sampled_from([NONCONTIG, NONCONTIG, NONCONTIG, 0, META, META | NONCONTIG, 1 << 16 | NONCONTIG, 1 << 40]),
)
FUNCTIONS = st.sampled_from([*map(int, Function), 0x32000005, 0xB2FF0000, 0x72000004, 0])


@dataclass(frozen=True)
class Place:
    """A page of the guest that the test lays out, and an offset in it."""

    page: int
    offset: int


PLACES = st.builds(Place, st.integers(0, 11), OFFSETS)
ADDRESSES = st.one_of(PLACES, PLACES, PLACES, NEAR_64)
"""`Place`s or numbers."""
PARAMS = st.builds(Param, ATTRIBUTES, ADDRESSES, SIZES, COOKIES)
"""Parameters whose first word may be a `Place`."""


def messages(commands: type = Command, most: int = 5) -> st.SearchStrategy[Message]:
    """Messages or RPC arguments, well formed or not in everything but their length."""
    return st.builds(
        Message,
        st.one_of(st.sampled_from(list(map(int, commands))), NEAR_32),
        U32,
        st.integers(0, 3),
        NEAR_32,
        NEAR_32,
        st.sampled_from([0, 0xFFFF0000, 0xFFFF0006]),
        st.integers(0, 4),
        st.lists(PARAMS, max_size=most),
    )


MESSAGES = messages()
REPLIES = messages(RpcCommand, 4)
REGISTERS = st.tuples(FUNCTIONS, *[st.one_of(NEAR_64, U64)] * 7)
