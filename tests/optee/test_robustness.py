"""Whatever the normal world sends, OP-TEE answers; it dies only where the real one does."""

import struct
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.memory import PAGE_SIZE
from optee.abi.message import Command, Message, Param
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, is_rpc, to_pair
from optee.config import Config
from optee.errors import SecureWorldFault
from optee.tas.catalogue import BUILT_IN
from optee.threads import ThreadState
from optee.trusted_application import TrustedApplication
from tests.optee.rig import DEVICE, META, RAM, REGISTER, SECURE, Rig, open_message, uuid_words

DEADLY = (Function.DISABLE_SHM_CACHE, Function.ENABLE_SHM_CACHE, Function.ENABLE_ASYNC_NOTIF)
PAGES = 8
LIST = RAM + 64 * PAGE_SIZE
"""A page list with a good, a repeated and a bad entry."""

bases = [RAM + page * PAGE_SIZE for page in range(PAGES)] + [LIST, SECURE, DEVICE, 0, 1 << 63]
addresses = st.sampled_from([base + offset for base in bases for offset in (0, 8, 0xFFC, 1)])
sizes = st.sampled_from([0, 1, 8, 100, 4095, 4096, 8192, 1 << 32, (1 << 64) - 1])
words = st.one_of(st.integers(0, 12), addresses, sizes, st.integers(0, (1 << 64) - 1))
attributes = st.one_of(
    st.sampled_from([0, 1, 2, 3, 5, 6, 7, 9, 10, 11, META, REGISTER, 0x209, 0x20B]), st.integers(0, 0xFFFF)
)
params = st.builds(Param, attributes, words, words, words)
uuids = st.sampled_from([ta.uuid for ta in BUILT_IN] + [UUID(int=5)])
openings = st.builds(
    lambda uuid, login, rest: Message(
        Command.OPEN_SESSION, params=[Param(META, *uuid_words(uuid), 0), Param(META, 0, 0, login), *rest]
    ),
    uuids,
    st.sampled_from([0, 0, 0, 1, 9, 0x80000000]),
    st.lists(params, max_size=4),
)
messages = st.one_of(
    openings,
    st.builds(Message, st.sampled_from([1, 1, 2, 3]), st.integers(0, 13), st.integers(1, 2)),
    st.builds(
        Message,
        st.integers(0, 9),
        st.integers(0, 13),
        st.integers(0, 4),
        params=st.lists(params, max_size=6),
    ),
)
functions = st.one_of(
    st.sampled_from([*Function]),
    st.sampled_from([Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG, Function.CALL_WITH_REGD_ARG]),
    st.sampled_from([Function.RETURN_FROM_RPC]),
    st.integers(0, (1 << 64) - 1),
)
registers = st.one_of(words, st.integers(0, 3))
calls = st.tuples(functions, st.sampled_from([0, 0, 1]), registers, st.integers(0, 3), registers, registers, st.just(0))
steps = st.one_of(
    st.tuples(st.just("call"), calls, st.sampled_from([0, 1, 1, 1, 2, 3, 0x10001, 0x10000])),
    st.tuples(st.just("message"), messages, st.sampled_from([1, 1, 2])),
    st.tuples(st.just("reply"), st.lists(params, max_size=4), st.integers(0, 3)),
    st.tuples(st.just("serve"), st.integers(0, 1), st.just(1)),
)


def put_list(rig: Rig) -> None:
    rig.memory.write(LIST, struct.pack("<4Q", RAM, RAM, RAM + 5 * PAGE_SIZE, SECURE))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BUILT_IN), st.lists(steps, max_size=30))
def test_any_calls(opening: type[TrustedApplication], script: list[tuple[str, object, int]]) -> None:
    rig = Rig(Config(threads=2, guests=4, early_tas=frozenset()), vms=2)
    put_list(rig)
    flights: dict[int, int] = {}
    """PA of the latest message of VM 1 by the thread that had it."""
    for kind, what, number in [("message", open_message(opening.uuid), 1), *script]:
        thread = number & 1
        if kind == "call":
            assert isinstance(what, tuple)
            function = what[0] & 0xFFFFFFFF
            try:
                answer = rig.world.call((*what, number))
            except SecureWorldFault:
                assert function in DEADLY
                assert number == 0
                return
            assert not (function in DEADLY and number == 0)
        elif kind == "message":
            assert isinstance(what, Message)
            pa = rig.page()
            rig.memory.write(pa, what.pack())
            answer = rig.call(Function.CALL_WITH_RPC_ARG, *to_pair(pa), vm=number)
            if number == 1 and is_rpc(answer[0]):
                flights[answer[3]] = pa
        elif thread in flights:
            pa = flights[thread]
            argument = pa + 32 + 32 * len(rig.read(pa).params)
            if kind == "reply":
                assert isinstance(what, list)
                rig.memory.write(argument, Message(0, ret=number, params=what).pack())
            elif rig.read(argument).ret == Result.GENERIC:
                rig.supplicant.serve(rig.rpc((RpcReturn.CMD, 0, 0, thread), pa))
            answer = rig.resume(thread)
        else:
            answer = rig.resume(thread)
        assert len(answer) == 4
        assert is_rpc(answer[0]) or answer[0] in [*ReturnCode, 0xE, 0x384FB3E0, 0x486178E0, 2, 4]
        for partition in rig.world._partitions:
            assert all(thread.state is not ThreadState.ACTIVE for thread in partition.threads)
            assert all(page % PAGE_SIZE == 0 and page >= RAM for shm in partition.shared_memory for page in shm.pages)


@settings(max_examples=60, deadline=None)
@given(uuids, st.lists(st.tuples(st.integers(0, 13), st.lists(params, max_size=4)), max_size=8), st.data())
def test_any_invokes_with_any_replies(uuid: UUID, invokes: list[tuple[int, list[Param]]], data: st.DataObject) -> None:
    """Every TA takes any command with any parameters, whatever the normal world answers to its RPCs."""
    rig = Rig(Config(threads=2, guests=2))
    put_list(rig)
    rig.register(LIST, 3 * PAGE_SIZE, 7)
    opened = rig.run(open_message(uuid))
    for number, given_params in invokes:
        message = Message(Command.INVOKE_COMMAND, number, opened.session, params=given_params)
        answer, pa = rig.issue(message)
        for _ in range(20):
            if not is_rpc(answer[0]):
                break
            rpc = rig.rpc(answer, pa)
            if rpc.command == RpcCommand.NOTIFICATION or data.draw(st.booleans()):
                rpc.params = data.draw(st.lists(params, min_size=len(rpc.params), max_size=len(rpc.params)))
            rig.answer(rpc, data.draw(st.sampled_from([0, 0, 0xFFFF0000, 0xFFFF0008])))
            answer = rig.resume(answer[3])
        assert is_rpc(answer[0]) or answer == (0, 0, 0, 0)


def test_memory_that_vanishes_under_optee_kills_it() -> None:
    rig = Rig()
    session = rig.open()
    bank = rig.memory.banks[0]
    answer, _ = rig.issue(open_message(UUID(int=5)))
    assert is_rpc(answer[0])
    assert session
    rig.memory.remove(bank)
    with pytest.raises(SecureWorldFault, match="external abort"):
        rig.resume(answer[3])
