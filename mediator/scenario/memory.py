"""Guest memory in a scenario: where its pages are, what is in them, whether they are pinned and dirty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

from guests import SharedMemory
from hv_models.descriptor import IPA_BITS
from mediator.scenario.expressions import (
    EvaluationError,
    Expression,
    Number,
    Record,
    where_constant,
)
from mediator.scenario.steps import Expected, Name, Octets, StepFailed, Strict, check_number, octets

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

_PAGE: Final = 4096


def whole_page(address: int) -> int:
    """An address where a page begins. Raises EvaluationError for any other."""
    if address % _PAGE:
        raise EvaluationError(f"{address:#x} is not where a page begins")
    return address


def guest_page(address: int) -> int:
    """An address that stage-2 tables have an entry for. Raises EvaluationError for any other."""
    if not 0 <= address < 1 << IPA_BITS:
        raise EvaluationError(f"{address:#x} is no IPA: they have {IPA_BITS} bits")
    return address


PageAddress = Annotated[Number, where_constant(whole_page)]
"""Where a page begins."""


class MemoryExpectation(Strict):
    """Bytes of guest memory."""

    at: Number
    content: Octets

    def check(self, actor: Actor) -> None:
        """Compare. Raises StepFailed."""
        wanted = octets(self.content, actor)
        at = actor.number(self.at)
        check_bytes(f"memory at {at:#x}", wanted, read_ram(actor, at, len(wanted)))


def check_bytes(what: str, wanted: bytes, got: bytes) -> None:
    """Compare bytes, and say where they begin to differ. Raises StepFailed."""
    if wanted == got:
        return
    at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    raise StepFailed(
        f"{what}, byte {at}",
        f"{wanted[at : at + 16].hex()} ({len(wanted)} bytes)",
        f"{got[at : at + 16].hex()} ({len(got)} bytes)",
    )


def read_ram(actor: Actor, at: int, size: int) -> bytes:
    """Bytes of the guest's RAM as the guest sees them. Raises EvaluationError."""
    for ram in actor.guest.vm.ram:
        if ram.base <= at and at + size <= ram.base + ram.size:
            return ram.read(at, size)
    raise EvaluationError(f"{size} bytes at {at:#x} are not RAM of {actor.guest.name}")


def page_addresses(actor: Actor, at: Expression, pages: Expression | None) -> Sequence[int]:
    """The pages that a place means: all of named pages or shared memory, or `pages` from an address on.

    Raises EvaluationError for more pages than the guest has.
    """
    value = actor.value(at)
    if isinstance(value, Record) and pages is None:
        if value.kind == "pages":
            assert isinstance(value.thing, tuple)
            return value.thing
        if value.kind == "memory":
            assert isinstance(value.thing, SharedMemory)
            return value.thing.kernel_memory.buffer.pages
    first, count = actor.number(at), 1 if pages is None else actor.number(pages)
    owned = sum(ram.size for ram in actor.guest.vm.ram) // _PAGE
    if count > owned:
        raise EvaluationError(f"{count} pages, where {actor.guest.name} has {owned}")
    return range(first, first + _PAGE * count, _PAGE)


def frames_of(actor: Actor, ipas: Sequence[int]) -> list[int]:
    """Where stage 2 has these pages of the guest now. Raises StepFailed."""
    pas: list[int] = []
    for ipa in ipas:
        pa = actor.guest.frame_of(ipa)
        if pa is None:
            raise StepFailed(f"IPA {ipa:#x}", "mapped", "not mapped")
        pas.append(pa)
    return pas


def in_words(pages: Sequence[int]) -> str:
    """The first addresses of a list, for a report."""
    shown = " ".join(map(hex, pages[:4]))
    return f"{len(pages)} pages: {shown}{' ...' * (len(pages) > 4)}"


class MapsTo(Strict):
    """Where pages are: a frame of whose RAM, and that IPA != PA.

    With `cookie`, OP-TEE's buffer of that name has exactly these pages in this order.
    """

    at: Number
    pages: Number | None = None
    guest: Name | None = None
    """Whose RAM the frame belongs to; the guest's own if not given."""
    cookie: Number | None = None

    def check(self, actor: Actor) -> None:
        """Look at the tables and at OP-TEE. Raises StepFailed."""
        guest = actor.guest
        owner = actor.of(self.guest).guest
        ipas = page_addresses(actor, self.at, self.pages)
        pas = frames_of(actor, ipas)
        for ipa, pa in zip(ipas, pas, strict=True):
            if pa == ipa:
                raise StepFailed(f"IPA {ipa:#x}", "another PA", "PA = IPA")
            if not owner.has_frame(pa):
                raise StepFailed(f"IPA {ipa:#x}", f"a frame of {owner.name}", f"{pa:#x}, which is none")
        if self.cookie is None:
            return
        cookie = actor.number(self.cookie)
        known = [shm for shm in actor.run.model.shared_objects(guest.client) if shm.cookie == cookie]
        if not known:
            raise StepFailed(f"buffer {cookie:#x} at OP-TEE", f"{len(pas)} pages", "no such buffer")
        got = [pa & ~(_PAGE - 1) for pa in known[0].pages]
        if got != pas:
            raise StepFailed(f"buffer {cookie:#x} at OP-TEE", in_words(pas), in_words(got))


class PinsExpectation(Strict):
    """How often pages are pinned."""

    at: Number
    pages: Number | None = None
    count: Expected

    def check(self, actor: Actor) -> None:
        """Count. Raises StepFailed."""
        pins = {int(gfn): count for gfn, count in actor.guest.vm.pinned().items()}
        for ipa in page_addresses(actor, self.at, self.pages):
            check_number(f"pins of {ipa:#x}", self.count, pins.get(ipa // _PAGE, 0), actor)


class DirtyExpectation(Strict):
    """Whether pages are in the dirty log (KVM_GET_DIRTY_LOG: reading clears it)."""

    at: Number
    pages: Number | None = None
    dirty: bool = True
