"""TAs of xtest 1013, as far as that case uses them: a small one and one with a lot of constant data."""

from __future__ import annotations

import hashlib
from uuid import UUID

from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, Steps, TrustedApplication, command


class Concurrent(TrustedApplication):
    """TA of xtest 1013: BUSY_LOOP, and SHA256 of a buffer."""

    uuid = UUID("e13010e0-2ae1-11e5-896a-0002a5d5c51b")

    @command(0)
    def busy_loop(self, tee: Tee) -> Steps[None]:
        """Compute for a while."""
        yield from tee.work(20)

    @command(1, ParamKind.MEMREF_INPUT, ParamKind.MEMREF_OUTPUT)
    def sha256(self, tee: Tee, data: Memref, digest: Memref) -> Steps[None]:
        """Digest the input: the longer, the longer it takes."""
        content = data.read()
        yield from tee.work(1 + len(content) // 4096)
        digest.put(hashlib.sha256(content).digest())


class ConcurrentLarge(Concurrent):
    """The same with a lot of constant data: more than one buffer of Xen's may hold."""

    uuid = UUID("5ce0c432-0ab0-40e5-a056-782ca0e6aba2")
    image_size = 2 << 20
