import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.descriptor import (
    BLOCK_PAGES,
    LEAF_ATTRIBUTES,
    LOGGED,
    RAMP,
    S2AP_WRITE,
    TABLE_OR_PAGE,
    Descriptor,
    PageKind,
    is_ram_rw,
    join,
    split,
)

PA = 0x1234_4000_0000
MAPPED = [kind for kind in PageKind if kind is not PageKind.NONE]


@pytest.mark.parametrize(
    ("kind", "low_bits"),
    [
        # Arm ARM: S2AP 0b11 / 0b01, MemAttr 0b1111 / 0b0001, SH inner / outer, AF, page
        (PageKind.RAM_RW, 0x7FF),
        (PageKind.RAM_RO, 0x77F),
        (PageKind.MMIO, 0x6C7),
    ],
)
def test_what_the_architecture_can_say_is_in_its_own_bits(kind: PageKind, low_bits: int) -> None:
    assert (PA | LEAF_ATTRIBUTES[kind] | TABLE_OR_PAGE) & 0xFFF == low_bits


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("kind", MAPPED)
def test_a_leaf_tells_its_kind_and_address(kind: PageKind, level: int) -> None:
    leaf = Descriptor(PA | LEAF_ATTRIBUTES[kind] | (TABLE_OR_PAGE if level == 3 else 0))
    assert (leaf.kind, leaf.address, leaf.valid, leaf.accessed) == (kind, PA, True, True)
    assert leaf.is_leaf(level)
    assert not leaf.is_table(level)
    assert kind.name in leaf.describe(level)


def test_a_page_write_protected_for_logging_is_read_write_ram_that_the_guest_cannot_write() -> None:
    leaf = Descriptor(PA | LEAF_ATTRIBUTES[PageKind.RAM_RW] & ~S2AP_WRITE | LOGGED | TABLE_OR_PAGE)
    assert (leaf.kind, leaf.writable, leaf.logged) == (PageKind.RAM_RW, False, True)


def test_reserved_and_invalid_codes() -> None:
    assert Descriptor(PA | 0x7FD).describe(3) == "reserved"
    assert Descriptor(0).describe(2) == "invalid"
    assert Descriptor(PA | 3).describe(1) == f"table at PA {PA:#x}"
    assert Descriptor(0).kind is PageKind.NONE


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1))
def test_nothing_but_read_write_ram_passes_for_it(words: list[int]) -> None:
    for word, shareable in zip(words, is_ram_rw(np.array(words, dtype=np.uint64)).tolist(), strict=True):
        if shareable:
            leaf = Descriptor(word)
            assert (leaf.kind, leaf.valid, leaf.accessed, leaf.device) == (PageKind.RAM_RW, True, True, False)


@pytest.mark.parametrize("kind", MAPPED)
def test_of_the_kinds_we_write_only_read_write_ram_passes(kind: PageKind) -> None:
    assert bool(is_ram_rw(np.array([PA | LEAF_ATTRIBUTES[kind]], dtype=np.uint64))[0]) is (kind is PageKind.RAM_RW)


@pytest.mark.parametrize("level", [1, 2])
def test_a_split_block_says_the_same_and_joins_again(level: int) -> None:
    block = Descriptor(PA | LEAF_ATTRIBUTES[PageKind.GRANT_RO])
    parts = split(block, level)
    for index, part in enumerate(map(Descriptor, parts.tolist())):
        assert part.is_leaf(level + 1)
        assert part.kind is PageKind.GRANT_RO
        assert part.address == PA + index * BLOCK_PAGES[level + 1] * 4096
    if level == 2:
        assert join(parts) == block


@pytest.mark.parametrize("change", ["offset", "kind", "hole", "order"])
def test_what_is_no_block_does_not_join(change: str) -> None:
    pages = RAMP + np.uint64(PA | LEAF_ATTRIBUTES[PageKind.RAM_RW] | TABLE_OR_PAGE)
    assert join(pages) is not None
    if change == "offset":
        pages += np.uint64(4096)
    elif change == "kind":
        pages[300] &= np.uint64(~S2AP_WRITE & (1 << 64) - 1)
    elif change == "hole":
        pages[300] = 0
    else:
        pages[[300, 301]] = pages[[301, 300]]
    assert join(pages) is None


def test_a_run_of_nothing_joins_to_nothing() -> None:
    nothing = np.zeros(512, dtype=np.uint64)
    assert join(nothing) == 0
    nothing[511] = 1
    assert join(nothing) is None
