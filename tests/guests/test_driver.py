"""The driver's own calls: probe, argument pages, device enumeration, unload."""

from uuid import UUID

import pytest
import trio

from guests import Driver, ProbeError, RegistrationError, Supplicant, boot
from guests import open as open_guest
from guests.driver import DEVICE_ENUMERATION
from guests.memory import Buffer
from hv_models.memory import PAGE_SIZE
from optee.abi.message import Command, Message, ParamType
from optee.abi.results import Origin, Result
from optee.abi.smc import Function, Registers, ReturnCode, SecCapability
from tests.guests.secure import (
    ASK_SLEEP,
    ASK_TIME,
    INTERRUPT,
    RPC_ARG_CAPABILITIES,
    XEN_CAPABILITIES,
    SecureSide,
    Steps,
    make_ram,
)

ENUMERATE = ["OPEN_SESSION [101 101]", "INVOKE_COMMAND [a 0 0 0]", "CLOSE_SESSION []"]


async def test_probe_with_rpc_arg() -> None:
    side = SecureSide(make_ram())
    driver = Driver(side.ram, side)
    await driver.probe()
    assert side.log == [
        "CALLS_UID",
        "GET_OS_REVISION",
        "CALLS_REVISION",
        "EXCHANGE_CAPABILITIES",
        "ENABLE_ASYNC_NOTIF",
        "DISABLE_SHM_CACHE",
        "CALL_WITH_RPC_ARG REGISTER_SHM [20a]",
        *[f"CALL_WITH_REGD_ARG {call}" for call in ENUMERATE],
    ]
    side.log.clear()
    await driver.remove()
    assert side.log == ["CALL_WITH_REGD_ARG STOP_ASYNC_NOTIF []", "CALL_WITH_RPC_ARG UNREGISTER_SHM [5]"]
    assert side.idle and driver.allocator.used == 0


async def test_probe_without_rpc_arg() -> None:
    side = SecureSide(make_ram(), XEN_CAPABILITIES)
    driver = Driver(side.ram, side)
    await driver.probe()
    assert side.log == [
        "CALLS_UID",
        "GET_OS_REVISION",
        "CALLS_REVISION",
        "EXCHANGE_CAPABILITIES",
        "DISABLE_SHM_CACHE",
        "ENABLE_SHM_CACHE",
        *[f"CALL_WITH_ARG {call}" for call in ENUMERATE],
    ]
    side.log.clear()
    await driver.remove()
    assert side.log == ["DISABLE_SHM_CACHE"]
    assert side.idle and driver.allocator.used == 0


async def test_rpc_arguments_in_the_cache_are_freed_at_unload() -> None:
    def asks(side: SecureSide, message: Message) -> Steps:
        yield ASK_TIME
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), XEN_CAPABILITIES, default=asks)
    driver = Driver(side.ram, side)
    await driver.probe()
    assert side.log.count("ALLOC") == 1 and len(side.cache) == 1
    await driver.remove()
    assert side.log[-2:] == ["DISABLE_SHM_CACHE", "DISABLE_SHM_CACHE"]
    assert side.idle and driver.allocator.used == 0


@pytest.mark.parametrize("capabilities", [RPC_ARG_CAPABILITIES, XEN_CAPABILITIES])
async def test_power_off(capabilities: SecCapability) -> None:
    side = SecureSide(make_ram(), capabilities)
    driver = Driver(side.ram, side)
    await driver.probe()
    side.log.clear()
    await driver.shutdown()
    assert side.log == ([] if capabilities & SecCapability.RPC_ARG else ["DISABLE_SHM_CACHE"])


async def test_cookies_of_an_earlier_kernel_are_not_followed() -> None:
    side = SecureSide(make_ram(), XEN_CAPABILITIES)
    side.cache = [(0, 0xFFFF0000DEAD0000), (0, 0xFFFF0000BEEF0000)]
    driver = Driver(side.ram, side)
    await driver.probe()
    assert side.log.count("DISABLE_SHM_CACHE") == 3


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (Function.CALLS_UID, (0xFFFF_FFFF_FFFF_FFFF, 0, 0, 0)),
        (Function.CALLS_REVISION, (1, 0, 0, 0)),
        (Function.CALLS_REVISION, (3, 0, 0, 0)),
        (Function.EXCHANGE_CAPABILITIES, (ReturnCode.ENOTAVAIL, 0, 0, 0)),
        (Function.EXCHANGE_CAPABILITIES, (0, SecCapability.HAVE_RESERVED_SHM, 0, 0)),
    ],
)
async def test_probe_refuses_what_linux_cannot_use(function: Function, answer: Registers) -> None:
    class Other(SecureSide):
        def _fast(self, asked: int) -> Registers:
            return answer if asked == function else super()._fast(asked)

    side = Other(make_ram())
    with pytest.raises(ProbeError):
        async with open_guest(side.ram, side):
            pass
    assert "DISABLE_SHM_CACHE" not in side.log


async def test_devices_are_enumerated_again_when_the_supplicant_starts() -> None:
    devices = [UUID(int=7), UUID(int=8)]

    def enumeration(side: SecureSide, message: Message) -> Steps:
        if message.cmd == Command.INVOKE_COMMAND:
            octets = devices[message.func].bytes
            param = message.params[0]
            message.params[0] = param._replace(b=len(octets))
            if param.attr == ParamType.TMEM_OUTPUT:
                return Result.SHORT_BUFFER, Origin.TRUSTED_APP
            side.put(side.shared[param.c], octets)
        return Result.SUCCESS, Origin.TRUSTED_APP
        yield

    side = SecureSide(make_ram(), tas={DEVICE_ENUMERATION: enumeration})
    driver = Driver(side.ram, side)
    await driver.probe()
    assert driver.devices == devices[:1]
    await driver.start_supplicant(Supplicant())
    assert driver.devices == devices
    driver.stop_supplicant()
    side.log.clear()
    await driver.start_supplicant(Supplicant())
    assert side.log == []
    with pytest.raises(ValueError, match="runs already"):
        await driver.start_supplicant(Supplicant())
    assert len(side.shared) == 1


def waits(side: SecureSide, message: Message) -> Steps:
    """A TA whose command sleeps 100 ms."""
    if message.cmd == Command.INVOKE_COMMAND:
        yield ASK_SLEEP
    return Result.SUCCESS, Origin.TRUSTED_APP


async def test_ten_messages_share_a_registered_page(autojump_clock: trio.testing.MockClock) -> None:
    side = SecureSide(make_ram(), threads=32, default=waits)
    async with boot(side.ram, side, vcpus=32) as guest:
        session = (await guest.driver.open_session(UUID(int=1))).session
        side.log.clear()
        side.regs.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(11):
                nursery.start_soon(guest.driver.invoke, session, 0)
        assert side.log.count("CALL_WITH_RPC_ARG REGISTER_SHM [20a]") == 1
        calls = [regs for regs in side.regs if regs[0] == Function.CALL_WITH_REGD_ARG]
        places = {(regs[1:3], regs[3]) for regs in calls}
        assert len(calls) == len(places) == 11
        assert sorted(offset for _, offset in places) == [0, 0, *range(384, 3840, 384)]
        side.log.clear()
        await guest.driver.close_session(session)
    assert side.log[-2:] == ["CALL_WITH_RPC_ARG UNREGISTER_SHM [5]"] * 2


async def test_without_rpc_arg_a_page_carries_one_message(autojump_clock: trio.testing.MockClock) -> None:
    side = SecureSide(make_ram(), XEN_CAPABILITIES, threads=8, default=waits)
    async with boot(side.ram, side, vcpus=8) as guest:
        session = (await guest.driver.open_session(UUID(int=1))).session
        side.regs.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(guest.driver.invoke, session, 0)
        places = [regs[1:4] for regs in side.regs if regs[0] == Function.CALL_WITH_ARG]
        assert len(set(places)) == 5
        assert all(lower % PAGE_SIZE == 0 and offset == 0 for _, lower, offset in places)
        await guest.driver.close_session(session)
    assert guest.driver.allocator.used == 0


async def test_an_error_in_a0_is_a_communication_error() -> None:
    side = SecureSide(make_ram())
    async with boot(side.ram, side) as guest:
        side.fails_with = ReturnCode.EBADADDR
        answer = await guest.driver.invoke(1, 0)
        assert (answer.ret, answer.origin, answer.status) == (
            Result.COMMUNICATION,
            Origin.COMMS,
            ReturnCode.EBADADDR,
        )
        side.fails_with = 0


async def test_refused_registration_leaves_nothing_behind() -> None:
    side = SecureSide(make_ram(), max_pages=4)
    async with boot(side.ram, side) as guest:
        driver = guest.driver
        before = driver.statistics()
        page = driver.allocator.page()
        with pytest.raises(RegistrationError) as refused:
            await driver.register(Buffer(driver.ram, (page,) * 5, 5 * PAGE_SIZE))
        assert refused.value.result == Result.OUT_OF_MEMORY
        with pytest.raises(RegistrationError):
            await driver.allocate_shared(5 * PAGE_SIZE)
        driver.allocator.release((page,))
        after = driver.statistics()
        assert (after.pages_used, after.shared_memory_objects) == (
            before.pages_used,
            before.shared_memory_objects,
        )


async def test_vcpus_bound_the_smcs_in_execution(autojump_clock: trio.testing.MockClock) -> None:
    def busy(side: SecureSide, message: Message) -> Steps:
        for _ in range(5):
            yield INTERRUPT
        return Result.SUCCESS, Origin.TRUSTED_APP

    side = SecureSide(make_ram(), threads=16, default=busy)
    async with boot(side.ram, side, vcpus=3) as guest:
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(guest.driver.open_session, UUID(int=1))
        assert side.peak == 3
        assert guest.driver.statistics().foreign_interrupts >= 12 * 5
