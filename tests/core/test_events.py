"""What an operator is told: every word of each event, as docs/reference/events.md lists them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind, Reason, Stage2Fault
from mediator.core.rpc import MAX_UNDELIVERED
from mediator.core.steps import (
    CALL_ADMITTED,
    CALL_DENIED,
    CALL_QUEUED,
    CALL_REFUSED,
    CALL_REJECTED,
    GUEST_CREATED,
    GUEST_DESTROYED,
    GUEST_ISOLATED,
    GUEST_QUARANTINED,
    GUEST_REFUSED,
    LIMITS_CHANGED,
    PAGES_PINNED,
    PAGES_UNPINNED,
    POOL_CHANGED,
    RPC_REPLY_REPLACED,
    RPC_UNDELIVERED,
    SECURE_WORLD_FAULT,
    Event,
    Queue,
)
from optee.abi.message import NONCONTIG, Command, Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, from_pair, to_pair
from tests.core.pair import (
    BAD_PARAMETERS,
    OUT_OF_MEMORY,
    RMEM_IN,
    TMEM_IN,
    TMEM_OUT,
    VALUE_IN,
    VALUE_INOUT,
    VALUE_OUT,
    GuestSide,
    Pair,
    ask,
    ask_alloc,
    interrupt,
    invoke,
    policy_of,
    raw,
    register,
    shm_alloc,
    smc,
    suspended_in_command,
    unregister,
)
from tests.core.test_calls import registered_pages
from tests.core.test_flow import controlled

ARG, RPC_ARG, REGD_ARG = Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG
RESUME = Function.RETURN_FROM_RPC
TIME = Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT)])
FIRST = 0x4000_1000
"""IPA of the first page that a test uses."""
EBADADDR, EBADCMD, ENOMEM, ERESUME, ETHREAD_LIMIT = (
    int(code)
    for code in (
        ReturnCode.EBADADDR,
        ReturnCode.EBADCMD,
        ReturnCode.ENOMEM,
        ReturnCode.ERESUME,
        ReturnCode.ETHREAD_LIMIT,
    )
)


def events_of(pair: Pair, *names: str) -> list[Event]:
    return [event for event in pair.events if event.name in names]


# Calls


def limited(guest: GuestSide, **limits: int) -> GuestSide:
    for name, value in limits.items():
        setattr(guest.limits, name, value)
    return guest


def pages_left(guest: GuestSide, count: int) -> GuestSide:
    guest.pair.host.left = count
    return guest


def device(guest: GuestSide) -> int:
    """IPA of a page that is none."""
    ipa = guest.page()
    guest.vm.set_kind(ipa, PageKind.MMIO)
    return ipa


def counting(guest: GuestSide, count: int, function: Function = ARG) -> None:
    """A message that says it has so many parameters."""
    ipa = guest.write(invoke())
    guest.ram.write(ipa + 28, count.to_bytes(4, "little"))
    guest.call(ipa, function)


def in_a_buffer(guest: GuestSide, at: int) -> None:
    first = registered_pages(guest)
    guest.ram.write(first + at, invoke().pack())
    guest.smc(REGD_ARG, 0, 9, at)


def read_only_at_the_end(guest: GuestSide) -> None:
    ipa = guest.write(invoke())
    step = guest.submit(smc(ARG, *to_pair(ipa)))
    guest.vm.set_kind(ipa, PageKind.RAM_RO)
    guest.pair.drive(step)


def list_that_goes_on_at(guest: GuestSide, ipa: int) -> Message:
    """A buffer of two list pages, of which the second one is said to be there."""
    param = guest.tmem(512)
    guest.ram.write(param.a + PAGE_SIZE - 8, ipa.to_bytes(8, "little"))
    return guest.invoke(param)


def twice(guest: GuestSide) -> None:
    guest.register(guest.tmem(1, cookie=5))
    guest.invoke(guest.tmem(1, cookie=5))


def give(guest: GuestSide, ipa: int | None = None, cookie: int = 0xC1) -> None:
    """Answer an RPC ALLOC; one has been answered before."""
    guest.pair.world.script += [ask_alloc(), ask_alloc(), interrupt()]
    guest.call(invoke())
    guest.give_page(0xC0)
    guest.give_page(cookie, ipa=ipa)


def over(rule: str, resource: str, asked: int, held: int | None, limit: int | None) -> dict[str, Any]:
    return {"rule": rule, "resource": resource, "asked": asked, "held": held, "limit": limit}


def no_pages(asked: int = 1) -> dict[str, Any]:
    return over("R22", "mediator_pages", asked, None, None)


In = Callable[[GuestSide], Any]
IN_A0: list[tuple[In, int, Function, int | None, str, dict[str, Any]]] = [
    # what the guest does; answer, function, call, why, and of a limit which one
    (lambda g: limited(g, calls=0).call(invoke()), ETHREAD_LIMIT, ARG, None,
     "1 calls beside 0, 0 are allowed", over("R21", "calls", 1, 0, 0)),
    (lambda g: limited(g, memory=100).call(invoke()), ENOMEM, ARG, None,
     "4352 memory beside 0, 100 are allowed", over("R21", "memory", 4352, 0, 100)),
    (lambda g: g.smc(ARG, 0, FIRST + 8), EBADADDR, ARG, 1, "the message is not page aligned", {}),
    (lambda g: pages_left(g, 0).call(invoke(), RPC_ARG), ENOMEM, RPC_ARG, 1, "no mediator_pages left", no_pages()),
    (lambda g: g.call(device(g)), EBADADDR, ARG, 1, "IPA 0x40001000: device memory", {}),
    (lambda g: counting(g, 123, RPC_ARG), EBADADDR, RPC_ARG, 1, "message and RPC argument do not fit one page", {}),
    (lambda g: in_a_buffer(g, 8008), EBADADDR, REGD_ARG, 2, "message and RPC argument do not lie in their buffer", {}),
    (lambda g: g.call(Message(99)), EBADCMD, ARG, 1, "command 0x63 is not forwarded", {}),
    (lambda g: g.smc(REGD_ARG, 0, 9, 0), EBADADDR, REGD_ARG, 1, "no registered buffer has this cookie", {}),
    (lambda g: in_a_buffer(g, 4), EBADADDR, REGD_ARG, 2, "the message does not lie in its buffer, 8-byte aligned", {}),
    (lambda g: in_a_buffer(g, 8192 - 32), EBADADDR, REGD_ARG, 2,
     "message and RPC argument do not lie in their buffer", {}),
    (lambda g: (registered_pages(g), g.smc(REGD_ARG, 0, 9, 8192 - 24)), EBADADDR, REGD_ARG, 2,
     "the message does not lie in its buffer, 8-byte aligned", {}),
    (lambda g: (registered_pages(g), g.smc(REGD_ARG, 0, 9, 8192 + 4096)), EBADADDR, REGD_ARG, 2,
     "the message does not lie in its buffer, 8-byte aligned", {}),
    (read_only_at_the_end, EBADADDR, ARG, 1, "IPA 0x40001008: read-only memory", {}),
    (lambda g: g.resume(3), ERESUME, RESUME, None, "no call of thread 0x3 waits", {}),
    (lambda g: give(g, FIRST + 8), EBADADDR, RESUME, 1, "the RPC argument is not page aligned", {}),
    (lambda g: give(g, cookie=0xC0), EBADADDR, RESUME, 1, "an RPC argument with this cookie is live", {}),
    (lambda g: give(limited(g, rpc_arguments=1)), ENOMEM, RESUME, 1,
     "1 rpc_arguments beside 1, 1 are allowed", over("R21", "rpc_arguments", 1, 1, 1)),
    (lambda g: give(g, device(g)), EBADADDR, RESUME, 1, "IPA 0x40001000: device memory", {}),
    (lambda g: give(pages_left(g, 2)), ENOMEM, RESUME, 1, "no mediator_pages left", no_pages()),
]  # fmt: skip


def settle(guest: GuestSide) -> None:
    """End what a test left suspended."""
    guest.pair.world.script.clear()
    while guest.record.suspended:
        guest.resume(next(iter(guest.record.suspended)))


@pytest.mark.parametrize("case", range(len(IN_A0)), ids=[case[4] for case in IN_A0])
def test_a_refusal_in_a0_says_why(make, case):
    does, answer, function, call, why, limit = IN_A0[case]
    detail = {"call": call, "function": int(function), "answer": answer, "origin": None, "why": why, **limit}
    name = CALL_REFUSED if limit else CALL_REJECTED
    for policy in ("default", controlled()):
        if policy != "default" and answer == ETHREAD_LIMIT:
            continue  # such a call waits
        pair = make(policy)
        guest = pair.guest("xen")
        does(guest)
        assert events_of(pair, CALL_REFUSED, CALL_REJECTED) == [Event(name, "info", guest.id, detail)]
        counters = guest.record.counters
        assert (counters.refused, counters.rejected, counters.denied) == (bool(limit), not limit, 0)
        settle(guest)


IN_THE_MESSAGE: list[tuple[In, int, str | None, str, dict[str, Any]]] = [
    # what the guest does; `ret`, command, why, and of a limit which one
    (lambda g: counting(g, 128), BAD_PARAMETERS, None, "128 parameters", {}),
    (lambda g: g.run(Message(Command.REGISTER_SHM)), BAD_PARAMETERS, "REGISTER_SHM",
     "REGISTER_SHM with 0 parameters", {}),
    (lambda g: g.run(register(Param(TMEM_IN, FIRST, 1, 1))), BAD_PARAMETERS, "REGISTER_SHM",
     "REGISTER_SHM with attribute 0x209", {}),
    (lambda g: g.run(register(Param(TMEM_OUT, FIRST, 1, 0))), BAD_PARAMETERS, "REGISTER_SHM",
     "REGISTER_SHM without a buffer or a cookie", {}),
    (lambda g: g.run(Message(Command.UNREGISTER_SHM)), BAD_PARAMETERS, "UNREGISTER_SHM",
     "UNREGISTER_SHM with 0 parameters", {}),
    (lambda g: g.run(unregister(3, VALUE_IN)), BAD_PARAMETERS, "UNREGISTER_SHM",
     "UNREGISTER_SHM with attribute 0x1", {}),
    (lambda g: g.invoke(Param(RMEM_IN, 0, 1, 0)), BAD_PARAMETERS, "INVOKE_COMMAND",
     "a registered memory reference with cookie 0", {}),
    (lambda g: g.invoke(Param(TMEM_IN & ~NONCONTIG, FIRST, 1, 1)), BAD_PARAMETERS, "INVOKE_COMMAND",
     "a contiguous buffer outside reserved memory", {}),
    (lambda g: g.invoke(Param(TMEM_IN, FIRST, 0, 1)), BAD_PARAMETERS, "INVOKE_COMMAND",
     "a page list for no pages", {}),
    (twice, BAD_PARAMETERS, "INVOKE_COMMAND", "a buffer with this cookie is live", {}),
    (lambda g: limited(g, pages_per_buffer=2).invoke(g.tmem(3)), OUT_OF_MEMORY, "INVOKE_COMMAND",
     "3 pages_per_buffer, 2 are allowed", over("R21", "pages_per_buffer", 3, None, 2)),
    (lambda g: limited(g, pages=2).invoke(g.tmem(3)), OUT_OF_MEMORY, "INVOKE_COMMAND",
     "3 pages beside 0, 2 are allowed", over("R21", "pages", 3, 0, 2)),
    (lambda g: pages_left(g, 2).invoke(g.tmem(1200)), OUT_OF_MEMORY, "INVOKE_COMMAND",
     "no mediator_pages left", no_pages(2)),
    (lambda g: g.invoke(Param(TMEM_IN, g.page_list([FIRST, 8]), 8192, 1)), BAD_PARAMETERS, "INVOKE_COMMAND",
     "IPA 0x8: not page aligned", {}),
    (lambda g: g.invoke(Param(TMEM_IN, device(g), 8192, 1)), BAD_PARAMETERS, "INVOKE_COMMAND",
     "IPA 0x40001000: device memory", {}),
    (lambda g: list_that_goes_on_at(g, FIRST + 8), BAD_PARAMETERS, "INVOKE_COMMAND",
     "IPA 0x40001008: not page aligned", {}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(IN_THE_MESSAGE)), ids=[case[3] for case in IN_THE_MESSAGE])
def test_a_rejection_in_the_message_says_why(make, case):
    does, ret, command, why, limit = IN_THE_MESSAGE[case]
    pair = make()
    guest = pair.guest("xen")
    does(guest)
    number = guest.record.next_call
    detail = {"call": number, "function": int(ARG), "command": command, "answer": ret, "origin": 2, "why": why, **limit}
    name = CALL_REFUSED if limit else CALL_REJECTED
    assert events_of(pair, CALL_REFUSED, CALL_REJECTED) == [Event(name, "info", guest.id, detail)]
    counters = guest.record.counters
    assert (counters.refused, counters.rejected, counters.denied) == (bool(limit), not limit, 0)
    assert counters.refusals == ({limit["resource"]: 1} if limit else {})


def test_a_resume_with_another_cookie_says_so(make):
    pair = make("xen")
    guest = pair.guest()
    suspended_in_command(guest, TIME, behind=False)
    assert guest.resume(0, 0, 0xC1)[0] == ERESUME
    why = "another RPC argument than the saved one"
    detail = {"call": 1, "function": int(RESUME), "answer": ERESUME, "origin": None, "why": why}
    assert events_of(pair, CALL_REJECTED) == [Event(CALL_REJECTED, "info", guest.id, detail)]


def test_a_message_that_cannot_be_read_from_its_pinned_buffer_says_why(make, monkeypatch):
    """The model's memory always can; what stands behind the port elsewhere may not."""

    def fails(memory, pinned, offset, size):
        raise Stage2Fault(0x1000, Reason.UNMAPPED)

    pair = make()
    guest = pair.guest()
    registered_pages(guest)
    monkeypatch.setattr(type(guest.vm), "load", fails)
    assert guest.smc(REGD_ARG, 0, 9, 0)[0] == EBADADDR
    (event,) = events_of(pair, CALL_REFUSED, CALL_REJECTED)
    assert (event.name, event.detail["answer"], event.detail["why"]) == (
        CALL_REJECTED,
        EBADADDR,
        "IPA 0x1000: not mapped",
    )


def test_a_denied_call_names_its_function(make):
    pair = make("minimal")
    guest = pair.guest()
    guest.smc(0xAB << 32 | Function.VM_CREATED)
    assert events_of(pair, CALL_DENIED) == [
        Event(CALL_DENIED, "info", guest.id, {"function": int(Function.VM_CREATED), "rule": "R2", "answer": 0xFFFFFFFF})
    ]


def test_refusals_are_counted_by_resource(make):
    pair = make()
    guest = limited(pair.guest(), pages=2)
    for pages in (3, 4):
        guest.invoke(guest.tmem(pages))
    limited(guest, calls=0).call(invoke())
    counters = guest.record.counters
    assert (counters.refused, counters.refusals) == (3, {"pages": 2, "calls": 1})


# RPC


def with_count(request: Message, count: int) -> Any:
    """Ask, and say that it has so many parameters."""

    def answer(world: Any, now: Any, regs: Any) -> Any:
        words = ask(request)(world, now, regs)
        world.memory.write(world.argument(now) + 28, count.to_bytes(4, "little"))
        return words

    return answer


UNDELIVERED: list[tuple[Callable[..., Any], str]] = [
    (lambda: ask(Message(RpcCommand.BENCH_REG)), "an RPC command that carries a physical address"),
    (lambda: ask(Message(RpcCommand.SOCKET)), "RPC command 0xa is not for guests"),
    (lambda: ask(Message(RpcCommand.RPMB)), "the RPMB device is not this guest's"),
    *[
        (lambda kind=kind: ask(Message(RpcCommand.FS, params=[Param(VALUE_IN), Param(kind, 1 << 41, 8, 1)])),
         "a physical address in an RPC request")
        for kind in (9, 10, 11)
    ],
    (lambda: with_count(Message(RpcCommand.FS), 5), "5 parameters do not fit the RPC argument"),
    (lambda: lambda w, n, r: (ask(TIME)(w, n, r), raw(int(RpcReturn.CMD), 0, 5, 0)(w, n, r))[1],
     "a cookie, though the RPC argument stands behind the message"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(UNDELIVERED)), ids=[case[1] for case in UNDELIVERED])
def test_a_request_that_is_not_delivered_says_why(make, case):
    request, why = UNDELIVERED[case]
    policy = policy_of()
    pair = make(replace(policy, rpc_commands=policy.rpc_commands - {RpcCommand.SOCKET}))
    guest = pair.guest()
    pair.world.script.append(request())
    assert guest.call(invoke(), RPC_ARG)[0][0] == 0
    detail = {"call": 1, "thread": 0, "why": why}
    assert events_of(pair, RPC_UNDELIVERED) == [Event(RPC_UNDELIVERED, "info", guest.id, detail)]
    assert guest.record.counters.rpcs == 1


def test_a_request_by_a_page_that_is_not_there_says_which(make):
    pair = make()
    guest = pair.guest("xen")
    pair.world.script.append(raw(int(RpcReturn.CMD), 1, 2, 6))
    assert guest.call(invoke())[0][0] == 0
    detail = {"call": 1, "thread": 6, "why": "no RPC argument has the cookie 0x100000002"}
    assert events_of(pair, RPC_UNDELIVERED) == [Event(RPC_UNDELIVERED, "info", guest.id, detail)]
    pair.events.clear()
    pair.world.script.append(ask_alloc())
    guest.call(invoke())
    ipa = guest.page()
    pair.world.script.append(lambda w, n, r: (guest.vm.set_kind(ipa, PageKind.RAM_RO), ask(TIME, 0xC0)(w, n, r))[1])
    assert guest.give_page(0xC0, ipa=ipa)[0][0] == 0
    (event,) = events_of(pair, RPC_UNDELIVERED)
    assert event.detail == {"call": 2, "thread": 0, "why": f"IPA {ipa:#x}: read-only memory"}


def offering(guest: GuestSide, at: int, *params: Param) -> None:
    guest.write(Message(RpcCommand.SHM_ALLOC, params=[*params]), at)


REPLACED: list[tuple[Message, Callable[[GuestSide, int], Any], str]] = [
    (TIME, lambda g, at: g.write(Message(RpcCommand.GET_TIME), at), "0 parameters instead of 1"),
    (TIME, lambda g, at: g.vm.set_kind(at, PageKind.MMIO), "IPA 0x40002000: device memory"),
    (shm_alloc(), lambda g, at: offering(g, at), "0 parameters instead of 1"),
    (Message(RpcCommand.SHM_ALLOC), lambda g, at: offering(g, at), "SHM_ALLOC has one parameter"),
    (shm_alloc(), lambda g, at: offering(g, at, Param(VALUE_INOUT, 1, 2, 3)), "SHM_ALLOC answered with attribute 0x3"),
]


@pytest.mark.parametrize("case", range(len(REPLACED)))
def test_a_reply_that_is_replaced_says_why(make, case):
    request, reply, why = REPLACED[case]
    pair = make()
    guest = pair.guest("xen")
    at, _ = suspended_in_command(guest, request, behind=False)
    reply(guest, at)
    assert guest.resume()[0] == 0
    assert events_of(pair, RPC_REPLY_REPLACED) == [Event(RPC_REPLY_REPLACED, "info", guest.id, {"call": 1, "why": why})]
    assert guest.record.counters.rejected == 1


def test_an_offer_that_cannot_be_translated_is_a_rejection_of_its_call(make):
    pair = make()
    guest = pair.guest()
    at, _ = suspended_in_command(guest, shm_alloc())
    offering(guest, at, Param(TMEM_OUT, guest.page_list([8]), 10, 0xB0))
    guest.resume()
    detail = {
        "call": 1, "function": int(RPC_ARG), "command": "INVOKE_COMMAND", "answer": BAD_PARAMETERS, "origin": 2,
        "why": "IPA 0x8: not page aligned",
    }  # fmt: skip
    assert events_of(pair, CALL_REJECTED) == [Event(CALL_REJECTED, "info", guest.id, detail)]
    assert guest.resume()[0] == 0


# Guests


def test_birth_and_end_are_told(make):
    pair = make()
    guest = pair.guest()
    assert pair.destroy(guest)[0] == 0
    nothing = {"pages": 0, "buffers": 0, "rpc_arguments": 0, "calls": 0, "memory": 0}
    assert pair.events == [
        Event(GUEST_CREATED, "info", guest.id, {}),
        Event(GUEST_DESTROYED, "info", guest.id, nothing),
    ]


def test_who_is_not_created_is_told_why(make):
    pair = make()
    vm = pair.machine.create_kvm("new", 1 << 20)
    pair.world.host_script.append((0xAB << 32 | 7, 0, 0, 0))
    pair.create(vm)
    pair.create(vm, 0)
    pair.mediator.change_limits({}, 10)
    reserving = replace(policy_of().limits, reserved_pages=11)
    pair.drive(pair.checker.create(vm.client_id, vm, reserving))
    assert events_of(pair, GUEST_REFUSED) == [
        Event(GUEST_REFUSED, "info", vm.client_id, {"why": "OP-TEE answered 0x7"}),
        Event(GUEST_REFUSED, "info", 0, {"why": "id in use or out of range"}),
        Event(
            GUEST_REFUSED,
            "info",
            vm.client_id,
            {
                "why": "the host's pool: 11 reserved_pages beside 0, 10 are allowed",
                "rule": "R22",
                "resource": "reserved_pages",
                "asked": 11,
                "held": 0,
                "limit": 10,
                "answer": int(ReturnCode.ENOMEM),
            },
        ),
    ]


def test_a_quarantined_guest_is_told_with_what_it_keeps(make):
    pair = make()
    pair.errors_expected = True
    guest = pair.guest()
    guest.register(guest.tmem(4, cookie=1))
    sums = guest.sums()
    pair.events.clear()
    pair.world.host_script.append((0xAB << 32 | 13, 0, 0, 0))
    pair.destroy(guest)
    assert pair.events == [
        Event(SECURE_WORLD_FAULT, "error", guest.id, {"why": "VM_DESTROYED was answered 0xd: pins are kept"}),
        Event(GUEST_QUARANTINED, "error", guest.id, sums),
    ]
    assert sums["pages"] == 4


def test_an_isolated_guest_is_told_with_what_the_secure_world_did(make):
    pair = make()
    pair.errors_expected = True
    guest, other = pair.guest(), pair.guest()
    pair.world.script += [interrupt(3), interrupt(3)]
    guest.call(invoke())
    pair.events.clear()
    guest.call(invoke())
    assert pair.events == [
        Event(SECURE_WORLD_FAULT, "error", guest.id, {"why": "thread 0x3 is already suspended"}),
        Event(GUEST_ISOLATED, "error", guest.id, {}),
    ]
    pair.events.clear()
    pair.world.suspended.clear()
    pair.world.script.extend([raw(int(RpcReturn.CMD), 1, 2, 0)] * (MAX_UNDELIVERED + 1))
    other.call(invoke())
    assert len(events_of(pair, RPC_UNDELIVERED)) == MAX_UNDELIVERED + 1
    assert pair.events[-2:] == [
        Event(
            SECURE_WORLD_FAULT,
            "error",
            other.id,
            {"why": f"{MAX_UNDELIVERED + 1} RPCs of one call could not be delivered"},
        ),
        Event(GUEST_ISOLATED, "error", other.id, {}),
    ]


def test_whoever_has_to_wait_is_told_for_what(make):
    pair = make()
    vm = pair.machine.create_kvm("new", 1 << 20)
    step = pair.checker.create(vm.client_id, vm)
    assert pair.checker.destroy(vm.client_id).until == "the guest is created"
    pair.drive(step)
    guest = pair.guest()
    pair.checker.pause(guest.id)
    assert guest.submit(smc(Function.CALLS_UID)).until == "the guest is resumed"
    pair.checker.resume(guest.id)
    step = guest.submit(smc(Function.CALLS_UID))
    assert pair.checker.destroy(guest.id).until == "the calls that are with OP-TEE have returned"
    pair.drive(step)
    assert pair.destroy(guest)[0] == 0
    pair.errors_expected = True
    guest = pair.guest()
    for cookie in range(80):
        guest.register(Param(TMEM_OUT, guest.page_list([guest.page()]), 1, cookie + 1))
    pair.world.host_script.append((7, 0, 0, 0))
    pair.destroy(guest)
    step = pair.note(pair.checker.abandon(guest.id))
    for request in (pair.checker.abandon, pair.checker.destroy):
        assert request(guest.id).until == "the guest is released"
    assert pair.drive(step)[0] == 0


def test_changed_limits_are_told_with_what_they_were(make):
    pair = make(policy_of("default", pages=20, calls=5))
    first, second = pair.guest(), pair.guest()
    core = pair.mediator
    limits = core.policy.limits
    wanted = replace(limits, pages=10, rpc_arguments=3, reserved_pages=2, memory=limits.memory + 1)
    assert core.change_limits({first.id: wanted, second.id: limits, 77: wanted}, 50) == (
        Event(POOL_CHANGED, "info", 0, {"pages": [None, 50]}),
        Event(
            LIMITS_CHANGED,
            "info",
            first.id,
            {
                "pages": [20, 10],
                "rpc_arguments": [16, 3],
                "memory": [limits.memory, limits.memory + 1],
                "reserved_pages": [0, 2],
            },
        ),
    )
    assert first.record.limits is wanted and second.record.limits is limits
    assert core.change_limits({first.id: replace(wanted, calls=99)}, 50) == (
        Event(LIMITS_CHANGED, "info", first.id, {"calls": [5, 8]}),
    )
    assert core.change_limits({}, 50) == ()


# What is told only if it was asked for


def test_tracing_tells_which_list_became_which(make):
    pair = make()
    guest = pair.guest()
    pair.mediator.tracing = True
    pair.events.clear()
    param = guest.tmem(3, cookie=5, offset=16)
    seen = []
    pair.world.script.append(lambda w, n, r: (seen.append(w.message(n).params[0].a), (0, 0, 0, 0))[1])
    guest.call(invoke(Param(TMEM_IN, 0, 0, 0), param))
    pair.world.script.append(lambda w, n, r: (seen.append(w.message(n).params[1].a), (0, 0, 0, 0))[1])
    guest.call(invoke(Param(TMEM_IN, 0, 0, 0), param))
    assert seen[0] == 0
    detail = {"cookie": 5, "pages": 3}
    pinned = {"call": 2, **detail, "from": param.a, "to": seen[1]}
    assert pair.events[2:] == [
        Event(PAGES_PINNED, "debug", guest.id, pinned),
        Event(PAGES_UNPINNED, "debug", guest.id, detail),
    ]
    assert from_pair(*to_pair(seen[1])) % 4096 == 16


def test_tracing_tells_who_waits_behind_how_many_and_how_long(make):
    pair = make(controlled(calls=1))
    pair.mediator.tracing = True
    guest = pair.guest()
    pair.world.script.append(interrupt())
    guest.call(invoke())
    pair.events.clear()
    pair.checker.turns(1_000_000)
    steps = [pair.note(guest.submit(smc(ARG, *to_pair(guest.write(invoke()))))) for _ in range(2)]
    assert all(isinstance(step, Queue) and step.until == "flow control lets the call go on" for step in steps)
    assert pair.events == [
        Event(CALL_QUEUED, "debug", guest.id, {"call": 2, "waiting": 1}),
        Event(CALL_QUEUED, "debug", guest.id, {"call": 3, "waiting": 2}),
    ]
    pair.events.clear()
    guest.resume()
    for number, step in enumerate(steps, 2):
        assert pair.checker.turns(number * 5_000_000 + 999) == [step.ticket]
        assert pair.drive(pair.checker.proceed(step.ticket))[0] == 0
    assert events_of(pair, CALL_ADMITTED) == [
        Event(CALL_ADMITTED, "debug", guest.id, {"call": 2, "waited_us": 9000}),
        Event(CALL_ADMITTED, "debug", guest.id, {"call": 3, "waited_us": 14000}),
    ]
    assert [event.name for event in pair.events] == [CALL_ADMITTED, CALL_ADMITTED]


def test_a_rejection_that_cannot_be_written_is_told_twice(make):
    """Why the message is malformed, and why a0 had to say something instead."""
    pair = make()
    guest = pair.guest("xen")
    ipa = guest.write(invoke(Param(RMEM_IN, 0, 0, 0)))
    guest.vm.set_kind(ipa, PageKind.RAM_RO)
    assert guest.call(ipa)[0][0] == EBADADDR
    told = {"call": 1, "function": int(ARG)}
    why = "a registered memory reference with cookie 0"
    assert events_of(pair, CALL_REJECTED) == [
        Event(CALL_REJECTED, "info", guest.id, {
            **told, "command": "INVOKE_COMMAND", "answer": BAD_PARAMETERS, "origin": 2, "why": why,
        }),
        Event(CALL_REJECTED, "info", guest.id, {
            **told, "answer": EBADADDR, "origin": None, "why": f"IPA {ipa + 20:#x}: read-only memory",
        }),
    ]  # fmt: skip
    assert guest.record.counters.rejected == 2
