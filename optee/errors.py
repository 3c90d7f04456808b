"""Errors of the OP-TEE model, and the one that says that OP-TEE itself has died."""

from __future__ import annotations

from optee.abi.results import Origin, Result


class SecureWorldFault(Exception):
    """OP-TEE died: the real one would have crashed the secure world of the whole machine.

    No guest must be able to get there through a mediator. Every later call raises it again.
    """


class TeeError(Exception):
    """A call ends with `result`: raised by a TA to return an error, and by TEE services that fail.

    `origin` is None where the place that catches it knows the origin.
    """

    def __init__(self, result: int, origin: Origin | None = None) -> None:
        super().__init__(result, origin)
        self.result = result
        self.origin = origin

    def __str__(self) -> str:
        try:
            return Result(self.result).name
        except ValueError:
            return f"{self.result:#010x}"


class TaPanic(Exception):
    """A TA called TEE_Panic with `code`: its instance dies, the client sees TARGET_DEAD."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"TA panicked with code {self.code:#x}"


class TaAbort(TaPanic):
    """A TA touched memory that is not its own: a data abort at the virtual address `address`."""

    CODE = 0xDEADBEEF
    """What OP-TEE logs as the panic code of an abort."""

    def __init__(self, address: int) -> None:
        super().__init__(self.CODE)
        self.address = address

    def __str__(self) -> str:
        return f"User mode data-abort at address {self.address:#x} (translation fault)"
