"""What holds for the repository as a whole."""

import ast
import re
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import resources
from pathlib import Path

from tests.docs.pages import README, TOP, marked_command, tracked_files

PACKAGES = ("mediator", "guests", "hv_models", "optee")
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))


def _modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((TOP / package).rglob("*.py")):
            parts = path.relative_to(TOP).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_the_readme_has_one_command_to_run_and_one_to_test() -> None:
    for mark, does in (("run", "mediator serve --guests 4 --duration 10"), ("test", "python -m pytest")):
        (block,) = marked_command(mark)
        assert len(block.splitlines()) == 1
        assert does in block
        assert block.startswith("python3 -m venv .venv && ")
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- command:") == text.count("```sh") == 2


def test_every_folder_with_modules_is_a_package_with_its_data() -> None:
    for _, path in _modules():
        assert (path.parent / "__init__.py").is_file(), path
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        beside = {
            path.relative_to(TOP / package).as_posix()
            for path in (TOP / package).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc")
        }
        declared = {
            path.relative_to(TOP / package).as_posix()
            for pattern in data[package]
            for path in (TOP / package).glob(pattern)
        }
        assert beside == declared


def test_package_data_is_found_where_the_packages_are() -> None:
    policies = resources.files("mediator.policies")
    assert {entry.name for entry in policies.iterdir()} >= {"default.yaml", "xen.yaml", "minimal.yaml"}
    assert resources.files("mediator.conformance").joinpath("intended.yaml").is_file()


def test_every_public_module_says_what_it_is() -> None:
    silent = [name for name, path in _modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_files_speak_of_the_project_alone() -> None:
    machine_path = re.compile(r"(?<![\w.~}\"'])/(work|home|root|tmp|Users|opt)/\w+")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [(path.relative_to(TOP), match[0]) for match in machine_path.finditer(text)]
    assert found == []


def test_nothing_is_silenced() -> None:
    marks = re.compile(r"type: *ignore|#\s*noqa|pragma: no cover|except Exception|\btime\.sleep\(")
    here = Path(__file__)
    found = [
        (path.relative_to(TOP), match[0])
        for path in tracked_files()
        if path.suffix == ".py" and path != here
        for match in marks.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def _package(module: str) -> str:
    """What counts as one package: the ABI is one of its own, so are the parts of the mediator."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "mediator" or parts[:2] == ["optee", "abi"] else parts[0]


def test_packages_import_each_other_in_one_direction_only() -> None:
    names = {name for name, _ in _modules()}
    graph: dict[str, set[str]] = {}
    for name, path in _modules():
        imports = graph.setdefault(_package(name), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [each if each in names else node.module for each in inner]
            else:
                continue
            imports |= {_package(target) for target in targets if target in names}
        imports.discard(_package(name))
    assert graph["optee.abi"] == set()
    assert graph["hv_models"] == {"optee.abi"}
    assert graph["guests"] <= {"optee.abi", "hv_models"}
    assert graph["optee"] <= {"optee.abi", "hv_models"}
    assert graph["mediator.core"] <= {"optee.abi", "hv_models"}
    TopologicalSorter(graph).prepare()
