"""What OP-TEE asks of the normal world: commands of an RPC argument, their operations and types.

Source: OP-TEE's RPC command headers. An RPC argument has the layout of a message (`optee.abi.message`); which
parameters each command has stands in `optee.abi.operands`.
"""

from typing import Final

from optee.abi.registers import Named

RPC_PARAMS: Final = 4
"""The most parameters an RPC argument has; EXCHANGE_CAPABILITIES announces it in a3[7:0]."""

FS_NAME_MAX: Final = 350
"""Size in bytes of the buffer that names a file."""


class RpcCommand(Named):
    """`cmd` of an RPC argument."""

    LOAD_TA = 0
    RPMB = 1
    FS = 2
    GET_TIME = 3
    NOTIFICATION = 4
    SUSPEND = 5
    SHM_ALLOC = 6
    SHM_FREE = 7
    SQL_FS_RESERVED = 8
    GPROF = 9
    SOCKET = 10
    FTRACE = 11
    SUPP_PLUGIN = 12
    BENCH_REG = 20
    I2C_TRANSFER = 21
    RPMB_PROBE_RESET = 22
    RPMB_PROBE_NEXT = 23
    RPMB_FRAMES = 24


class FsOperation(Named):
    """First value of FS: an operation on the normal world's file system."""

    OPEN = 0
    CREATE = 1
    CLOSE = 2
    READ = 3
    WRITE = 4
    TRUNCATE = 5
    REMOVE = 6
    RENAME = 7
    OPENDIR = 8
    CLOSEDIR = 9
    READDIR = 10


class NotificationOperation(Named):
    """First value of NOTIFICATION (called WAIT_QUEUE, with SLEEP and WAKEUP, before 3.16.0)."""

    WAIT = 0
    SEND = 1


class SocketOperation(Named):
    """First value of SOCKET."""

    OPEN = 0
    CLOSE = 1
    CLOSE_ALL = 2
    SEND = 3
    RECV = 4
    IOCTL = 5


class PluginOperation(Named):
    """First value of SUPP_PLUGIN."""

    INVOKE = 0


class SocketTimeout(Named):
    """Timeouts of SEND and RECV that are no number of milliseconds."""

    NONBLOCKING = 0
    BLOCKING = 0xFFFFFFFF


class ShmType(Named):
    """For whom the buffer of SHM_ALLOC is: the supplicant, the kernel, or both."""

    APPL = 0
    KERNEL = 1
    GLOBAL = 2


OPERATIONS: Final[dict[RpcCommand, type[Named]]] = {
    RpcCommand.FS: FsOperation,
    RpcCommand.NOTIFICATION: NotificationOperation,
    RpcCommand.SOCKET: SocketOperation,
    RpcCommand.SUPP_PLUGIN: PluginOperation,
}
"""The commands whose first value says which operation is meant."""
