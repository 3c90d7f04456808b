"""RPC: rules R16 to R20, R29 (B1, B6, B7, B13)."""

import itertools
from dataclasses import replace

import pytest

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind
from mediator.core.policy import FlowPolicy
from mediator.core.rpc import MAX_UNDELIVERED, OWN_THREADS
from mediator.core.states import GuestState
from mediator.core.steps import Forward, Preempt, Reply
from optee.abi.message import META, NONCONTIG, Command, Message, Param, message_size
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand, ShmType
from optee.abi.smc import Function, ReturnCode, RpcReturn, from_pair, to_pair
from tests.core.pair import (
    GENERIC,
    RMEM_IN,
    RMEM_INOUT,
    RMEM_OUT,
    TMEM_IN,
    TMEM_INOUT,
    TMEM_OUT,
    VALUE_IN,
    VALUE_INOUT,
    VALUE_OUT,
    ask,
    ask_alloc,
    ask_free,
    interrupt,
    invoke,
    policy_of,
    raw,
    register,
    shm_alloc,
    shm_free,
    smc,
    succeed,
    suspended_in_command,
    unregister,
)
from tests.core.test_calls import registered_pages

BEHIND = pytest.mark.parametrize("behind", [True, False], ids=["behind-message", "own-page"])
TIME = Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT)])


def reading(replies, cookie=0xC0):
    """Note the RPC argument as OP-TEE finds it, then end the call."""

    def answer(world, now, regs):
        at = world.argument(now, cookie)
        replies.append(Message.unpack(world.memory.read(at, PAGE_SIZE - at % PAGE_SIZE)))
        return succeed()(world, now, regs)

    return answer


def resume_words(behind, cookie=0xC0):
    """a1:a2 of a resume: only `xen` looks at them."""
    return (0, 0) if behind else to_pair(cookie)


# Delivery


@BEHIND
@pytest.mark.parametrize("command", [c for c in RpcCommand if c not in (RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE)])
def test_a_request_is_delivered_as_it_is_or_answered_for_the_guest(make, command, behind):
    """R18: what the policy does not deliver ends as an error for OP-TEE, and the call goes on.

    NOT_SUPPORTED is what a tee-supplicant says that does not know a command; the device of another guest is
    STORAGE_NOT_AVAILABLE, which a TA survives; what should not have been asked is GENERIC.
    """
    pair = make()
    guest = pair.guest()
    request = Message(command, 1, 2, 3, 0, GENERIC, 0, [Param(VALUE_INOUT, 4, 5, 6), Param(RMEM_INOUT, 1, 2, 3)])
    allowed = command in pair.policy.rpc_commands and command != RpcCommand.RPMB
    ret = {
        **dict.fromkeys(pair.policy.rpc_commands, GENERIC),
        RpcCommand.RPMB: Result.STORAGE_NOT_AVAILABLE,
        RpcCommand.BENCH_REG: GENERIC,
    }.get(command, Result.NOT_SUPPORTED)
    replies = []
    if allowed:
        at, ipa = suspended_in_command(guest, request, behind=behind)
        assert Message.unpack(guest.ram.read(at, 256)) == request
        pair.world.script.append(reading(replies))
        assert guest.resume()[0] == 0
    else:
        pair.world.script.extend(
            [ask(request), reading(replies)] if behind else [ask_alloc(), ask(request, 0xC0), reading(replies)]
        )
        regs, ipa = guest.call(invoke(), Function.CALL_WITH_RPC_ARG if behind else Function.CALL_WITH_ARG)
        if not behind:
            regs, page = guest.give_page(0xC0)
            assert guest.ram.read(page, 32) == bytes(32)
        assert regs[0] == 0
        assert pair.names().count("rpc_undelivered") == 1
    (reply,) = replies
    assert reply == replace(request, ret=ret)
    assert guest.read(ipa).ret == 0


ALL_KINDS = [0, *range(1, 4), *range(5, 8), *range(9, 12)]


@BEHIND
@pytest.mark.parametrize("num_params", range(1, 5))
def test_of_a_reply_only_what_the_request_lets_be_answered_is_taken(make, behind, num_params):
    """R16: by the saved request; the guest's own attributes, commands and counts are not looked at."""
    pair = make()
    guest = pair.guest()
    every = 1 if num_params == 1 else 67
    for number, kinds in enumerate(itertools.islice(itertools.product(ALL_KINDS, repeat=num_params), 0, None, every)):
        params = [Param(kind, 0 if kind in (9, 10, 11) else 21, 22, 23) for kind in kinds]
        request = Message(RpcCommand.FS, 7, 8, 9, 10, params=params)
        cookie = 0x1000 + number % 8
        at, _ = suspended_in_command(guest, request, behind=behind, cookie=cookie)
        reply = Message(RpcCommand.SHM_ALLOC, 1, 2, 3, 4, 0, 5, [Param(TMEM_OUT, 31, 32, 33)] * num_params)
        guest.write(reply, at)
        replies = []
        pair.world.script.append(reading(replies, cookie))
        regs = guest.resume(0, *resume_words(behind, cookie))
        assert regs[0] == 0
        (got,) = replies
        expected = []
        for param in params:
            if param.attr in (VALUE_OUT, VALUE_INOUT):
                expected.append(Param(param.attr, 31, 32, 33))
            elif param.attr in (RMEM_OUT, RMEM_INOUT, 10, 11):
                expected.append(param._replace(b=32))
            else:
                expected.append(param)
        assert got == Message(RpcCommand.FS, 7, 8, 9, 10, 0, 5, expected)
        if not behind:
            pair.world.fast[Function.DISABLE_SHM_CACHE] = (0, *to_pair(cookie), 0)
            guest.smc(Function.DISABLE_SHM_CACHE)
    pair.settle(guest)


@BEHIND
@pytest.mark.parametrize("count", [0, 2, 3, 127, 128, 0x0800_0000, 0xFFFF_FFFF])
def test_a_reply_that_does_not_fit_its_request_is_an_error_without_parameters(make, behind, count):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, TIME, behind=behind)
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), at)
    guest.ram.write(at + 28, count.to_bytes(4, "little"))
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert (replies[0].ret, replies[0].params) == (GENERIC, [])
    assert "rpc_reply_replaced" in pair.names()


def test_a_reply_that_cannot_be_read_is_an_error(make):
    pair = make()
    guest = pair.guest("xen")
    for behind in (True, False):
        at, _ = suspended_in_command(guest, TIME, behind=behind)
        guest.vm.set_kind(at & ~0xFFF, PageKind.NONE)
        replies = []
        pair.world.script.append(reading(replies))
        regs = guest.resume()
        assert regs[0] == (ReturnCode.EBADADDR if behind else 0)  # the message was in that page too
        assert (replies[0].ret, replies[0].params) == (GENERIC, [])


def test_a_reply_is_read_once(make, monkeypatch):
    """B1: what the guest changes after the read does not count."""
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, TIME, behind=False)
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), at)
    read = type(guest.vm).read

    def changing(self, address, size, *, writable=False):
        data = read(self, address, size, writable=writable)
        guest.write(Message(RpcCommand.SHM_ALLOC, ret=1, params=[Param(TMEM_OUT, 9, 9, 9)] * 4), at)
        return data

    monkeypatch.setattr(type(guest.vm), "read", changing)
    replies = []
    pair.world.script.append(reading(replies))
    guest.resume()
    assert replies == [Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)])]


# Undeliverable requests


@pytest.mark.parametrize("what", ["cookie", "behind-with-cookie", "num-params", "tmem", "read-only", "unmapped"])
def test_a_request_that_cannot_be_delivered_ends_as_an_error_and_the_call_completes(make, what):
    pair = make()
    guest = pair.guest("xen")
    script = pair.world.script
    if what == "behind-with-cookie":
        script += [lambda w, n, r: (ask(TIME)(w, n, r), raw(int(RpcReturn.CMD), 0, 5, 0)(w, n, r))[1]]
        regs, _ = guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
    else:
        script.append(ask_alloc())
        regs, _ = guest.call(invoke())
        ipa = guest.page()
        match what:
            case "cookie":
                script.append(raw(int(RpcReturn.CMD), 1, 2, 0))
            case "num-params":
                request = ask(Message(RpcCommand.FS), 0xC0)

                def lie(world, now, regs):
                    answer = request(world, now, regs)
                    world.memory.write(world.argument(now, 0xC0) + 28, (128).to_bytes(4, "little"))
                    return answer

                script.append(lie)
            case "tmem":
                script.append(ask(Message(RpcCommand.FS, params=[Param(TMEM_IN & ~NONCONTIG, 1 << 41, 8, 1)]), 0xC0))
            case _:
                kind = {"read-only": PageKind.RAM_RO, "unmapped": PageKind.NONE}[what]
                request = ask(TIME, 0xC0)
                script.append(lambda w, n, r: (guest.vm.set_kind(ipa, kind), request(w, n, r))[1])
        regs, _ = guest.give_page(0xC0, ipa=ipa)
    assert regs[0] == 0
    assert pair.names().count("rpc_undelivered") == 1
    last = [regs for regs in pair.world.inbox if regs[0] == Function.RETURN_FROM_RPC][-1]
    assert last == (Function.RETURN_FROM_RPC, 0, 0, 0, 0, 0, 0, guest.id)
    assert not any(event.level == "error" for event in pair.events)


def test_what_a_guest_made_undeliverable_is_bounded_and_is_no_error_of_the_secure_world(make):
    """R18, R25, B13: whatever a guest does to its page, no event is above "info", and others live on."""
    pair = make()
    guest, other = pair.guest("xen"), pair.guest()
    script = pair.world.script
    script.append(ask_alloc())
    guest.call(invoke())
    ipa = guest.page()
    script.append(lambda w, n, r: (guest.vm.set_kind(ipa, PageKind.RAM_RO), ask(TIME, 0xC0)(w, n, r))[1])
    script.extend([ask(TIME, 0xC0)] * (3 * MAX_UNDELIVERED))
    guest.give_page(0xC0, ipa=ipa)
    script.clear()
    assert len(pair.world.inbox) < 3 * MAX_UNDELIVERED
    assert [event for event in pair.events if event.level == "error"] == []
    assert other.invoke(other.tmem(1)).ret == 0


RPMB_COMMANDS = (
    RpcCommand.RPMB,
    RpcCommand.RPMB_PROBE_RESET,
    RpcCommand.RPMB_PROBE_NEXT,
    RpcCommand.RPMB_FRAMES,
)


@pytest.mark.parametrize("command", RPMB_COMMANDS)
def test_the_rpmb_device_is_one_guests(make, command):
    """Whoever the policy says, as long as that guest lives; nobody else, not even by the same name."""
    policy = policy_of()
    pair = make(replace(policy, rpc_commands=policy.rpc_commands | set(RPMB_COMMANDS), rpmb_owner="first"))
    first, second = pair.guest(rpmb=True), pair.guest(rpmb=True)

    def delivered(guest) -> bool:
        replies: list[Message] = []
        pair.world.script += [ask(Message(command, ret=GENERIC)), reading(replies)]
        regs, ipa = guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
        if regs[0] == RpcReturn.CMD:
            assert guest.read(ipa + message_size(0)).cmd == command
            guest.resume()
        else:
            assert (regs[0], replies[0].ret) == (0, Result.STORAGE_NOT_AVAILABLE)
        return regs[0] == RpcReturn.CMD

    assert (delivered(first), delivered(second)) == (True, False)
    assert pair.drive(pair.checker.reset(first.id))[0] == 0
    assert (delivered(first), delivered(second)) == (True, False), "the first one has it again"
    assert pair.drive(pair.checker.destroy(first.id))[0] == 0
    assert not delivered(second), "it is not handed on to who lives"
    third = pair.guest(rpmb=True)
    assert (delivered(third), delivered(second)) == (True, False)


def test_under_any_owner_each_guest_is_asked_for_its_own_device(make):
    pair = make("xen")
    for guest in (pair.guest("xen"), pair.guest()):
        suspended_in_command(guest, Message(RpcCommand.RPMB, ret=GENERIC), behind=False)


@pytest.mark.parametrize(
    ("command", "ret"),
    [(RpcCommand.RPMB, Result.STORAGE_NOT_AVAILABLE), (RpcCommand.SOCKET, Result.NOT_SUPPORTED)],
)
def test_asking_again_and_again_for_what_is_not_the_guests_is_no_error_of_the_secure_world(make, command, ret):
    """A TA may try as often as it likes: the guest gets its vCPU in between, and nobody is isolated."""
    policy = policy_of()
    pair = make(replace(policy, rpc_commands=policy.rpc_commands - {RpcCommand.SOCKET}))
    guest = pair.guest()
    replies: list[Message] = []
    pair.world.script += [ask(Message(command, ret=GENERIC))] * (3 * MAX_UNDELIVERED) + [reading(replies)]
    regs, _ = guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
    turns = 0
    while regs[0] == RpcReturn.FOREIGN_INTR:
        turns += 1
        regs = guest.resume()
    assert regs[0] == 0
    assert 1 <= turns <= 3
    assert replies[0].ret == ret
    assert [event for event in pair.events if event.level == "error"] == []


def test_a_secure_world_that_never_stops_asking_for_nothing_isolates_the_guest(make):
    pair = make()
    pair.errors_expected = True
    guest, other = pair.guest(), pair.guest()
    pair.world.script.extend([raw(int(RpcReturn.CMD), 1, 2, 0)] * (MAX_UNDELIVERED + 1))
    assert guest.call(invoke(guest.tmem(2)))[0][0] == 2**64 - 1
    assert guest.record.state is GuestState.ISOLATED
    assert guest.smc(Function.CALLS_UID)[0] == 2**64 - 1
    assert other.invoke(other.tmem(1)).ret == 0


# Resuming


def test_resumes_that_name_no_waiting_call_of_this_guest_are_eresume(make):
    """B6: nothing suspended, twice, after completion, another guest's thread, sentinels."""
    pair = make()
    first, second = pair.guest(), pair.guest()
    bad = [0, 1, 2, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**64 - 1, OWN_THREADS, OWN_THREADS + 1]
    for guest in (first, second):
        for thread in bad:
            assert guest.resume(thread)[0] == ReturnCode.ERESUME
    pair.world.script.append(interrupt(1))
    first.call(invoke())
    before = len(pair.world.inbox)
    assert second.resume(1)[0] == ReturnCode.ERESUME
    assert [first.resume(thread)[0] for thread in bad if thread != 1] == [ReturnCode.ERESUME] * (len(bad) - 1)
    assert len(pair.world.inbox) == before
    step = first.submit(smc(Function.RETURN_FROM_RPC, 0, 0, 1))
    assert first.resume(1, vcpu=1)[0] == ReturnCode.ERESUME  # in flight
    assert pair.drive(step)[0] == 0
    assert first.resume(1)[0] == ReturnCode.ERESUME


def test_two_guests_with_the_same_threads_cookies_and_addresses_do_not_meet(make):
    pair = make()
    guests = pair.guest(), pair.guest("xen")
    for number, guest in enumerate(guests):
        request = Message(RpcCommand.FS, params=[Param(VALUE_INOUT, number, 2, 3)])
        at, _ = suspended_in_command(guest, request, behind=False)
        guest.where = at
    assert guests[0].where == guests[1].where
    for number, guest in enumerate(guests):
        assert guest.read(guest.where).params[0].a == number
        guest.write(Message(RpcCommand.FS, params=[Param(VALUE_INOUT, 70 + number, 2, 3)]), guest.where)
    for number, guest in enumerate(reversed(guests)):
        replies = []
        pair.world.script.append(reading(replies))
        assert guest.resume()[0] == 0
        assert replies[0].params[0].a == 71 - number


@pytest.mark.parametrize("words", [(0, 0), (0, 0xC1), (1, 0xC0), (0xFFFF_FFFF, 0xFFFF_FFFF)])
def test_only_xen_compares_the_cookie_of_a_resume(make, words):
    """R17: ERESUME, nothing forwarded, still suspended and resumable."""
    for name in ("default", "minimal"):
        pair = make(name)
        guest = pair.guest()
        suspended_in_command(guest, TIME, behind=False)
        assert guest.resume(0, *words)[0] == 0
    pair = make("xen")
    guest = pair.guest()
    at, _ = suspended_in_command(guest, TIME, behind=False)
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), at)
    before = len(pair.world.inbox)
    for _ in range(3):
        assert guest.resume(0, *words)[0] == ReturnCode.ERESUME
    assert len(pair.world.inbox) == before
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume(0, 0xAB << 32, 0xCD << 32 | 0xC0)[0] == 0
    assert replies[0].params == [Param(VALUE_OUT, 1, 2, 3)]


def test_interrupts_and_unknown_rpcs_are_resumed_with_the_saved_words(make):
    pair = make()
    guest = pair.guest()
    for rpc in (RpcReturn.FOREIGN_INTR, 0xFFFF0001, 0xFFFF0003, 0xFFFF1234):
        pair.world.script.append(raw(int(rpc), 7, 8, 3))
        regs, _ = guest.call(invoke())
        assert regs[:4] == (rpc, 7, 8, 3)
        assert guest.resume(3, 0xDEAD, 0xBEEF, 5, 6)[0] == 0
        assert pair.world.inbox[-1] == (Function.RETURN_FROM_RPC, 7, 8, 3, 0, 0, 0, guest.id)


@pytest.mark.parametrize("name", ["default", "xen", "minimal"])
def test_an_rpc_passes_its_registers_and_leaves_the_others(make, name):
    guest = make(name).guest()
    guest.pair.world.script.append(raw(int(RpcReturn.ALLOC), 160, 9, 3))
    regs = guest.smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke())), 13, 14, 15, 16, 17)
    assert regs == (RpcReturn.ALLOC, 160, 9, 3, 14, 15, 16, 17)


# RPC ALLOC and FREE


def test_op_tee_gets_a_page_of_the_mediators_for_the_guests(make):
    pair = make()
    guest = pair.guest()
    pair.world.script += [ask_alloc(2, 4096 * 3), interrupt(2)]
    regs, _ = guest.call(invoke())
    assert regs[:4] == (RpcReturn.ALLOC, 4096 * 3, 0, 2)
    _, ipa = guest.give_page(0x1234_5678_9ABC_DEF0, 2)
    last = pair.world.inbox[-1]
    assert last[3:] == (2, 0x1234_5678, 0x9ABC_DEF0, 0, guest.id)
    assert from_pair(last[1], last[2]) in pair.machine.pages
    assert guest.vm.pinned() == {ipa >> 12: 1}
    assert guest.sums()["rpc_arguments"] == 1
    assert guest.record.arguments[0x1234_5678_9ABC_DEF0].ipa == ipa
    guest.resume(2)


@pytest.mark.parametrize(
    "what", ["unaligned", "null", "beyond", "huge", "read-only", "device", "duplicate", "limit", "no-page"]
)
def test_a_page_that_cannot_serve_is_a_failed_allocation_for_op_tee(make, what):
    pair = make()
    guest = pair.guest("xen")
    pair.world.script += [ask_alloc(), ask_alloc()]
    guest.call(invoke())
    guest.give_page(0xC0)
    ipa = guest.page()
    held = guest.sums()
    cookie = 0xC0 if what == "duplicate" else 0xC1
    match what:
        case "read-only" | "device":
            guest.vm.set_kind(ipa, {"read-only": PageKind.RAM_RO, "device": PageKind.MMIO}[what])
        case "limit":
            guest.limits.rpc_arguments = 1
        case "no-page":
            pair.host.left = 0
        case "duplicate":
            pass
        case _:
            top = guest.ram.base + guest.ram.size
            ipa = {"unaligned": ipa + 8, "null": 0, "beyond": top, "huge": 2**64 - 4096}[what]
    pair.world.script.append(interrupt())
    guest.give_page(cookie, ipa=ipa)
    assert pair.world.inbox[-1][:6] == (Function.RETURN_FROM_RPC, 0, 0, 0, 0, cookie)
    assert guest.sums() == held and guest.pins() == 1
    pair.host.left = None
    assert guest.resume()[0] == 0


def test_high_halves_of_an_rpc_page_and_its_cookie_are_not_forwarded(make):
    pair = make()
    guest = pair.guest()
    pair.world.script.append(ask_alloc())
    guest.call(invoke())
    ipa = guest.page()
    junk = 0xAAAA_AAAA << 32
    guest.resume(0, junk | ipa >> 32, junk | ipa, junk | 1, junk | 2)
    assert all(word < 2**32 for word in pair.world.inbox[-1])


@pytest.mark.parametrize("how", ["free", "disable"])
def test_the_record_of_an_rpc_page_is_gone_before_the_guest_hears_of_it(make, how):
    """R20; and with an unknown cookie nothing happens."""
    pair = make()
    guest = pair.guest()
    pair.world.script += [ask_alloc(), interrupt()]
    guest.call(invoke())
    guest.give_page(0xC0)
    assert guest.pins() == 1
    for cookie in (0xC1, 0xC0, 0xC0):
        if how == "free":
            pair.world.script.append(ask_free(cookie))
            regs = guest.resume()
            assert regs[:4] == (RpcReturn.FREE, 0, cookie, 0)
        else:
            pair.world.fast[Function.DISABLE_SHM_CACHE] = (0, *to_pair(cookie), 0)
            assert guest.smc(Function.DISABLE_SHM_CACHE)[:3] == (0, 0, cookie)
        assert guest.pins() == (cookie == 0xC1)
    if how == "free":
        assert pair.world.inbox[-1][:3] == (Function.RETURN_FROM_RPC, 0, 0xC0)
    assert guest.resume()[0] == 0
    pair.settle(guest)


def test_disable_shm_cache_reaches_enotavail(make):
    """R29: what Linux loops on when it probes and unloads."""
    guest = make().guest()
    guest.pair.world.fast[Function.DISABLE_SHM_CACHE] = (int(ReturnCode.ENOTAVAIL), 0, 0, 0)
    assert guest.smc(Function.DISABLE_SHM_CACHE)[0] == ReturnCode.ENOTAVAIL


def test_disable_shm_cache_names_its_page_by_64_bits(make):
    pair = make()
    guest = pair.guest()
    cookie = 0x1234_5678_9ABC_DEF0
    pair.world.script += [ask_alloc(), interrupt()]
    guest.call(invoke())
    guest.give_page(cookie)
    pair.world.fast[Function.DISABLE_SHM_CACHE] = (0, *to_pair(cookie), 0)
    assert list(guest.record.arguments) == [cookie]
    assert guest.smc(Function.DISABLE_SHM_CACHE)[0] == 0
    assert not guest.record.arguments and guest.pins() == 0
    assert guest.resume()[0] == 0


# SHM_ALLOC and SHM_FREE


def offer(guest, at, param, ret=0, count=1):
    guest.write(Message(RpcCommand.SHM_ALLOC, ret=ret, params=[param] * count), at)


@BEHIND
@pytest.mark.parametrize("pages", [1, 129, 511, 512, 1023, 16384])
def test_an_offered_buffer_is_translated_and_kept_until_op_tee_frees_it(make, behind, pages):
    pair = make()
    guest = pair.guest(ram=16 << 20)
    at, _ = suspended_in_command(guest, shm_alloc(pages * PAGE_SIZE), behind=behind)
    param = guest.tmem(pages, cookie=0xB0, kind=TMEM_OUT, offset=16)
    offer(guest, at, param)
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    (got,) = replies[0].params
    assert (replies[0].ret, got.attr, got.b, got.c, got.a % PAGE_SIZE) == (0, TMEM_OUT, param.b, 0xB0, 16)
    assert guest.pins() == pages + (not behind)
    assert guest.sums()["pages"] == pages
    free = ask(shm_free(0xB0), 0 if behind else 0xC0)
    if behind:
        pair.world.script.append(free)
        regs, ipa = guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
        at = ipa + 32
    else:
        pair.world.script.append(free)
        regs, _ = guest.call(invoke())
    assert regs[0] == RpcReturn.CMD
    assert guest.pins() == (not behind)  # before the guest answers
    assert guest.read(at).params == [Param(VALUE_IN, ShmType.APPL, 0xB0, 0)]
    assert guest.resume()[0] == 0


def test_the_lists_of_an_offered_buffer_name_its_frames(make):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc())
    pages = [guest.page() for _ in range(3)]
    offer(guest, at, Param(TMEM_OUT, guest.page_list(pages), 3 * PAGE_SIZE, 1))
    found = []

    def look(world, now, regs):
        argument = Message.unpack(world.memory.read(world.argument(now), 128))
        found.extend(pair.machine.find(pa) for pa in world.pages_of(argument.params[0]))
        return succeed()(world, now, regs)

    pair.world.script.append(look)
    guest.resume()
    assert found == [(guest.vm, ipa) for ipa in pages]


@BEHIND
@pytest.mark.parametrize(
    "what", ["entry", "next", "too-many", "duplicate", "buffers", "no-list-page", "contiguous-device"]
)
def test_a_buffer_that_cannot_be_translated_is_freed_by_the_guest_before_op_tee_hears(make, behind, what):
    """R19."""
    pair = make()
    guest = pair.guest(ram=16 << 20)
    guest.register(guest.tmem(1, cookie=0xB1))
    at, _ = suspended_in_command(guest, shm_alloc(kind=ShmType.KERNEL), behind=behind)
    held, pins = guest.sums(), guest.pins()
    param = guest.tmem(600, cookie=0xB0, kind=TMEM_OUT)
    match what:
        case "entry":
            guest.ram.write(param.a, (8).to_bytes(8, "little"))
        case "next":
            guest.ram.write(param.a + 4088, (8).to_bytes(8, "little"))
        case "too-many":
            param = param._replace(b=2**63)
        case "duplicate":
            param = param._replace(c=0xB1)
        case "buffers":
            guest.limits.buffers = 1
        case "no-list-page":
            pair.host.left = 1
        case "contiguous-device":
            guest.ram.write(param.a, (0x0801_0000).to_bytes(8, "little"))
    offer(guest, at, param)
    before = len(pair.world.inbox)
    words = resume_words(behind)
    regs = guest.resume(0, *words)
    assert regs[:4] == (RpcReturn.CMD, *words, 0)
    assert len(pair.world.inbox) == before
    request = guest.read(at)
    assert (request.cmd, request.ret) == (RpcCommand.SHM_FREE, GENERIC)
    assert request.params[0][:3] == (VALUE_IN, ShmType.KERNEL, param.c)
    assert (guest.sums(), guest.pins()) == (held, pins)
    assert guest.resume(5)[0] == ReturnCode.ERESUME
    replies = []
    pair.host.left = None
    pair.world.script.append(reading(replies))
    guest.write(Message(RpcCommand.GET_TIME, ret=0, params=[Param(VALUE_OUT, 9, 9, 9)] * 4), at)
    assert guest.resume()[0] == 0
    assert (replies[0].ret, replies[0].params) == (GENERIC, [])
    guest.unregister(0xB1)


@BEHIND
def test_if_the_guest_cannot_be_asked_to_free_op_tee_hears_at_once(make, behind):
    pair = make()
    guest = pair.guest("xen")
    at, _ = suspended_in_command(guest, shm_alloc(), behind=behind)
    offer(guest, at, Param(TMEM_OUT, guest.page_list([8]), 10, 0xB0))
    guest.vm.set_kind(at & ~0xFFF, PageKind.RAM_RO)
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == (ReturnCode.EBADADDR if behind else 0)  # the message is in that page too
    assert (replies[0].ret, replies[0].params) == (GENERIC, [])


@BEHIND
@pytest.mark.parametrize(
    "attr", [0, 1, 2, 5, 6, 9, 0xA, 0xB, 0x209, 0x20B, 0x20A | META, 0x20A | 1 << 16, 0x20A | 1 << 32, 0xFF]
)
def test_an_offer_of_another_type_is_an_error_without_parameters(make, behind, attr):
    """B7: the attribute of a good reply is exactly TMEM_OUTPUT | NONCONTIG."""
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc(), behind=behind)
    held, pins = guest.sums(), guest.pins()
    offer(guest, at, guest.tmem(2, cookie=0xB0)._replace(attr=attr))
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert (replies[0].ret, replies[0].params) == (GENERIC, [])
    assert guest.pins() == pins
    assert guest.sums()["pages"] == held["pages"]


@pytest.mark.parametrize("count", [0, 2, 3])
def test_an_offer_of_several_buffers_is_an_error_and_a_refusal_needs_none(make, count):
    pair = make()
    guest = pair.guest()
    for ret in (0, 0xFFFF_000C):
        at, _ = suspended_in_command(guest, shm_alloc())
        offer(guest, at, guest.tmem(2, cookie=0xB0, kind=TMEM_OUT), ret, count)
        replies = []
        pair.world.script.append(reading(replies))
        assert guest.resume()[0] == 0
        assert replies[0].ret == (ret or GENERIC)
        # nothing of the guest's addresses came along
        assert all(param == shm_alloc().params[0] for param in replies[0].params)
        pair.settle(guest)


def test_a_null_buffer_is_handed_on_as_null(make):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc())
    offer(guest, at, Param(TMEM_OUT, 0, 100, 0xB0))
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert replies[0].params == [Param(TMEM_OUT, 0, 100, 0xB0)]
    pair.settle(guest)


def test_an_offered_buffer_outlives_its_call_but_not_its_guest(make):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc())
    offer(guest, at, guest.tmem(5, cookie=0xB0, kind=TMEM_OUT))
    guest.resume()
    assert guest.pins() == 5
    assert guest.invoke(Param(RMEM_INOUT, 0, 8, 0xB0)).ret == 0
    pair.destroy(guest)
    assert guest.pins() == 0


@pytest.mark.parametrize("cookie", [0, 1, 0xB1, 2**64 - 1])
def test_shm_free_of_a_cookie_that_is_not_kept_frees_nothing(make, cookie):
    """Also that of a temporary buffer of another call."""
    pair = make()
    guest = pair.guest()
    guest.register(guest.tmem(1, cookie=7))
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2, cookie=0xB1))))), 1)
    suspended_in_command(guest, shm_free(cookie))
    assert guest.pins() == 3
    assert guest.resume()[0] == 0
    pair.drive(step)
    guest.unregister(7)
    pair.settle(guest)


# Calls that wait (R29)


def long_call(guest, count=3, function=Function.CALL_WITH_ARG):
    """Submit a call whose lists take several pieces of work: the first Preempt."""
    message = invoke(*[guest.tmem(16384, cookie=n + 1) for n in range(count)])
    ipa = guest.write(message)
    step = guest.submit(smc(function, *to_pair(ipa), 0, 14, 15, 16, 17))
    assert isinstance(step, Preempt)
    return step, ipa


def test_a_call_that_waits_gives_its_vcpu_back_under_a_thread_of_the_mediators(make):
    pair = make()
    guest = pair.guest(ram=16 << 20)
    step, ipa = long_call(guest)
    before = len(pair.world.inbox)
    regs = pair.checker.give_back(step.ticket).regs
    assert regs[:3] == (RpcReturn.FOREIGN_INTR, 0, 0)
    assert regs[3] >= OWN_THREADS and regs[4:] == (14, 15, 16, 17)
    assert len(pair.world.inbox) == before
    assert guest.invoke().ret == 0  # others of this guest go on meanwhile
    step = guest.submit(smc(Function.RETURN_FROM_RPC, *regs[1:4]))
    assert isinstance(step, Preempt)
    again = pair.checker.give_back(step.ticket).regs
    assert again[3] == regs[3]
    assert guest.resume(regs[3])[0] == 0
    assert guest.read(ipa).ret == 0
    assert guest.resume(regs[3])[0] == ReturnCode.ERESUME
    pair.settle(guest)


def test_own_threads_are_no_other_guests_and_op_tee_may_not_use_them(make):
    pair = make()
    pair.errors_expected = True
    guest, other = pair.guest(ram=16 << 20), pair.guest()
    step, _ = long_call(guest)
    thread = pair.checker.give_back(step.ticket).regs[3]
    assert other.resume(thread)[0] == ReturnCode.ERESUME
    pair.world.script.append(interrupt(OWN_THREADS))
    other.call(invoke())
    assert other.record.state is GuestState.ISOLATED
    pair.world.suspended.clear()
    assert guest.resume(thread)[0] == 0


def test_a_resume_that_waits_in_shm_alloc_can_be_resumed_whatever_the_policy_compares(make):
    limits = {"pages_per_buffer": 60000, "pages": 100000, "buffers": 64}
    for name in ("default", "xen"):
        pair = make(policy_of(name, memory=64 << 20, **limits))
        guest = pair.guest(ram=32 << 20)
        guest.record.next_call = OWN_THREADS - 1  # its thread will be the first of the mediator's own
        at, _ = suspended_in_command(guest, shm_alloc(), behind=False)
        offer(guest, at, guest.tmem(40000, cookie=0xB0, kind=TMEM_OUT))
        step = guest.submit(smc(Function.RETURN_FROM_RPC, *to_pair(0xC0), 0))
        assert isinstance(step, Preempt)
        thread = pair.checker.give_back(step.ticket).regs[3]
        assert thread == OWN_THREADS
        assert guest.resume(0, *to_pair(0xC0))[0] == ReturnCode.ERESUME
        assert guest.resume(thread)[0] == 0
        assert guest.sums()["pages"] == 40000


def test_giving_back_a_call_whose_guest_is_gone_is_not_handled(make):
    pair = make()
    guest = pair.guest(ram=16 << 20)
    step, _ = long_call(guest)
    pair.destroy(guest)
    assert pair.checker.give_back(step.ticket).regs[0] == 2**64 - 1
    again = pair.guest(client_id=guest.id + 1, ram=16 << 20)
    step, _ = long_call(again)
    dying = pair.checker.destroy(again.id)
    assert pair.checker.give_back(step.ticket).regs[0] == 2**64 - 1
    assert pair.drive(dying)[0] == 0


def test_thread_ids_of_the_mediators_own_stay_32_bits_wide(make):
    pair = make()
    guest = pair.guest(ram=16 << 20)
    guest.record.next_call = 2**32 - OWN_THREADS + 5
    step, _ = long_call(guest)
    thread = pair.checker.give_back(step.ticket).regs[3]
    assert OWN_THREADS <= thread < 2**32 - 1
    assert guest.resume(thread)[0] == 0


# Out of contract


@pytest.mark.parametrize("again", [0, 1])
def test_a_thread_that_is_suspended_twice_isolates_its_guest_only(make, again):
    pair = make()
    pair.errors_expected = True
    guest, other = pair.guest(), pair.guest()
    pair.world.script += [interrupt(again), interrupt(again)]
    guest.call(invoke())
    regs, _ = guest.call(invoke(guest.tmem(2)))
    assert regs[0] == 2**64 - 1
    assert guest.record.state is GuestState.ISOLATED
    levels = {event.name: event.level for event in pair.events}
    assert levels["secure_world_fault"] == levels["guest_isolated"] == "error"
    assert other.invoke(other.tmem(1)).ret == 0
    pair.world.suspended.clear()


@pytest.mark.parametrize("when", ["register", "unregister"])
def test_rpcs_in_the_middle_of_registrations_change_nothing_about_their_end(make, when):
    pair = make()
    guest = pair.guest()
    if when == "unregister":
        guest.register(guest.tmem(2, cookie=3))
    pair.world.script.append(ask(TIME))
    message = unregister(3) if when == "unregister" else register(guest.tmem(2, cookie=3, kind=TMEM_OUT))
    regs, ipa = guest.call(message, Function.CALL_WITH_RPC_ARG)
    assert regs[0] == RpcReturn.CMD
    assert guest.pins() == 2
    assert guest.resume()[0] == 0
    assert guest.read(ipa).ret == 0
    if when == "register":
        assert guest.unregister(3).ret == 0
    pair.settle(guest)


def test_a_message_in_a_registered_buffer_has_its_rpc_argument_there(make):
    pair = make()
    guest = pair.guest()
    first = registered_pages(guest)
    at = first + 4096 - 40
    guest.ram.write(at, invoke().pack())
    pair.world.script.append(ask(TIME))
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 9, 4096 - 40)[0] == RpcReturn.CMD
    request = Message.unpack(guest.ram.read(at + 32, 64))
    assert request == Message(RpcCommand.GET_TIME, ret=GENERIC, params=[Param(VALUE_OUT)])
    guest.ram.write(at + 32, Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]).pack())
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert replies[0].params == [Param(VALUE_OUT, 1, 2, 3)]
    assert guest.unregister(9).ret == 0


def test_a_nested_command_keeps_its_commands_apart(make):
    """Several RPCs in one call: each reply is judged by its own request."""
    pair = make()
    guest = pair.guest()
    at, ipa = suspended_in_command(guest, shm_alloc())
    offer(guest, at, guest.tmem(1, cookie=0xB0, kind=TMEM_OUT))
    pair.world.script.append(ask(Message(RpcCommand.FS, params=[Param(RMEM_OUT, 0, 100, 0xB0)])))
    assert guest.resume()[0] == RpcReturn.CMD
    offer(guest, at, guest.tmem(1, cookie=0xB9, kind=TMEM_OUT))
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert replies[0].params == [Param(RMEM_OUT, 0, 4096, 0xB0)]
    assert guest.sums()["buffers"] == 1
    assert guest.read(ipa).cmd == Command.INVOKE_COMMAND


def test_steps_are_forwards_and_replies_only_as_documented(make):
    pair = make()
    guest = pair.guest()
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke()))))
    assert isinstance(step, Forward)
    step = pair.returned(step.ticket, pair.answer(step))
    assert isinstance(step, Reply)


def test_registered_references_in_requests_keep_their_place(make):
    pair = make()
    guest = pair.guest()
    request = Message(RpcCommand.FS, params=[Param(RMEM_IN, 8, 16, 5), Param(TMEM_INOUT, 0, 0, 0)])
    at, _ = suspended_in_command(guest, request)
    assert guest.read(at).params == request.params
    assert guest.resume()[0] == 0


@BEHIND
def test_several_buffers_can_be_offered_in_one_call(make, behind):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc(), behind=behind)
    for cookie in (0xB0, 0xB1, 0xB2):
        offer(guest, at, guest.tmem(600, cookie=cookie, kind=TMEM_OUT))
        pair.world.script.append(ask(shm_alloc(), 0 if behind else 0xC0))
        assert guest.resume()[0] == RpcReturn.CMD
    assert guest.sums()["buffers"] == 3
    assert pair.machine.pages.allocated == 1 + 2 + (not behind)  # the shadow, the last one's lists, the argument
    offer(guest, at, Param(0), ret=0xFFFF_000C)
    assert guest.resume()[0] == 0
    assert guest.sums()["pages"] == 1800


def test_a_reply_behind_a_message_that_is_longer_than_its_request_is_taken(make):
    pair = make()
    guest = pair.guest()
    pair.world.script.append(ask(TIME))
    regs, ipa = guest.call(invoke(*[Param(VALUE_IN, 1, 2, 3)] * 4), Function.CALL_WITH_RPC_ARG)
    assert regs[0] == RpcReturn.CMD
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), ipa + message_size(4))
    replies: list[Message] = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert replies[0].params == [Param(VALUE_OUT, 1, 2, 3)]


def test_a_request_that_names_no_type_of_memory_is_undone_as_of_type_0(make):
    """OP-TEE says the type in a value; where it does not, nothing else is taken for it."""
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, Message(RpcCommand.SHM_ALLOC, params=[Param(RMEM_IN, 7, 8, 9)]))
    offer(guest, at, Param(TMEM_OUT, guest.page_list([8]), 77, 0xB0))
    assert guest.resume()[0] == RpcReturn.CMD
    assert (guest.read(at).cmd, guest.read(at).params) == (RpcCommand.SHM_FREE, [Param(VALUE_IN, 0, 0xB0, 0xB0)])
    assert guest.resume()[0] == 0


def test_an_offer_to_a_request_of_two_parameters_is_an_error(make):
    pair = make()
    guest = pair.guest()
    request = shm_alloc()
    request.params.append(Param(VALUE_IN, 1, 2, 3))
    at, _ = suspended_in_command(guest, request)
    offer(guest, at, guest.tmem(1, cookie=0xB0, kind=TMEM_OUT), count=2)
    replies = []
    pair.world.script.append(reading(replies))
    assert guest.resume()[0] == 0
    assert (replies[0].ret, replies[0].params) == (GENERIC, [])


def test_a_reply_whose_page_was_taken_away_meanwhile_is_dropped(make):
    """DISABLE_SHM_CACHE gives OP-TEE's page back while a call waits: nothing is written to a page of others."""
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, TIME, behind=False)
    pair.world.fast[Function.DISABLE_SHM_CACHE] = (0, 0, 0xC0, 0)
    guest.smc(Function.DISABLE_SHM_CACHE)
    page = pair.host.lend()
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), at)
    assert guest.resume()[0] == 0
    assert not any(page.view)
    pair.host.take_back(page)


def test_a_page_that_was_taken_away_while_the_guest_frees_its_offer_is_not_written(make):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc(), behind=False)
    offer(guest, at, Param(TMEM_OUT, guest.page_list([8]), 77, 0xB0))
    assert guest.resume(0, *to_pair(0xC0))[0] == RpcReturn.CMD
    assert guest.read(at).cmd == RpcCommand.SHM_FREE
    pair.world.fast[Function.DISABLE_SHM_CACHE] = (0, 0, 0xC0, 0)
    guest.smc(Function.DISABLE_SHM_CACHE)
    page = pair.host.lend()
    assert guest.resume(0, *to_pair(0xC0))[0] == 0
    assert not any(page.view)
    pair.host.take_back(page)


def test_tracing_tells_which_pages_are_pinned_for_what(make):
    pair = make()
    guest = pair.guest()
    guest.invoke(guest.tmem(2))
    assert not {"pages_pinned", "pages_unpinned"} & set(pair.names())
    pair.mediator.tracing = True
    param = guest.tmem(2, cookie=5)
    guest.invoke(param)
    pinned = [event for event in pair.events if event.name in ("pages_pinned", "pages_unpinned")]
    assert [(event.level, event.vm, event.detail["cookie"], event.detail["pages"]) for event in pinned] == [
        ("debug", guest.id, 5, 2)
    ] * 2


def test_a_guest_that_is_only_given_its_vcpu_back_answers_with_nothing(make):
    """After too many requests that the policy is against: x1 and x2 are 0 both ways, x4 to x7 the guest's."""
    pair = make()
    guest = pair.guest()
    request = Message(RpcCommand.RPMB, ret=GENERIC)
    pair.world.script += [ask(request, thread=5)] * (MAX_UNDELIVERED + 1)
    ipa = guest.write(invoke())
    regs = guest.smc(Function.CALL_WITH_RPC_ARG, *to_pair(ipa), 0, 44, 55, 66, 77)
    assert regs == (RpcReturn.FOREIGN_INTR, 0, 0, 5, 44, 55, 66, 77)
    resumed = [regs for regs in pair.world.inbox if regs[0] == Function.RETURN_FROM_RPC]
    assert resumed == [(Function.RETURN_FROM_RPC, 0, 0, 5, 0, 0, 0, guest.id)] * MAX_UNDELIVERED
    assert guest.smc(Function.RETURN_FROM_RPC, 8, 9, 5, 45, 56, 67, 78) == (0, 0, 0, 0, 45, 56, 67, 78)
    assert pair.world.inbox[-1] == (Function.RETURN_FROM_RPC, 0, 0, 5, 0, 0, 0, guest.id)


@BEHIND
def test_the_guest_is_asked_to_free_in_its_own_words(make, behind):
    """R19: the request is a SHM_FREE of the type that was asked for, with the reply's header otherwise."""
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc(kind=ShmType.KERNEL), behind=behind, thread=6)
    bad = Param(TMEM_OUT, guest.page_list([8]), 77, 0xB0)
    guest.write(Message(RpcCommand.SHM_ALLOC, 1, 2, 3, 4, 0, 6, [bad]), at)
    words = resume_words(behind)
    regs = guest.smc(Function.RETURN_FROM_RPC, 8, 9, 6, 44, 55, 66, 77)
    assert regs == (RpcReturn.CMD, *words, 6, 44, 55, 66, 77)
    expected = Message(RpcCommand.SHM_FREE, 1, 2, 3, 4, GENERIC, 6, [Param(VALUE_IN, ShmType.KERNEL, 0xB0, 0xB0)])
    assert guest.read(at) == expected
    replies = []
    pair.world.script.append(reading(replies))
    guest.write(Message(RpcCommand.SHM_FREE, ret=0), at)
    assert guest.resume(6)[0] == 0
    assert pair.world.inbox[-1] == (Function.RETURN_FROM_RPC, 0, 0, 6, 0, 0, 0, guest.id)
    assert replies == [replace(expected, params=[])]


@pytest.mark.parametrize("flow", [False, True])
def test_the_first_thread_of_the_mediators_own_is_one(make, flow):
    policy = policy_of()
    pair = make(replace(policy, flow=FlowPolicy(queue=4)) if flow else policy)
    guest = pair.guest(ram=16 << 20)
    guest.record.next_call = OWN_THREADS - 1
    step, ipa = long_call(guest)
    regs = pair.checker.give_back(step.ticket).regs
    assert regs == (RpcReturn.FOREIGN_INTR, 0, 0, OWN_THREADS, 14, 15, 16, 17)
    assert guest.resume(OWN_THREADS)[0] == 0
    assert guest.read(ipa).ret == 0


def test_each_resume_of_the_guest_begins_the_count_of_undelivered_requests_anew(make):
    pair = make()
    guest = pair.guest()
    replies: list[Message] = []
    request = Message(RpcCommand.RPMB, ret=GENERIC)
    pair.world.script += [ask(request)] * (2 * (MAX_UNDELIVERED + 1) + MAX_UNDELIVERED) + [reading(replies)]
    regs, _ = guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
    for _ in range(2):
        assert regs[0] == RpcReturn.FOREIGN_INTR and not replies
        regs = guest.resume()
    assert regs[0] == 0 and replies


@pytest.mark.parametrize("kind", [RMEM_IN, RMEM_OUT, RMEM_INOUT])
def test_pages_that_op_tee_names_in_a_request_are_dirty(make, kind):
    """R27: what the supplicant is to read there, OP-TEE has written; what it is to write there, it has itself."""
    pair = make()
    guest = pair.guest("kvm")
    first = registered_pages(guest)
    other = registered_pages(guest, cookie=10)
    guest.vm.start_dirty_logging()
    guest.vm.dirty_pages()
    suspended_in_command(guest, Message(RpcCommand.FS, params=[Param(VALUE_IN), Param(kind, 0, 8, 9)]))
    pages = {gfn << 12 for gfn in guest.vm.dirty_pages()}
    assert {first, first + PAGE_SIZE} <= pages and not {other, other + PAGE_SIZE} & pages
    guest.vm.stop_dirty_logging()
    assert guest.resume()[0] == 0
    assert guest.unregister(9).ret == guest.unregister(10).ret == 0


def test_the_room_for_a_request_is_that_of_the_beginning_of_its_call(pair):
    """OP-TEE may say another number of parameters while a call is suspended, to whichever guest asks."""
    guest, other = pair.guest(), pair.guest("xen")
    buffer = guest.tmem(1, cookie=1, kind=TMEM_OUT)
    guest.register(buffer)
    page = int.from_bytes(guest.ram.read(buffer.a, 8), "little")
    at = PAGE_SIZE - message_size(0) - message_size(4)
    guest.ram.write(page + at, invoke().pack())
    large = Message(RpcCommand.FS, params=[Param(VALUE_IN)] * 6)
    pair.world.script += [interrupt(), ask(large), succeed()]
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 1, at)[0] == RpcReturn.FOREIGN_INTR
    pair.world.fast[Function.EXCHANGE_CAPABILITIES] = (0, 0xFD, 0x42, 6)
    other.smc(Function.EXCHANGE_CAPABILITIES)
    assert guest.resume()[0] == 0, "the request does not fit: it is refused, and the call goes on"
    assert pair.names().count("rpc_undelivered") == 1
