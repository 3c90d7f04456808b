"""Vector files: guests' calls and the secure world's answers, with everything a mediator did about them.

Source of the format: the vector-file description, "xen-optee-mediator-vectors/1".
"""

import re
from typing import Annotated, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
    ValidationInfo,
    field_validator,
)

from hv_models.descriptor import IPA_BITS
from hv_models.memory import PAGE_SIZE

FORMAT: Final = "xen-optee-mediator-vectors/1"
OPS: Final = ("probe", "create", "smc", "p2m", "flip", "alloc_fault", "relinquish")
MAX_PAGES: Final = 1 << 19
"""Pages of all domains of a vector (2 GiB): stops a file from having tables built for ever."""


_DIGITS: Final = re.compile(r"([0-9a-fA-F]{2})*\Z")
_HEXADECIMAL: Final = re.compile(r"(0x)?[0-9a-fA-F]{1,32}\Z")


def _number(value: object) -> object:
    if isinstance(value, str):
        if not _HEXADECIMAL.match(value):
            raise ValueError(f"{value!r:.40} is no hexadecimal number")
        return int(value, 16)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a number or a hexadecimal string is wanted")
    return value


def _bytes(value: object) -> object:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        if not _DIGITS.match(value):
            raise ValueError("hexadecimal digits are wanted, two for a byte")
        return bytes.fromhex(value)
    raise ValueError("a string of hexadecimal digits is wanted")


_as_hex = PlainSerializer(hex, return_type=str, when_used="json")
_as_digits = PlainSerializer(bytes.hex, return_type=str, when_used="json")

U64 = Annotated[int, BeforeValidator(_number), Field(ge=0, lt=1 << 64), _as_hex]
Number = Annotated[int, Strict()]
Truth = Annotated[bool, Strict()]
Count = Annotated[Number, Field(ge=0, le=1 << 32)]
Hex = Annotated[bytes, BeforeValidator(_bytes), _as_digits]
Gfn = Annotated[int, BeforeValidator(_number), Field(ge=0, lt=1 << 52), _as_hex]
DomainId = Annotated[Number, Field(ge=0, le=65534)]
_Digits = Annotated[str, Field(pattern=r"^[0-9]{1,5}$")]
PinCounts = dict[_Digits, dict[Annotated[str, Field(pattern=r"^(0x)?[0-9a-fA-F]{1,16}$")], Count]]
Target = Annotated[str, Field(pattern=r"^(arg:[0-9]{1,9}|rpc:[0-9a-f]{1,16})$")]
Registers = Annotated[list[U64], Field(min_length=8, max_length=8)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Domain(_Model):
    """A domain of the machine: page i is guest frame base_gfn + i."""

    id: DomainId
    npages: Annotated[Number, Field(ge=1, le=1 << 18)] = 64
    base_gfn: Annotated[int, BeforeValidator(_number), Field(ge=0, lt=(1 << IPA_BITS - 12) - (1 << 18)), _as_hex] = (
        0x40000
    )
    perm: Annotated[int, BeforeValidator(_number), Field(ge=0, lt=1 << 18), _as_hex] = 0x2B


class Setup(_Model):
    """The machine before the first step."""

    max_threads: Annotated[Number, Field(ge=1, le=1 << 31)]
    domains: list[Domain]

    @field_validator("domains")
    @classmethod
    def _different(cls, domains: list[Domain]) -> list[Domain]:
        if len({domain.id for domain in domains}) < len(domains):
            raise ValueError("a domain is listed twice")
        if sum(domain.npages for domain in domains) > MAX_PAGES:
            raise ValueError(f"more than {MAX_PAGES} pages in all")
        return domains


class Answer(_Model):
    """The scripted secure world: a0..a3, and what it writes before it returns."""

    ret: Annotated[list[U64], Field(min_length=4, max_length=4)]
    writes: list[tuple[Target, Annotated[Number, Field(ge=0, le=4096)], Hex]] = []

    @field_validator("writes")
    @classmethod
    def _within_the_page(cls, writes: list[tuple[str, int, bytes]]) -> list[tuple[str, int, bytes]]:
        if any(offset + len(data) > PAGE_SIZE for _, offset, data in writes):
            raise ValueError("a write beyond the page")
        return writes


class Translated(_Model):
    """A page list as the secure world sees it."""

    offset: Annotated[Number, Field(ge=0, lt=4096)]
    n_pages_from_size: U64 = 0
    list_pages: Count = 0
    pages: list[tuple[Number, Gfn]]


class Shadow(_Model):
    """A message or RPC argument as the secure world sees it before it answers."""

    owner: str
    hex: Hex
    num_params: Count = 0
    translated: dict[Annotated[int, Field(ge=0, le=127)], Translated] = {}


class Forwarded(_Model):
    """One SMC to the secure world."""

    regs: Registers
    sym: dict[Literal["a1:a2"], Target] = {}
    resumes: str | None = None
    arg: Shadow | None = None
    rpc_arg: Shadow | None = None
    rpc_cookie: U64 | None = None
    pins_during: PinCounts | None = None
    answer: Answer


class Change(_Model):
    """Guest bytes that differ after a step."""

    domain: DomainId
    ipa: U64
    hex: Hex


class SharedBuffer(_Model):
    """A shared buffer of a guest."""

    cookie: U64
    pages: Count
    has_page_list: Truth


class State(_Model):
    """What the observed mediator held after a step."""

    call_count: Count = 0
    quota_pages: Count = 0
    quota_bufs: Count = 0
    rpc_bufs: Count = 0
    shm_bufs: list[SharedBuffer] = []


class ProbeOut(_Model):
    """What start-up did."""

    result: Truth
    forwarded: list[Forwarded] = []


class CreateOut(_Model):
    """What VM creation did: 0, or a negative errno."""

    rc: Annotated[Number, Field(le=0, ge=-4095)]
    forwarded: list[Forwarded] = []


class SmcOut(_Model):
    """What one call did."""

    handled: Truth
    regs: Registers
    forwarded: list[Forwarded] = []
    mem_changes: list[Change] = []
    pins: PinCounts = {}
    state: State


class RelinquishOut(_Model):
    """What a piece of teardown did: -85 asks to come again."""

    rc: Annotated[Number, Field(le=0, ge=-4095)]
    forwarded: list[Forwarded] = []
    pins: PinCounts = {}
    state: State | None = None


class MemoryWrite(_Model):
    """Guest bytes written before a call."""

    ipa: U64
    hex: Hex
    zeros_after: Annotated[Number, Field(ge=0, le=1 << 20)] = 0


class Probe(_Model):
    """Mediator start-up."""

    op: Literal["probe"]
    out: ProbeOut


class Create(_Model):
    """VM creation."""

    op: Literal["create"]
    domain: DomainId
    out: CreateOut


class Smc(_Model):
    """Writes, then one SMC."""

    op: Literal["smc"]
    domain: DomainId
    regs: Registers
    mem_writes: list[MemoryWrite] = []
    out: SmcOut


class P2m(_Model):
    """A change of a stage-2 entry."""

    op: Literal["p2m"]
    domain: DomainId
    gfn: Gfn
    type: Literal["ram_rw", "ram_ro", "mmio", "grant_rw", "grant_ro", "foreign_rw", "none"]
    page_index: Count | None = None


class Flip(_Model):
    """Guest memory that changes just before a look-up of its page."""

    op: Literal["flip"]
    domain: DomainId
    gfn: Gfn
    nth_lookup: Count
    offset: Annotated[Number, Field(ge=0, lt=4096)]
    value: U64
    size: Annotated[Number, Field(ge=1, le=8)]


class AllocFault(_Model):
    """The nth following allocation fails; -1 never."""

    op: Literal["alloc_fault"]
    heap_page_alloc_nth: Annotated[Number, Field(ge=-1, le=1 << 32)]
    xzalloc_nth: Annotated[Number, Field(ge=-1, le=1 << 32)]


class Relinquish(_Model):
    """Teardown, or a piece of it."""

    op: Literal["relinquish"]
    domain: DomainId
    preempt_after: Annotated[Number, Field(ge=-1, le=1 << 32)] = -1
    out: RelinquishOut


Step = Annotated[Probe | Create | Smc | P2m | Flip | AllocFault | Relinquish, Field(discriminator="op")]


class Vector(_Model):
    """A sequence of steps on one machine."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    tags: list[str] = []
    setup: Setup
    steps: Annotated[list[Step], Field(min_length=1)]


class Document(_Model):
    """A vector file."""

    format: Literal["xen-optee-mediator-vectors/1"]
    vectors: Annotated[list[Vector], Field(min_length=1)]
    count: Count | None = None

    @field_validator("vectors")
    @classmethod
    def _named_once(cls, vectors: list[Vector]) -> list[Vector]:
        names: set[str] = set()
        for vector in vectors:
            if vector.name in names:
                raise ValueError(f"two vectors have the name {vector.name!r}")
            names.add(vector.name)
        return vectors

    @field_validator("count")
    @classmethod
    def _counted(cls, count: int | None, info: ValidationInfo) -> int | None:
        vectors = info.data.get("vectors")
        if count is not None and vectors is not None and count != len(vectors):
            raise ValueError(f"{count} vectors are announced, there are {len(vectors)}")
        return count
