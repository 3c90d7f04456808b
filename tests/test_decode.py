"""`mediator decode`: real traffic in words, and everything else decoded or refused."""

import gzip
import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mediator.decode import decode_list, decode_message, decode_registers, render
from optee.abi.message import Attr, Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, is_rpc
from tests.shared import SHARED, needs_shared

U64 = st.integers(0, 2**64 - 1)
A0 = st.sampled_from([*map(int, Function), *map(int, ReturnCode), *map(int, RpcReturn), 2**64 - 1])
REGISTERS = st.lists(U64 | st.integers(0, 16), max_size=7).flatmap(
    lambda rest: st.tuples(A0 | U64 | st.integers(0, 2**32 - 1), *map(st.just, rest))
)
ATTRS = st.builds(
    lambda kind, meta, noncontig: int(Attr.build(type=kind, META=meta, NONCONTIG=noncontig)),
    st.integers(0, 15),
    st.booleans(),
    st.booleans(),
)
PARAMS = st.builds(Param, ATTRS | U64, st.integers(0, 12) | U64, U64, U64)
MESSAGES = st.builds(
    lambda cmd, params: Message(cmd=cmd, params=params),
    st.integers(0, 25) | st.integers(0, 2**32 - 1),
    st.lists(PARAMS, max_size=6),
)


def table(rows):
    """Name -> what a row shows, in words where it has some."""
    return {row["name"]: row["words"] or row["value"] for row in rows}


def events(name):
    with gzip.open(SHARED / "traces" / name, "rt") as lines:
        next(lines)
        yield from map(json.loads, lines)


def memory(name, kind):
    for event in events(name):
        for entry in event.get("memory", ()):
            if entry["is"] == kind:
                yield bytes.fromhex(entry["hex"])


def numbers(registers):
    return [int(register, 16) for register in registers]


@pytest.mark.parametrize("a0", [*Function], ids=str)
def test_every_function_is_named(a0):
    decoded = decode_registers([a0])
    assert decoded["is"] == "call"
    assert decoded["name"] == a0.name
    assert decoded["function"]["fast"] == (a0 >> 31 == 1)
    assert decoded["function"]["owner"].startswith("TRUSTED_OS")


def test_a_call_is_said_in_words():
    assert render(decode_registers([0x32000013, 0xFFFF0000, 0x406C00, 0x80, 0, 0, 0, 2])) == (
        "call CALL_WITH_REGD_ARG: yielding, 32 bit, TRUSTED_OS\n"
        "  a0     function id  0x32000013\n"
        "  a1:a2  cookie       0xffff000000406c00\n"
        "  a3     offset       0x80\n"
        "  a7     client id    0x2"
    )


def test_a_function_that_is_not_optees_is_unknown_but_taken_apart():
    decoded = decode_registers([0xC4010003, 7])
    assert decoded["name"] == "0xc4010003"
    assert decoded["words"] == "unknown function, fast, 64 bit, STANDARD_SECURE_SERVICE"
    assert decoded["function"]["unknown_bits"] == "0x10000"
    assert table(decoded["rows"])["unused"] == "0x7"


def test_capabilities_are_listed():
    called = decode_registers([Function.EXCHANGE_CAPABILITIES, 1, 0, 0, 0, 0, 0, 3])
    assert table(called["rows"])["capabilities"] == "UNIPROCESSOR"
    answered = decode_registers([0, 0x800000F5, 66, 4], Function.EXCHANGE_CAPABILITIES)
    assert answered["words"] == "processed, answers EXCHANGE_CAPABILITIES"
    assert table(answered["rows"]) == {
        "code": "0x0",
        "capabilities": "HAVE_RESERVED_SHM, DYNAMIC_SHM, MEMREF_NULL, ASYNC_NOTIF, RPC_ARG, RPMB_PROBE, 0x80000000",
        "highest notification value": "0x42",
        "RPC parameters": "0x4",
    }


def test_readings_are_shown_one_by_one():
    assert render(decode_registers([0, 2])).splitlines()[:4] == [
        "answer OK: processed",
        "  a0  code  0x0",
        "  if it answers GET_SHM_CONFIG:",
        "    a1  address  0x2",
    ]


def test_an_answer_alone_has_every_reading_that_fits():
    readings = {entry["answers"]: table(entry["rows"]) for entry in decode_registers([0, 5, 3, 0])["readings"]}
    assert readings["GET_ASYNC_NOTIF_VALUE"] == {"notification value": "0x5", "status": "VALID, PENDING"}
    assert readings["EXCHANGE_CAPABILITIES"]["capabilities"] == "HAVE_RESERVED_SHM, DYNAMIC_SHM"
    assert readings["DISABLE_SHM_CACHE"]["cookie"] == "0x500000003"
    assert "GET_ASYNC_NOTIF_VALUE" not in {entry["answers"] for entry in decode_registers([0, 5, 4, 0])["readings"]}


@pytest.mark.parametrize(
    ("registers", "name", "fields"),
    [
        ([0xFFFF0000, 160, 0, 1], "ALLOC", {"size": "0xa0", "thread": "0x1"}),
        ([0xFFFF0002, 1, 2, 3], "FREE", {"cookie": "0x100000002", "thread": "0x3"}),
        ([0xFFFF0004, 0, 0, 5], "FOREIGN_INTR", {"thread": "0x5"}),
        ([0xFFFF0005, 1, 0, 2], "CMD", {"cookie": "0x100000000", "thread": "0x2"}),
        ([0xFFFF0005, 0, 0, 2], "CMD", {"cookie": "the RPC argument behind the message", "thread": "0x2"}),
        ([0xFFFF0001, 0, 0, 2], "0xffff0001", {"thread": "0x2"}),
    ],
)
def test_rpc_returns_have_their_fields(registers, name, fields):
    decoded = decode_registers(registers)
    assert (decoded["is"], decoded["name"]) == ("RPC", name)
    assert table(decoded["rows"]) == {"RPC": hex(registers[0]), **fields}


def test_codes_are_named_whatever_width_they_came_in():
    assert decode_registers([1])["words"] == "no free thread, try again later"
    assert decode_registers([0xFFFFFFFF])["name"] == "UNKNOWN_FUNCTION"
    assert decode_registers([2**64 - 1, 0]) | {"rows": []} == decode_registers([0xFFFFFFFF]) | {"rows": []}
    assert "x1 is 0x100000000" in render(decode_registers([0, 2**32]))


@pytest.mark.parametrize(
    ("registers", "error"),
    [
        ([], "registers: 0 given, a call has 1 to 8"),
        ([0] * 9, "registers: 9 given, a call has 1 to 8"),
        ([0, 2**64], "registers: x1 is 0x10000000000000000, a register holds 64 bits"),
        ([-1], "registers: x0 is -0x1, a register holds 64 bits"),
    ],
)
def test_registers_that_are_none_are_refused(registers, error):
    with pytest.raises(ValueError) as refusal:
        decode_registers(registers)
    assert str(refusal.value) == error


@given(REGISTERS, st.none() | st.sampled_from(Function))
def test_any_registers_are_decoded_and_none_is_lost(registers, answer_to):
    decoded = decode_registers(registers, answer_to)
    assert json.loads(json.dumps(decoded)) == decoded
    text = render(decoded)
    rows = decoded["rows"] + [row for reading in decoded.get("readings", ())[:1] for row in reading["rows"]]
    words = {}
    for row in rows:
        first, _, last = row["at"].replace("a", "").partition(":")
        value = int(row["value"], 16)
        if last:
            words[int(first)], words[int(last)] = value >> 32, value % 2**32
        else:
            words[int(first)] = value
    assert [words.get(index, 0) for index in range(len(registers))] == [value % 2**32 for value in registers]
    for index, value in enumerate(registers):
        if value >= 2**32 and (index or value != 2**64 - 1):
            assert f"x{index} is {value:#x}" in text
    assert all(line == line.rstrip() for line in text.splitlines())


@given(st.integers(0, 2**64 - 1))
def test_one_register_is_an_rpc_exactly_if_the_abi_says_so(a0):
    assert (decode_registers([a0])["is"] == "RPC") == is_rpc(a0)


def test_open_session_shows_uuids_and_login():
    ta = bytes.fromhex("8aaaf200245011e4abe20002a5d5c51b")
    client = bytes(range(16))
    params = [
        Param(0x101, *struct.unpack("<QQ", ta), 0),
        Param(0x101, *struct.unpack("<QQ", client), 0x80000000),
        Param(0x1, 7, 8, 9),
        Param(0x0),
    ]
    decoded = decode_message(Message(cmd=0, cancel_id=5, params=params).pack())["message"]
    assert decoded["command"] == "OPEN_SESSION"
    assert table(decoded["header"])["cancel_id"] == "0x5"
    assert [table(param["rows"]) for param in decoded["params"]] == [
        {"TA": "8aaaf200-2450-11e4-abe2-0002a5d5c51b"},
        {"client": "00010203-0405-0607-0809-0a0b0c0d0e0f", "login": "REE_KERNEL"},
        {"a": "0x7", "b": "0x8", "c": "0x9"},
        {},
    ]


def test_register_shm_shows_its_list():
    data = Message(cmd=4, params=[Param(0x20A, 0x5044C010, 4096 * 3, 0xFFFF000000406C00)]).pack()
    assert render(decode_message(data)).splitlines()[9:] == [
        "  parameter 0: type=TMEM_OUTPUT, NONCONTIG (buffer)",
        "    +0x28  buf_ptr  0x5044c010          list at 0x5044c000, data at byte 16 of its first page",
        "    +0x30  size     0x3000              12288 bytes in 4 pages",
        "    +0x38  shm_ref  0xffff000000406c00",
    ]


def test_null_memref_says_so():
    data = Message(cmd=1, params=[Param(0xA, 0, 0, 0)]).pack()
    assert table(decode_message(data)["message"]["params"][0]["rows"])["buf_ptr"] == "NULL"


def test_rpc_argument_behind_the_message_has_operations_and_operands():
    message = Message(cmd=1, params=[Param(0)])
    argument = Message(cmd=RpcCommand.FS, ret=0xFFFF0000, params=[Param(1, 3, 6, 0x2000), Param(6, 0, 512, 77)])
    decoded = decode_message(message.pack() + argument.pack() + bytes(64))
    rpc = decoded["rpc_argument"]
    assert (rpc["command"], rpc["operation"], rpc["size"]) == ("FS", "READ", 96)
    assert table(rpc["header"])["ret"] == "GENERIC"
    assert table(rpc["params"][0]["rows"]) == {"operation": "READ", "fd": "0x6", "offset": "0x2000"}
    assert rpc["params"][1]["content"] == "data"
    assert decoded["notes"] == ["64 more bytes, all zero"]
    assert decode_message(argument.pack(), rpc=True)["rpc_argument"] == rpc
    assert "RPC argument FS READ: 96 bytes" in render(decoded)


def test_rpc_without_operations_has_operands():
    request = Message(cmd=RpcCommand.SHM_ALLOC, params=[Param(1, 1, 4096, 8)])
    (param,) = decode_message(request.pack(), rpc=True)["rpc_argument"]["params"]
    assert table(param["rows"]) == {"type": "KERNEL", "size": "0x1000", "align": "0x8"}
    reply = Message(cmd=RpcCommand.SHM_ALLOC, params=[Param(0x20A, 0x1000, 4096, 8)])
    (param,) = decode_message(reply.pack(), rpc=True)["rpc_argument"]["params"]
    assert table(param["rows"])["shm_ref"] == "0x8"
    ta = bytes.fromhex("8aaaf200245011e4abe20002a5d5c51b")
    load = Message(cmd=RpcCommand.LOAD_TA, params=[Param(1, *struct.unpack("<QQ", ta), 0), Param(0xA)])
    image = decode_message(load.pack(), rpc=True)["rpc_argument"]
    assert table(image["params"][0]["rows"]) == {"uuid": "8aaaf200-2450-11e4-abe2-0002a5d5c51b"}


def test_what_is_unknown_is_shown():
    data = Message(cmd=99, ret=0x1234, params=[Param(0x1004, 1, 2, 3)]).pack()
    decoded = decode_message(data)["message"]
    assert decoded["command"] == "0x63"
    assert table(decoded["header"])["cmd"] == "unknown"
    assert table(decoded["header"])["ret"] == "0x1234"
    assert decoded["params"][0]["words"] == "type=0x4, unknown=0x1000"
    assert decoded["params"][0]["rows"][0]["value"] == struct.pack("<3Q", 1, 2, 3).hex()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "message: 0 bytes given, a header has 32"),
        (bytes(20), "message: 20 bytes given, a header has 32"),
        (bytes(28) + b"\2\0\0\0", "message: 32 bytes given, 2 parameters make 96"),
        (bytes(28) + b"\xff\xff\xff\xff", "message: 4294967295 parameters, at most 127 fit a page"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data, error):
    with pytest.raises(ValueError) as refusal:
        decode_message(data)
    assert str(refusal.value) == error


def test_what_follows_a_message_need_not_be_an_rpc_argument():
    decoded = decode_message(Message(cmd=2).pack() + b"\1" * 31)
    assert decoded["rpc_argument"] is None
    assert decoded["notes"] == [
        "no RPC argument behind the message (message: 31 bytes given, a header has 32)",
        "31 more bytes",
    ]


def parameter_bytes(param):
    """The 24 bytes that the rows of a decoded parameter show; a row not shown is zero."""
    base = min((int(row["at"], 16) for row in param["rows"]), default=0) & ~31 | 8
    data = bytearray(24)
    for row in param["rows"]:
        at = int(row["at"], 16) - base
        if row["name"] in ("TA", "client", "uuid"):
            data[at : at + 16] = bytes.fromhex(row["value"].replace("-", ""))
        elif row["name"] == "octets":
            data[at:] = bytes.fromhex(row["value"])
        else:
            data[at : at + 8] = int(row["value"], 16).to_bytes(8, "little")
    return bytes(data)


@given(MESSAGES, st.booleans())
@example(Message(cmd=RpcCommand.LOAD_TA, params=[Param(1, 2, 3, 4)]), True)
@example(Message(cmd=0, params=[Param(0x101, 2, 3, 4), Param(0x101, 2, 3, 4)]), False)
def test_any_message_is_decoded_and_no_byte_is_lost(message, rpc):
    data = message.pack()
    decoded = decode_message(data, rpc=rpc)
    assert json.loads(json.dumps(decoded)) == decoded
    assert render(decoded)
    argument = decoded["rpc_argument" if rpc else "message"]
    assert [int(row["value"], 16) for row in argument["header"]] == list(message.header)
    for param, shown in zip(message.params, argument["params"], strict=True):
        assert int(shown["attr"], 16) == param.attr
        assert parameter_bytes(shown) == struct.pack("<3Q", *param[1:])


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_message_or_refused(data, rpc):
    try:
        decoded = decode_message(data, rpc=rpc)
    except ValueError as refusal:
        assert str(refusal).startswith("message: ")
        assert "\n" not in str(refusal)
    else:
        assert render(decoded)


def addresses_of(decoded):
    for page in decoded["list_pages"]:
        for run in page["ranges"]:
            first, last = int(run["first"], 16), int(run["last"], 16)
            step = (last - first) // (run["pages"] - 1) if run["pages"] > 1 else 0
            yield from (first + index * step for index in range(run["pages"]))
        if page["next"] is not None:
            yield int(page["next"], 16)


@given(st.lists(st.integers(0, 6).map(lambda page: page * 4096) | U64, min_size=1, max_size=600))
def test_ranges_name_exactly_the_addresses(addresses):
    decoded = decode_list(struct.pack(f"<{len(addresses)}Q", *addresses))
    assert list(addresses_of(decoded)) == addresses
    assert decoded["entries"] == len(addresses) - len(addresses) // 512
    assert json.loads(json.dumps(decoded)) == decoded
    assert render(decoded)


def test_a_list_reads_in_ranges():
    entries = [0x1000, 0x2000, 0x3000, 0x8000, 0x8000, 0x7008, *[0] * 505, 0xA000, 0xB000]
    assert render(decode_list(struct.pack("<513Q", *entries))) == (
        "page list: 512 addresses\n"
        "  0x1000 to 0x3000  3 pages\n"
        "  0x8000            2 times\n"
        "  0x7008            1 page\n"
        "  0x0               505 times\n"
        "  next list page 0xa000\n"
        "  0xb000  1 page\n"
        "  note: 1 address not page aligned"
    )


@given(st.binary(max_size=40))
def test_any_bytes_are_a_list_or_refused(data):
    if data and len(data) % 8 == 0:
        assert render(decode_list(data))
    else:
        with pytest.raises(ValueError, match=f"^list: {len(data)} bytes given, an entry has 8$"):
            decode_list(data)


@needs_shared
@pytest.mark.parametrize("name", ["native.jsonl.gz", "xen.jsonl.gz"])
def test_all_recorded_registers_are_known(name):
    calls = {}
    for event in events(name):
        if event["e"] == "call":
            decoded = decode_registers(numbers(event["regs"]))
            assert decoded["is"] == "call"
            calls[event["id"]] = Function[decoded["name"]]
            assert all(row["name"] != "unused" for row in decoded["rows"] if row["at"] < "a4")
        elif event["e"] == "return":
            decoded = decode_registers(numbers(event["regs"]), calls[event["id"]])
            assert decoded["is"] in ("answer", "RPC")
            assert not decoded["name"].startswith("0x")


@needs_shared
@pytest.mark.parametrize("name", ["native.jsonl.gz", "xen.jsonl.gz"])
def test_all_recorded_messages_are_known(name):
    commands, operations = set(), set()
    for data in memory(name, "message"):
        argument = decode_message(data)["message"]
        commands.add(argument["command"])
        assert all("unknown" not in param["words"] for param in argument["params"])
    for data in memory(name, "rpc"):
        argument = decode_message(data, rpc=True)["rpc_argument"]
        operations.add((argument["command"], argument["operation"]))
        assert all(row["words"] != "unknown" for param in argument["params"] for row in param["rows"])
        assert all(row["words"] != "unknown" for row in argument["header"])
    assert {"OPEN_SESSION", "INVOKE_COMMAND", "CLOSE_SESSION", "REGISTER_SHM", "UNREGISTER_SHM"} <= commands
    assert {("LOAD_TA", None), ("SHM_ALLOC", None), ("FS", "READ"), ("FS", "OPEN")} <= operations
    assert not any(text.startswith("0x") for text in commands | {command for command, _ in operations})


@needs_shared
def test_recorded_lists_are_page_addresses():
    lists = list(memory("native.jsonl.gz", "list"))
    assert lists
    for data in lists:
        decoded = decode_list(data)
        assert not decoded["notes"]
        assert list(addresses_of(decoded)) == list(struct.unpack(f"<{len(data) // 8}Q", data))
