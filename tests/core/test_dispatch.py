"""Identity and dispatch: rules R1 to R4 (B6, B11, B12)."""

from dataclasses import replace

import pytest

from hv_models.machine import Machine
from mediator.core.fast import FORWARDED
from mediator.core.mediator import Mediator
from mediator.core.policy import Word
from mediator.core.steps import Forward, Reply, Ticket
from mediator.documents import DocumentError, load_document
from mediator.host import Host
from mediator.policies import BUILT_IN, PolicyDocument, policy_text
from optee.abi.smc import Function, ReturnCode, SecCapability
from tests.core.pair import NOT_HANDLED, Pair, invoke, policy_of, smc, to_pair

OWNER_RANGE = [base | number for base in (0x3200_0000, 0xB200_0000) for number in range(0x10000)]
LOCAL = {Function.CALLS_COUNT, Function.GET_SHM_CONFIG}
FAST = [function for function in Function if function >> 31 and function not in LOCAL]
HOSTILE = tuple(0xDEAD_0000_BEEF_0000 + n for n in range(1, 8))


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_listed_ids_of_the_whole_owner_range_reach_op_tee(name):
    pair = Pair(name)
    guest = pair.guest()
    mediator = pair.mediator
    forwarded, answered = set(), set()
    for function in (*OWNER_RANGE, *range(0xBF00_FF00, 0xBF01_0000)):
        step = mediator.submit(guest.id, 0, (function, *HOSTILE))
        if isinstance(step, Forward):
            forwarded.add(function)
            assert step.regs == (function, step.regs[1], 0, 0, 0, 0, 0, guest.id)
            assert step.regs[1] == 0 or function == Function.EXCHANGE_CAPABILITIES
            mediator.returned(step.ticket, (0, 0, 0, 0))
        else:
            assert isinstance(step, Reply)
            if step.regs[0] == NOT_HANDLED:
                assert step.regs[1:] == HOSTILE
            else:
                answered.add(function)
    functions = {int(function) for function in pair.policy.functions}
    yielding = {function for function in functions if not function >> 31}
    assert forwarded == functions - LOCAL - yielding
    # HOSTILE is no message and no thread, so yielding calls are answered here
    assert answered == yielding | (functions & LOCAL)
    assert guest.record.counters.denied == len(OWNER_RANGE) + 256 - len(functions)
    pair.close()


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("function", Function)
def test_other_spellings_of_an_id_are_other_functions(make, name, function):
    guest = make(name).guest()
    before = len(guest.pair.world.inbox)
    for other in (function ^ 1 << 30, function ^ 1 << 31, function ^ 1 << 16, function ^ 1 << 24):
        if other not in guest.pair.policy.functions:
            assert guest.smc(other) == (NOT_HANDLED, *[0] * 7)
    assert len(guest.pair.world.inbox) == before


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_the_low_half_of_x0_selects_and_nothing_of_it_is_forwarded(make, name):
    guest = make(name).guest()
    for function in guest.pair.policy.functions - LOCAL:
        if function >> 31:
            before = len(guest.pair.world.inbox)
            guest.smc(0xABCD_EF01_0000_0000 | function, *HOSTILE)
            regs = guest.pair.world.inbox[-1]
            assert len(guest.pair.world.inbox) == before + 1
            assert regs[0] == function
            assert regs[2:] == (0, 0, 0, 0, 0, guest.id)


def test_lifecycle_functions_are_denied_to_guests_and_counted(make):
    for name in BUILT_IN:
        guest = make(name).guest()
        before = len(guest.pair.world.inbox)
        for count, function in enumerate((Function.VM_CREATED, Function.VM_DESTROYED, Function.BOOT_SECONDARY), 1):
            regs = (int(function), guest.id, 0, 0, 0, 0, 0, 0)
            assert guest.pair.drive(guest.submit(regs)) == (NOT_HANDLED, *regs[1:])
            assert guest.record.counters.denied == count
        assert len(guest.pair.world.inbox) == before
        assert guest.pair.names().count("call_denied") == 3


@pytest.mark.parametrize("spoofed", [0, 1, 2, 65535, 65536, 65537, 2**32, 2**64 - 1])
def test_a7_is_the_callers_id_whatever_a_guest_puts_there(make, spoofed):
    pair = make()
    first, second = pair.guest("kvm"), pair.guest("xen")
    before = len(pair.world.inbox)
    for guest in (first, second):
        ipa = guest.write(invoke())
        guest.pair.drive(guest.submit((int(Function.GET_OS_UUID), 0, 0, 0, 0, 0, 0, spoofed)))
        guest.pair.drive(guest.submit((int(Function.CALL_WITH_ARG), *to_pair(ipa), 0, 0, 0, 0, spoofed)))
        guest.pair.drive(guest.submit((int(Function.CALL_WITH_RPC_ARG), *to_pair(ipa), 0, 0, 0, 0, spoofed)))
    assert [regs[7] for regs in pair.world.inbox[before:]] == [first.id] * 3 + [second.id] * 3


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_answer_defines_its_registers_by_the_policys_table(make, name, function):
    """B12: a4..a7 are the guest's own, a1..a3 what the table says; never the guest's function id."""
    guest = make(name).guest()
    world = guest.pair.world
    given = (int(function), *HOSTILE)
    if function not in guest.pair.policy.functions:
        assert guest.pair.drive(guest.submit(given)) == (NOT_HANDLED, *HOSTILE)
        return
    words = {"pass": lambda n: world.fast[function][n], "keep": lambda n: HOSTILE[n - 1], "zero": lambda n: 0}
    for failing in (False, True):
        status = function in (
            Function.EXCHANGE_CAPABILITIES,
            Function.DISABLE_SHM_CACHE,
            Function.ENABLE_SHM_CACHE,
            Function.GET_THREAD_COUNT,
            Function.ENABLE_ASYNC_NOTIF,
            Function.GET_ASYNC_NOTIF_VALUE,
        )
        if failing and not status:
            continue
        world.fast[function] = (int(ReturnCode.EBUSY) if failing else world.fast[function][0], 4, 0x42, 4)
        if not failing and status:
            world.fast[function] = (0, 4, 0x42, 4)
        regs = guest.pair.drive(guest.submit(given))
        key = "failed" if failing else function.name
        table = [word.value for word in guest.pair.policy.answers[key]]
        expected = [words[word](n) for n, word in enumerate(table, 1)]
        if function is Function.EXCHANGE_CAPABILITIES and not failing:
            # the offer itself is tested below: hidden a2, a3 are zeroed before the table is looked at
            expected = [words[word](n) if word != "pass" or n == 1 else 0 for n, word in enumerate(table, 1)]
        assert regs == (world.fast[function][0], *expected, *HOSTILE[3:])


def test_calls_count_is_the_number_of_allowed_functions_and_shm_config_is_never_available(make):
    for name in BUILT_IN:
        guest = make(name).guest()
        policy = guest.pair.policy
        before = len(guest.pair.world.inbox)
        if Function.CALLS_COUNT in policy.functions:
            assert guest.smc(Function.CALLS_COUNT)[0] == len(policy.functions)
        assert guest.smc(Function.GET_SHM_CONFIG)[0] == ReturnCode.ENOTAVAIL
        assert len(guest.pair.world.inbox) == before


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("bit", range(64))
def test_each_capability_bit_is_offered_only_if_the_policy_mediates_it(make, name, bit):
    guest = make(name).guest()
    world, policy = guest.pair.world, guest.pair.policy
    needed = int(SecCapability.DYNAMIC_SHM)
    for extra in (0, needed):
        world.fast[Function.EXCHANGE_CAPABILITIES] = (0, 1 << bit | extra, 0x42, 4)
        regs = guest.smc(Function.EXCHANGE_CAPABILITIES)
        offered = (1 << bit | extra) & policy.sec_capabilities
        if not offered & needed:
            assert regs[0] == ReturnCode.ENOTAVAIL
            continue
        assert regs[:2] == (0, offered)
        if not offered & SecCapability.RPC_ARG:
            assert regs[3] == 0
        if not offered & SecCapability.ASYNC_NOTIF:
            assert regs[2] == 0
        assert not offered & (SecCapability.HAVE_RESERVED_SHM | SecCapability.VIRTUALIZATION | SecCapability.PROTMEM)


def test_what_is_offered_works_and_what_works_is_offered():
    """B11: each capability that comes with functions, against the allow-list of each policy."""
    needs = {
        SecCapability.RPC_ARG: {Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG},
        SecCapability.ASYNC_NOTIF: {Function.ENABLE_ASYNC_NOTIF, Function.GET_ASYNC_NOTIF_VALUE},
        SecCapability.PROTMEM: {Function.GET_PROTMEM_CONFIG},
    }
    for name in BUILT_IN:
        policy = policy_of(name)
        for capability, functions in needs.items():
            offered = bool(policy.sec_capabilities & capability)
            assert {function in policy.functions for function in functions} == {offered}, (name, capability)


@pytest.mark.parametrize(
    "capability", ["HAVE_RESERVED_SHM", "VIRTUALIZATION", "PROTMEM", "DYNAMIC_PROTMEM", "RPMB_PROBE"]
)
def test_a_policy_cannot_offer_what_nobody_mediates(capability):
    text = policy_text("default").replace("sec: [DYNAMIC_SHM,", f"sec: [{capability}, DYNAMIC_SHM,")
    assert capability in text
    with pytest.raises(DocumentError):
        load_document(PolicyDocument, text, "policy.yaml")


@pytest.mark.parametrize("word", [0, 1, 2, 0xFFFF_FFFF, 2**64 - 1, 0xDEAD_BEEF_0000_0001])
def test_of_the_guests_capability_word_only_masked_low_bits_are_forwarded(make, word):
    for name, mask in (("default", 0xFFFF_FFFF), ("xen", 1), ("minimal", 1)):
        guest = make(name).guest()
        guest.smc(Function.EXCHANGE_CAPABILITIES, word)
        assert guest.pair.world.inbox[-1][1] == word & mask


def test_capabilities_can_be_exchanged_again_and_are_not_remembered_against_a_guest(make):
    guest = make().guest()
    assert guest.smc(Function.EXCHANGE_CAPABILITIES) == guest.smc(Function.EXCHANGE_CAPABILITIES)
    assert guest.invoke(guest.tmem(1)).ret == 0


def test_a_policy_with_a_function_that_nobody_handles_is_refused():
    machine = Machine()
    policy = policy_of()
    functions = policy.functions | {Function.VM_CREATED, Function.L2CC_MUTEX}
    with pytest.raises(ValueError) as caught:
        Mediator(replace(policy, functions=functions), Host(machine))
    assert str(caught.value) == "policy default: the mediator does not handle L2CC_MUTEX, VM_CREATED"
    machine.close()


def test_a_vm_that_nobody_announced_gets_not_handled(pair):
    vm = pair.machine.create_kvm("stranger", 1 << 20)
    regs = smc(Function.CALLS_UID, 1, 2)
    assert pair.drive(pair.mediator.submit(vm.client_id, 0, regs)) == (NOT_HANDLED, *regs[1:])


def test_the_thread_count_is_the_number_of_calls_that_a_guest_may_have(make):
    policy = policy_of()
    passing = {**policy.answers, "GET_THREAD_COUNT": (Word.PASS,) * 3}
    pair = make(replace(policy, answers=passing), threads=8)
    guest = pair.guest()
    assert guest.smc(Function.GET_THREAD_COUNT)[:4] == (0, 8, 0, 0)
    pair.world.fast[Function.GET_THREAD_COUNT] = (0, 0xAB << 32 | 5, 6, 7)
    assert guest.smc(Function.GET_THREAD_COUNT)[:4] == (0, 5, 6, 7)
    guest.limits.calls = 3
    assert guest.smc(Function.GET_THREAD_COUNT)[:4] == (0, 3, 6, 7)
    counters = guest.record.counters
    assert (counters.calls, counters.forwarded, counters.rpcs) == (3, 3, 0)


def test_steps_print_themselves():
    """What a failing test of somebody's shell shows."""
    assert repr(Reply((0, 255))) == "Reply(0x0, 0xff)"
    assert repr(Forward((0x32000004, 1), Ticket())) == "Forward(0x32000004, 0x1)"


def test_a_guest_has_the_limits_under_its_name():
    policy = policy_of()
    own = replace(policy.limits, pages=7)
    named = replace(policy, guests={"kvm-1": own})
    assert named.limits_of("kvm-1") is own and named.limits_of("kvm-2") is policy.limits


@pytest.mark.parametrize("name", BUILT_IN)
def test_without_dynamic_shared_memory_a_guest_keeps_its_registers(make, name):
    """As if there were no OP-TEE: a0 says so, and the rest is what it was."""
    guest = make(name).guest()
    guest.pair.world.fast[Function.EXCHANGE_CAPABILITIES] = (0, 1, 0x42, 4)
    regs = guest.pair.drive(guest.submit((int(Function.EXCHANGE_CAPABILITIES), *HOSTILE)))
    assert regs == (ReturnCode.ENOTAVAIL, *HOSTILE)
    guest.pair.world.fast[Function.EXCHANGE_CAPABILITIES] = (0, 4, 0x42, 4)
    local = guest.smc(Function.GET_SHM_CONFIG)
    assert local[0] == ReturnCode.ENOTAVAIL


def test_op_tee_says_how_long_rpc_arguments_are(make):
    """EXCHANGE_CAPABILITIES a3: in its low byte the number of parameters that every RPC argument has room for."""
    pair = make()
    guest = pair.guest()
    assert pair.mediator.rpc_argument_size == 32 + 4 * 32
    pair.world.fast[Function.EXCHANGE_CAPABILITIES] = (0, 0xFD, 0x42, 0xAB06)
    guest.smc(Function.EXCHANGE_CAPABILITIES)
    assert pair.mediator.rpc_argument_size == 32 + 6 * 32


@pytest.mark.parametrize("last", Word)
def test_each_register_of_an_answer_is_passed_kept_or_zeroed_alone(make, last):
    policy = policy_of()
    tables = [(first, second, last) for first in Word for second in Word]
    for table in tables:
        guest = make(replace(policy, answers={**policy.answers, "CALLS_UID": table})).guest()
        answer = guest.smc(Function.CALLS_UID, *HOSTILE)
        seen = {Word.PASS: guest.pair.world.fast[Function.CALLS_UID], Word.KEEP: (0, *HOSTILE), Word.ZERO: (0,) * 4}
        assert answer[1:] == (*(seen[word][at] for at, word in enumerate(table, 1)), *HOSTILE[3:])


@pytest.mark.parametrize("name", BUILT_IN)
def test_of_a_fast_call_only_its_function_is_forwarded(make, name):
    guest = make(name).guest()
    for function in sorted(FORWARDED & guest.pair.policy.functions - {Function.EXCHANGE_CAPABILITIES}):
        guest.smc(function, *HOSTILE)
        assert guest.pair.world.inbox[-1] == (function, 0, 0, 0, 0, 0, 0, guest.id)


def test_what_op_tee_says_beside_its_capabilities_keeps_its_place(make):
    """a2: the highest notification value; a3: how many parameters an RPC argument has room for."""
    policy = policy_of()
    answers = {**policy.answers, "EXCHANGE_CAPABILITIES": (Word.PASS,) * 3}
    offer = SecCapability.DYNAMIC_SHM | SecCapability.RPC_ARG | SecCapability.ASYNC_NOTIF
    pair = make(replace(policy, answers=answers, sec_capabilities=offer))
    pair.world.fast[Function.EXCHANGE_CAPABILITIES] = (0, int(offer), 0x42, 4)
    assert pair.guest().smc(Function.EXCHANGE_CAPABILITIES)[:4] == (0, int(offer), 0x42, 4)


def test_an_answer_of_the_mediators_own_has_nothing_to_pass(make):
    policy = policy_of()
    for table in (
        (Word.PASS, Word.KEEP, Word.ZERO),
        (Word.ZERO, Word.PASS, Word.KEEP),
        (Word.KEEP, Word.ZERO, Word.PASS),
    ):
        guest = make(replace(policy, answers={**policy.answers, "local": table})).guest()
        kept = (own if word is Word.KEEP else 0 for word, own in zip(table, HOSTILE[:3], strict=True))
        assert guest.smc(Function.GET_SHM_CONFIG, *HOSTILE) == (ReturnCode.ENOTAVAIL, *kept, *HOSTILE[3:])
