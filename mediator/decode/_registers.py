"""Registers in words."""

from collections.abc import Iterable, Sequence
from enum import IntFlag
from typing import Final
from uuid import UUID

from mediator.decode._rows import Decoded, Row, row
from optee.abi.registers import Register, member_of, name_of, names_of
from optee.abi.smc import (
    API_UID,
    OS_UUID,
    Function,
    FunctionId,
    Owner,
    ReturnCode,
    RpcReturn,
    from_pair,
    is_rpc,
)
from optee.abi.smc_operands import (
    ANSWERS,
    ARGUMENTS,
    CLIENT_ID,
    DATA_ANSWERS,
    RPC_RETURNS,
    THREAD,
    RegisterOperand,
)

MAX_REGISTERS: Final = 8
WORD_MASK: Final = 0xFFFFFFFF
MINUS_ONE: Final = 0xFFFFFFFFFFFFFFFF

_IDENTITIES: Final[dict[tuple[int, ...], Function]] = {
    API_UID: Function.CALLS_UID,
    OS_UUID: Function.GET_OS_UUID,
}

_MEANINGS: Final[dict[ReturnCode, str]] = {
    ReturnCode.OK: "processed",
    ReturnCode.ETHREAD_LIMIT: "no free thread, try again later",
    ReturnCode.EBUSY: "a thread is in use",
    ReturnCode.ERESUME: "no such thread is suspended",
    ReturnCode.EBADADDR: "no message can be read there",
    ReturnCode.EBADCMD: "unknown command",
    ReturnCode.ENOMEM: "out of memory",
    ReturnCode.ENOTAVAIL: "not available",
    ReturnCode.UNKNOWN_FUNCTION: "no such function",
}


def decode_registers(registers: Sequence[int], answer_to: Function | None = None) -> Decoded:
    """Say what up to eight registers (x0 first, 64-bit values) are: a call, an answer or an RPC.

    What an answer's words mean depends on the call. Without `answer_to` each reading of them is given in which
    no unknown bit is set. Raises ValueError for no, too many or too large registers.
    """
    if not 1 <= len(registers) <= MAX_REGISTERS:
        raise ValueError(f"registers: {len(registers)} given, a call has 1 to {MAX_REGISTERS}")
    for index, value in enumerate(registers):
        if not 0 <= value <= MINUS_ONE:
            raise ValueError(f"registers: x{index} is {value:#x}, a register holds 64 bits")
    words = tuple(value & WORD_MASK for value in registers)
    code = member_of(ReturnCode, words[0])
    answer_to = answer_to or _IDENTITIES.get(words[:4])
    if answer_to in DATA_ANSWERS and code is not ReturnCode.UNKNOWN_FUNCTION:
        decoded = _data_answer(words, answer_to)
    elif is_rpc(words[0]):
        decoded = _rpc_return(words)
    elif isinstance(code, ReturnCode) or answer_to is not None:
        decoded = _answer(words, answer_to)
    else:
        decoded = _call(words)
    notes = [
        f"x{index} is {value:#x}: only its low 32 bits belong to the ABI"
        for index, value in enumerate(registers)
        if value > WORD_MASK and (index or value != MINUS_ONE)
    ]
    return {"kind": "registers", **decoded, "notes": notes}


def _rows(words: Sequence[int], operands: Iterable[RegisterOperand]) -> list[Row]:
    """Name the words that are there; other words that are not zero come last."""
    rows = []
    unused = dict(enumerate(words))
    for operand in operands:
        if operand.last >= len(words):
            continue
        at, value = f"a{operand.first}", words[operand.first]
        if operand.pair:
            at, value = f"{at}:a{operand.last}", from_pair(value, words[operand.last])
        rows.append(row(at, operand.name, value, _operand_words(operand, value)))
        for index in range(operand.first, operand.last + 1):
            unused.pop(index, None)
    return rows + [row(f"a{index}", "unused", value) for index, value in unused.items() if value]


def _operand_words(operand: RegisterOperand, value: int) -> str:
    if operand.kind is None:
        return ""
    if issubclass(operand.kind, IntFlag):
        return ", ".join(names_of(operand.kind, value)) or "none"
    return str(operand.kind(value))


def _call(words: Sequence[int]) -> Decoded:
    identity = FunctionId(words[0])
    function = member_of(Function, words[0])
    known = isinstance(function, Function)
    speed = "fast" if identity.fast else "yielding"
    owner = name_of(Owner, identity.owner)
    arguments = ARGUMENTS.get(function, ()) if isinstance(function, Function) else ()
    return {
        "is": "call",
        "name": name_of(Function, words[0]),
        "words": f"{'' if known else 'unknown function, '}{speed}, {64 if identity.smc64 else 32} bit, {owner}",
        "function": {
            "id": hex(words[0]),
            "known": known,
            "fast": bool(identity.fast),
            "smc64": bool(identity.smc64),
            "owner": owner,
            "number": hex(identity.number),
            "unknown_bits": hex(identity.unknown),
        },
        "rows": _rows(words, (RegisterOperand("function id", 0), *arguments, CLIENT_ID)),
    }


def _data_answer(words: Sequence[int], function: Function) -> Decoded:
    name = "data"
    if function in _IDENTITIES.values() and len(words) >= 4:
        name = str(UUID(bytes=b"".join(word.to_bytes(4, "big") for word in words[:4])))
    rows = _rows(words, DATA_ANSWERS[function])
    return {"is": "answer", "name": name, "words": f"answers {function}", "rows": rows, "readings": []}


def _rpc_return(words: Sequence[int]) -> Decoded:
    rpc = member_of(RpcReturn, words[0])
    operands = RPC_RETURNS[rpc] if isinstance(rpc, RpcReturn) else (THREAD,)
    rows = _rows(words, (RegisterOperand("RPC", 0), *operands))
    for entry in rows:
        if rpc is RpcReturn.CMD and entry["name"] == "cookie" and entry["value"] == "0x0":
            entry["words"] = "the RPC argument behind the message"
    meaning = "the call waits for RETURN_FROM_RPC" if isinstance(rpc, RpcReturn) else "unknown RPC"
    return {"is": "RPC", "name": name_of(RpcReturn, words[0]), "words": meaning, "rows": rows}


def _answer(words: Sequence[int], answer_to: Function | None) -> Decoded:
    code = member_of(ReturnCode, words[0])
    meaning = _MEANINGS[code] if isinstance(code, ReturnCode) else "unknown code"
    if answer_to is not None:
        meaning += f", answers {answer_to}"
    operands: tuple[RegisterOperand, ...] = (RegisterOperand("code", 0),)
    readings = []
    if code is ReturnCode.OK and answer_to is not None:
        operands += ANSWERS.get(answer_to, ())
    elif code is ReturnCode.OK and any(words[1:4]):
        readings = [
            {"answers": str(function), "rows": _rows(words[:4], places)}
            for function, places in ANSWERS.items()
            if not any(_unknown_bits(place, words) for place in places)
        ]
        words = (*words[:1], 0, 0, 0, *words[4:])
    return {
        "is": "answer",
        "name": name_of(ReturnCode, words[0]),
        "words": meaning,
        "rows": _rows(words, operands),
        "readings": readings,
    }


def _unknown_bits(operand: RegisterOperand, words: Sequence[int]) -> int:
    if operand.kind is None or operand.last >= len(words):
        return 0
    value = words[operand.first]
    if issubclass(operand.kind, Register):
        return operand.kind(value).unknown
    return value & ~sum(operand.kind)
