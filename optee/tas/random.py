"""random of optee_examples: random numbers on request."""

from __future__ import annotations

from uuid import UUID

from optee.tee import Tee
from optee.trusted_application import Memref, ParamKind, Params, TrustedApplication, command, expect


class Random(TrustedApplication):
    """RANDOM_GENERATE."""

    uuid = UUID("b6c53aba-9669-4668-a7f2-205629d00f86")

    def open_session(self, tee: Tee, params: Params) -> None:
        """Take no parameters."""
        expect(params)

    @command(0, ParamKind.MEMREF_OUTPUT)
    def generate(self, tee: Tee, numbers: Memref) -> None:
        """Fill the buffer."""
        numbers.put(tee.random(numbers.capacity))
