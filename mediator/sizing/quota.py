"""Quotas of the mediator that an OP-TEE's heap can bear, and what a reserved carve-out would give instead."""

import re
from dataclasses import dataclass

from mediator.policies import policy_text
from optee.memory.build import PAGE, up
from optee.memory.sizing import Sizing


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of a policy, for each guest."""

    pages: int
    buffers: int
    pages_per_buffer: int


def derive(sizing: Sizing) -> Quota | None:
    """As much as registering alone can use without an error of OP-TEE's heap; None if it holds no buffer.

    While a buffer is registered it takes 16 bytes of heap for each page and less than 144 more; what of that is freed
    is not counted on. So as long as a guest only adds, each buffer within the quota finds its memory.
    """
    each = up(sizing.load.buffer) // PAGE
    largest = sizing.largest_buffer
    if not largest or not each:
        return None
    buffers = sizing.heap_free // (144 + 16 * each)
    if not buffers:
        return Quota(largest, 1, largest)
    return Quota(buffers * each, buffers, min(largest, buffers * each))


def policy_yaml(quota: Quota) -> str:
    """The policy `default` with these limits."""
    text = policy_text("default")
    for key in ("pages", "buffers", "pages_per_buffer"):
        # The first is the guest's own. The pool stays as it is: each guest has an OP-TEE heap of its own.
        text = re.sub(rf"^  {key}: .*$", f"  {key}: {getattr(quota, key)}", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^name: .*$", "name: sized", text, flags=re.MULTILINE)
    return re.sub(
        r"^purpose: .*$", "purpose: default, with limits that OP-TEE's heap can bear", text, flags=re.MULTILINE
    )


@dataclass(frozen=True, slots=True)
class Split:
    """A carve-out of static shared memory among guests, beside dynamic sharing."""

    guests: int
    static_bytes: int
    """For each guest, whether it uses them or not."""
    dynamic_buffer: int
    """Bytes of the largest buffer of a guest, however many guests there are."""
    dynamic_bytes: int
    """Bytes that a guest can share at once, in buffers of the load's size."""


def static_split(sizing: Sizing, carve_out: int) -> list[Split]:
    """What a reserved carve-out gives each of 1, 2, 4, ... guests, up to those that are wanted."""
    counts = []
    count = 1
    while count < max(sizing.load.guests, 16):
        counts.append(count)
        count *= 2
    counts.append(max(sizing.load.guests, 16))
    return [
        Split(count, carve_out // count // PAGE * PAGE, sizing.largest_buffer * PAGE, sizing.total_pages * PAGE)
        for count in counts
    ]
