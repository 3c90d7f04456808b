"""Where a machine puts the frames of its VMs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

from hv_models.memory import PAGE_SHIFT, Frames

FRAMES_BASE: Final = 1 << 40
"""First PA of guest frames: above every IPA, so that no PA equals an IPA and an IPA that is used as a PA
always hits a hole."""


class Layout(Protocol):
    """Chooses frames. Ranges that are out never have a frame in common."""

    def allocate(self, pages: int) -> Frames:
        """Choose frames for so many pages."""
        ...

    def release(self, frames: Frames) -> None:
        """Let frames be chosen again."""
        ...


@dataclass(slots=True)
class _Stripe:
    """A range of PAs in which every eighth frame belongs to the same lane, and a lane to one VM at a time."""

    base: int
    pages: int
    free: list[int]


@dataclass(slots=True)
class Interleaved:
    """The frame behind each frame of a VM is another VM's (or a hole), and the order within is shuffled.

    So an address that is off by a page, or kept past its time, shows.
    """

    lanes: int = 8
    base: int = FRAMES_BASE
    _stripes: list[_Stripe] = field(default_factory=list)
    _out: dict[Frames, tuple[_Stripe, int]] = field(default_factory=dict)

    def allocate(self, pages: int) -> Frames:
        """Choose a lane of a stripe whose lanes have the next power of two of pages."""
        size = 1 << (pages - 1).bit_length()
        stripe = next((s for s in self._stripes if s.pages == size and s.free), None)
        if stripe is None:
            stripe = _Stripe(self.base, size, list(range(self.lanes)))
            self._stripes.append(stripe)
            self.base += size * self.lanes << PAGE_SHIFT
        lane = stripe.free.pop(0)
        permutation = (0x2B + 0x5A * lane) % size
        frames = Frames(stripe.base + (lane << PAGE_SHIFT), pages, self.lanes, permutation)
        self._out[frames] = stripe, lane
        return frames

    def release(self, frames: Frames) -> None:
        """Let another VM have the lane."""
        stripe, lane = self._out.pop(frames)
        stripe.free.append(lane)


@dataclass(slots=True)
class Contiguous:
    """Every VM's frames lie in one piece, aligned to 1 GiB, so that stage-2 tables can use blocks."""

    base: int = FRAMES_BASE

    def allocate(self, pages: int) -> Frames:
        """Choose the next free piece."""
        frames = Frames(self.base, pages)
        self.base = frames.end + (1 << 30) - 1 & ~((1 << 30) - 1)
        return frames

    def release(self, frames: Frames) -> None:
        """Forget the piece; it is not chosen again."""


def domain_frames(domain: int, pages: int, permutation: int) -> Frames:
    """Frames of a domain of a vector file: PA(page i) = ((domain + 8) << 32) + ((i XOR permutation) << 12)."""
    return Frames((domain + 8) << 32, pages, permutation=permutation)
