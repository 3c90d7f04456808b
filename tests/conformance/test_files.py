"""Vector files that are no good: one clear line, and what can be read runs to its end."""

import gzip
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mediator.conformance.compare import compare
from mediator.conformance.load import load_vectors, read_json
from mediator.documents import DocumentError
from tests.conformance.documents import (
    FORMAT,
    answer,
    call,
    create,
    message,
    page,
    probe,
    relinquish,
    smc,
    vector,
    write,
    xen,
)


def run(path: Path) -> None:
    compare(load_vectors(path), xen())


def refusal(path: Path) -> list[str]:
    """The lines of the error; each one line, and each says which file."""
    with pytest.raises(DocumentError) as caught:
        run(path)
    lines = caught.value.lines
    assert lines and all(line.startswith(str(path)) and "\n" not in line for line in lines), lines
    return lines


def good() -> dict[str, Any]:
    p2m = {"op": "p2m", "domain": 1, "gfn": "0x40005", "type": "mmio"}
    flip = {"op": "flip", "domain": 1, "gfn": "0x40000", "nth_lookup": 1, "offset": 28, "value": "0x1", "size": 4}
    fault = {"op": "alloc_fault", "heap_page_alloc_nth": -1, "xzalloc_nth": -1}
    data = message(1, (1, 2, 3, 4))
    asked = call(page(0), data, answers=[answer(0, writes=[("arg:0", 20, "00000000")])])
    return vector(probe(), create(), p2m, flip, fault, asked, smc(0xB2000007), relinquish())


def test_the_good_one_runs(tmp_path: Path) -> None:
    run(write(tmp_path / "v.json", good()))


# What cannot be read at all


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"\x00\x01\x02\xff", "UTF-8"),
        (b"\x1f\x8b", "gzip"),
        (b"\x1f\x8b\x08\x00garbage", "gzip"),
        (gzip.compress(b'{"format": "xen-optee-mediator-vectors/1"', mtime=0)[:-9], "gzip"),
        (gzip.compress(b"x" * 1000, mtime=0)[:-1], "gzip"),
        (gzip.compress(b"{" * 50, mtime=0), "not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"format": 1}', "format"),
        (b'{"format": "optee-smc-trace/1"}', "format"),
        (b"[]", "format"),
        (b"null", "format"),
        (b"17", "format"),
        (b'{"format": "xen-optee-mediator-vectors/1"}', "vectors"),
        (b'{"format": "xen-optee-mediator-vectors/1", "vectors": 3}', "vectors"),
        (b'{"format": "xen-optee-mediator-vectors/1", "vectors": [3]}', "vector 0"),
        (b'{"a": 1' + b"0" * 5000 + b"}", ""),
    ],
)
def test_a_file_that_is_no_vector_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "v.json.gz"
    path.write_bytes(content)
    assert words in refusal(path)[0]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.json")[0]
    assert "directory" in refusal(tmp_path)[0]


def test_a_damaged_archive(tmp_path: Path) -> None:
    """Each byte of a small gzip'd file changed: refused, or (in its header) without meaning; never anything else."""
    whole = gzip.compress(json.dumps({"format": FORMAT, "vectors": []}).encode(), mtime=0)
    path = tmp_path / "v.json.gz"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            read_json(path)
        except DocumentError as error:
            assert len(error.lines) == 1


def test_an_archive_that_unpacks_to_more_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mediator.conformance.load.MAX_SIZE", 1 << 16)
    path = tmp_path / "v.json.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 17)))
    assert "larger than" in refusal(path)[0]


# Values that are out of range


DOMAIN_CHANGES = [
    ("id", 65535),
    ("id", -1),
    ("id", 1 << 40),
    ("npages", 0),
    ("npages", -1),
    ("npages", 1 << 19),
    ("npages", 1 << 60),
    ("npages", 1.5),
    ("base_gfn", "0xfffffffffffff"),
    ("base_gfn", "0xfffffffff"),
    ("base_gfn", hex(1 << 36)),
    ("base_gfn", hex(1 << 51)),
    ("base_gfn", hex(1 << 63)),
    ("base_gfn", "-0x1"),
    ("base_gfn", "zero"),
    ("base_gfn", None),
    ("perm", "0xffffffffffffffff"),
    ("perm", "0x40000000"),
]


@pytest.mark.parametrize(("key", "value"), DOMAIN_CHANGES, ids=str)
def test_a_domain_that_cannot_be(tmp_path: Path, key: str, value: object) -> None:
    described = good()
    described["setup"]["domains"][0][key] = value
    assert len(refusal(write(tmp_path / "v.json", described))) >= 1


def test_a_domain_that_is_described_twice(tmp_path: Path) -> None:
    described = good()
    described["setup"]["domains"] *= 2
    refusal(write(tmp_path / "v.json", described))


def test_domains_whose_ram_has_no_place_beside_the_devices(tmp_path: Path) -> None:
    """A base of 0 with RAM up to the interrupt controller and over it is fine; frames are the vector's own matter."""
    described = vector(
        probe(), create(), relinquish(), domains=[{"id": 1, "npages": 0x4000, "base_gfn": "0x0", "perm": "0x0"}]
    )
    run(write(tmp_path / "v.json", described))


STEP_CHANGES = [
    (0, "op", "restart"),
    (0, "op", None),
    (1, "domain", 65535),
    (1, "domain", 70000),
    (1, "domain", -1),
    (1, "domain", "one"),
    (2, "domain", 65535),
    (2, "domain", -7),
    (2, "gfn", "0xffffffffffffffff"),
    (2, "gfn", hex(1 << 51)),
    (2, "gfn", hex(1 << 36)),
    (2, "gfn", "0x90000"),
    (2, "type", "rom"),
    (2, "page_index", 64),
    (2, "page_index", 1 << 32),
    (2, "page_index", -1),
    (3, "domain", 1 << 20),
    (3, "offset", 4096),
    (3, "offset", -1),
    (3, "size", 0),
    (3, "size", 9),
    (3, "value", hex(1 << 64)),
    (3, "nth_lookup", -1),
    (4, "xzalloc_nth", -2),
    (4, "heap_page_alloc_nth", "x"),
    (5, "domain", 65535),
    (5, "domain", -1),
    (5, "regs", ["0x0"] * 7),
    (5, "regs", ["0x0"] * 9),
    (5, "regs", ["0x10000000000000000"] * 8),
    (5, "regs", [-1] * 8),
    (5, "regs", "0x0"),
    (5, "mem_writes", [{"ipa": "0x0"}]),
    (5, "mem_writes", [{"ipa": "0x40000000", "hex": "0"}]),
    (5, "mem_writes", [{"ipa": "0x40000000", "hex": "zz"}]),
    (5, "mem_writes", [{"ipa": "0x40000000", "hex": "00", "zeros_after": -1}]),
    (5, "mem_writes", [{"ipa": "0x40000000", "hex": "00", "zeros_after": 1 << 40}]),
    (5, "out", None),
    (7, "domain", 65535),
    (7, "domain", -1),
    (7, "preempt_after", "never"),
]
RUNS = {(2, "gfn"), (2, "page_index")}


@pytest.mark.parametrize(("step", "key", "value"), STEP_CHANGES, ids=str)
def test_a_step_that_cannot_be(tmp_path: Path, step: int, key: str, value: object) -> None:
    """Refused in one line that names the step, before or while it runs: never a traceback."""
    described = good()
    described["steps"][step][key] = value
    path = write(tmp_path / "v.json", described)
    if (step, key) in RUNS and value not in (-1, "0xffffffffffffffff"):
        # A frame that the domain has not: refused as well, or a step without any effect.
        try:
            run(path)
        except DocumentError as error:
            assert len(error.lines) == 1
        return
    (line,) = refusal(path)[:1]
    assert f"step {step}" in line


@pytest.mark.parametrize("regs", ["0xffffffffffffffff", "0x32000004", "0xc3"])
def test_a_domain_that_no_step_created_may_be_anything(tmp_path: Path, regs: str) -> None:
    run(write(tmp_path / "v.json", vector(probe(), create(), smc(int(regs, 16), domain=300), relinquish())))


@pytest.mark.parametrize(
    "writes",
    [
        [["arg:0", 4090, "00" * 16]],
        [["arg:0", 4096, "00"]],
        [["arg:0", 0, "00" * 4097]],
        [["arg:0", -1, "00"]],
        [["arg:99", 0, "00"]],
        [["rpc:zz", 0, "00"]],
        [["rpc:", 0, "00"]],
        [["rpc:ffffffffffffffffffff", 0, "00"]],
        [["heap", 0, "00"]],
        [["", 0, "00"]],
        [["arg:0", 0, "0"]],
        [["arg:0", 0]],
        [17],
    ],
)
def test_writes_of_the_secure_world_that_cannot_be(tmp_path: Path, writes: object) -> None:
    described = good()
    described["steps"][5]["out"]["forwarded"][0]["answer"]["writes"] = writes
    try:
        run(write(tmp_path / "v.json", described))
    except DocumentError as error:
        assert all(line.startswith(str(tmp_path)) for line in error.lines)


@pytest.mark.parametrize(
    "change",
    [
        {"translated": {"x": {"offset": 0, "pages": []}}},
        {"translated": {"0": {"offset": 0, "pages": [["1"]]}}},
        {"translated": {"0": {"offset": 4096, "pages": []}}},
        {"hex": "0"},
        {"owner": 3},
    ],
    ids=str,
)
def test_a_shadow_that_cannot_be(tmp_path: Path, change: dict[str, object]) -> None:
    described = good()
    shadow = {"owner": "mediator", "hex": "", "num_params": 0, **change}
    described["steps"][5]["out"]["forwarded"][0]["arg"] = shadow
    assert "step 5" in refusal(write(tmp_path / "v.json", described))[0]


@pytest.mark.parametrize("pins", [{"1": {"zz": 1}}, {"1": {"": 1}}, {"one": {}}], ids=str)
def test_pins_of_a_frame_that_is_no_number(tmp_path: Path, pins: object) -> None:
    described = good()
    described["steps"][5]["out"]["pins"] = pins
    path = write(tmp_path / "v.json", described)
    try:
        run(path)
    except DocumentError as error:
        assert "step 5" in error.lines[0]


def test_all_errors_of_a_file_are_told_at_once_but_not_without_end(tmp_path: Path) -> None:
    described = good()
    for step in described["steps"]:
        step["domain"] = "x"
    lines = refusal(write(tmp_path / "v.json", described))
    assert 5 < len(lines) <= 20
    described["steps"] = [{"op": "nothing"}] * 5000
    assert len(refusal(write(tmp_path / "v.json", described))) <= 20


def _set(where: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(described: dict[str, Any]) -> None:
        *path, last = [int(part) if part.isdigit() else part for part in where.split("/")]
        holder: Any = described
        for part in path:
            holder = holder[part]
        if value is None:
            del holder[last]
        else:
            holder[last] = value

    return change


ONE_LINE: list[tuple[str, object, str]] = [
    ("steps/6/out/state", None, "vector 0 'by_hand', step 6 (smc), out.state: missing"),
    ("setup/max_threads", 0, "vector 0 'by_hand', setup.max_threads: "),
    ("steps/5/mem_writes/0/ipa", "0x1000", "step 5 (smc), mem_writes[0].ipa: domain 1 has no RAM at 0x1000"),
    ("steps/5/mem_writes/0/ipa", "0x4003ffff", "step 5 (smc), mem_writes[0].ipa: domain 1 has no RAM at 0x40040000"),
    ("steps/5/regs", [-1] * 8, "step 5 (smc), regs[0]: "),
    ("steps/5/regs/3", True, "step 5 (smc), regs[3]: "),
    ("steps/5/out/handled", 1, "step 5 (smc), out.handled: "),
    ("steps/5/out/pins", {"1": {"0x40000": -1}}, "step 5 (smc), out.pins.1.0x40000: "),
    ("steps/5/out/state", {"quota_pages": -1}, "step 5 (smc), out.state.quota_pages: "),
    ("steps/5/out/mem_changes", [{"domain": 9, "ipa": "0x40000000", "hex": "00"}], "there is no domain 9"),
    ("steps/5/out/mem_changes", [{"domain": 1, "ipa": "0x3fffffff", "hex": "0000"}], "no RAM at 0x3ffff000"),
    ("steps/5/out/forwarded/0/sym", {"a1:a2": "heap"}, "step 5 (smc), out.forwarded[0].sym.a1:a2: "),
    ("steps/3/offset", 4094, "step 3 (flip), offset: "),
    ("steps/3/size", 4.0, "step 3 (flip), size: "),
    ("steps/2/page_index", 64, "step 2 (p2m), page_index: domain 1 has 64 pages"),
    ("steps/1/out/rc", 1, "step 1 (create), out.rc: "),
    ("steps/7/preempt_after", -2, "step 7 (relinquish), preempt_after: "),
    ("setup/domains/0/npages", "64", "setup.domains[0].npages: "),
    ("name", "", "vector 0 '', name: "),
]


@pytest.mark.parametrize(("where", "value", "words"), ONE_LINE, ids=str)
def test_one_mistake_is_one_line_with_vector_step_and_field(
    tmp_path: Path, where: str, value: object, words: str
) -> None:
    described = good()
    _set(where, value)(described)
    (line,) = refusal(write(tmp_path / "v.json", described))
    assert words in line


def test_a_name_that_two_vectors_have(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "v.json", good(), good()))[0].endswith("two vectors have the name 'by_hand'")


@pytest.mark.parametrize("text", ['{"count": 1, "count": 2}', '{"count": NaN}', '{"count": Infinity}'])
def test_json_that_readers_take_for_different_things(tmp_path: Path, text: str) -> None:
    path = tmp_path / "v.json"
    path.write_text(text)
    assert "not JSON" in refusal(path)[0]


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.integers(0, 1 << 64).map(hex),
)


def _paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found += _paths(value, (*at, key))
    return found


_GOOD = good()
_PATHS = _paths(_GOOD)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(_PATHS), _ODD)
def test_any_value_anywhere_is_read_or_refused(tmp_path: Path, where: tuple[Any, ...], value: object) -> None:
    described = deepcopy(_GOOD)
    holder: Any = described
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    if where[-1] in ("npages", "zeros_after") and isinstance(value, int) and value > 1 << 12:
        return  # allowed up to a gigabyte: not in a test
    path = write(tmp_path / "v.json", described)
    try:
        run(path)
    except DocumentError as error:
        assert all("\n" not in line for line in error.lines)


def test_a_count_that_is_not_that_of_the_vectors_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "v.json", vector(probe()), count=2)
    with pytest.raises(DocumentError, match="2 vectors are announced, there are 1"):
        load_vectors(path)
    assert len(load_vectors(write(tmp_path / "v.json", vector(probe()), count=1)).vectors) == 1
