"""One recorded thing is changed at a time: exactly that is reported, and nothing else."""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from mediator.conformance import compare as comparing
from mediator.core import lifecycle
from mediator.core.steps import Forward
from mediator.core.steps import Step as Step_
from optee.abi.smc import Function
from tests.conformance.documents import (
    Step,
    Vector,
    compared,
    create,
    differences,
    probe,
    relinquish,
    vector,
    visible,
)
from tests.conformance.test_visible import R11
from tests.shared import needs_shared

Tamper = Callable[[Step, Random], Iterator[str]]
"""Changes a step in one place where it can, and yields the field that must be reported then."""

VECTORS = (
    "fast_calls_all",
    "caps_matrix",
    "open_session_noncontig",
    "copy_back_only_outputs",
    "max_pages_per_buffer",
    "register_unregister",
    "rpc_alloc",
    "rpc_cmd_get_time",
    "rpc_shm_alloc_free",
    "multi_rpc_full_session",
    "two_guests_same_cookies",
    "random_0",
    "random_45",
)


def _flip_word(words: list[str], at: int, choose: Random) -> None:
    words[at] = hex(int(words[at], 16) ^ 1 << choose.randrange(32))


def _flip_byte(holder: dict[str, Any], at: int, choose: Random) -> None:
    data = bytearray.fromhex(holder["hex"])
    data[at] ^= 1 << choose.randrange(8)
    holder["hex"] = data.hex()


def _forwards(step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
    if step["op"] == "relinquish":
        return  # compared as a whole
    for number, forward in enumerate(step.get("out", {}).get("forwarded", ())):
        yield f"forwarded[{number}]", forward


def _smc(step: Step) -> Iterator[dict[str, Any]]:
    if step["op"] == "smc":
        yield step["out"]


def registers(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        if out["handled"]:
            _flip_word(out["regs"], choose.randrange(8), choose)
            yield "regs"


def forwarded_register(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        hidden = (1, 2) if "a1:a2" in forward.get("sym", {}) else ()
        _flip_word(forward["regs"], choose.choice([at for at in range(7) if at not in hidden]), choose)
        yield f"{name}.regs"
        return


def client_id(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        _flip_word(forward["regs"], 7, choose)
        yield f"{name}.regs"
        return


def message_byte(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        if "arg" in forward:
            size = len(forward["arg"]["hex"]) // 2
            _flip_byte(forward["arg"], choose.choice([at for at in range(size) if not 20 <= at < 24]), choose)
            yield f"{name}.arg.hex"
            return


def rpc_byte(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        if "rpc_arg" in forward:
            # ret, bytes 20..23, counts here: R11 speaks of a call's first forward only.
            _flip_byte(forward["rpc_arg"], choose.randrange(len(forward["rpc_arg"]["hex"]) // 2), choose)
            yield f"{name}.rpc_arg.hex"
            return


def _lists(step: Step) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, forward in _forwards(step):
        for kind in ("arg", "rpc_arg"):
            for index, translated in forward.get(kind, {}).get("translated", {}).items():
                yield f"{name}.{kind}.translated.{index}", translated


def translated_page(step: Step, choose: Random) -> Iterator[str]:
    for name, translated in _lists(step):
        entry = choose.choice(translated["pages"])
        entry[1] = hex(int(entry[1], 16) + 1)
        yield name
        return


def translated_domain(step: Step, choose: Random) -> Iterator[str]:
    for name, translated in _lists(step):
        choose.choice(translated["pages"])[0] += 1
        yield name
        return


def translated_entry_missing(step: Step, choose: Random) -> Iterator[str]:
    for name, translated in _lists(step):
        translated["pages"].pop(choose.randrange(len(translated["pages"])))
        yield name
        return


def translated_offset(step: Step, choose: Random) -> Iterator[str]:
    for name, translated in _lists(step):
        translated["offset"] ^= 8
        yield name
        return


def list_missing(step: Step, choose: Random) -> Iterator[str]:
    for _, forward in _forwards(step):
        for kind in ("arg", "rpc_arg"):
            for index in list(forward.get(kind, {}).get("translated", {})):
                del forward[kind]["translated"][index]
                yield f"forwarded[0].{kind}.translated.{index}"
                return


def owner(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        for kind in ("arg", "rpc_arg"):
            if kind in forward:
                forward[kind]["owner"] = "guest"
                yield f"{name}.{kind}.owner"
                return


def symbol(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        place = forward.get("sym", {}).get("a1:a2", "")
        if place.startswith("rpc:"):
            forward["sym"]["a1:a2"] = place + "0"
            yield f"{name}.sym"
            return


def resumes(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        if forward.get("resumes"):
            forward["resumes"] = "FREE" if forward["resumes"] != "FREE" else "INTR"
            yield f"{name}.resumes"
            return


def pin_count(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        pins = out["pins"].get(str(step["domain"]))
        if pins:
            pins[choose.choice(sorted(pins))] += 1
            yield "pins"


def pin_missing(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        pins = out["pins"].get(str(step["domain"]))
        if pins:
            del pins[choose.choice(sorted(pins))]
            yield "pins"


def pin_too_many(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        out["pins"].setdefault(str(step["domain"]), {})["0x4003f"] = 1
        yield "pins"


def pins_during(step: Step, choose: Random) -> Iterator[str]:
    for name, forward in _forwards(step):
        if "pins_during" in forward and step["op"] == "smc":
            pins = forward["pins_during"].setdefault(str(step["domain"]), {})
            pins["0x4003f"] = pins.get("0x4003f", 0) + 1
            yield f"{name}.pins_during"
            return


def sums(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        if "state" in out:
            name = choose.choice(("call_count", "quota_pages", "quota_bufs", "rpc_bufs"))
            out["state"][name] += 1
            yield f"state.{name}"


def quota_pages(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        if "state" in out:
            out["state"]["quota_pages"] += choose.randrange(1, 129)
            yield "state.quota_pages"


def buffer_entry(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        buffers = out.get("state", {}).get("shm_bufs")
        if buffers:
            buffer = choose.choice(buffers)
            name = choose.choice(("cookie", "pages", "has_page_list"))
            if name == "has_page_list":
                buffer[name] = not buffer[name]
            elif name == "pages":
                buffer[name] += 1
            else:
                buffer[name] = hex(int(buffer[name], 16) ^ 1 << 40)
            yield "state.shm_bufs"


def buffer_missing(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        buffers = out.get("state", {}).get("shm_bufs")
        if buffers:
            buffers.pop(choose.randrange(len(buffers)))
            yield "state.shm_bufs"


def buffer_too_many(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        if "state" in out:
            out["state"]["shm_bufs"].append({"cookie": "0x123456", "pages": 1, "has_page_list": False})
            yield "state.shm_bufs"


def change_byte(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        if out["mem_changes"]:
            change = choose.choice(out["mem_changes"])
            _flip_byte(change, choose.randrange(len(change["hex"]) // 2), choose)
            yield "mem_changes"


def change_missing(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        if out["mem_changes"]:
            out["mem_changes"].pop(choose.randrange(len(out["mem_changes"])))
            yield "mem_changes"


def change_too_many(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        # A page that nobody writes: 0xEE never stands there.
        out["mem_changes"].append({"domain": step["domain"], "ipa": hex(0x4003F008), "hex": "ee"})
        yield "mem_changes"


def handled(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        out["handled"] = not out["handled"]
        yield "handled"


def probe_result(step: Step, choose: Random) -> Iterator[str]:
    if step["op"] == "probe":
        step["out"]["result"] = not step["out"]["result"]
        yield "result"


def forward_too_many(step: Step, choose: Random) -> Iterator[str]:
    for out in _smc(step):
        out["forwarded"].append({"regs": ["0x0"] * 8, "answer": {"ret": ["0x0"] * 4}})
        yield "forwarded"


TAMPERS: list[Tamper] = [
    registers,
    forwarded_register,
    client_id,
    message_byte,
    rpc_byte,
    translated_page,
    translated_domain,
    translated_entry_missing,
    translated_offset,
    list_missing,
    owner,
    symbol,
    resumes,
    pin_count,
    pin_missing,
    pin_too_many,
    pins_during,
    sums,
    quota_pages,
    buffer_entry,
    buffer_missing,
    buffer_too_many,
    change_byte,
    change_missing,
    change_too_many,
    handled,
    probe_result,
    forward_too_many,
]


@needs_shared
def test_every_tampering_is_reported_and_nothing_else() -> None:
    """In each of several vectors, at each step, a few of the kinds in turn: every kind occurs often."""
    seen = {tamper.__name__: 0 for tamper in TAMPERS}
    for round_ in range(8):
        choose = Random(round_)
        tampered: list[Vector] = []
        expected: list[tuple[str, int, str]] = []
        for name in VECTORS:
            described = visible(name)
            for index, step in enumerate(described["steps"]):
                # A kind that can be applied here and was applied least so far.
                for tamper in sorted(TAMPERS, key=lambda one: (seen[one.__name__], choose.random())):
                    fields = list(tamper(step, choose))
                    if fields:
                        seen[tamper.__name__] += 1
                        expected += [(name, index, field) for field in fields]
                        break
            tampered.append(described)
        report = compared(*tampered)
        assert [(found["vector"], found["step"], found["field"]) for found in report.differ] == expected
        assert report.violations == []
        assert not report.intended
    assert min(seen.values()) >= 3, seen


@needs_shared
@pytest.mark.parametrize("name", ["fast_calls_all", "register_unregister", "multi_rpc_full_session", "random_0"])
def test_a_forward_more_than_recorded_diverges_at_its_step(name: str) -> None:
    described = visible(name)
    indices = [at for at, step in enumerate(described["steps"]) if step["op"] == "smc" and step["out"]["forwarded"]]
    for index in indices:
        described = visible(name)
        described["steps"][index]["out"]["forwarded"].pop()
        del described["steps"][index + 1 :]
        found = differences(compared(described))
        assert (index, "forwarded") in found
        assert {step for step, _ in found} == {index}


@needs_shared
def test_ret_at_the_first_forward_of_a_call_is_not_compared() -> None:
    """R11 presets it."""
    described = visible("multi_rpc_full_session")
    count = 0
    for step in described["steps"]:
        for _, forward in _forwards(step):
            if "arg" in forward:
                data = bytearray.fromhex(forward["arg"]["hex"])
                data[20:24] = b"\x12\x34\x56\x78"
                forward["arg"]["hex"] = data.hex()
                count += 1
    assert count
    assert compared(described).differ == []


@needs_shared
def test_raw_mediator_addresses_are_not_compared() -> None:
    described = visible("multi_rpc_full_session")
    for step in described["steps"]:
        for _, forward in _forwards(step):
            if "a1:a2" in forward.get("sym", {}):
                forward["regs"][1:3] = ["0x77", "0x7000"]
    assert compared(described).differ == []


@needs_shared
@pytest.mark.parametrize("name", ["random_18", "random_72"])
def test_a_difference_beside_an_intended_one_is_reported(name: str) -> None:
    """A declared kind covers its own fields: what else differs at that step is no matter of the rule."""
    index = R11[name]
    for field, tamper in (("regs", registers), ("mem_changes", change_too_many)):
        described = visible(name)
        assert list(tamper(described["steps"][index], Random(0))) == [field]
        assert (index, field) in differences(compared(described))


@needs_shared
@pytest.mark.parametrize("register", range(1, 8))
def test_words_that_no_rule_speaks_of_are_compared_where_the_answer_is_another(register: int) -> None:
    """R15: ours answers a registration with two parameters itself; a1 to a7 are the guest's in either case."""
    described = visible("all_cmds")
    words = described["steps"][6]["out"]["regs"]
    words[register] = hex(int(words[register], 16) ^ 0x10)
    assert (6, "regs") in differences(compared(described))


@needs_shared
@pytest.mark.parametrize("name", sorted(R11))
def test_a_difference_after_an_intended_one_is_reported(name: str) -> None:
    """Fast calls do not depend on what the recorded mediator still holds."""
    described = visible(name)
    fast = [
        index
        for index, step in enumerate(described["steps"])
        if index > R11[name] and step["op"] == "smc" and int(step["regs"][0], 16) >> 31
    ]
    for index in fast:
        described = visible(name)
        list(client_id(described["steps"][index], Random(0))) or list(handled(described["steps"][index], Random(0)))
        assert [step for step, _ in differences(compared(described))] == [index]


@needs_shared
def test_a_declared_kind_needs_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields of R11 differ at a step that is no refused REGISTER_SHM: that is reported."""
    described = visible("register_unregister")
    index = next(at for at, one in enumerate(described["steps"]) if one.get("out", {}).get("state", {}).get("shm_bufs"))
    described["steps"][index]["out"]["state"]["quota_bufs"] += 1
    report = compared(described)
    assert differences(report) == [(index, "state.quota_bufs")]
    monkeypatch.setattr(comparing, "declarations", list)
    assert differences(compared(described)) == [(index, "state.quota_bufs")]


@needs_shared
@pytest.mark.parametrize("name", ["client_ids", "vm_created_refused", "two_guests_same_cookies"])
def test_a_result_of_creation_is_compared(name: str) -> None:
    for index, step in enumerate(visible(name)["steps"]):
        if step["op"] == "create":
            described = visible(name)
            described["steps"][index]["out"]["rc"] = -12 if step["out"]["rc"] == 0 else 0
            del described["steps"][index + 1 :]
            assert differences(compared(described)) == [(index, "rc")]


@needs_shared
@pytest.mark.parametrize("registers", [{}, {1: 99}, {7: 2}, {0: int(Function.VM_CREATED)}], ids=str)
def test_a_vm_is_destroyed_at_optee_under_its_own_id(
    registers: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly one VM_DESTROYED with the client id; without any change nothing is reported."""
    ask = lifecycle._ask

    def asked(function: Function, ticket: lifecycle.Lifecycle) -> Step_:
        step = ask(function, ticket)
        assert isinstance(step, Forward)
        if function == Function.VM_DESTROYED:
            words = [registers.get(at, word) for at, word in enumerate(step.regs)]
            return Forward(tuple(words), step.ticket)
        return step

    monkeypatch.setattr(lifecycle, "_ask", asked)
    described = visible("relinquish_with_state")
    report = compared(described)
    assert bool(report.differ) == bool(registers)


def test_a_run_of_relinquish_steps_is_compared_as_a_whole() -> None:
    """Each step by itself may have done more or less than the recorded one."""
    steps = [probe(), create(), *[relinquish(preempt=0, rc=-85) for _ in range(3)], relinquish(), relinquish()]
    for step in steps[2:5]:
        step["out"]["forwarded"] = []
    report = compared(vector(*steps))
    assert [step for step, _ in differences(report)] == [step for step, _ in differences(report) if step < 2]
