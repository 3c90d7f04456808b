"""The page of claims shows what it says, and the Chinese pages say the same."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mediator.cli import run
from mediator.scenario import library
from tests.docs.pages import CHINESE, DOCS, README, TOP, blocks, commands, name, rows

CLAIMS = DOCS / "claims.md"
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SLOW = ("bench", "serve", "run")
LINES = [line for _, text in blocks(CLAIMS) for line in text.splitlines()]
SHOWN = [line for line in LINES if line.startswith("$ mediator ")]
TRANSLATED = (README, CLAIMS)


def chinese(page: Path) -> Path:
    return page.with_name(page.name.removesuffix(".md") + CHINESE)


@pytest.mark.parametrize(
    "line", dict.fromkeys(SHOWN), ids=lambda line: line.removeprefix("$ mediator ").split("  #")[0]
)
def test_a_command_ends_as_the_page_says(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in LINES:
        if other.startswith("$ printf "):
            subprocess.run(["sh", "-c", other.removeprefix("$ ")], check=True)
    words = shlex.split(line.removeprefix("$ "), comments=True)
    if words[1] == "run":
        assert {word for word in words[2:] if re.fullmatch("[a-z-]{3,}", word) and word[0] != "-"} <= set(library())
    # These take minutes together, which the fifteen of a check do not have; nothing else of a page is left out.
    if words[1] in SLOW and not NIGHTLY:
        pytest.skip("takes a while, and what is run has tests of its own: in the nightly run")
    code = re.search(r"exit code (\d)", line)
    assert run(words[1:]) == (int(code[1]) if code else 0)
    assert capsys.readouterr().out


def test_every_claim_has_a_verdict_a_source_and_a_command() -> None:
    table = [row for row in rows(CLAIMS) if row[0].isdigit()]
    assert [int(row[0]) for row in table] == list(range(1, 30))
    assert all(all(row) and "**" in row[2] for row in table)
    shown = {int(number) for line in SHOWN for number in re.findall(r"\d+(?=[,:]|$)", line.partition("  # ")[2])}
    assert shown >= set(range(1, 30))


@pytest.mark.parametrize("page", TRANSLATED, ids=name)
def test_a_translation_has_the_same_commands(page: Path) -> None:
    def typed(which: Path) -> list[str]:
        return [line.partition("  #")[0] for line in commands(which)]

    def links(which: Path) -> list[str]:
        """Where its links lead, in whichever language."""
        text = which.read_text(encoding="utf-8").replace(CHINESE, ".md")
        return sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {page.name})

    other = chinese(page)
    assert typed(page) == typed(other)
    assert links(page) == links(other)
    assert len(rows(page)) == len(rows(other))
    assert [row[0] for row in rows(page) if row[0].isdigit()] == [row[0] for row in rows(other) if row[0].isdigit()]
    for here, there in ((page, other), (other, page)):
        assert f"]({there.name})" in here.read_text(encoding="utf-8"), "each links the other"


def test_the_readmes_have_the_same_blocks() -> None:
    assert blocks(README) == blocks(chinese(README))
    marks = re.compile(r"^<!-- .* -->$", re.MULTILINE)
    texts = [page.read_text(encoding="utf-8") for page in (README, chinese(README))]
    assert marks.findall(texts[0]) == marks.findall(texts[1])


def test_a_chinese_page_is_chinese() -> None:
    pages = sorted(path for path in (*TOP.glob(f"*{CHINESE}"), *DOCS.rglob(f"*{CHINESE}")))
    assert [name(page) for page in pages] == ["README.zh-CN.md", "docs/claims.zh-CN.md"]
    for page in pages:
        assert len(re.findall(r"[\u4e00-\u9fff]", page.read_text(encoding="utf-8"))) > 1000
