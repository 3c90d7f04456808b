"""Sessions, TA instances and who waits for whom; two and more calls at once."""

from typing import ClassVar
from uuid import UUID

import pytest

from optee.abi.message import Command, Login, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import NotificationOperation, RpcCommand
from optee.abi.smc import Function, RpcReturn
from optee.config import Config
from optee.errors import SecureWorldFault
from optee.ta_context import Session
from optee.tas.exercise import (
    BigHeapTa,
    ExerciseTa,
    KeepAliveTa,
    SingleInstanceTa,
    SingleSessionTa,
)
from optee.tas.hello_world import HelloWorld
from optee.tas.invoke_tests import InvokeTests
from optee.tee import Tee
from optee.trusted_application import ParamKind, Steps, TaFlag, TeeError, TrustedApplication, Value, command
from tests.optee.rig import (
    NONE,
    Rig,
    Rpc,
    invoke_message,
    is_notification,
    open_message,
    unregister_message,
    value,
)

PANIC, WAIT, RECURSE, ALLOCATE, USE_STACK, OVERRUN, WORK, COUNT, COPY, CALL_OTHER = range(10)
WAITING, SENDING = NotificationOperation.WAIT, NotificationOperation.SEND


@pytest.fixture
def rig() -> Rig:
    return Rig(Config(threads=4, guests=2))


class Flight:
    """A call that is left where it is suspended; notifications are served as Linux does."""

    def __init__(self, rig: Rig, message: Message) -> None:
        self.rig = rig
        self.answer, self.pa = rig.issue(message)

    @property
    def rpc(self) -> Rpc:
        return self.rig.rpc(self.answer, self.pa)

    def resume(self) -> None:
        self.rig.answer(self.rpc)
        self.answer = self.rig.resume(self.answer[3])

    @property
    def waits(self) -> bool:
        """Sleeps in a NOTIFICATION WAIT of its own value."""
        rpc = self.rpc
        return is_notification(rpc, WAITING) and rpc.params[0].b == 64 + self.answer[3]

    def wakes(self, other: "Flight") -> bool:
        rpc = self.rpc
        return is_notification(rpc, SENDING) and rpc.params[0].b == 64 + other.answer[3]

    @property
    def message(self) -> Message:
        assert self.answer == (0, 0, 0, 0), self.answer
        return self.rig.read(self.pa)


def wait_message(session: int, milliseconds: int = 10, cancellable: int = 0) -> Message:
    return invoke_message(session, WAIT, value(milliseconds, cancellable, ParamType.VALUE_INPUT))


def count(rig: Rig, session: int, vm: int = 1) -> int:
    answer = rig.invoke(session, COUNT, value(1), vm=vm)
    assert answer.ret == 0
    return answer.params[0].a


class TestInstances:
    def test_multi_instance(self, rig: Rig) -> None:
        first, second = rig.open(ExerciseTa.uuid), rig.open(ExerciseTa.uuid)
        assert [count(rig, first), count(rig, first), count(rig, second)] == [1, 2, 1]

    def test_single_instance_shares_state(self, rig: Rig) -> None:
        first, second = rig.open(SingleInstanceTa.uuid), rig.open(SingleInstanceTa.uuid)
        assert [count(rig, first), count(rig, second)] == [1, 2]
        rig.close(first)
        rig.close(second)
        assert count(rig, rig.open(SingleInstanceTa.uuid)) == 1

    def test_single_session_is_busy(self, rig: Rig) -> None:
        first = rig.open(SingleSessionTa.uuid)
        refused = rig.run(open_message(SingleSessionTa.uuid))
        assert (refused.ret, refused.ret_origin, refused.session) == (Result.BUSY, Origin.TEE, 0)
        rig.close(first)
        rig.open(SingleSessionTa.uuid)

    def test_keep_alive(self, rig: Rig) -> None:
        session = rig.open(KeepAliveTa.uuid)
        assert count(rig, session) == 1
        rig.close(session)
        assert count(rig, rig.open(KeepAliveTa.uuid)) == 2

    def test_ids_go_on_from_the_last(self, rig: Rig) -> None:
        assert [rig.open(), rig.open(), rig.open()] == [1, 2, 3]
        rig.close(1)
        assert rig.open() == 4
        for session in (2, 3, 4):
            rig.close(session)
        assert rig.open() == 1

    def test_memory_of_an_instance_is_given_back(self) -> None:
        rig = Rig(Config(guests=2))
        rig.open(BigHeapTa.uuid)
        for _ in range(200):
            rig.close(rig.open(BigHeapTa.uuid))

    def test_concurrent_flag_is_refused_for_a_user_ta(self) -> None:
        class Concurrent(TrustedApplication):
            uuid = UUID(int=77)
            flags = TaFlag.CONCURRENT

        rig = Rig(Config(extra_tas=(Concurrent,)))
        assert rig.run(open_message(Concurrent.uuid)).ret == Result.BAD_FORMAT


class EntryPoints(TrustedApplication):
    """Notes which entry points run; refuses what it is told to."""

    uuid = UUID(int=0x1234)
    notes: ClassVar[list[str]] = []
    refuse = ""

    def _note(self, name: str) -> int:
        self.notes.append(name)
        return Result.GENERIC if self.refuse == name else Result.SUCCESS

    def create(self, tee: Tee) -> int:
        return self._note("create")

    def destroy(self, tee: Tee) -> int:
        return self._note("destroy")

    def open_session(self, tee: Tee, params: object) -> Steps[int]:
        yield from tee.work()
        return self._note(f"open {tee.client_login} {tee.client_uuid}")

    def close_session(self, tee: Tee) -> int:
        return self._note("close")


class TestEntryPoints:
    @pytest.fixture
    def rig(self) -> Rig:
        EntryPoints.notes.clear()
        EntryPoints.refuse = ""
        return Rig(Config(extra_tas=(EntryPoints,)))

    def test_order(self, rig: Rig) -> None:
        rig.close(rig.open(EntryPoints.uuid))
        assert EntryPoints.notes == ["create", f"open 0 {UUID(int=0)}", "close", "destroy"]

    @pytest.mark.parametrize("login", [Login.PUBLIC, Login.REE_KERNEL])
    def test_anonymous_clients_are_nil(self, rig: Rig, login: Login) -> None:
        message = open_message(EntryPoints.uuid)
        message.params[1] = Param(0x101, 0x11, 0x22, login)
        rig.run(message)
        assert EntryPoints.notes[1] == f"open {login:d} {UUID(int=0)}"

    def test_named_client(self, rig: Rig) -> None:
        message = open_message(EntryPoints.uuid)
        message.params[1] = Param(0x101, 0x11, 0x22, Login.GROUP)
        rig.run(message)
        assert EntryPoints.notes[1] == "open 2 11000000-0000-0000-2200-000000000000"

    @pytest.mark.parametrize(
        ("refuse", "notes"),
        [("create", ["create"]), (f"open 0 {UUID(int=0)}", ["create", f"open 0 {UUID(int=0)}", "destroy"])],
    )
    def test_refusal(self, rig: Rig, refuse: str, notes: list[str]) -> None:
        EntryPoints.refuse = refuse
        refused = rig.run(open_message(EntryPoints.uuid))
        assert (refused.ret, refused.ret_origin) == (Result.GENERIC, Origin.TRUSTED_APP)
        assert EntryPoints.notes == notes
        assert rig.world.session_count(1) == 0
        EntryPoints.refuse = ""
        rig.open(EntryPoints.uuid)


class TestWaiting:
    def test_second_invoke_of_a_session_waits(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        first = Flight(rig, wait_message(session))
        second = Flight(rig, invoke_message(session, COUNT, value(1)))
        assert second.waits
        second.resume()
        assert second.waits, "a WAIT that returns without its SEND waits again"
        first.resume()
        assert first.wakes(second)
        first.resume()
        assert first.message.ret == 0
        second.resume()
        assert second.message.params[0].a == 1

    def test_close_waits_for_the_running_invoke(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        first = Flight(rig, wait_message(session))
        closing = Flight(rig, Message(Command.CLOSE_SESSION, session=session))
        late = Flight(rig, invoke_message(session, COUNT, value(1)))
        assert closing.waits
        assert late.waits
        first.resume()
        assert first.wakes(closing)
        first.resume()
        closing.resume()
        assert closing.wakes(late)
        closing.resume()
        late.resume()
        assert late.wakes(closing)
        assert closing.waits
        late.resume()
        assert (late.message.ret, late.message.ret_origin) == (Result.BAD_PARAMETERS, Origin.TEE)
        closing.resume()
        assert closing.message.ret == 0
        assert rig.world.session_count(1) == 0

    def test_single_instance_lock_is_held_while_asleep(self, rig: Rig) -> None:
        single, other = rig.open(SingleInstanceTa.uuid), rig.open(KeepAliveTa.uuid)
        first = Flight(rig, wait_message(single))
        second = Flight(rig, invoke_message(other, COUNT, value(1)))
        assert second.waits
        assert count(rig, rig.open(ExerciseTa.uuid)) == 1, "multi-instance TAs run on"
        first.resume()
        assert first.wakes(second)
        first.resume()
        second.resume()
        assert second.message.params[0].a == 1

    def test_open_waits_for_a_busy_instance(self, rig: Rig) -> None:
        single = rig.open(SingleInstanceTa.uuid)
        first = Flight(rig, wait_message(single))
        second = Flight(rig, open_message(SingleInstanceTa.uuid))
        assert second.waits
        first.resume()
        first.resume()
        second.resume()
        assert second.message.ret == 0

    def test_open_waits_for_a_ta_that_is_being_loaded(self) -> None:
        rig = Rig(Config(threads=3, early_tas=frozenset()))
        first = Flight(rig, open_message(HelloWorld.uuid))
        second = Flight(rig, open_message(HelloWorld.uuid))
        assert second.waits
        while not is_notification(first.rpc, SENDING):
            rig.supplicant.serve(first.rpc)
            first.answer = rig.resume(first.answer[3])
        assert first.wakes(second)
        for flight in (first, second):
            flight.answer = rig.finish(flight.answer, flight.pa)
        assert (first.message.session, second.message.session) == (1, 2)

    @pytest.mark.parametrize("loads", [True, False])
    def test_a_guess_at_a_session_that_is_being_opened_waits(self, loads: bool) -> None:
        rig = Rig(Config(threads=4, early_tas=frozenset()))
        if not loads:
            del rig.supplicant.images[HelloWorld.uuid]
        opening = Flight(rig, open_message(HelloWorld.uuid))
        invoke = Flight(rig, invoke_message(1, 0, value(1)))
        closing = Flight(rig, Message(Command.CLOSE_SESSION, session=1))
        assert rig.run(Message(Command.CANCEL, session=1)).ret == 0
        flights = [opening, invoke, closing]
        assert invoke.waits
        assert closing.waits
        while any(flight.answer[0] for flight in flights):
            for flight in flights:
                if flight.answer[0]:
                    flight.answer = rig.step(flight.answer, flight.pa)
        results = [flight.message.ret for flight in flights]
        assert results == (
            [0, 0, 0] if loads else [Result.ITEM_NOT_FOUND, Result.BAD_PARAMETERS, Result.ITEM_NOT_FOUND]
        )
        assert rig.world.session_count(1) == 0

    def test_unregister_waits_for_users(self, rig: Rig) -> None:
        class Holder(TrustedApplication):
            uuid = UUID(int=0x99)

            @command(0, ParamKind.MEMREF_INPUT)
            def hold(self, tee: Tee, memory: object) -> Steps[None]:
                yield from tee.wait(5)

        rig = Rig(Config(threads=4, extra_tas=(Holder,)))
        session = rig.open(Holder.uuid)
        rig.register(rig.buffer(100)[1], 100, 7)
        reference = Param(ParamType.RMEM_INPUT, 0, 10, 7)
        first = Flight(rig, invoke_message(session, 0, reference))
        release = Flight(rig, unregister_message(7))
        assert release.waits
        assert rig.unregister(7).ret == Result.BAD_PARAMETERS
        assert len(rig.world.shared_objects(1)) == 1
        first.resume()
        assert first.wakes(release)
        assert rig.world.shared_objects(1) == ()
        first.resume()
        release.resume()
        assert release.message.ret == 0

    def test_mutex_of_the_core(self, rig: Rig) -> None:
        session = [rig.open(InvokeTests.uuid) for _ in range(4)]
        interrupts = iter([True, *[False] * 1000])
        rig.world.interrupt_pending = lambda _: next(interrupts)
        writer = Flight(rig, mutex_message(session[0], writer=True))
        rig.world.interrupt_pending = None
        assert writer.answer[0] == RpcReturn.FOREIGN_INTR
        rig.world.interrupt_pending = lambda _: True
        writer.answer = rig.resume(writer.answer[3])
        assert writer.answer[0] == RpcReturn.FOREIGN_INTR
        rig.world.interrupt_pending = None
        readers = [Flight(rig, mutex_message(number, writer=False)) for number in session[1:]]
        assert all(reader.waits for reader in readers)
        writer.answer = rig.resume(writer.answer[3])
        for reader in readers:
            assert writer.wakes(reader), "all waiting readers are woken"
            writer.resume()
        assert writer.message.params[1][1:3] == (1, 1)
        for before, reader in enumerate(readers, 2):
            reader.resume()
            assert reader.message.params[1][1:3] == (before, 1)


def mutex_message(session: int, *, writer: bool) -> Message:
    request = value(0 if writer else 1, 100_000, ParamType.VALUE_INPUT)
    return invoke_message(session, 7, request, value(kind=ParamType.VALUE_OUTPUT))


class TestCancel:
    def test_takes_effect_when_the_sleep_ends(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        waiting = Flight(rig, wait_message(session, 2000, cancellable=1))
        assert waiting.rpc.command == RpcCommand.SUSPEND
        assert waiting.rpc.params == [Param(ParamType.VALUE_INPUT, 2000)]
        cancelled = rig.run(Message(Command.CANCEL, session=session))
        assert (cancelled.ret, cancelled.ret_origin) == (0, Origin.TEE)
        assert rig.world.cancels == 1
        waiting.resume()
        assert (waiting.message.ret, waiting.message.ret_origin) == (Result.CANCEL, Origin.TRUSTED_APP)
        again = Flight(rig, wait_message(session, 10, cancellable=1))
        again.resume()
        assert again.message.ret == 0, "a pending cancellation does not outlive the command"

    def test_masked(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        waiting = Flight(rig, wait_message(session, 2000))
        rig.run(Message(Command.CANCEL, session=session))
        waiting.resume()
        assert waiting.message.ret == 0

    def test_short_sleeps_go_on_by_the_clock(self, rig: Rig) -> None:
        now = 100
        rig.world.clock = lambda: now
        waiting = Flight(rig, wait_message(rig.open(ExerciseTa.uuid), 500))
        for elapsed in (0, 120, 480):
            now = 100 + elapsed
            waiting.resume()
            assert waiting.rpc.params[0].a == 500 - elapsed
        now = 600
        waiting.resume()
        assert waiting.message.ret == 0


class TestTaToTa:
    @pytest.mark.parametrize(("depth", "result"), [(0, 0), (1, 0), (4, 0), (5, Result.OUT_OF_MEMORY)])
    def test_recursion(self, rig: Rig, depth: int, result: int) -> None:
        session = rig.open(ExerciseTa.uuid)
        answer = rig.invoke(session, RECURSE, value(depth))
        assert answer.ret == result
        assert answer.params[0].b == (0 if result else depth)
        assert rig.close(session).ret == 0
        assert not [i for i in rig.world._by_id[1].sessions.instances if not i.ta.is_pseudo]

    def test_values_go_there_and_back(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        answer = rig.invoke(session, CALL_OTHER, value(2, 0, ParamType.VALUE_INPUT), value(9))
        assert (answer.ret, answer.params[1].a) == (0, 10)
        assert rig.world.ta_invokes == 1

    def test_open_of_a_busy_single_instance_by_itself_is_busy(self, rig: Rig) -> None:
        session = rig.open(SingleInstanceTa.uuid)
        answer = rig.invoke(session, CALL_OTHER, value(1, 0, ParamType.VALUE_INPUT), value(9))
        assert (answer.ret, answer.ret_origin) == (Result.BUSY, Origin.TRUSTED_APP)
        assert count(rig, session) == 1
        assert rig.close(session).ret == 0
        assert rig.invoke(rig.open(SingleInstanceTa.uuid), RECURSE, value(1)).ret == Result.BUSY

    def test_panic_of_the_other(self, rig: Rig) -> None:
        class Caller(TrustedApplication):
            uuid = UUID(int=0x55)

            @command(0, ParamKind.VALUE_INOUT)
            def call(self, tee: Tee, origin: Value) -> Steps[None]:
                session = yield from tee.open_ta_session(ExerciseTa.uuid)
                params = (Value(0xBAD, 0, ParamKind.VALUE_INPUT), None, None, None)
                for _ in range(2):
                    try:
                        yield from tee.invoke_ta(session, PANIC, params)
                    except TeeError as error:
                        origin.a, origin.b = error.args
                yield from tee.close_ta_session(session)

        rig = Rig(Config(extra_tas=(Caller,)))
        answer = rig.invoke(rig.open(Caller.uuid), 0, value())
        assert (answer.ret, *answer.params[0][1:3]) == (0, Result.TARGET_DEAD, Origin.TEE)

    def test_memory_of_a_ta(self, rig: Rig) -> None:
        data, listed = rig.buffer(64)
        rig.memory.write(data, bytes(range(64)))
        rig.register(listed, 64, 7)
        session = rig.open(ExerciseTa.uuid)
        assert rig.invoke(session, 12, Param(ParamType.RMEM_INOUT, 0, 64, 7)).ret == 0
        assert rig.memory.read(data, 64) == bytes(range(64))


def test_single_instance_tas_that_call_in_a_circle_kill_optee() -> None:
    """The one way that this model knows for a TA to panic the core; no built-in TA goes it."""

    class First(TrustedApplication):
        uuid = UUID(int=0x71)
        flags = TaFlag.SINGLE_INSTANCE | TaFlag.MULTI_SESSION

        @command(0)
        def call(self, tee: Tee) -> Steps[None]:
            session = yield from tee.open_ta_session(Second.uuid)
            yield from tee.invoke_ta(session, 0)

    class Second(First):
        uuid = UUID(int=0x72)
        kept: ClassVar[list[Session]] = []

        @command(0)
        def call(self, tee: Tee) -> Steps[None]:
            if not self.kept:
                self.kept.append((yield from tee.open_ta_session(First.uuid)))
            else:
                yield from tee.invoke_ta(self.kept[0], 0)

    rig = Rig(Config(extra_tas=(First, Second)))
    assert rig.invoke(rig.open(Second.uuid), 0).ret == 0
    session = rig.open(First.uuid)
    with pytest.raises(SecureWorldFault, match="deadlock"):
        rig.invoke(session, 0)
    assert rig.world.died


class TestHeapAndStack:
    def test_heap(self) -> None:
        rig = Rig(Config(guests=2))
        session, big = rig.open(ExerciseTa.uuid), rig.open(BigHeapTa.uuid)
        for size, result in ((32 << 10, 0), ((32 << 10) + 1, Result.OUT_OF_MEMORY)):
            assert rig.invoke(session, ALLOCATE, value(size, 0, ParamType.VALUE_INPUT)).ret == result
        for result in (0, 0, Result.OUT_OF_MEMORY):
            assert rig.invoke(big, ALLOCATE, value(8 << 20, 1, ParamType.VALUE_INPUT)).ret == result

    def test_high_water_mark_of_the_stack(self, rig: Rig) -> None:
        session = rig.open(ExerciseTa.uuid)
        for size, peak in ((100, 612), (3584, 4096), (10, 4096)):
            assert rig.invoke(session, USE_STACK, value(size, 0, ParamType.VALUE_INPUT)).ret == 0
            assert rig.world.stack_peaks(1)[str(ExerciseTa.uuid)] == (peak, 4096)
        assert rig.invoke(session, USE_STACK, value(3585, 0, ParamType.VALUE_INPUT)).ret == Result.TARGET_DEAD
        assert rig.world.panic_reports[0].code == 0xDEADBEEF


def test_result_of_a_ta_is_its_own_even_if_it_reads_like_a_panic(rig: Rig) -> None:
    class Messenger(TrustedApplication):
        uuid = UUID(int=0x44)

        @command(0, ParamKind.VALUE_INOUT)
        def answer(self, tee: Tee, number: Value) -> int:
            number.a = 5
            return Result.TARGET_DEAD

    rig = Rig(Config(extra_tas=(Messenger,)))
    answer = rig.invoke(rig.open(Messenger.uuid), 0, value(1))
    assert (answer.ret, answer.ret_origin, answer.params[0].a) == (Result.TARGET_DEAD, Origin.TRUSTED_APP, 5)


class TestNotifications:
    def test_bitmap_of_a_guest(self) -> None:
        rig = Rig(vms=2)
        raised: list[int] = []
        rig.world.on_notification = raised.append
        assert rig.call(Function.ENABLE_ASYNC_NOTIF)[0] == 0
        for number in (5, 0, 63, 5):
            rig.world.notify(1, number)
        assert raised == [1] * 4
        values = [rig.call(Function.GET_ASYNC_NOTIF_VALUE) for _ in range(4)]
        assert values == [(0, 0, 3, 0), (0, 5, 3, 0), (0, 63, 1, 0), (0, 0, 0, 0)]
        assert rig.call(Function.GET_ASYNC_NOTIF_VALUE, vm=2) == (0, 0, 0, 0)
        for number, vm in ((64, 1), (0, 9)):
            with pytest.raises(ValueError, match="notification"):
                rig.world.notify(vm, number)

    def test_commands(self, rig: Rig) -> None:
        for number in (Command.DO_BOTTOM_HALF, Command.STOP_ASYNC_NOTIF):
            done = rig.run(Message(number))
            assert (done.ret, done.ret_origin) == (0, 0)


def test_destroy_ends_a_ta_that_suspends_on_its_way_out() -> None:
    class Clinging(TrustedApplication):
        uuid = UUID(int=0x66)

        @command(0)
        def cling(self, tee: Tee) -> Steps[None]:
            try:
                yield from tee.wait(5)
            finally:
                yield from tee.wait(5)

    rig = Rig(Config(extra_tas=(Clinging,)))
    Flight(rig, invoke_message(rig.open(Clinging.uuid), 0))
    assert rig.call(Function.VM_DESTROYED, 1, vm=0)[0] == 0
    assert rig.world.partitions() == ()


def test_foreign_interrupts_in_long_work(rig: Rig) -> None:
    session = rig.open(ExerciseTa.uuid)
    rig.world.interrupt_pending = lambda vm: vm == 1
    answer, pa = rig.issue(invoke_message(session, WORK, value(3, 0, ParamType.VALUE_INPUT)))
    interrupts = 0
    while answer[0] == RpcReturn.FOREIGN_INTR:
        assert answer[1:] == (0, 0, 0)
        interrupts += 1
        answer = rig.resume(0, 0xBAD, 0xBAD, 0xBAD, 0xBAD)
    assert (answer, rig.read(pa).ret, interrupts) == ((0, 0, 0, 0), 0, 4)


def test_extra_parameters_stay_untouched(rig: Rig) -> None:
    answer = rig.invoke(rig.open(), 0, value(0x1_0000_0005, 0x2_0000_0007), NONE)
    assert answer.params[0] == Param(ParamType.VALUE_INOUT, 6, 7, 0)
