"""Each declared difference, in a vector as the reference would have recorded it; and hostile vectors."""

import os
from collections.abc import Callable
from random import Random

import pytest

from mediator.conformance import compare as comparing
from mediator.conformance.differences import differences
from mediator.conformance.facts import Facts
from mediator.conformance.intended import CONDITIONS, declarations
from mediator.conformance.run import Observed
from mediator.conformance.vectors import Smc
from mediator.conformance.vectors import Vector as Model
from tests.conformance.documents import (
    ALLOC,
    CMD,
    INTR,
    INVOKE,
    REGISTER,
    SHM_ALLOC,
    TMEM_INOUT,
    TMEM_OUT,
    UNREGISTER,
    Step,
    Vector,
    answer,
    call,
    compared,
    create,
    document,
    message,
    names,
    page,
    page_list,
    probe,
    relinquish,
    resume,
    vector,
    visible,
    xen,
)
from tests.conformance.hostile import change
from tests.conformance.reference import Reference
from tests.shared import needs_shared

AT, LIST, DATA, RPC = page(0), page(1), page(5), page(8)
OK = answer(0, writes=[("arg:0", 20, "00000000")])
GOOD = ("arg:1", 20, "00000000")
THREAD = 7
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"


def kind(at: int, to: str) -> Step:
    return {"op": "p2m", "domain": 1, "gfn": hex(at >> 12), "type": to}


def story(*steps: Step, base: int = 0x40000) -> Vector:
    domains = [{"id": 1, "npages": 64, "base_gfn": hex(base), "perm": "0x2b"}]
    return vector(probe(), create(), *steps, relinquish(), domains=domains)


def registered(cookie: int = 0x77) -> Step:
    return call(AT, message(REGISTER, (TMEM_OUT, LIST, 4096, cookie)), page_list(LIST, [DATA]), answers=[OK])


def asking(request: bytes = b"", *more: Step) -> list[Step]:
    """A call that has given a page for RPC arguments and is asked something by it."""
    asked = answer(CMD, 0, 0xC1, THREAD, writes=[("rpc:c1", 0, request.hex())])
    given = resume(THREAD, RPC >> 32, RPC & 0xFFFFFFFF, 0, 0xC1, answers=[asked, OK])
    return [call(AT, message(INVOKE), answers=[answer(ALLOC, 0x1000, 0, THREAD)]), *more, given]


TIME = message(3, (2, 0, 0, 0), ret=0xFFFF0000)
BUFFER = message(SHM_ALLOC, (1, 0, 4096, 0), ret=0xFFFF0000)
FLIP = {"domain": 1, "gfn": hex(RPC >> 12), "nth_lookup": 1, "offset": 40, "value": "0x99", "size": 1}


def replied(data: bytes, *more: tuple[int, bytes], a1: int = 0, a2: int = 0xC1, thread: int = THREAD) -> Step:
    return resume(thread, a1, a2, writes=[(RPC, data), *more], answers=[OK])


STORIES: dict[str, Callable[[], Vector]] = {
    "register_refused_in_a0": lambda: story(
        call(AT, message(REGISTER, (TMEM_OUT, LIST, 4096, 0x77)), page_list(LIST, [DATA]), answers=[answer(5)])
    ),
    "refused_in_a0": lambda: story(
        call(AT, message(INVOKE), answers=[answer(5, writes=[("arg:0", 20, "01000000")])]),
    ),
    "unregister_refused_in_a0": lambda: story(
        registered(), call(AT, message(UNREGISTER, (5, 0, 0, 0x77)), answers=[answer(5)])
    ),
    "result_left": lambda: story(call(AT, message(INVOKE, (1, 2, 3, 4)), answers=[answer(0)])),
    "registration_result_left": lambda: story(
        call(AT, message(REGISTER, (TMEM_OUT, LIST, 4096, 0x77)), page_list(LIST, [DATA]), answers=[answer(0)])
    ),
    "list_refused": lambda: story(
        call(AT, message(INVOKE, (TMEM_INOUT, LIST, 3 * 4096, 0x77)), page_list(LIST, [DATA, 1 << 40, DATA]))
    ),
    "second_list_refused": lambda: story(
        call(
            AT,
            message(INVOKE, (TMEM_INOUT, LIST, 4096, 0x77), (TMEM_INOUT, page(2), 4096, 0x78)),
            page_list(LIST, [DATA]),
            page_list(page(2), [1 << 40]),
        )
    ),
    "shm_alloc_refused": lambda: story(
        *asking(BUFFER),
        replied(message(SHM_ALLOC, (TMEM_OUT, LIST, 8192, 9)), page_list(LIST, [DATA, 1 << 40])),
    ),
    "malformed_registration": lambda: story(call(AT, message(REGISTER), answers=[OK])),
    "reply_does_not_fit": lambda: story(*asking(TIME), replied(message(9, (2, 5, 6, 7)))),
    "shm_alloc_reply_does_not_fit": lambda: story(*asking(BUFFER), replied(message(9, (TMEM_OUT, 1 << 40, 4096, 9)))),
    "reply_unreadable": lambda: story(*asking(TIME), kind(RPC, "none"), replied(TIME)),
    "reply_changed_between": lambda: story(*asking(TIME), {"op": "flip", **FLIP}, replied(TIME)),
    "buffer_of_another_call": lambda: story(
        call(
            AT,
            message(INVOKE, (TMEM_INOUT, LIST, 4096, 0x77)),
            page_list(LIST, [DATA]),
            answers=[answer(INTR, 0, 0, 3)],
        ),
        call(page(2), message(UNREGISTER, (5, 0, 0, 0x77)), answers=[answer(0, writes=[GOOD])]),
    ),
    "null_names_buffer": lambda: story(
        registered(),
        call(AT, message(INVOKE, (TMEM_INOUT, 0, 0, 0x77)), answers=[answer(0, writes=[GOOD])]),
    ),
    "message_rewritten": lambda: story(
        registered(),
        call(AT, message(INVOKE, (5, 2, 3, 4)), answers=[answer(0, writes=[GOOD, ("arg:1", 32, f"09{0:046x}77")])]),
    ),
    "rewritten_written_back": lambda: story(
        call(AT, message(INVOKE, (1, 2, 3, 4)), answers=[answer(0, writes=[*OK[1], ("arg:0", 32, f"02{255:016x}")])])
    ),
    "unaligned_entry": lambda: story(
        call(AT, message(INVOKE, (TMEM_INOUT, LIST, 4096, 0x77)), page_list(LIST, [DATA + 8]), answers=[OK])
    ),
    "null_page": lambda: story(
        call(4096, message(INVOKE), answers=[answer(ALLOC, 0x1000, 0, THREAD)]),
        resume(THREAD, 0, 0, 0, 0xC1, answers=[answer(INTR, 0, 0, THREAD)]),
        base=0,
    ),
    "odd_size": lambda: story(
        call(AT, message(INVOKE, (TMEM_INOUT, LIST, 0, 0x77)), page_list(LIST, [DATA]), answers=[OK])
    ),
    "too_many_parameters": lambda: story(call(AT, message(INVOKE)[:28] + b"\x80\0\0\0")),
    "rejected_written_back": lambda: story(
        {"op": "flip", "domain": 1, "gfn": hex(AT >> 12), "nth_lookup": 1, "offset": 8, "value": "0x99", "size": 4},
        call(AT, message(INVOKE, (9, LIST, 4096, 0x77))),
    ),
    "not_written_back": lambda: story(kind(AT, "ram_ro"), call(AT, message(INVOKE), answers=[OK])),
    "other_cookie": lambda: story(
        *asking(TIME),
        call(page(2), message(INVOKE), answers=[answer(ALLOC, 0x1000, 0, 9)]),
        resume(9, 0, page(9), 0, 0xC2, answers=[answer(INTR, 0, 0, 9)]),
        replied(TIME, a2=0xC2),
    ),
    "wide_words": lambda: story(*asking(TIME), replied(TIME, thread=THREAD | 1 << 40)),
    "not_delivered": lambda: story(
        call(AT, message(INVOKE), answers=[answer(ALLOC, 0x1000, 0, THREAD)]),
        resume(THREAD, 0, RPC, 0, 0xC1, answers=[answer(INTR, 0, 0, THREAD)]),
        kind(RPC, "mmio"),
        resume(THREAD, answers=[answer(CMD, 0, 0xC1, THREAD, writes=[("rpc:c1", 0, TIME.hex())]), OK]),
    ),
    "dying": lambda: story(registered(), relinquish(preempt=0, rc=-85), call(AT, message(INVOKE), answers=[OK])),
    "isolated": lambda: story(
        call(AT, message(INVOKE), answers=[answer(INTR, 0, 0, 3)]),
        call(page(2), message(INVOKE), answers=[answer(INTR, 0, 0, 3)]),
        call(page(3), message(INVOKE), answers=[answer(0)]),
    ),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_declared_difference_occurs_and_is_needed(condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Reference(STORIES[condition]()).run()
    report = compared(recording)
    kinds = [kind for kind in declarations() if kind.condition == condition]
    assert report.differ == [] and report.violations == []
    assert {kind.rule for kind in kinds} & set(report.intended)
    without = [kind for kind in declarations() if kind.condition != condition]
    monkeypatch.setattr(comparing, "declarations", lambda: without)
    assert compared(recording).differ


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_story_without_its_difference_agrees(condition: str) -> None:
    """What our own core did, taken for a recording: no kind is needed to agree with oneself."""
    done = comparing.compare(document(STORIES[condition]()), xen(), observe=True)
    assert compared(*done.observed).intended == {}


def fault(page: int = -1, record: int = -1) -> Step:
    return {"op": "alloc_fault", "heap_page_alloc_nth": page, "xzalloc_nth": record}


def two(kind: int, second: int) -> Step:
    """A call with a list, and a second reference that cannot be translated."""
    params = (TMEM_INOUT, LIST, 4096, 0x77), (kind, second, 4096, 0x78)
    return call(AT, message(INVOKE, *params), page_list(LIST, [DATA]), page_list(page(2), [DATA, 1 << 40]))


def other(*, good: str = "arg:1") -> Step:
    done = [answer(0, writes=[(good, 20, "00000000")])]
    return call(page(3), message(UNREGISTER, (5, 0, 0, 0x77)), answers=done)


SEQUENCES: dict[str, Callable[[], Vector]] = {
    "OP-TEE itself answers -1": lambda: story(call(AT, message(INVOKE), answers=[answer(2**64 - 1)])),
    "leftovers of two kinds, of which one is freed": lambda: story(
        call(
            AT,
            message(INVOKE, (TMEM_INOUT, LIST, 4096, 0x77), (TMEM_INOUT, page(2), 8192, 0x78)),
            page_list(LIST, [DATA]),
            page_list(page(2), [DATA, 1 << 40]),
        ),
        other(good="arg:0"),
        registered(0x79),
    ),
    "a contiguous reference behind a list": lambda: story(two(TMEM_INOUT & 0xFF, DATA), registered(0x79)),
    "a registration with reserved bits, in which an RPC argument is freed": lambda: story(
        *asking(TIME),
        call(
            page(3),
            message(REGISTER, (TMEM_OUT | 0x10000, LIST, 4096, 0x77)),
            page_list(LIST, [DATA]),
            answers=[answer(0xFFFF0002, 0, 0xC1, 9)],
        ),
    ),
    "a failure that waits while a call is refused in another order": lambda: story(
        *asking(TIME)[:-1],
        fault(page=0, record=0),
        resume(THREAD, 0, RPC + 8, 0, 0xC1, answers=[answer(ALLOC, 0x1000, 0, THREAD)]),
        resume(THREAD, 0, RPC, 0, 0xC1, answers=[OK]),
        registered(0x79),
    ),
    "a failure in a call that is rejected before it": lambda: story(
        registered(),
        fault(page=1),
        call(AT, message(INVOKE, (TMEM_INOUT, LIST, 4096, 0x77)), page_list(LIST, [DATA])),
    ),
    "a flip at the look-up for a message that is not written back": lambda: story(
        {"op": "flip", "domain": 1, "gfn": hex(AT >> 12), "nth_lookup": 2, "offset": 36, "value": "0x99", "size": 1},
        call(AT, message(INVOKE, (1, 2, 3, 4)), answers=[answer(5)]),
        call(AT, message(INVOKE, (1, 2, 3, 4)), answers=[answer(0, writes=[GOOD])]),
    ),
    "writes to a page that is mapped elsewhere": lambda: story(
        {"op": "p2m", "domain": 1, "gfn": hex(AT >> 12), "type": "ram_ro", "page_index": 9},
        call(page(9), message(INVOKE), answers=[OK]),
        call(AT, message(INVOKE, (1, 2, 3, 4)), answers=[answer(0, writes=[GOOD])]),
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_follows_a_declared_difference_is_no_other_difference(name: str) -> None:
    report = compared(Reference(SEQUENCES[name]()).run())
    assert report.differ == [] and report.violations == []


@pytest.mark.parametrize("shape", ["good", "a bad entry in the first", "the second twice"])
@pytest.mark.parametrize("lacking", ["page", "record"])
def test_each_allocation_for_a_message_of_three_buffers_may_fail(lacking: str, shape: str) -> None:
    for nth in range(8):
        first = 1 << 40 if shape.startswith("a bad") else DATA
        third = 0x78 if shape.startswith("the second") else 0x79
        params = (TMEM_INOUT, LIST, 4096, 0x77), (TMEM_INOUT, page(2), 4096, 0x78), (TMEM_INOUT, page(4), 4096, third)
        lists = page_list(LIST, [first]), page_list(page(2), [DATA]), page_list(page(4), [DATA])
        vector = story(
            fault(**{lacking: nth}),
            call(AT, message(INVOKE, *params), *lists, answers=[answer(0, writes=[GOOD])]),
            call(page(3), message(INVOKE, (1, 2, 3, 4)), answers=[OK]),
        )
        report = compared(Reference(vector).run())
        assert report.differ == [] and report.violations == [], nth


@needs_shared
def test_the_model_of_the_reference_reproduces_what_was_recorded() -> None:
    for name in names():
        recorded = visible(name)
        made = Reference(visible(name)).run()
        for theirs, mine in zip(*(Model.model_validate(each).steps for each in (recorded, made)), strict=True):
            assert list(differences(theirs, Observed(mine, Facts()))) == [], name
            if isinstance(theirs, Smc) and isinstance(mine, Smc):
                assert theirs.out.mem_changes == mine.out.mem_changes, name


@needs_shared
@pytest.mark.parametrize("seed", range(1200 if NIGHTLY else 40))
def test_hostile_vectors_differ_as_declared_only(seed: int) -> None:
    choose = Random(seed)
    changed = visible(choose.choice(names()))
    done = [change(changed, choose) for _ in range(choose.choice((1, 1, 2, 4)))]
    report = compared(Reference(changed).run())
    assert report.differ == [], done
    assert report.violations == [], done


def test_each_condition_has_its_story() -> None:
    assert set(CONDITIONS) == set(STORIES)
