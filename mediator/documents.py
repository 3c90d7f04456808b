"""YAML documents of users: strict, with all errors at once and the place of each.

YAML 1.1 has traps that an ABI document is full of: `no` is false, `017` is fifteen, `1e3` is text, `12:30` is
750, a repeated key wins silently, aliases blow up. Here scalars are what they look like (decimal, 0x, 0o,
true, false, null, everything else text) and the rest is an error.
"""

import re
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Final, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

MAX_SIZE: Final = 4 << 20
"""Characters of one document: stops a file from eating memory before it is looked at."""
MAX_FILE: Final = 16 << 20
"""Bytes of a file of any kind: stops a device or a wrong file from filling memory."""
MAX_DEPTH: Final = 32
"""Nesting of one document: stops recursion."""
MAX_DIGITS: Final = 128
"""Digits of one number: stops conversions that take for ever."""
MAX_ALIASES: Final = 64
"""Aliases of one document: stops alias bombs."""

_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)\Z")
_FLOAT: Final = re.compile(r"-?(0|[1-9][0-9]*)\.[0-9]+([eE][-+]?[0-9]+)?\Z")
_AMBIGUOUS: Final = re.compile(
    r"(y|n|yes|no|on|off|true|false|null|~|[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?[0-9]+(:[0-5]?[0-9])+|\+[0-9].*)\Z",
    re.IGNORECASE,
)
_WORDS: Final = {"true": True, "false": False, "null": None}
_TAGS: Final = frozenset({"tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"})

Data = dict[str, "Data"] | list["Data"] | str | int | float | bool | None
Path = tuple[int | str, ...]
M = TypeVar("M", bound=BaseModel)

_PLAIN: Final = {
    "missing": "missing",
    "extra_forbidden": "no such key",
    "string_type": "text is wanted",
    "int_type": "a whole number is wanted",
    "int_from_float": "a whole number is wanted",
    "float_type": "a number is wanted",
    "finite_number": "a finite number is wanted",
    "bool_type": "true or false is wanted",
    "dict_type": "a mapping is wanted",
    "model_type": "a mapping is wanted",
    "model_attributes_type": "a mapping is wanted",
    "list_type": "a list is wanted",
    "literal_error": "{expected} is wanted",
    "enum": "{expected} is wanted",
    "greater_than_equal": "{ge} or more is wanted",
    "less_than_equal": "{le} or less is wanted",
    "greater_than": "more than {gt} is wanted",
    "less_than": "less than {lt} is wanted",
    "string_pattern_mismatch": "text such as {pattern} is wanted",
    "string_too_short": "{min_length} characters or more are wanted",
    "string_too_long": "{max_length} characters or less are wanted",
    "too_short": "{min_length} or more are wanted",
    "too_long": "{max_length} or less are wanted",
}
"""What pydantic's errors say to whoever wrote the document, and does not know what reads it."""


class DocumentError(Exception):
    """A document is wrong; `lines` has one clear line for each error."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class SchemaError(DocumentError):
    """The document is YAML, but does not fit its model. wrong: the path of each thing that does not."""

    def __init__(self, lines: list[str], data: Data, wrong: list[Path], places: "Places") -> None:
        super().__init__(lines)
        self.data = data
        self.wrong = wrong
        self.places = places


class Problems(ValueError):
    """Several things are wrong in a piece of a document: where in it, and what."""

    def __init__(self, found: Sequence[tuple[Path, str]]) -> None:
        super().__init__("; ".join(f"{_label(path)}: {text}" for path, text in found))
        self.found = found

    @classmethod
    def of(cls, error: ValidationError) -> "Problems":
        """What a model says of such a piece."""
        return cls([(tuple(each["loc"]), in_words(each)) for each in error.errors(include_url=False)])


def said(value: object) -> str:
    """What stands in a document, for a message."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None:
        return "nothing"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def in_words(problem: ErrorDetails) -> str:
    """What is wrong, in the words of the document's writer."""
    plain = _PLAIN.get(problem["type"])
    if plain is not None:
        return plain.format(**problem.get("ctx", {}))
    text = problem["msg"].removeprefix("Value error, ")
    return text if text != problem["msg"] else text[:1].lower() + text[1:]


def _label(path: Path) -> str:
    return ".".join(map(str, path))


def read_bytes(path: FilePath) -> bytes:
    """A whole file of reasonable size. Raises DocumentError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise DocumentError([f"{path}: {error.strerror or error}"]) from None
    if len(data) > MAX_FILE:
        raise DocumentError([f"{path}: larger than {MAX_FILE >> 20} MiB"])
    return data


def read_document(path: FilePath) -> str:
    """The text of a document. Raises DocumentError, with file:line:column where it is no UTF-8."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = _place(before)
        raise DocumentError([f"{path}:{line + 1}:{column + 1}: not UTF-8 text"]) from None


class _Loader(yaml.CSafeLoader):
    """Scalars stay text: `_Reader` decides what they are."""


_Loader.yaml_implicit_resolvers = {}


class _Reader:
    """Turns a node tree into plain data and remembers where each piece stood."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors: list[str] = []
        self.places: dict[Path, yaml.Mark] = {}
        self._seen: dict[int, int] = {}

    def read(self, node: yaml.Node, path: Path, depth: int) -> Data:
        self.places[path] = node.start_mark
        if depth > MAX_DEPTH:
            raise DocumentError([self.at(node.start_mark, f"nested deeper than {MAX_DEPTH}")])
        if not isinstance(node, yaml.ScalarNode):
            aliases = self._seen.get(id(node), -1) + 1
            self._seen[id(node)] = aliases
            if aliases and sum(self._seen.values()) > MAX_ALIASES:
                raise DocumentError([self.at(node.start_mark, f"more than {MAX_ALIASES} aliases")])
        if node.tag not in _TAGS:
            self.errors.append(self.at(node.start_mark, f"the tag {node.tag} is not known"))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> Data:
        data: dict[str, Data] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.errors.append(self.at(key_node.start_mark, "a key is one word"))
                continue
            key = str(key_node.value)
            if key in data:
                self.errors.append(self.at(key_node.start_mark, f"the key {key!r} stands here twice"))
                continue
            data[key] = self.read(value_node, (*path, key), depth + 1)
        return data

    def _scalar(self, node: yaml.ScalarNode) -> Data:
        text = str(node.value)
        if node.style in ("'", '"', "|", ">"):
            return text
        if text in _WORDS:
            return _WORDS[text]
        if text == "":
            return None
        if _INTEGER.match(text):
            if len(text) > MAX_DIGITS:
                self.errors.append(self.at(node.start_mark, f"a number of {len(text)} digits"))
                return None
            return int(text.replace("_", ""), 0)
        if _FLOAT.match(text):
            return float(text)
        if _AMBIGUOUS.match(text):
            self.errors.append(
                self.at(
                    node.start_mark,
                    f"{text!r} means different things to different readers: quote it or write it plainly",
                )
            )
        return text

    def at(self, mark: yaml.Mark | None, text: str) -> str:
        return f"{self.name}: {text}" if mark is None else self.at_place(mark.line, mark.column, text)

    def at_place(self, line: int, column: int, text: str) -> str:
        return f"{self.name}:{line + 1}:{column + 1}: {text}"

    def nearest(self, path: Path) -> yaml.Mark | None:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path)


class Places:
    """Where each piece of a document stands, by its path of keys and indices."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def line(self, path: Path) -> str:
        """file:line of a piece, or of the nearest one around it."""
        mark = self._reader.nearest(path)
        return self._reader.name if mark is None else f"{self._reader.name}:{mark.line + 1}"

    def error(self, path: Path, text: str) -> str:
        """A line about something that is wrong there, with file:line:column."""
        return self._reader.at(self._reader.nearest(path), text)


def load_document(model: type[M], text: str, name: str) -> M:
    """Read one YAML document into a pydantic model.

    Raises:
        DocumentError: with file:line:column for each thing that is wrong.

    """
    return load_located(model, text, name)[0]


def load_located(model: type[M], text: str, name: str) -> tuple[M, Places]:
    """The same, with the places of its pieces. Raises DocumentError."""
    reader = _Reader(name)
    if len(text) > MAX_SIZE:
        raise DocumentError([reader.at_place(0, 0, f"larger than {MAX_SIZE >> 20} MiB")])
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise DocumentError([reader.at(error.problem_mark, str(error.problem or error.context))]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0]
        found = yaml.reader.Reader.NON_PRINTABLE.search(text)
        where = (0, 0) if found is None else _place(text[: found.start()])
        raise DocumentError([reader.at_place(*where, f"not YAML: {first}")]) from None
    if node is None:
        raise DocumentError([reader.at_place(0, 0, "empty")])
    data = reader.read(node, (), 0)
    try:
        document = model.model_validate(data)
    except ValidationError as error:
        wrong = []
        for problem in error.errors(include_url=False):
            whole = _path(tuple(problem["loc"]), data)
            cause = problem.get("ctx", {}).get("error")
            pieces = cause.found if isinstance(cause, Problems) else [((), in_words(problem))]
            for piece, message in pieces:
                path = (*whole, *piece)
                label = _label(path)
                reader.errors.append(reader.at(reader.nearest(path), f"{label}: {message}" if label else message))
                wrong.append(path)
        raise SchemaError(reader.errors, data, wrong, Places(reader)) from None
    if reader.errors:
        raise DocumentError(reader.errors)
    return document, Places(reader)


def _place(before: str) -> tuple[int, int]:
    """Line and column, counted from 0, of what comes after this text."""
    lines = before.splitlines(keepends=True) or [""]
    return (len(lines), 0) if lines[-1].endswith(("\n", "\r")) else (len(lines) - 1, len(lines[-1]))


def _path(location: Path, data: Data) -> Path:
    """The keys and indices of a location. Pydantic also names the branch that a union took: in angle brackets, or
    where the document has no more keys.
    """
    kept: list[int | str] = []
    for part in location:
        if isinstance(part, str) and not (isinstance(data, dict) and (part in data or not part.startswith("<"))):
            continue
        kept.append(part)
        if isinstance(data, dict) and isinstance(part, str):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            data = None
    return tuple(kept)
