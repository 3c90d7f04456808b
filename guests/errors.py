"""What can go wrong in a guest, as exceptions; what OP-TEE answered is in `guests.operation.TeeError`."""

from optee.abi.registers import name_of
from optee.abi.results import Origin, Result


class GuestError(Exception):
    """Base of everything that a guest raises by itself."""


class ProbeError(GuestError):
    """The driver found no OP-TEE that it can use; Linux' probe returns ENODEV or EINVAL there."""


class PowerOffError(GuestError):
    """The guest does not run any more."""


class OutOfGuestMemoryError(GuestError):
    """The guest's own RAM has no free page left."""


class KernelPanicError(GuestError):
    """An answer that makes a real Linux crash: a cookie that it follows as a pointer names nothing."""


class RegistrationError(GuestError):
    """REGISTER_SHM or UNREGISTER_SHM did not succeed; Linux makes EINVAL of every such answer.

    status: a0 of the call; result, origin: of the message (0 where status is not OK).
    """

    def __init__(self, status: int, result: int, origin: int) -> None:
        super().__init__(f"a0={status:#x} ret={name_of(Result, result)} origin={name_of(Origin, origin)}")
        self.status = status
        self.result = result
        self.origin = origin


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions of a group and of those in it."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
