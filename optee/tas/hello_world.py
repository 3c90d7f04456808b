"""hello_world of optee_examples: increments or decrements a number."""

from __future__ import annotations

from uuid import UUID

from optee.tee import Tee
from optee.trusted_application import ParamKind, Params, TrustedApplication, Value, command, expect


class HelloWorld(TrustedApplication):
    """INC_VALUE and DEC_VALUE."""

    uuid = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")
    image_size = 0x1BE00

    def open_session(self, tee: Tee, params: Params) -> None:
        """Take no parameters."""
        expect(params)

    @command(0, ParamKind.VALUE_INOUT)
    def inc_value(self, tee: Tee, value: Value) -> None:
        """Add one, modulo 2^32."""
        value.a = (value.a + 1) & 0xFFFFFFFF

    @command(1, ParamKind.VALUE_INOUT)
    def dec_value(self, tee: Tee, value: Value) -> None:
        """Take one away, modulo 2^32."""
        value.a = (value.a - 1) & 0xFFFFFFFF
