"""The published measurements of OP-TEE/optee_os #6596, and what this arithmetic says about each.

Source: memory sizing reference, sections 1 and 3. A row is `predicted` only if no number of it went into the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from optee.memory.build import MIB, Build
from optee.memory.failures import usable_heap
from optee.memory.profile import TEST_PROGRAM

TITLE: Final = "OP-TEE/optee_os #6596, comment of 2024-03-03: MB of TA memory that could still be had"
PREDICTED: Final = "predicted"
CALIBRATED: Final = "calibrated"
NOT_DERIVED: Final = "not derived"

_CONTIGUOUS: Final = {8: 487, 16: 698}
_WHY_PREALLOC: Final = (
    "with preallocation no thread count is in the arithmetic; what limits is TA RAM in one piece (or the 1 GiB of "
    "address space), which the report does not give: {} MiB is chosen to match"
)
_WHY_OWN_PREALLOC: Final = "the two TAs are not published; flat from 16 threads on, as it must be, but no size follows"
_WHY_OWN: Final = (
    "about half of what the tables map, as if one payload were mapped twice in a context, with 8 MiB beside it; factor "
    "and rest are chosen to match the rows of 32 to 128 threads"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One number of the report beside ours."""

    threads: int
    prealloc: bool
    program: str
    """"test program" or "own (2 TAs)"."""
    measured: str
    """MB, as published."""
    model: int | None
    """MiB; None if the arithmetic has nothing to say."""
    kind: str
    why: str


_TEST: Final = {
    (8, True): "450",
    (8, False): "20",
    (16, True): "660",
    (16, False): "28",
    (32, True): "660",
    (32, False): "92",
    (64, True): "660",
    (64, False): "220",
    (128, True): "660",
    (128, False): "475",
}
_OWN: Final = {
    (8, True): "55",
    (8, False): "<25",
    (16, True): "85",
    (16, False): "<25",
    (32, True): "85",
    (32, False): "60",
    (64, True): "85",
    (64, False): "120",
    (128, True): "85",
    (128, False): "250",
}


def rows() -> tuple[Row, ...]:
    """All twenty numbers: ten configurations, two programs."""
    test = (_test_row(threads, prealloc, measured) for (threads, prealloc), measured in _TEST.items())
    own = (_own_row(threads, prealloc, measured) for (threads, prealloc), measured in _OWN.items())
    return (*test, *own)


def _test_row(threads: int, prealloc: bool, measured: str) -> Row:
    if prealloc:
        contiguous = _CONTIGUOUS[min(threads, 16)]
        model = contiguous * 512 // 513 - 36
        why = _WHY_PREALLOC.format(contiguous)
        return Row(threads, prealloc, "test program", measured, model, CALIBRATED, why)
    if threads == 8:
        why = (
            "36 MiB beside the heap need 18 of 16 tables, so this cannot have been the same TA; with a rest of 12 MiB, "
            "chosen to match, it is"
        )
        return Row(threads, prealloc, "test program", measured, 32 - 12, CALIBRATED, why)
    usable, _ = usable_heap(Build(threads=threads, virtualization=False), (TEST_PROGRAM,))
    model = usable // MIB
    if threads == 32:
        why = "the 36 MiB beside the heap are what this row leaves of 128 MiB (the map of #7077 holds 35.95 MiB)"
        return Row(threads, prealloc, "test program", measured, model, CALIBRATED, why)
    why = f"{2 * threads} tables of 2 MiB less the 36 MiB of the row of 32 threads"
    return Row(threads, prealloc, "test program", measured, model, PREDICTED, why)


def _own_row(threads: int, prealloc: bool, measured: str) -> Row:
    if prealloc:
        return Row(threads, prealloc, "own (2 TAs)", measured, None, NOT_DERIVED, _WHY_OWN_PREALLOC)
    model = (4 * threads - 8) // 2
    if threads == 16:
        why = "the same rule would allow 28: it does not hold here"
        return Row(threads, prealloc, "own (2 TAs)", measured, model, NOT_DERIVED, why)
    return Row(threads, prealloc, "own (2 TAs)", measured, model, CALIBRATED, _WHY_OWN)
