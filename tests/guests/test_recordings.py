"""The same sequence of calls as the real driver's, recording by recording."""

from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest

from guests import Direction, Driver, Guest, Supplicant, TeeError, Temporary, Value, Values
from guests.files import MemoryFiles
from guests.workloads.applications import HELLO_WORLD, INVOKE_TESTS, RANDOM
from optee.abi.results import Result
from tests.guests.recording import RecordedSide, flatten, image_sizes, sections
from tests.guests.secure import make_ram
from tests.shared import needs_shared

pytestmark = needs_shared
Client = Callable[[Guest], Awaitable[None]]


async def supplicant(guest: Guest) -> None:
    """Start tee-supplicant, with images and files as large as the recorded ones."""
    files = MemoryFiles()
    files.content["0",] = bytearray(1 << 20)
    parts = {**sections("native"), **sections("xen")}
    images = {UUID(bytes=octets): bytes(size) for octets, size in image_sizes(list(flatten(parts))).items()}

    class KeepsContent(MemoryFiles):
        """A recording does not say what is in files, so CREATE must not empty the one that stands for all."""

        def open(self, path, *, create):
            return files.open(path, create=False)

    await guest.driver.start_supplicant(Supplicant(images, files=KeepsContent()))


async def hello_world(guest: Guest) -> None:
    async with guest.context() as context, await context.open_session(HELLO_WORLD) as session:
        assert await session.invoke(0, Value(42)) == (Values(43, 0),)


async def random(guest: Guest) -> None:
    async with guest.context() as context, await context.open_session(RANDOM) as session:
        (output,) = await session.invoke(0, Temporary(size=16, direction=Direction.OUTPUT))
        assert output is not None and output.size == 16


async def xtest_1001(guest: Guest) -> None:
    async with guest.context() as context, await context.open_session(INVOKE_TESTS) as session:
        await session.invoke(2)
        await session.invoke(11)
        with pytest.raises(TeeError) as refused:
            await session.invoke(12)
        assert refused.value.result == Result.NOT_SUPPORTED


async def xtest_1002(guest: Guest) -> None:
    async with guest.context() as context, await context.open_session(INVOKE_TESTS) as session:
        (output,) = await session.invoke(1, Temporary(bytes(range(256)) * 64))
        assert output is not None and output.size == 0x4000


RECORDINGS = {
    "native": {
        "probe": None,
        "supplicant": supplicant,
        "hello_world": hello_world,
        "hello_world_again": hello_world,
        "random_example": random,
        "xtest_1001": xtest_1001,
        "xtest_1002": xtest_1002,
    },
    "xen": {
        "xen_probe": None,
        "xen_supplicant": supplicant,
        "xen_hello_world": hello_world,
        "xen_hello_world_again": hello_world,
    },
}


@pytest.mark.parametrize("recording", RECORDINGS)
async def test_same_sequence(recording: str) -> None:
    parts = sections(recording)
    ram = make_ram()
    side = RecordedSide(ram)
    guest = None
    for mark, client in RECORDINGS[recording].items():
        side.expect(parts[mark])
        if client is None:
            driver = Driver(ram, side)
            await driver.probe()
            guest = Guest("recorded", "smc", driver)
        else:
            await client(guest)
        side.finish()
        print(mark, side.compared)
