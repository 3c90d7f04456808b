"""The driver's calls, against a scripted secure side."""

import pytest

import guests
from guests.driver import DEVICE_ENUMERATION, Driver
from guests.errors import ProbeError
from optee.abi.smc import SecCapability
from tests.guests.secure import RPC_ARG_CAPABILITIES, XEN_CAPABILITIES, SecureSide, make_ram
from guests.workloads import Report, hello


@pytest.mark.parametrize("capabilities", [RPC_ARG_CAPABILITIES, XEN_CAPABILITIES])
async def test_hello(capabilities: SecCapability) -> None:
    ram = make_ram()
    side = SecureSide(ram, capabilities)
    report = Report()
    async with guests.open(ram, side) as guest:
        await hello(guest, report, rounds=5)
        print(side.log)
        print(report)
        print(guest.driver.statistics())
    print(side.log)
    assert side.idle
    assert guest.driver.allocator.used == 0
