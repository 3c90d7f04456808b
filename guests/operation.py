"""One operation of a client: its parameters on their way into a message and back.

Source: GlobalPlatform TEE Client API Specification 1.0, section 4.3.7 (TEEC_Operation); libteec for what it shares.
"""

from collections.abc import Sequence
from typing import Final

import trio

from guests.calls import Answer
from guests.client_memory import Direction, SharedMemory
from guests.driver import Driver
from guests.errors import OutOfGuestMemoryError, RegistrationError
from guests.memory import Buffer, allocate_buffer
from guests.parameters import (
    MAX_PARAMETERS,
    NO_PARAM,
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
from optee.abi.message import Param
from optee.abi.registers import name_of
from optee.abi.results import Origin, Result
from optee.abi.smc import SecCapability

LEAST_BUFFER: Final = 8
"""Bytes that libteec shares where a size of 0 is asked."""

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


class Operation:
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
            buffer = allocate_memory(self._driver, max(size, LEAST_BUFFER), _MALLOC_HEADER)
            if isinstance(parameter, Temporary):
                buffer.write(parameter.data)
            shm = self._buffers[index] = await register_memory(self._driver, buffer, allocated=True)
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

    def finish(self, answer: Answer) -> tuple[Output, ...]:
        """Return what the client's parameters hold now. Raises TeeError unless OP-TEE answered with success."""
        outputs = self._outputs(answer)
        if answer.ret != Result.SUCCESS:
            raise TeeError(answer.ret, answer.origin, outputs)
        return outputs

    def _outputs(self, answer: Answer) -> tuple[Output, ...]:
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


def allocate_memory(driver: Driver, size: int, offset: int = 0) -> Buffer:
    """Take zeroed pages of the guest's RAM. Raises TeeError, as libteec does when malloc fails."""
    try:
        return allocate_buffer(driver.ram, driver.allocator, size, offset)
    except OutOfGuestMemoryError as error:
        raise TeeError(Result.OUT_OF_MEMORY, Origin.API) from error


async def register_memory(driver: Driver, buffer: Buffer, *, allocated: bool) -> KernelMemory:
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
