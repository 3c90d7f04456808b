"""Hostile vectors: visible ones with anything changed, recorded anew by the model of the reference mediator."""

from random import Random
from typing import Any

from optee.abi.message import HEADER_SIZE, OFFSET_NUM_PARAMS, PARAM_SIZE
from tests.conformance.documents import Step, Vector

WORDS = (
    0, 1, 2, 3, 4, 7, 0x1000, 0x1001, 0x40000000, 0x40001000, 0x4003F000, 0x40040000, 0xC1, 0x500, 0x77, 1 << 32,
    0x32000003, 0x32000004, 0x32000012, 0x32000013, 0xB2000009, 0xB200000A, 0xB200000D, 0xBF00FF01,
    0xFFFF0000, 0xFFFF0002, 0xFFFF0004, 0xFFFF0005, 0xFFFF0009, 0xFFFFFFFF, (1 << 64) - 1,
)  # fmt: skip
SIZES = (0, 1, 4095, 4096, 4097, 128 * 4096, 129 * 4096 + 1, 1 << 32, (1 << 44) + 4096, 1 << 63, (1 << 64) - 1)
COUNTS = (0, 1, 2, 5, 126, 127, 128, 0x07FFFFFF, 0x08000000, 0xFFFFFFFF)
TYPES = ("ram_rw", "ram_ro", "mmio", "grant_rw", "grant_ro", "foreign_rw", "none")
KINDS = (
    "regs", "regs", "high", "bytes", "count", "attribute", "parameter", "parameter", "entry", "entry", "answer",
    "write", "write", "again", "swap", "p2m", "p2m", "flip", "flip", "fault", "end",
)  # fmt: skip


def word(choose: Random) -> int:
    return choose.choice(WORDS) if choose.random() < 0.8 else choose.getrandbits(64)


def change(vector: Vector, choose: Random, kind: str | None = None) -> str:
    """Change one thing of a vector in place; says what."""
    kind = kind or choose.choice(KINDS)
    steps: list[Step] = vector["steps"]
    calls = [step for step in steps if step["op"] == "smc"]
    step = choose.choice(calls)
    forwards = step["out"]["forwarded"]
    writes = [write for write in step.get("mem_writes") or [] if write["hex"]]
    messages = [write for write in writes if len(write["hex"]) >= 2 * (HEADER_SIZE + PARAM_SIZE)]
    if kind == "regs":
        step["regs"][choose.randrange(8)] = hex(word(choose))
    elif kind == "high":
        at = choose.randrange(8)
        step["regs"][at] = hex(int(step["regs"][at], 16) | choose.getrandbits(32) << 32)
    elif kind in ("bytes", "entry") and writes:
        write = choose.choice(writes)
        at = choose.randrange(0, len(write["hex"]) // 2, 8)
        _put(write, at, (word(choose) if kind == "bytes" else _address(choose)).to_bytes(8, "little"))
    elif kind == "count" and messages:
        _put(choose.choice(messages), OFFSET_NUM_PARAMS, choose.choice(COUNTS).to_bytes(4, "little"))
    elif kind in ("attribute", "parameter") and messages:
        write = choose.choice(messages)
        params = (len(write["hex"]) // 2 - HEADER_SIZE) // PARAM_SIZE
        at = HEADER_SIZE + PARAM_SIZE * choose.randrange(params)
        if kind == "attribute":
            _put(write, at, choose.choice((9, 0x209, 0x20A, 0x20B, choose.randrange(0x400))).to_bytes(8, "little"))
        else:
            field = choose.choice((8, 16, 24))
            value = {8: _address, 16: lambda chosen: chosen.choice(SIZES), 24: word}[field](choose)
            _put(write, at + field, value.to_bytes(8, "little"))
    elif kind == "answer" and forwards:
        answer = choose.choice(forwards)["answer"]
        answer["ret"][choose.randrange(4)] = hex(word(choose))
    elif kind == "write" and forwards:
        answer = choose.choice(forwards)["answer"]
        target = choose.choice(("arg:0", "arg:1", "arg:2", "rpc:c1", "rpc:500", "rpc:0"))
        at = choose.choice((0, 8, 20, 28, 32, 40, 48, 56, 64, 4088))
        answer.setdefault("writes", []).append([target, at, word(choose).to_bytes(8, "little").hex()])
    elif kind == "again":
        steps.insert(choose.randrange(2, len(steps) + 1), step)
    elif kind == "swap":
        places = [at for at, each in enumerate(steps) if each["op"] == "smc"]
        one, other = choose.choice(places), choose.choice(places)
        steps[one], steps[other] = steps[other], steps[one]
    elif kind in ("p2m", "flip", "fault", "end"):
        steps.insert(choose.randrange(2, len(steps) + 1), _machine(vector, step["domain"], choose, kind))
    else:
        return "nothing"
    return kind


def _put(write: dict[str, Any], at: int, data: bytes) -> None:
    whole = bytearray.fromhex(write["hex"])
    whole[at : at + len(data)] = data[: max(0, len(whole) - at)]
    write["hex"] = whole.hex()


def _address(choose: Random) -> int:
    page = 0x40000000 + choose.randrange(24) * 4096
    return choose.choice((page, page, page, page + choose.choice((1, 8, 4095)), 0, 8, 1 << 40, 0xFFFF_FFFF_FFFF_F000))


def _machine(vector: Vector, domain: int, choose: Random, kind: str) -> Step:
    place = {"domain": domain, "gfn": hex(0x40000 + choose.randrange(17))}
    if kind == "p2m":
        more = {"page_index": choose.randrange(16)} if choose.random() < 0.3 else {}
        return {"op": "p2m", **place, "type": choose.choice(TYPES), **more}
    if kind == "flip":
        offset = choose.choice((0, 20, 28, 32, 40, 48, 56, 4088))
        value = {"value": hex(word(choose)), "size": choose.choice((1, 4, 8))}
        return {"op": "flip", **place, "nth_lookup": choose.randrange(4), "offset": offset, **value}
    if kind == "fault":
        page, item = choose.choice(((choose.randrange(4), -1), (-1, choose.randrange(4))))
        return {"op": "alloc_fault", "heap_page_alloc_nth": page, "xzalloc_nth": item}
    return {"op": "relinquish", "domain": domain, "preempt_after": choose.randrange(-1, 5), "out": {"rc": 0}}
