import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.smccc import KVM, NOT_SUPPORTED, XEN, Hypervisor
from optee.abi.smc import Function

REST = tuple(range(1, 8))
flavours = pytest.mark.parametrize("hypervisor", [KVM, XEN], ids=lambda hypervisor: hypervisor.name)


@flavours
@pytest.mark.parametrize("owner", range(64))
@pytest.mark.parametrize("kind", [0x0, 0x40, 0x80, 0xC0])
def test_trusted_owners_are_the_mediators_and_no_others(hypervisor: Hypervisor, owner: int, kind: int) -> None:
    function = (kind | owner) << 24 | 0x1234
    answer = hypervisor.route((function, *REST))
    if 48 <= owner <= 63:
        assert answer is None
    else:
        assert answer == (NOT_SUPPORTED, *REST)


@flavours
@pytest.mark.parametrize("function", Function)
def test_every_call_to_op_tee_is_the_mediators(hypervisor: Hypervisor, function: Function) -> None:
    assert hypervisor.route((function, *REST)) is None
    assert hypervisor.route((function | 0xFFFF_FFFF << 32, *REST)) is None


@settings(deadline=None)
@given(st.sampled_from([KVM, XEN]), st.lists(st.integers(0, (1 << 64) - 1), min_size=8, max_size=8).map(tuple))
def test_only_the_low_half_of_x0_selects(hypervisor: Hypervisor, regs: tuple[int, ...]) -> None:
    answer = hypervisor.route(regs)
    assert answer == hypervisor.route((regs[0] & 0xFFFF_FFFF, *regs[1:]))
    if answer is not None:
        assert len(answer) == 8
        assert answer[4:] == regs[4:]


@flavours
def test_what_a_boot_needs_is_answered(hypervisor: Hypervisor) -> None:
    for version in (0x8000_0000, 0x8400_0000):
        assert hypervisor.route((version, *REST)) == (0x10001, *REST)
        for features in (0x8000_0001, 0x8400_000A):
            assert hypervisor.route((features, version, *REST[1:])) == (0, version, *REST[1:])
    assert hypervisor.route((0x8400_000A, 0x8400_0001, *REST[1:])) == (NOT_SUPPORTED, 0x8400_0001, *REST[1:])


def test_a_guest_can_tell_the_flavours_apart() -> None:
    kvm = KVM.route((0x8600_FF01, *REST))
    xen = XEN.route((0x8500_FF01, *REST))
    assert kvm is not None
    assert xen is not None
    assert b"".join(word.to_bytes(4, "little") for word in kvm[:4]).hex() == "28b46fb62ec511e9a9ca4b564d003a74"
    assert b"".join(word.to_bytes(4, "little") for word in xen[:4]).hex() == "a71812dcc69843699acf79d18ddee667"
    assert KVM.route((0x8500_FF01, *REST)) == XEN.route((0x8600_FF01, *REST)) == (NOT_SUPPORTED, *REST)
    assert (KVM.conduit, XEN.conduit) == ("smc", "hvc")
