"""What the arithmetic predicts is what the model does: it works at each limit, and beyond it fails as predicted."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mediator.sizing.verify import Client, verify, verify_load
from optee.memory.boards import BOARDS
from optee.memory.build import KIB, MIB, Build
from optee.memory.profile import MAP_OF_7077, SET_UPS, SMALL_TA, TEST_PROGRAM, TaProfile
from optee.memory.sizing import Load, Sizing, size

builds = st.builds(
    Build,
    threads=st.integers(1, 48),
    heap=st.integers(3, 80).map(lambda pages: pages * 4096),
    nexus_heap=st.integers(4, 24).map(lambda kib: kib * KIB),
    best_fit=st.booleans(),
    prealloc=st.booleans(),
    table_entries=st.none() | st.integers(1, 60),
    lpae=st.integers(0, 3).map(bool),
    virtualization=st.integers(0, 5).map(bool),
    guest_count=st.integers(1, 4),
    secure_ram=st.none() | st.integers(6, 256).map(lambda mib: mib * MIB),
    bignum_bits=st.sampled_from([2048, 4096]),
    dynamic_shm=st.integers(0, 7).map(bool),
    dynamic_config=st.booleans(),
)
profiles = st.builds(
    TaProfile,
    name=st.just("TA"),
    code=st.integers(1, 2 * MIB),
    stack=st.integers(1, 4 * MIB),
    heap=st.integers(0, 16 * MIB),
    parameters=st.lists(st.integers(1, 4 * MIB), max_size=4).map(tuple),
    sessions=st.integers(1, 4),
    single_instance=st.booleans(),
    set_ups=st.lists(st.tuples(st.sampled_from(SET_UPS), st.integers(0, 3)), max_size=2).map(tuple),
)
loads = st.builds(
    Load,
    guests=st.integers(1, 4),
    tas=st.lists(profiles, min_size=1, max_size=2).map(tuple),
    buffer=st.integers(32, 512).map(lambda pages: pages * 4096 - 5),
    buffers=st.integers(0, 20),
)


def holds(sizing: Sizing) -> None:
    checks = list(verify(sizing))
    assert [check for check in checks if not check.good] == []


@settings(max_examples=2 * settings().max_examples, suppress_health_check=[HealthCheck.too_slow])
@given(builds, loads)
def test_random_configurations(build: Build, load: Load) -> None:
    sizing = size(build, load)
    holds(sizing)
    if sizing.fits:
        assert verify_load(build, load)


@pytest.mark.parametrize("threads", [16, 32, 64, 128])
def test_the_published_rows(threads: int) -> None:
    holds(size(Build(threads=threads), Load()))


@pytest.mark.parametrize("name", BOARDS)
def test_boards(name: str) -> None:
    holds(size(BOARDS[name].build, Load(tas=(SMALL_TA,))))


@pytest.mark.parametrize("build", [Build(threads=59), Build(threads=58), Build(threads=2, prealloc=True)])
def test_the_map_of_7077(build: Build) -> None:
    sizing = size(build, Load(tas=(MAP_OF_7077,)))
    holds(sizing)
    assert verify_load(build, sizing.load) is sizing.fits


def test_a_wrong_prediction_is_found() -> None:
    sizing = size(Build(threads=32), Load())
    for wrong in (
        replace(sizing, rsa_operations=sizing.rsa_operations + 1),
        replace(sizing, largest_buffer=sizing.largest_buffer - 1),
        replace(sizing, total_pages=sizing.total_pages + 16 * 16),
        replace(sizing, usable=sizing.usable + 4096),
        replace(sizing, guests=9),
        replace(sizing, sessions=(sizing.sessions or 0) - 1),
    ):
        assert sum(not check.good for check in verify(wrong)) >= 1


def test_the_test_program_does_not_run_with_eight_threads() -> None:
    client = Client(Build(threads=8), (TEST_PROGRAM,))
    assert client.use(0, TEST_PROGRAM) == "invoke: OUT_OF_MEMORY"
