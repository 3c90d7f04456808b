"""Every Python block of these pages runs as it stands, and prints what the page says."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("how-to/first-guest.md", "how-to/hostile-guest.md", "how-to/write-a-ta.md", "how-to/rpmb.md", "optee-model.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_blocks(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "page"}
    ran = 0
    for kind, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if kind == "python":
            assert capsys.readouterr().out == "", "a block's output is not shown"
            exec(compile(text, page, "exec"), names)
            ran += 1
        elif kind == "text":
            assert capsys.readouterr().out == text
    assert capsys.readouterr().out == ""
    assert ran or page == "optee-model.md"


@pytest.mark.parametrize(("page", "title"), [("how-to/hostile-guest.md", "main"), ("how-to/write-a-ta.md", "class")])
def test_twenty_lines(page: str, title: str) -> None:
    """What the pages call 20 lines are about as many: imports and blank lines are not counted."""
    first = next(text for kind, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")) if kind == "python")
    lines = [line for line in first.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert title in first and len(lines) <= 24
