"""What was decoded, as lines of text."""

from collections.abc import Iterable, Iterator, Sequence

from mediator.decode._rows import Decoded, Row, count


def render(decoded: Decoded) -> str:
    """Return what one of the functions above found as lines of text."""
    lines = {"registers": _registers_text, "message": _message_text, "list": _list_text}[decoded["kind"]]
    return "\n".join([*lines(decoded), *(f"  note: {note}" for note in decoded["notes"])])


def _table(lines: Iterable[Sequence[str]], indent: int) -> Iterator[str]:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        yield (" " * indent + "  ".join(cells)).rstrip()


def _row_table(rows: Iterable[Row], indent: int) -> Iterator[str]:
    return _table(((row["at"], row["name"], row["value"], row["words"]) for row in rows), indent)


def _registers_text(decoded: Decoded) -> Iterator[str]:
    yield f"{decoded['is']} {decoded['name']}: {decoded['words']}"
    yield from _row_table(decoded["rows"], 2)
    for reading in decoded.get("readings", ()):
        yield f"  if it answers {reading['answers']}:"
        yield from _row_table(reading["rows"], 4)


def _message_text(decoded: Decoded) -> Iterator[str]:
    for title, argument in (("message", decoded["message"]), ("RPC argument", decoded["rpc_argument"])):
        if argument is None:
            continue
        operation = f" {argument['operation']}" if argument["operation"] else ""
        yield f"{title} {argument['command']}{operation}: {argument['size']} bytes"
        yield from _row_table(argument["header"], 2)
        for index, param in enumerate(argument["params"]):
            content = f" ({param['content']})" if param["content"] else ""
            yield f"  parameter {index}: {param['words']}{content}"
            yield from _row_table(param["rows"], 4)


def _list_text(decoded: Decoded) -> Iterator[str]:
    yield f"page list: {count(decoded['entries'], 'address')}"
    for page in decoded["list_pages"]:
        yield from _table((_range_cells(run) for run in page["ranges"]), 2)
        if page["next"] is not None:
            yield f"  next list page {page['next']}"


def _range_cells(run: Decoded) -> tuple[str, str]:
    if run["first"] == run["last"]:
        return run["first"], f"{run['pages']} times" if run["pages"] > 1 else "1 page"
    return f"{run['first']} to {run['last']}", count(run["pages"], "page")
