"""Life cycle: rules R1, R24, R25, R28, R29 (B5, B6, B10), notifications."""

from collections.abc import Callable

import pytest

from mediator.core.ledger import OverLimit
from mediator.core.mediator import Mediator
from mediator.core.states import GuestState
from mediator.core.steps import GUEST_REFUSED, Forward, Preempt, Queue, Reply
from optee.abi.message import Message, Param
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, to_pair
from tests.core.pair import (
    NOT_HANDLED,
    TMEM_OUT,
    VALUE_INOUT,
    VALUE_OUT,
    CountedHost,
    Pair,
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
    unregister,
)

TIME = Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT)])

# Golden sequences: generators that yield whenever something happened to the guest; they use `step` for each SMC.


def waits_for(step):
    """What somebody is told to wait for before the same is asked for again."""
    assert isinstance(step, Queue) and step.ticket is None
    return step.until


def with_alloc(guest):
    script = guest.pair.world.script
    script += [
        ask_alloc(),
        ask(shm_alloc(), 0xC0),
        ask(TIME, 0xC0),
        ask(shm_free(0xB0), 0xC0),
        ask_free(0xC0),
        interrupt(),
    ]
    yield smc(
        Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2, cookie=1), Param(VALUE_INOUT, 1, 2, 3))))
    )
    page = guest.page()
    yield smc(Function.RETURN_FROM_RPC, *to_pair(page), 0, *to_pair(0xC0))
    guest.write(Message(RpcCommand.SHM_ALLOC, params=[guest.tmem(3, cookie=0xB0, kind=TMEM_OUT)]), page)
    yield smc(Function.RETURN_FROM_RPC)
    guest.write(Message(RpcCommand.GET_TIME, params=[Param(VALUE_OUT, 1, 2, 3)]), page)
    yield smc(Function.RETURN_FROM_RPC)
    yield smc(Function.RETURN_FROM_RPC)
    yield smc(Function.RETURN_FROM_RPC)
    yield smc(Function.RETURN_FROM_RPC)


def with_rpc_argument(guest):
    first = guest.page(2)
    yield smc(
        Function.CALL_WITH_RPC_ARG,
        *to_pair(guest.write(register(Param(TMEM_OUT, guest.page_list([first, first + 4096]), 8192, 9)))),
    )
    guest.pair.world.script += [ask(shm_alloc()), ask(TIME), succeed()]
    guest.ram.write(first + 4064, invoke(guest.tmem(2, cookie=1)).pack())
    yield smc(Function.CALL_WITH_REGD_ARG, 0, 9, 4064)
    bad = Param(TMEM_OUT, guest.page_list([guest.page(), 8]), 8192, 0xB0)
    guest.ram.write(first + 4064 + 64, Message(RpcCommand.SHM_ALLOC, params=[bad]).pack())
    yield smc(Function.RETURN_FROM_RPC)
    yield smc(Function.RETURN_FROM_RPC)
    yield smc(Function.RETURN_FROM_RPC)
    yield smc(Function.CALL_WITH_RPC_ARG, *to_pair(guest.write(unregister(9))))


def with_long_lists(guest):
    message = invoke(*[guest.tmem(16384, cookie=n + 1) for n in range(3)])
    yield smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message)))
    yield smc(Function.CALL_WITH_ARG, *to_pair(guest.write(register(guest.tmem(600, cookie=1, kind=TMEM_OUT)))))
    yield smc(Function.ENABLE_ASYNC_NOTIF)


GOLDEN: list[Callable] = [with_alloc, with_rpc_argument, with_long_lists]


def play(pair, guest, golden, stop):
    """Run a golden sequence for `stop` steps of the core, then leave it: the last step, or None at its end."""
    steps = 0
    for regs in golden(guest):
        step = guest.submit(regs)
        while True:
            pair.note(step)
            steps += 1
            if steps == stop:
                return step
            if isinstance(step, Reply):
                assert step.regs[0] != ReturnCode.ERESUME
                break
            if isinstance(step, Forward):
                step = pair.checker.returned(step.ticket, pair.answer(step))
            else:
                assert isinstance(step, Preempt)
                step = pair.checker.proceed(step.ticket)
    return steps


def finish_by_hand(pair, number, late, order):
    """Destroy while a step may be outstanding, which comes back before, between or after."""
    if order == "before" and late is not None:
        late = outcome(pair, late)
    step = pair.note(pair.checker.destroy(number))
    if isinstance(step, Queue):
        assert isinstance(late, Forward)
        late = outcome(pair, late)
        step = pair.note(pair.checker.destroy(number))
    assert isinstance(step, Forward)
    if order == "between" and late is not None:
        late = outcome(pair, late)
    assert pair.drive(step)[0] == 0
    if late is not None:
        outcome(pair, late)


def outcome(pair, step):
    """Let an outstanding step of a dying guest come to its end: nothing more may reach OP-TEE."""
    if isinstance(step, Forward):
        answer = pair.world.call(step.regs)
        step = pair.returned(step.ticket, answer)
    elif isinstance(step, Preempt):
        step = pair.note(pair.checker.proceed(step.ticket))
    if pair.mediator.guests.get(1) is None or pair.mediator.guests[1].state is not GuestState.LIVE:
        assert isinstance(step, Reply) and step.regs[0] == NOT_HANDLED
        return None
    if isinstance(step, Reply):
        return None
    return step


@pytest.mark.parametrize("order", ["before", "between", "after"])
@pytest.mark.parametrize("golden", GOLDEN)
def test_a_guest_may_die_at_any_step_and_its_id_lives_again(golden, order):
    """B10, the kill sweep: afterwards all sums are zero, and a new VM with the same id runs clean."""
    counting = Pair()
    total = play(counting, counting.guest(ram=16 << 20), golden, 0)
    counting.check()
    counting.close()
    assert total > 3
    for stop in range(1, total + 1):
        pair = Pair()
        guest, other = pair.guest(ram=16 << 20), pair.guest("xen")
        held = other.tmem(2, cookie=1)
        other.register(held)
        late = play(pair, guest, golden, stop)
        if isinstance(late, Reply):
            late = None
        finish_by_hand(pair, guest.id, late, order)
        assert guest.id not in pair.mediator.guests
        assert guest.pins() == 0 and other.pins() == 2
        assert guest.smc(Function.CALLS_UID)[0] == NOT_HANDLED
        pair.machine.destroy(guest.vm)
        pair.world.script.clear()
        again = pair.guest(client_id=guest.id, ram=16 << 20)
        for thread in (0, 1, 2):
            assert again.resume(thread)[0] == ReturnCode.ERESUME
        assert play(pair, again, golden, 0) == total
        other.unregister(1)
        pair.check()
        pair.close()


@pytest.mark.parametrize("golden", GOLDEN)
def test_a_reset_at_any_step_starts_anew(golden):
    """R28."""
    counting = Pair()
    total = play(counting, counting.guest(ram=16 << 20), golden, 0)
    counting.close()
    for stop in range(1, total + 1):
        pair = Pair()
        guest = pair.guest(ram=16 << 20)
        late = play(pair, guest, golden, stop)
        step = pair.note(pair.checker.reset(guest.id))
        if isinstance(step, Queue):
            pair.returned(late.ticket, pair.answer(late))
            late = None
            step = pair.note(pair.checker.reset(guest.id))
        before = len(pair.world.inbox)
        assert pair.drive(step)[0] == 0
        assert [regs[0] for regs in pair.world.inbox[before:]] == [Function.VM_DESTROYED, Function.VM_CREATED]
        pair.records.append(guest.record)
        pair.settle(guest)
        if isinstance(late, Preempt):
            assert pair.drive(pair.checker.proceed(late.ticket))[0] == NOT_HANDLED
        pair.world.script.clear()
        guest._used = 1
        assert play(pair, guest, golden, 0) == total
        pair.check()
        pair.close()


def test_vm_created_comes_before_anything_else_and_calls_wait_for_it(pair):
    vm = pair.machine.create_kvm("new", 1 << 20)
    step = pair.checker.create(vm.client_id, vm)
    assert step.regs == (Function.VM_CREATED, vm.client_id, 0, 0, 0, 0, 0, 0)
    before = len(pair.world.inbox)
    early = pair.checker.submit(vm.client_id, 0, smc(Function.CALLS_UID))
    assert isinstance(early, Queue) or early.regs[0] == NOT_HANDLED
    assert waits_for(pair.checker.destroy(vm.client_id)) == "the guest is created"
    assert not pair.mediator.pause(vm.client_id)
    assert len(pair.world.inbox) == before
    assert pair.drive(step)[0] == 0
    assert (
        pair.drive(pair.checker.submit(vm.client_id, 0, smc(Function.CALLS_UID)))[0]
        == pair.world.fast[Function.CALLS_UID][0]
    )


@pytest.mark.parametrize("code", [code for code in ReturnCode if code])
def test_a_guest_that_op_tee_refuses_is_not_created_and_its_id_is_free(pair, code):
    vm = pair.machine.create_kvm("new", 1 << 20)
    pair.world.host_script.append((int(code), 0, 0, 0))
    assert pair.create(vm)[0] == ReturnCode.ENOTAVAIL
    assert pair.drive(pair.checker.submit(vm.client_id, 0, smc(Function.CALLS_UID)))[0] == NOT_HANDLED
    assert "guest_refused" in pair.names()
    assert pair.create(vm)[0] == 0


@pytest.mark.parametrize("client_id", [0, -1, 65536, 65537, 2**32 + 1])
def test_ids_that_op_tee_cannot_tell_apart_are_refused(pair, client_id):
    """R1, B6: 0 is the hypervisor's, 65536 would be 0, 65537 another VM's 1."""
    vm = pair.machine.create_kvm("new", 1 << 20)
    before = len(pair.world.inbox)
    assert pair.create(vm, client_id)[0] == ReturnCode.ENOTAVAIL
    assert pair.drive(pair.mediator.submit(client_id, 0, smc(Function.CALLS_UID)))[0] == NOT_HANDLED
    assert len(pair.world.inbox) == before


def test_the_highest_id_works_and_a_live_one_is_not_given_twice(pair):
    guest = pair.guest(client_id=65535)
    assert guest.invoke(guest.tmem(1)).ret == 0
    assert pair.world.inbox[-1][7] == 65535
    held = guest.record
    other = pair.machine.create_kvm("other", 1 << 20)
    assert pair.create(other, 65535)[0] == ReturnCode.ENOTAVAIL
    assert pair.mediator.guests[65535] is held
    assert guest.invoke(guest.tmem(1)).ret == 0


def test_an_id_is_not_given_again_before_vm_destroyed_was_answered(pair, guest):
    step = pair.checker.destroy(guest.id)
    assert pair.create(guest.vm)[0] == ReturnCode.ENOTAVAIL
    assert pair.drive(step)[0] == 0
    assert pair.create(guest.vm)[0] == 0


def test_unknown_ids_are_destroyed_without_a_word_and_reset_is_no_creation(pair):
    before = len(pair.world.inbox)
    for number in (0, 1, 77, 65536):
        assert pair.destroy(number)[0] == 0
        assert pair.drive(pair.checker.reset(number))[0] == 0
        assert pair.drive(pair.checker.abandon(number))[0] == ReturnCode.ENOTAVAIL
        assert pair.mediator.why_not_saved(number) is None
    assert len(pair.world.inbox) == before


@pytest.mark.parametrize("kinds", ["fast", "two fast", "yielding", "both"])
def test_a_destroy_waits_for_the_calls_that_are_with_op_tee(pair, guest, kinds):
    regs = []
    if kinds != "yielding":
        regs.append(smc(Function.GET_OS_UUID))
    if kinds == "two fast":
        regs.append(smc(Function.GET_THREAD_COUNT))
    elif kinds != "fast":
        regs.append(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2))))))
    steps = [guest.submit(words, vcpu) for vcpu, words in enumerate(regs)]
    for step in steps:
        before = len(pair.world.inbox)
        for _ in range(2):
            assert waits_for(pair.checker.destroy(guest.id)) == "the calls that are with OP-TEE have returned"
        assert len(pair.world.inbox) == before
        assert guest.smc(Function.CALLS_UID)[0] == NOT_HANDLED  # no new ones
        assert pair.returned(step.ticket, pair.answer(step)).regs[0] == NOT_HANDLED
    assert pair.destroy(guest)[0] == 0
    assert guest.pins() == 0


def test_a_call_that_suspends_while_its_guest_dies_is_op_tees_until_vm_destroyed(pair, guest):
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2))))))
    assert isinstance(pair.checker.destroy(guest.id), Queue)
    pair.world.script.append(ask_alloc())
    assert pair.returned(step.ticket, pair.answer(step)).regs[0] == NOT_HANDLED
    assert guest.pins() == 2
    assert pair.destroy(guest)[0] == 0
    assert guest.pins() == 0


def test_destroying_again_while_a_guest_is_destroyed_waits(pair):
    for again in (pair.checker.destroy, pair.checker.reset, pair.checker.destroy):
        guest = pair.guest(ram=2 << 20)
        for cookie in range(80):
            guest.register(Param(TMEM_OUT, guest.page_list([guest.page()]), 1, cookie + 1))
        step = pair.note(pair.checker.destroy(guest.id))
        assert waits_for(again(guest.id)) == "the calls that are with OP-TEE have returned"
        step = pair.returned(step.ticket, pair.answer(step))
        assert isinstance(step, Preempt)
        before = len(pair.world.inbox)
        assert waits_for(again(guest.id)) == "the calls that are with OP-TEE have returned"
        assert pair.drive(pair.checker.abandon(guest.id))[0] == ReturnCode.ENOTAVAIL
        assert pair.drive(step)[0] == 0
        assert len(pair.world.inbox) == before
        assert pair.destroy(guest)[0] == 0


@pytest.mark.parametrize("code", [code for code in ReturnCode if code])
@pytest.mark.parametrize("how", ["abandon", "destroy", "reset"])
def test_pins_of_a_guest_whose_end_op_tee_refuses_are_kept_until_the_host_says_otherwise(make, code, how):
    pair = make()
    pair.errors_expected = True
    guest, other = pair.guest(), pair.guest()
    guest.register(guest.tmem(40, cookie=1))
    pair.world.script.append(interrupt())
    guest.call(invoke(guest.tmem(2, cookie=2)))
    pair.world.host_script.append((int(code), 0, 0, 0))
    assert (
        pair.drive(pair.checker.destroy(guest.id) if how != "reset" else pair.checker.reset(guest.id))[0]
        == ReturnCode.EBUSY
    )
    assert guest.pins() == 42
    assert {"secure_world_fault": "error", "guest_quarantined": "error"}.items() <= {
        event.name: event.level for event in pair.events
    }.items()
    assert guest.smc(Function.CALLS_UID)[0] == NOT_HANDLED
    assert pair.create(guest.vm)[0] == ReturnCode.ENOTAVAIL
    assert other.invoke(other.tmem(1)).ret == 0
    request = {"abandon": pair.checker.abandon, "destroy": pair.checker.destroy, "reset": pair.checker.reset}[how]
    assert pair.drive(request(guest.id))[0] == 0
    assert guest.pins() == 0
    if how == "reset":
        pair.records.append(guest.record)
        assert guest.invoke(guest.tmem(1)).ret == 0
    else:
        assert guest.id not in pair.mediator.guests
        pair.world.forget(guest.id)
        assert pair.create(guest.vm)[0] == 0


def test_abandoning_in_pieces_can_be_asked_for_once_only(make):
    pair = make()
    pair.errors_expected = True
    guest = pair.guest()
    for cookie in range(80):
        guest.register(Param(TMEM_OUT, guest.page_list([guest.page()]), 1, cookie + 1))
    pair.world.host_script.append((7, 0, 0, 0))
    pair.destroy(guest)
    step = pair.note(pair.checker.abandon(guest.id))
    assert isinstance(step, Preempt)
    for again in (pair.checker.abandon, pair.checker.destroy):
        assert waits_for(again(guest.id)) == "the guest is released"
    assert pair.drive(step)[0] == 0
    assert guest.pins() == 0 and guest.id not in pair.mediator.guests


def test_abandon_is_for_quarantined_guests_only(pair, guest):
    guest.register(guest.tmem(2, cookie=1))
    assert pair.drive(pair.checker.abandon(guest.id))[0] == ReturnCode.ENOTAVAIL
    assert guest.pins() == 2


def test_a_reset_that_op_tee_answers_with_a_refusal_leaves_no_guest(pair, guest):
    pair.world.host_script += [(0, 0, 0, 0), (7, 0, 0, 0)]
    assert pair.drive(pair.checker.reset(guest.id))[0] == ReturnCode.ENOTAVAIL
    assert guest.id not in pair.mediator.guests


def test_a_paused_guests_calls_wait_and_change_nothing(pair, guest):
    """R28."""
    outstanding = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2))))))
    assert pair.checker.pause(guest.id)
    assert not pair.checker.pause(guest.id)
    before = len(pair.world.inbox), guest.record.counters.calls
    for regs in (
        smc(Function.CALLS_UID),
        smc(Function.VM_CREATED),
        smc(Function.RETURN_FROM_RPC),
        smc(Function.CALL_WITH_ARG),
    ):
        assert waits_for(guest.submit(regs)) == "the guest is resumed"
    assert (len(pair.world.inbox), guest.record.counters.calls) == before
    assert pair.drive(outstanding)[0] == 0
    pair.settle(guest)
    assert pair.checker.resume(guest.id)
    assert not pair.checker.resume(guest.id)
    assert guest.invoke(guest.tmem(1)).ret == 0
    assert pair.checker.pause(guest.id)
    assert pair.destroy(guest)[0] == 0


def test_pause_and_resume_of_others_than_live_guests_say_so(pair):
    for number in (0, 5, 65536):
        assert not pair.checker.pause(number) and not pair.checker.resume(number)


def test_a_guest_that_shares_memory_is_not_saved_and_the_answer_says_why(pair, guest):
    assert pair.mediator.why_not_saved(guest.id) is None
    guest.register(guest.tmem(5, cookie=1))
    pair.world.script.append(ask_alloc())
    guest.call(invoke())
    pair.world.script.append(interrupt())
    guest.give_page(0xC0)
    assert pair.mediator.why_not_saved(guest.id) == (
        f"VM {guest.id} shares memory with OP-TEE: 5 pages, 1 buffers, 1 rpc_arguments, 1 calls"
    )
    guest.resume()
    pair.drive(pair.checker.reset(guest.id))
    pair.records.append(guest.record)
    assert pair.mediator.why_not_saved(guest.id) is None


def test_a_new_driver_on_the_same_vm_finds_nothing_of_the_old_one(pair, guest):
    """kexec: stale registrations, arguments, suspended calls, notifications."""
    guest.smc(Function.ENABLE_ASYNC_NOTIF)
    guest.register(guest.tmem(2, cookie=1))
    pair.world.script += [ask_alloc(), ask(TIME, 0xC0)]
    guest.call(invoke())
    guest.give_page(0xC0)
    assert pair.drive(pair.checker.reset(guest.id))[0] == 0
    pair.records.append(guest.record)
    assert pair.mediator.notified() == []
    assert guest.resume()[0] == ReturnCode.ERESUME
    assert guest.register(guest.tmem(2, cookie=1)).ret == 0
    assert guest.smc(Function.CALL_WITH_REGD_ARG, 0, 2, 0)[0] == ReturnCode.EBADADDR


# The probe


@pytest.mark.parametrize(
    ("stage", "answer"),
    [
        (1, (0, 0, 0, 0)),
        (1, (0x384FB3E0, 0xE7F811E3, 0xAF630002, 0)),
        (1, (0xFFFFFFFF, 0, 0, 0)),
        (2, (0, 0, 0, 0)),
        (2, (0xFFFFFFFF, 8, 0, 0)),
        (2, (7, 8, 0, 0)),
        (3, (0xFFFFFFFF, 0, 0, 0)),
    ],
)
def test_without_an_op_tee_that_knows_virtualization_there_are_no_guests(stage, answer):
    pair = Pair()
    mediator = Mediator(policy_of(), CountedHost(pair.machine))
    step, asked = mediator.probe(), 0
    while isinstance(step, Forward):
        asked += 1
        assert step.regs[7] == 0 and step.regs[1:7] == (0,) * 6
        step = mediator.returned(step.ticket, answer if asked == stage else pair.world.call(step.regs))
    assert (asked, step.regs[0]) == (stage, ReturnCode.ENOTAVAIL)
    vm = pair.machine.create_kvm("x", 1 << 20)
    assert mediator.create(vm.client_id, vm).regs[0] == ReturnCode.ENOTAVAIL
    pair.close()


@pytest.mark.parametrize("answer", [(0, 0, 0, 0), (7, 0, 0, 0)])
def test_whatever_op_tee_says_to_an_unknown_vm_it_knows_virtualization(answer):
    pair = Pair()
    mediator = Mediator(policy_of(), CountedHost(pair.machine))
    step = mediator.probe()
    answers = [pair.world.fast[Function.CALLS_UID], (0, 4, 0, 0), answer]
    for words in answers:
        step = mediator.returned(step.ticket, words)
    assert (step.regs[0], mediator.threads) == (0, 4)
    pair.close()


# Notifications


def test_a_notification_goes_to_the_guests_that_asked_for_it_and_are_there(make):
    pair = make()
    first, second, third = pair.guest(), pair.guest(), pair.guest()
    assert pair.mediator.notified() == []
    first.smc(Function.ENABLE_ASYNC_NOTIF)
    third.smc(Function.ENABLE_ASYNC_NOTIF)
    pair.world.fast[Function.ENABLE_ASYNC_NOTIF] = (7, 0, 0, 0)
    assert second.smc(Function.ENABLE_ASYNC_NOTIF)[0] == ReturnCode.ENOTAVAIL
    assert pair.mediator.notified() == [first.id, third.id]
    pair.destroy(first)
    assert pair.mediator.notified() == [third.id]
    assert third.smc(Function.GET_ASYNC_NOTIF_VALUE)[:3] == (0, 5, 3)


@pytest.mark.parametrize("name", ["xen", "minimal"])
def test_no_guest_is_notified_under_a_policy_without_notifications(make, name):
    pair = make(name)
    guest = pair.guest()
    assert guest.smc(Function.ENABLE_ASYNC_NOTIF)[0] == NOT_HANDLED
    assert pair.mediator.notified() == []


# What others see


def conversation(pair, guest):
    """A guest's whole trace: what it sends, what it gets, what OP-TEE gets of it."""
    seen = []
    for golden in (with_alloc, with_rpc_argument):
        seen += [(regs, pair.drive(guest.submit(regs))) for regs in golden(guest)]
    inbox = [regs[:1] + regs[3:] for regs in pair.world.inbox if regs[7] == guest.id]
    return seen, inbox, bytes(guest.dump())


@pytest.mark.parametrize("noise", range(4))
def test_what_one_guest_sees_does_not_depend_on_what_another_does(noise):
    """B6, non-interference: A's trace does not change when B's requests are replaced."""
    traces = []
    for loud in (False, True):
        pair = Pair()
        guest, other = pair.guest(ram=4 << 20), pair.guest("xen", ram=16 << 20)
        if loud and noise == 0:
            suspended = other.page()
            pair.world.script += [ask_alloc(0), ask(TIME, 0xC0, 0)]
            other.call(invoke())
            other.give_page(0xC0, ipa=suspended)
        elif loud and noise == 1:
            for cookie in (1, 9, 0xB0, 0xC0):
                other.register(other.tmem(100, cookie=cookie))
        elif loud and noise == 2:
            for thread in range(8):
                pair.world.script.append(interrupt(thread))
                other.call(invoke())
            assert other.call(invoke())[0][0] == ReturnCode.ETHREAD_LIMIT
        elif loud:
            pair.errors_expected = True
            pair.world.script += [interrupt(0), interrupt(0)]
            other.call(invoke())
            other.call(invoke())
            assert other.record.state is GuestState.ISOLATED
        traces.append(conversation(pair, guest))
        pair.check()
        pair.close()
    assert traces[0] == traces[1]


def test_a_fault_of_the_secure_world_isolates_one_guest_and_its_destruction_is_clean(make):
    pair = make()
    pair.errors_expected = True
    guest, other = pair.guest(ram=16 << 20), pair.guest()
    message = invoke(*[guest.tmem(16384, cookie=n + 10) for n in range(3)])
    waiting = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))), 1)
    assert isinstance(waiting, Preempt)
    fast = guest.submit(smc(Function.CALLS_UID), 2)
    pair.world.script += [raw(int(RpcReturn.FOREIGN_INTR), 0, 0, 0xFFFFFFFF)]
    assert guest.call(invoke(guest.tmem(2)))[0][0] == NOT_HANDLED
    assert guest.record.state is GuestState.ISOLATED
    before = len(pair.world.inbox)
    step = pair.note(pair.checker.proceed(waiting.ticket))
    assert isinstance(step, Reply) and step.regs[0] == NOT_HANDLED
    assert len(pair.world.inbox) == before
    assert isinstance(pair.checker.destroy(guest.id), Queue)
    assert pair.returned(fast.ticket, (1, 2, 3, 4)).regs[0] == NOT_HANDLED
    assert pair.destroy(guest)[0] == 0
    assert guest.pins() == 0
    assert other.invoke(other.tmem(1)).ret == 0


def test_a_guest_for_which_the_host_has_no_memory_is_not_created():
    """R22: the ledger comes from outside, and may be backed by a pool of the host."""

    def no_room(limits):
        raise OverLimit("memory")

    pair = Pair()
    mediator = Mediator(policy_of(), CountedHost(pair.machine), no_room)
    step = mediator.probe()
    while isinstance(step, Forward):
        step = mediator.returned(step.ticket, pair.world.call(step.regs))
    vm = pair.machine.create_kvm("x", 1 << 20)
    before = len(pair.world.inbox)
    step = mediator.create(vm.client_id, vm)
    assert isinstance(step, Reply) and step.regs[0] == ReturnCode.ENOMEM
    assert not mediator.guests and len(pair.world.inbox) == before
    (event,) = step.events
    assert (event.name, event.vm, event.detail["why"]) == (GUEST_REFUSED, vm.client_id, "no memory for another guest")
    assert (event.detail["resource"], event.detail["answer"]) == ("memory", ReturnCode.ENOMEM)
    pair.close()


@pytest.mark.parametrize("when", ["a fast call", "a yielding call", "an RPC's answer"])
def test_a_secure_world_that_does_not_answer_isolates_who_asked_it(make, when):
    """The pages that OP-TEE has by address stay pinned until the host says that nobody touches them any more."""
    pair = make()
    pair.errors_expected = True
    guest = pair.guest()
    guest.register(guest.tmem(40, cookie=1))
    if when == "a fast call":
        step = guest.submit(smc(Function.GET_ASYNC_NOTIF_VALUE))
    elif when == "a yielding call":
        step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2, cookie=2))))))
    else:
        pair.world.script.append(interrupt())
        answer, _ = guest.call(invoke(guest.tmem(2, cookie=2)))
        step = guest.submit(smc(Function.RETURN_FROM_RPC, 0, 0, answer[3]))
    held = guest.pins()
    assert isinstance(step, Forward) and held >= 40
    reply = pair.note(pair.checker.lost(step.ticket, "it is gone"))
    assert isinstance(reply, Reply) and reply.regs[0] == NOT_HANDLED
    assert guest.record.state is GuestState.ISOLATED
    assert guest.smc(Function.CALLS_UID)[0] == NOT_HANDLED
    step = pair.note(pair.checker.destroy(guest.id))
    assert isinstance(step, Forward)
    reply = pair.note(pair.checker.lost(step.ticket, "it is gone"))
    assert isinstance(reply, Reply) and reply.regs[0] == ReturnCode.EBUSY
    assert guest.pins() == held
    assert [event.detail["why"] for event in pair.events if event.name == "secure_world_fault"] == [
        "it is gone",
        "it is gone: pins are kept",
    ]
    assert pair.drive(pair.checker.abandon(guest.id))[0] == 0
    assert guest.pins() == 0 and guest.id not in pair.mediator.guests


def test_a_secure_world_that_does_not_answer_a_birth_has_no_such_guest(make):
    pair = make()
    pair.errors_expected = True
    vm = pair.machine.create_kvm("unborn", 1 << 20)
    step = pair.note(pair.checker.create(vm.client_id, vm))
    assert isinstance(step, Forward)
    reply = pair.note(pair.checker.lost(step.ticket, "it is gone"))
    assert isinstance(reply, Reply) and reply.regs[0] == ReturnCode.ENOTAVAIL
    assert vm.client_id not in pair.mediator.guests


def test_a_guest_that_dies_while_its_call_is_lost_is_answered_all_the_same(make):
    pair = make()
    pair.errors_expected = True
    guest = pair.guest()
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(invoke(guest.tmem(2, cookie=2))))))
    assert isinstance(pair.checker.destroy(guest.id), Queue)
    reply = pair.note(pair.checker.lost(step.ticket, "it is gone"))
    assert isinstance(reply, Reply) and reply.regs[0] == NOT_HANDLED
    assert pair.destroy(guest)[0] == 0  # OP-TEE is back, and lets go of it
    assert guest.pins() == 0


def test_the_host_is_answered_in_a0_alone(make):
    pair = make()
    vm = pair.machine.create_kvm("new", 1 << 20)
    nothing = (0,) * 7
    assert pair.drive(pair.checker.probe()) == (0, *nothing)
    pair.world.host_script.append((int(ReturnCode.EBUSY), 1, 2, 3))
    step = pair.checker.create(vm.client_id, vm)
    record = pair.mediator.guests[vm.client_id]
    assert pair.drive(step) == (ReturnCode.ENOTAVAIL, *nothing)
    assert record.state is GuestState.GONE
    assert pair.create(vm) == (0, *nothing)
    assert pair.destroy(vm.client_id) == (0, *nothing)


def test_a_guest_has_the_rpmb_device_only_if_the_host_says_so(make):
    pair = make()
    pair.errors_expected = True
    vm = pair.machine.create_kvm("new", 1 << 20)
    step = pair.mediator.create(vm.client_id, vm)
    assert not pair.mediator.guests[vm.client_id].rpmb
    pair.mediator.lost(step.ticket, "it is not wanted")


OWN_WORDS = tuple(0x1111 * n for n in range(1, 8))
"""x1..x7 of a guest, of which an answer -1 changes none."""


@pytest.mark.parametrize("kind", ["fast", "yielding", "RPC", "fault", "lost", "lost fast", "long", "long, given back"])
def test_what_is_not_handled_any_more_leaves_the_guests_registers_alone(make, kind):
    """R2: a guest that dies or is isolated in the middle of a call sees -1 there and nothing else."""
    pair = make()
    pair.errors_expected = True
    guest = pair.guest(ram=16 << 20)
    message = invoke(*[guest.tmem(16384, cookie=n) for n in (1, 2)]) if kind.startswith("long") else invoke()
    words = OWN_WORDS if kind.endswith("fast") else (*to_pair(guest.write(message)), *OWN_WORDS[2:])
    function = Function.CALLS_UID if kind.endswith("fast") else Function.CALL_WITH_ARG
    step = guest.submit((int(function), *words), 1)
    answers = {"RPC": interrupt(), "fault": raw(int(RpcReturn.FOREIGN_INTR), 0, 0, 0xFFFFFFFF)}
    pair.world.script.extend([answers[kind]] if kind in answers else [])
    if kind.startswith("long"):
        assert isinstance(step, Preempt)
        ending = pair.checker.destroy(guest.id)
        given_back = kind == "long, given back"
        reply = pair.checker.give_back(step.ticket) if given_back else pair.checker.proceed(step.ticket)
        pair.drive(ending)
    elif kind == "fault":
        reply = pair.returned(step.ticket, pair.answer(step))
        assert guest.record.state is GuestState.ISOLATED
    else:
        assert isinstance(pair.checker.destroy(guest.id), Queue)
        if kind.startswith("lost"):
            reply = pair.note(pair.checker.lost(step.ticket, "it is gone"))
        else:
            reply = pair.returned(step.ticket, pair.answer(step))
        assert pair.destroy(guest)[0] == 0
    assert isinstance(reply, Reply) and reply.regs == (NOT_HANDLED, *words)
    after = guest.submit((int(Function.CALLS_UID), *OWN_WORDS))
    assert isinstance(after, Reply) and after.regs == (NOT_HANDLED, *OWN_WORDS)


def test_a_lost_call_leaves_the_registers_of_its_guest_alone(make):
    pair = make()
    pair.errors_expected = True
    guest = pair.guest()
    step = guest.submit((int(Function.CALLS_UID), *OWN_WORDS))
    assert pair.note(pair.checker.lost(step.ticket, "it is gone")).regs == (NOT_HANDLED, *OWN_WORDS)


def test_a_host_without_an_answer_to_its_probe_has_no_op_tee():
    pair = Pair()
    mediator = Mediator(policy_of(), CountedHost(pair.machine))
    step = mediator.lost(mediator.probe().ticket, "it is gone")
    assert isinstance(step, Reply) and step.regs[0] == ReturnCode.ENOTAVAIL and not mediator.threads
    pair.close()
