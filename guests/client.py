"""The TEE Client API of a guest's processes.

Source: GlobalPlatform TEE Client API Specification 1.0; libteec of optee_client for what it leaves open.

    async with guests.open(ram, conduit) as guest, guest.context() as context:
        async with await context.open_session(HELLO_WORLD) as session:
            values, = await session.invoke(0, Value(a=42))

A result other than TEEC_SUCCESS is raised as `TeeError`. Cancelling a task that waits in here is a signal to
its process: what OP-TEE has begun is brought to its end and returned, temporary memory is taken back, and the next
call in here raises `Cancelled`. To end the TA's work itself, call `Session.request_cancellation`.
"""

from types import TracebackType
from typing import Final, Self
from uuid import UUID, uuid5

import trio

from guests.client_memory import Direction, SharedMemory
from guests.driver import NIL_UUID, Driver
from guests.memory import Buffer
from guests.operation import LEAST_BUFFER, Operation, TeeError, allocate_memory, register_memory
from guests.parameters import Output, Parameter
from optee.abi.message import Login
from optee.abi.results import Origin, Result

MAX_SHARED_MEMORY: Final = 1 << 28
"""Bytes of one buffer (TEEC_CONFIG_SHAREDMEM_MAX_SIZE: libteec says no limit, a guest's RAM has one)."""

_CLIENT_NAMESPACE: Final = UUID("58ac9ca0-2086-4683-a1b8-ec4bc08e01b6")


class Session:
    """A session with a TA (TEEC_Session)."""

    def __init__(self, context: "Context", identifier: int, outputs: tuple[Output, ...]) -> None:
        self._context = context
        self._driver = context.driver
        self.is_open = True
        self.identifier = identifier
        self.outputs = outputs

    async def invoke(self, command: int, *parameters: Parameter) -> tuple[Output, ...]:
        """Invoke a command with up to four parameters; return one output for each (TEEC_InvokeCommand).

        Raises TeeError; with result OUT_OF_MEMORY and origin API where memory could not be shared.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        operation = Operation(self._driver, parameters)
        if not operation.has_memory:
            answer = await self._driver.invoke(self.identifier, command, operation.params)
            return operation.finish(answer)
        try:
            await operation.register()
            answer = await self._driver.invoke(self.identifier, command, operation.params)
            return operation.finish(answer)
        finally:
            await operation.release()

    async def request_cancellation(self) -> None:
        """Ask for the cancellation of the session's operation (TEEC_RequestCancellation).

        It takes effect where the TA allows it, at its next cancellation point. Raises TeeError if OP-TEE refuses.
        """
        answer = await self._driver.cancel(self.identifier)
        if answer.ret != Result.SUCCESS:
            raise TeeError(answer.ret, answer.origin)

    async def close(self) -> None:
        """Close the session (TEEC_CloseSession), after an operation under way; twice is allowed."""
        if not self.is_open:
            return
        self.is_open = False
        self._context.forget(self)
        with self._driver.uninterruptible.scope():
            await self._driver.close_session(self.identifier)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Context:
    """A process's connection to the TEE (TEEC_Context). uid and gid are those of the process."""

    def __init__(self, driver: Driver, *, uid: int = 0, gid: int = 0) -> None:
        self.driver = driver
        self.uid = uid
        self.gid = gid
        self._memories: dict[SharedMemory, None] = {}
        self._sessions: dict[Session, None] = {}

    async def open_session(
        self,
        ta: UUID,
        *parameters: Parameter,
        login: Login = Login.PUBLIC,
        group: int | None = None,
    ) -> Session:
        """Open a session with a TA (TEEC_OpenSession). Raises TeeError.

        group: for Login.GROUP, if another group of the process than its gid is meant. What the parameters hold
        afterwards is in the session's `outputs`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        operation = Operation(self.driver, parameters)
        client = self._identity(login, self.gid if group is None else group)
        try:
            if operation.has_memory:
                await operation.register()
            answer = await self.driver.open_session(ta, operation.params, login=login, client=client)
            session = Session(self, answer.session, operation.finish(answer))
        finally:
            if operation.has_memory:
                await operation.release()
        self._sessions[session] = None
        return session

    def _identity(self, login: Login, group: int) -> UUID:
        """Return the client UUID that the kernel vouches for."""
        if login is Login.USER:
            return uuid5(_CLIENT_NAMESPACE, f"uid={self.uid:x}")
        if login is Login.GROUP:
            return uuid5(_CLIENT_NAMESPACE, f"gid={group:x}")
        return NIL_UUID

    def buffer(self, size: int, offset: int = 0) -> Buffer:
        """Take zeroed memory of the process's own, `offset` bytes into a page; see `free`. Raises TeeError."""
        if not 0 <= size <= MAX_SHARED_MEMORY:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API)
        return allocate_memory(self.driver, size, offset)

    def free(self, buffer: Buffer) -> None:
        """Give such memory back, after what was registered of it has been released."""
        self.driver.allocator.release(buffer.pages)

    async def register(self, buffer: Buffer, direction: Direction = Direction.INOUT) -> SharedMemory:
        """Share existing memory (TEEC_RegisterSharedMemory); the same twice gives two names. Raises TeeError."""
        shm = await register_memory(self.driver, buffer, allocated=False)
        return self._remember(SharedMemory(self.driver, self.forget, shm, buffer.size, direction, allocated=False))

    async def allocate(self, size: int, direction: Direction = Direction.INOUT) -> SharedMemory:
        """Allocate whole pages and share them (TEEC_AllocateSharedMemory). Raises TeeError."""
        buffer = self.buffer(max(size, LEAST_BUFFER))
        shm = await register_memory(self.driver, buffer, allocated=True)
        return self._remember(SharedMemory(self.driver, self.forget, shm, size, direction, allocated=True))

    def _remember(self, memory: SharedMemory) -> SharedMemory:
        self._memories[memory] = None
        return memory

    def forget(self, item: SharedMemory | Session) -> None:
        """Note that something of this context has been released by itself."""
        if isinstance(item, Session):
            self._sessions.pop(item, None)
        else:
            self._memories.pop(item, None)

    async def close(self) -> None:
        """End the process's connection (TEEC_FinalizeContext): what is left goes in Linux' order, memory first."""
        for memory in list(self._memories):
            await memory.release()
        for session in list(self._sessions):
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
