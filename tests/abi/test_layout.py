"""The construct declarations against the facts, and the struct codecs against the declarations."""

import struct

import pytest
from construct import ConstructError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optee.abi import layout, message
from optee.abi.message import HEADER, PARAM, Attr, Header, Message, Param, ParamType
from optee.abi.results import Result

from .facts import ABI

MSG = ABI["msg"]

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
KNOWN_ATTR = st.builds(
    lambda kind, meta, noncontig: Attr.build(type=kind, META=meta, NONCONTIG=noncontig),
    st.integers(0, 15),
    st.booleans(),
    st.booleans(),
)
PARAMS = st.builds(Param, KNOWN_ATTR | U64, U64, U64, U64)
MESSAGES = st.builds(Message, U32, U32, U32, U32, U32, U32, U32, st.lists(PARAMS, max_size=6))


def is_as_the_facts_say(members, facts, base):
    """Compare names, offsets and sizes of a structure's members."""
    sizes = {member.name: member.sizeof() for member in members.subcons}
    found = {name: (base + offset, sizes[name]) for name, offset in layout.offsets(members).items()}
    fields = {name: field for name, field in facts.items() if isinstance(field, dict)}
    return found == {name: (field["off"], field["size"]) for name, field in fields.items()}


def test_header_is_as_the_facts_say():
    facts = {name: field for name, field in MSG["optee_msg_arg"].items() if name != "params"}
    assert is_as_the_facts_say(layout.MESSAGE_HEADER, facts, 0)
    params = MSG["optee_msg_arg"]["params"]
    assert (params["off"], params["stride"]) == (message.HEADER_SIZE, message.PARAM_SIZE)
    assert params["off"] == message.OFFSET_PARAMS


@pytest.mark.parametrize(
    ("member", "facts"), [(layout.TMEM, "tmem"), (layout.RMEM, "rmem"), (layout.FMEM, "fmem"), (layout.VALUE, "value")]
)
def test_union_member_is_as_the_facts_say(member, facts):
    assert is_as_the_facts_say(member, MSG["optee_msg_param"][facts], MSG["optee_msg_param"]["union_off"])


def test_attribute_and_octets_are_as_the_facts_say():
    facts = MSG["optee_msg_param"]
    offsets = layout.offsets(layout.PLAIN_PARAMETER)
    assert offsets["attr"] == facts["attr"]["off"]
    assert offsets["a"] == facts["union_off"] == facts["octets"]["off"]
    assert layout.OCTETS.sizeof() == facts["octets"]["size"]


def test_page_list_is_as_the_facts_say():
    facts = MSG["noncontig"]
    assert layout.LIST_PAGE.sizeof() == layout.LIST_PAGE_SIZE == MSG["noncontig_page_size"]
    assert facts["entries_per_page"] == message.ENTRIES_PER_PAGE
    assert layout.offsets(layout.LIST_PAGE)["next"] == facts["next_index"] * 8
    assert MSG["max_num_params"] == message.MAX_PARAMS


def test_derived_offsets_are_the_facts():
    facts = MSG["optee_msg_arg"]
    assert facts["session"]["off"] == message.OFFSET_SESSION
    assert facts["ret"]["off"] == message.OFFSET_RET
    assert facts["ret_origin"]["off"] == message.OFFSET_RET_ORIGIN
    assert facts["num_params"]["off"] == message.OFFSET_NUM_PARAMS


def test_field_names_of_the_tuples_are_those_of_the_declarations():
    assert Header._fields == tuple(layout.offsets(layout.MESSAGE_HEADER))
    assert Param._fields == tuple(layout.offsets(layout.PLAIN_PARAMETER))


def test_codecs_are_struct_codecs_without_padding():
    assert isinstance(HEADER, struct.Struct)
    assert isinstance(PARAM, struct.Struct)
    assert (HEADER.size, PARAM.size) == (layout.MESSAGE_HEADER.sizeof(), layout.PLAIN_PARAMETER.sizeof())


def test_a_layout_that_depends_on_its_content_has_no_codec():
    with pytest.raises(TypeError, match="no struct format"):
        layout.codec(layout.PARAMETER)


def verdict(function, *arguments):
    """Return what a codec makes of its input, or that it refuses it."""
    try:
        return function(*arguments)
    except (struct.error, ValueError, ConstructError):
        return "refused"


def header_words(parsed):
    return tuple(int(parsed[name]) for name in Header._fields)


def param_words(parsed):
    """The four words of a parameter, whichever member of the union it was parsed as."""
    return (int(parsed.attr), *PARAM.unpack(layout.PARAMETER.build(parsed))[1:])


@given(st.binary(max_size=40))
def test_header_parses_alike(data):
    expected = verdict(lambda: header_words(layout.MESSAGE_HEADER.parse(data)))
    assert verdict(HEADER.unpack_from, data) == expected
    assert (expected == "refused") == (len(data) < 32)


@given(st.lists(U32 | st.sampled_from([-1, 2**32]), min_size=8, max_size=8))
def test_header_builds_alike(words):
    fields = dict(zip(Header._fields, words, strict=True))
    assert verdict(HEADER.pack, *words) == verdict(layout.MESSAGE_HEADER.build, fields)


@given(KNOWN_ATTR | U64, st.binary(min_size=24, max_size=24), st.integers(0, 32))
def test_parameter_parses_and_builds_alike(attr, union, missing):
    data = (attr.to_bytes(8, "little") + union)[: 32 - missing]
    found = verdict(lambda: PARAM.unpack(data))
    assert verdict(lambda: param_words(layout.PARAMETER.parse(data))) == found
    assert verdict(lambda: layout.PARAMETER.build(layout.PARAMETER.parse(data))) == ("refused" if missing else data)
    assert verdict(lambda: layout.PARAMETER_FFA.build(layout.PARAMETER_FFA.parse(data))) == (
        "refused" if missing else data
    )


@given(PARAMS)
def test_the_type_chooses_the_member_of_the_union(param):
    parsed = layout.PARAMETER.parse(PARAM.pack(*param))
    kind = parsed.attr.type
    if parsed.attr.META or kind not in ParamType.__members__.values() or kind == ParamType.NONE:
        assert bytes(parsed.u.octets) == struct.pack("<3Q", param.a, param.b, param.c)
    elif kind in (ParamType.TMEM_INPUT, ParamType.TMEM_OUTPUT, ParamType.TMEM_INOUT):
        assert (parsed.u.buf_ptr, parsed.u.size, parsed.u.shm_ref) == param[1:]
    elif kind in (ParamType.RMEM_INPUT, ParamType.RMEM_OUTPUT, ParamType.RMEM_INOUT):
        assert (parsed.u.offs, parsed.u.size, parsed.u.shm_ref) == param[1:]
    else:
        assert (parsed.u.a, parsed.u.b, parsed.u.c) == param[1:]


def message_verdict(parsed):
    return header_words(parsed.header), [param_words(param) for param in parsed.params]


def header_of(num_params):
    return bytes(28) + num_params.to_bytes(4, "little")


@given(st.builds(lambda n, rest: header_of(n) + rest, st.integers(0, 5) | U32, st.binary(max_size=170)) | st.binary())
@example(header_of(127) + bytes(127 * 32))
@example(header_of(127) + bytes(127 * 32 - 1))
@example(header_of(128) + bytes(128 * 32))
def test_message_parses_alike(data):
    def fast():
        found = Message.unpack(data)
        return tuple(found.header), [tuple(param) for param in found.params]

    assert verdict(fast) == verdict(lambda: message_verdict(layout.MESSAGE.parse(data)))


@given(MESSAGES)
def test_message_survives_both_codecs(original):
    data = original.pack()
    assert len(data) == message.message_size(len(original.params))
    assert Message.unpack(data) == original
    assert layout.MESSAGE.build(layout.MESSAGE.parse(data)) == data


@settings(max_examples=20)
@given(st.binary(min_size=4088, max_size=4096))
def test_list_page_parses_alike(data):
    codec = layout.codec(layout.LIST_PAGE)

    def declared():
        parsed = layout.LIST_PAGE.parse(data)
        return (*map(int, parsed.pages), int(parsed.next))

    assert verdict(codec.unpack, data) == verdict(declared)


@given(st.lists(U64, max_size=511))
def test_the_beginning_of_a_list_page_is_its_addresses(addresses):
    data = struct.pack(f"<{len(addresses)}Q", *addresses)
    assert list(layout.PARTIAL_LIST_PAGE.parse(data).pages) == addresses


def test_a_dump_reads_in_words():
    data = Message(cmd=4, ret=Result.BAD_PARAMETERS, ret_origin=77, params=[Param(0x20A, 0x5044C000, 4096, 9)]).pack()
    text = str(layout.MESSAGE.parse(data))
    assert "ret = BAD_PARAMETERS" in text
    assert "ret_origin = 0x0000004D" in text
    assert "attr = type=TMEM_OUTPUT, NONCONTIG" in text
    assert "buf_ptr = 0x000000005044C000" in text
