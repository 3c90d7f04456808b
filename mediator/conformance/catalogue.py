"""The conformance cases: scenarios that say where in the ABI they come from, and which rules they show.

`docs/conformance.md` says how to write one, and how to run them against another mediator.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from mediator.documents import DocumentError, read_document
from mediator.scenario.language import Scenario, load_scenario

MAX_CASES: Final = 200
"""Each case has a purpose that no other covers: what is alike in many is for a generated test."""
_PACKAGE: Final = "mediator.conformance"


def case_ids() -> Sequence[str]:
    """Ids of the cases that are shipped, in alphabetical order."""
    folder = resources.files(_PACKAGE).joinpath("cases")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def find_case(name_or_file: str) -> Scenario:
    """A shipped case by its id, or one from a YAML file.

    Raises:
        DocumentError: no such case, or its document is wrong; one line per error, with file:line:column.

    """
    if name_or_file in case_ids():
        text = resources.files(_PACKAGE).joinpath("cases", f"{name_or_file}.yaml").read_text(encoding="utf-8")
        return _case(text, f"cases/{name_or_file}.yaml")
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        raise DocumentError([f"{name_or_file!r} is no case (mediator conform --list has all) and no .yaml file"])
    return _case(read_document(path), str(path))


def catalogue() -> list[Scenario]:
    """All shipped cases. Raises DocumentError."""
    return [find_case(name) for name in case_ids()]


def _case(text: str, name: str) -> Scenario:
    case = load_scenario(text, name)
    missing = [key for key, value in (("source", case.source), ("rules", case.rules)) if not value]
    if missing:
        raise DocumentError([f"{name}: a case says {' and '.join(missing)}"])
    return case
