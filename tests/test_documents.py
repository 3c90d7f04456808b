"""YAML documents: scalars are what they look like, everything else is an error with its place."""

import json
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel

from mediator import documents
from mediator.documents import MAX_ALIASES, MAX_DEPTH, DocumentError, load_document


class Anything(RootModel[Any]):
    pass


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    count: Annotated[int, Field(ge=0, le=10)]
    words: list[str] = []


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    inner: Inner
    flag: bool = False


def data(text: str) -> Any:
    return load_document(Anything, text, "f.yaml").root


def errors(text: str, model: type[BaseModel] = Anything) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        load_document(model, text, "f.yaml")
    lines = caught.value.lines
    assert lines and all(line.startswith("f.yaml:") and "\n" not in line for line in lines), lines
    assert str(caught.value) == "\n".join(lines)
    return lines


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-7", -7),
        ("1_000", 1000),
        ("0x20a", 0x20A),
        ("0xFFFF_0000", 0xFFFF0000),
        ("-0x10", -16),
        ("0o17", 15),
        ("1.5", 1.5),
        ("-0.25", -0.25),
        ("2.5e3", 2500.0),
        ("true", True),
        ("false", False),
        ("null", None),
        ("''", ""),
        ("'no'", "no"),
        ('"017"', "017"),
        ("'12:30'", "12:30"),
        ("'1e3'", "1e3"),
        ("'0x10'", "0x10"),
        ("|\n  17", "17"),
        (">\n  a\n  b", "a b"),
        ("plain words", "plain words"),
        ("CALL_WITH_ARG", "CALL_WITH_ARG"),
        ("0xyz", "0xyz"),
        ("2026-08-01", "2026-08-01"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1.", "1."),
        ("=", "="),
        ("<<", "<<"),
        ("[1, a, null]", [1, "a", None]),
        ("{a: 1, b: {c: x}}", {"a": 1, "b": {"c": "x"}}),
        ("a:", {"a": None}),
        ("a: # comment\n  - 1\n  - 2", {"a": [1, 2]}),
        ("1: one", {"1": "one"}),
        ("true: yes it is", {"true": "yes it is"}),
        ("a: &x 5\nb: *x", {"a": 5, "b": 5}),
        ("a: &x {k: 1}\nb: *x", {"a": {"k": 1}, "b": {"k": 1}}),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("---\na: 1\n", {"a": 1}),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    found = data(text)
    assert found == value and type(found) is type(value)


AMBIGUOUS = [
    *("no", "No", "NO", "yes", "Yes", "on", "off", "On", "OFF", "y", "n", "Y", "N", "True"),
    *("TRUE", "False", "Null", "NULL", "~", "017", "00", "-017", "+017", "0_1", "1e3", "1E3", "12e-4", "+1e3"),
    *("12:30", "1:2:3", "-12:30", "+5", "+0x10"),
]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_words_that_readers_disagree_about_are_refused_where_they_stand(text: str) -> None:
    (line,) = errors(f"a: 1\nb:\n  - {text}\n")
    assert line.startswith("f.yaml:3:5: ") and repr(text) in line
    assert data(f"- '{text}'") == [text]


def test_every_ambiguous_word_is_told_at_once() -> None:
    lines = errors("a: no\nb: 017\nc: [1e3, 12:30]\nd: fine\n")
    assert [line.split(": ")[0] for line in lines] == ["f.yaml:1:4", "f.yaml:2:4", "f.yaml:3:5", "f.yaml:3:10"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\na: 2", "2:1"),
        ("a: 1\nb: 2\na: 1", "3:1"),
        ("x:\n  a: 1\n  'a': 2", "3:3"),
        ("{a: 1, a: 2}", "1:8"),
        ("- a: 1\n  a: 2", "2:3"),
        ("1: a\n'1': b", "2:1"),
    ],
)
def test_a_key_that_stands_twice(text: str, place: str) -> None:
    (line,) = errors(text)
    assert line.startswith(f"f.yaml:{place}: ") and "twice" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("? [a, b]\n: 1", "one word"),
        ("? {a: 1}\n: 1", "one word"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: !!python/name:os.system ''", "tag"),
        ("a: !mine x", "tag"),
        ("a: !mine {b: 1}", "tag"),
        ("!mine\na: 1", "tag"),
        ("a: b: c", ""),
        ("a: [1, 2", ""),
        ("a: 'open", ""),
        ("a: *unknown", ""),
        ("a:\n\t- 1", ""),
        ("\ta: 1", ""),
        ("a: &x [*x]", ""),
        ("a: 1\n---\nb: 2", ""),
        ("%YAML 9.9\n---\na: 1", ""),
        ("a: @b", ""),
        ("a: `b", ""),
        ("{", ""),
        ("]", ""),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text: str, words: str) -> None:
    (line,) = errors(text)
    assert words in line
    place = line.split(":")[1:3]
    assert all(part.strip().isdigit() for part in place), line


@pytest.mark.parametrize("tag", ["!!int", "!!bool", "!!float", "!!null", "!!binary", "!!set", "!!omap", "!!timestamp"])
def test_tags_of_yamls_own_change_nothing_or_are_refused(tag: str) -> None:
    """What is read is what is written there, or nothing at all: never what a tag makes of it."""
    try:
        assert data(f"a: {tag} '12'") in ({"a": "12"}, {"a": 12})
    except DocumentError as error:
        assert len(error.lines) == 1


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_document(text: str) -> None:
    assert len(errors(text, Outer)) >= 1


@pytest.mark.parametrize("text", ["\x00", "a: \x00b", "\x07", "a: \x1b[31m", "\ud800", "a: \x9f"])
def test_binary_is_no_document(text: str) -> None:
    (line,) = errors(text)
    assert all(character.isprintable() for character in line)


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (line,) = errors("\n".join(levels))
    assert "aliases" in line


def test_a_bomb_of_scalars_is_bounded_as_well() -> None:
    """Aliases of one long word: what is read is as large as what is written, or refused."""
    text = "a: &a " + "x" * 1000 + "\nb: [" + ", ".join(["*a"] * 1000) + "]"
    found = data(text)
    assert all(word is found["b"][0] for word in found["b"]) or len(found["b"]) <= MAX_ALIASES


@pytest.mark.parametrize("count", [MAX_ALIASES, MAX_ALIASES + 1])
def test_a_few_aliases_are_fine(count: int) -> None:
    text = "a: &a [1]\nb: [" + ", ".join(["*a"] * count) + "]"
    if count <= MAX_ALIASES:
        assert data(text)["b"] == [[1]] * count
    else:
        assert "aliases" in errors(text)[0]


@pytest.mark.parametrize(
    ("start", "end", "depth"),
    [("[", "]", 10_000), ("[", "]", MAX_DEPTH + 1), ("{a: ", "}", 1000), ("[{a: ", "}]", MAX_DEPTH)],
)
def test_depth_is_bounded(start: str, end: str, depth: int) -> None:
    (line,) = errors(start * depth + "1" + end * depth)
    assert "deep" in line or "not YAML" in line


def test_depth_in_block_style_is_bounded() -> None:
    text = "\n".join("  " * level + "a:" for level in range(500)) + " 1"
    (line,) = errors(text)
    assert "deep" in line


def test_a_document_of_the_greatest_depth() -> None:
    depth = MAX_DEPTH
    found = data("[" * depth + "1" + "]" * depth)
    for _ in range(depth):
        (found,) = found
    assert found == 1


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_SIZE", 1000)
    assert data("a: " + "x" * 900)
    (line,) = errors("a: " + "x" * 1000)
    assert "larger than" in line


def test_a_number_of_any_length() -> None:
    """Python refuses to read thousands of digits; so do we, in one line."""
    for digits in ("9" * 4000, "9" * 5000, "0x" + "f" * 5000):
        try:
            assert data(f"a: {digits}")["a"] > 0
        except DocumentError as error:
            assert len(error.lines) == 1 and error.lines[0].startswith("f.yaml:1:4")


GOOD = "name: a\ninner:\n  count: 3\n  words: [p, q]\n"


def test_a_document_becomes_its_model() -> None:
    found = load_document(Outer, GOOD, "f.yaml")
    assert found == Outer(name="a", inner=Inner(count=3, words=["p", "q"]))


@pytest.mark.parametrize(
    ("old", "new", "places"),
    [
        ("count: 3", "count: 11", ["3:10"]),
        ("count: 3", "count: three", ["3:10"]),
        ("count: 3", "count: 3.0", ["3:10"]),
        ("count: 3", "count: '3'", ["3:10"]),
        ("count: 3", "count: true", ["3:10"]),
        ("count: 3", "count:", ["3:9"]),
        ("count: 3", "amount: 3", ["3:3", "3:11"]),
        ("[p, q]", "[p, 5, q, 6]", ["4:14", "4:20"]),
        ("[p, q]", "p", ["4:10"]),
        ("name: a", "name: 5", ["1:7"]),
        ("name: a", "nom: a", ["1:1", "1:6"]),
        ("name: a", "name: a\nflag: 1", ["2:7"]),
        ("name: a", "name: a\nflag: 'true'", ["2:7"]),
    ],
)
def test_errors_of_the_model_have_their_places(old: str, new: str, places: list[str]) -> None:
    assert old in GOOD
    found = {":".join(line.split(":")[1:3]) for line in errors(GOOD.replace(old, new), Outer)}
    assert found == set(places)


def test_all_errors_at_once_in_every_layer() -> None:
    lines = errors("name: 5\nname: 6\ninner:\n  count: 011\n  words: [no, 1]\nflags: true\n", Outer)
    text = "\n".join(lines)
    for place in ("2:1", "1:7", "4:10", "5:11", "5:15", "6:8"):
        assert f"f.yaml:{place}: " in text, (place, text)


@pytest.mark.parametrize("text", ["5", "[1]", "words", "null"])
def test_another_kind_of_document(text: str) -> None:
    (line,) = errors(text, Outer)
    assert line.startswith("f.yaml:1:1: ")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        load_document(Outer, text, "f.yaml")
    except DocumentError as error:
        assert error.lines and all("\n" not in line and line.startswith("f.yaml:") for line in error.lines)


_KEYS = st.text("abcxyz", min_size=1, max_size=4)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abcXYZ_09 -:.#'\"\n\u00e9", max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(_PLAIN)
def test_what_json_writes_is_read_as_it_was(value: object) -> None:
    """JSON is YAML without traps: numbers plain, all text quoted."""
    assert data(json.dumps(value)) == value


@settings(max_examples=100, deadline=None)
@given(_PLAIN)
def test_what_pyyaml_writes_is_read_as_it_was_or_refused(value: object) -> None:
    try:
        found = data(yaml.safe_dump(value))
    except DocumentError:
        return
    assert found == value
