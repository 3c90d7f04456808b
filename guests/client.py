"""The TEE Client API of a guest's processes.

Source: GlobalPlatform TEE Client API Specification 1.0; libteec of optee_client for what it leaves open.

    async with guests.open(ram, conduit) as guest, guest.context() as context:
        async with await context.open_session(HELLO_WORLD) as session:
            values, = await session.invoke(0, Value(a=42))

A result other than TEEC_SUCCESS is raised as `TeeError`. Cancelling a task that waits in here is a signal to
its process: what OP-TEE has begun is brought to its end and returned, temporary memory is taken back, and the next
call in here raises `Cancelled`. To end the TA's work itself, call `Session.request_cancellation`.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self
from uuid import UUID, uuid5

import trio

from guests.calls import Answer
from guests.driver import NIL_UUID, Driver
from guests.errors import OutOfGuestMemoryError, RegistrationError
from guests.memory import Buffer, allocate_buffer
from guests.parameters import (
    MAX_PARAMETERS,
    NO_PARAM,
    Direction,
    MemoryResult,
    Null,
    Output,
    Parameter,
    Partial,
    Temporary,
    Value,
    Values,
    Whole,
    encode_null,
    encode_registered,
    encode_value,
)
from guests.shm import SharedMemory as KernelMemory
from optee.abi.message import Login, Param
from optee.abi.registers import name_of
from optee.abi.results import Origin, Result
from optee.abi.smc import SecCapability

MAX_SHARED_MEMORY: Final = 1 << 28
"""Bytes of one buffer (TEEC_CONFIG_SHAREDMEM_MAX_SIZE: libteec says no limit, a guest's RAM has one)."""

_CLIENT_NAMESPACE: Final = UUID("58ac9ca0-2086-4683-a1b8-ec4bc08e01b6")
_LEAST_BUFFER: Final = 8  # libteec shares as much where a size of 0 is asked
_MALLOC_HEADER: Final = 16  # a process's buffers rarely begin at a page
_32_BITS: Final = 0xFFFFFFFF


class TeeError(Exception):
    """An operation that ended with a result other than TEEC_SUCCESS.

    result: TEEC_Result (`Result` names those that OP-TEE uses). origin: `Origin`, who produced it. outputs: what
    the parameters hold all the same, such as the size that a SHORT_BUFFER needs.
    """

    def __init__(self, result: int, origin: int, outputs: tuple[Output, ...] = ()) -> None:
        super().__init__(f"{name_of(Result, result)} from {name_of(Origin, origin)}")
        self.result = result
        self.origin = origin
        self.outputs = outputs


class SharedMemory:
    """A buffer that the client and TAs share, allocated or registered (TEEC_SharedMemory)."""

    def __init__(
        self, context: "Context", shm: KernelMemory, size: int, direction: Direction, *, allocated: bool
    ) -> None:
        self._context = context
        self._shm: KernelMemory | None = shm
        self._allocated = allocated
        self._users = 0
        self._unused = trio.lowlevel.ParkingLot()
        self.direction = direction
        self.size = size

    @property
    def kernel_memory(self) -> KernelMemory:
        """The driver's object. Raises ValueError after `release`."""
        if self._shm is None:
            raise ValueError("this shared memory has been released")
        return self._shm

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """Copy bytes out; to the end unless `size` says less. Raises ValueError outside the buffer."""
        return self.kernel_memory.buffer.read(offset, self.size - offset if size is None else size)

    def write(self, data: bytes, offset: int = 0) -> None:
        """Copy bytes in. Raises ValueError outside the buffer."""
        self.kernel_memory.buffer.write(data, offset)

    def begin_use(self) -> None:
        """Keep the memory until `end_use`: an operation names it."""
        self._users += 1

    def end_use(self) -> None:
        """Note that an operation is over."""
        self._users -= 1
        if not self._users:
            self._unused.unpark_all()

    async def release(self) -> None:
        """Take the memory back (TEEC_ReleaseSharedMemory): waits for operations that use it; twice is allowed.

        As in Linux, whose operations hold references: UNREGISTER_SHM is sent when none is left. Its cookie may be
        another buffer's at once.
        """
        shm, self._shm = self._shm, None
        if shm is None:
            return
        self._context.forget(self)
        driver = self._context.driver
        with driver.uninterruptible.scope():
            if self._users:
                await self._unused.park()
            await driver.unregister(shm)
        if self._allocated:
            driver.allocator.release(shm.buffer.pages)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.release()


class _Operation:
    """Parameters on their way into a message and back: what was registered for them, and how to read it."""

    def __init__(self, driver: Driver, parameters: Sequence[Parameter]) -> None:
        if len(parameters) > MAX_PARAMETERS:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API)
        self._driver = driver
        self._parameters = parameters
        self._buffers: dict[int, KernelMemory] = {}
        self._used: list[SharedMemory] = []
        self.params: list[Param] = []
        self.has_memory = False
        for parameter in parameters:
            self.params.append(self._encode(parameter))
        self.params += [NO_PARAM] * (MAX_PARAMETERS - len(parameters))
        for memory in self._used:
            memory.begin_use()

    def _encode(self, parameter: Parameter) -> Param:
        match parameter:
            case Value():
                return encode_value(parameter)
            case None:
                return NO_PARAM
            case Null():
                if SecCapability.MEMREF_NULL in self._driver.capabilities:
                    return encode_null(parameter)
                self.has_memory = True
                return NO_PARAM
            case Temporary():
                self.has_memory = True
                return NO_PARAM
            case Whole():
                memory = parameter.memory
                cookie = self._use(memory)
                return encode_registered(memory.direction, cookie, 0, memory.size)
            case Partial():
                memory, offset, size = parameter.memory, parameter.offset, parameter.size
                inside = min(offset, size) >= 0 and offset + size <= memory.size
                if not inside or parameter.direction & ~memory.direction:
                    raise TeeError(Result.BAD_PARAMETERS, Origin.API)
                return encode_registered(parameter.direction, self._use(memory), offset, size)

    def _use(self, memory: SharedMemory) -> int:
        """Return the cookie of shared memory, which stays until `release`. Raises ValueError."""
        cookie = memory.kernel_memory.cookie
        self.has_memory = True
        self._used.append(memory)
        return cookie

    async def register(self) -> None:
        """Register temporary memory; where one is refused, those before it are taken back."""
        for index, parameter in enumerate(self._parameters):
            if isinstance(parameter, Temporary):
                size = max(parameter.size, len(parameter.data))
            elif isinstance(parameter, Null) and self.params[index] is NO_PARAM:
                size = parameter.size
            else:
                continue
            buffer = _allocate(self._driver, max(size, _LEAST_BUFFER), _MALLOC_HEADER)
            if isinstance(parameter, Temporary):
                buffer.write(parameter.data)
            shm = self._buffers[index] = await _register(self._driver, buffer, allocated=True)
            self.params[index] = encode_registered(parameter.direction, shm.cookie, 0, size)

    async def release(self) -> None:
        """Let go of shared memory and take temporary memory back; a signal does not prevent it."""
        for memory in self._used:
            memory.end_use()
        if not self._buffers:
            return
        driver = self._driver
        with driver.uninterruptible.scope():
            for shm in self._buffers.values():
                await driver.unregister(shm)
                driver.allocator.release(shm.buffer.pages)

    def outputs(self, answer: Answer) -> tuple[Output, ...]:
        """Return what the client's parameters hold now."""
        if not answer.params:
            return ()
        params = answer.params[-MAX_PARAMETERS:]
        return tuple(
            [self._output(index, parameter, params[index]) for index, parameter in enumerate(self._parameters)]
        )

    def _output(self, index: int, parameter: Parameter, param: Param) -> Output:
        if parameter is None:
            return None
        if isinstance(parameter, Value):
            return Values(param.a & _32_BITS, param.b & _32_BITS)
        size = param.b
        if isinstance(parameter, Temporary) and parameter.direction & Direction.OUTPUT:
            buffer = self._buffers[index].buffer
            return MemoryResult(size, buffer.read(0, min(size, buffer.size)))
        return MemoryResult(size)


def _allocate(driver: Driver, size: int, offset: int = 0) -> Buffer:
    try:
        return allocate_buffer(driver.ram, driver.allocator, size, offset)
    except OutOfGuestMemoryError as error:
        raise TeeError(Result.OUT_OF_MEMORY, Origin.API) from error


async def _register(driver: Driver, buffer: Buffer, *, allocated: bool) -> KernelMemory:
    """Register a buffer; libteec makes OUT_OF_MEMORY of any refusal (the cause says what it was)."""
    try:
        return await driver.register(buffer)
    except trio.Cancelled:
        if allocated:
            driver.allocator.release(buffer.pages)
        raise
    except (RegistrationError, OutOfGuestMemoryError) as error:
        if allocated:
            driver.allocator.release(buffer.pages)
        raise TeeError(Result.OUT_OF_MEMORY, Origin.API) from error


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
        operation = _Operation(self._driver, parameters)
        if not operation.has_memory:
            answer = await self._driver.invoke(self.identifier, command, operation.params)
            return _finish(operation, answer)
        try:
            await operation.register()
            answer = await self._driver.invoke(self.identifier, command, operation.params)
            return _finish(operation, answer)
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


def _finish(operation: _Operation, answer: Answer) -> tuple[Output, ...]:
    outputs = operation.outputs(answer)
    if answer.ret != Result.SUCCESS:
        raise TeeError(answer.ret, answer.origin, outputs)
    return outputs


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
        operation = _Operation(self.driver, parameters)
        client = self._identity(login, self.gid if group is None else group)
        try:
            if operation.has_memory:
                await operation.register()
            answer = await self.driver.open_session(ta, operation.params, login=login, client=client)
            session = Session(self, answer.session, _finish(operation, answer))
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
        return _allocate(self.driver, size, offset)

    def free(self, buffer: Buffer) -> None:
        """Give such memory back, after what was registered of it has been released."""
        self.driver.allocator.release(buffer.pages)

    async def register(self, buffer: Buffer, direction: Direction = Direction.INOUT) -> SharedMemory:
        """Share existing memory (TEEC_RegisterSharedMemory); the same twice gives two names. Raises TeeError."""
        shm = await _register(self.driver, buffer, allocated=False)
        return self._remember(SharedMemory(self, shm, buffer.size, direction, allocated=False))

    async def allocate(self, size: int, direction: Direction = Direction.INOUT) -> SharedMemory:
        """Allocate whole pages and share them (TEEC_AllocateSharedMemory). Raises TeeError."""
        buffer = self.buffer(max(size, _LEAST_BUFFER))
        shm = await _register(self.driver, buffer, allocated=True)
        return self._remember(SharedMemory(self, shm, size, direction, allocated=True))

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
