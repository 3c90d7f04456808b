"""Each rule and each class of mistakes is broken in one way and more, and the scenarios that name it notice."""

import os
import runpy
from typing import Final

import pytest

from hv_models import guest_memory, stage2
from mediator.core import fast, flow, ledger, lifecycle, limits, pool, rpc, sharing, yielding
from mediator.core import mediator as core
from mediator.core.faults import MediatorBug
from mediator.core.mediator import Mediator
from mediator.scenario import find_scenario, library, run_scenario
from tests.docs.pages import DOCS
from tests.wrong_mediators import FAULTS, Fault, broken

MISTAKES: Final[dict[str, tuple[str, str, Fault]]] = {
    "a7 of a yielding call is another guest's": (
        "R1 B6",
        "life-cycle",
        Fault(yielding._send, r"call\.guest\.vm\)", "call.guest.vm + 1)"),
    ),
    "a7 of a fast call is the guest's word": ("R1 B6", "life-cycle", FAULTS["a7 of a fast call is the guest's word"]),
    "a7 of a resumed call is another guest's": (
        "R1 B6",
        "xtest-probe",
        Fault(rpc._forward, r"call\.guest\.vm\)", "call.guest.vm + 1)"),
    ),
    "x0 is compared with all 64 bits": (
        "R2",
        "denied-functions",
        Fault(Mediator.submit, r"get\(regs\[0\] & LOW\)", "get(regs[0])"),
    ),
    "what is not handled is -1 in 32 bits": (
        "R2",
        "denied-functions",
        Fault(Mediator.submit, r"step: Step = Reply\(\(NOT_HANDLED", "step: Step = Reply((LOW"),
    ),
    "what is not allowed is forwarded": (
        "R2 B11",
        "denied-functions",
        Fault(Mediator.submit, r"get\(regs\[0\] & LOW\)", "get(regs[0] & LOW, Function.CALLS_UID)"),
    ),
    "what is not allowed is not counted": (
        "R2",
        "denied-functions",
        Fault(Mediator.submit, r"counters\.denied \+= 1", "counters.denied += 0"),
    ),
    "the table of answers is not looked at": (
        "R3 B12",
        "words-of-answers",
        Fault(core._reply, r"if straight:", "if True:"),
    ),
    "a4 to a7 are zeroed": (
        "R3 B12",
        "words-of-answers",
        Fault(core._reply, r"(?s)regs\[4\], regs\[5\], regs\[6\], regs\[7\]", "0, 0, 0, 0"),
    ),
    "a4 to a7 are zeroed by the table": (
        "R3 B12",
        "words-of-answers",
        Fault(core._reply, r"\*regs\[4:\]", "0, 0, 0, 0"),
    ),
    "all capabilities are offered": (
        "R4 B11",
        "capabilities",
        Fault(fast._capabilities, r"answer\[1\] & .*", "answer[1]"),
    ),
    "GET_SHM_CONFIG is answered": (
        "R4 B8 B11",
        "reserved-memory-denied",
        Fault(fast.enter, r"ReturnCode\.ENOTAVAIL", "ReturnCode.OK"),
    ),
    "reserved memory is all there is": (
        "R4 B11",
        "capabilities",
        Fault(fast._capabilities, r"if not offered & SecCapability\.DYNAMIC_SHM:", "if False:"),
    ),
    "asynchronous notifications are enabled for nobody": (
        "R4 R29 B11",
        "asynchronous-notification",
        Fault(fast.returned, r"guest\.notifications = True", "pass"),
    ),
    "the RPMB device is everybody's": (
        "R4 R18 B6 B11",
        "rpmb-owner",
        Fault(rpc._deliver, r"and not guest\.rpmb", "and False"),
    ),
    "the message is read twice": (
        "R5 B1",
        "time-of-check",
        Fault(
            yielding._take_message,
            r"view\[:size\] = data\[:size\]",
            "view[:size] = guest.memory.read(call.ipa, PAGE_SIZE)[:size]",
        ),
    ),
    "the guest's page list is forwarded": (
        "R6 B8",
        "same-cookies",
        Fault(sharing.translate, r"= page\.pa \| offset", "= source | offset"),
    ),
    "entries of a list go through as they are": (
        "R6",
        "same-cookies",
        Fault(sharing._pin, r"= octets\[at : at \+ size\]", "= run"),
    ),
    "the guest's RPC page is forwarded": ("R6", "rpc-replies", FAULTS["the guest's RPC page is forwarded"]),
    "an address of a list page is masked": (
        "R7",
        "page-lists",
        Fault(
            sharing.translate,
            r"(?s)if source & OFFSET_MASK:\n\s+raise .*?\n",
            "source = Ipa(source & ~OFFSET_MASK)\n",
        ),
    ),
    "an entry is masked": (
        "R7 B2",
        "page-lists",
        Fault(sharing._pin, r"_ADDRESSES\)\)", "_ADDRESSES) & ~np.uint64(4095))"),
    ),
    "a list may lie in memory that is not RAM": (
        "R7",
        "page-lists",
        Fault(sharing.translate, r", writable=True", ""),
    ),
    "read-only pages are shared": (
        "R7 B5",
        "page-type-change",
        Fault(guest_memory.GuestMemory._shareable, r"if kind is not PageKind\.RAM_RW:", "if False:"),
    ),
    "a size is cut to 32 bits": (
        "R8 B2",
        "sizes",
        Fault(sharing._open, r"page_count\(size, offset\)", "page_count(size & 0xFFFFFFFF, offset)"),
    ),
    "the offset does not count": (
        "R8 B2",
        "sizes",
        Fault(sharing._open, r"page_count\(size, offset\)", "page_count(size, 0)"),
    ),
    "a buffer may be of any size": (
        "R8 B2",
        "sizes",
        Fault(sharing._open, r"if count > most:", "if False:"),
    ),
    "the limit of a buffer is one too many": (
        "R8 B2",
        "sizes",
        Fault(sharing._open, r"if count > most:", "if count > most + 1:"),
    ),
    "a list of no pages is a list": ("R8 B15", "sizes", Fault(sharing._open, r"if count == 0:", "if False:")),
    "the page at IPA 0 is shared": (
        "R9 B15",
        "ram-at-zero",
        Fault(guest_memory.GuestMemory._shareable, r"if ipa == 0:", "if False:"),
    ),
    "a rejected message says nothing": (
        "R10",
        "rejected-messages",
        Fault(yielding._reject, r"call\.write\(.*\)", "pass"),
    ),
    "a rejection comes from nowhere": ("R10", "rejected-messages", Fault(yielding._reject, r"\+ _COMMS", "+ bytes(4)")),
    "a rejection is an error in a0": (
        "R10",
        "rejected-messages",
        Fault(yielding._reject, r"ReturnCode\.OK\)", "ReturnCode.EBADCMD)"),
    ),
    "128 parameters fit a page": (
        "R10 B2",
        "rejected-messages",
        Fault(yielding._take_message, r"num_params > MAX_PARAMS", "num_params > 1000"),
    ),
    "an unknown command is rejected in the message": (
        "R10",
        "rejected-messages",
        Fault(
            yielding._take_message,
            r"raise CallRefused\(ReturnCode\.EBADCMD,",
            "raise MessageRejected(Result.BAD_PARAMETERS,",
        ),
    ),
    "ret is not preset": (
        "R11",
        "refused-in-a0",
        Fault(yielding._take_message, r"view\[OFFSET_RET:OFFSET_RET_ORIGIN\] = _PRESET", "pass"),
    ),
    "a refused call is written back": (
        "R11 B3",
        "refused-in-a0",
        Fault(yielding.completed, r"if code != 0:", "if False:"),
    ),
    "a refused registration stays": ("R11 R13 B3", "refused-in-a0", FAULTS["a refused registration stays"]),
    "a call's buffers stay": ("R12 R13 R21 B3", "all-or-nothing", FAULTS["a call's buffers stay"]),
    "a failed parameter leaves those before it": (
        "R12 B3",
        "all-or-nothing",
        Fault(
            yielding._reject,
            r"end\(core, call, CallEvent\.REJECT\)",
            "call.shared = None; end(core, call, CallEvent.REJECT)",
        ),
    ),
    "a call frees whatever its guest has": (
        "R12 R13 B4",
        "all-or-nothing",
        Fault(
            yielding.end,
            r"if call\.shared is not None:\n(\s+)release_shared\(core, guest, call\.shared\)",
            r"for each in set(guest.buffers.values()):\n\1release_shared(core, guest, each)",
        ),
    ),
    "a live cookie is taken again": ("R13 R15 B5", "cookies", FAULTS["a live cookie is taken again"]),
    "a duplicate cookie keeps its charge": ("R13 R21 B3", "cookies", FAULTS["a duplicate cookie keeps its charge"]),
    "cookie 0 is a registered reference": (
        "R13 B15",
        "cookies",
        Fault(yielding._note_registered, r"cookie == 0 and", "False and"),
    ),
    "a live RPC argument is replaced": ("R13", "shm-cache", FAULTS["a live RPC argument is replaced"]),
    "a result that cannot be written is success": (
        "R14",
        "page-type-change",
        Fault(yielding.completed, r"return refuse\(.*\)", "return core.completed(regs, answer)"),
    ),
    "REGISTER_SHM with any number of parameters": (
        "R15 B4",
        "register-shapes",
        Fault(yielding._check_register, r"if num_params != 1:", "if False:"),
    ),
    "REGISTER_SHM with any attribute": (
        "R15 B7",
        "register-shapes",
        Fault(yielding._check_register, r"if attribute not in policy\.register_attributes:", "if False:"),
    ),
    "cookie 0 is registered": ("R15 B15", "cookies", Fault(yielding._check_register, r"or cookie == 0", "")),
    "UNREGISTER_SHM with any number of parameters": (
        "R15 B4",
        "register-shapes",
        Fault(yielding._begin_unregister, r"if num_params != 1:", "if False:"),
    ),
    "UNREGISTER_SHM with any attribute": (
        "R15 B7",
        "register-shapes",
        Fault(yielding._begin_unregister, r"if policy\.unregister_attributes is not None", "if False"),
    ),
    "an unregistered buffer stays": ("R15", "cookies", FAULTS["an unregistered buffer stays"]),
    "a buffer is released before OP-TEE has unregistered it": (
        "R15 B5",
        "register-use-unregister",
        Fault(
            yielding._take_message,
            r"(_begin_unregister\(.*\))",
            r"\1; call.unregistering and release_shared(core, guest, call.unregistering)",
        ),
    ),
    "a good registration is dropped": ("R15", "cookies", FAULTS["a good registration is dropped"]),
    "a reply has as many parameters as it likes": (
        "R16 B4",
        "rpc-replies",
        Fault(rpc._resume_command, r"if replied != num_params and", "if False and"),
    ),
    "a reply is taken over as it is": (
        "R16 B7",
        "rpc-replies",
        Fault(
            rpc._resume_command, r"argument\[field\] = reply\[field\]", "argument[HEADER_SIZE:] = reply[HEADER_SIZE:]"
        ),
    ),
    "a reply is dropped": (
        "R16",
        "storage-gc-pressure",
        Fault(rpc._resume_command, r"argument\[field\] = reply\[field\]", "pass"),
    ),
    "SHM_ALLOC is answered with any attribute": (
        "R16 B7",
        "rpc-replies",
        Fault(rpc._take_allocated, r"if param\[0\] != _SHM_ALLOC_REPLY:", "if False:"),
    ),
    "a1 and a2 of a resumed call are the guest's": (
        "R17",
        "resume",
        Fault(rpc._resume_plainly, r"a1, a2 = call\.rpc_words", "a1, a2 = regs[1], regs[2]"),
    ),
    "a resumed thread can be resumed again": ("R17 B6", "resume", FAULTS["a resumed thread can be resumed again"]),
    "a thread of another guest can be resumed": (
        "R17 B6",
        "resume",
        Fault(
            rpc.resume,
            r"call = guest\.suspended\.get\(thread\)",
            "guest = next((one for one in core.guests.values() if thread in one.suspended), guest)\n"
            "    call = guest.suspended.get(thread)",
        ),
    ),
    "the thread id -1 is that of any call": (
        "R17",
        "resume",
        Fault(
            rpc.resume,
            r"call = guest\.suspended\.get\(thread\)",
            "thread = next(iter(guest.suspended), thread) if thread == LOW else thread\n"
            "    call = guest.suspended.get(thread)",
        ),
    ),
    "a wrong thread is answered OK": (
        "R17",
        "resume",
        Fault(rpc.resume, r"ReturnCode\.ERESUME, f", "ReturnCode.OK, f"),
    ),
    "an RPC that cannot be delivered is left where it is": (
        "R18",
        "rpc-undeliverable",
        Fault(rpc.suspended, r"refusal = _Refusal\(.*\)", "refusal = None"),
    ),
    "OP-TEE is not told that an RPC failed": (
        "R18",
        "rpmb-owner",
        Fault(rpc._undelivered, r"page\.view\[.*\] = refusal\.result", "pass"),
    ),
    "the guest is not asked to free what it offered": (
        "R19",
        "rpc-replies",
        Fault(rpc._take_allocated, r"return _ask_free\(.*\)", "_answer_failed(call); return None"),
    ),
    "a refused offer stays": ("R19 B3", "rpc-replies", FAULTS["a refused offer stays"]),
    "SHM_FREE frees nothing": ("R20", "xtest-hello-world", FAULTS["SHM_FREE frees nothing"]),
    "FREE frees nothing": ("R20", "shm-cache", Fault(rpc.suspended, r"release_argument\(.*\)", "pass")),
    "no pages are charged": ("R21 B14", "thread-limit", FAULTS["no pages are charged"]),
    "no buffer is charged": ("R21 B14", "thread-limit", FAULTS["no buffer is charged"]),
    "a call is not refunded": ("R21 B3", "all-or-nothing", FAULTS["a call is not refunded"]),
    "a buffer is not refunded": ("R21 B3", "all-or-nothing", FAULTS["a buffer is not refunded"]),
    "calls have no limit": (
        "R21 R29 B14",
        "quota-exhaustion",
        Fault(limits.bounds, r"calls=threads if .*,", "calls=threads,"),
    ),
    "buffers have no limit": (
        "R21 B14",
        "quota-exhaustion",
        Fault(ledger.Ledger.charge, r"if buffers and self\.buffers", "if False and self.buffers"),
    ),
    "pages have no limit": (
        "R21 B14",
        "quota-changed-in-use",
        Fault(ledger.Ledger.charge, r"if pages and self\.pages", "if False and self.pages"),
    ),
    "limits cannot be changed": (
        "R21",
        "quota-changed-in-use",
        Fault(pool.Pool.change, r"ledger\.limits = each", "pass"),
    ),
    "the pool lends without end": (
        "R22 B14",
        "quota-pool",
        Fault(pool.Pool.take, r"if self\._committed \+ loan > self\.capacity:", "if False:"),
    ),
    "a reservation can be lent": (
        "R22 B14",
        "quota-pool",
        Fault(pool.Pool._count, r"max\(ledger\.pages, ledger\.limits\.reserved_pages\)", "ledger.pages"),
    ),
    "all guests share one limit": (
        "R22 B14",
        "quota-pool",
        Fault(
            ledger.Ledger.charge,
            r"self\.pages \+ pages > limits\.pages",
            "(self.pages if self.lender is None else sum(each.pages for each in self.lender._ledgers)) + pages"
            " > limits.pages",
        ),
    ),
    "one guest may have all secure cores": (
        "R22 B9",
        "fairness",
        Fault(flow.Flow._may_have_core, r"return cores is None .*", "return True"),
    ),
    "a long list is handled in one go": (
        "R23 B9",
        "long-message",
        Fault(sharing.translate, r"if len\(entries\) == LISTS_PER_STEP:", "if False:"),
    ),
    "a guest that OP-TEE refused is created": (
        "R24",
        "guest-count-split",
        Fault(lifecycle.returned, r"ok = .*", "ok = True"),
    ),
    "a guest is gone before its calls have returned": (
        "R24 B10",
        "death-in-call",
        Fault(lifecycle.destroy, r"(?s)if guest\.in_flight:\n\s+return Queue\(\"the calls.*?\n", ""),
    ),
    "a dead guest's buffers stay": (
        "R24 B10",
        "storage-power-cut-managed",
        Fault(lifecycle._release, r"release_shared\(core, guest, shared\)", "pass"),
    ),
    "a dead guest's RPC arguments stay": (
        "R24 B10",
        "death-in-call",
        Fault(lifecycle._release, r"release_argument\(core\.world, guest, argument\)", "pass"),
    ),
    "a dead guest's calls stay": (
        "R24 B10",
        "death-in-call",
        Fault(lifecycle._release, r"yielding\.end\(core, call, CallEvent\.ABORT\)", "pass"),
    ),
    "OP-TEE is not told of a death": (
        "R24 B10",
        "death-in-call",
        Fault(
            lifecycle.destroy,
            r"return _ask\(Function\.VM_DESTROYED, .*\)",
            "ticket = Lifecycle(guest, again=again)\n"
            "    ticket.work = _release(core, ticket, guest, GuestEvent.DESTROYED)\n"
            "    return core.proceed(ticket)",
        ),
    ),
    "OP-TEE is not told of a birth": (
        "R24",
        "secure-world-faults",
        Fault(
            lifecycle.create,
            r"return _ask\(Function\.VM_CREATED, Lifecycle\(guest\)\)",
            "advance(guest, GuestEvent.CREATED, GUEST_TABLE); return _reply(ReturnCode.OK)",
        ),
    ),
    "pins are released though OP-TEE did not let go": (
        "R24 R25",
        "secure-world-faults",
        Fault(lifecycle.returned, r"if not ok:\n", "if False:\n"),
    ),
    "a rejected call is an error": (
        "R25 B13",
        "rejected-messages",
        Fault(yielding._count, r'CALL_REJECTED, "info"', 'CALL_REJECTED, "error"'),
    ),
    "a denied call is an error": (
        "R25 B13",
        "denied-functions",
        Fault(Mediator.submit, r'CALL_DENIED, "info"', 'CALL_DENIED, "error"'),
    ),
    "a guest is not isolated": (
        "R25 B13",
        "secure-world-faults",
        Fault(Mediator._isolate, r"advance\(guest, GuestEvent\.ISOLATE, GUEST_TABLE\)", "pass"),
    ),
    "a thread in use is not noticed": ("R25", "secure-world-faults", FAULTS["a thread in use is not noticed"]),
    "a frame of two guests is shared": (
        "R26 B6",
        "shared-frames",
        Fault(stage2.Stage2.shareable, r"return .*", "return True"),
    ),
    "what OP-TEE wrote is not in the dirty log": (
        "R27",
        "dirty-logging",
        Fault(guest_memory.GuestMemory.mark_dirty, r"\.dirty\[part\.places\] = True", ".dirty[part.places] |= False"),
    ),
    "what OP-TEE wrote is not reported at unpin": (
        "R27",
        "dirty-logging",
        Fault(sharing.release_shared, r"guest\.memory\.mark_dirty\(.*\)", "pass"),
    ),
    "what OP-TEE wrote is not reported at completion": (
        "R27",
        "dirty-logging",
        Fault(sharing.mark_written, r"guest\.memory\.mark_dirty\(.*\)", "pass"),
    ),
    "a paused guest's calls go on": (
        "R28",
        "pause",
        Fault(Mediator.submit, r"if guest\.state is not _LIVE:", "if guest.state not in _SERVED:"),
    ),
    "a new kernel finds the old one's buffers": (
        "R28 B5 B10",
        "kexec",
        Fault(
            lifecycle.destroy,
            r"return _ask\(Function\.VM_DESTROYED",
            "again and guest.buffers.clear(); return _ask(Function.VM_DESTROYED",
        ),
    ),
    "the cache of RPC arguments is not emptied": (
        "R29 R20",
        "shm-cache",
        Fault(fast.returned, r"release_argument\(.*\)", "pass"),
    ),
    "a call that gave its vCPU back has a thread of OP-TEE's": (
        "R29",
        "long-message",
        Fault(Mediator.give_back, r"rpc\.OWN_THREADS \+ ticket\.id % rpc\.OWN_THREADS", "ticket.id % 8"),
    ),
    "an RPC names no live argument": (
        "R29",
        "shm-cache",
        Fault(
            rpc.suspended,
            r"return core\.suspended\(call\.regs, answer\)",
            "return core.suspended(call.regs, (answer[0], 0, 77 if rpc == CMD else answer[2], answer[3]))",
        ),
    ),
    "ETHREAD_LIMIT while no call is in flight": (
        "R29",
        "quota-exhaustion",
        Fault(yielding.enter, r"if over\.resource == \"calls\"", "if True"),
    ),
    "contiguous memory goes through": (
        "R7 R10 B7 B15",
        "attribute-types",
        Fault(sharing._open, r"if not attribute & NONCONTIG:", "if False:"),
    ),
    "nobody may wait": (
        "R29 B9",
        "flow-control",
        Fault(flow.Flow.enter, r"if waiting > self\.policy\.queue:", "if waiting:"),
    ),
    "the thread limit is a lack of memory": (
        "R29",
        "thread-limit",
        Fault(yielding.enter, r"ReturnCode\.ETHREAD_LIMIT if", "ReturnCode.ENOMEM if"),
    ),
    "a list page has room for 512 pages": (
        "R8 B2",
        "page-lists",
        Fault(sharing.translate, r"left (<=|-=) ENTRIES_PER_PAGE", r"left \1 512"),
    ),
    "OP-TEE's a3 is lost": (
        "R3 B12",
        "words-of-answers",
        Fault(core._reply, r"answer\[2\], answer\[3\], regs", "answer[2], 0, regs"),
    ),
    "one guest's limits are everybody's": (
        "R21 R22 B14",
        "quota-exhaustion",
        Fault(
            lifecycle.create,
            r"core\.enroll\(guest\)",
            'core.enroll(guest); [setattr(one.ledger, "limits", ledger.limits) for one in core.guests.values()]',
        ),
    ),
    "a NULL reference is a page list": (
        "B15",
        "xtest-1017",
        Fault(sharing._open, r"if pointer == 0:", "if False:"),
    ),
    "a NULL reference is refused": (
        "B15",
        "xtest-1017",
        Fault(
            sharing._open,
            r"if pointer == 0:\n\s+continue",
            'if pointer == 0:\n                raise MessageRejected(Result.BAD_PARAMETERS, "NULL")',
        ),
    ),
    "the whole message is written back": (
        "R6 B8 B12",
        "same-cookies",
        Fault(yielding.completed, r"_ANSWER \+ call\.outputs", "(slice(0, call.size),)"),
    ),
}
"""Mistakes: which rules and classes they break, a quick scenario that notices, and where in the code they are."""
_LIBRARY: Final = {name: find_scenario(name) for name in library()}
_NAMES: Final = {name: (*scenario.rules, *scenario.classes) for name, scenario in _LIBRARY.items()}
"""The rules and classes that each scenario names."""


def notices(scenario: str, fault: Fault) -> bool:
    """Whether a scenario fails with this mistake in the code, or the core stops loudly (R25)."""
    stopped: ExceptionGroup[MediatorBug] | None = None
    good = False
    try:
        with broken(fault):
            good = run_scenario(_LIBRARY[scenario], 1).good
    except* MediatorBug as bug:
        stopped = bug
    return stopped is not None or not good


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_scenario_that_names_what_is_broken_notices(mistake: str) -> None:
    breaks, scenario, fault = MISTAKES[mistake]
    assert not set(breaks.split()).isdisjoint(_NAMES[scenario])
    assert notices(scenario, fault)


def test_each_rule_and_each_class_is_broken_before_a_scenario_that_names_it() -> None:
    made = runpy.run_path(str(DOCS / "library.py"))
    shown = {name for breaks, scenario, _ in MISTAKES.values() for name in breaks.split() if name in _NAMES[scenario]}
    assert shown == {*made["RULES"], *made["CLASSES"]}


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="minutes: for the nightly run")
@pytest.mark.parametrize(("scenario", "name"), [(scenario, name) for scenario in _NAMES for name in _NAMES[scenario]])
def test_a_scenario_notices_something_of_all_that_it_names(scenario: str, name: str) -> None:
    faults = [fault for breaks, _, fault in MISTAKES.values() if name in breaks.split()]
    assert any(notices(scenario, fault) for fault in faults)
