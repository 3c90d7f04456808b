"""What a real OP-TEE 4.10 (2 threads, 2 guests) answered, line by line."""

from uuid import UUID

import pytest

from hv_models.memory import PAGE_SIZE, Bank, Frames, PageStore
from optee.abi.message import NONCONTIG, Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import API_UID, OS_UUID, Function, ReturnCode, RpcReturn, from_pair, to_pair
from optee.config import Config
from optee.errors import SecureWorldFault
from optee.tas.exercise import ExerciseTa
from optee.tas.hello_world import HelloWorld
from tests.optee.rig import (
    DEVICE,
    NONE,
    RAM,
    RAM_PAGES,
    REGISTER,
    SECURE,
    Rig,
    Rpc,
    invoke_message,
    open_message,
    register_message,
    unregister_message,
    value,
)

UNKNOWN = UUID("00000000-0000-4000-8000-000000000001")
"""A TA that nobody has, so that opening it asks the normal world."""
UNKNOWN_FAST = 0xB2000042
UNKNOWN_YIELDING = 0x32000005
LOST = (ReturnCode.ERESUME, 0, 0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def empty() -> Rig:
    return Rig(vms=0)


class TestNoVmCreated:
    @pytest.mark.parametrize(
        ("function", "answer"),
        [
            (Function.CALLS_UID, API_UID),
            (Function.CALLS_COUNT, (0xE, 0, 0, 0)),
            (Function.CALLS_REVISION, (2, 0, 0, 0)),
            (Function.GET_OS_UUID, OS_UUID),
            (Function.GET_OS_REVISION, (4, 0xA, 0, 0)),
            (Function.EXCHANGE_CAPABILITIES, (0, 0xFD, 0x42, 4)),
            (Function.GET_SHM_CONFIG, (0, 0, 0, 1)),
            (Function.GET_THREAD_COUNT, (0, 2, 0, 0)),
            (Function.GET_ASYNC_NOTIF_VALUE, (0, 0, 0, 0)),
            (Function.BOOT_SECONDARY, (7, 0, 0, 0)),
            (Function.L2CC_MUTEX, (0xFFFFFFFF, 0, 0, 0)),
            (Function.GET_PROTMEM_CONFIG, (0xFFFFFFFF, 0, 0, 0)),
            (UNKNOWN_FAST, (0xFFFFFFFF, 0, 0, 0)),
        ],
    )
    def test_client_0(self, empty: Rig, function: int, answer: tuple[int, ...]) -> None:
        assert empty.call(function, vm=0) == answer

    @pytest.mark.parametrize(
        "function", [Function.DISABLE_SHM_CACHE, Function.ENABLE_SHM_CACHE, Function.ENABLE_ASYNC_NOTIF]
    )
    def test_client_0_kills_optee(self, empty: Rig, function: int) -> None:
        with pytest.raises(SecureWorldFault):
            empty.call(function, vm=0)
        with pytest.raises(SecureWorldFault):
            empty.call(Function.CALLS_UID, vm=0)
        assert empty.world.died

    @pytest.mark.parametrize("vm", [0, 5])
    @pytest.mark.parametrize(
        "function",
        [
            Function.CALL_WITH_ARG,
            Function.CALL_WITH_RPC_ARG,
            Function.CALL_WITH_REGD_ARG,
            Function.RETURN_FROM_RPC,
            UNKNOWN_YIELDING,
        ],
    )
    def test_yielding_without_a_guest(self, empty: Rig, function: int, vm: int) -> None:
        pa = empty.write(open_message(HelloWorld.uuid))
        before = empty.memory.read(pa, PAGE_SIZE)
        assert empty.call(function, *to_pair(pa), vm=vm)[0] == ReturnCode.ENOTAVAIL
        assert empty.memory.read(pa, PAGE_SIZE) == before

    def test_fast_call_of_an_unknown_client(self, empty: Rig) -> None:
        for function in (*Function, UNKNOWN_FAST):
            if function >> 31:
                assert empty.call(function, 11, 22, 33, vm=5) == (7, 11, 22, 33)

    def test_unknown_capability_bit(self, empty: Rig) -> None:
        assert empty.call(Function.EXCHANGE_CAPABILITIES, 0x3, vm=0)[:2] == (7, 0x3)
        assert empty.call(Function.EXCHANGE_CAPABILITIES, 0x1, vm=0) == (0, 0xFD, 0x42, 4)

    def test_width_of_a7(self, rig: Rig) -> None:
        assert rig.call(Function.CALLS_UID, vm=0x10000)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.CALLS_UID, vm=0x10001) == API_UID
        session = rig.run(open_message(HelloWorld.uuid), vm=0x10001).session
        assert rig.invoke(session, 0, value(1)).params[0].a == 2

    def test_built_without_virtualization(self) -> None:
        native = Rig(Config(threads=2, virtualization=False), vms=0)
        assert native.call(Function.CALLS_COUNT, vm=0)[0] == 0xC
        assert native.call(Function.CALLS_UID, vm=77) == API_UID
        assert native.call(Function.EXCHANGE_CAPABILITIES, vm=0) == (0, 0xF5, 0x42, 4)
        assert native.call(Function.GET_SHM_CONFIG, vm=0) == (0, 0x42000000, 0x200000, 1)
        assert native.call(Function.VM_CREATED, 1, vm=0)[0] == 0xFFFFFFFF
        assert native.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0xFFFFFFFF
        assert native.open(vm=3) == 1

    def test_static_shared_memory_without_virtualization(self) -> None:
        native = Rig(Config(threads=2, virtualization=False), vms=0)
        base = native.world.config.reserved_shm[0]
        native.memory.add(Bank("static", PageStore("static", 512), Frames(base, 512)))
        pa = native.write(open_message(HelloWorld.uuid), base + PAGE_SIZE - 72)
        assert native.call(Function.CALL_WITH_ARG, *to_pair(pa)) == (0, 0, 0, 0)
        assert native.read_at(pa, 96).session == 1
        end = base + 0x200000
        for bad in (base + 4, end - 32, end - 96):
            native.memory.write(min(bad, end - 96), open_message(HelloWorld.uuid).pack())
            assert (native.call(Function.CALL_WITH_ARG, *to_pair(bad))[0] == 0) is (bad == end - 96)
        session = native.open(ExerciseTa.uuid)
        native.memory.write(base, b"static")
        plain = Param(ParamType.TMEM_INPUT, base, 6), Param(ParamType.TMEM_OUTPUT, base + 64, 6)
        assert native.invoke(session, 8, *plain).ret == 0
        assert native.memory.read(base + 64, 6) == b"static"
        assert native.invoke(session, 8, Param(ParamType.TMEM_INPUT, end - 4, 8)).ret == Result.BAD_PARAMETERS


class TestLifeCycle:
    def test_created(self, rig: Rig) -> None:
        assert rig.call(Function.VM_CREATED, 9, vm=1)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.VM_CREATED, 0, vm=0)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.VM_CREATED, 2, vm=0) == (0, 2, 0, 0)

    def test_twice_uses_up_two_partitions(self, rig: Rig) -> None:
        rig.open()
        assert rig.call(Function.VM_CREATED, 1, vm=0)[0] == 0
        assert rig.world.partitions() == (1, 1)
        assert rig.invoke(1, 0, value(1)).ret == Result.BAD_PARAMETERS
        assert rig.call(Function.VM_CREATED, 2, vm=0)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0
        assert rig.invoke(1, 0, value(1)).ret == 0

    def test_destroyed(self, rig: Rig) -> None:
        assert rig.call(Function.VM_DESTROYED, 9, vm=0)[0] == 0
        assert rig.call(Function.VM_DESTROYED, 1, vm=1)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0
        assert rig.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0

    def test_destroyed_with_a_suspended_call(self, rig: Rig) -> None:
        answer, _ = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
        assert rig.world.threads_held(1) == 1
        assert rig.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0
        assert rig.resume(answer[3])[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.CALLS_UID)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.VM_CREATED, 1, vm=0)[0] == 0
        assert rig.resume(answer[3])[0] == ReturnCode.ERESUME
        assert rig.world.threads_held(1) == 0
        assert rig.open() == 1


class TestVm1Lives:
    def test_capabilities(self, rig: Rig) -> None:
        assert rig.call(Function.EXCHANGE_CAPABILITIES) == (0, 0xFD, 0x42, 4)

    def test_shm_cache(self, rig: Rig) -> None:
        assert rig.call(Function.DISABLE_SHM_CACHE)[0] == ReturnCode.ENOTAVAIL
        assert rig.call(Function.ENABLE_SHM_CACHE)[0] == 0
        answer, pa = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
        assert rig.call(Function.ENABLE_SHM_CACHE)[0] == ReturnCode.EBUSY
        assert rig.call(Function.DISABLE_SHM_CACHE)[0] == ReturnCode.EBUSY
        rig.finish(answer, pa)
        (cookie,) = rig.rpc_pages
        assert rig.call(Function.DISABLE_SHM_CACHE) == (0, *to_pair(cookie), 0)
        assert rig.call(Function.DISABLE_SHM_CACHE)[0] == ReturnCode.ENOTAVAIL
        assert rig.world.shared_objects(1) == ()

    def test_with_the_cache_off_an_rpc_argument_is_freed_at_the_end(self, rig: Rig) -> None:
        answer, pa = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
        returns = []
        while answer[0] != ReturnCode.OK:
            returns.append(answer[0])
            answer = rig.step(answer, pa)
        assert returns[0] == RpcReturn.ALLOC
        assert returns[-1] == RpcReturn.FREE
        assert set(returns[1:-1]) == {RpcReturn.CMD}
        assert not rig.rpc_pages

    def test_with_the_cache_on_the_next_call_has_one(self, rig: Rig) -> None:
        rig.call(Function.ENABLE_SHM_CACHE)
        for expected in (RpcReturn.ALLOC, RpcReturn.CMD):
            answer, pa = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
            assert answer[0] == expected
            assert rig.finish(answer, pa) == (0, 0, 0, 0)
        assert len(rig.rpc_pages) == 1

    @pytest.mark.parametrize("num_params", [0, 7])
    def test_unknown_message_command(self, rig: Rig, num_params: int) -> None:
        pa = rig.write(Message(99, params=[NONE] * num_params))
        before = rig.memory.read(pa, PAGE_SIZE)
        assert rig.call(Function.CALL_WITH_ARG, *to_pair(pa)) == (ReturnCode.EBADCMD, 0, 0, 0)
        assert rig.memory.read(pa, PAGE_SIZE) == before

    def test_unknown_functions(self, rig: Rig) -> None:
        assert rig.call(UNKNOWN_YIELDING)[0] == ReturnCode.EBADCMD
        assert rig.call(UNKNOWN_FAST)[0] == ReturnCode.UNKNOWN_FUNCTION

    def test_bad_message_addresses(self, rig: Rig) -> None:
        good = rig.write(invoke_message(1, 0))
        rig.memory.write(good + 4096 - 32, bytes(28) + (127).to_bytes(4, "little"))
        too_many = rig.write(invoke_message(1, 0))
        rig.memory.write(too_many + 28, (1_000_000).to_bytes(4, "little"))
        crossing = rig.write(invoke_message(1, 0))
        rig.memory.write(crossing + 28, (123).to_bytes(4, "little"))
        end = RAM + RAM_PAGES * PAGE_SIZE
        for pa in (too_many, good + 4, SECURE, 0, DEVICE, good + 4096 - 32, end, 1 << 63):
            assert rig.call(Function.CALL_WITH_ARG, *to_pair(pa))[0] == ReturnCode.EBADADDR, hex(pa)
        assert rig.call(Function.CALL_WITH_RPC_ARG, *to_pair(crossing))[0] == ReturnCode.EBADADDR
        assert rig.call(Function.CALL_WITH_REGD_ARG, 0, 0x77)[0] == ReturnCode.EBADADDR
        assert rig.world.threads_held(1) == 0

    def test_nothing_to_resume(self, rig: Rig) -> None:
        for thread in (0, 99, 0xFFFFFFFF):
            assert rig.resume(thread)[0] == ReturnCode.ERESUME

    def test_thread_of_another_vm(self, rig: Rig) -> None:
        answer, _ = rig.issue(open_message(UNKNOWN))
        assert rig.resume(answer[3], vm=2)[0] == ReturnCode.ENOTAVAIL
        rig.call(Function.VM_CREATED, 2, vm=0)
        assert rig.resume(answer[3], vm=2)[0] == ReturnCode.ERESUME
        assert rig.world.threads_held(1) == 1

    def test_first_rpc(self, rig: Rig) -> None:
        answer, _ = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
        assert answer == (RpcReturn.ALLOC, 160, 0, 0)

    def test_alloc_answered_with_null_is_asked_again(self, rig: Rig) -> None:
        answer, pa = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
        answer = rig.resume(answer[3])
        assert answer == (RpcReturn.ALLOC, 160, 0, 0)
        assert rig.resume(answer[3]) == (0, 0, 0, 0)
        assert (rig.read(pa).ret, rig.read(pa).ret_origin) == (Result.OUT_OF_MEMORY, Origin.TEE)

    @pytest.mark.parametrize("pa", [RAM + 4, RAM + 0x800, SECURE])
    def test_alloc_answered_with_a_bad_address(self, rig: Rig, pa: int) -> None:
        answer, _ = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
        cookie = 0x1234_5678_9ABC_DEF0
        answer = rig.resume(answer[3], *to_pair(pa), *to_pair(cookie))
        assert answer == (RpcReturn.FREE, *to_pair(cookie), 0)
        assert rig.resume(answer[3]) == (RpcReturn.ALLOC, 160, 0, 0)


class TestMessages:
    def test_unknown_names(self, rig: Rig) -> None:
        assert rig.unregister(0x77).ret == Result.BAD_PARAMETERS
        assert rig.unregister(0x77).ret_origin == 0
        closed = rig.close(5)
        assert (closed.ret, closed.ret_origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)
        for message in (invoke_message(5, 0), Message(Command.CANCEL, session=5)):
            refused = rig.run(message)
            assert (refused.ret, refused.ret_origin) == (Result.BAD_PARAMETERS, Origin.TEE)

    def test_rmem_beyond_its_object(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        _, listed = rig.buffer(6001, offset=0x123)
        assert rig.register(listed, 6001, 0x55).ret == 0
        end = 2 * PAGE_SIZE - 0x123  # rounded up to the end of its last page
        source = Param(ParamType.RMEM_INPUT, 0, end, 0x55)
        assert rig.invoke(session, 8, source, Param(ParamType.RMEM_OUTPUT, 0, end, 0x55)).ret == 0
        for offset, size in ((0, end + 1), (1, end), (end, 1), ((1 << 64) - 1, 2), (2, (1 << 64) - 1)):
            answer = rig.invoke(session, 8, Param(ParamType.RMEM_INPUT, offset, size, 0x55))
            assert (answer.ret, answer.ret_origin) == (Result.SECURITY, Origin.TEE)

    @pytest.mark.parametrize(
        "param",
        [
            Param(ParamType.TMEM_INPUT, RAM, 16),
            Param(ParamType.TMEM_INPUT, SECURE, 16),
            Param(0x4),
            Param(0x8),
            Param(0xC),
            Param(0xFF),
            Param(0x101, 1),
            Param(0x100),
            Param(NONCONTIG | ParamType.TMEM_INPUT, SECURE, 16),
            Param(ParamType.RMEM_INPUT, 0, 0, 0),
        ],
        ids=lambda param: f"{param.attr:#x}-{param.a:#x}",
    )
    def test_bad_parameters(self, rig: Rig, param: Param) -> None:
        session = rig.open()
        for message in (invoke_message(session, 0, param), open_message(HelloWorld.uuid, param)):
            refused = rig.run(message)
            assert (refused.ret, refused.ret_origin) == (Result.BAD_PARAMETERS, Origin.TEE)

    def test_numbers_of_parameters(self, rig: Rig) -> None:
        session = rig.open()
        five = Message(Command.INVOKE_COMMAND, 0, session, params=[NONE] * 5)
        no_meta = Message(Command.OPEN_SESSION, params=[NONE] * 2)
        one_meta = Message(Command.OPEN_SESSION, params=open_message(HelloWorld.uuid).params[:1])
        for message in (five, no_meta, one_meta, open_message(HelloWorld.uuid, *[NONE] * 5)):
            refused = rig.run(message)
            assert (refused.ret, refused.ret_origin) == (Result.BAD_PARAMETERS, Origin.TEE)
        for command in (Command.CLOSE_SESSION, Command.CANCEL):
            assert rig.run(Message(command, session=session, params=[NONE])).ret == Result.BAD_PARAMETERS
        assert rig.close(session).ret == 0

    @pytest.mark.parametrize("login", [3, 7, 0xF0000000])
    def test_bad_login(self, rig: Rig, login: int) -> None:
        message = open_message(HelloWorld.uuid)
        message.params[1] = Param(0x101, 0, 0, login)
        assert rig.run(message).ret == Result.BAD_PARAMETERS

    def test_success_and_errors_of_a_ta_have_its_origin(self, rig: Rig) -> None:
        session = rig.open()
        for command, result in ((0, 0), (77, Result.BAD_PARAMETERS)):
            answer = rig.invoke(session, command, value(1))
            assert (answer.ret, answer.ret_origin) == (result, Origin.TRUSTED_APP)


class TestRegister:
    def test_same_cookie_twice(self, rig: Rig) -> None:
        for cookie in (7, 0):
            for _ in range(2):
                assert rig.register(rig.buffer(100)[1], 100, cookie).ret == 0
            assert [rig.unregister(cookie).ret for _ in range(3)] == [0, 0, Result.BAD_PARAMETERS]

    def test_what_is_refused(self, rig: Rig) -> None:
        listed = rig.buffer(4096)[1]
        bad = {
            "size 0": (listed, 0),
            "size 2^40": (listed, 1 << 40),
            "buf_ptr 0": (0, 4096),
            "list in secure memory": (SECURE, 4096),
            "list in a device": (DEVICE, 4096),
        }
        for entry in (RAM + 8, SECURE, DEVICE, 0):
            bad[f"entry {entry:#x}"] = (rig.page_list([entry]), 4096)
        good = rig.page()
        bad["second list page"] = (rig.page_list([good] * 511), 512 * PAGE_SIZE)
        for why, (buf_ptr, size) in bad.items():
            refused = rig.register(buf_ptr, size, 9)
            assert (refused.ret, refused.ret_origin) == (Result.BAD_PARAMETERS, 0), why
        for attr in (
            ParamType.TMEM_OUTPUT,
            NONCONTIG | ParamType.TMEM_INPUT,
            ParamType.VALUE_INPUT,
            REGISTER | 0x100,
        ):
            message = Message(Command.REGISTER_SHM, params=[Param(attr, listed, 4096, 9)])
            assert rig.run(message).ret == Result.BAD_PARAMETERS
        two = Message(Command.REGISTER_SHM, params=register_message(listed, 4096, 9).params * 2)
        assert rig.run(two).ret == Result.BAD_PARAMETERS
        assert rig.world.shared_objects(1) == ()

    def test_offset_takes_a_second_entry(self, rig: Rig) -> None:
        data, listed = rig.buffer(0x200, offset=0xF00)
        assert rig.register(listed, 0x200, 9).ret == 0
        (shared,) = rig.world.shared_objects(1)
        assert shared.pages == (data - 0xF00, data - 0xF00 + PAGE_SIZE)
        assert not shared.temporary

    def test_list_of_several_pages(self, rig: Rig) -> None:
        pages = [rig.page() for _ in range(1200)]
        assert rig.register(rig.page_list(pages), 1200 * PAGE_SIZE, 9).ret == 0
        assert rig.world.shared_objects(1)[0].pages == tuple(pages)

    def test_unregister_does_not_look_at_the_attribute(self, rig: Rig) -> None:
        rig.register(rig.buffer(100)[1], 100, 9)
        message = unregister_message(9)
        message.params[0] = message.params[0]._replace(attr=ParamType.VALUE_INPUT)
        assert rig.run(message).ret == 0


class TestShmAlloc:
    def alloc(self, rig: Rig, reply: Param) -> tuple[list[Rpc], Message]:
        """Open a TA that is not there, with that answer to each SHM_ALLOC."""
        seen = []

        def serve(rpc: Rpc) -> None:
            seen.append(Rpc(rpc.at, rpc.command, list(rpc.params)))
            if rpc.command == RpcCommand.SHM_ALLOC:
                rpc.params[0] = reply
            rig.answer(rpc)

        return seen, rig.run(open_message(UNKNOWN), serve=serve)

    def test_request(self, rig: Rig) -> None:
        seen, _ = self.alloc(rig, NONE)
        assert seen[0].params == [Param(ParamType.VALUE_INPUT, 0, 4096, 8)]

    @pytest.mark.parametrize("where", ["page", "list", "null"])
    def test_bad_buffer_is_freed_and_asked_once_more(self, rig: Rig, where: str) -> None:
        listed = {"page": rig.page_list([SECURE]), "list": SECURE, "null": 0}[where]
        seen, opened = self.alloc(rig, Param(REGISTER, listed, 4096, 0xC0))
        free = (RpcCommand.SHM_FREE, 0xC0)
        commands = [(rpc.command, rpc.params[0].b) for rpc in seen]
        assert commands == [(RpcCommand.SHM_ALLOC, 4096), free, (RpcCommand.SHM_ALLOC, 4096), free]
        assert (opened.ret, opened.ret_origin) == (Result.OUT_OF_MEMORY, Origin.TEE)

    def test_small_buffer_is_asked_once_more_but_not_freed(self, rig: Rig) -> None:
        seen, opened = self.alloc(rig, Param(REGISTER, rig.buffer(4096)[1], 4095, 0xC0))
        assert [rpc.command for rpc in seen] == [RpcCommand.SHM_ALLOC] * 2
        assert opened.ret == Result.OUT_OF_MEMORY

    def test_contiguous_buffer_is_accepted(self, rig: Rig) -> None:
        seen, _ = self.alloc(rig, Param(ParamType.TMEM_OUTPUT, rig.page(), 4096, 0xC0))
        assert [rpc.command for rpc in seen[:2]] == [RpcCommand.SHM_ALLOC, RpcCommand.FS]

    def test_buffer_without_a_cookie_cannot_be_named_to_the_supplicant(self, rig: Rig) -> None:
        seen, opened = self.alloc(rig, Param(REGISTER, rig.buffer(4096)[1], 4096, 0))
        assert RpcCommand.FS not in [rpc.command for rpc in seen]
        assert opened.ret == Result.BAD_PARAMETERS


class TestTwoVms:
    @pytest.fixture
    def rig(self) -> Rig:
        return Rig(vms=2)

    def test_same_session_ids_and_cookies(self, rig: Rig) -> None:
        for vm in (1, 2):
            assert rig.open(vm=vm) == 1
            assert rig.register(rig.buffer(100)[1], 100, 7, vm=vm).ret == 0
        assert rig.invoke(1, 0, value(4), vm=1).params[0].a == 5
        assert rig.close(1, vm=1).ret == 0
        assert rig.invoke(1, 0, value(4), vm=2).ret == 0

    def test_thread_limit_of_one_is_not_that_of_the_other(self, rig: Rig) -> None:
        for thread in (0, 1):
            answer, _ = rig.issue(open_message(UNKNOWN))
            assert answer[3] == thread
        pa = rig.write(open_message(UNKNOWN))
        before = rig.memory.read(pa, PAGE_SIZE)
        assert rig.call(Function.CALL_WITH_RPC_ARG, *to_pair(pa))[0] == ReturnCode.ETHREAD_LIMIT
        assert rig.memory.read(pa, PAGE_SIZE) == before
        assert rig.world.thread_limits == 1
        answer, _ = rig.issue(open_message(UNKNOWN), vm=2)
        assert (answer[0], answer[3]) == (RpcReturn.CMD, 0)
        assert rig.open(vm=2) == 2

    def test_lowest_free_thread_is_taken(self, rig: Rig) -> None:
        first, pa = rig.issue(open_message(UNKNOWN))
        second, _ = rig.issue(open_message(UNKNOWN))
        rig.finish(first, pa)
        assert rig.issue(open_message(UNKNOWN))[0][3] == first[3] == 0
        assert second[3] == 1

    def test_pages_have_no_owner(self, rig: Rig) -> None:
        _, listed = rig.buffer(100)
        assert rig.register(listed, 100, 7, vm=1).ret == 0
        assert rig.register(listed, 100, 8, vm=2).ret == 0
        session = rig.open(ExerciseTa.uuid, vm=2)
        stolen = rig.invoke(session, 8, Param(ParamType.RMEM_INPUT, 0, 8, 7), vm=2)
        assert (stolen.ret, stolen.ret_origin) == (Result.BAD_PARAMETERS, Origin.TEE)


def test_rpc_argument_cookie_is_zero_when_the_caller_supplied_it(rig: Rig) -> None:
    answer, _ = rig.issue(open_message(UNKNOWN))
    assert answer == (RpcReturn.CMD, 0, 0, 0)
    answer, pa = rig.issue(open_message(UNKNOWN), function=Function.CALL_WITH_ARG)
    answer = rig.step(answer, pa)
    assert answer[0] == RpcReturn.CMD
    assert from_pair(answer[1], answer[2]) in rig.rpc_pages


def test_registered_message_may_cross_pages(rig: Rig) -> None:
    data, listed = rig.buffer(3 * PAGE_SIZE)
    rig.register(listed, 3 * PAGE_SIZE, 0x99)
    session = rig.open()
    for offset in (0, 0x180, PAGE_SIZE - 64, PAGE_SIZE - 8, 3 * PAGE_SIZE - 320):
        rig.memory.write(data + offset, invoke_message(session, 0, value(8)).pack())
        assert rig.call(Function.CALL_WITH_REGD_ARG, 0, 0x99, offset) == (0, 0, 0, 0)
        message = Message.unpack(rig.memory.read(data + offset, 160))
        assert (message.ret, message.params[0].a) == (0, 9)
    rig.memory.write(data + 3 * PAGE_SIZE - 312, invoke_message(session, 0, value(8)).pack())
    for offset in (4, 3 * PAGE_SIZE - 312, 3 * PAGE_SIZE - 24, 3 * PAGE_SIZE, 0xFFFFFFF8):
        assert rig.call(Function.CALL_WITH_REGD_ARG, 0, 0x99, offset)[0] == ReturnCode.EBADADDR
