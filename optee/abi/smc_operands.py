"""What the registers of each SMC hold beside a0, on the way in and on the way out.

Source: OP-TEE's SMC interface header. a7 is the client id of every call; a1..a3 of an answer say nothing unless
a0 is OK or an RPC.
"""

from enum import IntFlag
from typing import Final, NamedTuple, TypeAlias

from optee.abi.registers import Register
from optee.abi.smc import (
    Function,
    NotificationStatus,
    NsecCapability,
    RpcReturn,
    SecCapability,
)


class RegisterOperand(NamedTuple):
    """The word in a<first>, or the 64-bit value of a pair (upper, lower) that starts there."""

    name: str
    first: int
    pair: bool = False
    kind: type[IntFlag] | type[Register] | None = None

    @property
    def last(self) -> int:
        """The number of the last register it takes."""
        return self.first + self.pair


RegisterOperands: TypeAlias = tuple[RegisterOperand, ...]

CLIENT_ID: Final = RegisterOperand("client id", 7)
THREAD: Final = RegisterOperand("thread", 3)
COOKIE: Final = RegisterOperand("cookie", 1, pair=True)

_MESSAGE: Final = (RegisterOperand("message", 1, pair=True), RegisterOperand("cached", 3))

ARGUMENTS: Final[dict[Function, RegisterOperands]] = {
    Function.LOAD_IMAGE: (
        RegisterOperand("size", 1, pair=True),
        RegisterOperand("address", 3, pair=True),
    ),
    Function.RETURN_FROM_RPC: (
        RegisterOperand("address (after ALLOC)", 1, pair=True),
        THREAD,
        RegisterOperand("cookie (after ALLOC)", 4, pair=True),
    ),
    Function.CALL_WITH_ARG: _MESSAGE,
    Function.CALL_WITH_RPC_ARG: _MESSAGE,
    Function.CALL_WITH_REGD_ARG: (COOKIE, RegisterOperand("offset", 3)),
    Function.L2CC_MUTEX: (RegisterOperand("operation", 1), RegisterOperand("address", 2, pair=True)),
    Function.EXCHANGE_CAPABILITIES: (RegisterOperand("capabilities", 1, kind=NsecCapability),),
    Function.BOOT_SECONDARY: (RegisterOperand("core", 1), RegisterOperand("entry", 2, pair=True)),
    Function.VM_CREATED: (RegisterOperand("VM's client id", 1),),
    Function.VM_DESTROYED: (RegisterOperand("VM's client id", 1),),
}
"""a1..a6 of a call; a function that is not here takes none."""

ANSWERS: Final[dict[Function, RegisterOperands]] = {
    Function.GET_SHM_CONFIG: (
        RegisterOperand("address", 1),
        RegisterOperand("size", 2),
        RegisterOperand("cached", 3),
    ),
    Function.EXCHANGE_CAPABILITIES: (
        RegisterOperand("capabilities", 1, kind=SecCapability),
        RegisterOperand("highest notification value", 2),
        RegisterOperand("RPC parameters", 3),
    ),
    Function.DISABLE_SHM_CACHE: (COOKIE,),
    Function.GET_THREAD_COUNT: (RegisterOperand("threads", 1),),
    Function.GET_ASYNC_NOTIF_VALUE: (
        RegisterOperand("notification value", 1),
        RegisterOperand("status", 2, kind=NotificationStatus),
    ),
    Function.GET_PROTMEM_CONFIG: (
        RegisterOperand("address", 1),
        RegisterOperand("size", 2),
        RegisterOperand("address width", 3),
    ),
}
"""a1..a3 beside OK in a0."""

DATA_ANSWERS: Final[dict[Function, RegisterOperands]] = {
    Function.CALLS_COUNT: (RegisterOperand("calls", 0),),
    Function.CALLS_UID: tuple(RegisterOperand("UUID", word) for word in range(4)),
    Function.CALLS_REVISION: (RegisterOperand("major", 0), RegisterOperand("minor", 1)),
    Function.GET_OS_UUID: tuple(RegisterOperand("UUID", word) for word in range(4)),
    Function.GET_OS_REVISION: (
        RegisterOperand("major", 0),
        RegisterOperand("minor", 1),
        RegisterOperand("build id", 2),
    ),
}
"""a0..a3 of the functions whose answer has data in a0 and no code."""

RPC_RETURNS: Final[dict[RpcReturn, RegisterOperands]] = {
    RpcReturn.ALLOC: (RegisterOperand("size", 1), THREAD),
    RpcReturn.FREE: (COOKIE, THREAD),
    RpcReturn.FOREIGN_INTR: (THREAD,),
    RpcReturn.CMD: (COOKIE, THREAD),
}
"""a1..a3 of a call that suspends."""
