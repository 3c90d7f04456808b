"""What OP-TEE's console and `xtest --stats` say about memory: which limit it was.

Source: OP-TEE's own messages; memory sizing reference, sections 1 and 6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from optee.memory.build import LPAE, MIB

TABLES: Final = "translation tables"
CORE_HEAP: Final = "core heap"
TA_HEAP: Final = "TA heap"
TA_RAM: Final = "TA RAM"
TA_STACK: Final = "TA stack"
NOT_MEMORY: Final = "not a limit of memory"
UNCLEAR: Final = "unclear"

_STACK_SMASHING: Final = 0xFFFF300F
_OUT_OF_MEMORY: Final = 0xFFFF000C


@dataclass(frozen=True, slots=True)
class Finding:
    """A message that was recognised."""

    line: int
    limit: str
    text: str
    """What it means, and what to change."""


def read_console(text: str) -> list[Finding]:
    """Everything in a console log that tells about a limit."""
    return [*_messages(text), *_maps(text), *_pools(text)]


def _tables(match: re.Match[str]) -> Finding | None:
    count = match.group(1)
    if count is None:
        text = "a TA needs more translation tables than the pool has: raise CFG_NUM_THREADS, or set"
        return Finding(0, TABLES, f"{text} CFG_CORE_PREALLOC_EL0_TBLS=y")
    needed = int(count)
    return Finding(
        0,
        TABLES,
        f"one TA maps {needed} windows of 2 MiB (1 MiB without LPAE): CFG_NUM_THREADS={-(-needed // 2)} or "
        f"CFG_PGT_CACHE_ENTRIES={needed} (4.3 and later) gives as many, CFG_CORE_PREALLOC_EL0_TBLS=y takes them from "
        "TA RAM",
    )


def _core_heap(match: re.Match[str]) -> Finding | None:
    size = int(match.group(1))
    return Finding(
        0,
        CORE_HEAP,
        f"an allocation of {size} bytes in the core failed (CFG_CORE_DUMP_OOM): raise CFG_CORE_HEAP_SIZE; TA_DATA_SIZE "
        "and secure RAM have no part in it",
    )


def _panic(match: re.Match[str]) -> Finding | None:
    code = int(match.group(1), 16)
    if code == _STACK_SMASHING:
        return Finding(
            0,
            NOT_MEMORY,
            "panic 0xffff300f is a stack buffer overrun inside the TA (the canary was overwritten): a bug of the TA, "
            "no limit; neither TA_STACK_SIZE nor the rate of calls is the cause",
        )
    if code == _OUT_OF_MEMORY:
        return Finding(0, UNCLEAR, "the TA panicked because a service answered OUT_OF_MEMORY: see the lines before it")
    return None


def _smashing(match: re.Match[str]) -> Finding | None:
    return Finding(0, NOT_MEMORY, "a function of the TA wrote beyond an array on its stack: a bug of the TA, no limit")


def _result(match: re.Match[str]) -> Finding | None:
    return Finding(
        0,
        UNCLEAR,
        "OUT_OF_MEMORY alone does not say of what: build OP-TEE with CFG_CORE_DUMP_OOM=y and CFG_WITH_STATS=y, and see "
        "which pool's failures grow",
    )


def _thread_limit(match: re.Match[str]) -> Finding | None:
    return Finding(
        0, "threads", "all CFG_NUM_THREADS threads are taken; the driver waits and tries again, nothing fails"
    )


_PATTERNS: Final[tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Finding | None]], ...]] = (
    (re.compile(r"(\d+) page tables not available|Page tables are not available"), _tables),
    (re.compile(r"Memory allocation failed: size (\d+)"), _core_heap),
    (re.compile(r"panicked with code (0x[0-9a-fA-F]{1,16})"), _panic),
    (re.compile(r"stack smashing detected"), _smashing),
    (re.compile(r"(?i)\b(?:0x)?ffff000c\b|TEE_ERROR_OUT_OF_MEMORY"), _result),
    (re.compile(r"ETHREAD_LIMIT|out of threads"), _thread_limit),
)


def _messages(text: str) -> Iterator[Finding]:
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, explain in _PATTERNS:
            match = pattern.search(line)
            found = explain(match) if match is not None else None
            if found is not None and found.text not in seen:
                seen.add(found.text)
                yield Finding(number, found.limit, found.text)
                break


_REGION: Final = re.compile(
    r"region +\d+: va (0x[0-9a-fA-F]{1,16}) pa 0x[0-9a-fA-F]{1,16} size (0x[0-9a-fA-F]{1,16}) flags (\S{4})(.*)"
)
_FAULT: Final = re.compile(r"data-abort at address (0x[0-9a-fA-F]{1,16})")


def _maps(text: str) -> Iterator[Finding]:
    """Address spaces in dumps of dying TAs: how many tables they need, and whether the stack overflowed."""
    regions: list[tuple[int, int, str]] = []
    fault: int | None = None
    first = 0
    lines = text.splitlines()
    for number, line in enumerate([*lines, ""], 1):
        match = _REGION.search(line)
        if match is not None:
            first = first or number
            regions.append((int(match.group(1), 16), int(match.group(2), 16), match.group(4).strip()))
            continue
        aborted = _FAULT.search(line)
        if aborted is not None:
            fault = int(aborted.group(1), 16)
        if regions:
            yield from _map(first, regions, fault)
            regions, fault, first = [], None, 0


def _map(line: int, regions: list[tuple[int, int, str]], fault: int | None) -> Iterator[Finding]:
    start = min(va for va, _, _ in regions)
    end = max(va + size for va, size, _ in regions)
    needed = LPAE.windows(start, end)
    yield Finding(
        line,
        TABLES,
        f"this TA's map spans {(end - start) / MIB:.1f} MiB: {needed} tables, so {-(-needed // 2)} threads "
        "(CFG_NUM_THREADS) or CFG_CORE_PREALLOC_EL0_TBLS=y",
    )
    for va, size, what in regions:
        if "stack" in what and fault is not None and va - 4096 <= fault < va:
            yield Finding(line, TA_STACK, f"the abort is just below the stack of {size} bytes: raise TA_STACK_SIZE")


_POOL: Final = re.compile(r"^\W*Pool:\s*(.+?)\s*$")
_POOL_NUMBERS: Final = {
    "failed": re.compile(r"[Nn]umber of failed allocations:\s*(\d+)"),
    "size": re.compile(r"[Ss]ize of pool:?\s*(\d+)"),
    "maximum": re.compile(r"[Mm]ax bytes allocated:\s*(\d+)"),
    "failure": re.compile(r"[Ss]ize of larges?t? allocation failure:\s*(\d+)"),
}
_POOLS: Final = (
    ("kheap", "nexus heap", "CFG_CORE_NEX_HEAP_SIZE"),
    ("nexus", "nexus heap", "CFG_CORE_NEX_HEAP_SIZE"),
    ("physical ta", TA_RAM, "CFG_TZDRAM_SIZE"),
    ("heap", CORE_HEAP, "CFG_CORE_HEAP_SIZE"),
)


def _pools(text: str) -> Iterator[Finding]:
    """Pools of `xtest --stats`, where allocations failed."""
    name, start = "", 0
    numbers: dict[str, int] = {}
    for number, line in enumerate([*text.splitlines(), "Pool: end"], 1):
        match = _POOL.match(line)
        if match is None:
            for key, pattern in _POOL_NUMBERS.items():
                found = pattern.search(line)
                if found is not None:
                    numbers[key] = int(found.group(1)[:18])
                    start = start or number
            continue
        if numbers:
            yield from _pool(start, name, numbers)
        name, start, numbers = match.group(1), number, {}


def _pool(line: int, name: str, numbers: dict[str, int]) -> Iterator[Finding]:
    size = numbers.get("size")
    if not numbers.get("failed"):
        if not name and size is not None:
            text = f"a pool of {size} bytes without a name: where a TA printed it, it is the TA's heap, not the core's"
            yield Finding(line, UNCLEAR, text)
        return
    known = next(((limit, option) for key, limit, option in _POOLS if key in name.lower()), None)
    limit, option = known or (UNCLEAR, "its size")
    detail = f", the largest of {numbers['failure']} bytes" if "failure" in numbers else ""
    of = "" if size is None else f" of {size} bytes"
    yield Finding(line, limit, f'{numbers["failed"]} allocations from pool "{name}"{of} failed{detail}: raise {option}')
