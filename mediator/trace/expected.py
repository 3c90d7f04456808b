"""What should be seen where, worked out from the recording and the policy alone."""

from collections import Counter
from typing import Final

from hv_models.memory import PAGE_SIZE
from mediator.core.policy import Policy, Word
from mediator.core.steps import Regs
from mediator.trace.format import AnswerEvent, ForwardEvent, ReturnEvent, TraceEvent
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    NONCONTIG,
    OFFSET_NUM_PARAMS,
    OFFSET_RET,
    OFFSET_RET_ORIGIN,
    OFFSET_SESSION,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    ParamType,
)
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, SecCapability, is_rpc

LOW: Final = 0xFFFFFFFF
MESSAGE_CALLS: Final = frozenset({Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG})
YIELDING: Final = MESSAGE_CALLS | {Function.RETURN_FROM_RPC}
TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)

_IDENTITIES: Final = frozenset(
    {Function.CALLS_UID, Function.CALLS_REVISION, Function.GET_OS_UUID, Function.GET_OS_REVISION, Function.CALLS_COUNT}
)
_VALUE_OUTPUTS: Final = frozenset({int(ParamType.VALUE_OUTPUT), int(ParamType.VALUE_INOUT)})
_SIZE_OUTPUTS: Final = frozenset(
    int(kind) for kind in (ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)
)
_MEMREFS: Final = range(int(ParamType.RMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_GENERIC: Final = Result.GENERIC.to_bytes(4, "little")
_GIVEN: Final = ParamType.TMEM_OUTPUT | NONCONTIG


def message_size(data: bytes) -> int:
    """Bytes of a recorded message or RPC argument that count: no more than there are."""
    if len(data) < HEADER_SIZE:
        return 0
    num_params: int = HEADER.unpack_from(data)[7]
    return min(HEADER_SIZE + PARAM_SIZE * num_params, len(data), PAGE_SIZE)


def output_fields(message: bytes) -> list[tuple[int, int]]:
    """Where OP-TEE writes in a message: session, ret, ret_origin, output values and sizes, as (start, stop)."""
    if not message:
        return []
    return [(OFFSET_SESSION, OFFSET_SESSION + 4), (OFFSET_RET, OFFSET_RET + 8), *_outputs(message)]


def _outputs(message: bytes) -> list[tuple[int, int]]:
    fields = []
    for at in range(HEADER_SIZE, len(message) - PARAM_SIZE + 1, PARAM_SIZE):
        kind = PARAM.unpack_from(message, at)[0] & TYPE_MASK
        if kind in _VALUE_OUTPUTS:
            fields.append((at + 8, at + 32))
        elif kind in _SIZE_OUTPUTS:
            fields.append((at + 16, at + 24))
    return fields


def taken_reply(request: bytes, reply: bytes) -> bytes:
    """What OP-TEE should find of a guest's reply to a request (R16)."""
    asked, answered = HEADER.unpack_from(request), HEADER.unpack_from(reply)
    allocates = asked[0] == RpcCommand.SHM_ALLOC
    given = allocates and answered[5] == 0
    fits = asked[7] == answered[7] or (allocates and not given)
    if given and fits:
        fits = asked[7] == 1 and len(reply) > HEADER_SIZE and PARAM.unpack_from(reply, HEADER_SIZE)[0] == _GIVEN
    taken = bytearray(request)
    if not fits:
        taken[OFFSET_RET:OFFSET_RET_ORIGIN] = _GENERIC
        taken[OFFSET_NUM_PARAMS:HEADER_SIZE] = bytes(4)
        return bytes(taken)
    taken[OFFSET_RET : OFFSET_RET + 8] = reply[OFFSET_RET : OFFSET_RET + 8]
    if given:
        taken[HEADER_SIZE:] = reply[HEADER_SIZE : len(request)]
    elif not allocates:
        for start, stop in _outputs(request):
            taken[start:stop] = reply[start:stop]
    return bytes(taken)


def strays(request: bytes, reply: bytes) -> bool:
    """Whether a recorded reply changes more of its request than a real driver does.

    A driver may give a memory reference its own idea of the attribute: a NULL one comes back as TMEM.
    """
    taken = taken_reply(request, reply)
    plain = bytearray(reply[: len(request)])
    for at in range(HEADER_SIZE, len(request) - PARAM_SIZE + 1, PARAM_SIZE):
        if taken[at] & TYPE_MASK in _MEMREFS and plain[at] & TYPE_MASK in _MEMREFS:
            plain[at : at + 8] = taken[at : at + 8]
    return plain != taken


def own_answers(events: list[TraceEvent]) -> dict[int, list[tuple[ForwardEvent, AnswerEvent]]]:
    """The recorded mediator's own calls and their answers, by function."""
    found: dict[int, list[tuple[ForwardEvent, AnswerEvent]]] = {}
    waiting: ForwardEvent | None = None
    for event in events:
        if isinstance(event, ForwardEvent) and event.id is None:
            waiting = event
        elif isinstance(event, AnswerEvent) and event.id is None and waiting is not None:
            found.setdefault(waiting.regs[0] & LOW, []).append((waiting, event))
            waiting = None
    return found


def answered_there(event: ReturnEvent) -> bool:
    """Whether a mediator in between can have answered a call by itself: what it returned says so."""
    a0 = event.regs[0] & LOW
    if a0 != ReturnCode.OK:
        # An error, or an RPC that may be its own request to free a buffer; OP-TEE's other RPCs come from OP-TEE.
        return not is_rpc(a0) or a0 == RpcReturn.CMD
    messages = [entry.data for entry in event.memory if entry.kind == "message" and len(entry.data) >= HEADER_SIZE]
    return any(HEADER.unpack_from(data)[6] == Origin.COMMS for data in messages)


def registers(
    policy: Policy, asked: Regs, recorded: Regs, seen: Regs, expected: Counter[str]
) -> tuple[Regs, Regs] | None:
    """Compare what a guest saw with the recording; None if it may, counting what the policy intends.

    Otherwise both sides, cut to the words that are compared.
    """
    function = asked[0] & LOW
    if seen[0] & LOW == recorded[0] & LOW == ReturnCode.UNKNOWN_FUNCTION:
        # Nobody's function: the mediator sets all 64 bits (R2).
        expected["denied"] += 1
        return None
    if function == Function.CALLS_COUNT and seen[0] == len(policy.functions):
        if seen[0] != recorded[0]:
            expected["calls_count"] += 1
        return None
    if function == Function.EXCHANGE_CAPABILITIES and recorded[0] & LOW == 0:
        recorded = _capabilities(policy, recorded, expected)
    a0 = recorded[0] & LOW
    # Beside an error in x0 OP-TEE returns leftovers.
    words = 1 if function not in _IDENTITIES and a0 != 0 and not is_rpc(a0) else 4
    if seen[:words] == recorded[:words]:
        return None
    if seen[0] == recorded[0] and _by_convention(policy, function, asked, recorded, seen):
        expected["register_convention"] += 1
        return None
    return recorded[:words], seen[:words]


def _capabilities(policy: Policy, recorded: Regs, expected: Counter[str]) -> Regs:
    """The recorded answer as far as the policy offers it (R4)."""
    offered = recorded[1] & policy.sec_capabilities & ~SecCapability.HAVE_RESERVED_SHM
    if offered != recorded[1]:
        expected["capabilities_masked"] += 1
    a2 = recorded[2] if offered & SecCapability.ASYNC_NOTIF else 0
    a3 = recorded[3] if offered & SecCapability.RPC_ARG else 0
    if (a2, a3) != recorded[2:]:
        expected["capability_word_zeroed"] += 1
    return recorded[0], int(offered), a2, a3


def _by_convention(policy: Policy, function: int, asked: Regs, recorded: Regs, seen: Regs) -> bool:
    """Whether the words that differ are those that the policy keeps or zeroes (R3)."""
    name = Function(function).name
    if function in YIELDING:
        name = "suspended" if is_rpc(seen[0]) else "completed"
    conventions = policy.answers[name]
    return all(
        seen[at] == recorded[at]
        or (conventions[at - 1] is Word.KEEP and seen[at] == asked[at])
        or (conventions[at - 1] is Word.ZERO and seen[at] == 0)
        for at in (1, 2, 3)
    )


def first_difference(expected: bytes, got: bytes) -> tuple[str, str]:
    """Both sides from the first byte on that differs."""
    shorter = min(len(expected), len(got))
    at = next((i for i in range(shorter) if expected[i] != got[i]), shorter)
    return f"at byte {at}: {expected[at : at + 16].hex()}", f"at byte {at}: {got[at : at + 16].hex()}"
