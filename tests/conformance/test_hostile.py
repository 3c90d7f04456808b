"""Visible vectors with anything changed: the comparison ends, and no invariant is violated."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from optee.abi.message import HEADER_SIZE, OFFSET_NUM_PARAMS, PARAM_SIZE
from tests.conformance.documents import Vector, compared, visible
from tests.shared import needs_shared

pytestmark = needs_shared

VECTORS = (
    "caps_matrix",
    "copy_back_only_outputs",
    "register_unregister",
    "max_pages_per_buffer",
    "rpc_alloc",
    "rpc_cmd_get_time",
    "rpc_shm_alloc_twice",
    "rpc_shm_alloc_untranslatable",
    "multi_rpc_full_session",
    "two_guests_same_cookies",
    "unknown_thread_resume",
    "random_12",
    "random_93",
)
WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 0x1000, 0x40000000, 0x4003F000, 0x40040000, 0xC1, 0x500, 0x77, 1 << 32]),
    st.sampled_from([0x32000003, 0x32000004, 0x32000012, 0x32000013, 0xB2000009, 0xB200000A, 0xB200000D]),
    st.sampled_from([0xFFFF0000, 0xFFFF0002, 0xFFFF0004, 0xFFFF0005, 0xFFFF0009, 0xFFFFFFFF, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
COUNTS = st.sampled_from([0, 1, 2, 5, 126, 127, 128, 0x07FFFFFF, 0x08000000, 0xFFFFFFFF])


def _steps(vector: Vector, op: str) -> list[dict[str, Any]]:
    return [step for step in vector["steps"] if step["op"] == op]


def _mutate(draw: st.DataObject, vector: Vector) -> None:
    calls = _steps(vector, "smc")
    step = draw.draw(st.sampled_from(calls))
    forwards = step["out"]["forwarded"]
    kind = draw.draw(
        st.sampled_from(
            ["regs", "bytes", "count", "attribute", "answer", "write", "again", "p2m", "flip", "fault", "end"]
        )
    )
    writes = step.get("mem_writes") or []
    if kind == "regs":
        step["regs"][draw.draw(st.integers(0, 7))] = hex(draw.draw(WORDS))
    elif kind in ("bytes", "count", "attribute") and writes:
        one = draw.draw(st.sampled_from(writes))
        data = bytearray.fromhex(one["hex"])
        if kind == "bytes":
            at = draw.draw(st.integers(0, max(0, len(data) - 8)))
            data[at : at + 8] = draw.draw(WORDS).to_bytes(8, "little")
        elif kind == "count" and len(data) >= HEADER_SIZE:
            data[OFFSET_NUM_PARAMS : OFFSET_NUM_PARAMS + 4] = draw.draw(COUNTS).to_bytes(4, "little")
        elif len(data) >= HEADER_SIZE + PARAM_SIZE:
            number = draw.draw(st.integers(0, (len(data) - HEADER_SIZE) // PARAM_SIZE - 1))
            at = HEADER_SIZE + PARAM_SIZE * number
            data[at : at + 2] = draw.draw(st.integers(0, 0x3FF)).to_bytes(2, "little")
        one["hex"] = data.hex()
    elif kind == "answer" and forwards:
        answer = draw.draw(st.sampled_from(forwards))["answer"]
        answer["ret"][draw.draw(st.integers(0, 3))] = hex(draw.draw(WORDS))
    elif kind == "write" and forwards:
        answer = draw.draw(st.sampled_from(forwards))["answer"]
        target = draw.draw(st.sampled_from(["arg:0", "arg:1", "rpc:c1", "rpc:500", "rpc:0"]))
        at = draw.draw(st.sampled_from([0, 8, 20, 28, 32, 40, 48, 56, 64, 4088]))
        answer.setdefault("writes", []).append([target, at, draw.draw(WORDS).to_bytes(8, "little").hex()])
    elif kind == "again":
        vector["steps"].insert(draw.draw(st.integers(0, len(vector["steps"]))), step)
    else:
        where = draw.draw(st.integers(1, len(vector["steps"])))
        gfn = hex(draw.draw(st.integers(0x40000, 0x40010)))
        types = ["ram_rw", "ram_ro", "mmio", "grant_rw", "grant_ro", "foreign_rw", "none"]
        place = {"domain": step["domain"], "gfn": gfn}
        number = draw.draw(st.integers(-1, 4))
        if kind == "p2m":
            vector["steps"].insert(where, {"op": "p2m", **place, "type": draw.draw(st.sampled_from(types))})
        elif kind == "flip":
            offset = draw.draw(st.sampled_from([0, 20, 28, 32, 40, 48, 56, 4088]))
            value = {"value": hex(draw.draw(WORDS)), "size": draw.draw(st.integers(1, 8))}
            flip = {"op": "flip", **place, "nth_lookup": max(number, 0), "offset": offset, **value}
            vector["steps"].insert(where, flip)
        elif kind == "fault":
            fault = {"op": "alloc_fault", "heap_page_alloc_nth": number, "xzalloc_nth": draw.draw(st.integers(-1, 4))}
            vector["steps"].insert(where, fault)
        else:
            end = {"op": "relinquish", "domain": step["domain"], "preempt_after": number, "out": {"rc": 0}}
            vector["steps"].insert(where, end)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_anything_changed_in_a_vector_violates_nothing(data: st.DataObject) -> None:
    vector = visible(data.draw(st.sampled_from(VECTORS)))
    for _ in range(data.draw(st.integers(1, 6))):
        _mutate(data, vector)
    report = compared(vector)
    assert report.violations == []
    assert report.steps == len(vector["steps"])
