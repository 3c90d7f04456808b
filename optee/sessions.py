"""Sessions of one guest: opening, invoking, closing, and who waits for whom.

Source: OP-TEE core behaviour, section 7. What is busy makes others wait, not fail: a session runs one call
at a time, an instance one thread at a time, and one lock serialises all single-instance TAs of the guest,
also while one of them sleeps in an RPC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

from optee.abi.message import Login
from optee.abi.results import Origin, Result, TaFlag
from optee.errors import SecureWorldFault, TaPanic, TeeError
from optee.memory.pool import Owner
from optee.memory.structures import SESSION
from optee.panic import PanicReport, report_panic
from optee.parameters import Params
from optee.steps import Steps
from optee.storage.objects import TrustedStorage
from optee.ta_context import Client, Instance, Session
from optee.ta_loader import load_ta
from optee.ta_memory import NotMapped, TablesNotAvailable, TaMemory
from optee.threads import Thread
from optee.wait_queue import Condition, Mutex

if TYPE_CHECKING:
    from optee.partition import Partition
    from optee.trusted_application import Outcome

Answer: TypeAlias = tuple[int, int]
"""TEE_Result and its origin."""

_TEE: Final = int(Origin.TEE)
_TRUSTED_APP: Final = int(Origin.TRUSTED_APP)
_NO_ORIGIN: Final = 0
_SUCCESS: Final = 0
_TARGET_DEAD: Final = int(Result.TARGET_DEAD)

_SINGLE_INSTANCE: Final = int(TaFlag.SINGLE_INSTANCE)
_MULTI_SESSION: Final = int(TaFlag.MULTI_SESSION)
_CONCURRENT: Final = int(TaFlag.CONCURRENT)


class Sessions:
    """What one guest has open."""

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self.open: dict[int, Session] = {}
        """Sessions of the normal world by id, in the order of opening."""
        self.instances: list[Instance] = []
        self.stack_peaks: dict[UUID, int] = {}
        """High-water mark of the stack in bytes, by TA."""
        self.heap_peak = 0
        """High-water mark of the heaps of all TAs together, in bytes."""
        self._mutex = Mutex()  # tee_ta_mutex
        self._initialized = Condition(self._mutex)
        self._single_free = Condition(self._mutex)
        self._pools = partition.pools
        self._tables_free = Condition(self._mutex)
        self._single_thread: Thread | None = None
        self._single_count = 0

    def note_stack(self, instance: Instance) -> None:
        """Raise the high-water mark of a TA."""
        uuid = instance.uuid
        self.stack_peaks[uuid] = max(self.stack_peaks.get(uuid, 0), instance.stack_peak)

    def note_heap(self) -> None:
        """Raise the high-water mark of the TAs' heaps."""
        self.heap_peak = max(self.heap_peak, sum(instance.heap_used for instance in self.instances))

    def open_session(
        self, thread: Thread, uuid: UUID, client: Client, params: Params, sessions: dict[int, Session]
    ) -> Steps[tuple[int, int, Session | None]]:
        """Open a session in `sessions`: result, origin and, on success, the session."""
        number = _new_id(sessions)
        try:
            memory = self._pools.heap.allocate(SESSION, Owner("session", self._pools.guest, number))
        except TeeError as error:
            return error.result, _TEE, None
        session = Session(number, client, thread, self._mutex, memory)
        sessions[number] = session
        try:
            yield from self._attach(thread, session, uuid)
        except TeeError as error:
            yield from self._unlink(thread, session, sessions)
            return error.result, _TEE, None
        instance = session.instance
        if instance.panicked:
            result, origin = _TARGET_DEAD, _TEE
        elif (yield from self._set_busy(thread, instance)):
            try:
                result = yield from self._enter(thread, session, params, self._open_entry, session, params)
                origin = _TEE if instance.panicked else _TRUSTED_APP
            except NotMapped as error:
                result, origin = error.result, _NO_ORIGIN
            yield from self._clear_busy(thread, instance)
        else:  # waiting would be a deadlock
            yield from self._unlink(thread, session, sessions)
            instance.references -= 1
            return int(Result.BUSY), _TEE, None
        session.cancelled = False
        if result != _SUCCESS:
            yield from self._close_held(thread, session, sessions)
            return result, origin, None
        yield from self._let_go(thread, session)
        return result, origin, session

    def _open_entry(self, session: Session, params: Params) -> Steps[int]:
        instance = session.instance
        ta = instance.ta
        if not instance.created:
            result = yield from _finish(ta.create(session.tee))
            if result:
                return result
            instance.created = True
        instance.live.add(session)
        try:
            result = yield from _finish(ta.open_session(session.tee, params))
        except TeeError as error:
            result = error.result
        if result:
            yield from self._forget_live(session)
        return result

    def _close_entry(self, session: Session) -> Steps[int]:
        instance = session.instance
        if session in instance.live:
            yield from _finish(instance.ta.close_session(session.tee))
            yield from self._forget_live(session)
        return _SUCCESS

    def _forget_live(self, session: Session) -> Steps[None]:
        instance = session.instance
        instance.live.discard(session)
        if not instance.live and not instance.keeps_alive:
            instance.created = False
            yield from _finish(instance.ta.destroy(session.tee))

    def invoke(
        self, thread: Thread, number: int, command: int, params: Params, sessions: dict[int, Session]
    ) -> Steps[Answer]:
        """Invoke a command in the session with that id."""
        session = sessions.get(number)
        if session is None or session.unlinked or session.holder is not None:
            session = yield from self._get(thread, number, sessions)
            if session is None:
                return int(Result.BAD_PARAMETERS), _TEE
        else:
            session.references += 1
            session.holder = thread
        instance = session.instance
        if instance.panicked:
            answer = _TARGET_DEAD, _TEE
        else:
            if instance.flags or instance.busy or self._single_thread is thread:
                yield from self._must_set_busy(thread, instance)
            else:
                instance.busy = True
            if sessions is self.open:
                self._partition.world.ta_invokes += 1
            try:
                entry = instance.ta.invoke
                result = yield from self._enter(thread, session, params, entry, session.tee, command, params)
                answer = result, _TEE if instance.panicked else _TRUSTED_APP
            except NotMapped as error:
                answer = error.result, _TRUSTED_APP  # what the call before left there
            session.cancelled = False
            if instance.flags or self._mutex.queue:
                yield from self._clear_busy(thread, instance)
            else:
                instance.busy = False
        if self._mutex.queue:
            yield from self._let_go(thread, session)
        else:
            session.holder = None
            session.references -= 1
        return answer

    def cancel(self, number: int) -> int:
        """Ask for cancellation of what runs in a session of the normal world."""
        session = self.open.get(number)
        if session is None or session.unlinked:
            return int(Result.BAD_PARAMETERS)
        session.cancelled = True
        return _SUCCESS

    def close(self, thread: Thread, number: int, sessions: dict[int, Session]) -> Steps[int]:
        """Close a session: what runs in it finishes first; a dead one closes too."""
        session = yield from self._get(thread, number, sessions)
        if session is None:
            return int(Result.ITEM_NOT_FOUND)
        yield from self._close_held(thread, session, sessions)
        return _SUCCESS

    def _close_held(self, thread: Thread, session: Session, sessions: dict[int, Session]) -> Steps[None]:
        instance = session.instance
        if instance.panicked:
            yield from self._unlink(thread, session, sessions)
        else:
            yield from self._must_set_busy(thread, instance)
            yield from self._enter(thread, session, (), self._close_entry, session)
            yield from self._unlink(thread, session, sessions)
            yield from self._clear_busy(thread, instance)
        instance.references -= 1
        keep = instance.keeps_crashed if instance.panicked else instance.keeps_alive
        if not instance.references and not keep:
            if instance in self.instances:
                self.instances.remove(instance)
            yield from self._release(thread, instance)

    def open_from_ta(self, thread: Thread, caller: Instance, uuid: UUID, params: Params) -> Steps[Session | TeeError]:
        """Open a session for a TA; a failure is returned, not raised."""
        client = Client(int(Login.TRUSTED_APP), caller.uuid)
        tables = yield from self._leave(thread, caller)
        result, origin, session = yield from self.open_session(thread, uuid, client, params, caller.opened)
        yield from self._return(thread, caller, tables)
        return TeeError(result, Origin(origin)) if session is None else session

    def invoke_from_ta(
        self, thread: Thread, caller: Instance, session: Session, command: int, params: Params
    ) -> Steps[tuple[int, Origin]]:
        """Invoke a command for a TA."""
        tables = yield from self._leave(thread, caller)
        result, origin = yield from self.invoke(thread, session.id, command, params, caller.opened)
        yield from self._return(thread, caller, tables)
        return result, Origin(origin)

    def _leave(self, thread: Thread, caller: Instance) -> Steps[int]:
        """Give up the tables of a TA while another one runs for it: how many."""
        tables, caller.tables = caller.tables, 0
        if tables:
            self._pools.tables.give(tables)
            if self._mutex.queue:
                self._tables_free.broadcast()
                yield from self._mutex.wake_next(thread)
        return tables

    def _return(self, thread: Thread, caller: Instance, tables: int) -> Steps[None]:
        """Map a TA again; it waits for tables as long as too few are free."""
        if tables and not self._pools.tables.take(tables):
            yield from self._wait_for_tables(thread, tables)
        caller.tables = tables

    def _wait_for_tables(self, thread: Thread, tables: int) -> Steps[None]:
        while not self._pools.tables.take(tables):
            yield from self._tables_free.wait(thread)
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)

    def _log(self, error: TeeError) -> None:
        if isinstance(error, TablesNotAvailable):
            self._partition.world.log(error.console())

    def _get(self, thread: Thread, number: int, sessions: dict[int, Session]) -> Steps[Session | None]:
        """Hold a session for this thread alone; None if there is none, or it closes meanwhile."""
        session = sessions.get(number)
        if session is None:
            return None
        if session.holder is thread:
            raise SecureWorldFault("a thread asked for a session that it holds")
        session.references += 1
        while session.holder is not None and not session.unlinked:
            yield from session.lock.wait(thread)
        if session.unlinked:
            session.references -= 1
            session.let_go.signal()
            session = None
        else:
            session.holder = thread
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)
        return session

    def _let_go(self, thread: Thread, session: Session) -> Steps[None]:
        """End this thread's hold on a session."""
        session.holder = None
        session.references -= 1
        session.lock.signal()
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)

    def _unlink(self, thread: Thread, session: Session, sessions: dict[int, Session]) -> Steps[None]:
        session.unlinked = True
        session.lock.broadcast()
        while session.references != 2:  # the list's own and this thread's
            yield from session.let_go.wait(thread)
        del sessions[session.id]
        self._pools.heap.free(session.memory)
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)

    def _find(self, uuid: UUID) -> Instance | None:
        return next((instance for instance in self.instances if instance.uuid == uuid), None)

    def _attach(self, thread: Thread, session: Session, uuid: UUID) -> Steps[None]:
        """Join the loaded instance of a single-instance TA, or load a new one. Raises TeeError."""
        instance = self._find(uuid)
        while instance is not None and instance.initializing:
            yield from self._initialized.wait(thread)
            instance = self._find(uuid)
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)
        if instance is not None and instance.flags & _SINGLE_INSTANCE:
            if instance.references and not instance.flags & _MULTI_SESSION:
                raise TeeError(Result.BUSY)
            instance.references += 1
            session.instance = instance
            return
        session.instance = instance = Instance(uuid, self._mutex)
        self.instances.append(instance)
        try:
            ta = yield from load_ta(thread, uuid)
            if ta.flags & TaFlag.CONCURRENT and not ta.is_pseudo:
                raise TeeError(Result.BAD_FORMAT)
            if not ta.is_pseudo:
                instance.memory = TaMemory(self._pools, ta, session.id)
            instance.ta = ta()
            instance.flags = int(ta.flags)
        except TeeError as error:
            self._log(error)
            self.instances.remove(instance)
            yield from self._end_initialization(thread, instance)
            raise
        yield from self._end_initialization(thread, instance)

    def _end_initialization(self, thread: Thread, instance: Instance) -> Steps[None]:
        instance.initializing = False
        if self._mutex.queue:
            self._initialized.broadcast()
            yield from self._mutex.wake_next(thread)

    def _set_busy(self, thread: Thread, instance: Instance) -> Steps[bool]:
        """Take the instance for this thread; False where waiting for it could never end."""
        if instance.flags & _CONCURRENT:
            return True
        if instance.flags & _SINGLE_INSTANCE:
            if self._single_thread is not thread:
                while self._single_thread is not None:
                    yield from self._single_free.wait(thread)
                self._single_thread = thread
            self._single_count += 1
        taken = True
        if self._single_thread is thread:
            if instance.busy:
                taken = False
                if instance.flags & _SINGLE_INSTANCE:
                    self._unlock_single()
        else:
            while instance.busy:
                yield from instance.idle.wait(thread)
        instance.busy = True
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)
        return taken

    def _must_set_busy(self, thread: Thread, instance: Instance) -> Steps[None]:
        if not (yield from self._set_busy(thread, instance)):
            raise SecureWorldFault("core panic: deadlock between single-instance TAs")

    def _clear_busy(self, thread: Thread, instance: Instance) -> Steps[None]:
        if instance.flags & _CONCURRENT:
            return
        instance.busy = False
        instance.idle.signal()
        if instance.flags & _SINGLE_INSTANCE:
            self._unlock_single()
        if self._mutex.queue:
            yield from self._mutex.wake_next(thread)

    def _unlock_single(self) -> None:
        self._single_count -= 1
        if not self._single_count:
            self._single_thread = None
            self._single_free.signal()

    def _enter(
        self, thread: Thread, session: Session, params: Params, entry: Callable[..., Outcome], *arguments: Any
    ) -> Steps[int]:
        """Run an entry point of the TA to its end; a panic makes it TARGET_DEAD."""
        instance = session.instance
        if instance.panicked:  # while this thread waited for it
            return _TARGET_DEAD
        memory = instance.memory
        if memory is not None:
            try:
                mapped = memory.map_parameters(params)
            except TeeError as error:
                self._log(error)
                raise NotMapped(error.result) from None
            if not self._pools.tables.take(mapped.tables):
                yield from self._wait_for_tables(thread, mapped.tables)
            instance.tables = mapped.tables
        session.tee.thread = thread
        session.cancel_masked = True
        instance.params = params
        try:
            outcome = entry(*arguments)
            if outcome is not None and not isinstance(outcome, int):
                outcome = yield from outcome
        except TeeError as error:
            return error.result
        except TaPanic as panic:
            report = report_panic(self._partition.vm_id, thread.index, instance, panic)
        else:
            return outcome or _SUCCESS
        finally:
            if memory is not None:
                memory.unmap_parameters(mapped)
                self._pools.tables.give(instance.tables)
                instance.tables = 0
                if self._mutex.queue:
                    self._tables_free.broadcast()
        yield from self._die(thread, instance, report)
        return _TARGET_DEAD

    def _die(self, thread: Thread, instance: Instance, report: PanicReport) -> Steps[None]:
        world = self._partition.world
        world.note_panic(report)
        if instance.ta.is_pseudo:
            raise SecureWorldFault(f"core panic in pseudo TA {instance.uuid}: {report.reason}")
        instance.panicked = True
        if not instance.keeps_crashed:
            self.instances.remove(instance)
        yield from self._release(thread, instance)

    def _release(self, thread: Thread, instance: Instance) -> Steps[None]:
        """Give up what an instance holds: its memory, its sessions with other TAs, its objects."""
        instance.created = False
        instance.live.clear()
        instance.heap_used = 0
        instance.free_memory()
        for number in list(instance.opened):
            yield from self.close(thread, number, instance.opened)
        if instance.handles:
            yield from TrustedStorage(instance, thread).close_all()


def _finish(outcome: Outcome) -> Steps[int]:
    """Run an entry point to its end: its TEE_Result."""
    if outcome is not None and not isinstance(outcome, int):
        outcome = yield from outcome
    return outcome or _SUCCESS


def _new_id(sessions: dict[int, Session]) -> int:
    """Next after the last, never 0, and free."""
    last = next(reversed(sessions), 0)
    number = last
    while True:
        number = (number + 1) & 0xFFFFFFFF
        if number and number not in sessions:
            return number
