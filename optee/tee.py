"""Services of the TEE for a TA in one of its sessions (GP TEE Internal Core API).

What may suspend is a generator: `yield from tee.wait(100)`. Failures raise `TeeError`, which ends the TA's
command with that result unless the TA catches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID

from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.config import MAX_SYSCALL_RECURSION
from optee.errors import TaAbort, TaPanic, TeeError
from optee.parameters import NO_PARAMS, Params
from optee.rpc import VALUE_INPUT, VALUE_OUTPUT, rpc_command
from optee.set_ups import SetUp
from optee.steps import WORK, Steps
from optee.storage.objects import TrustedStorage
from optee.threads import Thread

if TYPE_CHECKING:
    from optee.ta_context import Instance, Session
    from optee.trusted_application import TrustedApplication

STACK_WARNING = 0.75
"""Part of a TA's stack from which on its high-water mark is worth a line on the console."""
_SUSPEND = int(RpcCommand.SUSPEND)
_GET_TIME = int(RpcCommand.GET_TIME)


class Allocation:
    """Heap memory of a TA (TEE_Malloc)."""

    __slots__ = ("_instance", "size")

    def __init__(self, instance: Instance, size: int) -> None:
        self._instance = instance
        self.size = size

    def free(self) -> None:
        """Give it back; a second time does nothing."""
        self._instance.heap_used -= self.size
        self.size = 0


class StackBuffer:
    """An array on a TA's stack: writing beyond its end hits the canary."""

    __slots__ = ("size", "written")

    def __init__(self, size: int) -> None:
        self.size = size
        self.written = 0

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write without a bounds check, as C does."""
        self.written = max(self.written, offset + len(data))


class Tee:
    """The TEE as one session of a TA sees it. `context` is the TA's to use (sess_ctx)."""

    __slots__ = ("context", "session", "thread")

    def __init__(self, session: Session, thread: Thread) -> None:
        self.session = session
        self.thread = thread
        self.context: Any = None

    @property
    def instance(self) -> Instance:
        """The instance of the TA that this is for."""
        return self.session.instance

    @property
    def client_uuid(self) -> UUID:
        """Who opened the session: nil for PUBLIC and the kernel, a TA's UUID for a TA."""
        return self.session.client.uuid

    @property
    def client_login(self) -> int:
        """How they identified themselves (`Login`)."""
        return self.session.client.login

    def known_tas(self) -> Iterator[type[TrustedApplication]]:
        """All TAs of this OP-TEE's image, pseudo TAs first."""
        return self.thread.partition.world.tas_in_image()

    def panic(self, code: int) -> NoReturn:
        """End this instance (TEE_Panic)."""
        raise TaPanic(code)

    def work(self, portions: int = 1) -> Steps[None]:
        """Compute for long: interrupts may come in after each portion."""
        for _ in range(portions):
            yield WORK

    def random(self, size: int) -> bytes:
        """Random bytes (TEE_GenerateRandom), from the seed of the configuration."""
        return self.thread.partition.world.random.randbytes(size)

    def system_time(self) -> int:
        """Milliseconds since some moment (TEE_GetSystemTime); read from a counter, no RPC."""
        return self.thread.partition.world.milliseconds()

    def ree_time(self) -> Steps[tuple[int, int]]:
        """Seconds and nanoseconds of the normal world's clock (TEE_GetREETime), by RPC GET_TIME."""
        self._enter_syscall()
        reply = yield from rpc_command(self.thread, _GET_TIME, ((VALUE_OUTPUT, 0, 0, 0),))
        if reply.ret:
            raise TeeError(reply.ret)
        _, seconds, nanoseconds, _ = reply.params[0]
        return seconds, nanoseconds

    def wait(self, milliseconds: int) -> Steps[None]:
        """Sleep in the normal world (TEE_Wait), by RPC SUSPEND. Raises TeeError(CANCEL) if cancelled.

        A cancellation counts once the sleep has returned.
        """
        self._enter_syscall()
        world = self.thread.partition.world
        end = world.milliseconds() + milliseconds
        while True:
            if self.cancelled:
                raise TeeError(Result.CANCEL)
            left = end - world.milliseconds()
            if left <= 0:
                return
            yield from rpc_command(self.thread, _SUSPEND, ((VALUE_INPUT, left, 0, 0),))
            world.slept(left)

    @property
    def cancelled(self) -> bool:
        """Whether the client asked to cancel, and cancellation is not masked (TEE_GetCancellationFlag)."""
        return self.session.cancelled and not self.session.cancel_masked

    def unmask_cancellation(self) -> bool:
        """Let cancellation take effect (masked at each entry); tells whether it was masked."""
        masked, self.session.cancel_masked = self.session.cancel_masked, False
        return masked

    def mask_cancellation(self) -> bool:
        """Keep cancellation from taking effect; tells whether it was masked."""
        masked, self.session.cancel_masked = self.session.cancel_masked, True
        return masked

    @property
    def storage(self) -> TrustedStorage:
        """Trusted storage of the TA (TEE_*PersistentObject, TEE_*ObjectData)."""
        self._enter_syscall()
        return TrustedStorage(self.instance, self.thread)

    def open_ta_session(self, uuid: UUID, params: Params = NO_PARAMS) -> Steps[Session]:
        """Open a session to another TA (TEE_OpenTASession). Raises TeeError with the origin of the failure."""
        self._enter_syscall()
        self.thread.recursion += 1
        opened = yield from self.thread.partition.sessions.open_from_ta(self.thread, self.instance, uuid, params)
        self.thread.recursion -= 1
        if isinstance(opened, TeeError):
            raise opened
        return opened

    def invoke_ta(self, session: Session, command: int, params: Params = NO_PARAMS) -> Steps[None]:
        """Invoke a command of another TA (TEE_InvokeTACommand). Raises TeeError with its origin."""
        self._enter_syscall()
        self.thread.recursion += 1
        result, origin = yield from self.thread.partition.sessions.invoke_from_ta(
            self.thread, self.instance, session, command, params
        )
        self.thread.recursion -= 1
        if result:
            raise TeeError(result, origin)

    def close_ta_session(self, session: Session) -> Steps[None]:
        """Close a session to another TA (TEE_CloseTASession)."""
        self._enter_syscall()
        self.thread.recursion += 1
        yield from self.thread.partition.sessions.close(self.thread, session.id, self.instance.opened)
        self.thread.recursion -= 1

    def malloc(self, size: int) -> Allocation:
        """Take memory from the TA's heap (TEE_Malloc). Raises TeeError(OUT_OF_MEMORY)."""
        instance = self.instance
        if instance.heap_used + size > instance.ta.data_size:
            instance.heap_failures += 1
            if size > instance.heap_biggest_failure:
                instance.heap_biggest_failure = size
                instance.heap_used_at_failure = instance.heap_used
            raise TeeError(Result.OUT_OF_MEMORY)
        instance.heap_used += size
        instance.heap_peak = max(instance.heap_peak, instance.heap_used)
        self.thread.partition.sessions.note_heap()
        return Allocation(instance, size)

    def set_up(self, kind: str) -> SetUp:
        """Allocate a key object, an operation (TEE_AllocateOperation), or both; kinds: `optee.memory.profile.SET_UPS`.

        Raises TeeError(OUT_OF_MEMORY): the core's heap is used up, of which no heap of a TA is part.
        """
        return SetUp(self.thread.partition.pools, self.instance, self.session.id, kind)

    def lock_scratch_pool(self) -> Steps[None]:
        """Take the memory for big-number arithmetic, of which each guest has one piece: others wait for it.

        Source: memory sizing reference, section 4. In OP-TEE it also gives storage its temporary blocks, so that
        storage and big numbers exclude each other; here they do not.
        """
        return self.thread.partition.scratch_pool.lock(self.thread)

    def unlock_scratch_pool(self) -> Steps[None]:
        """Give it back, and wake who waits."""
        return self.thread.partition.scratch_pool.unlock(self.thread)

    def enter_stack(self, size: int) -> None:
        """Count `size` bytes of stack as used at this moment; more than there is aborts the TA."""
        instance = self.instance
        instance.stack_used = size
        if size > instance.stack_peak:
            instance.stack_peak = min(size, instance.ta.stack_size)
            if not instance.ta.is_pseudo:  # those run on the thread's own stack
                self.thread.partition.sessions.note_stack(instance)
                self._warn_of_stack(size)
            if size > instance.ta.stack_size:
                raise TaAbort(instance.below_stack())

    def _warn_of_stack(self, size: int) -> None:
        """A new high-water mark: say so while there is stack left, and not much."""
        stack = self.instance.ta.stack_size
        if stack * STACK_WARNING < size <= stack:
            world, uuid = self.thread.partition.world, self.instance.uuid
            world.log(f"W/TC:{self.thread.index:02} 0 TA {uuid}: {size} of {stack} bytes of stack were used")

    @contextmanager
    def stack(self, size: int) -> Iterator[None]:
        """Use `size` more bytes of stack inside the `with` block."""
        before = self.instance.stack_used
        self.enter_stack(before + size)
        yield
        self.instance.stack_used = before

    @contextmanager
    def stack_buffer(self, size: int) -> Iterator[StackBuffer]:
        """Put an array of `size` bytes on the stack; an overrun panics the TA with OVERFLOW on leaving."""
        with self.stack(size):
            buffer = StackBuffer(size)
            yield buffer
            if buffer.written > size:
                self.thread.partition.world.log("stack smashing detected")
                self.panic(Result.OVERFLOW)

    def _enter_syscall(self) -> None:
        """Refuse services that suspend beyond the limit of recursion."""
        if self.thread.recursion >= MAX_SYSCALL_RECURSION:
            raise TeeError(Result.OUT_OF_MEMORY)
