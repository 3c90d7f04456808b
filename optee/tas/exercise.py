"""TAs for tests and scenarios: they panic, wait, recurse, eat memory and stack, in every kind of instance."""

from __future__ import annotations

from uuid import UUID, uuid5

from optee.abi.results import TaFlag
from optee.memory.profile import SET_UPS, TaProfile
from optee.parameters import PrivateBuffer
from optee.set_ups import SetUp
from optee.tee import Allocation, Tee
from optee.trusted_application import (
    Memref,
    ParamKind,
    Steps,
    TeeError,
    TrustedApplication,
    Value,
    command,
)

_SINGLE_MULTI = TaFlag.SINGLE_INSTANCE | TaFlag.MULTI_SESSION
_KEPT = _SINGLE_MULTI | TaFlag.INSTANCE_KEEP_ALIVE
_CANARY_BUFFER = 64  # bytes


class ExerciseTa(TrustedApplication):
    """An instance for each session."""

    uuid = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b01")
    stack_size = 4096

    def __init__(self) -> None:
        self.counter = 0
        self.kept: list[Allocation] = []
        self.set_ups: list[SetUp] = []

    @command(0, ParamKind.VALUE_INPUT)
    def panic(self, tee: Tee, code: Value) -> None:
        """Panic with the code `a`."""
        tee.panic(code.a)

    @command(1, ParamKind.VALUE_INPUT)
    def wait(self, tee: Tee, time: Value) -> Steps[None]:
        """Wait `a` milliseconds; with `b` the wait can be cancelled."""
        if time.b:
            tee.unmask_cancellation()
        yield from tee.wait(time.a)

    @command(2, ParamKind.VALUE_INOUT)
    def recurse(self, tee: Tee, depth: Value) -> Steps[None]:
        """Call itself in a new session, `a` times inside each other; `b` counts the levels reached."""
        if not depth.a:
            return
        session = yield from tee.open_ta_session(self.uuid)
        inner = Value(depth.a - 1)
        failure: TeeError | None = None
        try:
            yield from tee.invoke_ta(session, 2, (inner, None, None, None))
        except TeeError as error:
            failure = error
        yield from tee.close_ta_session(session)
        if failure is not None:
            raise failure
        depth.b = inner.b + 1

    @command(3, ParamKind.VALUE_INPUT)
    def allocate(self, tee: Tee, request: Value) -> None:
        """Take `a` bytes of heap; with `b` keep them."""
        allocation = tee.malloc(request.a)
        if request.b:
            self.kept.append(allocation)
        else:
            allocation.free()

    @command(4, ParamKind.VALUE_INPUT)
    def use_stack(self, tee: Tee, size: Value) -> None:
        """Use `a` more bytes of stack: too many are a data abort."""
        with tee.stack(size.a):
            return

    @command(5, ParamKind.MEMREF_INPUT)
    def overrun(self, tee: Tee, data: Memref) -> None:
        """Copy the input into an array of 64 bytes on the stack without looking at its size."""
        with tee.stack_buffer(_CANARY_BUFFER) as array:
            array.write(data.read())

    @command(6, ParamKind.VALUE_INPUT)
    def work(self, tee: Tee, portions: Value) -> Steps[None]:
        """Compute for `a` portions, at most 65535."""
        yield from tee.work(portions.a & 0xFFFF)

    @command(7, ParamKind.VALUE_INOUT)
    def count(self, tee: Tee, total: Value) -> None:
        """Add `a` to the instance's counter and answer its value."""
        self.counter = (self.counter + total.a) & 0xFFFFFFFF
        total.a = self.counter

    @command(8, ParamKind.MEMREF_INPUT, ParamKind.MEMREF_OUTPUT)
    def copy(self, tee: Tee, source: Memref, target: Memref) -> None:
        """Copy the input to the output."""
        target.put(source.read())

    @command(9, ParamKind.VALUE_INPUT, ParamKind.VALUE_INOUT)
    def call_other(self, tee: Tee, which: Value, number: Value) -> Steps[None]:
        """Invoke command `which.b` of the TA `CALLEES[which.a]`; the number goes there and back."""
        session = yield from tee.open_ta_session(CALLEES[which.a % len(CALLEES)])
        failure: TeeError | None = None
        try:
            yield from tee.invoke_ta(session, which.b, (number, None, None, None))
        except TeeError as error:
            failure = error
        yield from tee.close_ta_session(session)
        if failure is not None:
            raise failure

    @command(10, ParamKind.VALUE_OUTPUT)
    def ree_time(self, tee: Tee, time: Value) -> Steps[None]:
        """Seconds and milliseconds of the normal world's clock."""
        time.a, nanoseconds = yield from tee.ree_time()
        time.b = nanoseconds // 1_000_000

    @command(11, ParamKind.VALUE_INPUT)
    def fail(self, tee: Tee, result: Value) -> int:
        """Return the result `a`."""
        return result.a

    @command(12, ParamKind.MEMREF_INOUT)
    def copy_through(self, tee: Tee, data: Memref) -> Steps[None]:
        """Have another instance copy the data, through private memory."""
        session = yield from tee.open_ta_session(self.uuid)
        content = data.read()
        target = PrivateBuffer(bytes(len(content)))
        arguments = (
            Memref(PrivateBuffer(content), 0, len(content), ParamKind.MEMREF_INPUT),
            Memref(target, 0, len(content), ParamKind.MEMREF_OUTPUT),
            None,
            None,
        )
        yield from tee.invoke_ta(session, 8, arguments)
        yield from tee.close_ta_session(session)
        data.put(bytes(target.data))

    @command(13, ParamKind.MEMREF_INOUT)
    def take(self, tee: Tee, data: Memref) -> None:
        """Take a buffer and leave it alone: what then is measured is the way of the buffer."""

    @command(14, ParamKind.VALUE_INPUT, ParamKind.VALUE_OUTPUT)
    def set_up(self, tee: Tee, what: Value, made: Value) -> None:
        """Allocate and keep `b` set-ups of kind `SET_UPS[a]`; the output counts them, also where memory ends."""
        kind = SET_UPS[what.a % len(SET_UPS)]
        for made.a in range(what.b):
            self.set_ups.append(tee.set_up(kind))
        made.a = what.b

    @command(15)
    def let_go(self, tee: Tee) -> None:
        """Free all set-ups of the instance."""
        while self.set_ups:
            self.set_ups.pop().free()

    @command(16, *[ParamKind.MEMREF_INOUT] * 4)
    def swap(self, tee: Tee, *parts: Memref) -> None:
        """Write into each of four buffers what the one before held, and into the first what the last held."""
        contents = [part.read() for part in parts]
        for part, content in zip(parts, contents[-1:] + contents[:-1], strict=True):
            part.put(content[: part.capacity])


class SingleInstanceTa(ExerciseTa):
    """One instance for all sessions (SINGLE_INSTANCE, MULTI_SESSION)."""

    uuid = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b02")
    flags = _SINGLE_MULTI


class SingleSessionTa(ExerciseTa):
    """One instance with one session; a second open is BUSY."""

    uuid = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b03")
    flags = TaFlag.SINGLE_INSTANCE


class KeepAliveTa(ExerciseTa):
    """One instance that outlives its sessions."""

    uuid = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b04")
    flags = _KEPT


class KeepCrashedTa(ExerciseTa):
    """One instance that is kept even when it has panicked."""

    uuid = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b05")
    flags = _KEPT | TaFlag.INSTANCE_KEEP_CRASHED


class BigHeapTa(ExerciseTa):
    """16 MiB of heap."""

    uuid = UUID("9d5b2f10-7a3c-4d31-8c5e-0a6d1f2e3b06")
    data_size = 16 << 20


def sized_ta(profile: TaProfile) -> type[ExerciseTa]:
    """A TA with the commands of these and the sizes of a profile; its UUID follows from the profile's name."""
    flags = _SINGLE_MULTI if profile.single_instance else TaFlag(0)
    sizes = {"stack_size": profile.stack, "code_size": profile.code, "data_size": profile.heap or 0}
    return type("SizedTa", (ExerciseTa,), {"uuid": uuid5(ExerciseTa.uuid, profile.name), "flags": flags, **sizes})


CALLEES = (ExerciseTa.uuid, SingleInstanceTa.uuid, UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b"))
"""TAs that `call_other` can call."""
