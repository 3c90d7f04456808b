"""A VMM in a hundred lines: brings a VM to `mediator serve --external --socket PATH`, and makes its calls.

    python attach_client.py PATH

Nothing but Python's standard library is used; docs/attach.md explains every byte.
"""

import array
import fcntl
import mmap
import os
import socket
import struct
import sys

GET_FEATURES, SET_FEATURES, SET_MEM_TABLE, SET_VM, START, CALL, STOP, ERROR = 1, 2, 5, 64, 65, 66, 68, 69
VERSION, REPLY, KVM = 1, 4, 1
RAM_BASE, RAM_SIZE, MESSAGE = 0x4000_0000, 16 << 20, 0x4000_0000
CALLS_UID, EXCHANGE_CAPABILITIES, CALL_WITH_ARG = 0xBF00FF01, 0xB2000009, 0x32000004
OPEN_SESSION, INVOKE_COMMAND, CLOSE_SESSION = 0, 1, 2
VALUE_INPUT, VALUE_OUTPUT, TMEM_OUTPUT, META = 1, 2, 10, 0x100
DEVICES = bytes.fromhex("7011a688ddde4053a5a97b3c4ddf13b8")  # OP-TEE's TA that lists TAs


class Link:
    """One end of the socket: a request, its answer."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)

    def ask(self, request, payload=b"", fds=()):
        """Send a request; return the payload of its answer."""
        record = struct.pack("<3I", request, VERSION, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([record], rights)
        answer = self.socket.recv(512)
        if not answer:
            sys.exit("the mediator is gone")
        kind, flags, size = struct.unpack_from("<3I", answer)
        if kind == ERROR:
            sys.exit(f"refused: {answer[12:].decode('ascii')}")
        assert (kind, flags, size) == (request, VERSION | REPLY, len(answer) - 12)
        return answer[12:]

    def smc(self, *regs):
        """Execute an SMC on vCPU 0: x0.. in, x0..x7 out."""
        answer = self.ask(CALL, struct.pack("<2I8Q", 0, 0, *regs, *(0,) * (8 - len(regs))))
        return struct.unpack("<2I8Q", answer)[2:]


def guest_memory():
    """RAM that the mediator may map: a memfd that can neither shrink nor grow."""
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, RAM_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd, mmap.mmap(fd, RAM_SIZE)


def message(link, ram, command, function=0, session=0, params=()):
    """Write a message to guest memory, have OP-TEE do what it says, and read it back."""
    at = MESSAGE - RAM_BASE
    ram[at : at + 32] = struct.pack("<8I", command, function, session, 0, 0, 0, 0, len(params))
    for place, param in enumerate(params):
        struct.pack_into("<4Q", ram, at + 32 + 32 * place, *param)
    a0 = link.smc(CALL_WITH_ARG, MESSAGE >> 32, MESSAGE & 0xFFFFFFFF)[0]
    assert a0 == 0, hex(a0)  # a full driver would answer RPCs here: a0 >> 16 == 0xffff
    _, _, session, _, _, result, _, count = struct.unpack_from("<8I", ram, at)
    return result, session, [struct.unpack_from("<4Q", ram, at + 32 + 32 * n) for n in range(count)]


def main(path):
    """Bring a VM, make calls, open a session, and end."""
    link = Link(path)
    (features,) = struct.unpack("<Q", link.ask(GET_FEATURES))
    print(f"features offered: {features:#x}")
    link.ask(SET_FEATURES, struct.pack("<Q", 0))  # no interrupts, so every record is an answer
    link.ask(SET_VM, struct.pack("<2I32s", KVM, 1, b"by-hand"))
    fd, ram = guest_memory()
    link.ask(SET_MEM_TABLE, struct.pack("<2I4Q", 1, 0, RAM_BASE, RAM_SIZE, 0, 0), [fd])
    (client_id,) = struct.unpack("<Q", link.ask(START))
    print(f"client id: {client_id}")
    print("API UID:", "-".join(f"{word:08x}" for word in link.smc(CALLS_UID)[:4]))
    print(f"capabilities: {link.smc(EXCHANGE_CAPABILITIES)[1]:#x}")
    print(f"a call that is not for guests: {link.smc(0xB200000D, 7)[0]:#x}")
    identity = [(VALUE_INPUT | META, *struct.unpack("<2Q", DEVICES), 0), (VALUE_INPUT | META, 0, 0, 0)]
    result, session, _ = message(link, ram, OPEN_SESSION, params=identity)
    print(f"open session: {result:#x}")
    result, _, params = message(link, ram, INVOKE_COMMAND, 0, session, [(TMEM_OUTPUT, 0, 0, 0)])
    print(f"list of TAs: {result:#x}, {params[0][2]} bytes")
    print(f"close session: {message(link, ram, CLOSE_SESSION, session=session)[0]:#x}")
    link.ask(STOP)  # answered when nothing of this VM is left


if __name__ == "__main__":
    main(sys.argv[1])
