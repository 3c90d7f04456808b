"""Where two images of a guest's memory differ."""

from collections.abc import Iterator
from typing import Final

import numpy as np

from mediator.conformance.vectors import Change

_MERGE: Final = 8
"""Changed runs that are closer than this are written as one, as in the recorded files."""


def changed_runs(domain: int, base: int, old: bytes, new: bytes) -> Iterator[Change]:
    """Runs of bytes that differ; runs that are close together are one."""
    differing = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    if not len(differing):
        return
    gaps = np.flatnonzero(np.diff(differing) >= _MERGE)
    starts = [int(differing[0]), *differing[gaps + 1].tolist()]
    ends = [*differing[gaps].tolist(), int(differing[-1])]
    for start, end in zip(starts, ends, strict=True):
        yield Change(domain=domain, ipa=base + start, hex=new[start : end + 1])


def differing_runs(base: int, expected: bytes | bytearray, got: bytes) -> list[tuple[int, bytes]]:
    """Runs of bytes that differ: the IPA of the first, and what was expected."""
    differing = np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(got, np.uint8))
    cuts = np.flatnonzero(np.diff(differing) > 1) + 1
    return [(base + int(run[0]), bytes(expected[int(run[0]) : int(run[-1]) + 1])) for run in np.split(differing, cuts)]


def first_difference(base: int, expected: bytes, got: bytes) -> tuple[str, str]:
    """The first bytes that differ, each with their IPA: expected, got."""
    at = int(np.flatnonzero(np.frombuffer(expected, np.uint8) != np.frombuffer(got, np.uint8))[0])
    return (
        f"{base + at:#x}: {expected[at : at + 16].hex()}",
        f"{base + at:#x}: {got[at : at + 16].hex()}",
    )
