from collections.abc import Callable, Iterator

import pytest

from hv_models.machine import Machine, RamBlock
from hv_models.vm import VirtualMachine

Create = Callable[..., VirtualMachine]


def whole(data: bytes) -> tuple[bytes, list[slice]]:
    """Data, and the one field that is all of it."""
    return data, [slice(0, len(data))]


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(params=["kvm", "xen"])
def create(machine: Machine, request: pytest.FixtureRequest) -> Create:
    creates: dict[str, Create] = {"kvm": machine.create_kvm, "xen": machine.create_xen}
    return creates[request.param]


@pytest.fixture
def vm(create: Create) -> VirtualMachine:
    return create("guest", 4 << 20)


@pytest.fixture
def two_region_vm(create: Create) -> VirtualMachine:
    return create("guest", [RamBlock(0x4000_0000, 1 << 20), RamBlock(0x1_0000_0000, 2 << 20)])
