"""Yielding calls: rules R10 to R15, R29 (B3, B4, B5, B7, B12)."""

import pytest

from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind
from mediator.core.sharing import PAGES_PER_STEP
from optee.abi.message import META, Command, Message, Param, message_size
from optee.abi.smc import Function, ReturnCode, from_pair, to_pair
from tests.core.pair import (
    BAD_PARAMETERS,
    COMMS,
    GENERIC,
    OUT_OF_MEMORY,
    RMEM_IN,
    RMEM_INOUT,
    RMEM_OUT,
    TMEM_IN,
    TMEM_INOUT,
    TMEM_OUT,
    VALUE_IN,
    VALUE_INOUT,
    VALUE_OUT,
    YIELDING,
    ask,
    interrupt,
    invoke,
    policy_of,
    refuse,
    register,
    shm_free,
    smc,
    succeed,
    unregister,
)

INPUTS = [VALUE_IN, RMEM_IN, TMEM_IN]
OUTPUTS = [VALUE_OUT, VALUE_INOUT, RMEM_OUT, RMEM_INOUT, TMEM_OUT, TMEM_INOUT]
PLAIN = [Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG]


def looking(seen):
    """Note the message as OP-TEE sees it, and the registers."""

    def answer(world, now, regs):
        seen.append((world.message(now), regs))
        return succeed()(world, now, regs)

    return answer


# Errors in a0


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("what", ["unaligned", "odd", "beyond", "huge", "zero", "device", "unmapped", "grant"])
def test_a_message_that_cannot_be_read_is_ebadaddr(make, function, what):
    pair = make()
    guest = pair.guest("xen")
    ipa = guest.page()
    other = pair.guest("xen")
    match what:
        case "device" | "unmapped":
            guest.vm.set_kind(ipa, {"device": PageKind.MMIO, "unmapped": PageKind.NONE}[what])
        case "grant":
            guest.vm.map_grant(other.vm, other.page(), ipa)
        case _:
            moved = {"unaligned": ipa + 8, "odd": ipa + 1, "beyond": guest.ram.base + guest.ram.size}
            ipa = (moved | {"huge": 2**64 - PAGE_SIZE, "zero": 0})[what]
    before = len(pair.world.inbox)
    regs = guest.smc(function, *to_pair(ipa))
    assert regs[0] == ReturnCode.EBADADDR
    assert len(pair.world.inbox) == before
    assert guest.record.counters.rejected == 1
    pair.settle(guest)


def test_the_high_halves_of_the_address_pair_fall_off(make):
    guest = make().guest()
    high, low = to_pair(guest.write(invoke()))
    assert guest.smc(Function.CALL_WITH_ARG, 0xABCD << 32 | high, 0xEF01 << 32 | low)[0] == 0


@pytest.mark.parametrize("name", ["default", "xen", "minimal"])
@pytest.mark.parametrize("command", [*range(16), 0xFFFFFFFF])
def test_a_command_that_the_policy_does_not_forward_is_ebadcmd_and_leaves_the_message_alone(make, name, command):
    guest = make(name).guest()
    guest.tmem(1)
    message = Message(Command.INVOKE_COMMAND, params=[Param(VALUE_IN, 1, 2, 3)])
    ipa = guest.write(message)
    guest.ram.write(ipa, command.to_bytes(4, "little"))
    before, bytes_before = len(guest.pair.world.inbox), guest.ram.read(ipa, PAGE_SIZE)
    regs = guest.smc(Function.CALL_WITH_ARG, *to_pair(ipa))
    known = {int(known) for known in guest.pair.policy.commands}
    assert command in (4, 5) or (len(guest.pair.world.inbox) > before) == (command in known)
    if command not in known:
        assert len(guest.pair.world.inbox) == before
        assert regs[0] == ReturnCode.EBADCMD
        assert guest.ram.read(ipa, PAGE_SIZE) == bytes_before
    else:
        assert regs[0] == 0
    guest.pair.settle(guest)


@pytest.mark.parametrize("function", PLAIN)
def test_no_page_for_a_shadow_is_enomem(make, function):
    pair = make()
    guest = pair.guest()
    pair.host.left = 0
    assert guest.call(invoke(), function)[0][0] == ReturnCode.ENOMEM
    pair.host.left = 1
    assert guest.call(invoke(), function)[0][0] == 0
    pair.host.left = 1
    answer = guest.run(invoke(guest.tmem(1)))
    assert (answer.ret, answer.ret_origin) == (OUT_OF_MEMORY, COMMS)
    pair.settle(guest)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("function", PLAIN)
def test_ethread_limit_comes_first_and_only_while_another_call_of_the_guest_is_in_flight(make, threads, function):
    """R29: the errors that could hang a driver."""
    pair = make("default", threads=threads)
    guest, other = pair.guest(), pair.guest()
    for thread in range(threads):
        pair.world.script.append(interrupt(thread))
        assert guest.call(invoke(), function)[0][3] == thread
    for regs in (smc(function, 0, 1), smc(function, *to_pair(guest.write(invoke())))):
        assert pair.drive(guest.submit(regs))[0] == ReturnCode.ETHREAD_LIMIT
    assert guest.record.counters.refused == 2
    assert other.call(invoke(), function)[0][0] == 0
    assert guest.resume(0)[0] == 0
    assert guest.call(invoke(), function)[0][0] == 0
    for thread in range(1, threads):
        assert guest.resume(thread)[0] == 0
    pair.settle(guest)


# What OP-TEE sees


@pytest.mark.parametrize("function", PLAIN)
def test_the_forward_names_a_page_of_the_mediators_with_ret_preset(make, function):
    pair = make()
    guest = pair.guest()
    seen = []
    pair.world.script.append(looking(seen))
    message = invoke(Param(VALUE_IN, 1, 2, 3))
    message.ret, message.ret_origin, message.cancel_id, message.pad = 0, 3, 0x1234, 0x5678
    guest.call(message, function)
    ((shadow, regs),) = seen
    assert regs[0] == function and regs[3:] == (1, 0, 0, 0, guest.id)
    assert from_pair(regs[1], regs[2]) in pair.machine.pages
    assert (shadow.ret, shadow.ret_origin) == (GENERIC, 3)
    assert shadow.params == message.params
    assert (shadow.cmd, shadow.func, shadow.session, shadow.cancel_id) == (1, 7, 1, 0x1234)


def test_only_outputs_are_written_back(make):
    """Every byte of the guest's page but session, ret, origin, sizes and output values stays as it was."""
    pair = make()
    guest = pair.guest()
    kinds = INPUTS + OUTPUTS + [0]
    params = []
    for number, kind in enumerate(kinds, 1):
        if kind & 0xFF in (9, 10, 11):
            params.append(guest.tmem(1, cookie=number, kind=kind))
        else:
            params.append(Param(kind, 11, 22, number))
    ipa = guest.page()
    guest.ram.write(ipa, b"\xee" * PAGE_SIZE)
    guest.write(invoke(*params), ipa)
    before = guest.ram.read(ipa, PAGE_SIZE)

    def scribble(world, now, regs):
        frame = world.memory.frame(now.pa)
        count = frame[28:32].tobytes()
        frame[:] = b"\x77" * PAGE_SIZE
        frame[28:32] = count
        return (0, 0, 0, 0)

    pair.world.script.append(scribble)
    assert guest.call(ipa)[0][0] == 0
    after = guest.ram.read(ipa, PAGE_SIZE)
    written = set(range(8, 12)) | set(range(20, 28))
    for number, kind in enumerate(kinds):
        at = message_size(number)
        if kind & 0xFF in (VALUE_OUT, VALUE_INOUT):
            written |= set(range(at + 8, at + 32))
        elif kind in OUTPUTS:
            written |= set(range(at + 16, at + 24))
    assert {n for n in range(PAGE_SIZE) if after[n] != before[n]} == written
    assert {after[n] for n in written} == {0x77}


# Rejected messages


@pytest.mark.parametrize("count", [5, 6, 17, 64, 127])
@pytest.mark.parametrize("good", [0, 1, 4])
def test_a_rejected_message_leaves_nothing_behind_whatever_it_counts(make, count, good):
    """R12, B3, B4: the n-th parameter fails, the earlier ones are undone, the later ones not touched."""
    pair = make()
    guest = pair.guest()
    bad = Param(TMEM_INOUT, guest.page_list([8]), 10, 99)
    kept = guest.tmem(2, cookie=50)
    guest.register(kept)
    params = [guest.tmem(2, cookie=n + 1) for n in range(good)] + [bad]
    params += [Param(VALUE_INOUT, n, n, n) for n in range(count - len(params))]
    before = len(pair.world.inbox)
    sums, pins = guest.sums(), guest.pins()
    ipa = guest.write(invoke(*params))
    bytes_before = guest.ram.read(ipa, PAGE_SIZE)
    assert guest.smc(Function.CALL_WITH_ARG, *to_pair(ipa))[0] == 0
    after = guest.ram.read(ipa, PAGE_SIZE)
    assert (guest.read(ipa).ret, guest.read(ipa).ret_origin) == (BAD_PARAMETERS, COMMS)
    assert bytes_before[:20] + after[20:28] + bytes_before[28:] == after
    assert (guest.sums(), guest.pins(), len(pair.world.inbox)) == (sums, pins, before)
    # the cookies are free again
    assert guest.invoke(*[guest.tmem(1, cookie=n + 1) for n in range(good)]).ret == 0
    guest.unregister(50)
    pair.settle(guest)


def test_two_parameters_with_one_cookie_or_a_live_cookie_are_refused(make):
    guest = make().guest()
    assert guest.invoke(guest.tmem(1, cookie=5), guest.tmem(1, cookie=5)).ret == BAD_PARAMETERS
    guest.pair.settle(guest)
    guest.register(guest.tmem(1, cookie=5))
    held = guest.sums()
    assert guest.invoke(guest.tmem(1, cookie=5)).ret == BAD_PARAMETERS
    assert guest.register(guest.tmem(1, cookie=5)).ret == BAD_PARAMETERS
    assert guest.sums() == held and guest.pins() == 1
    guest.unregister(5)
    guest.pair.settle(guest)


@pytest.mark.parametrize("kind", [PageKind.RAM_RO, PageKind.NONE, PageKind.MMIO])
def test_a_result_that_cannot_be_written_is_ebadaddr(make, kind):
    """R14: the page goes away while OP-TEE has the call, or was read-only from the beginning."""
    pair = make()
    guest = pair.guest("xen")
    for message in (invoke(guest.tmem(2)), register(guest.tmem(2, cookie=4, kind=TMEM_OUT)), unregister(4)):
        ipa = guest.write(message)
        step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(ipa)))
        guest.vm.set_kind(ipa, kind)
        assert pair.drive(step)[0] == ReturnCode.EBADADDR
    pair.settle(guest)
    ipa = guest.write(invoke(Param(RMEM_IN, 0, 0, 0)))
    guest.vm.set_kind(ipa, PageKind.RAM_RO)
    assert guest.call(ipa)[0][0] == ReturnCode.EBADADDR
    pair.settle(guest)


@pytest.mark.parametrize("kind", [RMEM_IN, RMEM_OUT, RMEM_INOUT])
@pytest.mark.parametrize("command", [Command.OPEN_SESSION, Command.INVOKE_COMMAND, Command.CLOSE_SESSION])
def test_a_registered_reference_with_cookie_0_is_refused_by_default_only(make, kind, command):
    for name, ret in (("default", BAD_PARAMETERS), ("minimal", BAD_PARAMETERS), ("xen", 0)):
        guest = make(name).guest()
        before = len(guest.pair.world.inbox)
        message = guest.run(Message(command, params=[Param(VALUE_IN, 1, 2, 3), Param(kind, 0, 8, 0)]))
        assert message.ret == ret
        assert len(guest.pair.world.inbox) == before + (ret == 0)
        guest.pair.settle(guest)


# REGISTER_SHM and UNREGISTER_SHM


@pytest.mark.parametrize("name", ["default", "xen", "minimal"])
@pytest.mark.parametrize("attr", [*range(16), *range(0x200, 0x210), 0x30A, 0x10A, 0x1020A, 0x8000020A, 1 << 32 | 0x20A])
def test_register_takes_the_attributes_of_the_policy_and_one_parameter(make, name, attr):
    guest = make(name).guest()
    param = guest.tmem(2, cookie=3)._replace(attr=attr)
    taken = {"default": {0x20A}, "minimal": {0x20A}, "xen": {0x209, 0x20A, 0x20B}}[name]
    for params in ([param], [], [param, Param(0)], [Param(0), param], [param, param._replace(c=4)]):
        message = guest.run(Message(Command.REGISTER_SHM, params=params))
        good = attr in taken and len(params) == 1
        assert (message.ret, guest.pins()) == ((0, 2) if good else (BAD_PARAMETERS, 0))
        if good:
            assert message.params[0].b == param.b
            assert guest.unregister(3).ret == 0
        else:
            assert message.ret_origin == COMMS
        guest.pair.settle(guest)


@pytest.mark.parametrize("name", ["default", "xen"])
def test_register_refuses_null_empty_cookie_0_and_live_cookies(make, name):
    guest = make(name).guest()
    param = guest.tmem(2, cookie=3, kind=TMEM_OUT)
    for bad in (param._replace(a=0), param._replace(c=0), param._replace(b=0)):
        message = guest.register(bad)
        assert (message.ret, message.ret_origin) == (BAD_PARAMETERS, COMMS)
        guest.pair.settle(guest)
    assert guest.register(param).ret == 0
    assert guest.register(param).ret == BAD_PARAMETERS
    assert guest.pins() == 2
    assert guest.unregister(3).ret == 0


@pytest.mark.parametrize("attr", [*range(16), RMEM_IN | META])
@pytest.mark.parametrize("name", ["default", "xen", "minimal"])
def test_unregister_takes_one_parameter_of_the_policys_types(make, name, attr):
    guest = make(name).guest()
    taken = {"default": {5, 6, 7}, "minimal": {5}, "xen": set(range(16)) - {9, 10, 11} | {RMEM_IN | META}}[name]
    guest.register(guest.tmem(2, cookie=3))
    before = len(guest.pair.world.inbox)
    for params in ([], [Param(attr, 0, 0, 3), Param(0)]):
        assert guest.run(Message(Command.UNREGISTER_SHM, params=params)).ret == BAD_PARAMETERS
    assert len(guest.pair.world.inbox) == before
    message = guest.run(Message(Command.UNREGISTER_SHM, params=[Param(attr, 0, 0, 3)]))
    if attr in taken:
        assert (message.ret, guest.pins()) == (0, 0)
    elif attr in (9, 10, 11) and name == "xen":
        assert (message.ret, guest.pins()) == (0, 0)  # a NULL reference: goes through
    else:
        assert (message.ret, message.ret_origin, guest.pins()) == (BAD_PARAMETERS, COMMS, 2)
        assert guest.unregister(3).ret == 0
    guest.pair.settle(guest)


@pytest.mark.parametrize("name", ["default", "xen"])
def test_pages_stay_pinned_until_op_tee_unregistered_them(make, name):
    pair = make(name)
    guest = pair.guest()
    guest.register(guest.tmem(2, cookie=3))
    for answer in (succeed(BAD_PARAMETERS, 3), refuse(ReturnCode.EBADCMD), refuse(ReturnCode.ENOTAVAIL)):
        pair.world.script.append(answer)
        guest.call(unregister(3))
        assert guest.pins() == 2
    pair.world.script.append(lambda world, now, regs: (guest.pins(), succeed()(world, now, regs))[1])
    assert guest.unregister(3).ret == 0
    assert guest.pins() == 0
    # what is not known here is for OP-TEE to refuse
    pair.world.script.append(succeed(BAD_PARAMETERS, 3))
    message = guest.unregister(77)
    assert (message.ret, message.ret_origin) == (BAD_PARAMETERS, 3)
    pair.settle(guest)


def test_unregistering_cookie_0_does_not_reach_op_tee_by_default(make):
    """R13: OP-TEE has objects of its own under cookie 0."""
    guest = make().guest()
    before = len(guest.pair.world.inbox)
    message = guest.unregister(0)
    assert (message.ret, message.ret_origin) == (BAD_PARAMETERS, COMMS)
    assert len(guest.pair.world.inbox) == before


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("code", [code for code in ReturnCode if code])
def test_if_op_tee_refuses_nothing_is_written_back_and_everything_is_released(make, function, code):
    """R11: also where the guest had written ret = 0 before."""
    pair = make()
    guest = pair.guest()
    for message in (
        invoke(guest.tmem(2), Param(VALUE_INOUT, 1, 2, 3)),
        register(guest.tmem(2, cookie=5, kind=TMEM_OUT)),
        unregister(9),
    ):
        ipa = guest.write(message)
        before = guest.ram.read(ipa, PAGE_SIZE)
        pair.world.script.append(refuse(code))
        assert guest.call(ipa, function)[0][0] == code
        assert guest.ram.read(ipa, PAGE_SIZE) == before
        pair.settle(guest)


@pytest.mark.parametrize("ret", [0xFFFF0006, 0xFFFF000C, 1, 0xFFFFFFFF])
def test_a_registration_that_op_tee_rejects_is_released(make, ret):
    pair = make()
    guest = pair.guest()
    pair.world.script.append(succeed(ret, 0))
    assert guest.register(guest.tmem(2, cookie=5)).ret == ret
    pair.settle(guest)


def test_a_registration_that_op_tee_says_nothing_about_has_failed(make):
    """OP-TEE answers OK without having written ret: the preset decides, not the guest's 0."""
    pair = make()
    guest = pair.guest()
    pair.world.script.append(refuse(ReturnCode.OK))
    assert guest.register(guest.tmem(2, cookie=5)).ret == GENERIC
    pair.settle(guest)


@pytest.mark.parametrize("first", ["register", "use", "unregister"])
@pytest.mark.parametrize("second", ["register", "use", "unregister"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("fails", [(), (0,), (1,), (0, 1)])
def test_two_vcpus_race_on_one_cookie(make, first, second, swapped, live, fails):
    """B5: every interleaving of two requests on one cookie; the pins are what OP-TEE believes to have."""
    pair = make()
    guest = pair.guest()
    if live:
        guest.register(guest.tmem(2, cookie=3))
    messages = {
        "register": lambda: register(guest.tmem(2, cookie=3, kind=TMEM_OUT)),
        "use": lambda: invoke(Param(RMEM_INOUT, 0, 8, 3)),
        "unregister": lambda: unregister(3),
    }
    registered = live
    steps = []
    for vcpu, what in enumerate((first, second)):
        ipa = guest.write(messages[what]())
        steps.append((vcpu, what, guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(ipa)), vcpu)))
    for vcpu, what, step in reversed(steps) if swapped else steps:
        ret = 0
        if vcpu in fails or (what == "unregister" and not registered):
            ret = BAD_PARAMETERS
        if hasattr(step, "ticket"):
            pair.world.script.append(succeed(ret, 3))
            if not ret:
                registered = {"register": True, "unregister": False}.get(what, registered)
        assert pair.drive(step)[0] == 0
    assert guest.pins() == 2 * registered
    if registered:
        guest.unregister(3)
    pair.settle(guest)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_two_unregistrations_and_a_new_registration_release_each_buffer_once(make, depth):
    pair = make()
    guest = pair.guest()
    guest.register(guest.tmem(2, cookie=3))
    steps = [
        guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(unregister(3)))), vcpu) for vcpu in range(depth)
    ]
    pair.drive(steps.pop())
    assert guest.pins() == 0
    assert guest.register(guest.tmem(1, cookie=3)).ret == 0
    for step in steps:
        pair.world.script.append(succeed(BAD_PARAMETERS, 3))
        pair.drive(step)
    assert guest.pins() == 1
    guest.unregister(3)
    pair.settle(guest)


# CALL_WITH_RPC_ARG and CALL_WITH_REGD_ARG


@pytest.mark.parametrize("announced", [None, 0, 1, 4, 8])
def test_a_message_needs_room_for_its_rpc_argument_behind_it(make, announced):
    pair = make()
    guest = pair.guest()
    if announced is not None:
        pair.world.fast[Function.EXCHANGE_CAPABILITIES] = (0, 0xFD, 0x42, announced)
        guest.smc(Function.EXCHANGE_CAPABILITIES)
    room = (PAGE_SIZE - 32 - 32 - 32 * (4 if announced is None else announced)) // 32
    for count in (0, 1, room - 1, room):
        assert guest.call(invoke(*[Param(VALUE_IN, 1, 2, 3)] * count), Function.CALL_WITH_RPC_ARG)[0][0] == 0
    before = len(pair.world.inbox)
    for count in (room + 1, 127):
        regs, _ = guest.call(invoke(*[Param(VALUE_IN, 1, 2, 3)] * count), Function.CALL_WITH_RPC_ARG)
        assert regs[0] == ReturnCode.EBADADDR
    assert len(pair.world.inbox) == before
    pair.settle(guest)


def registered_pages(guest, pages=2, cookie=9, offset=0):
    """Register consecutive pages: the IPA where they start."""
    first = guest.page(pages)
    places = [first + n * PAGE_SIZE for n in range(pages)]
    param = Param(TMEM_OUT, guest.page_list(places) | offset, pages * PAGE_SIZE - offset, cookie)
    assert guest.register(param).ret == 0
    return first


@pytest.mark.parametrize("at", [0, 8, 2048, 4000, 4064, 4088, 4096, 8192 - 256])
@pytest.mark.parametrize("offset", [0, 0x40])
def test_a_message_in_a_registered_buffer_may_cross_its_pages(make, at, offset):
    pair = make()
    guest = pair.guest()
    first = registered_pages(guest, offset=offset)
    at = min(at, 8192 - 256 - offset)
    message = invoke(Param(VALUE_INOUT, 1, 2, 3), Param(VALUE_IN, 4, 5, 6))
    guest.ram.write(first + offset + at, message.pack())
    seen = []

    def answer(world, now, regs):
        seen.append((world.message(now), regs[0]))
        return succeed(0, 4, session=77, p0=Param(VALUE_INOUT, 7, 8, 9))(world, now, regs)

    pair.world.script.append(answer)
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0xAB << 32, 9, at)[0] == 0
    ((shadow, function),) = seen
    assert (shadow.params, function) == (message.params, Function.CALL_WITH_RPC_ARG)
    after = Message.unpack(guest.ram.read(first + offset + at, 256))
    assert (after.ret, after.ret_origin, after.session) == (0, 4, 77)
    assert after.params == [Param(VALUE_INOUT, 7, 8, 9), Param(VALUE_IN, 4, 5, 6)]
    guest.unregister(9)
    pair.settle(guest)


@pytest.mark.parametrize(
    ("cookie", "at"),
    [
        (9, 8192),
        (9, 8192 - 24),
        (9, 8192 - 32),
        (9, 8192 - 255),
        (9, 4),
        (9, 0xFFFF_FFF8),
        (9, 0xFFFF_FFFF),
        (8, 0),
        (0, 0),
        (1 << 63, 0),
    ],
)
def test_a_message_that_is_not_in_its_buffer_is_ebadaddr(make, cookie, at):
    guest = make().guest()
    first = registered_pages(guest)
    guest.ram.write(first + 8192 - 256, invoke(Param(VALUE_IN, 1, 2, 3)).pack())
    before = len(guest.pair.world.inbox)
    assert guest.smc(Function.CALL_WITH_REGD_ARG, *to_pair(cookie), at)[0] == ReturnCode.EBADADDR
    assert len(guest.pair.world.inbox) == before
    guest.unregister(9)
    guest.pair.settle(guest)


def test_another_guests_buffer_or_a_temporary_one_holds_no_message(make):
    pair = make()
    first, second = pair.guest(), pair.guest()
    registered_pages(first)
    assert second.smc(Function.CALL_WITH_REGD_ARG, *to_pair(9), 0)[0] == ReturnCode.EBADADDR
    pair.world.script.append(interrupt())
    second.call(invoke(second.tmem(1, cookie=9)))
    assert second.smc(Function.CALL_WITH_REGD_ARG, *to_pair(9), 0)[0] == ReturnCode.EBADADDR
    second.resume()
    first.unregister(9)


@pytest.mark.parametrize("how", ["unregister", "shm-free"])
def test_a_buffer_that_goes_while_a_message_in_it_is_with_op_tee_is_not_written(make, how):
    pair = make()
    guest = pair.guest()
    first = registered_pages(guest)
    guest.ram.write(first, invoke(Param(VALUE_INOUT, 1, 2, 3)).pack())
    step = guest.submit(smc(Function.CALL_WITH_REGD_ARG, *to_pair(9), 0))
    if how == "unregister":
        assert guest.unregister(9).ret == 0
    else:
        pair.world.script.append(ask(shm_free(9), thread=1))
        guest.call(invoke(), Function.CALL_WITH_RPC_ARG)
        guest.resume(1)
    assert guest.pins() == 0
    before = guest.ram.read(first, 8192)
    assert pair.drive(step)[0] == ReturnCode.EBADADDR
    assert pair.events[-1].detail["why"] == "IPA 0x0: not mapped"
    assert guest.ram.read(first, 8192) == before
    pair.settle(guest)


def test_a_rejected_message_in_a_registered_buffer_says_so_there(make):
    guest = make().guest()
    first = registered_pages(guest)
    guest.ram.write(first + 4080, invoke(Param(RMEM_IN, 0, 0, 0)).pack())
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 9, 4080)[0] == 0
    after = Message.unpack(guest.ram.read(first + 4080, 256))
    assert (after.ret, after.ret_origin) == (BAD_PARAMETERS, COMMS)
    guest.unregister(9)


@pytest.mark.parametrize("count", [1, 100])
def test_a_message_of_many_outputs_in_a_registered_buffer_is_written_back(make, count):
    guest = make().guest()
    first = registered_pages(guest)
    guest.ram.write(first, invoke(*[Param(VALUE_INOUT, 1, 2, 3)] * count).pack())
    guest.pair.world.script.append(succeed(p0=Param(VALUE_INOUT, 4, 5, 6)))
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 9, 0)[0] == 0
    assert Message.unpack(guest.ram.read(first, PAGE_SIZE)).params[0] == Param(VALUE_INOUT, 4, 5, 6)
    guest.unregister(9)


@pytest.mark.parametrize("name", ["default", "xen", "minimal"])
def test_the_registers_of_a_completed_call_are_those_of_the_policy(make, name):
    guest = make(name).guest()
    ipa = guest.write(invoke())
    operands = (*to_pair(ipa), 13, 14, 15, 16, 17)
    keep = name == "xen"
    assert guest.smc(Function.CALL_WITH_ARG, *operands) == (0, *(operands[:3] if keep else (0, 0, 0)), 14, 15, 16, 17)
    guest.pair.world.script.append(refuse(ReturnCode.EBADCMD))
    failed = guest.smc(Function.CALL_WITH_ARG, *operands)
    assert failed == (5, *(operands[:3] if name != "minimal" else (0, 0, 0)), 14, 15, 16, 17)


def test_denied_functions_of_a_policy_are_not_handled_even_with_a_good_message(make):
    for name in ("xen", "minimal"):
        guest = make(name).guest()
        for function in set(YIELDING) - guest.pair.policy.functions:
            assert guest.call(invoke(), function)[0][0] == 2**64 - 1


def test_random_reserved_words_change_nothing(make):
    """B12: cancel_id and pad of the header, unused registers."""
    pair = make()
    guest = pair.guest()
    for cancel, pad, junk in ((0, 0, 0), (2**32 - 1, 2**32 - 1, 2**64 - 1), (5, 9, 0xDEAD)):
        message = invoke(Param(VALUE_IN, 1, 2, 3))
        message.cancel_id, message.pad = cancel, pad
        ipa = guest.write(message)
        regs = guest.smc(Function.CALL_WITH_ARG, *to_pair(ipa), junk, junk, junk, junk, junk)
        assert regs == (0, 0, 0, 0, junk, junk, junk, junk)
        assert (guest.read(ipa).cancel_id, guest.read(ipa).pad) == (cancel, pad)


def test_limits_of_a_buffer_answer_out_of_memory(make):
    guest = make(policy_of("xen")).guest(ram=16 << 20)
    message = guest.invoke(guest.tmem(130))
    assert (message.ret, message.ret_origin) == (OUT_OF_MEMORY, COMMS)
    assert guest.record.counters.refused == 1
    assert guest.invoke(guest.tmem(129)).ret == 0


def test_unregistering_the_cookie_of_a_temporary_buffer_does_not_take_it_from_its_call(make):
    """R13: a call frees what it made; OP-TEE does not find temporary buffers by cookie."""
    pair = make()
    guest = pair.guest()
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2, cookie=3))))), 1)
    assert guest.unregister(3).ret == 0
    assert guest.pins() == 2
    assert pair.drive(step)[0] == 0
    pair.settle(guest)


@pytest.mark.parametrize("ret", [0, BAD_PARAMETERS])
def test_a_buffer_may_be_unregistered_before_its_registration_ends(make, ret):
    """OP-TEE registered it and was interrupted: what it says at the end is about pages that are free already."""
    pair = make()
    guest = pair.guest()
    param = guest.tmem(2, cookie=3, kind=TMEM_OUT)
    pair.world.script.append(interrupt())
    guest.call(register(param))
    assert guest.unregister(3).ret == 0
    assert guest.pins() == 0
    pair.world.script.append(succeed(ret))
    assert guest.resume()[0] == 0
    pair.settle(guest)
    assert guest.register(param).ret == guest.unregister(3).ret == 0


def test_a_buffer_that_op_tee_unregisters_holds_no_message_unless_op_tee_refuses(make):
    pair = make()
    guest = pair.guest()
    guest.ram.write(registered_pages(guest), invoke().pack())
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(unregister(9)))))
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 9, 0)[0] == ReturnCode.EBADADDR
    pair.world.script.append(succeed(BAD_PARAMETERS))
    assert pair.drive(step)[0] == 0
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 9, 0)[0] == 0
    assert guest.unregister(9).ret == 0


@pytest.mark.parametrize("back", [0, 8, 40, 2000, 4000, 4096])
def test_a_message_in_a_very_large_buffer_may_cross_what_was_pinned_at_once(make, back):
    """A buffer of more pages than one step handles is pinned in pieces; a message knows nothing of them."""
    pair = make(policy_of(pages_per_buffer=60000, pages=60000, memory=64 << 20))
    guest = pair.guest()
    pages = [guest.page() for _ in range(4)]
    large = (pages * PAGES_PER_STEP)[: PAGES_PER_STEP + 2]
    edge = large[PAGES_PER_STEP - 1], large[PAGES_PER_STEP]
    size = len(large) * PAGE_SIZE
    assert guest.register(Param(TMEM_OUT, guest.page_list(large), size, 9)).ret == 0
    start = PAGE_SIZE - back
    message = invoke(*[Param(VALUE_INOUT, n, 2, 3) for n in range(100)]).pack()
    guest.ram.write(edge[0] + start, message[:back])
    guest.ram.write(edge[1], message[back:])
    changed = {f"p{n}": Param(VALUE_INOUT, 7, 8, n) for n in range(100)}
    pair.world.script.append(succeed(session=5, **changed))
    assert guest.smc(Function.CALL_WITH_REGD_ARG, *to_pair(9), size - 3 * PAGE_SIZE + start)[0] == 0
    part = min(back, len(message))
    after = guest.ram.read(edge[0] + start, part) + guest.ram.read(edge[1], len(message) - part)
    seen = Message.unpack(after)
    assert (seen.session, seen.ret, seen.params) == (5, 0, [*changed.values()])
    assert guest.unregister(9).ret == 0


class Whole:
    """Guest memory that takes fields as the port says they are: with a start and a stop."""

    def __init__(self, memory):
        self.memory = memory

    def store_fields(self, pinned, base, data, fields):
        assert all(0 <= field.start <= field.stop <= len(data) for field in fields)
        self.memory.store_fields(pinned, base, data, fields)


def test_bytes_of_a_very_large_buffer_are_those_of_its_pages(make):
    pair = make(policy_of(pages_per_buffer=60000, pages=60000, memory=64 << 20))
    guest = pair.guest()
    pages = [guest.page() for _ in range(5)]
    large = (pages * PAGES_PER_STEP)[: 2 * PAGES_PER_STEP + 1]
    size = len(large) * PAGE_SIZE
    assert guest.register(Param(TMEM_OUT, guest.page_list(large), size, 9)).ret == 0
    buffer = guest.record.buffers[9]
    assert len(buffer.pinned) == 3
    for ipa in pages:
        guest.ram.write(ipa, ipa.to_bytes(8, "little") * 512)
    first, second = PAGES_PER_STEP * PAGE_SIZE, 2 * PAGES_PER_STEP * PAGE_SIZE
    for start, length in (
        (0, 16), (first - 16, 16), (first - 8, 24), (first, 4096), (second - 4000, 4096), (size - 8, 8),
    ):  # fmt: skip
        words = [large[at // PAGE_SIZE].to_bytes(8, "little") for at in range(start, start + length, 8)]
        assert buffer.load(guest.vm, start, length) == b"".join(words)
        for fields in ((slice(0, length),), (slice(0, 8), slice(8, length))):
            written = bytes(at % 251 for at in range(start, start + length))
            buffer.store_fields(Whole(guest.vm), start, written, fields)
            assert buffer.load(guest.vm, start, length) == written
            buffer.store_fields(guest.vm, start, b"".join(words), fields)
    assert guest.unregister(9).ret == 0


def test_cookies_have_64_bits(make):
    guest = make().guest()
    cookie = 0x1234_5678_9ABC_DEF0
    first = registered_pages(guest, cookie=cookie)
    guest.ram.write(first, invoke().pack())
    assert guest.smc(Function.CALL_WITH_REGD_ARG, *to_pair(cookie), 0)[0] == 0
    for other in (cookie & 0xFFFFFFFF, cookie >> 32, cookie << 1 & 2**64 - 1):
        assert guest.smc(Function.CALL_WITH_REGD_ARG, *to_pair(other), 0)[0] == ReturnCode.EBADADDR
    junk = 0xABCD << 32
    high, low = to_pair(cookie)
    assert guest.smc(Function.CALL_WITH_REGD_ARG, junk | high, junk | low, junk)[0] == 0
    assert guest.unregister(cookie).ret == 0
