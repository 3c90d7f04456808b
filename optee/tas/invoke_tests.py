"""Invoke tests pseudo TA, which xtest 1001, 1002, 1003 and 1025 call.

The self tests of a real core are not modelled: they answer success. Tests of SDP memory, lockdep and the
like are not in this build and answer BAD_PARAMETERS.
"""

from __future__ import annotations

from uuid import UUID

from optee.abi.results import Result, TaFlag
from optee.tee import Tee
from optee.trusted_application import (
    WORK,
    Memref,
    ParamKind,
    Params,
    PseudoTa,
    Steps,
    TeeError,
    Value,
    command,
)
from optee.wait_queue import Mutex

_WRITER, _READER = range(2)
_LOOPS_PER_PORTION = 50_000  # of the delay loop between two moments at which interrupts come in


class InvokeTests(PseudoTa):
    """PARAMS, SELF_TESTS, MUTEX, MEMREF_NULL, DT_DRIVER_TESTS and TRANSFER_LIST_TESTS."""

    uuid = UUID("d96a5b40-c3e5-21e3-8794-1002a5d5c61b")
    flags = PseudoTa.flags | TaFlag.CONCURRENT

    def __init__(self) -> None:
        self._mutex = Mutex()
        self._before_lock = 0
        self._inside_lock = 0

    @command(0)
    def trace(self, tee: Tee) -> None:
        """Print something."""
        tee.thread.partition.world.log('I/TC: pseudo TA "invoke_tests.pta" says "Hello world !"')

    def invoke(self, tee: Tee, number: int, params: Params) -> int | Steps[int | None] | None:
        """PARAMS takes several shapes; the other commands one each."""
        if number != 1:
            return super().invoke(tee, number, params)
        first = params[0]
        if any(param is not None for param in params[1:]):
            raise TeeError(Result.BAD_PARAMETERS)
        if isinstance(first, Value) and first.kind == ParamKind.VALUE_INOUT:
            first.a = (first.a + first.b) & 0xFFFFFFFF
        elif isinstance(first, Memref) and first.kind == ParamKind.MEMREF_INOUT and first.capacity:
            first.write(bytes([sum(first.read()) & 0xFF]))
        else:
            raise TeeError(Result.BAD_PARAMETERS)
        return None

    @command(2)
    def self_tests(self, tee: Tee) -> Steps[None]:
        """Test the core: long work."""
        yield from tee.work(4)

    @command(7, ParamKind.VALUE_INPUT, ParamKind.VALUE_OUTPUT)
    def mutex(self, tee: Tee, request: Value, concurrency: Value) -> Steps[None]:
        """Take the test mutex as writer (0) or reader (1) for a delay of `b` loops.

        Answers how many threads were before the lock and inside it, this one included.
        """
        if request.a not in (_WRITER, _READER):
            raise TeeError(Result.BAD_PARAMETERS)
        thread = tee.thread
        self._before_lock += 1
        concurrency.a = self._before_lock
        if request.a == _WRITER:
            yield from self._mutex.lock(thread)
        else:
            yield from self._mutex.read_lock(thread)
        self._inside_lock += 1
        concurrency.b = self._inside_lock
        for _ in range(min(request.b, 1 << 24) // _LOOPS_PER_PORTION + 1):
            yield WORK
        self._inside_lock -= 1
        yield from self._mutex.unlock(thread)
        self._before_lock -= 1

    @command(10, ParamKind.MEMREF_INOUT)
    def memref_null(self, tee: Tee, reference: Memref) -> None:
        """Succeed for a NULL reference of size 0."""
        if not reference.is_null or reference.size:
            raise TeeError(Result.BAD_PARAMETERS)

    @command(11)
    def dt_driver_tests(self, tee: Tee) -> None:
        """Test device tree drivers."""

    @command(12)
    def transfer_list_tests(self, tee: Tee) -> None:
        """Not built in."""
        raise TeeError(Result.NOT_SUPPORTED)
