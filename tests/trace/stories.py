"""What hand-written traces are made of: calls and answers as the real driver and OP-TEE make them."""

from collections.abc import Sequence

from mediator.trace.replay import ReplayReport
from optee.abi.message import ENTRIES_PER_PAGE, Command
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import API_UID, Function, RpcReturn
from tests.trace.tapes import (
    BASE,
    RPC_SIZE,
    Tape,
    list_memory,
    memory,
    message,
    to_pair,
)

NOTHING_LEFT = {"pages": 0, "calls": 0, "buffers": 0, "rpc_arguments": 0}
GENERIC, BAD_PARAMETERS, OUT_OF_MEMORY = int(Result.GENERIC), int(Result.BAD_PARAMETERS), int(Result.OUT_OF_MEMORY)
RPC_ARG, ARG = int(Function.CALL_WITH_RPC_ARG), int(Function.CALL_WITH_ARG)
REGD_ARG, RESUME = int(Function.CALL_WITH_REGD_ARG), int(Function.RETURN_FROM_RPC)
ALLOC, FREE, INTERRUPT, CMD = (
    int(code) for code in (RpcReturn.ALLOC, RpcReturn.FREE, RpcReturn.FOREIGN_INTR, RpcReturn.CMD)
)
TMEM_OUT, TMEM_INOUT = 0x20A, 0x20B
KERNEL_POINTER = 0xFFFF_0000_0040_6C00
MESSAGE, LISTS, DATA = BASE + 0x1000, BASE + 0x10_0000, BASE + 0x20_0000


def good(report: ReplayReport) -> ReplayReport:
    assert (report.unexpected, report.first_unexpected) == (0, None)
    assert report.violations == []
    assert report.good
    return report


def bad(report: ReplayReport, what: str, line: int | None = None) -> None:
    assert report.unexpected > 0 and not report.good
    first = report.first_unexpected
    assert first is not None
    assert first["what"] == what, first
    if line is not None:
        assert first["line"] == line, first


def probe(tape: Tape, capabilities: int = 0xF5) -> None:
    """What Linux does first."""
    tape.add("mark", name="probe")
    tape.fast(Function.CALLS_UID, answer=API_UID)
    tape.fast(Function.GET_OS_REVISION, answer=(4, 10, 0xABCD1234, 0))
    tape.fast(Function.CALLS_REVISION, answer=(2, 0, 0, 0))
    rpc_arg = bool(capabilities & 0x40)
    tape.fast(Function.EXCHANGE_CAPABILITIES, answer=(0, capabilities, 0x42, 4 if rpc_arg else 0))
    if capabilities & 0x20:
        tape.fast(Function.ENABLE_ASYNC_NOTIF)
    tape.fast(Function.DISABLE_SHM_CACHE, answer=(7,))
    if not rpc_arg:
        tape.fast(Function.ENABLE_SHM_CACHE)


def done(data: bytes, *, session: int | None = None, ret: int = 0, origin: int = 4, **changes: bytes) -> bytes:
    """A message as OP-TEE completes it; `at40=b'..'` writes bytes at 40."""
    octets = bytearray(data)
    if session is not None:
        octets[8:12] = session.to_bytes(4, "little")
    octets[20:24], octets[24:28] = ret.to_bytes(4, "little"), origin.to_bytes(4, "little")
    for name, value in changes.items():
        at = int(name[2:])
        octets[at : at + len(value)] = value
    return bytes(octets)


def views(at: int, data: bytes, rpc: bytes = b"") -> list[dict[str, str]]:
    """Message and the RPC argument behind it."""
    behind = rpc + bytes(RPC_SIZE - len(rpc))
    return [memory(at, "message", data), memory(at + len(data), "rpc", behind)]


def simple(tape: Tape, function: int, at: int, data: bytes, after: bytes, *more: dict[str, str], vcpu: int = 0) -> None:
    """A call that is answered without RPC."""
    here = views if function == RPC_ARG else lambda at, data: [memory(at, "message", data)]
    call = tape.call(function, *to_pair(at), vcpu=vcpu, memory=[*here(at, data), *more])
    tape.back(call, 0, memory=here(at, after))


def register(
    tape: Tape, cookie: int, pages: Sequence[int], *, function: int = RPC_ARG, at: int = MESSAGE, offset: int = 0
) -> None:
    """REGISTER_SHM of these pages, listed from LISTS on."""
    count = max(1, -(-len(pages) // ENTRIES_PER_PAGE))
    lists = [LISTS + number * 4096 for number in range(count)]
    data = message(Command.REGISTER_SHM, (TMEM_OUT, lists[0] | offset, len(pages) * 4096 - offset, cookie))
    simple(tape, function, at, data, done(data), *list_memory(pages, lists))


def unregister(tape: Tape, cookie: int, *, function: int = RPC_ARG, at: int = MESSAGE) -> None:
    data = message(Command.UNREGISTER_SHM, (5, 0, 0, cookie))
    simple(tape, function, at, data, done(data))


def start(capabilities: int = 0xF5, ram: Sequence[tuple[int, int]] = ((BASE, 128 << 20),)) -> Tape:
    tape = Tape(ram)
    probe(tape, capabilities)
    return tape


def pages(count: int, first: int = DATA) -> list[int]:
    return [first + number * 4096 for number in range(count)]


def invoke(*params: tuple[int, int, int, int], session: int = 1) -> bytes:
    return message(Command.INVOKE_COMMAND, *params, func=3, session=session)


def story() -> Tape:
    """Something of everything: a registered page, messages in it, values, sizes, temporary memory, RPCs."""
    tape = start()
    register(tape, KERNEL_POINTER, [DATA])
    data = message(Command.OPEN_SESSION, (0x101, 1, 2, 0), (0x101, 3, 4, 0))
    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0x180, memory=views(DATA + 0x180, data))
    tape.back(call, 0, memory=views(DATA + 0x180, done(data, session=9)))
    lists = [LISTS, LISTS + 4096]
    listed = pages(600, DATA + 0x10000)
    data = invoke(
        (3, 1, 2, 3), (TMEM_INOUT, LISTS | 0x10, 600 * 4096 - 0x10, 0x55), (6, 0, 64, KERNEL_POINTER), session=9
    )
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=[*views(MESSAGE, data), *list_memory(listed, lists)])
    tape.back(call, INTERRUPT, 0, 0, 1, memory=views(MESSAGE, data))
    call = tape.call(RESUME, 0, 0, 1, memory=[memory(MESSAGE, "message", data)])
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    tape.back(call, CMD, 0, 0, 1, memory=views(MESSAGE, data, request))
    reply = message(RpcCommand.GET_TIME, (2, 77, 88, 0))
    call = tape.call(RESUME, 0, 0, 1, memory=views(MESSAGE, data, reply))
    after = done(data, at40=bytes(range(24)), at80=(1000).to_bytes(8, "little"), at112=(32).to_bytes(8, "little"))
    tape.back(call, 0, memory=views(MESSAGE, after, reply))
    unregister(tape, KERNEL_POINTER)
    return tape


def mediated(threads: int = 2, client: int = 5) -> Tape:
    """A recording with a mediator between, as far as the guest's creation."""
    tape = Tape([(BASE, 128 << 20)], client_id=client)
    own = [
        ((Function.CALLS_UID,), API_UID),
        ((Function.GET_THREAD_COUNT,), (0, threads)),
        ((Function.VM_DESTROYED,), (7,)),
        ((Function.VM_CREATED, client), (0, client)),
    ]
    for regs, answer in own:
        tape.forward(None, regs)
        tape.answer(None, answer)
    return tape


def forwarded(tape: Tape, call: int, regs: Sequence[int], answer: Sequence[int], before: bytes, after: bytes) -> None:
    tape.forward(call, regs, message=before)
    tape.answer(call, answer, message=after)


def argument_cycle(tape: Tape, cookie: int, at: int, message_at: int = MESSAGE) -> tuple[int, bytes]:
    """Under Xen: a call and the RPC ALLOC of its first RPC; returns the open resume and the message."""
    data = invoke((3, 1, 2, 3))
    call = tape.call(ARG, *to_pair(message_at), memory=[memory(message_at, "message", data)])
    forwarded(tape, call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (ALLOC, 0xA0, 0, 0), data, data)
    tape.back(call, ALLOC, 0xA0, 0, 0, memory=[memory(message_at, "message", data)])
    upper, lower = cookie >> 32, cookie & 0xFFFFFFFF
    call = tape.call(RESUME, *to_pair(at), 0, upper, lower, memory=[memory(message_at, "message", data)])
    tape.forward(call, (RESUME, 0x10, 0x2000, 0, upper, lower, 0, 5), message=data)
    return call, data
