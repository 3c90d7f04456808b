"""Draw the life cycles of `docs/design.md` from the tables of the core.

    python docs/diagrams.py           print the page as it should be
    python docs/diagrams.py --write   bring the page up to date

The packages must be installed (CONTRIBUTING says how).
"""

import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from mediator.core.states import ARGUMENT_TABLE, BUFFER_TABLE, CALL_TABLE, GUEST_TABLE

PAGE: Final = Path(__file__).with_name("design.md")

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


def _word(state: Enum) -> str:
    return state.name.lower()


def diagram(table: Mapping[S, Mapping[E, S]]) -> str:
    """One table as a Mermaid state diagram: it starts at the first state and ends where no edge leads on."""
    lines = ["stateDiagram-v2", f"    [*] --> {_word(next(iter(table)))}"]
    for state, edges in table.items():
        events: dict[S, list[str]] = {}
        for event, target in edges.items():
            events.setdefault(target, []).append(event.name.lower().replace("_", " "))
        lines += [f"    {_word(state)} --> {_word(target)}: {', '.join(names)}" for target, names in events.items()]
        if not edges:
            lines.append(f"    {_word(state)} --> [*]")
    return "\n".join(lines)


DIAGRAMS: Final[Mapping[str, str]] = {
    "guest": diagram(GUEST_TABLE),
    "call": diagram(CALL_TABLE),
    "buffer": diagram(BUFFER_TABLE),
    "rpc-argument": diagram(ARGUMENT_TABLE),
}
"""By the name that marks their place in the page."""


def page_with_diagrams(text: str) -> str:
    """Return the page with each diagram between its two marks. Raises ValueError if a mark is missing."""
    for name, drawn in DIAGRAMS.items():
        begin, end = f"<!-- diagram: {name} -->\n", f"<!-- end of diagram: {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no place for the diagram {name!r}")
        text = f"{before}{begin}```mermaid\n{drawn}\n```\n{end}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Print the page, or write it."""
    page = page_with_diagrams(PAGE.read_text(encoding="utf-8"))
    if arguments == ["--write"]:
        PAGE.write_text(page, encoding="utf-8")
    elif arguments:
        print(__doc__, file=sys.stderr)
        return 2
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
