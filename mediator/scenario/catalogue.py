"""Where scenarios come from: the library of this package, by name, and a user's own files."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mediator.documents import DocumentError, read_document
from mediator.scenario.language import Scenario, load_scenario


def library() -> Sequence[str]:
    """The names of the scenarios that are shipped, in alphabetical order."""
    folder = resources.files("mediator.scenario").joinpath("library")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def scenario_text(name: str) -> str:
    """The YAML of a shipped scenario."""
    folder = resources.files("mediator.scenario").joinpath("library")
    return folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def find_scenarios(name_or_file: str) -> Sequence[Scenario]:
    """The same; or the group of shipped scenarios whose names begin with these words, such as `burst`."""
    names = library()
    group = [name for name in names if name.startswith(f"{name_or_file}-")]
    return [find_scenario(name) for name in ([name_or_file] if name_or_file in names else group or [name_or_file])]


def find_scenario(name_or_file: str) -> Scenario:
    """A shipped scenario by name, or one from a YAML file.

    Raises:
        DocumentError: no such scenario, or its document is wrong; one line per error, with file:line:column.

    """
    if name_or_file in library():
        return load_scenario(scenario_text(name_or_file), f"library/{name_or_file}.yaml")
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        raise DocumentError([f"{name_or_file!r} is no scenario (mediator run --list has all) and no .yaml file"])
    return load_scenario(read_document(path), str(path))
