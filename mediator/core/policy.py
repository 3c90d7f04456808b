"""A policy: which calls a guest may make, what it is told, and how much it may hold. Data, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from optee.abi.message import Command
from optee.abi.smc import Function, SecCapability


class Word(Enum):
    """What a guest finds in one of a1..a3 (rule R3)."""

    PASS = "pass"
    """what OP-TEE answered"""
    KEEP = "keep"
    """what the guest had there"""
    ZERO = "zero"


Words = tuple[Word, Word, Word]


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """Limits per guest; None for `calls` and `rpc_arguments` means: from OP-TEE's number of threads.

    memory is in bytes, all else are counts; reserved_pages, at most `pages`, are the guest's own in the pool.
    """

    pages: int
    buffers: int
    pages_per_buffer: int
    rpc_arguments: int | None
    calls: int | None
    memory: int
    reserved_pages: int = 0


ANY_GUEST: Final = "any"
"""As `rpmb_owner`: every guest is asked for its RPMB device, as if each had one of its own."""


@dataclass(frozen=True, slots=True)
class FlowPolicy:
    """How calls wait that cannot go on at once; see `mediator.core.flow`.

    queue: calls of a guest that may wait, at least 1. rate: new calls a second of a guest, None without a bound;
    burst: how many of them may come at once. park: nanoseconds after which a waiting call gives its vCPU back.
    secure_cores: calls of all guests in the secure world at once, None without a bound; of two or more, one is kept
    from a guest that has all the others.
    """

    queue: int
    rate: float | None = None
    burst: int = 1
    park: int = 2_000_000
    secure_cores: int | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What the mediator does for a guest.

    functions: the allow-list (R2). commands: message commands that are forwarded, others are EBADCMD.
    rpc_commands: RPC commands that are delivered to the guest (None: all), others end as R18 says.
    nsec_capabilities: bits of the guest's own capability word that reach OP-TEE. sec_capabilities: bits that a
    guest may be offered (R4). register_attributes: attributes that REGISTER_SHM takes (R15).
    unregister_attributes: attributes that UNREGISTER_SHM takes (None: any). cookie_zero: an RMEM
    parameter with cookie 0 goes through (R13). compare_resume_cookie: R17's comparison.
    answers: for each function, what a1..a3 hold when OP-TEE has answered; `completed` for a
    yielding call that ended, `suspended` for an RPC, `failed` beside an error in a0, `local` beside an answer of
    the mediator's own. shared_pages: IPAs of pages that a guest may share although another VM
    maps the same frame (R26). guests: limits of guests by name, for those that have others than `limits`.
    pool_pages: 4 KiB pages that all guests together may share, None without a bound (R22). flow: flow control, None
    where a call over `limits.calls` is answered ETHREAD_LIMIT at once.
    rpmb_owner: name of the guest that the RPMB device belongs to (None: nobody's; ANY_GUEST: whoever's asks).
    """

    name: str
    purpose: str
    functions: frozenset[Function]
    commands: frozenset[Command]
    rpc_commands: frozenset[int] | None
    nsec_capabilities: int
    sec_capabilities: SecCapability
    register_attributes: frozenset[int]
    unregister_attributes: frozenset[int] | None
    cookie_zero: bool
    compare_resume_cookie: bool
    answers: Mapping[str, Words]
    limits: PolicyLimits
    shared_pages: frozenset[int] = frozenset()
    guests: Mapping[str, PolicyLimits] = field(default_factory=dict)
    pool_pages: int | None = None
    rpmb_owner: str | None = None
    flow: FlowPolicy | None = None

    def limits_of(self, name: str) -> PolicyLimits:
        """The limits of the guest with this name."""
        return self.guests.get(name, self.limits)
