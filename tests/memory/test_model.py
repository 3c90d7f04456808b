"""The model's memory: every pool, what takes it, and how and where it fails."""

from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from mediator.service.log import EventLog
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import NotificationOperation
from optee.abi.smc import Function, ReturnCode, SecCapability, is_rpc
from optee.config import Config
from optee.memory.boards import BOARDS
from optee.memory.build import KIB, MIB, Build
from optee.memory.pool import Statistics
from optee.memory.pools import LowMemory
from optee.memory.profile import MAP_OF_7077, SET_UPS, SMALL_TA, TEST_PROGRAM, TaProfile
from optee.memory.shared_buffers import largest_buffer
from optee.tas.acipher import Acipher
from optee.tas.exercise import ExerciseTa, KeepAliveTa, sized_ta
from tests.optee.rig import Rig, invoke_message, is_notification, open_message, register_message, value

TAKE, SET_UP, LET_GO, WAIT, CALL_OTHER = 13, 14, 15, 1, 9
RSA_SIGN = SET_UPS.index("rsa-sign")
DEFAULT = Config()


def rig_of(build: Build, *profiles: TaProfile, vms: int = 1, **more: bool) -> Rig:
    config = replace(DEFAULT, extra_tas=tuple(map(sized_ta, profiles)), **more)
    return Rig(config.built(build), vms)


def set_up(rig: Rig, session: int, kind: int, count: int) -> tuple[int, int]:
    done = rig.invoke(session, SET_UP, value(kind, count, ParamType.VALUE_INPUT), value(kind=ParamType.VALUE_OUTPUT))
    return done.ret, done.params[1].a


def register(rig: Rig, pages: int, cookie: int) -> int:
    """REGISTER_SHM of a buffer that has one page so many times."""
    listed = rig.page_list([rig.page()] * pages)
    return rig.run(register_message(listed, pages * 4096, cookie)).ret


@pytest.mark.parametrize(("heap", "fit"), [(64, 6), (144, 15), (256, 27)])
def test_rsa_set_ups_of_a_heap(heap: int, fit: int) -> None:
    rig = rig_of(Build(heap=heap * KIB))
    session = rig.open(ExerciseTa.uuid)
    assert set_up(rig, session, RSA_SIGN, fit + 1) == (Result.OUT_OF_MEMORY, fit)
    assert rig.invoke(session, LET_GO).ret == 0
    assert set_up(rig, session, RSA_SIGN, fit) == (0, fit)


def test_neither_heap_nor_ram_of_a_ta_helps_its_keys() -> None:
    rig = rig_of(Build(), replace(SMALL_TA, heap=8 * MIB))
    session = rig.open(sized_ta(SMALL_TA).uuid)
    assert set_up(rig, session, RSA_SIGN, 7) == (Result.OUT_OF_MEMORY, 6)


def test_qemu_has_room_for_two_guests() -> None:
    rig = rig_of(BOARDS["qemu_armv8a"].build, vms=2)
    pools = rig.world.pools(1)
    assert pools is not None
    assert pools.ta_ram.size == 6_500_352
    assert rig.call(Function.VM_CREATED, 3, vm=0)[0] == ReturnCode.ENOTAVAIL
    assert rig.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0
    assert rig.call(Function.VM_CREATED, 3, vm=0)[0] == 0


def test_a_nexus_heap_runs_out_of_guests() -> None:
    rig = rig_of(Build(guest_count=64), vms=10)
    assert rig.call(Function.VM_CREATED, 11, vm=0)[0] == ReturnCode.ENOTAVAIL
    assert rig.world.nexus.heap.statistics.failed == 1


@pytest.mark.parametrize(("threads", "prealloc", "fits"), [(58, False, False), (59, False, True), (2, True, True)])
def test_the_map_of_7077(threads: int, prealloc: bool, fits: bool) -> None:
    rig = rig_of(Build(threads=threads, prealloc=prealloc, secure_ram=512 * MIB, guest_count=1), MAP_OF_7077)
    session = rig.open(sized_ta(MAP_OF_7077).uuid)
    size = MAP_OF_7077.parameters[0]
    assert register(rig, size // 4096, 5) == 0
    called = rig.invoke(session, TAKE, Param(ParamType.RMEM_INOUT, 0, size, 5))
    assert (called.ret, called.ret_origin) == ((0 if fits else Result.OUT_OF_MEMORY), Origin.TRUSTED_APP)
    assert ("118 page tables not available" in " ".join(rig.world.console)) is not fits


def test_a_ta_that_cannot_be_loaded() -> None:
    rig = rig_of(Build(threads=8), replace(TEST_PROGRAM, heap=92 * MIB))
    opened = rig.run(open_message(sized_ta(TEST_PROGRAM).uuid))
    assert (opened.ret, opened.ret_origin) == (Result.OUT_OF_MEMORY, Origin.TEE)
    assert rig.world.console[-1].endswith("62 page tables not available")
    pools = rig.world.pools(1)
    assert pools is not None
    assert pools.left() == []


def test_parameters_of_an_open_that_cannot_be_mapped_have_no_origin() -> None:
    rig = rig_of(Build(threads=2, heap=256 * KIB))
    assert register(rig, 4096, 7) == 0
    opened = rig.run(open_message(ExerciseTa.uuid, Param(ParamType.RMEM_INOUT, 0, 16 * MIB, 7)))
    assert (opened.ret, opened.ret_origin) == (Result.OUT_OF_MEMORY, 0)
    assert rig.world.session_count(1) == 0


def test_calls_that_together_need_too_many_tables_wait_for_each_other() -> None:
    large = replace(SMALL_TA, name="large", heap=9 * MIB)
    rig = rig_of(Build(threads=2), large)
    first, second = (rig.open(sized_ta(large).uuid) for _ in range(2))
    wait = [value(10, 0, ParamType.VALUE_INPUT)]
    sleeping, sleeping_at = rig.issue(invoke_message(first, WAIT, *wait))
    waiting, waiting_at = rig.issue(invoke_message(second, WAIT, *wait))
    assert is_rpc(sleeping[0])
    assert is_notification(rig.rpc(waiting, waiting_at), NotificationOperation.WAIT)
    sent = []
    rig.finish(sleeping, sleeping_at, serve=lambda rpc: (sent.append(rpc), rig.supplicant.serve(rpc))[1])
    assert any(is_notification(rpc, NotificationOperation.SEND) for rpc in sent)
    assert rig.finish(waiting, waiting_at)[0] == ReturnCode.OK
    pools = rig.world.pools(1)
    assert pools is not None
    assert pools.tables.free == 8


def test_a_ta_gives_its_tables_up_while_another_runs_for_it() -> None:
    large = replace(SMALL_TA, name="large", heap=13 * MIB)
    rig = rig_of(Build(threads=2), large)
    session = rig.open(sized_ta(large).uuid)
    done = rig.invoke(session, CALL_OTHER, value(0, 7, ParamType.VALUE_INPUT), value(3))
    assert (done.ret, done.params[1].a) == (0, 3)


def test_preallocated_tables_come_from_ta_ram_and_heap() -> None:
    large = replace(SMALL_TA, name="large", heap=13 * MIB)
    plain, prealloc = (rig_of(Build(prealloc=on), large) for on in (False, True))
    taken = []
    for rig in (plain, prealloc):
        pools = rig.world.pools(1)
        assert pools is not None
        before = pools.heap.allocated, pools.ta_ram.allocated
        rig.open(sized_ta(large).uuid)
        taken.append((pools.heap.allocated - before[0], pools.ta_ram.allocated - before[1]))
    assert (taken[1][0] - taken[0][0], taken[1][1] - taken[0][1]) == (2 * 208, 2 * 16384)


def test_ta_ram_in_pieces_is_of_no_use_to_a_large_region() -> None:
    block = replace(SMALL_TA, name="block", heap=4 * MIB)
    wide = replace(SMALL_TA, name="wide", heap=6 * MIB)
    rig = rig_of(Build(guest_count=1, secure_ram=16 * MIB), block, wide)
    sessions = [rig.open(sized_ta(block).uuid) for _ in range(3)]
    rig.close(sessions[0])
    rig.close(sessions[2])
    pools = rig.world.pools(1)
    assert pools is not None
    assert pools.ta_ram.size - pools.ta_ram.allocated > 8 * MIB
    assert rig.run(open_message(sized_ta(wide).uuid)).ret == Result.OUT_OF_MEMORY
    rig.close(sessions[1])
    rig.open(sized_ta(wide).uuid)


@pytest.mark.parametrize(("heap", "mib"), [(64, 14.6), (192, 46.6)])
def test_the_largest_buffer(heap: int, mib: float) -> None:
    rig = rig_of(Build(heap=heap * KIB))
    rig.open(ExerciseTa.uuid)
    pools = rig.world.pools(1)
    assert pools is not None
    pages = largest_buffer(pools.heap.largest_free)
    assert round(pages * 4096 / MIB, 1) == mib
    assert register(rig, pages + 1, 3) == Result.BAD_PARAMETERS
    assert register(rig, pages, 3) == 0
    assert rig.unregister(3).ret == 0


def test_sessions_use_up_the_heap() -> None:
    single = replace(SMALL_TA, name="single", single_instance=True)
    rig = rig_of(Build(heap=8 * KIB), single)
    opened = []
    while True:
        done = rig.run(open_message(sized_ta(single).uuid))
        if done.ret:
            break
        opened.append(done.session)
    assert (done.ret, done.ret_origin) == (Result.OUT_OF_MEMORY, Origin.TEE)
    assert len(opened) == (8192 - 16 - 2448 - 2896) // 176
    for session in opened:
        assert rig.close(session).ret == 0


def test_without_dynamic_shared_memory() -> None:
    rig = rig_of(Build(dynamic_shm=False))
    capabilities = rig.call(Function.EXCHANGE_CAPABILITIES)[1]
    assert not capabilities & SecCapability.DYNAMIC_SHM
    answer, _ = rig.issue(register_message(rig.page_list([rig.page()]), 4096, 1))
    assert answer[0] == ReturnCode.EBADCMD
    session = rig.open(ExerciseTa.uuid)
    _, listed = rig.buffer(100)
    listed_param = Param(ParamType.TMEM_INOUT | 0x200, listed, 100, 0)
    assert rig.invoke(session, TAKE, listed_param).ret == Result.BAD_PARAMETERS


def test_low_memory_is_told_once() -> None:
    told: list[LowMemory] = []
    rig = rig_of(Build())
    rig.world.on_low_memory = told.append
    session = rig.open(ExerciseTa.uuid)
    set_up(rig, session, RSA_SIGN, 4)
    assert told == []
    set_up(rig, session, RSA_SIGN, 1)
    assert [(low.pool, low.guest) for low in told] == [("Heap", 1)]
    assert set_up(rig, session, RSA_SIGN, 5)[0] == Result.OUT_OF_MEMORY
    assert len(told) == 1


def test_a_first_failure_is_told_with_its_size() -> None:
    told: list[LowMemory] = []
    rig = rig_of(Build())
    rig.world.on_low_memory = told.append
    assert register(rig, 8000, 1) == Result.BAD_PARAMETERS
    assert [(low.pool, low.statistics.biggest_failure) for low in told] == [("Heap", 64000)]


def test_nothing_is_left_by_a_guest_that_ends_in_order() -> None:
    rig = rig_of(Build(), leak_report=True)
    for ta in (ExerciseTa, KeepAliveTa):
        session = rig.open(ta.uuid)
        set_up(rig, session, RSA_SIGN, 1)
        rig.close(session)
    assert register(rig, 9, 1) == 0
    assert rig.unregister(1).ret == 0
    rig.call(Function.VM_DESTROYED, 1, vm=0)
    assert rig.world.leaks == []


def test_a_leak_is_reported_with_its_owner() -> None:
    rig = rig_of(Build(), leak_report=True)
    session = rig.open(KeepAliveTa.uuid)
    set_up(rig, session, RSA_SIGN, 1)
    instance = rig.world._by_id[1].sessions.instances[0]
    instance.set_ups.clear()  # it forgets what it has allocated
    rig.close(session)
    rig.call(Function.VM_DESTROYED, 1, vm=0)
    assert sum(leak.size for leak in rig.world.leaks) == 9424
    assert {leak.owner for leak in rig.world.leaks} == {("rsa-sign", 1, session)}
    assert "leak: 112 bytes, rsa-sign of guest 1, session 1" in rig.world.console


def test_a_guest_that_is_cut_off_gives_everything_back() -> None:
    rig = rig_of(Build(guest_count=1), leak_report=True)
    free = rig.world.nexus.heap.largest_free
    for _ in range(3):
        session = rig.open(ExerciseTa.uuid)
        set_up(rig, session, RSA_SIGN, 2)
        register(rig, 40, 1)
        rig.issue(invoke_message(session, WAIT, value(10, 0, ParamType.VALUE_INPUT)))
        rig.call(Function.VM_DESTROYED, 1, vm=0)
        assert rig.call(Function.VM_CREATED, 1, vm=0)[0] == 0
    assert rig.world.leaks == []
    assert rig.world.nexus.heap.largest_free == free


def test_a_panicked_ta_leaves_nothing() -> None:
    rig = rig_of(Build())
    session = rig.open(ExerciseTa.uuid)
    set_up(rig, session, RSA_SIGN, 3)
    assert rig.invoke(session, 0, value(1, 0, ParamType.VALUE_INPUT)).ret == Result.TARGET_DEAD
    pools = rig.world.pools(1)
    assert pools is not None
    assert [allocation.owner.what for allocation in pools.left()] == ["session"]
    assert rig.run(Message(Command.CLOSE_SESSION, session=session)).ret == 0
    assert pools.left() == []


def test_rsa_of_one_guest_runs_one_at_a_time() -> None:
    rig = rig_of(Build(guest_count=2), vms=2)
    first, second, elsewhere = rig.open(Acipher.uuid), rig.open(Acipher.uuid), rig.open(Acipher.uuid, vm=2)
    rig.world.interrupt_pending = lambda vm: True
    size = value(512, 0, ParamType.VALUE_INPUT)
    working, working_at = rig.issue(invoke_message(first, 0, size))
    while not rig.world._by_id[1].scratch_pool.written:
        working = rig.resume(working[3])
    rig.world.interrupt_pending = None
    waiting, waiting_at = rig.issue(invoke_message(second, 0, size))
    assert is_notification(rig.rpc(waiting, waiting_at), NotificationOperation.WAIT)
    assert rig.invoke(elsewhere, 0, size, vm=2).ret == 0
    assert rig.finish(rig.resume(working[3]), working_at)[0] == ReturnCode.OK
    assert rig.finish(waiting, waiting_at)[0] == ReturnCode.OK
    assert rig.read(working_at).ret == rig.read(waiting_at).ret == 0


def test_serve_logs_low_memory() -> None:
    low = LowMemory("Heap", 3, Statistics(60000, 60000, 65536, 1, 9000, 60000))
    with capture_logs() as logs:
        EventLog(lambda: 0.0, lambda: False).memory_low(low)
    assert logs == [
        {
            "event": "memory_low",
            "log_level": "warning",
            "guest": 3,
            "pool": "Heap",
            "allocated": 60000,
            "size": 65536,
            "biggest_failure": 9000,
        }
    ]
