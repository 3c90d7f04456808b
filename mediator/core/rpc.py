"""RPC: OP-TEE asks normal world for something in the middle of a call (rules R16-R20)."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from hv_models.memory import PAGE_SIZE, Ipa
from hv_models.stage2 import Stage2Fault
from mediator.core.faults import CallRefused, MessageRejected, SecureWorldFault
from mediator.core.flow import Flow, Stand
from mediator.core.ledger import OverLimit
from mediator.core.parameters import RMEM_INOUT, RMEM_INPUT, TMEM_INOUT, TMEM_INPUT, parameters
from mediator.core.ports import SharedPage
from mediator.core.records import Call, Guest, RpcArgument, Shared
from mediator.core.sharing import (
    MEDIATOR_PAGES,
    OFFSET_MASK,
    PIN_MEMORY,
    RECORD_MEMORY,
    mark_written,
    release_argument,
    release_shared,
    return_lists,
    translate,
)
from mediator.core.states import (
    BUFFER_TABLE,
    CALL_TABLE,
    ArgumentState,
    BufferEvent,
    BufferState,
    CallEvent,
    CallState,
    advance,
)
from mediator.core.steps import RPC_REPLY_REPLACED, RPC_UNDELIVERED, Event, Regs, Step
from mediator.core.yielding import note_rejection, refuse, wait
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    NONCONTIG,
    OFFSET_NUM_PARAMS,
    OFFSET_RET,
    OFFSET_RET_ORIGIN,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    ParamType,
)
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Cookie, Function, ReturnCode, RpcReturn, ThreadId

if TYPE_CHECKING:
    from mediator.core.mediator import Mediator

LOW: Final = 0xFFFFFFFF
OWN_THREADS: Final = 0x40000000
"""Thread ids from here on are the mediator's own: of calls that gave their vCPU back while they wait (R29).
OP-TEE's are indices below CFG_NUM_THREADS."""
MAX_UNDELIVERED: Final = 64
"""RPCs that may fail to reach the guest before something else happens (R18): stops a call from going round for
ever. If the guest's own memory is to blame, the guest gets its vCPU back in between; if the request is, the
secure world is held to be at fault."""
ARGUMENT_MEMORY: Final = RECORD_MEMORY + PIN_MEMORY + PAGE_SIZE

ALLOC: Final = int(RpcReturn.ALLOC)
FREE: Final = int(RpcReturn.FREE)
CMD: Final = int(RpcReturn.CMD)
FOREIGN_INTR: Final = int(RpcReturn.FOREIGN_INTR)
_RETURN_FROM_RPC: Final = int(Function.RETURN_FROM_RPC)
_SHM_ALLOC: Final = int(RpcCommand.SHM_ALLOC)
_BENCH_REG: Final = int(RpcCommand.BENCH_REG)
_SHM_FREE: Final = int(RpcCommand.SHM_FREE)
_SHM_ALLOC_REPLY: Final = int(ParamType.TMEM_OUTPUT) | NONCONTIG
_KEPT: Final = (BufferState.REGISTERED, BufferState.UNREGISTERING)
_GENERIC: Final = Result.GENERIC.to_bytes(4, "little")
_NOT_SUPPORTED: Final = Result.NOT_SUPPORTED.to_bytes(4, "little")
"""What a tee-supplicant answers to a command that it does not know: OP-TEE goes another way, where it has one."""
_NOT_AVAILABLE: Final = Result.STORAGE_NOT_AVAILABLE.to_bytes(4, "little")
"""What a TA may be told of its storage, so that it need not panic."""
_RPMB: Final = frozenset(
    map(int, (RpcCommand.RPMB, RpcCommand.RPMB_PROBE_RESET, RpcCommand.RPMB_PROBE_NEXT, RpcCommand.RPMB_FRAMES))
)
_NO_PARAMS: Final = b"\0\0\0\0"


def _cookie(regs: Regs) -> Cookie:
    """The cookie in a1:a2."""
    return Cookie((regs[1] & LOW) << 32 | regs[2] & LOW)


def suspended(core: "Mediator", call: Call, answer: Regs) -> Step:
    """OP-TEE suspended the call for an RPC: deliver it to the guest, or resume OP-TEE with an error."""
    guest = call.guest
    rpc = answer[0] & LOW
    thread = ThreadId(answer[3] & LOW)
    if thread >= OWN_THREADS or thread in guest.suspended:
        raise SecureWorldFault(f"thread {thread:#x} is already suspended")
    guest.counters.rpcs += 1
    call.thread = thread
    call.rpc = rpc
    call.rpc_words = (answer[1], answer[2])
    if rpc == CMD:
        try:
            refusal = _deliver(core, call, _cookie(answer))
        except Stage2Fault as fault:
            refusal = _Refusal(str(fault), contract=False)
        if refusal is not None:
            return _undelivered(core, call, refusal)
    elif rpc == FREE:
        argument = guest.arguments.get(_cookie(answer))
        if argument is not None:
            release_argument(core.world, guest, argument)
    advance(call, CallEvent.RPC, CALL_TABLE)
    guest.suspended[thread] = call
    return core.suspended(call.regs, answer)


def _request(call: Call) -> tuple[SharedPage, int, int] | None:
    """Where the saved request stands: our page, its offset there, the room behind it. None: nowhere any more."""
    if call.rpc_offset:
        assert call.shadow is not None
        return call.shadow, call.rpc_offset, call.rpc_room
    if call.argument is None or call.argument.state is ArgumentState.RELEASED:
        return None
    return call.argument.page, 0, PAGE_SIZE


class _Refusal(NamedTuple):
    """Why a request does not go to the guest, and what OP-TEE is told instead."""

    why: str
    result: bytes = _GENERIC
    contract: bool = True
    """The request is one that OP-TEE should not have made; not so if only the policy is against it."""


def _deliver(core: "Mediator", call: Call, cookie: Cookie) -> _Refusal | None:
    """Copy a request to the guest; or say why not. Raises Stage2Fault."""
    guest = call.guest
    if not call.rpc_offset:
        call.argument = guest.arguments.get(cookie)
    elif cookie:
        return _Refusal("a cookie, though the RPC argument stands behind the message")
    request = _request(call)
    if request is None:
        return _Refusal(f"no RPC argument has the cookie {cookie:#x}")
    page, base, room = request
    header = HEADER.unpack_from(page.view, base)
    size = HEADER_SIZE + PARAM_SIZE * header[7]
    if size > room:
        return _Refusal(f"{header[7]} parameters do not fit the RPC argument")
    if header[0] == _BENCH_REG:
        return _Refusal("an RPC command that carries a physical address")
    allowed = core.policy.rpc_commands
    if allowed is not None and header[0] not in allowed:
        return _Refusal(f"RPC command {header[0]:#x} is not for guests", _NOT_SUPPORTED, contract=False)
    if header[0] in _RPMB and not guest.rpmb:
        return _Refusal("the RPMB device is not this guest's", _NOT_AVAILABLE, contract=False)
    data = page.view[base : base + size].tobytes()
    for attribute, a, b, c in PARAM.iter_unpack(data[HEADER_SIZE:]):
        kind = attribute & TYPE_MASK
        if TMEM_INPUT <= kind <= TMEM_INOUT and a:
            return _Refusal("a physical address in an RPC request")
        if RMEM_INPUT <= kind <= RMEM_INOUT:
            mark_written(guest, Cookie(c))
        elif header[0] == _SHM_FREE:
            freed = guest.buffers.get(Cookie(b))
            if freed is not None and freed.state in _KEPT:
                release_shared(core, guest, freed)  # before the guest is told (R20)
        elif header[0] == _SHM_ALLOC:
            call.shm_type = a
    _write(call, data)
    return None


def _write(call: Call, data: bytes) -> None:
    whole = (slice(0, len(data)),)
    if call.rpc_offset:
        call.write(call.rpc_offset, data, whole)
    else:
        assert call.argument is not None
        call.guest.memory.write_fields(call.argument.ipa, data, whole)


def _read(call: Call, size: int) -> bytes:
    if call.rpc_offset:
        return call.read(call.rpc_offset, size)
    assert call.argument is not None
    return call.guest.memory.read(call.argument.ipa, size)


def _undelivered(core: "Mediator", call: Call, refusal: _Refusal) -> Step:
    """Resume OP-TEE with an error in the buffer (R18); the call stays where it was, with OP-TEE."""
    guest = call.guest
    thread = call.thread
    assert thread is not None
    call.undelivered += 1
    guest.events.append(
        Event(RPC_UNDELIVERED, "info", guest.vm, {"call": call.id, "thread": thread, "why": refusal.why})
    )
    request = _request(call)
    if request is not None:
        page, base, _ = request
        page.view[base + OFFSET_RET : base + OFFSET_RET_ORIGIN] = refusal.result
    if call.undelivered > MAX_UNDELIVERED:
        if refusal.contract:
            call.thread = None
            raise SecureWorldFault(f"{call.undelivered} RPCs of one call could not be delivered")
        call.rpc = FOREIGN_INTR
        call.rpc_words = (0, 0)
        advance(call, CallEvent.RPC, CALL_TABLE)
        guest.suspended[thread] = call
        return core.suspended(call.regs, (FOREIGN_INTR, 0, 0, thread))
    call.thread = None
    return core.forward(call, (_RETURN_FROM_RPC, 0, 0, thread, 0, 0, 0, guest.vm))


def resume(core: "Mediator", guest: Guest, regs: Regs) -> Step:
    """A guest's RETURN_FROM_RPC."""
    thread = ThreadId(regs[3] & LOW)
    call = guest.suspended.get(thread)
    if call is None:
        return refuse(core, guest, regs, CallRefused(ReturnCode.ERESUME, f"no call of thread {thread:#x} waits"))
    if (
        call.rpc == CMD
        and thread < OWN_THREADS
        and call.state is CallState.SUSPENDED
        and core.policy.compare_resume_cookie
        and _cookie(regs) != _cookie((CMD, *call.rpc_words))
    ):
        return refuse(
            core, guest, regs, CallRefused(ReturnCode.ERESUME, "another RPC argument than the saved one"), call
        )
    del guest.suspended[thread]
    call.thread = None
    call.regs = regs
    call.undelivered = 0
    if core.flow is not None:
        return _resume_in_turn(core, core.flow, call, thread)
    if thread >= OWN_THREADS:
        return core.work(call)
    if call.state is CallState.SUSPENDED and call.rpc == CMD:
        call.work = _resume_command(core, call, thread)
        return core.work(call)
    return _resume_plainly(core, call, thread, regs)


def _resume_plainly(core: "Mediator", call: Call, thread: ThreadId, regs: Regs) -> Step:
    """Go on after anything but a command: what the guest answered stands in `regs`."""
    if call.state is CallState.FREEING:
        _answer_failed(call)
        return _forward(core, call, thread)
    if call.rpc == ALLOC:
        return _resume_alloc(core, call, thread, regs)
    a1, a2 = call.rpc_words
    return _forward(core, call, thread, a1, a2)


def _resume_in_turn(core: "Mediator", flow: Flow, call: Call, thread: ThreadId) -> Step:
    """The same under flow control: a call that had given its vCPU back finds its old place again."""
    turn = call.turn
    assert turn is not None
    if thread < OWN_THREADS:
        call.work = _let_on(core, call, thread, call.regs)
    if flow.back(turn) if turn.stand is Stand.AWAY else flow.resume(turn):
        return core.work(call)
    return wait(core, call)


def _let_on(core: "Mediator", call: Call, thread: ThreadId, regs: Regs) -> Generator[None, None, Step]:
    """It is the turn of a call that OP-TEE has begun; `regs` is what the guest answered, some time ago."""
    if call.state is CallState.SUSPENDED and call.rpc == CMD:
        return (yield from _resume_command(core, call, thread))
    return _resume_plainly(core, call, thread, regs)


def _forward(
    core: "Mediator", call: Call, thread: ThreadId, a1: int = 0, a2: int = 0, a4: int = 0, a5: int = 0
) -> Step:
    advance(call, CallEvent.RESUME, CALL_TABLE)
    return core.forward(call, (_RETURN_FROM_RPC, a1, a2, thread, a4, a5, 0, call.guest.vm))


def _resume_alloc(core: "Mediator", call: Call, thread: ThreadId, regs: Regs) -> Step:
    """The guest gave a page for RPC requests: pin it, and hand OP-TEE one of ours instead."""
    guest = call.guest
    ipa = Ipa((regs[1] & LOW) << 32 | regs[2] & LOW)
    cookie = Cookie((regs[4] & LOW) << 32 | regs[5] & LOW)
    pa = 0
    try:
        pa = _allocate_argument(core, guest, ipa, cookie)
    except CallRefused as refused:
        refuse(core, guest, regs, refused, call)
    return _forward(core, call, thread, pa >> 32, pa & LOW, regs[4] & LOW, regs[5] & LOW)


def _allocate_argument(core: "Mediator", guest: Guest, ipa: Ipa, cookie: Cookie) -> int:
    if ipa & OFFSET_MASK:
        raise CallRefused(ReturnCode.EBADADDR, "the RPC argument is not page aligned")
    if cookie in guest.arguments:
        raise CallRefused(ReturnCode.EBADADDR, "an RPC argument with this cookie is live")
    try:
        charge = guest.ledger.charge(0, 0, 1, 0, ARGUMENT_MEMORY)
    except OverLimit as over:
        raise CallRefused(ReturnCode.ENOMEM, over) from None
    try:
        pinned = guest.memory.pin(np.array([ipa], np.uint64))
    except Stage2Fault as fault:
        charge.refund()
        raise CallRefused(ReturnCode.EBADADDR, str(fault)) from None
    page = core.world.lend()
    if page is None:
        guest.memory.unpin(pinned)
        charge.refund()
        raise CallRefused(ReturnCode.ENOMEM, OverLimit(MEDIATOR_PAGES, rule="R22"))
    guest.arguments[cookie] = RpcArgument(cookie, ipa, pinned, page, charge)
    return page.pa


def _resume_command(core: "Mediator", call: Call, thread: ThreadId) -> Generator[None, None, Step]:
    """The guest answered a request: take over what the saved request lets it answer (R16)."""
    request = _request(call)
    if request is None:
        return _forward(core, call, thread)
    page, base, _ = request
    header = HEADER.unpack_from(page.view, base)
    num_params = header[7]
    size = HEADER_SIZE + PARAM_SIZE * num_params
    try:
        reply = _read(call, size)
    except Stage2Fault as fault:
        _replace(call, str(fault))
        return _forward(core, call, thread)
    _, _, _, _, _, ret, _, replied = HEADER.unpack_from(reply)
    if replied != num_params and not (header[0] == _SHM_ALLOC and ret):
        _replace(call, f"{replied} parameters instead of {num_params}")
        return _forward(core, call, thread)
    view = page.view
    view[base + OFFSET_RET : base + OFFSET_RET + 8] = reply[OFFSET_RET : OFFSET_RET + 8]
    if header[0] == _SHM_ALLOC:
        if ret == 0:
            step = yield from _take_allocated(core, call, thread, page, base, reply)
            if step is not None:
                return step
        return _forward(core, call, thread)
    argument = view[base : base + size]
    for field in parameters(argument[HEADER_SIZE::PARAM_SIZE].tobytes()).outputs:
        argument[field] = reply[field]
    return _forward(core, call, thread)


def _take_allocated(
    core: "Mediator", call: Call, thread: ThreadId, page: SharedPage, base: int, reply: bytes
) -> Generator[None, None, Step | None]:
    """A reply to SHM_ALLOC with a buffer: translate it, or have the guest free it again (R19)."""
    guest = call.guest
    if len(reply) != HEADER_SIZE + PARAM_SIZE:
        _replace(call, "SHM_ALLOC has one parameter")
        return None
    param = PARAM.unpack_from(reply, HEADER_SIZE)
    if param[0] != _SHM_ALLOC_REPLY:
        _replace(call, f"SHM_ALLOC answered with attribute {param[0]:#x}")
        return None
    if call.allocated is not None:
        return_lists(core, call.allocated)
        call.allocated = None
    page.view[base + HEADER_SIZE : base + HEADER_SIZE + PARAM_SIZE] = reply[HEADER_SIZE:]
    offered = Shared()
    try:
        yield from translate(core, call, reply, (HEADER_SIZE,), page, base, offered)
    except MessageRejected as rejected:
        note_rejection(guest, call, rejected)
        release_shared(core, guest, offered)
        return _ask_free(core, call, thread, page, base, reply, param[3])
    if offered.pages:
        advance(offered, BufferEvent.KEEP, BUFFER_TABLE)
        call.allocated = offered
    return None


def _ask_free(
    core: "Mediator", call: Call, thread: ThreadId, page: SharedPage, base: int, reply: bytes, cookie: int
) -> Step | None:
    """Turn the RPC argument into a SHM_FREE request of the mediator's own."""
    header = list(HEADER.unpack_from(reply))
    header[0] = _SHM_FREE
    header[5] = Result.GENERIC
    header[7] = 1
    last = PARAM.unpack_from(reply, HEADER_SIZE)[3]
    request = HEADER.pack(*header) + PARAM.pack(ParamType.VALUE_INPUT, call.shm_type, cookie, last)
    page.view[base : base + len(request)] = request
    try:
        _write(call, request)
    except Stage2Fault:
        _answer_failed(call)
        return None
    advance(call, CallEvent.ASK_FREE, CALL_TABLE)
    call.thread = thread
    call.guest.suspended[thread] = call
    a1, a2 = call.rpc_words
    return core.suspended(call.regs, (CMD, a1, a2, thread))


def _answer_failed(call: Call) -> None:
    """Tell OP-TEE that the request failed: ret = GENERIC, no parameters."""
    request = _request(call)
    if request is not None:
        page, base, _ = request
        view = page.view
        view[base + OFFSET_RET : base + OFFSET_RET_ORIGIN] = _GENERIC
        view[base + OFFSET_NUM_PARAMS : base + HEADER_SIZE] = _NO_PARAMS


def _replace(call: Call, why: str) -> None:
    """A reply that does not fit its request is replaced by an error (R16)."""
    guest = call.guest
    guest.counters.rejected += 1
    guest.events.append(Event(RPC_REPLY_REPLACED, "info", guest.vm, {"call": call.id, "why": why}))
    _answer_failed(call)
