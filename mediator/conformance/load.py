"""Read vector files: one clear line for each mistake, with file, vector, step and field."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from hv_models.memory import PAGE_SHIFT, PAGE_SIZE
from mediator.conformance import vectors as v
from mediator.documents import DocumentError, in_words

MAX_SIZE: Final = 1 << 30
"""Bytes of an unpacked file: stops a small compressed file from filling memory."""
MAX_ERRORS: Final = 20
"""Lines about one file: stops a wrong file from filling a terminal."""


def read_json(path: Path) -> Any:
    """Read a JSON file, gzip'd or not.

    Raises:
        DocumentError: it cannot be read, or is not whole.

    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path, "rb") as file:
                data = file.read(MAX_SIZE + 1)
    except OSError as error:
        reason = "damaged gzip data" if isinstance(error, gzip.BadGzipFile) else error.strerror or str(error)
        raise DocumentError([f"{path}: {reason}"]) from None
    except (EOFError, zlib.error) as error:
        raise DocumentError([f"{path}: truncated or damaged gzip data ({error})"]) from None
    if len(data) > MAX_SIZE:
        raise DocumentError([f"{path}: larger than {MAX_SIZE >> 20} MiB"])
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_each_key_once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise DocumentError([f"{path}: not UTF-8 text, byte {error.start}"]) from None
    except json.JSONDecodeError as error:
        raise DocumentError([f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}"]) from None
    except RecursionError:
        raise DocumentError([f"{path}: nested too deeply"]) from None
    except ValueError as error:
        raise DocumentError([f"{path}: not JSON: {error}"]) from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return data


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def load_vectors(path: Path) -> v.Document:
    """Read and check a vector file.

    Raises:
        DocumentError: with the place of each thing that is wrong; of a step only the first.

    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != v.FORMAT:
        raise DocumentError([f"{path}: not a vector file: its format is not {v.FORMAT}"])
    try:
        document = v.Document.model_validate(data)
    except ValidationError as error:
        found = [(_place(data, problem["loc"]), in_words(problem)) for problem in error.errors(include_url=False)]
    else:
        found = [
            ((f"{_vector(number, vector.name)}, {where}", field), text)
            for number, vector in enumerate(document.vectors)
            for where, field, text in _impossible(vector)
        ]
        if not found:
            return document
    lines: dict[str, str] = {}
    for (where, field), text in found:
        lines.setdefault(where, f"{path}: {', '.join(filter(None, (where, field)))}: {text}")
    told = list(lines.values())[:MAX_ERRORS]
    if len(lines) > len(told):
        told[-1] = f"{path}: {len(lines) - len(told) + 1} more things are wrong"
    raise DocumentError(told)


def _vector(number: int, name: object) -> str:
    return f"vector {number} {name!r:.60}" if isinstance(name, str) else f"vector {number}"


def _place(data: Any, loc: Sequence[int | str]) -> tuple[str, str]:
    """Where in a file something is wrong: vector and step; field."""
    where, rest = [], list(loc)
    if len(rest) > 1 and rest[0] == "vectors" and isinstance(rest[1], int):
        vector = data["vectors"][rest[1]]
        where.append(_vector(rest[1], vector.get("name") if isinstance(vector, dict) else None))
        rest = rest[2:]
        if len(rest) > 1 and rest[0] == "steps" and isinstance(rest[1], int):
            step, rest = rest[1], rest[2:]
            op = rest.pop(0) if rest and rest[0] in v.OPS else None
            where.append(f"step {step}" + (f" ({op})" if op else ""))
    elif rest[:1] == ["vectors"]:
        where, rest = ["vectors"], []
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest).removeprefix(".")
    return ", ".join(where) or field, field if where else ""


def _impossible(vector: v.Vector) -> Iterator[tuple[str, str, str]]:
    """What each value allows, but not all of them together: step, field, what is wrong."""
    domains = {domain.id: domain for domain in vector.setup.domains}
    common = vector.setup.domains[0] if vector.setup.domains else v.Domain(id=0)
    mapped: set[tuple[int, int]] = set()
    for number, step in enumerate(vector.steps):
        where = f"step {number} ({step.op})"
        name: int | None = getattr(step, "domain", None)
        if name is not None and name not in domains:
            domains[name] = v.Domain(id=name, npages=64, base_gfn=common.base_gfn, perm=common.perm)
        if isinstance(step, v.P2m):
            if step.page_index is not None:
                mapped.add((step.domain, step.gfn))
                if step.page_index >= domains[step.domain].npages:
                    yield where, "page_index", f"domain {step.domain} has {domains[step.domain].npages} pages"
        elif isinstance(step, v.Flip):
            if step.offset + step.size > PAGE_SIZE:
                yield where, "offset", f"{step.size} bytes from {step.offset} are more than the page"
        elif isinstance(step, v.Smc):
            for index, write in enumerate(step.mem_writes):
                size = len(write.hex) + write.zeros_after
                outside = _outside(domains[step.domain], write.ipa, size, mapped)
                if outside is not None:
                    yield where, f"mem_writes[{index}].ipa", f"domain {step.domain} has no RAM at {outside:#x}"
            for index, change in enumerate(step.out.mem_changes):
                if change.domain not in domains:
                    yield where, f"out.mem_changes[{index}].domain", f"there is no domain {change.domain}"
                    continue
                outside = _outside(domains[change.domain], change.ipa, len(change.hex), ())
                if outside is not None:
                    text = f"domain {change.domain} has no RAM at {outside:#x}"
                    yield where, f"out.mem_changes[{index}].ipa", text


def _outside(domain: v.Domain, ipa: int, size: int, mapped: set[tuple[int, int]] | tuple[()]) -> int | None:
    """The first page of a range that is neither RAM of the domain nor mapped by a step, if there is one."""
    for gfn in range(ipa >> PAGE_SHIFT, (ipa + max(size, 1) - 1 >> PAGE_SHIFT) + 1):
        if not 0 <= gfn - domain.base_gfn < domain.npages and (domain.id, gfn) not in mapped:
            return gfn << PAGE_SHIFT
    return None
