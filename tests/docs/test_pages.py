"""The documentation keeps its word: links lead somewhere, code runs, commands and tables are the program's."""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from mediator.cli import run
from mediator.cli.app import app
from mediator.core import steps
from mediator.invariants import TITLES
from mediator.policies import PolicyDocument
from tests.docs.pages import DOCS, PAGES, TOP, anchors, blocks, commands, name, prose, rows

HOW_TO = DOCS / "how-to"
REFERENCE = DOCS / "reference"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    missing = [
        name(page)
        for page in PAGES
        if page != DOCS / "index.md"
        and f"]({Path(*page.relative_to(TOP).parts[1:])})" not in index
        and f"](../{page.name})" not in index
    ]
    assert missing == []


def test_diagrams_are_those_of_the_tables() -> None:
    diagrams = runpy.run_path(str(DOCS / "diagrams.py"))
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    assert diagrams["page_with_diagrams"](text) == text
    assert text.count("stateDiagram-v2") == len(diagrams["DIAGRAMS"])


def test_the_example_of_both_ports_runs() -> None:
    page = HOW_TO / "attach.md"
    code = [text for language, text in blocks(page) if language == "python"]
    exec(compile("\n".join(code), name(page), "exec"), {})


def test_the_example_policy_serves_a_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = (text for language, text in blocks(HOW_TO / "write-a-policy.md") if language == "yaml")
    policy = tmp_path / "kiosk.yaml"
    policy.write_text(text, encoding="utf-8")
    arguments = ["--policy", str(policy), "--workload", "hello", "--duration", "0.2", "--check"]
    assert run(["serve", "--guests", "2", *arguments]) == 0
    # What is printed for a file with mistakes is printed so.
    policy.write_text(
        text.replace("pages: 512  # 2 MiB", "pages: 017").replace("  buffers:", "  bufers:"), encoding="utf-8"
    )
    capsys.readouterr()
    assert run(["serve", "--policy", str(policy)]) == 2
    shown = next(text for _, text in blocks(HOW_TO / "write-a-policy.md") if text.startswith("error:"))
    assert capsys.readouterr().err == shown.replace("kiosk.yaml", str(policy))


_QUICK = ("decode", "show", "replay", "trace")
_ALL = [line for page in PAGES for line in commands(page) if line.startswith("mediator ")]


@pytest.mark.parametrize("line", sorted(set(_ALL)))
def test_a_command_that_is_shown_exists(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    for end in (">", "&"):
        words = words[: words.index(end)] if end in words else words
    command, given = get_command(app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[given.pop(0)]
    command.make_context("mediator", given).close()


@pytest.mark.parametrize("page", [DOCS / "tutorial.md", HOW_TO / "read-a-trace.md"], ids=name)
def test_quick_commands_print_what_the_page_says(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(TOP)
    printed = [text.strip("\n") for language, text in blocks(page) if language == "text"]
    compared = 0
    for line in commands(page):
        words = shlex.split(line)
        if words[0] != "mediator" or words[1] not in _QUICK:
            continue
        capsys.readouterr()
        assert run(words[1:]) == 0, line
        out = capsys.readouterr().out.strip("\n")
        compared += out in printed
    assert compared == 3


def _sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _options(command: object, words: str) -> dict[str, set[str]]:
    """Options of each command of the program, by the words that call it."""
    children = getattr(command, "commands", None)
    if children is None:
        options = {option for param in getattr(command, "params", ()) for option in param.opts}
        return {words: {option for option in options if option.startswith("--")} - {"--help"}}
    found: dict[str, set[str]] = {}
    for child, inner in children.items():
        found |= _options(inner, f"{words} {child}")
    return found


def test_every_command_and_option_is_in_the_reference_and_no_other() -> None:
    sections = _sections(REFERENCE / "command-line.md")
    real = _options(get_command(app), "mediator")
    assert set(sections) == set(real)
    for command, options in real.items():
        shown = set(re.findall(r"^\| `(--[a-z-]+)", sections[command], re.MULTILINE))
        assert shown == options, command


def test_every_key_of_a_policy_is_in_the_reference_and_no_other() -> None:
    schema = PolicyDocument.model_json_schema()

    def keys(properties: dict[str, Any], prefix: str) -> set[str]:
        found = set()
        for key, value in properties.items():
            nullable = value.get("anyOf") == [value.get("anyOf", [{}])[0], {"type": "null"}]
            reference = value["anyOf"][0] if nullable else value
            inner = schema["$defs"].get(reference.get("$ref", "").rpartition("/")[2], {})
            if "properties" in inner:
                found |= keys(inner["properties"], f"{key}.") | ({prefix + key} if nullable else set())
            else:
                found.add(prefix + key)
        return found

    first = [row[0].strip("`") for row in rows(REFERENCE / "policy.md")]
    shown = set(first[1 : first.index("shared_pages") + 1])
    assert shown == keys(schema["properties"], "")


def test_every_invariant_is_in_the_reference_with_its_title() -> None:
    table = {row[0]: row[1] for row in rows(REFERENCE / "invariants.md") if row[0].isdigit()}
    assert table == {str(number): title for number, title in TITLES.items()}


def test_every_event_of_the_core_is_in_the_reference_with_its_level() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (TOP / "mediator" / "core").glob("*.py"))
    source = re.sub(r"\s+", " ", source)
    used = {getattr(steps, constant): level for constant, level in re.findall(r"Event\( ?([A-Z_]+), \"(\w+)\"", source)}
    # Two names are chosen before the event is made.
    used |= {steps.CALL_REFUSED: "info", steps.CALL_REJECTED: "info"}
    table = {row[0].strip("`"): row[1] for row in rows(REFERENCE / "events.md")[1:]}
    assert table == used


def test_every_json_document_is_in_the_reference_and_no_other() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (TOP / "mediator").rglob("*.py"))
    shown = {title.strip("`") for title in _sections(REFERENCE / "json.md")}
    assert shown <= set(re.findall(r"\"(mediator-[a-z]+/1)\"", source))
    for command, options in _options(get_command(app), "mediator").items():
        if "--json" in options:
            _, first, *more = command.split()
            assert f"mediator-{more[-1] if first == 'show' else first}/1" in shown


def test_every_class_of_mistakes_has_a_test_that_exists() -> None:
    classes = {row[0].split()[0]: row[3] for row in rows(DOCS / "threat_model.md") if re.match(r"B\d", row[0])}
    assert list(classes) == [f"B{number}" for number in range(1, 16)]
    for cell in classes.values():
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
        assert named
        for file, function in named:
            text = (TOP / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *(async )?def {function}\(", text, re.MULTILINE), (file, function)


def test_every_rule_that_the_code_names_is_explained() -> None:
    listed = {row[0] for row in rows(DOCS / "design.md")}
    code = "".join(path.read_text(encoding="utf-8") for path in (TOP / "mediator").rglob("*.py"))
    named = {f"R{number}" for number in re.findall(r"\bR(\d{1,2})\b", code)}
    assert named <= listed
