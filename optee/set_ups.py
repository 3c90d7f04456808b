"""Key objects and cryptographic operations of TAs, as far as they take memory of the core.

Source: memory sizing reference, section 4. TEE_AllocateOperation makes a copy of an asymmetric key of its own, and big
numbers are as large as the build allows: an RSA key of 1024 bits takes as much as one of 4096.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optee.memory.pool import Owner
from optee.memory.profile import set_ups

if TYPE_CHECKING:
    from optee.memory.pools import GuestPools
    from optee.ta_context import Instance


class SetUp:
    """A key object or an operation, or both: one of `optee.memory.profile.SET_UPS`."""

    __slots__ = ("_instance", "_memory", "_pools", "kind")

    def __init__(self, pools: GuestPools, instance: Instance, session: int, kind: str) -> None:
        """Raises TeeError(OUT_OF_MEMORY), and then has taken nothing."""
        sizes = set_ups(pools.build.bignum_bits)[kind]
        self.kind = kind
        self._memory = pools.heap.allocate_all(sizes, Owner(kind, pools.guest, session))
        self._pools = pools
        self._instance = instance
        instance.set_ups[self] = None

    def free(self) -> None:
        """Give it back (TEE_FreeOperation, TEE_FreeTransientObject); a second time does nothing."""
        self._pools.heap.free_all(self._memory)
        self._memory = ()
        self._instance.set_ups.pop(self, None)
