"""TA panics: what the client sees, who dies with whom, and what OP-TEE prints."""

import json
import re

import pytest

from optee.abi.message import Param, ParamType
from optee.abi.results import Origin, Result
from optee.config import Config
from optee.panic import PanicReport
from optee.tas.exercise import ExerciseTa, KeepAliveTa, KeepCrashedTa, SingleInstanceTa
from tests.optee.rig import Rig, open_message, value

PANIC, COUNT, OVERRUN, COPY = 0, 7, 5, 8
DEAD = (Result.TARGET_DEAD, Origin.TEE)


@pytest.fixture
def rig() -> Rig:
    return Rig(Config(threads=4, guests=2))


def panic(rig: Rig, session: int, code: int = 0xFFFF300F) -> tuple[int, int]:
    answer = rig.invoke(session, PANIC, value(code, 0, ParamType.VALUE_INPUT))
    return answer.ret, answer.ret_origin


def test_client_sees_target_dead_for_ever(rig: Rig) -> None:
    session = rig.open(ExerciseTa.uuid)
    for _ in range(3):
        assert panic(rig, session) == DEAD
    assert rig.world.panics == 1
    assert rig.world.ta_invokes == 1
    assert rig.close(session).ret == 0
    assert rig.invoke(rig.open(ExerciseTa.uuid), COUNT, value(1)).params[0].a == 1


@pytest.mark.parametrize(
    ("ta", "dies_with_it", "reopened"),
    [(ExerciseTa, False, 1), (SingleInstanceTa, True, 1), (KeepAliveTa, True, 1)],
)
def test_other_sessions(rig: Rig, ta: type[ExerciseTa], dies_with_it: bool, reopened: int) -> None:
    first, second = rig.open(ta.uuid), rig.open(ta.uuid)
    assert rig.invoke(second, COUNT, value(5)).ret == 0
    assert panic(rig, first) == DEAD
    other = rig.invoke(second, COUNT, value(1))
    assert ((other.ret, other.ret_origin) == DEAD) is dies_with_it
    assert rig.invoke(rig.open(ta.uuid), COUNT, value(1)).params[0].a == reopened
    assert [rig.close(session).ret for session in (first, second)] == [0, 0]
    assert rig.invoke(rig.open(ta.uuid), COUNT, value(1)).ret == 0


def test_keep_crashed_stays_dead(rig: Rig) -> None:
    session = rig.open(KeepCrashedTa.uuid)
    assert panic(rig, session) == DEAD
    for _ in range(2):
        refused = rig.run(open_message(KeepCrashedTa.uuid))
        assert (refused.ret, refused.ret_origin) == DEAD
        rig.close(session)


def test_outputs_of_a_dead_ta_are_what_came_in(rig: Rig) -> None:
    data, listed = rig.buffer(200)
    rig.register(listed, 200, 7)
    session = rig.open(ExerciseTa.uuid)
    source = Param(ParamType.RMEM_INPUT, 0, 200, 7)
    assert (rig.invoke(session, OVERRUN, source).ret, rig.world.panic_reports[-1].code) == (
        Result.TARGET_DEAD,
        0xFFFF300F,
    )
    assert "stack smashing detected" in rig.world.console
    answer = rig.invoke(session, COPY, source, Param(ParamType.TMEM_OUTPUT, 0, 77, 0))
    assert (answer.ret, answer.params[1].b) == (Result.TARGET_DEAD, 0)
    assert rig.memory.read(data, 200) == bytes(200)


def report(rig: Rig) -> PanicReport:
    seen: list[PanicReport] = []
    rig.world.on_panic = seen.append
    data, listed = rig.buffer(300, offset=0x20)
    rig.register(listed, 300, 7)
    session = rig.open(ExerciseTa.uuid)
    assert rig.invoke(session, OVERRUN, Param(ParamType.RMEM_INPUT, 0x10, 0x100, 7)).ret == Result.TARGET_DEAD
    assert seen == list(rig.world.panic_reports)
    assert next(r.pa for r in seen[0].regions if r.what == "(param)") == data - 0x20
    return seen[0]


def test_report_as_text(rig: Rig) -> None:
    lines = report(rig).text().splitlines()
    assert lines[0] == "E/TC:00 0 TA panicked with code 0xffff300f"
    assert lines[1] == f"E/LD:  Status of TA {ExerciseTa.uuid}"
    region = re.compile(
        r"E/LD:  region +\d+: va 0x[0-9a-f]{8} pa 0x[0-9a-f]{8,10} size 0x[0-9a-f]{6} flags (\S{4})( \S+)?"
    )
    regions = [match for line in lines if (match := region.fullmatch(line))]
    assert [match[1] for match in regions] == [
        "rw-s",
        "r-xs",
        "rw-s",
        "rw-s",
        "r--s",
        "rw-s",
        "r-xs",
        "rw-s",
        "rw--",
    ]
    assert [match[2] for match in regions][5:] == [" (stack)", " [0]", " [0]", " (param)"]
    stack = lines.index("E/LD:  Call stack:")
    assert re.fullmatch(r"E/LD:   panic at tee\.py:\d+", lines[stack + 1])
    assert re.fullmatch(r"E/LD:   overrun at exercise\.py:\d+", lines[-1])
    assert lines == list(rig.world.console)[-len(lines) :]


def test_report_as_data(rig: Rig) -> None:
    data = json.loads(json.dumps(report(rig).to_json()))
    assert (data["code"], data["ta"], data["vm_id"], data["thread"]) == (
        0xFFFF300F,
        str(ExerciseTa.uuid),
        1,
        0,
    )
    ends = [(region["pa"], region["pa"] + region["size"]) for region in data["regions"]]
    assert all(one[1] <= other[0] for one, other in zip(sorted(ends), sorted(ends)[1:], strict=False))
    secure = [region for region in data["regions"] if region["flags"].endswith("s")]
    base, size = rig.world.config.secure_ram[0]
    assert all(base <= region["pa"] < base + size for region in secure)
    assert data["call_stack"][-1]["function"] == "overrun"


def test_abort_names_the_address(rig: Rig) -> None:
    session = rig.open(ExerciseTa.uuid)
    rig.invoke(session, 4, value(1 << 20, 0, ParamType.VALUE_INPUT))
    aborted = rig.world.panic_reports[0]
    stack = next(region for region in aborted.regions if region.what == "(stack)")
    assert aborted.text().splitlines()[0].endswith(f"data-abort at address {stack.va - 8:#x} (translation fault)")
    assert aborted.code != 0xFFFF300F
