"""Replaying traces that are written by hand: what the recordings at hand lack."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hv_models.stage2 import Pinned
from hv_models.vm import VirtualMachine
from mediator.policies import load_policy
from mediator.trace.format import read_trace
from mediator.trace.replay import Replay
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, Command
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import API_UID, OS_UUID, Function
from tests.trace.stories import (
    ALLOC,
    ARG,
    CMD,
    DATA,
    FREE,
    GENERIC,
    INTERRUPT,
    KERNEL_POINTER,
    LISTS,
    MESSAGE,
    NOTHING_LEFT,
    OUT_OF_MEMORY,
    REGD_ARG,
    RESUME,
    RPC_ARG,
    TMEM_INOUT,
    TMEM_OUT,
    argument_cycle,
    bad,
    done,
    forwarded,
    good,
    invoke,
    mediated,
    pages,
    probe,
    register,
    simple,
    start,
    story,
    unregister,
    views,
)
from tests.trace.tapes import (
    BASE,
    RPC_SIZE,
    Tape,
    list_memory,
    memory,
    message,
    to_pair,
)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 510, 511, 512, 1021, 1022, 1023, 1533, 1534, 16383, 16384])
def test_page_lists_of_any_length_are_registered(count: int, tmp_path: Path) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, pages(count))
    unregister(tape, KERNEL_POINTER)
    register(tape, KERNEL_POINTER, pages(count))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned == count
    assert report.left == {**NOTHING_LEFT, "pages": count, "buffers": 1}


@pytest.mark.parametrize("count", [511, 512, 1022, 1023, 16384])
@pytest.mark.parametrize("offset", [0, 0xF00])
def test_page_lists_of_any_length_are_temporary(count: int, offset: int, tmp_path: Path) -> None:
    tape = start()
    lists = [LISTS + number * 4096 for number in range(-(-count // ENTRIES_PER_PAGE))]
    data = invoke((TMEM_INOUT, lists[0] | offset, count * 4096 - offset, 0x1234), (1, 1, 2, 3))
    after = done(data, at48=(7).to_bytes(8, "little"))
    simple(tape, RPC_ARG, MESSAGE, data, after, *list_memory(pages(count), lists))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned == count and report.left == NOTHING_LEFT


@pytest.mark.parametrize("count", [512, 1022, 1023, 16384])
def test_a_wrong_entry_far_behind_in_a_page_list_is_found(count: int, tmp_path: Path) -> None:
    for at in (count - 1, 511, 510):
        tape = start()
        listed = pages(count)
        listed[at] = 0x7000_0000
        register(tape, KERNEL_POINTER, listed)
        report = tape.replay(tmp_path)
        bad(report, "guest's message")
        assert report.left == NOTHING_LEFT and report.violations == []


@pytest.mark.parametrize("count", [512, 1023, 16384])
def test_a_mediator_that_is_wrong_behind_the_first_list_page_is_found(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, pages(count))
    pin = VirtualMachine.pin

    def swapped(self: VirtualMachine, ipas: npt.NDArray[np.uint64]) -> Pinned:
        found = pin(self, ipas)
        if len(found.pas) == count:
            found.pas[[0, -1]] = found.pas[[-1, 0]]
        return found

    monkeypatch.setattr(VirtualMachine, "pin", swapped)
    bad(tape.replay(tmp_path), "translated page")


@pytest.mark.parametrize("count", [1, 511, 512, 700, 1023])
def test_a_buffer_for_optee_of_any_length(count: int, tmp_path: Path) -> None:
    """SHM_ALLOC's reply, and the kernel's pointer used again as soon as it is free."""
    tape = start()
    lists = [LISTS + number * 4096 for number in range(-(-count // ENTRIES_PER_PAGE))]
    data = invoke((3, 1, 2, 3))
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    for _ in range(3):
        request = message(RpcCommand.SHM_ALLOC, (1, 0, count * 4096, 8), ret=GENERIC)
        tape.back(call, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
        reply = message(RpcCommand.SHM_ALLOC, (TMEM_OUT, lists[0], count * 4096, KERNEL_POINTER), origin=2)
        call = tape.call(RESUME, memory=[*views(MESSAGE, data, reply), *list_memory(pages(count), lists)])
        request = message(RpcCommand.FS, (1, 2, 0, 0), (5, 0, 100, KERNEL_POINTER), (2, 0, 0, 0), ret=GENERIC)
        tape.back(call, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
        reply = message(RpcCommand.FS, (1, 2, 0, 0), (5, 0, 100, KERNEL_POINTER), (2, 5, 0, 0), origin=2)
        call = tape.call(RESUME, memory=views(MESSAGE, data, reply))
        request = message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, 0), ret=GENERIC)
        tape.back(call, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
        call = tape.call(RESUME, memory=views(MESSAGE, data, message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, 0))))
    tape.back(call, 0, memory=views(MESSAGE, done(data)))
    report = good(tape.replay(tmp_path))
    assert report.peak_pages_pinned == count and report.left == NOTHING_LEFT


@pytest.mark.parametrize("reply_attribute", [6, 10])
def test_a_null_reference_that_changes_its_type_in_a_reply(reply_attribute: int, tmp_path: Path) -> None:
    """Linux writes back its own idea of a NULL reference: TMEM where OP-TEE asked with RMEM."""
    tape = start()
    data = invoke((3, 1, 2, 3))
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    request = message(RpcCommand.LOAD_TA, (1, 1, 2, 0), (6, 0, 0, 0), ret=GENERIC)
    tape.back(call, CMD, memory=views(MESSAGE, data, request))
    reply = message(RpcCommand.LOAD_TA, (1, 1, 2, 0), (reply_attribute, 0, 0x5000, 0), origin=2)
    call = tape.call(RESUME, memory=views(MESSAGE, data, reply))
    tape.back(call, 0, memory=views(MESSAGE, done(data)))
    good(tape.replay(tmp_path))


def test_an_rpc_argument_that_optee_prepares_while_it_is_interrupted(tmp_path: Path) -> None:
    """Without a mediator the guest can see a request that is not made yet: a resume of FOREIGN_INTR compares none."""
    tape = start()
    data = invoke((3, 1, 2, 3))
    early = message(RpcCommand.FS, (1, 2, 0, 0), ret=GENERIC)
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    tape.back(call, INTERRUPT, memory=views(MESSAGE, data, early))
    call = tape.call(RESUME, memory=views(MESSAGE, data, early))
    tape.back(call, CMD, memory=views(MESSAGE, data, early))
    call = tape.call(RESUME, memory=views(MESSAGE, data, message(RpcCommand.FS, (1, 2, 0, 0))))
    tape.back(call, 0, memory=views(MESSAGE, done(data)))
    good(tape.replay(tmp_path))


def test_a_message_that_optee_writes_early(tmp_path: Path) -> None:
    tape = start()
    data = invoke((3, 1, 2, 3), (6, 0, 100, KERNEL_POINTER))
    early = done(data, ret=GENERIC, at40=b"\x09", at80=b"\x20")
    call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    tape.back(call, INTERRUPT, memory=views(MESSAGE, early))
    call = tape.call(RESUME, memory=[memory(MESSAGE, "message", early)])
    tape.back(call, 0, memory=views(MESSAGE, done(early)))
    good(tape.replay(tmp_path))


def test_calls_of_two_vcpus_overlap(tmp_path: Path) -> None:
    tape = start()
    first, second = invoke((3, 1, 2, 3)), invoke((3, 4, 5, 6))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, first), vcpu=0)
    b = tape.call(RPC_ARG, *to_pair(MESSAGE + 4096), memory=views(MESSAGE + 4096, second), vcpu=1)
    tape.back(b, INTERRUPT, 0, 0, 1, memory=views(MESSAGE + 4096, second))
    b = tape.call(RESUME, 0, 0, 1, memory=[memory(MESSAGE + 4096, "message", second)], vcpu=1)
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    tape.back(a, CMD, 0, 0, 0, memory=views(MESSAGE, first, request))
    a = tape.call(RESUME, memory=views(MESSAGE, first, message(RpcCommand.GET_TIME, (2, 8, 9, 0))), vcpu=0)
    tape.back(b, 0, memory=views(MESSAGE + 4096, done(second, at40=b"\x05")))
    tape.back(a, 0, memory=views(MESSAGE, done(first, at40=b"\x02")))
    good(tape.replay(tmp_path))


def test_a_thread_is_used_again_before_its_last_call_has_returned(tmp_path: Path) -> None:
    tape = start()
    first, second = invoke((3, 1, 2, 3)), invoke((3, 4, 5, 6))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, first), vcpu=0)
    tape.back(a, INTERRUPT, 0, 0, 0, memory=views(MESSAGE, first))
    a = tape.call(RESUME, memory=[memory(MESSAGE, "message", first)], vcpu=0)  # ends in OP-TEE at once
    b = tape.call(RPC_ARG, *to_pair(MESSAGE + 4096), memory=views(MESSAGE + 4096, second), vcpu=1)
    tape.back(b, INTERRUPT, 0, 0, 0, memory=views(MESSAGE + 4096, second))
    b = tape.call(RESUME, memory=[memory(MESSAGE + 4096, "message", second)], vcpu=1)
    tape.back(a, 0, memory=views(MESSAGE, done(first)))
    tape.back(b, 0, memory=views(MESSAGE + 4096, done(second)))
    good(tape.replay(tmp_path))


@pytest.mark.parametrize("leftovers", [(0, 0, 0), (0x55, 0xDEAD, 3)])
@pytest.mark.parametrize("code", [1, 2, 4, 5, 6, 7, 0xFFFFFFFF])
def test_an_error_of_optee_in_a0_whatever_stands_beside_it(
    code: int, leftovers: tuple[int, ...], tmp_path: Path
) -> None:
    """ETHREAD_LIMIT first of all; x1..x3 are leftovers, the message is as it was."""
    tape = start()
    data = invoke((3, 1, 2, 3))
    for _ in range(2):
        call = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
        tape.back(call, code, *leftovers, memory=views(MESSAGE, data))
    simple(tape, RPC_ARG, MESSAGE, data, done(data))
    good(tape.replay(tmp_path))


def test_the_mediators_own_thread_limit_is_the_recorded_one(tmp_path: Path) -> None:
    """Three calls on two threads: the third never reached OP-TEE, in the recording and in the replay."""
    tape = mediated(threads=2)
    data = invoke((3, 1, 2, 3))
    for thread in (0, 1):
        at = MESSAGE + thread * 4096
        call = tape.call(ARG, *to_pair(at), memory=[memory(at, "message", data)])
        tape.forward(call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), message=done(data, ret=GENERIC, origin=0))
        tape.answer(call, (INTERRUPT, 0, 0, thread), message=data)
        tape.back(call, INTERRUPT, 0, 0, thread, memory=[memory(at, "message", data)])
    at = MESSAGE + 2 * 4096
    call = tape.call(ARG, *to_pair(at), memory=[memory(at, "message", data)])
    tape.back(call, 1, *to_pair(at), 0, memory=[memory(at, "message", data)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left["calls"] == 2 and report.forwarded == 2


def test_a_slot_that_becomes_free_between_call_and_forward(tmp_path: Path) -> None:
    """The other mediator decided when it forwarded; by then the first call's slot was free."""
    tape = mediated(threads=1)
    data, after = invoke((3, 1, 2, 3)), done(invoke((3, 1, 2, 3)))
    regs = (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5)
    second = MESSAGE + 4096
    a = tape.call(ARG, *to_pair(MESSAGE), vcpu=0, memory=[memory(MESSAGE, "message", data)])
    tape.forward(a, regs, message=data)
    b = tape.call(ARG, *to_pair(second), vcpu=1, memory=[memory(second, "message", data)])
    tape.answer(a, (0,), message=after)
    forwarded(tape, b, regs, (0,), data, after)
    tape.back(a, 0, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", after)])
    tape.back(b, 0, *to_pair(second), memory=[memory(second, "message", after)])
    good(tape.replay(tmp_path, "xen"))


def test_a_refused_call_does_not_take_the_slot_of_a_forwarded_one(tmp_path: Path) -> None:
    """b comes before c, but c is decided first: b finds the slot taken."""
    tape = mediated(threads=1)
    data, after = invoke((3, 1, 2, 3)), done(invoke((3, 1, 2, 3)))
    regs = (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5)
    at = [MESSAGE, MESSAGE + 4096]
    b = tape.call(ARG, *to_pair(at[0]), vcpu=0, memory=[memory(at[0], "message", data)])
    c = tape.call(ARG, *to_pair(at[1]), vcpu=1, memory=[memory(at[1], "message", data)])
    tape.forward(c, regs, message=data)
    tape.back(b, 1, *to_pair(at[0]), memory=[memory(at[0], "message", data)])
    tape.answer(c, (0,), message=after)
    tape.back(c, 0, *to_pair(at[1]), memory=[memory(at[1], "message", after)])
    good(tape.replay(tmp_path, "xen"))


def test_a_slot_that_is_free_for_us_a_little_earlier_than_it_was(tmp_path: Path) -> None:
    """The other mediator refused a call while it copied another's outputs; that one's answer is recorded before."""
    tape = mediated(threads=1)
    data, after = invoke((3, 1, 2, 3)), done(invoke((3, 1, 2, 3)))
    second = MESSAGE + 4096
    a = tape.call(ARG, *to_pair(MESSAGE), vcpu=0, memory=[memory(MESSAGE, "message", data)])
    forwarded(tape, a, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (0,), data, after)
    b = tape.call(ARG, *to_pair(second), vcpu=1, memory=[memory(second, "message", data)])
    tape.back(b, 1, *to_pair(second), memory=[memory(second, "message", data)])
    tape.back(a, 0, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", after)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left == NOTHING_LEFT


@pytest.mark.parametrize("what", ["pages", "buffers"])
def test_a_quota_that_the_other_mediator_has_as_well(what: str, tmp_path: Path) -> None:
    """130 pages, or a 17th buffer: a0 = 0, OUT_OF_MEMORY from COMMS, nothing forwarded."""
    tape = mediated()
    registers = 17 if what == "buffers" else 1
    for number in range(registers):
        count = 130 if what == "pages" else 1
        data = message(Command.REGISTER_SHM, (TMEM_OUT, LISTS, count * 4096, KERNEL_POINTER + number))
        entries = [memory(MESSAGE, "message", data), *list_memory(pages(count), [LISTS])]
        call = tape.call(ARG, *to_pair(MESSAGE), memory=entries)
        if number + 1 < registers:
            after = done(data)
            forwarded(tape, call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (0,), data, after)
        else:
            after = done(data, ret=OUT_OF_MEMORY, origin=Origin.COMMS)
        tape.back(call, 0, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", after)])
    good(tape.replay(tmp_path, "xen"))


@pytest.mark.parametrize("count", [130, 512, 1023])
def test_a_buffer_for_optee_that_is_more_than_the_other_mediator_allows(count: int, tmp_path: Path) -> None:
    """It has the guest free the buffer again and tells OP-TEE; what it asks with is no request of OP-TEE's."""
    tape = mediated()
    cookie = 0xFFFF_0000_1111_0080
    pair = (cookie >> 32, cookie & 0xFFFFFFFF)
    argument = BASE + 0x9000
    call, data = argument_cycle(tape, cookie, argument)
    request = message(RpcCommand.SHM_ALLOC, (1, 0, count * 4096, 8), ret=GENERIC)
    tape.answer(call, (CMD, *pair, 0), message=data, rpc=request + bytes(RPC_SIZE - len(request)))
    here = memory(MESSAGE, "message", data)
    tape.back(call, CMD, *pair, 0, memory=[here, memory(argument, "rpc", request + bytes(RPC_SIZE - len(request)))])
    lists = [LISTS + number * 4096 for number in range(-(-count // ENTRIES_PER_PAGE))]
    reply = message(RpcCommand.SHM_ALLOC, (TMEM_OUT, lists[0], count * 4096, KERNEL_POINTER), origin=2)
    free = message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, KERNEL_POINTER), ret=GENERIC, origin=2)
    tail = bytes(RPC_SIZE - len(reply))
    call = tape.call(
        RESUME, *pair, 0, *pair, memory=[here, memory(argument, "rpc", reply + tail), *list_memory(pages(count), lists)]
    )
    tape.back(call, CMD, *pair, 0, memory=[here, memory(argument, "rpc", free + tail)])
    freed = message(RpcCommand.SHM_FREE, (1, 0, KERNEL_POINTER, KERNEL_POINTER), origin=2)
    call = tape.call(RESUME, *pair, 0, *pair, memory=[here, memory(argument, "rpc", freed + tail)])
    told = HEADER.pack(RpcCommand.SHM_FREE, 0, 0, 0, 0, GENERIC, 2, 0)
    tape.forward(call, (RESUME, 0, 0, 0, 0, 0, 0, 5), message=data, rpc=told + bytes(RPC_SIZE - len(told)))
    after = done(data, ret=OUT_OF_MEMORY, origin=3)
    tape.answer(call, (0,), message=after)
    tape.back(call, 0, *pair, 0, memory=[memory(MESSAGE, "message", after)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left == {**NOTHING_LEFT, "rpc_arguments": 1}


@pytest.mark.parametrize("full", [False, True])
def test_cached_rpc_arguments_are_given_back_with_whole_cookies(full: bool, tmp_path: Path) -> None:
    """DISABLE_SHM_CACHE answers the cookie's high half in x1, and all 64 bits of it in x2."""
    tape = mediated()
    cookie = 0xFFFF_0000_7BC0_2180
    upper, lower = cookie >> 32, cookie & 0xFFFFFFFF
    call, data = argument_cycle(tape, cookie, BASE + 0x9000)
    after = done(data)
    tape.answer(call, (0,), message=after)
    tape.back(call, 0, *to_pair(BASE + 0x9000), 0, memory=[memory(MESSAGE, "message", after)])
    for answer in ((0, upper, cookie if full else lower, 0), (7, 0, 0, 0)):
        call = tape.call(Function.DISABLE_SHM_CACHE)
        tape.forward(call, (Function.DISABLE_SHM_CACHE, 0, 0, 0, 0, 0, 0, 5))
        tape.answer(call, answer)
        tape.back(call, *(answer if not answer[0] else (7, 0, 0, 0)))
    # The page, and the pointer that names it, are the guest's again.
    call, data = argument_cycle(tape, cookie, BASE + 0x9000)
    tape.answer(call, (0,), message=after)
    tape.back(call, 0, *to_pair(BASE + 0x9000), 0, memory=[memory(MESSAGE, "message", after)])
    report = good(tape.replay(tmp_path, "xen"))
    assert report.left == {**NOTHING_LEFT, "rpc_arguments": 1}


def test_rpc_free_and_the_same_page_and_cookie_again(tmp_path: Path) -> None:
    tape = mediated()
    cookie = 0xFFFF_0000_7BC0_2180
    pair = (cookie >> 32, cookie & 0xFFFFFFFF)
    for _ in range(3):
        call, data = argument_cycle(tape, cookie, BASE + 0x9000)
        here = memory(MESSAGE, "message", data)
        tape.answer(call, (FREE, *pair, 0), message=data)
        tape.back(call, FREE, *pair, 0, memory=[here])
        call = tape.call(RESUME, *pair, 0, *pair, memory=[here])
        forwarded(tape, call, (RESUME, *pair, 0, 0, 0, 0, 5), (0,), data, done(data))
        tape.back(call, 0, *pair, 0, memory=[memory(MESSAGE, "message", done(data))])
    assert good(tape.replay(tmp_path, "xen")).left == NOTHING_LEFT


def test_a_guest_without_memory_for_an_rpc_argument(tmp_path: Path) -> None:
    """Linux answers RPC ALLOC with address and cookie 0; OP-TEE gives the call up."""
    tape = mediated()
    data = invoke((3, 1, 2, 3))
    here = memory(MESSAGE, "message", data)
    call = tape.call(ARG, *to_pair(MESSAGE), memory=[here])
    forwarded(tape, call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), (ALLOC, 0xA0, 0, 0), data, data)
    tape.back(call, ALLOC, 0xA0, 0, 0, memory=[here])
    call = tape.call(RESUME, 0, 0, 0, 0, 0, memory=[here])
    after = done(data, ret=OUT_OF_MEMORY, origin=3)
    forwarded(tape, call, (RESUME, 0, 0, 0, 0, 0, 0, 5), (0,), data, after)
    tape.back(call, 0, 0, 0, 0, memory=[memory(MESSAGE, "message", after)])
    assert good(tape.replay(tmp_path, "xen")).left == NOTHING_LEFT


def test_two_calls_each_with_an_rpc_argument_of_its_own(tmp_path: Path) -> None:
    """A driver without RPC_ARG, and nothing between."""
    tape = start(0x14)
    here = [MESSAGE, MESSAGE + 4096]
    arguments, cookies = [BASE + 0x9000, BASE + 0xA000], [KERNEL_POINTER, KERNEL_POINTER + 0x80]
    data = invoke((3, 1, 2, 3))
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    reply = message(RpcCommand.GET_TIME, (2, 8, 9, 0))
    for n in (0, 1):
        call = tape.call(ARG, *to_pair(here[n]), memory=[memory(here[n], "message", data)], vcpu=n)
        tape.back(call, ALLOC, 0xA0, 0, n, memory=[memory(here[n], "message", data)])
    for n in (1, 0):
        entry = memory(here[n], "message", data)
        upper, lower = cookies[n] >> 32, cookies[n]  # Linux puts all 64 bits into x5
        call = tape.call(RESUME, *to_pair(arguments[n]), n, upper, lower, memory=[entry], vcpu=1 - n)
        tape.back(call, CMD, upper, lower, n, memory=[entry, memory(arguments[n], "rpc", request)])
    for n in (0, 1):
        entry = memory(here[n], "message", data)
        pair = (cookies[n] >> 32, cookies[n])
        call = tape.call(RESUME, *pair, n, memory=[entry, memory(arguments[n], "rpc", reply)])
        tape.back(call, 0, memory=[memory(here[n], "message", done(data))])
    assert good(tape.replay(tmp_path)).left == {**NOTHING_LEFT, "rpc_arguments": 2}


def test_notifications_in_the_middle_of_calls(tmp_path: Path) -> None:
    """GET_ASYNC_NOTIF_VALUE comes from interrupt context, DO_BOTTOM_HALF and STOP_ASYNC_NOTIF are messages."""
    tape = start()
    register(tape, KERNEL_POINTER, [DATA])
    data = invoke((3, 1, 2, 3))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 0, 3, 0), vcpu=1)
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 9, 1, 0), vcpu=1)
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 0, 0, 0), vcpu=1)
    bottom = message(Command.DO_BOTTOM_HALF)
    b = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0x180, memory=views(DATA + 0x180, bottom), vcpu=1)
    tape.back(a, INTERRUPT, 0, 0, 0, memory=views(MESSAGE, data))
    tape.back(b, 0, memory=views(DATA + 0x180, done(bottom)))
    tape.fast(Function.GET_ASYNC_NOTIF_VALUE, answer=(0, 1, 1, 0), vcpu=1)
    a = tape.call(RESUME, memory=[memory(MESSAGE, "message", data)])
    tape.back(a, 0, memory=views(MESSAGE, done(data)))
    stop = message(Command.STOP_ASYNC_NOTIF)
    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0, memory=views(DATA, stop))
    tape.back(call, 0, memory=views(DATA, done(stop)))
    unregister(tape, KERNEL_POINTER)
    assert good(tape.replay(tmp_path)).left == NOTHING_LEFT


@pytest.mark.parametrize("offset", [0, 8, 0x180, 0xE00, 4096, 4096 + 0x180, 2 * 4096 + 0xF00 - 160])
def test_a_registered_message_at_any_offset(offset: int, tmp_path: Path) -> None:
    """In any page of its buffer, whose pages need not be neighbours."""
    tape = start()
    listed = [DATA + 0x8000, DATA, DATA + 0x4000]
    register(tape, KERNEL_POINTER, listed)
    data = invoke((3, 1, 2, 3), (3, 4, 5, 6), session=offset + 1)

    def here(data: bytes) -> list[dict[str, str]]:
        """The message and the empty RPC argument behind it, where each begins."""
        return [
            memory(listed[at // 4096] + at % 4096, kind, octets)
            for kind, at, octets in (("message", offset, data), ("rpc", offset + len(data), bytes(RPC_SIZE)))
        ]

    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), offset, memory=here(data))
    tape.back(call, 0, memory=here(done(data, at40=b"\x77", at72=b"\x88")))
    report = good(tape.replay(tmp_path))
    assert report.expected["regd_arg_as_rpc_arg"] == 1


def test_a_registered_message_in_a_buffer_with_an_offset(tmp_path: Path) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, [DATA], offset=0x40)
    data = invoke((3, 1, 2, 3))
    call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0x100, memory=views(DATA + 0x140, data))
    tape.back(call, 0, memory=views(DATA + 0x140, done(data)))
    good(tape.replay(tmp_path))


def test_a_driver_that_is_loaded_again(tmp_path: Path) -> None:
    """The same pointers, the same pages, a new driver."""
    tape = Tape([(BASE, 128 << 20)])
    for _ in range(3):
        probe(tape)
        register(tape, KERNEL_POINTER, [DATA])
        register(tape, KERNEL_POINTER + 0x100, pages(600))
        unregister(tape, KERNEL_POINTER + 0x100)
        stop = message(Command.STOP_ASYNC_NOTIF)
        call = tape.call(REGD_ARG, *to_pair(KERNEL_POINTER), 0, memory=views(DATA, stop))
        tape.back(call, 0, memory=views(DATA, done(stop)))
        unregister(tape, KERNEL_POINTER)
    assert good(tape.replay(tmp_path)).left == NOTHING_LEFT


def test_cancellation_and_what_it_ends_with(tmp_path: Path) -> None:
    tape = start()
    data = message(Command.INVOKE_COMMAND, (1, 5000, 1, 0), session=4, cancel_id=17)
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    request = message(RpcCommand.SUSPEND, (1, 10, 0, 0), ret=GENERIC)
    tape.back(a, CMD, memory=views(MESSAGE, data, request))
    cancel = message(Command.CANCEL, session=4, cancel_id=17)
    simple(tape, RPC_ARG, MESSAGE + 4096, cancel, done(cancel), vcpu=1)
    a = tape.call(RESUME, memory=views(MESSAGE, data, message(RpcCommand.SUSPEND, (1, 10, 0, 0))))
    tape.back(a, 0, memory=views(MESSAGE, done(data, ret=Result.CANCEL)))
    good(tape.replay(tmp_path))


def test_wait_and_wake_by_notification_rpcs(tmp_path: Path) -> None:
    tape = start()
    data = invoke((3, 1, 2, 3))
    wait = message(RpcCommand.NOTIFICATION, (1, 0, 70, 0), ret=GENERIC)
    send = message(RpcCommand.NOTIFICATION, (1, 1, 70, 0), ret=GENERIC)
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    tape.back(a, CMD, memory=views(MESSAGE, data, wait))
    b = tape.call(RPC_ARG, *to_pair(MESSAGE + 4096), memory=views(MESSAGE + 4096, data), vcpu=1)
    tape.back(b, CMD, 0, 0, 1, memory=views(MESSAGE + 4096, data, send))
    b = tape.call(RESUME, 0, 0, 1, memory=views(MESSAGE + 4096, data, done(send, origin=0)), vcpu=1)
    a = tape.call(RESUME, 0, 0, 0, memory=views(MESSAGE, data, done(wait, origin=0)), vcpu=0)
    tape.back(b, 0, memory=views(MESSAGE + 4096, done(data)))
    tape.back(a, 0, memory=views(MESSAGE, done(data)))
    good(tape.replay(tmp_path))


def test_a_size_that_optee_makes_greater(tmp_path: Path) -> None:
    """SHORT_BUFFER: the size that would be needed, in registered and in temporary memory, in NULL too."""
    tape = start()
    register(tape, KERNEL_POINTER, [DATA])
    data = invoke((6, 0, 64, KERNEL_POINTER), (TMEM_OUT, LISTS, 4096, 0x99), (10, 0, 0, 0), (7, 8, 64, KERNEL_POINTER))
    size = (5000).to_bytes(8, "little")
    after = done(data, ret=Result.SHORT_BUFFER, at48=size, at80=size, at112=size, at144=size)
    simple(tape, RPC_ARG, MESSAGE, data, after, *list_memory([DATA + 4096], [LISTS]))
    good(tape.replay(tmp_path))


@pytest.mark.parametrize("function", [0x3200_0020, 0xB200_0030, 0xBF00_FF02])
@pytest.mark.parametrize("unknown", [0xFFFFFFFF, 0xFFFFFFFF_FFFFFFFF])
def test_a_function_that_nobody_knows(function: int, unknown: int, tmp_path: Path) -> None:
    """OP-TEE's -1 has 32 bits, the mediator's 64 (R2): no Linux can tell them apart."""
    tape = start()
    tape.fast(function, 1, 2, 3, answer=(unknown, 1, 2, 3))
    good(tape.replay(tmp_path))


def test_identities_and_counts(tmp_path: Path) -> None:
    tape = start()
    tape.fast(Function.GET_OS_UUID, answer=OS_UUID)
    tape.fast(Function.CALLS_COUNT, answer=(12, 0, 0, 0))
    tape.fast(Function.GET_THREAD_COUNT, answer=(0, 2, 0, 0))
    report = good(tape.replay(tmp_path))
    assert report.expected["calls_count"] == 1


@pytest.mark.parametrize("client", [1, 5, 65535])
def test_a_guest_with_any_client_id(client: int, tmp_path: Path) -> None:
    tape = mediated(client=client)
    call = tape.call(Function.CALLS_UID, 0, 0, 0, 0, 0, 0, 9)
    tape.forward(call, (Function.CALLS_UID, 0, 0, 0, 0, 0, 0, client))
    tape.answer(call, API_UID)
    tape.back(call, *API_UID)
    good(tape.replay(tmp_path, "xen"))


@pytest.mark.parametrize(
    "ram",
    [
        ((BASE, 1 << 20), (0x1_0000_0000, 1 << 20)),
        ((0x1_0000_0000, 1 << 20), (BASE, 1 << 20)),
        ((BASE, 1 << 20), (BASE + (2 << 20), 1 << 20), (BASE + (8 << 20), 1 << 20)),
    ],
)
def test_ram_in_pieces(ram: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """A page list names pages of all of them."""
    tape = start(ram=ram)
    listed = [base + number * 4096 for number in range(16, 40) for base, _ in ram]
    data = message(Command.REGISTER_SHM, (TMEM_OUT, ram[-1][0] + 0x2000, len(listed) * 4096, KERNEL_POINTER))
    lists = list_memory(listed, [ram[-1][0] + 0x2000])
    simple(tape, RPC_ARG, ram[0][0] + 0x1000, data, done(data), *lists)
    assert good(tape.replay(tmp_path)).peak_pages_pinned == len(listed)


def test_a_trace_that_ends_within_calls_of_each_kind(tmp_path: Path) -> None:
    tape = start()
    register(tape, KERNEL_POINTER, pages(600))
    data = invoke((3, 1, 2, 3))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data))
    request = message(RpcCommand.GET_TIME, (2, 0, 0, 0), ret=GENERIC)
    tape.back(a, CMD, 0, 0, 0, memory=views(MESSAGE, data, request))
    temporary = invoke((TMEM_INOUT, LISTS, 3 * 4096, 0x99))
    at = MESSAGE + 4096
    tape.call(RPC_ARG, *to_pair(at), memory=[*views(at, temporary), *list_memory(pages(3), [LISTS])])
    tape.call(Function.GET_ASYNC_NOTIF_VALUE)
    report = good(tape.replay(tmp_path))
    assert report.left == {"pages": 603, "calls": 2, "buffers": 2, "rpc_arguments": 0}
    assert report.returned == report.calls - 2


@pytest.mark.parametrize("policy", ["xen", "default"])
@pytest.mark.parametrize("end", ["call", "forward", "answer"])
def test_a_mediated_trace_that_ends_within_a_call(end: str, policy: str, tmp_path: Path) -> None:
    tape = mediated()
    data = invoke((3, 1, 2, 3))
    call = tape.call(ARG, *to_pair(MESSAGE), memory=[memory(MESSAGE, "message", data)])
    if end != "call":
        tape.forward(call, (ARG, 0x10, 0x1000, 1, 0, 0, 0, 5), message=data)
    if end == "answer":
        tape.answer(call, (INTERRUPT, 0, 0, 0), message=data)
    good(tape.replay(tmp_path, policy))


def test_an_observer_sees_each_call_and_answer(tmp_path: Path) -> None:
    header, events = read_trace(story().write(tmp_path / "tape.jsonl.gz"))
    seen: list[tuple[str, str]] = []
    run = Replay(
        header,
        events,
        load_policy("default"),
        lambda event, step: seen.append((type(event).__name__, type(step).__name__)),
    )
    good(run.run())
    assert set(seen) == {("CallEvent", "Forward"), ("ReturnEvent", "Reply")}


def test_a_policy_of_another_limit_answers_for_itself(tmp_path: Path) -> None:
    """Where the mediator says ETHREAD_LIMIT itself, the recorded answer is not taken for another call's."""
    policy = load_policy("default")
    policy = replace(policy, limits=replace(policy.limits, calls=1))
    tape = start()
    data = invoke((3, 1, 2, 3))
    a = tape.call(RPC_ARG, *to_pair(MESSAGE), memory=views(MESSAGE, data), vcpu=0)
    tape.back(a, INTERRUPT, memory=views(MESSAGE, data))
    at = MESSAGE + 4096
    b = tape.call(RPC_ARG, *to_pair(at), memory=views(at, data), vcpu=1)
    tape.back(b, 1, 5, 6, 7, memory=views(at, data))
    a = tape.call(RESUME, memory=[memory(MESSAGE, "message", data)])
    tape.back(a, 0, memory=views(MESSAGE, done(data)))
    report = good(tape.replay(tmp_path, policy))
    assert report.forwarded == report.calls - 1
