"""Words that print themselves and lose nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optee.abi.message import Attr, ParamType
from optee.abi.registers import Named, Register, bit, bits, member_of, name_of, names_of
from optee.abi.results import Result
from optee.abi.smc import Function, FunctionId, NotificationStatus, Owner, SecCapability

U64 = st.integers(0, 2**64 - 1)
WORDS = pytest.mark.parametrize("kind", [Attr, FunctionId, NotificationStatus], ids=lambda kind: kind.__name__)


def value_of(field, text):
    """What a printed field value stands for."""
    if issubclass(field.kind, Named) and not text.startswith("0x"):
        return field.kind[text]
    return int(text, 0)


@WORDS
@given(word=U64)
def test_the_text_of_a_word_says_every_bit(kind, word):
    fields = {field.name: field for field in kind.fields}
    shown = 0
    for part in filter(None, str(kind(word)).split(", ")):
        name, _, text = part.partition("=")
        if name == "unknown":
            shown |= int(text, 0)
        elif name != "0":
            shown |= (value_of(fields[name], text) if text else 1) << fields[name].lsb
    assert shown == word


@WORDS
@given(word=U64)
def test_fields_rebuild_the_word(kind, word):
    parsed = kind(word)
    values = {field.name: getattr(parsed, field.name) for field in kind.fields}
    assert kind.build(**values) | parsed.unknown == word
    assert parsed == word


@pytest.mark.parametrize(
    ("word", "text"),
    [
        (Attr(0x20A), "type=TMEM_OUTPUT, NONCONTIG"),
        (Attr(0x101), "type=VALUE_INPUT, META"),
        (Attr(0), "type=NONE"),
        (Attr(4), "type=0x4"),
        (Attr(0x8000_0000_0003_0405), "type=RMEM_INPUT, cache=0x3, unknown=0x8000000000000400"),
        (FunctionId(Function.EXCHANGE_CAPABILITIES), "fast, owner=TRUSTED_OS, number=0x9"),
        (FunctionId(Function.CALL_WITH_ARG), "owner=TRUSTED_OS, number=0x4"),
        (FunctionId(0xF3010001), "fast, smc64, owner=0x33, number=0x1, unknown=0x10000"),
        (NotificationStatus(3), "VALID, PENDING"),
        (NotificationStatus(0), "0"),
    ],
)
def test_words_in_words(word, text):
    assert str(word) == f"{word}" == text
    assert repr(word) == f"<{type(word).__name__} {int(word):#x}: {text}>"


def test_build_makes_the_words_of_the_abi():
    assert Attr.build(type=ParamType.TMEM_OUTPUT, NONCONTIG=True) == 0x20A
    assert FunctionId.build(fast=True, owner=Owner.TRUSTED_OS, number=9) == Function.EXCHANGE_CAPABILITIES


def test_build_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"Attr.type cannot hold 0x100"):
        Attr.build(type=256)
    with pytest.raises(ValueError, match=r"Attr.META cannot hold"):
        Attr.build(META=2)
    with pytest.raises(ValueError, match="cannot hold"):
        Attr.build(type=-1)
    with pytest.raises(TypeError, match="no field 'colour'"):
        Attr.build(colour=1)


def test_declarations_are_checked():
    with pytest.raises(ValueError, match="overlaps"):

        class Overlapping(Register):
            low = bits(7, 0)
            inside = bit(3)

    with pytest.raises(ValueError, match="not a bit range"):
        bits(0, 7)


@given(st.integers(0, 2**32 - 1))
def test_an_unknown_value_stays_a_number_and_shows_in_hexadecimal(value):
    known = value in Result.__members__.values()
    assert member_of(Result, value) == value
    assert isinstance(member_of(Result, value), Result) == known
    assert name_of(Result, value) == (Result(value).name if known else hex(value))


@given(st.integers(0, 2**64 - 1))
def test_flag_names_cover_every_bit(value):
    names = names_of(SecCapability, value)
    assert sum(int(name, 0) if name.startswith("0x") else SecCapability[name] for name in names) == value
