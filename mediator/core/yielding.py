"""Yielding calls: from the guest's SMC to the forward, and from OP-TEE's answer back (rules R5-R15)."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from hv_models.memory import PAGE_SIZE, Ipa
from hv_models.stage2 import Stage2Fault
from mediator.core.faults import CallRefused, MessageRejected
from mediator.core.flow import Flow, Place
from mediator.core.ledger import OverLimit
from mediator.core.parameters import RMEM_INPUT, parameters
from mediator.core.policy import Policy
from mediator.core.records import BufferPlace, Call, Guest, Shared
from mediator.core.sharing import (
    MEDIATOR_PAGES,
    OFFSET_MASK,
    RECORD_MEMORY,
    mark_written,
    release_shared,
    return_lists,
    translate,
)
from mediator.core.states import (
    BUFFER_TABLE,
    CALL_TABLE,
    BufferEvent,
    BufferState,
    CallEvent,
    advance,
)
from mediator.core.steps import CALL_QUEUED, CALL_REFUSED, CALL_REJECTED, Event, Queue, Regs, Reply, Step
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    OFFSET_RET,
    OFFSET_RET_ORIGIN,
    OFFSET_SESSION,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    page_count,
)
from optee.abi.results import Origin, Result
from optee.abi.smc import SHM_CACHED, Cookie, Function, ReturnCode

if TYPE_CHECKING:
    from mediator.core.mediator import Mediator

CALL_MEMORY: Final = RECORD_MEMORY + PAGE_SIZE
"""Bytes of mediator memory that a call holds: its record and its shadow page."""
LOW: Final = 0xFFFFFFFF

_CALL_WITH_ARG: Final = int(Function.CALL_WITH_ARG)
_CALL_WITH_RPC_ARG: Final = int(Function.CALL_WITH_RPC_ARG)
# Looking a member up in its enumeration takes as long as three other steps of this path.
_REGD_ARG: Final = Function.CALL_WITH_REGD_ARG
_PLAIN_ARG: Final = Function.CALL_WITH_ARG
_REGISTER: Final = Command.REGISTER_SHM
_UNREGISTER: Final = Command.UNREGISTER_SHM
_FORWARD: Final = CallEvent.FORWARD
_COMPLETE: Final = CallEvent.COMPLETE
_PRESET: Final = Result.GENERIC.to_bytes(4, "little")
_COMMS: Final = Origin.COMMS.to_bytes(4, "little")
_SUCCESS: Final = Result.SUCCESS.to_bytes(4, "little")
_ANSWER: Final = (slice(OFFSET_SESSION, OFFSET_SESSION + 4), slice(OFFSET_RET, OFFSET_RET_ORIGIN + 4))
"""What the guest gets back of each message: the session, `ret` and `ret_origin`."""
_WHY: Final = (slice(0, OFFSET_RET_ORIGIN + 4 - OFFSET_RET),)
"""What it gets of a rejection: `ret` and `ret_origin`."""


def enter(core: "Mediator", guest: Guest, regs: Regs, function: Function) -> Step:
    """A guest's CALL_WITH_ARG, CALL_WITH_RPC_ARG or CALL_WITH_REGD_ARG."""
    if core.flow is not None:
        return _enter_in_turn(core, core.flow, guest, regs, function)
    try:
        charge = guest.ledger.charge(0, 0, 0, 1, CALL_MEMORY)
    except OverLimit as over:
        code = ReturnCode.ETHREAD_LIMIT if over.resource == "calls" else ReturnCode.ENOMEM
        return refuse(core, guest, regs, CallRefused(code, over))
    call = Call(guest, regs, function, charge)
    try:
        message = _take_message(core, call)
        if not call.temporary:
            return _send(core, call)
    except CallRefused as refused:
        end(core, call, CallEvent.REJECT)
        return refuse(core, guest, regs, refused, call)
    except MessageRejected as rejected:
        return _reject(core, call, rejected)
    call.work = _translate(core, call, message)
    return core.work(call)


def _enter_in_turn(core: "Mediator", flow: Flow, guest: Guest, regs: Regs, function: Function) -> Step:
    """The same under flow control: the message is taken, then the call waits until it is let in."""
    try:
        charge = guest.ledger.charge(0, 0, 0, 0, CALL_MEMORY)
    except OverLimit as over:
        return refuse(core, guest, regs, CallRefused(ReturnCode.ENOMEM, over))
    call = Call(guest, regs, function, charge)
    try:
        message = _take_message(core, call)
    except CallRefused as refused:
        end(core, call, CallEvent.REJECT)
        return refuse(core, guest, regs, refused, call)
    except MessageRejected as rejected:
        return _reject(core, call, rejected)
    urgent = call.command is Command.CANCEL
    turn = call.turn = Place(guest.lane, call, charge, _pages(message, call.temporary, guest), urgent=urgent)
    call.work = _let_in(core, call, message)
    try:
        now = flow.enter(turn)
    except OverLimit as over:
        end(core, call, CallEvent.REJECT)
        return refuse(core, guest, regs, CallRefused(ReturnCode.ETHREAD_LIMIT, over), call)
    if call.command is Command.INVOKE_COMMAND:
        guest.lane.traffic.invoked(HEADER.unpack_from(message)[2], flow.now)
    return core.work(call) if now else wait(core, call)


def _let_in(core: "Mediator", call: Call, message: bytes) -> Generator[None, None, Step]:
    """It is the call's turn."""
    if call.temporary:
        return (yield from _translate(core, call, message))
    return _send(core, call)


def _pages(message: bytes, temporary: tuple[int, ...], guest: Guest) -> int:
    """Pages that a message wants to share, as far as they are allowed: what its turn costs."""
    most = guest.ledger.limits.pages_per_buffer
    pages = 0
    for at in temporary:
        _, pointer, size, _ = PARAM.unpack_from(message, at)
        pages += min(page_count(size, pointer & OFFSET_MASK), most)
    return pages


def wait(core: "Mediator", call: Call) -> Queue:
    """Let a call wait for its turn."""
    if core.tracing:
        guest = call.guest
        detail = {"call": call.id, "waiting": guest.lane.waiting}
        guest.events.append(Event(CALL_QUEUED, "debug", guest.vm, detail))
    return Queue("flow control lets the call go on", call)


def _translate(core: "Mediator", call: Call, message: bytes) -> Generator[None, None, Step]:
    assert call.shadow is not None
    shared = call.shared = Shared()
    try:
        yield from translate(core, call, message, call.temporary, call.shadow, 0, shared)
    except MessageRejected as rejected:
        return _reject(core, call, rejected)
    if call.command is _REGISTER:
        call.registering, call.shared = shared, None
        advance(shared, BufferEvent.REGISTER, BUFFER_TABLE)
    return _send(core, call)


def _send(core: "Mediator", call: Call) -> Step:
    shadow = call.shadow
    assert shadow is not None
    advance(call, _FORWARD, CALL_TABLE)
    pa = shadow.pa
    function = _CALL_WITH_RPC_ARG if call.rpc_offset else _CALL_WITH_ARG
    return core.forward(call, (function, pa >> 32, pa & LOW, SHM_CACHED, 0, 0, 0, call.guest.vm))


def _reject(core: "Mediator", call: Call, rejected: MessageRejected) -> Step:
    """Undo what the call made and say why in the guest's message (R10, R12)."""
    guest = call.guest
    regs = call.regs
    end(core, call, CallEvent.REJECT)
    note_rejection(guest, call, rejected)
    try:
        call.write(OFFSET_RET, rejected.result.to_bytes(4, "little") + _COMMS, _WHY)
    except Stage2Fault as fault:
        return refuse(core, guest, regs, CallRefused(ReturnCode.EBADADDR, str(fault)), call)
    return core.local(regs, ReturnCode.OK)


def _take_message(core: "Mediator", call: Call) -> bytes:
    """Copy the message, look at it, and lay out the shadow. Bytes are read once (R5)."""
    guest = call.guest
    regs = call.regs
    if call.function is _REGD_ARG:
        data = _read_registered(call)
    else:
        ipa = Ipa((regs[1] & LOW) << 32 | regs[2] & LOW)
        if ipa & OFFSET_MASK:
            raise CallRefused(ReturnCode.EBADADDR, "the message is not page aligned")
        data = None
    shadow = core.world.lend()
    if shadow is None:
        raise CallRefused(ReturnCode.ENOMEM, OverLimit(MEDIATOR_PAGES, rule="R22"))
    call.shadow = shadow
    if data is None:
        try:
            data = guest.memory.read(ipa, PAGE_SIZE)
        except Stage2Fault as fault:
            raise CallRefused(ReturnCode.EBADADDR, str(fault)) from None
        call.ipa = ipa
    header = HEADER.unpack_from(data)
    num_params = header[7]
    size = HEADER_SIZE + PARAM_SIZE * num_params
    if call.function is not _PLAIN_ARG:
        call.rpc_offset = size
        call.rpc_room = core.rpc_argument_size
        if size + core.rpc_argument_size > PAGE_SIZE:
            raise CallRefused(ReturnCode.EBADADDR, "message and RPC argument do not fit one page")
        if size + core.rpc_argument_size > len(data):
            raise CallRefused(ReturnCode.EBADADDR, "message and RPC argument do not lie in their buffer")
    elif num_params > MAX_PARAMS:
        raise MessageRejected(Result.BAD_PARAMETERS, f"{num_params} parameters")
    command = core.commands.get(header[0])
    if command is None:
        raise CallRefused(ReturnCode.EBADCMD, f"command {header[0]:#x} is not forwarded")
    call.command = command
    view = shadow.view
    view[:size] = data[:size]
    view[OFFSET_RET:OFFSET_RET_ORIGIN] = _PRESET
    call.size = size
    if command is _REGISTER:
        _check_register(core.policy, data, num_params)
    elif command is _UNREGISTER:
        _begin_unregister(call, core.policy, data, num_params)
    call.outputs, call.temporary, registered = parameters(data[HEADER_SIZE:size:PARAM_SIZE])
    if registered:
        _note_registered(call, data, registered, core.policy.cookie_zero)
    return data


def _note_registered(call: Call, message: bytes, registered: tuple[int, ...], cookie_zero: bool) -> None:
    """Look at the registered memory references of a message: which of them OP-TEE may write."""
    for at in registered:
        attribute, _, _, cookie = PARAM.unpack_from(message, at)
        if cookie == 0 and not cookie_zero:
            raise MessageRejected(Result.BAD_PARAMETERS, "a registered memory reference with cookie 0")
        if attribute & TYPE_MASK != RMEM_INPUT:
            call.written.append(Cookie(cookie))


def _read_registered(call: Call) -> bytes:
    """The message of CALL_WITH_REGD_ARG: as much as one page of the registered, pinned buffer it lies in."""
    guest = call.guest
    regs = call.regs
    cookie = Cookie((regs[1] & LOW) << 32 | regs[2] & LOW)
    buffer = guest.buffers.get(cookie)
    if buffer is None or buffer.state is not BufferState.REGISTERED:
        raise CallRefused(ReturnCode.EBADADDR, "no registered buffer has this cookie")
    start = buffer.offset + (regs[3] & LOW)
    room = buffer.pages[cookie] * PAGE_SIZE - start
    if start & 7 or room < HEADER_SIZE:
        raise CallRefused(ReturnCode.EBADADDR, "the message does not lie in its buffer, 8-byte aligned")
    place = BufferPlace(buffer, start)
    call.place = place
    try:
        return place.read(guest.memory, 0, min(PAGE_SIZE, room))
    except Stage2Fault as fault:
        raise CallRefused(ReturnCode.EBADADDR, str(fault)) from None


def _check_register(policy: Policy, message: bytes, num_params: int) -> None:
    if num_params != 1:
        raise MessageRejected(Result.BAD_PARAMETERS, f"REGISTER_SHM with {num_params} parameters")
    attribute, pointer, _, cookie = PARAM.unpack_from(message, HEADER_SIZE)
    if attribute not in policy.register_attributes:
        raise MessageRejected(Result.BAD_PARAMETERS, f"REGISTER_SHM with attribute {attribute:#x}")
    if pointer == 0 or cookie == 0:
        raise MessageRejected(Result.BAD_PARAMETERS, "REGISTER_SHM without a buffer or a cookie")


def _begin_unregister(call: Call, policy: Policy, message: bytes, num_params: int) -> None:
    if num_params != 1:
        raise MessageRejected(Result.BAD_PARAMETERS, f"UNREGISTER_SHM with {num_params} parameters")
    attribute, _, _, cookie = PARAM.unpack_from(message, HEADER_SIZE)
    if policy.unregister_attributes is not None and attribute not in policy.unregister_attributes:
        raise MessageRejected(Result.BAD_PARAMETERS, f"UNREGISTER_SHM with attribute {attribute:#x}")
    call.cookie = Cookie(cookie)
    buffer = call.guest.buffers.get(call.cookie)
    if buffer is not None and buffer.state is BufferState.REGISTERED:
        advance(buffer, BufferEvent.UNREGISTER, BUFFER_TABLE)
        call.unregistering = buffer


def completed(core: "Mediator", call: Call, answer: Regs) -> Step:
    """OP-TEE ended the call: write back, release what the call made, answer the guest."""
    guest = call.guest
    regs = call.regs
    code = answer[0] & LOW
    if code != 0:
        # OP-TEE refused the call and left the message alone: so nothing is written back (R11).
        end(core, call, _COMPLETE)
        return core.failed(regs, answer)
    shadow = call.shadow
    assert shadow is not None
    data = shadow.view[: call.size].tobytes()
    for cookie in call.written:
        mark_written(guest, cookie)
    if data[OFFSET_RET:OFFSET_RET_ORIGIN] == _SUCCESS:
        if call.registering is not None:
            _registered(core, call)
        elif call.command is _UNREGISTER:
            _unregistered(core, call)
        elif call.turn is not None:
            _count_session(call, data)
    end(core, call, _COMPLETE)
    try:
        call.write(0, data, _ANSWER + call.outputs)
    except Stage2Fault as fault:
        return refuse(core, guest, regs, CallRefused(ReturnCode.EBADADDR, str(fault)), call)
    return core.completed(regs, answer)


def _count_session(call: Call, data: bytes) -> None:
    """Under flow control: tell a guest's sessions and TAs apart. The TA's UUID is the first parameter of an open."""
    traffic = call.guest.lane.traffic
    session = int.from_bytes(data[OFFSET_SESSION : OFFSET_SESSION + 4], "little")
    if call.command is Command.OPEN_SESSION:
        traffic.opened(session, data[HEADER_SIZE + 8 : HEADER_SIZE + 24])
    elif call.command is Command.CLOSE_SESSION:
        traffic.closed(session)


def _registered(core: "Mediator", call: Call) -> None:
    """OP-TEE registered the buffer; it may have been unregistered again while this call was suspended."""
    buffer = call.registering
    call.registering = None
    assert buffer is not None
    if buffer.state is BufferState.REGISTERING:
        advance(buffer, BufferEvent.KEEP, BUFFER_TABLE)
        return_lists(core, buffer)


def _unregistered(core: "Mediator", call: Call) -> None:
    """OP-TEE unregistered the cookie, of which there is one live buffer at most: it needs its pages no more.

    A temporary buffer cannot be meant: OP-TEE does not find those (R13).
    """
    call.unregistering = None
    buffer = call.guest.buffers.get(call.cookie)
    if buffer is not None and buffer.state is not BufferState.PINNED:
        release_shared(core, call.guest, buffer)


def end(core: "Mediator", call: Call, event: CallEvent) -> None:
    """End a call and free exactly what it made (R12, R13)."""
    advance(call, event, CALL_TABLE)
    guest = call.guest
    if call.shared is not None:
        release_shared(core, guest, call.shared)
    if call.registering is not None:
        if call.registering.state is BufferState.REGISTERING:
            release_shared(core, guest, call.registering)
    elif call.unregistering is not None and call.unregistering.state is BufferState.UNREGISTERING:
        advance(call.unregistering, BufferEvent.UNREGISTER_REFUSED, BUFFER_TABLE)
    if call.shadow is not None:
        core.world.take_back(call.shadow)
        call.shadow = None
    if call.thread is not None:
        del guest.suspended[call.thread]
        call.thread = None
    call.work = None
    call.charge.refund()
    del guest.calls[call.id]


def refuse(core: "Mediator", guest: Guest, regs: Regs, refused: CallRefused, call: Call | None = None) -> Reply:
    """Answer an error in a0 and count it."""
    detail = {
        "call": None if call is None else call.id,
        "function": regs[0] & LOW,
        "answer": int(refused.code),
        "origin": None,
    }
    _count(guest, refused.why, refused.over, detail)
    return core.local(regs, refused.code)


def note_rejection(guest: Guest, call: Call, rejected: MessageRejected) -> None:
    """Count a rejected message."""
    detail = {
        "call": call.id,
        "function": int(call.function),
        "command": None if call.command is None else call.command.name,
        "answer": int(rejected.result),
        "origin": int(Origin.COMMS),
    }
    _count(guest, rejected.why, rejected.over, detail)


def _count(guest: Guest, why: str, over: OverLimit | None, detail: dict[str, Any]) -> None:
    """Something was refused: over a limit, or malformed."""
    detail["why"] = why
    if over is None:
        guest.counters.rejected += 1
        guest.events.append(Event(CALL_REJECTED, "info", guest.vm, detail))
        return
    counters = guest.counters
    counters.refused += 1
    counters.refusals[over.resource] = counters.refusals.get(over.resource, 0) + 1
    detail.update(over.words())
    counters.last_refusal = detail
    guest.events.append(Event(CALL_REFUSED, "info", guest.vm, detail))
