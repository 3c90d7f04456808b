"""Hand-written vectors: every step kind of the format, and what becomes of it."""

from collections.abc import Iterator
from typing import Any

import pytest

from mediator.conformance import compare as comparing
from mediator.conformance.intended import declarations
from optee.abi.smc import Function
from tests.conformance.documents import (
    ALLOC,
    BAD_PARAMETERS,
    BASE_GFN,
    CMD,
    FREE,
    GENERIC,
    INTR,
    INVOKE,
    NOT_HANDLED,
    OPEN,
    OUT_OF_MEMORY,
    REGISTER,
    SHM_ALLOC,
    SHM_FREE,
    TMEM_INOUT,
    TMEM_OUT,
    UNREGISTER,
    Step,
    answer,
    call,
    compared,
    create,
    differences,
    message,
    observed,
    outs,
    page,
    page_list,
    probe,
    recorded,
    relinquish,
    resume,
    smc,
    vector,
)

EVERY_KIND = ("none", "ram_ro", "mmio", "grant_rw", "grant_ro", "foreign_rw")
MESSAGE = page(0)
LIST = page(1)
DATA = page(5)
ONE_PAGE = message(INVOKE, (TMEM_INOUT, LIST, 4096, 0x500))
OK = answer(0)


def written(out: Any, at: int, size: int = 4) -> int | None:
    """The value that a step left in guest memory at an IPA, if it changed there as a whole."""
    for change in out.mem_changes:
        offset = at - change.ipa
        if offset >= 0 and offset + size <= len(change.hex):
            return int.from_bytes(change.hex[offset : offset + size], "little")
    return None


def one_page(*answers: Any) -> Step:
    return call(MESSAGE, ONE_PAGE, page_list(LIST, [DATA]), answers=answers or (OK,))


# p2m


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("what", ["data", "list", "message"])
def test_p2m_only_read_write_ram_is_shared(kind: str, what: str) -> None:
    gfn = {"data": DATA, "list": LIST, "message": MESSAGE}[what] >> 12
    step = {"op": "p2m", "domain": 1, "gfn": hex(gfn), "type": kind}
    out = outs(vector(probe(), create(), one_page(), step, one_page(), relinquish()))[4]
    assert out.state.quota_pages == out.state.quota_bufs == out.state.call_count == 0
    assert out.pins == {"1": {}}
    if what == "message" and kind == "ram_ro":
        # It can be read but not be written back: EBADADDR, not success (R14).
        assert [forward.regs[0] for forward in out.forwarded] == [Function.CALL_WITH_ARG]
        assert out.regs[0] == 4
        return
    assert out.forwarded == []
    if what == "message":
        assert out.regs[0] == 4
    else:
        assert out.regs[0] == 0
        assert written(out, MESSAGE + 20) == BAD_PARAMETERS


def test_p2m_can_be_taken_back() -> None:
    def change(kind: str) -> Step:
        return {"op": "p2m", "domain": 1, "gfn": hex(DATA >> 12), "type": kind}

    done = outs(vector(probe(), create(), change("mmio"), one_page(), change("ram_rw"), one_page(), relinquish()))
    assert [len(done[at].forwarded) for at in (3, 5)] == [0, 1]


def test_p2m_with_a_page_index_maps_another_page_there() -> None:
    """Page 9 of the domain at the frame of page 5: page 9 is what is shared, pinned, and named as its own frame."""
    step = {"op": "p2m", "domain": 1, "gfn": hex(DATA >> 12), "type": "ram_rw", "page_index": 9}
    suspended = answer(INTR, 0, 0, 3)
    done = outs(vector(probe(), create(), step, one_page(suspended), resume(3, answers=[OK]), relinquish()))
    translated = done[3].forwarded[0].arg.translated[0]
    assert translated.pages == [(1, BASE_GFN + 9)]
    assert done[3].pins == {"1": {hex(BASE_GFN + 9): 1}}
    assert done[4].pins == {"1": {}}


def test_a_pin_outlives_a_change_of_type_to_none() -> None:
    step = {"op": "p2m", "domain": 1, "gfn": hex(DATA >> 12), "type": "none"}
    registered = call(MESSAGE, message(REGISTER, (TMEM_OUT, LIST, 4096, 0x77)), page_list(LIST, [DATA]))
    registered["out"]["forwarded"][0]["answer"]["writes"] = [["arg:0", 20, "00000000"]]
    gone = call(MESSAGE, message(UNREGISTER, (5, 0, 0, 0x77)))
    gone["out"]["forwarded"][0]["answer"]["writes"] = [["arg:1", 20, "00000000"]]
    done = outs(vector(probe(), create(), registered, step, smc(0xBF00FF01, answers=[OK]), gone, relinquish()))
    assert done[4].pins == {"1": {hex(DATA >> 12): 1}}
    assert done[5].pins == {"1": {}} and done[5].state.quota_bufs == 0


# flip


def flip(nth: int, offset: int, value: int, size: int, at: int = MESSAGE) -> Step:
    place = {"domain": 1, "gfn": hex(at >> 12), "nth_lookup": nth}
    return {"op": "flip", **place, "offset": offset, "value": hex(value), "size": size}


@pytest.mark.parametrize(("nth", "seen"), [(0, 0x80), (1, 0x11), (2, 0x11)])
def test_a_flip_before_the_first_look_up_is_all_that_matters(nth: int, seen: int) -> None:
    """The message is read once: what changes later never reaches OP-TEE, nor a decision (B1)."""
    step = {
        "op": "flip",
        "domain": 1,
        "gfn": hex(BASE_GFN),
        "nth_lookup": nth,
        "offset": 40,
        "value": "0x80",
        "size": 1,
    }
    data = message(INVOKE, (1, 0x11, 0, 0))
    done = outs(vector(probe(), create(), step, call(MESSAGE, data), relinquish()))
    assert done[3].forwarded[0].arg.hex[40] == seen
    assert done[3].regs[0] == 0


def test_a_flip_of_the_number_of_parameters_after_the_copy_changes_nothing() -> None:
    step = flip(1, 28, 0x7F, 4)
    done = outs(vector(probe(), create(), step, one_page(), relinquish()))
    assert done[3].forwarded[0].arg.hex == ONE_PAGE[:20] + b"\0\0\xff\xff" + ONE_PAGE[24:40] + bytes(8) + ONE_PAGE[48:]
    assert written(done[3], MESSAGE + 28, 1) == 0x7F  # the guest's own change, which stays


def test_a_flip_of_a_list_entry_after_the_list_was_read_changes_nothing() -> None:
    entry = flip(1, 0, 1, 8, LIST)
    done = outs(vector(probe(), create(), entry, one_page(), relinquish()))
    assert done[3].forwarded[0].arg.translated[0].pages == [(1, DATA >> 12)]


def test_flips_wait_for_their_look_up_over_several_steps() -> None:
    step = flip(2, 40, 0x80, 1)
    data = message(INVOKE, (1, 0x11, 0, 0))
    first, second = call(MESSAGE, data), call(MESSAGE, data)
    second["mem_writes"] = []
    done = outs(vector(probe(), create(), step, first, second, relinquish()))
    # Look-ups: copy, write-back, copy of the second call.
    assert [done[at].forwarded[0].arg.hex[40] for at in (3, 4)] == [0x11, 0x80]


# alloc_fault


def fault(pages: int = -1, objects: int = -1) -> Step:
    return {"op": "alloc_fault", "heap_page_alloc_nth": pages, "xzalloc_nth": objects}


@pytest.mark.parametrize(
    ("pages", "objects", "a0", "ret"),
    [
        (0, -1, 6, None),  # the shadow
        (1, -1, 0, OUT_OF_MEMORY),  # the page list
        (-1, 0, 6, None),  # the call
        (-1, 1, 0, OUT_OF_MEMORY),  # the buffer
        (2, -1, 0, None),  # nothing more is allocated
        (-1, 2, 0, None),
    ],
)
def test_an_allocation_that_fails_refuses_a_call_and_leaves_nothing(
    pages: int, objects: int, a0: int, ret: int | None
) -> None:
    done = outs(vector(probe(), create(), fault(pages, objects), one_page(), fault(), one_page(), relinquish()))
    out = done[3]
    assert out.regs[0] == a0
    assert written(out, MESSAGE + 20) == ret
    assert len(out.forwarded) == (a0 == 0 and ret is None)
    assert out.pins == {"1": {}} and out.state.call_count == out.state.quota_bufs == out.state.quota_pages == 0
    assert done[5].regs[0] == 0 and len(done[5].forwarded) == 1


def test_allocation_counts_go_on_over_the_following_steps() -> None:
    done = outs(vector(probe(), create(), fault(pages=5), *[one_page() for _ in range(4)], relinquish()))
    # Two pages a call: the sixth is the list of the third.
    assert [len(out.forwarded) for out in done[3:7]] == [1, 1, 0, 1]
    assert written(done[5], MESSAGE + 20) == OUT_OF_MEMORY


@pytest.mark.parametrize(("pages", "objects"), [(0, -1), (-1, 0)])
def test_an_rpc_argument_that_cannot_be_allocated_is_told_to_optee(pages: int, objects: int) -> None:
    steps = [
        call(MESSAGE, message(OPEN), answers=[answer(ALLOC, 0xA0, 0, 4)]),
        fault(pages, objects),
        resume(4, 0, page(8), 0, 0xC1, answers=[answer(ALLOC, 0xA0, 0, 4)]),
        resume(4, 0, page(8), 0, 0xC1, answers=[OK]),
    ]
    done = outs(vector(probe(), create(), *steps, relinquish()))
    refused, taken = done[4], done[5]
    assert refused.forwarded[0].regs[1:6] == [0, 0, 4, 0, 0xC1]
    assert refused.state.rpc_bufs == 0 and refused.pins == {"1": {}}
    assert taken.forwarded[0].sym == {"a1:a2": "rpc:c1"}
    assert taken.state.rpc_bufs == 1 and taken.pins == {"1": {hex(page(8) >> 12): 1}}


def _shm_alloc(*between: Step) -> Iterator[Step]:
    request = message(SHM_ALLOC, (1, 0, 4096, 0), ret=GENERIC).hex()
    reply = message(SHM_ALLOC, (TMEM_OUT, LIST, 4096, 0x77))
    yield call(MESSAGE, message(OPEN), answers=[answer(ALLOC, 0xA0, 0, 4)])
    yield resume(4, 0, page(8), 0, 0xC1, answers=[answer(CMD, 0, 0xC1, 4, writes=[("rpc:c1", 0, request)])])
    yield from between
    yield resume(4, 0, 0xC1, writes=[(page(8), reply), page_list(LIST, [DATA])], answers=[answer(INTR, 1, 2, 4)])


@pytest.mark.parametrize(("pages", "objects"), [(0, -1), (-1, 0)])
def test_a_buffer_for_optee_that_cannot_be_recorded_is_freed_again(pages: int, objects: int) -> None:
    """R19: the guest is asked to free it before OP-TEE is told."""
    asked, answered = list(_shm_alloc(fault(pages, objects))), resume(4, 0, 0xC1, answers=[OK])
    done = outs(vector(probe(), create(), *asked, answered, relinquish()))
    out = done[5]
    assert out.forwarded == [] and out.regs[:4] == [CMD, 0, 0xC1, 4]
    assert written(out, page(8), 1) == SHM_FREE and out.state.quota_bufs == 0
    told = done[6].forwarded[0]
    assert told.resumes == "CMD" and told.rpc_arg is not None and told.rpc_arg.num_params == 0
    assert int.from_bytes(told.rpc_arg.hex[20:24], "little") == GENERIC


def test_a_buffer_for_optee_is_translated_and_lives_on() -> None:
    done = outs(vector(probe(), create(), *_shm_alloc(), resume(4, 1, 2, answers=[OK]), relinquish()))
    assert done[4].forwarded[0].rpc_arg.translated[0].pages == [(1, DATA >> 12)]
    assert done[5].state.quota_bufs == 1 and done[6].state.quota_bufs == 0


def test_an_allocation_that_fails_refuses_a_guest() -> None:
    done = outs(vector(probe(), fault(objects=0), create(), smc(0xBF00FF01), relinquish()))
    assert done[2].rc == -12 and done[2].forwarded == []
    assert not done[3].handled
    assert done[4].rc == 0 and done[4].forwarded == []


# Life cycle


def held() -> list[Step]:
    """A registered buffer, an RPC argument, and a suspended call with a temporary buffer."""
    return [
        call(
            MESSAGE,
            message(REGISTER, (TMEM_OUT, LIST, 4096, 0x77)),
            page_list(LIST, [DATA]),
            answers=[answer(0, writes=[("arg:0", 20, "00000000")])],
        ),
        call(
            page(2),
            message(INVOKE, (TMEM_INOUT, page(3), 8192, 0x78)),
            page_list(page(3), [DATA, page(6)]),
            answers=[answer(ALLOC, 0xA0, 0, 1)],
        ),
        resume(1, 0, page(8), 0, 0xC1, answers=[answer(INTR, 0, 0, 1)]),
    ]


@pytest.mark.parametrize("preempt", [[], [0], [1], [2], [3], [0, 0, 0, 0], [2, 1, 0]])
def test_relinquish_gives_everything_back_however_often_it_is_interrupted(preempt: list[int]) -> None:
    runs = [relinquish(preempt=after, rc=-85) for after in preempt]
    steps = [probe(), create(), *held(), *runs, relinquish(), relinquish(), smc(0xBF00FF01)]
    done = outs(vector(*steps))
    assert done[4].state.quota_pages == 3 and done[4].state.rpc_bufs == 1 and done[4].state.call_count == 1
    ends = done[5 : 5 + len(preempt) + 2]
    sent = [forward.regs for out in ends for forward in out.forwarded]
    assert sent == [[Function.VM_DESTROYED, 2, 0, 0, 0, 0, 0, 0]]
    assert ends[-1].rc == ends[-2].rc == 0
    assert ends[-1].pins == {"1": {}} and not ends[-1].forwarded
    assert ends[-1].state.quota_pages == ends[-1].state.rpc_bufs == ends[-1].state.call_count == 0
    assert not done[-1].handled and done[-1].regs[0] == NOT_HANDLED and done[-1].regs[1:] == [0] * 7
    found = [where for where in differences(compared(vector(*steps))) if where[0] >= 5 and where[0] < len(steps) - 1]
    assert found == []


@pytest.mark.parametrize("code", [1, 7, 0xFFFFFFFF])
def test_optee_that_does_not_let_go_of_a_vm_is_not_the_end(code: int) -> None:
    """The reference ignores the answer; ours keeps the pins until the host says so, which the vectors' host does."""
    done = outs(vector(probe(), create(), *held(), relinquish(code=code), relinquish(), smc(0xBF00FF01)))
    assert done[5].rc == 0 or done[6].rc == 0
    assert done[6].pins == {"1": {}} and done[6].state.quota_pages == 0
    assert not done[7].handled


@pytest.mark.parametrize("code", [1, 7, 0xFFFFFFFF])
def test_a_vm_that_optee_refuses_is_not_there(code: int) -> None:
    done = outs(vector(probe(), create(code=code), one_page(), relinquish(), create(), one_page(), relinquish()))
    assert done[1].rc == -19 and not done[2].handled and done[2].forwarded == []
    assert done[3].rc == 0 and done[3].forwarded == []
    assert done[4].rc == 0 and done[5].handled and len(done[5].forwarded) == 1


def test_a_vm_can_be_created_anew_after_its_end() -> None:
    done = outs(vector(probe(), create(), *held(), relinquish(), create(), one_page(), relinquish()))
    assert done[6].rc == 0
    assert done[7].regs[0] == 0 and done[7].state.quota_bufs == 0


def test_a_vm_that_lives_is_not_created_twice() -> None:
    done = outs(vector(probe(), create(), create(), one_page(), relinquish()))
    assert done[2].rc < 0 and done[2].forwarded == []
    assert done[3].handled


def test_a_domain_that_is_not_described_has_64_pages() -> None:
    base = {"id": 1, "npages": 128, "base_gfn": "0x50000", "perm": "0x2b"}
    at, lists = page(0, 0x50000), page(1, 0x50000)

    def shares(number: int) -> Step:
        data = message(INVOKE, (TMEM_INOUT, lists, 4096, 1))
        return call(at, data, page_list(lists, [page(number, 0x50000)]), domain=7)

    done = outs(vector(probe(), create(), create(7), shares(63), shares(64), relinquish(7), domains=[base]))
    assert done[2].forwarded[0].regs[1] == 8
    assert done[3].forwarded[0].regs[7] == 8
    assert done[3].forwarded[0].arg.translated[0].pages == [(7, 0x5003F)]
    assert done[4].forwarded == [] and written(done[4], at + 20) == BAD_PARAMETERS


def test_a_call_of_a_domain_that_was_never_created_is_not_handled() -> None:
    done = outs(vector(probe(), smc(0xBF00FF01, 1, 2, 3, 4, 5, 6, 7), relinquish()))
    assert not done[1].handled and done[1].regs == [NOT_HANDLED, 1, 2, 3, 4, 5, 6, 7]


def test_nothing_is_created_without_optee() -> None:
    first = probe()
    first["out"]["forwarded"][0]["answer"]["ret"] = ["0x1", "0x2", "0x3", "0x4"]
    done = outs(vector(first, create(), smc(0xBF00FF01)))
    assert done[0].result is False
    assert done[1].rc < 0 and done[1].forwarded == []
    assert not done[2].handled


# Addresses at the ends


def test_ram_at_ipa_0_is_used_but_its_first_page_is_not_shared() -> None:
    """R9: IPA 0 means NULL; the message itself may stand there."""
    low = [{"id": 1, "npages": 64, "base_gfn": "0x0", "perm": "0x2b"}]

    def shares(number: int) -> Step:
        data = message(INVOKE, (TMEM_INOUT, page(1, 0), 4096, 1))
        return call(0, data, page_list(page(1, 0), [page(number, 0)]))

    null = call(0, message(INVOKE, (TMEM_INOUT, 0, 4096, 1)))
    done = outs(vector(probe(), create(), shares(5), shares(0), null, relinquish(), domains=low))
    assert done[2].forwarded[0].arg.translated[0].pages == [(1, 5)]
    assert done[3].forwarded == [] and written(done[3], 20) == BAD_PARAMETERS
    assert done[4].forwarded[0].arg.hex[40:48] == bytes(8) and done[4].forwarded[0].arg.translated == {}


def test_an_rpc_argument_at_ipa_0_is_refused() -> None:
    low = [{"id": 1, "npages": 64, "base_gfn": "0x0", "perm": "0x2b"}]
    steps = [
        call(page(2, 0), message(OPEN), answers=[answer(ALLOC, 0xA0, 0, 4)]),
        resume(4, 0, 0, 0, 0xC1, answers=[OK]),
    ]
    done = outs(vector(probe(), create(), *steps, relinquish(), domains=low))
    assert done[3].forwarded[0].regs[1:6] == [0, 0, 4, 0, 0xC1]
    assert done[3].state.rpc_bufs == 0


@pytest.mark.parametrize("base", [0x1, 0x40000, 0xFFFC0, 0x100000, 0xFFFFC0])
@pytest.mark.parametrize("npages", [1, 3, 64, 100])
@pytest.mark.parametrize("perm", [0, 1, 0x2B, 0x3F])
def test_a_domain_of_any_size_place_and_permutation_runs(base: int, npages: int, perm: int) -> None:
    """PA = ((d + 8) << 32) + ((i XOR perm) << 12), whatever the number of pages."""
    domain = {"id": 3, "npages": npages, "base_gfn": hex(base), "perm": hex(perm)}
    last = page(npages - 1, base)
    data = message(INVOKE, (1, 2, 3, 4))
    done = outs(vector(probe(), create(3), call(last, data, domain=3), relinquish(3), domains=[domain]))
    assert done[2].forwarded[0].arg.hex == data[:20] + b"\0\0\xff\xff" + data[24:]


def test_extra_forwards_are_answered_with_nothing_and_reported() -> None:
    """A recording in which the mediator forwarded less: ours goes on, and the difference is told."""
    quiet = one_page()
    quiet["out"]["forwarded"] = []
    _, violations = observed(vector(probe(), create(), quiet, relinquish()))
    assert violations == []
    found = differences(compared(vector(probe(), create(), quiet, relinquish())))
    assert (2, "forwarded") in found


def test_rpc_free_and_the_rest_of_the_rpcs_in_one_call() -> None:
    time = message(3, (2, 0, 0, 0), ret=GENERIC).hex()
    steps = [
        call(MESSAGE, message(OPEN), answers=[answer(ALLOC, 0xA0, 0, 4)]),
        resume(4, 0, page(8), 0, 0xC1, answers=[answer(CMD, 0, 0xC1, 4, writes=[("rpc:c1", 0, time)])]),
        resume(4, 0, 0xC1, writes=[(page(8), message(3, (2, 5, 6, 7)))], answers=[answer(0xFFFF0008, 1, 2, 4)]),
        resume(4, 0, 0, answers=[answer(FREE, 0, 0xC1, 4)]),
        resume(4, 0, 0, answers=[OK]),
    ]
    done = outs(vector(probe(), create(), *steps, relinquish()))
    resumed = [out.forwarded[0].resumes for out in done[3:7]]
    assert resumed == ["ALLOC", "CMD", "UNKNOWN8", "FREE"]
    assert done[4].forwarded[0].rpc_arg.hex[32:64] == message(3, (2, 5, 6, 7))[32:]
    assert done[5].state.rpc_bufs == 0 and done[5].pins == {"1": {}}


# Declared differences, against a recording that does as the reference


def suspended_with_a_buffer() -> list[Step]:
    """A call that made the buffer 0x500, and waits."""
    return [probe(), create(), one_page(answer(INTR, 0, 0, 3))]


def drop(step: Step) -> None:
    """As the reference: the buffer with the cookie that is named goes, whoever made it."""
    step["out"]["pins"] = {"1": {}}
    step["out"]["state"].update(quota_pages=0, quota_bufs=0, shm_bufs=[])


def test_r13_unregistering_the_buffer_of_a_call_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    done = answer(0, writes=[("arg:1", 20, "00000000")])
    stray = call(page(2), message(UNREGISTER, (5, 0, 0, 0x500)), answers=[done])
    described = recorded(vector(*suspended_with_a_buffer(), stray, resume(3, answers=[OK]), relinquish()))
    assert described["steps"][3]["out"]["pins"] == {"1": {hex(DATA >> 12): 1}}
    assert compared(described).agree == len(described["steps"])
    drop(described["steps"][3])
    report = compared(described)
    assert report.differ == [] and report.intended == {"R13": 1}
    kinds = [kind for kind in declarations() if kind.rule != "R13"]
    monkeypatch.setattr(comparing, "declarations", lambda: kinds)
    assert {step for step, _ in differences(compared(described))} == {3}


def test_r13_is_no_excuse_where_nobody_elses_buffer_is_named() -> None:
    done = answer(0, writes=[("arg:1", 20, "00000000")])
    stray = call(page(2), message(UNREGISTER, (5, 0, 0, 0x501)), answers=[done])
    described = recorded(vector(*suspended_with_a_buffer(), stray, resume(3, answers=[OK]), relinquish()))
    drop(described["steps"][3])
    assert {step for step, _ in differences(compared(described))} == {3}


@pytest.mark.parametrize(
    "reply",
    [
        message(9, (2, 5, 6, 7)),
        message(3, (2, 5, 6, 7), func=1),
        message(3, (3, 5, 6, 7)),
        message(3),
        message(3, (2, 5, 6, 7), (2, 5, 6, 7)),
    ],
)
def test_r16_a_reply_that_strays_from_its_request(reply: bytes) -> None:
    """The reference passes on whatever stands in the guest's page; ours what the request lets it answer."""
    time = message(3, (2, 0, 0, 0), ret=GENERIC).hex()
    steps = [
        call(MESSAGE, message(OPEN), answers=[answer(ALLOC, 0xA0, 0, 4)]),
        resume(4, 0, page(8), 0, 0xC1, answers=[answer(CMD, 0, 0xC1, 4, writes=[("rpc:c1", 0, time)])]),
        resume(4, 0, 0xC1, writes=[(page(8), reply)], answers=[OK]),
    ]
    described = recorded(vector(probe(), create(), *steps, relinquish()))
    shadow = described["steps"][4]["out"]["forwarded"][0]["rpc_arg"]
    assert shadow["hex"] != reply.hex()
    shadow["hex"] = reply.hex()
    report = compared(described)
    assert report.differ == [] and report.intended == {"R16": 1}
