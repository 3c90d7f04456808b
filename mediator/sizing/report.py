"""A `Sizing` in words, and as the document `mediator-size/1`."""

from typing import Any, Final

from mediator.sizing.request import Request
from optee.memory.build import MIB, PAGE, Build
from optee.memory.build_files import OPTIONS
from optee.memory.changes import Change
from optee.memory.explain import Line
from optee.memory.failures import RESULTS
from optee.memory.measurements import Row
from optee.memory.needs import tables
from optee.memory.profile import TaProfile
from optee.memory.sizing import Limit, Sizing, nexus_guests

FORMAT: Final = "mediator-size/1"


def document(request: Request, sizing: Sizing) -> dict[str, Any]:
    """Everything about one configuration."""
    build, ta = sizing.build, sizing.load.tas[0]
    needed = tables(build, ta)
    return {
        "inputs": inputs(request),
        "fits": sizing.fits,
        "usable_ta_mib": usable_mib(sizing),
        "usable_ta_bytes": max(sizing.usable, 0),
        "binding": binding(sizing),
        "tables": {
            "needed": needed,
            "available": None if build.prealloc else build.tables,
            "from": "TA RAM" if build.prealloc else "pool",
            "calls_at_once": None if build.prealloc else min(build.tables // max(needed, 1), build.threads),
        },
        "heap": {
            "size": build.heap,
            "used": sizing.heap_used,
            "free": sizing.heap_free,
            "sessions": sizing.sessions,
            "rsa_operations": sizing.rsa_operations,
        },
        "shared": {
            "largest_buffer_pages": sizing.largest_buffer,
            "total_pages": sizing.total_pages,
            "buffer_bytes": sizing.load.buffer,
        },
        "ta_ram": {"per_guest": build.ta_ram, "stacks": build.stacks},
        "guests": {"wanted": sizing.load.guests, "possible": sizing.guests},
        "threads": {
            "number": build.threads,
            "bytes_each": build.thread_size,
            "bytes": build.threads * build.thread_size,
        },
        "limits": [limit_document(limit) for limit in sizing.limits],
    }


def inputs(request: Request) -> dict[str, Any]:
    """Build, with the source of each value, and load."""
    build = {
        option: {"value": getattr(request.build, name), "source": request.sources.get(name, "default")}
        for name, option in OPTIONS.items()
    }
    load = request.load
    return {
        "build": build,
        "guests": load.guests,
        "tas": [_ta(ta) for ta in load.tas],
        "buffer": load.buffer,
        "buffers": load.buffers,
    }


def _ta(ta: TaProfile) -> dict[str, Any]:
    return {
        "name": ta.name,
        "code": ta.code,
        "stack": ta.stack,
        "heap": ta.heap,
        "parameters": list(ta.parameters),
        "beside_heap": ta.beside_heap,
        "sessions": ta.sessions,
        "single_instance": ta.single_instance,
        "set_ups": dict(ta.set_ups),
    }


def limit_document(limit: Limit) -> dict[str, Any]:
    """One pool."""
    return {
        "name": limit.name,
        "option": limit.option,
        "needed": limit.needed,
        "available": limit.available,
        "unit": limit.unit,
        "holds": limit.holds,
        "fails_at": limit.place,
        "result": RESULTS[limit.place],
    }


def usable_mib(sizing: Sizing) -> int:
    """Largest heap of a TA in whole MiB; 0 if the TA does not fit at all."""
    return max(sizing.usable, 0) // MIB


def binding(sizing: Sizing) -> str:
    """What binds first, in words."""
    if not sizing.fits:
        return broken(sizing.failing[0])
    ta = sizing.load.tas[0]
    if ta.heap is None:
        return f"{sizing.usable_binding} limits the heap of {ta.name}{_because(sizing)}"
    limit = sizing.binding
    return f"{limit.name}: {limit.needed} of {limit.available} {limit.unit} taken ({limit.option})"


def _because(sizing: Sizing) -> str:
    build = sizing.build
    if sizing.usable_binding == "translation tables":
        return f": {_tables_option(build)} gives {build.tables} tables of {build.geometry.window // MIB} MiB"
    if sizing.usable_binding == "address space of a TA":
        return f": {build.geometry.user_space // MIB} MiB with {build.geometry.name}"
    if sizing.usable_binding == "TA RAM":
        return f": {build.ta_ram} bytes for each guest"
    return f": CFG_CORE_HEAP_SIZE={build.heap}"


def _guests_option(build: Build) -> str:
    """What decides how many guests there can be."""
    if not build.virtualization:
        return OPTIONS["virtualization"]
    by_ram = build.guests_by_ram()
    if by_ram is None or nexus_guests(build) < by_ram:
        return OPTIONS["nexus_heap"]
    return OPTIONS["guest_count"]


def _tables_option(build: Build) -> str:
    if build.table_entries is not None:
        return f"CFG_PGT_CACHE_ENTRIES={build.table_entries}"
    return f"CFG_NUM_THREADS={build.threads}"


def broken(limit: Limit) -> str:
    """A limit that the load breaks."""
    what = f"{limit.name}: {limit.needed} of {limit.available} {limit.unit}"
    if "tables" in limit.name:
        what += f' (OP-TEE logs "{limit.needed} page tables not available")'
    return f"{what}; {limit.option}; {limit.place} answers {RESULTS[limit.place]}"


def rows(sizing: Sizing) -> list[tuple[str, str, str]]:
    """The table: what, how much, and what decides."""
    build, ta = sizing.build, sizing.load.tas[0]
    needed = tables(build, ta)
    ram = "not limited (no --ram, no --board)" if build.ta_ram is None else amount(build.ta_ram)
    usable = "none: it does not fit at all" if sizing.usable < 0 else f"{sizing.usable / MIB:.2f} MiB"
    available = "from TA RAM" if build.prealloc else f"of {build.tables}"
    possible = "any number" if sizing.guests is None else sizing.guests
    threads = build.threads * build.thread_size
    heap = OPTIONS["heap"]
    largest = sizing.largest_buffer
    return [
        ("guests", f"{sizing.load.guests} of {possible}", _guests_option(build)),
        ("TA RAM of a guest", ram, OPTIONS["secure_ram"]),
        (f"largest heap of {ta.name}", usable, sizing.usable_binding),
        ("translation tables of one call", f"{needed} {available}", _tables_option(build)),
        ("core heap of a guest", f"{amount(sizing.heap_free)} of {amount(build.heap)} free", heap),
        ("sessions at once", str(sizing.sessions), "core heap, TA RAM"),
        ("RSA signing set-ups at once, beside", str(sizing.rsa_operations), heap),
        ("largest shared buffer", f"{largest} pages, {largest * PAGE / MIB:.1f} MiB", heap),
        (f"shared pages in all, {amount(sizing.load.buffer)} each", str(sizing.total_pages), heap),
        ("core RAM for threads", f"{build.threads} x {build.thread_size} = {amount(threads)}", OPTIONS["threads"]),
    ]


def amount(size: int) -> str:
    """Bytes, readable."""
    if size >= 10 * MIB:
        return f"{size / MIB:.1f} MiB"
    if size >= 10240:
        return f"{size / 1024:.1f} KiB" if size % 1024 else f"{size // 1024} KiB"
    return f"{size} bytes"


def change_document(change: Change) -> dict[str, Any]:
    """A way to make it fit."""
    return {
        "name": change.name,
        "lines": list(change.lines),
        "costs": list(change.costs),
        "usable_ta_mib": usable_mib(change.sizing),
    }


def change_lines(change: Change) -> list[str]:
    """The same for people."""
    return [f"{change.name}:", *(f"  {line}" for line in change.lines), *(f"    cost: {cost}" for cost in change.costs)]


def explanation(lines: list[Line]) -> list[str]:
    """`--explain` for people."""
    return [text for line in lines for text in (f"- {line.text}", f"    from {line.source}")]


def row_document(row: Row) -> dict[str, Any]:
    """A published number."""
    return {
        "threads": row.threads,
        "prealloc": row.prealloc,
        "program": row.program,
        "measured_mb": row.measured,
        "model_mib": row.model,
        "kind": row.kind,
        "why": row.why,
    }
