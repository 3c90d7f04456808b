"""Workloads against a scripted secure side: what they count."""

import pytest
import trio
from trio.testing import MockClock

import guests
from guests.workloads import WORKLOADS, Report, hello, mixed, ramp, shm
from guests.workloads.applications import (
    AES,
    EXERCISE,
    HELLO_WORLD,
    RANDOM,
    SECURE_STORAGE,
    Aes,
    Exercise,
    SecureStorage,
)
from guests.workloads.ramp import OPERATIONS
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Registers, SecCapability
from tests.guests.secure import (
    ASK_SLEEP,
    RPC_ARG_CAPABILITIES,
    XEN_CAPABILITIES,
    Ask,
    SecureSide,
    Steps,
    echo,
    make_ram,
)

REFUSED = {
    "forged client id",
    "GET_SHM_CONFIG",
    "VM_CREATED",
    "VM_DESTROYED",
    "BOOT_SECONDARY",
    "L2CC_MUTEX",
    "LOAD_IMAGE",
    "quota",
}
both = pytest.mark.parametrize("capabilities", [RPC_ARG_CAPABILITIES, XEN_CAPABILITIES])


def random(side: SecureSide, message: Message) -> Steps:
    if message.cmd == Command.INVOKE_COMMAND and message.params[0].attr == ParamType.RMEM_OUTPUT:
        _, offset, size, cookie = message.params[0]
        side.put(side.shared[cookie], b"\x11" * size, offset)
    return Result.SUCCESS, Origin.TRUSTED_APP
    yield


def aes(side: SecureSide, message: Message) -> Steps:
    """The worst cipher: it inverts."""
    if message.cmd == Command.INVOKE_COMMAND and message.func == Aes.CIPHER:
        (_, offset, size, cookie), target = message.params[0], message.params[1]
        data = side.bytes_of(side.shared[cookie], offset, size)
        side.put(side.shared[target.c], bytes(~byte & 0xFF for byte in data), target.a)
    return Result.SUCCESS, Origin.TRUSTED_APP
    yield


class SecureStorageTa:
    """Keeps objects by the bytes of their names."""

    def __init__(self) -> None:
        self.objects: dict[bytes, bytes] = {}

    def __call__(self, side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            name, *rest = [
                side.bytes_of(side.shared[cookie], offset, size) if size else b""
                for _, offset, size, cookie in message.params
            ]
            if message.func == SecureStorage.WRITE_RAW:
                self.objects[name] = rest[0]
            elif message.func == SecureStorage.DELETE:
                del self.objects[name]
            else:
                data, target = self.objects[name], message.params[1]
                side.put(side.shared[target.c], data, target.a)
                message.params[1] = target._replace(b=len(data))
        return Result.SUCCESS, Origin.TRUSTED_APP
        yield


class ExerciseTa:
    """Waits that can be cancelled, panics."""

    def __init__(self) -> None:
        self.cancelled: set[int] = set()
        self.dead: set[int] = set()

    def __call__(self, side: SecureSide, message: Message) -> Steps:
        session = message.session
        if message.cmd == Command.CANCEL:
            self.cancelled.add(session)
        elif message.cmd == Command.OPEN_SESSION:
            self.cancelled.discard(session)
            self.dead.discard(session)
        elif message.cmd == Command.INVOKE_COMMAND:
            if message.func == Exercise.PANIC:
                self.dead.add(session)
            if session in self.dead:
                return Result.TARGET_DEAD, Origin.TEE
            yield Ask(RpcCommand.SUSPEND, [Param(ParamType.VALUE_INPUT, message.params[0].a)])
            if session in self.cancelled:
                return Result.CANCEL, Origin.TRUSTED_APP
        return Result.SUCCESS, Origin.TRUSTED_APP


def make_side(capabilities: SecCapability = RPC_ARG_CAPABILITIES) -> SecureSide:
    tas = {HELLO_WORLD: echo, RANDOM: random, AES: aes, EXERCISE: ExerciseTa(), SECURE_STORAGE: SecureStorageTa()}
    return SecureSide(make_ram(4096), capabilities, threads=8, tas=tas, max_pages=16384)


@both
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "ramp"])
async def test_everything_is_as_expected(name: str, capabilities: SecCapability, autojump_clock: MockClock) -> None:
    side = make_side(capabilities)
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await WORKLOADS[name](guest, report, rounds=2)
    assert report.notes == [] and report.errors == 0
    assert report.absent == set()
    assert set(report.refusals) >= REFUSED
    assert report.invokes >= 3
    assert side.idle and guest.driver.allocator.used == 0


async def test_mixed_does_what_it_says(autojump_clock: MockClock) -> None:
    side = make_side()
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await mixed(guest, report, rounds=1)
        assert guest.driver.statistics().thread_limits > 0, "more callers than threads"
    for name in (
        "hello_world INC_VALUE",
        "random GENERATE",
        "aes there and back",
        "secure_storage there and back",
        "cancelled wait",
        "panic",
    ):
        assert report.tried[name] > 0


async def test_absent_tas_are_left_out_and_named() -> None:
    def missing(side: SecureSide, message: Message) -> Steps:
        return Result.ITEM_NOT_FOUND, Origin.TEE
        yield

    side = make_side()
    side.tas = {RANDOM: missing, AES: missing, EXERCISE: missing, SECURE_STORAGE: missing, HELLO_WORLD: echo}
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await mixed(guest, report, rounds=1)
        await shm(guest, report, rounds=3)
    assert report.errors == 0 and report.absent == {"random", "aes", "exercise", "secure_storage"}


async def test_wrong_answers_are_errors() -> None:
    def wrong(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            message.params[0] = message.params[0]._replace(a=99)
        return Result.SUCCESS, Origin.TRUSTED_APP
        yield

    side = make_side()
    side.tas[HELLO_WORLD] = wrong
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await hello(guest, report, rounds=4)
    assert report.errors == 4 and report.notes == ["hello_world INC_VALUE: wrong answer"]


async def test_what_is_not_refused_is_an_error() -> None:
    class Open(SecureSide):
        """A mediator that lets everything through, to an OP-TEE that knows no other client than 1."""

        def _dispatch(self, regs: Registers) -> Registers:
            if regs[7]:
                return (7,)
            return super()._dispatch(regs)

        def _fast(self, function: int) -> Registers:
            answer = super()._fast(function)
            return (0,) if answer[0] in (7, 0xFFFF_FFFF_FFFF_FFFF) and function != 0xB200000A else answer

    side = Open(make_ram(2048))
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await hello(guest, report, rounds=1)
    assert report.errors == len(REFUSED) and not report.refusals
    assert side.idle and guest.driver.allocator.used == 0


async def test_ramp_finds_the_threads(autojump_clock: MockClock) -> None:
    """With 8 threads and 100 ms an operation, 16 callers wait twice as long."""

    def slow(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            yield ASK_SLEEP
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = make_side()
    side.tas[HELLO_WORLD] = slow
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await ramp(guest, report, p99_limit=0.15)
    assert report.knee is not None
    assert (report.knee.callers, report.knee.bound) == (8, "p99")
    assert report.knee.rate == pytest.approx(80)
    assert [step.callers for step in report.steps] == [1, 2, 4, 8, 16]
    assert report.invokes == OPERATIONS * 31 and report.errors == 0


async def test_ramp_finds_the_quota() -> None:
    class Quota(SecureSide):
        def _register(self, param: Param) -> int:
            return Result.OUT_OF_MEMORY if len(self.shared) > 5 else super()._register(param)

    side = Quota(make_ram(4096), threads=32)
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await ramp(guest, report, p99_limit=60)
    assert report.knee is not None
    assert (report.knee.callers, report.knee.bound) == (4, "refusals")
    assert report.errors == 0 and report.refusals["load"] > 0


async def test_ramp_ends_without_a_knee() -> None:
    side = make_side()
    report = Report()
    async with guests.open(side.ram, side) as guest:
        await ramp(guest, report, rounds=2, p99_limit=60)
    assert report.knee is not None and report.knee.bound == "callers"


@pytest.mark.parametrize("name", WORKLOADS)
async def test_a_workload_can_be_stopped(name: str, autojump_clock: MockClock) -> None:
    side = make_side()
    report = Report()

    class Slow(SecureSide):
        async def call(self, vcpu: int, regs: Registers) -> Registers:
            await trio.sleep(0.001)
            return await super().call(vcpu, regs)

    side = Slow(side.ram, threads=8, tas=side.tas, max_pages=16384)
    async with guests.open(side.ram, side) as guest:
        with trio.move_on_after(1):
            await WORKLOADS[name](guest, report)
    assert report.invokes > 100 and report.errors == 0
    assert side.idle and guest.driver.allocator.used == 0
