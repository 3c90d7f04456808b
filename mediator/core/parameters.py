"""What the types of a message's parameters decide, worked out once per combination of types."""

from functools import lru_cache
from typing import Final, NamedTuple

from optee.abi.message import HEADER_SIZE, PARAM_SIZE, ParamType

TMEM_INPUT: Final = int(ParamType.TMEM_INPUT)
TMEM_INOUT: Final = int(ParamType.TMEM_INOUT)
RMEM_INPUT: Final = int(ParamType.RMEM_INPUT)
RMEM_INOUT: Final = int(ParamType.RMEM_INOUT)

_VALUES_BACK: Final = (int(ParamType.VALUE_OUTPUT), int(ParamType.VALUE_INOUT))
_SIZE_BACK: Final = tuple(
    int(kind) for kind in (ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)
)
_REMEMBERED: Final = 256
"""Applications use a few dozen combinations; this bounds the memory that a guest can take by thinking up more."""


class Parameters(NamedTuple):
    """Places in a message, counted in bytes from its start.

    outputs: the fields that whoever receives the message answers in: values, and sizes of memory references;
    temporary, registered: the parameters that are TMEM and RMEM references.
    """

    outputs: tuple[slice, ...]
    temporary: tuple[int, ...]
    registered: tuple[int, ...]


@lru_cache(maxsize=_REMEMBERED)
def parameters(types: bytes) -> Parameters:
    """Say what parameters of these types are; a type is the first byte of an attribute, and so of a parameter."""
    outputs: list[slice] = []
    temporary: list[int] = []
    registered: list[int] = []
    at = HEADER_SIZE
    for kind in types:
        if kind in _VALUES_BACK:
            outputs.append(slice(at + 8, at + 32))
        elif kind in _SIZE_BACK:
            outputs.append(slice(at + 16, at + 24))
        if TMEM_INPUT <= kind <= TMEM_INOUT:
            temporary.append(at)
        elif RMEM_INPUT <= kind <= RMEM_INOUT:
            registered.append(at)
        at += PARAM_SIZE
    return Parameters(tuple(outputs), tuple(temporary), tuple(registered))
