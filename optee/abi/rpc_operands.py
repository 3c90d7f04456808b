"""What the parameters of each RPC command mean: kinds, directions and names of operands.

Directions are seen from OP-TEE: `in` goes to the normal world, `out` comes back from it. A name is empty
where the value is unused; `operation` is the word that selects the operation. Source: OP-TEE's RPC command
headers.
"""

from typing import Final, NamedTuple, TypeAlias

from optee.abi.registers import Named, member_of
from optee.abi.rpc import (
    OPERATIONS,
    FsOperation,
    NotificationOperation,
    PluginOperation,
    RpcCommand,
    SocketOperation,
)


class Values(NamedTuple):
    """A value parameter: the names of a, b and c."""

    direction: str
    a: str = ""
    b: str = ""
    c: str = ""


class Memory(NamedTuple):
    """A memory parameter, of registered or temporary memory alike."""

    direction: str
    content: str


Operand: TypeAlias = Values | Memory
Operands: TypeAlias = tuple[Operand, ...]

_FRAMES: Final = (Memory("in", "frames"), Memory("out", "frames"))
_PROFILE: Final = (Values("inout", "file id"), Memory("in", "uuid"), Memory("in", "data"))

COMMAND_OPERANDS: Final[dict[RpcCommand, Operands]] = {
    RpcCommand.LOAD_TA: (Values("in", "uuid", "uuid"), Memory("out", "TA image")),
    RpcCommand.RPMB: _FRAMES,
    RpcCommand.GET_TIME: (Values("out", "seconds", "nanoseconds"),),
    RpcCommand.SUSPEND: (Values("in", "milliseconds"),),
    RpcCommand.SHM_ALLOC: (Values("in", "type", "size", "align"),),
    RpcCommand.SHM_FREE: (Values("in", "type", "cookie"),),
    RpcCommand.GPROF: _PROFILE,
    RpcCommand.FTRACE: _PROFILE,
    RpcCommand.BENCH_REG: (Values("in", "operation", "pa", "size"),),
    RpcCommand.I2C_TRANSFER: (
        Values("in", "mode", "bus", "chip"),
        Values("in", "flags"),
        Memory("inout", "data"),
        Values("out", "bytes"),
    ),
    RpcCommand.RPMB_PROBE_RESET: (Values("out", "shm type"),),
    RpcCommand.RPMB_PROBE_NEXT: (
        Values("out", "device type", "EXT_CSD168 size mult", "EXT_CSD222 rel write sectors"),
        Memory("out", "CID"),
    ),
    RpcCommand.RPMB_FRAMES: _FRAMES,
}
"""The commands that have no operations. A successful SHM_ALLOC comes back with TMEM_OUTPUT in its place."""

FS_OPERANDS: Final[dict[FsOperation, Operands]] = {
    FsOperation.OPEN: (Values("in", "operation"), Memory("in", "name"), Values("out", "fd")),
    FsOperation.CREATE: (Values("in", "operation"), Memory("in", "name"), Values("out", "fd")),
    FsOperation.CLOSE: (Values("in", "operation", "fd"),),
    FsOperation.READ: (Values("in", "operation", "fd", "offset"), Memory("out", "data")),
    FsOperation.WRITE: (Values("in", "operation", "fd", "offset"), Memory("in", "data")),
    FsOperation.TRUNCATE: (Values("in", "operation", "fd", "length"),),
    FsOperation.REMOVE: (Values("in", "operation"), Memory("in", "name")),
    FsOperation.RENAME: (Values("in", "operation", "overwrite"), Memory("in", "old"), Memory("in", "new")),
    FsOperation.OPENDIR: (Values("in", "operation"), Memory("in", "name"), Values("out", "handle")),
    FsOperation.CLOSEDIR: (Values("in", "operation", "handle"),),
    FsOperation.READDIR: (Values("in", "operation", "handle"), Memory("out", "name")),
}

NOTIFICATION_OPERANDS: Final[dict[NotificationOperation, Operands]] = {
    NotificationOperation.WAIT: (Values("in", "operation", "value", "timeout ms"),),
    NotificationOperation.SEND: (Values("in", "operation", "value"),),
}

SOCKET_OPERANDS: Final[dict[SocketOperation, Operands]] = {
    SocketOperation.OPEN: (
        Values("in", "operation", "instance"),
        Values("in", "port", "protocol", "ip version"),
        Memory("in", "server"),
        Values("out", "handle"),
    ),
    SocketOperation.CLOSE: (Values("in", "operation", "instance", "handle"),),
    SocketOperation.CLOSE_ALL: (Values("in", "operation", "instance"),),
    SocketOperation.SEND: (
        Values("in", "operation", "instance", "handle"),
        Memory("in", "data"),
        Values("inout", "timeout", "sent"),
    ),
    SocketOperation.RECV: (
        Values("in", "operation", "instance", "handle"),
        Memory("out", "data"),
        Values("in", "timeout"),
    ),
    SocketOperation.IOCTL: (
        Values("in", "operation", "instance", "handle"),
        Memory("inout", "data"),
        Values("in", "command"),
    ),
}

PLUGIN_OPERANDS: Final[dict[PluginOperation, Operands]] = {
    PluginOperation.INVOKE: (
        Values("in", "operation", "uuid.d1", "uuid.d2"),
        Values("in", "uuid.d3", "uuid.d4", "cmd"),
        Values("inout", "sub_cmd", "out length"),
        Memory("inout", "data"),
    ),
}


def operation_of(command: int, first_value: int) -> Named | int | None:
    """Return the operation that an RPC's first value selects; None for a command without operations.

    An operation that is not known stays a number.
    """
    member = member_of(RpcCommand, command)
    kind = OPERATIONS.get(member) if isinstance(member, RpcCommand) else None
    return None if kind is None else member_of(kind, first_value)


def operands_of(command: int, operation: Named | int | None) -> Operands:
    """Return the operands of an RPC command (and its operation, see `operation_of`); none if not known."""
    match operation:
        case FsOperation():
            return FS_OPERANDS[operation]
        case NotificationOperation():
            return NOTIFICATION_OPERANDS[operation]
        case SocketOperation():
            return SOCKET_OPERANDS[operation]
        case PluginOperation():
            return PLUGIN_OPERANDS[operation]
        case _:
            member = member_of(RpcCommand, command)
            return COMMAND_OPERANDS.get(member, ()) if isinstance(member, RpcCommand) else ()
