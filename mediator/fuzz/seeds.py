"""Recorded traffic as the fuzzer begins from it: what a real driver and a real OP-TEE said, call by call.

The seeds of this package are what is new in recordings of Linux' driver and OP-TEE, whole calls each, in the format of
traces. They are made from such recordings by

    python -m mediator.fuzz.seeds TRACE... > mediator/fuzz/seeds.jsonl
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from mediator.documents import DocumentError
from mediator.trace.format import CallEvent, ReturnEvent, TraceEvent, read_trace
from optee.abi.message import HEADER, HEADER_SIZE, PARAM, PARAM_SIZE
from optee.abi.smc import Function, RpcReturn, is_rpc

_LOW: Final = 0xFFFFFFFF
_AT: Final = 0x4000_0000
_WORDS: Final = {"call": 7, "return": 3}
_HEADER: Final = {
    "format": "optee-smc-trace/1",
    "driver": "Linux",
    "secure_world": "OP-TEE",
    "machine": "what is new in recordings",
    "between": "nothing",
    "rpc_params": 4,
}
LONGEST: Final = 10
"""RPCs of a seed; what a recording has more of says nothing new."""


class Exchange(NamedTuple):
    """An SMC and what OP-TEE answers: `said` is the guest's message, or its reply to an RPC; `answer` is a0; `told`
    is OP-TEE's request of an RPC CMD, or the message as the call left it.
    """

    function: int
    said: bytes
    answer: int
    told: bytes


Conversation = list[Exchange]
"""One yielding call, from its SMC to its end; fast calls are conversations of one exchange."""


def conversations(events: Sequence[TraceEvent]) -> Iterator[Conversation]:
    """The calls of a recording, in the order in which they end, without the interrupts that came between."""
    called: dict[int, CallEvent] = {}
    suspended: dict[int, Conversation] = {}
    for event in events:
        if isinstance(event, CallEvent):
            called[event.id] = event
        elif isinstance(event, ReturnEvent):
            call = called.pop(event.id)
            function = call.regs[0] & _LOW
            talk: Conversation = []
            if function == Function.RETURN_FROM_RPC:
                talk = suspended.pop(call.regs[3] & _LOW, talk)
                if not talk:
                    continue  # the recording begins in the middle of it
            said = _memory(call, "rpc" if talk else "message")
            if talk and talk[-1].answer == RpcReturn.FOREIGN_INTR:
                function, said, _, _ = talk.pop()
            answer = event.regs[0] & _LOW
            talk.append(
                Exchange(function, said, answer, _memory(event, "rpc" if answer == RpcReturn.CMD else "message"))
            )
            if is_rpc(answer):
                suspended[event.regs[3] & _LOW] = talk
            else:
                yield talk


def _memory(event: CallEvent | ReturnEvent, kind: str) -> bytes:
    return next((_cut(memory.data) for memory in event.memory if memory.kind == kind), b"")


def _cut(data: bytes) -> bytes:
    """A message without what stands behind it."""
    return data[: HEADER_SIZE + PARAM_SIZE * HEADER.unpack_from(data)[7]]


def read_seeds(path: Path) -> list[Conversation]:
    """What a trace has. Raises DocumentError."""
    _, events = read_trace(path)
    found = list(conversations(events))
    if not found:
        raise DocumentError([f"{path}: no call ends in this trace"])
    return found


def shipped() -> list[Conversation]:
    """The seeds of this package."""
    with resources.as_file(resources.files("mediator.fuzz").joinpath("seeds.jsonl")) as path:
        return read_seeds(path)


def _shape(exchange: Exchange) -> tuple[object, ...]:
    """What kind of exchange it is."""
    words: list[object] = [exchange.function, exchange.answer]
    for data in (exchange.said, exchange.told):
        if data:
            command, *_, ret, _, _ = HEADER.unpack_from(data)
            attributes = [param[0] for param in PARAM.iter_unpack(data[HEADER_SIZE:])]
            words += [command, ret, *attributes]
    return tuple(words)


def distil(talks: Iterable[Conversation]) -> Iterator[Conversation]:
    """Calls that show something of which nothing was known before."""
    known: set[tuple[object, ...]] = set()
    for talk in talks:
        shapes = set(map(_shape, talk))
        if not shapes <= known:
            known |= shapes
            yield talk[:-1][:LONGEST] + talk[-1:]


def lines(talks: Iterable[Conversation]) -> Iterator[str]:
    """The same as a trace, in which one call comes after the other; addresses are none of the recording's."""
    number = 0
    yield json.dumps(_HEADER | {"ram": [{"ipa": hex(_AT), "size": "0x2000"}]})
    for talk in talks:
        for exchange in talk:
            for event, word, data, kind in (
                ("call", exchange.function, exchange.said, exchange.function == Function.RETURN_FROM_RPC),
                ("return", exchange.answer, exchange.told, exchange.answer == RpcReturn.CMD),
            ):
                line: dict[str, object] = {"e": event, "id": number, "regs": [hex(word)] + ["0x0"] * _WORDS[event]}
                if data:
                    where = {"at": hex(_AT + 4096 * kind), "is": "rpc" if kind else "message", "hex": data.hex()}
                    line["memory"] = [where]
                yield json.dumps(line, separators=(",", ":"))
            number += 1


if __name__ == "__main__":
    recorded = [talk for name in sys.argv[1:] for talk in read_seeds(Path(name))]
    print("\n".join(lines(distil(recorded))))
