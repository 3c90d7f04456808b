"""The record of the memory manager of secure storage, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from mediator.cli.output import table

if TYPE_CHECKING:
    from rich.console import RenderableType

_COUNTS: Final = ("allocated", "freed", "current", "peak", "allocations", "failures", "evictions")


def storage_memory(records: Mapping[str, dict[str, Any]]) -> list[RenderableType]:
    """Table of all levels, and a line on each record; records: by name of the guest, as `MemoryManager.as_data`."""
    columns = ("guest", "level", *_COUNTS, "hit rate")
    made = table(*columns, right=columns[2:])
    for guest, record in records.items():
        for level, counts in record["levels"].items():
            rate = "" if counts["hit_rate"] is None else f"{counts['hit_rate']:.0%}"
            made.add_row(guest, level, *(str(counts[key]) for key in _COUNTS), rate)
    return [made, *_lines(records.items())]


def _lines(records: Iterable[tuple[str, dict[str, Any]]]) -> Iterable[str]:
    for guest, record in records:
        collector = record["collector"]
        wrong = record["double_releases"] + record["foreign_releases"]
        yield (
            f"{guest}: {record['charged']} bytes of the heap (at most {record['bound']}); {collector['collections']} "
            f"collections, {collector['bytes']} bytes, {collector['nanoseconds'] / 1e6:.1f} ms, longest pass "
            f"{collector['longest_pass']} of {collector['bound']} entries; wrong releases: {wrong}"
        )
        yield from (f"{guest}: {count} held from {place}" for place, count in record["held"].items())
