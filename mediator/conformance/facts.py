"""What a declaration of an intended difference may ask about a step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    MAX_PARAMS,
    NONCONTIG,
    OFFSET_NUM_PARAMS,
    OFFSET_RET,
    OFFSET_SESSION,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    ParamType,
)
from optee.abi.rpc import RpcCommand

TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
OFFSET_COMMAND_END: Final = 4
_VALUE_OUTPUTS: Final = (ParamType.VALUE_OUTPUT, ParamType.VALUE_INOUT)
_SIZE_OUTPUTS: Final = (ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT)


@dataclass(slots=True)
class Facts:
    """The guest's call, what OP-TEE answered, and what our core met on the way."""

    function: int = 0
    words: tuple[int, ...] = ()
    """x0..x7 as the guest gave them."""
    command: int | None = None
    num_params: int = 0
    attributes: tuple[int, ...] = ()
    pointers: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    cookies: tuple[int, ...] = ()
    message: int | None = None
    """IPA of the message of the call that goes on in this step."""
    differing: list[tuple[int, bytes]] = field(default_factory=list)
    """Guest bytes that are not as recorded: IPA of the first, and what was recorded."""
    left: bytes = b""
    """The message of a call that ended, as OP-TEE left it, with the guest's own `ret` where OP-TEE wrote none; or that
    was rejected, as it was copied."""
    sent: bytes = b""
    """The same as it was sent."""
    addresses: Sequence[tuple[int, int]] = ()
    """Where in it an address of the mediator's stood: (first, end)."""
    final_answer: int | None = None
    asked_free: bool = False
    reply_strays: bool = False
    """An RPC reply differs from the saved request in more than what normal world may write."""
    answers_shm_alloc: bool = False
    """The saved request is SHM_ALLOC, or the reply says that it was."""
    names_another_calls_buffer: bool = False
    """An UNREGISTER_SHM that succeeded, or a SHM_FREE, names a buffer that a live call made for itself."""
    null_names_buffer: bool = False
    """A call ended that has a temporary reference without a buffer, but with the cookie of a live one."""
    result_left: bool = False
    """OP-TEE ended a call well and did not write `ret`."""
    rewritten: bool = False
    """A call ended of whose message OP-TEE changed more than results and outputs."""
    rejected: bool = False
    """We rejected a message: OK in a0, and the result in the message."""
    refused_list: bool = False
    """We rejected a message that names a page list."""
    failing: bool = False
    """An allocation was about to fail when the step began."""
    still_failing: bool = False
    """It has not failed yet."""
    page_refused: bool = False
    """OP-TEE was told that no page for RPC arguments could be had."""
    flipping: bool = False
    """Memory of the domain was about to change when the step began."""
    unaligned: bool = False
    """A page address in a list is not aligned to 4 KiB."""
    null_page: bool = False
    """A guest offers the page at IPA 0."""
    other_cookie: bool = False
    """A guest resumes an RPC command with another cookie than the saved one."""
    unreadable_reply: bool = False
    changed_between: bool = False
    """An RPC reply changed between its first and its second look-up; we make one."""
    not_written_back: bool = False
    """The guest's message could not be written."""
    not_delivered: bool = False
    """An RPC could not be delivered to the guest."""
    isolated: bool = False
    """OP-TEE broke its contract, and the guest was isolated."""
    dying: bool = False
    """A relinquish step of the domain asked to come again; to us the guest is gone."""


def note_message(facts: Facts, data: bytes) -> None:
    """Take down what a message says."""
    header = HEADER.unpack_from(data)
    facts.command, facts.num_params = header[0], header[7]
    note_parameters(facts, data)


def note_parameters(facts: Facts, data: bytes) -> None:
    """Take down the parameters of a message or of a reply."""
    count = min(HEADER.unpack_from(data)[7], MAX_PARAMS)
    params = list(PARAM.iter_unpack(data[HEADER_SIZE:][: PARAM_SIZE * count]))
    facts.attributes = tuple(param[0] for param in params)
    facts.pointers = tuple(param[1] for param in params)
    facts.sizes = tuple(param[2] for param in params)
    facts.cookies = tuple(param[3] for param in params)


def lists_named(facts: Facts) -> int:
    """How many page lists the message names."""
    return sum(
        attribute & TYPE_MASK in TMEM and attribute & NONCONTIG != 0 and pointer != 0
        for attribute, pointer in zip(facts.attributes, facts.pointers, strict=True)
    )


def behind_a_list(facts: Facts) -> bool:
    """Whether a message has a reference to memory, of whatever kind, after one that names a page list."""
    references = [
        attribute & NONCONTIG != 0
        for attribute, pointer in zip(facts.attributes, facts.pointers, strict=True)
        if attribute & TYPE_MASK in TMEM and pointer
    ]
    return any(references[:-1])


def outputs(message: bytes) -> list[tuple[int, int]]:
    """Where OP-TEE writes in a message that it was given: (first, end) of session, results, outputs."""
    ranges = [(OFFSET_SESSION, OFFSET_SESSION + 4), (OFFSET_RET, OFFSET_RET + 8)]
    count = int.from_bytes(message[OFFSET_NUM_PARAMS:HEADER_SIZE], "little")
    for at in range(HEADER_SIZE, HEADER_SIZE + PARAM_SIZE * (count if count <= MAX_PARAMS else 0), PARAM_SIZE):
        kind = message[at]
        if kind in _VALUE_OUTPUTS:
            ranges.append((at + 8, at + 32))
        elif kind in _SIZE_OUTPUTS:
            ranges.append((at + 16, at + 24))
    return ranges


def decides(message: bytes) -> list[tuple[int, int]]:
    """What of a message decides what is done with it: command, number and types of parameters, cookies of buffers."""
    ranges = [(0, OFFSET_COMMAND_END), (OFFSET_NUM_PARAMS, HEADER_SIZE)]
    for at in range(HEADER_SIZE, len(message) - PARAM_SIZE + 1, PARAM_SIZE):
        ranges.append((at, at + 8))
        if message[at] in TMEM or message[0] == Command.UNREGISTER_SHM:
            ranges.append((at + 24, at + 32))
    return ranges


def within(at: int, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether an offset lies in one of the ranges."""
    return any(first <= at < end for first, end in ranges)


def strays(request: bytes, reply: bytes) -> bool:
    """Whether a reply changes more than ret, ret_origin, output values and sizes (for SHM_ALLOC: its parameter)."""
    asked, answered = HEADER.unpack_from(request), HEADER.unpack_from(reply)
    if asked[:5] != answered[:5] or asked[7] != answered[7] or asked[7] > MAX_PARAMS:
        return True
    if asked[0] == RpcCommand.SHM_ALLOC and answered[5] == 0:
        return bool(asked[7] != 1 or PARAM.unpack_from(reply, HEADER_SIZE)[0] != ParamType.TMEM_OUTPUT | NONCONTIG)
    for at in range(HEADER_SIZE, HEADER_SIZE + PARAM_SIZE * asked[7], PARAM_SIZE):
        before, after = PARAM.unpack_from(request, at), PARAM.unpack_from(reply, at)
        kind = before[0] & TYPE_MASK
        if kind in _VALUE_OUTPUTS:
            before, after = before[:1], after[:1]
        elif kind in _SIZE_OUTPUTS:
            before, after = (*before[:2], before[3]), (*after[:2], after[3])
        if before != after:
            return True
    return False
