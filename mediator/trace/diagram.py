"""Sequence diagrams in characters and as Mermaid text: guest, mediator and OP-TEE, and what they say."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

MAX_ARROWS: Final = 200
"""Arrows of a Mermaid diagram: what can still be drawn and looked at."""
COLUMN: Final = 38
"""Characters between two life lines."""
PARTICIPANTS: Final = ("guest", "mediator", "OP-TEE")
GUEST, MEDIATOR, OPTEE = range(3)


@dataclass(frozen=True, slots=True)
class Arrow:
    """Somebody says something to a neighbour; `notes` are the particulars."""

    source: int
    target: int
    text: str
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Journey:
    """What happened to one call, in order."""

    title: str
    arrows: list[Arrow] = field(default_factory=list)
    unexpected: int = 0

    def text(self) -> str:
        """Draw the diagram with characters."""
        lines = [self.title, "", _names()]
        for arrow in self.arrows:
            lines.extend(_drawn(arrow))
        return "\n".join([*lines, _life_lines()])

    def mermaid(self) -> str:
        """Write the diagram as Mermaid's sequenceDiagram."""
        lines = ["sequenceDiagram", f"    %% {self.title}"]
        lines += [f"    participant {name[0]} as {name}" for name in PARTICIPANTS]
        for arrow in self.arrows[:MAX_ARROWS]:
            source, target = PARTICIPANTS[arrow.source][0], PARTICIPANTS[arrow.target][0]
            line = "->>" if arrow.source < arrow.target else "-->>"
            lines.append(f"    {source}{line}{target}: {_escaped(arrow.text)}")
            if arrow.notes:
                lines.append(f"    Note over {target}: {'<br/>'.join(map(_escaped, arrow.notes))}")
        if len(self.arrows) > MAX_ARROWS:
            lines.append(f"    Note over m: ... and {len(self.arrows) - MAX_ARROWS} more arrows")
        return "\n".join(lines)


def _names() -> str:
    line = ""
    for index, name in enumerate(PARTICIPANTS):
        line = line.ljust(index * COLUMN) + name
    return line


def _life_lines() -> str:
    return "".join(f"  │{' ' * (COLUMN - 3)}" for _ in PARTICIPANTS).rstrip()


def _drawn(arrow: Arrow) -> Iterator[str]:
    """Label, arrow and notes."""
    left = min(arrow.source, arrow.target) * COLUMN + 2
    for text in textwrap.wrap(arrow.text, COLUMN - 3) or [""]:
        yield _over(left + 2, text)
    shaft = "─" * (COLUMN - 2)
    yield _over(left, f"├{shaft}►│" if arrow.source < arrow.target else f"│◄{shaft}┤")
    for note in arrow.notes:
        at = 8 + len(note) - len(note.lstrip())
        for text in textwrap.wrap(note.lstrip(), 3 * COLUMN - at, subsequent_indent="  "):
            yield _over(at, text)


def _over(at: int, text: str) -> str:
    """Text that stands before the life lines."""
    line = _life_lines().ljust(at)
    return (line[:at] + text + line[at + len(text) :]).rstrip()


def _escaped(text: str) -> str:
    """Text for Mermaid, to which semicolons end a statement and # begins an entity."""
    return text.strip().replace(";", ",").replace("#", "#35;").replace("<", "#lt;")
