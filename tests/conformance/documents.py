"""Vector documents for tests: the visible ones, and hand-written ones step by step."""

import gzip
import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from mediator.conformance import vectors as v
from mediator.conformance.compare import Report, compare
from mediator.conformance.run import Observed, Run
from mediator.core.policy import Policy
from mediator.invariants import Violation
from mediator.policies import load_policy
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, PARAM
from optee.abi.smc import API_UID, Function
from tests.shared import SHARED

VISIBLE = SHARED / "vectors" / "xen-visible.json.gz"
FORMAT = "xen-optee-mediator-vectors/1"
BASE_GFN = 0x40000
PAGE = 4096

Step = dict[str, Any]
Vector = dict[str, Any]


@cache
def xen() -> Policy:
    return load_policy("xen")


@cache
def _visible() -> dict[str, Vector]:
    document = json.loads(gzip.decompress(VISIBLE.read_bytes()))
    return {vector["name"]: vector for vector in document["vectors"]}


def names() -> list[str]:
    return list(_visible())


def visible(name: str) -> Vector:
    """A copy of a visible vector, to be changed at will."""
    return deepcopy(_visible()[name])


def document(*vectors: Vector) -> v.Document:
    return v.Document.model_validate({"format": FORMAT, "vectors": list(vectors)})


def compared(*vectors: Vector) -> Report:
    return compare(document(*vectors), xen())


def differences(report: Report) -> list[tuple[int, str]]:
    return [(found["step"], found["field"]) for found in report.differ]


def write(path: Path, *vectors: Any, **changes: Any) -> Path:
    path.write_text(json.dumps({"format": FORMAT, "vectors": list(vectors), **changes}))
    return path


# Hand-written vectors: what the guests do and what the secure world answers; `out` says nothing else.

NOT_HANDLED = 2**64 - 1
GENERIC, BAD_PARAMETERS, OUT_OF_MEMORY = 0xFFFF0000, 0xFFFF0006, 0xFFFF000C
ALLOC, FREE, CMD, INTR = 0xFFFF0000, 0xFFFF0002, 0xFFFF0005, 0xFFFF0004
TMEM_IN, TMEM_OUT, TMEM_INOUT = 0x209, 0x20A, 0x20B
SHM_ALLOC, SHM_FREE = 6, 7
OPEN, INVOKE, REGISTER, UNREGISTER = 0, 1, 4, 5


def _forwarded(answers: Sequence[tuple[Sequence[int], Sequence[Any]]]) -> list[Step]:
    zeros = ["0x0"] * 8
    return [
        {"regs": zeros, "answer": {"ret": [hex(word) for word in words], "writes": list(writes)}}
        for words, writes in answers
    ]


def answer(*words: int, writes: Sequence[tuple[str, int, str]] = ()) -> tuple[Sequence[int], Sequence[Any]]:
    """x0..x3 (missing ones are 0), and what is written before."""
    return (*words, *[0] * (4 - len(words))), [list(write) for write in writes]


def probe(threads: int = 2) -> Step:
    answers = [answer(*API_UID), answer(0, threads), answer(7)]
    return {"op": "probe", "out": {"result": True, "forwarded": _forwarded(answers)}}


def create(domain: int = 1, *, code: int = 0) -> Step:
    rc = 0 if code == 0 else -19
    return {"op": "create", "domain": domain, "out": {"rc": rc, "forwarded": _forwarded([answer(code)])}}


def relinquish(domain: int = 1, *, preempt: int = -1, rc: int = 0, code: int = 0) -> Step:
    out = {"rc": rc, "forwarded": _forwarded([answer(code)])}
    return {"op": "relinquish", "domain": domain, "preempt_after": preempt, "out": out}


def smc(
    *regs: int,
    domain: int = 1,
    writes: Sequence[tuple[int, bytes]] = (),
    answers: Sequence[tuple[Sequence[int], Sequence[Any]]] = (),
) -> Step:
    words = [hex(word) for word in (*regs, *[0] * (8 - len(regs)))]
    return {
        "op": "smc",
        "domain": domain,
        "regs": words,
        "mem_writes": [{"ipa": hex(ipa), "hex": data.hex()} for ipa, data in writes],
        "out": {"handled": True, "regs": words, "forwarded": _forwarded(answers), "state": {}},
    }


def call(
    at: int,
    data: bytes,
    *more: tuple[int, bytes],
    answers: Sequence[tuple[Sequence[int], Sequence[Any]]] = ((((0, 0, 0, 0)), ()),),
    domain: int = 1,
) -> Step:
    """CALL_WITH_ARG of a message at an IPA."""
    function = int(Function.CALL_WITH_ARG)
    return smc(function, at >> 32, at & 0xFFFFFFFF, domain=domain, writes=[(at, data), *more], answers=answers)


def resume(thread: int, a1: int = 0, a2: int = 0, a4: int = 0, a5: int = 0, **more: Any) -> Step:
    return smc(int(Function.RETURN_FROM_RPC), a1, a2, thread, a4, a5, **more)


def message(command: int, *params: tuple[int, int, int, int], func: int = 0, ret: int = 0) -> bytes:
    header = HEADER.pack(command, func, 0, 0, 0, ret, 0, len(params))
    return header + b"".join(PARAM.pack(*param) for param in params)


def page(number: int, base: int = BASE_GFN) -> int:
    """IPA of a page of a domain."""
    return (base + number) * PAGE


def page_list(at: int, pages: Sequence[int], following: int = 0) -> tuple[int, bytes]:
    """A list page with these entries; `following` is what stands in its last word."""
    words = [*pages, *[0] * (ENTRIES_PER_PAGE - len(pages)), following]
    return at, b"".join(word.to_bytes(8, "little") for word in words)


def vector(*steps: Step, domains: Sequence[Step] | None = None, threads: int = 2, name: str = "by_hand") -> Vector:
    listed = [{"id": 1, "npages": 64, "base_gfn": hex(BASE_GFN), "perm": "0x2b"}] if domains is None else list(domains)
    return {"name": name, "setup": {"max_threads": threads, "domains": listed}, "steps": list(steps)}


def observed(described: Vector, policy: Policy | None = None) -> tuple[list[Observed], list[Violation]]:
    """What our core did in each step, and the violations; afterwards nothing is kept."""
    run = Run(document(described).vectors[0], policy or xen())
    try:
        done = list(run.steps())
        run.checker.scan()
        return done, run.checker.violations
    finally:
        run.close()


def recorded(described: Vector) -> Vector:
    """The same vector with what our core did in `out`: a recording that agrees with it, to be changed at will."""
    done, violations = observed(described)
    assert violations == []
    return {**described, "steps": [one.step.model_dump(mode="json", exclude_none=True) for one in done]}


def outs(described: Vector, policy: Policy | None = None) -> list[Any]:
    """`out` of each step that has one (None for others); the run must violate nothing."""
    done, violations = observed(described, policy)
    assert violations == []
    return [getattr(one.step, "out", None) for one in done]
