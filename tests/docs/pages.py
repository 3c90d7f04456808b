"""The documentation as tests see it."""

import re
import subprocess
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
DOCS = TOP / "docs"
README = TOP / "README.md"
CHINESE = ".zh-CN.md"
PAGES = tuple(
    sorted((README, TOP / f"README{CHINESE}", TOP / "CONTRIBUTING.md", TOP / "CHANGELOG.md", *DOCS.rglob("*.md")))
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(TOP).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Fenced blocks: (language, text)."""
    return [(match[1], match[2]) for match in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """What a reader is told to type, line by line, without prompts."""
    lines = [line for language, text in blocks(page) if language in ("console", "sh") for line in text.splitlines()]
    return [line.removeprefix("$ ").strip() for line in lines]


def marked_command(mark: str) -> list[str]:
    """The blocks of the README that stand behind a mark."""
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^<!-- command: {mark} -->\n```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def tracked_files() -> list[Path]:
    """Files of the repository; without git, all that are not made by tools."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=TOP, capture_output=True, text=True
    )
    if listed.returncode == 0:
        return [path for part in listed.stdout.split("\0") if part and (path := TOP / part).is_file()]
    folders = ("mediator", "guests", "hv_models", "optee", "tests", "docs")
    inside = [path for folder in folders for path in (TOP / folder).rglob("*")]
    return [
        path
        for path in (*inside, *TOP.glob("*.*"), *(TOP / ".ci").glob("*"))
        if path.is_file() and path.suffix != ".pyc"
    ]


def anchors(page: Path) -> set[str]:
    """What `#...` can point to, as GitHub makes it from headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def rows(page: Path) -> list[list[str]]:
    """Cells of all tables of a page, heads included."""
    lines = [line for line in prose(page).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if set("".join(row)) - set("-: ")]
