from __future__ import annotations

import numpy as np
import pytest

from hv_models.machine import XEN_GIC_IPA, Machine
from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind, Reason, Stage2Fault
from hv_models.xen import XenVm

RAM = 0x4000_0000
WINDOW = 0x9000_0000


@pytest.fixture
def domains(machine: Machine) -> tuple[XenVm, XenVm]:
    return machine.create_xen("dom1", 4 << 20, domain=1), machine.create_xen("dom2", 4 << 20, domain=2)


def test_all_ram_is_mapped_when_the_domain_is_built(domains: tuple[XenVm, XenVm]) -> None:
    vm = domains[0]
    region = vm.regions[0]
    assert [vm.stage2.walk(RAM + page * PAGE_SIZE).pa for page in range(1024)] == region.bank.pa.tolist()
    assert region.entries.tolist() == [*range(1, 1025), 0]
    assert vm.stage2.walk(XEN_GIC_IPA).kind is PageKind.MMIO


def test_the_client_id_follows_the_domain_id(machine: Machine, domains: tuple[XenVm, XenVm]) -> None:
    assert [(vm.domain, vm.client_id) for vm in domains] == [(1, 2), (2, 3)]
    assert machine.create_xen("dom0", 1 << 20, domain=0).client_id == 1
    with pytest.raises(ValueError, match="dom1"):
        machine.create_xen("again", 1 << 20, domain=1)


@pytest.mark.parametrize("kind", PageKind)
def test_the_p2m_can_be_changed_and_changed_back(domains: tuple[XenVm, XenVm], kind: PageKind) -> None:
    vm = domains[0]
    vm.write(RAM + 3 * PAGE_SIZE, b"here")
    vm.set_kind(RAM + 2 * PAGE_SIZE, kind, pages=3)
    kinds = [vm.stage2.walk(RAM + page * PAGE_SIZE).kind for page in range(1, 6)]
    assert kinds == [PageKind.RAM_RW, kind, kind, kind, PageKind.RAM_RW]
    vm.set_kind(RAM + 2 * PAGE_SIZE, PageKind.RAM_RW, pages=3)
    assert vm.read(RAM + 3 * PAGE_SIZE, 4) == b"here"
    assert vm.regions[0].entries.tolist() == [*range(1, 1025), 0]


def test_an_entry_may_get_another_page_of_the_domain(domains: tuple[XenVm, XenVm]) -> None:
    vm = domains[0]
    vm.write(RAM + 7 * PAGE_SIZE, b"seven")
    vm.set_kind(RAM + 5 * PAGE_SIZE, PageKind.RAM_RO, page=7)
    assert vm.read(RAM + 5 * PAGE_SIZE, 5) == b"seven"
    vm.set_kind(RAM + 5 * PAGE_SIZE, PageKind.RAM_RW)  # keeps the page that is there
    assert vm.read(RAM + 5 * PAGE_SIZE, 5) == b"seven"


@pytest.mark.parametrize("writable", [True, False])
def test_a_granted_page_is_neither_domains_to_share(domains: tuple[XenVm, XenVm], writable: bool) -> None:
    owner, user = domains
    user.map_grant(owner, RAM, WINDOW, writable=writable)
    kind = PageKind.GRANT_RW if writable else PageKind.GRANT_RO
    assert user.stage2.walk(WINDOW).kind is kind
    assert user.stage2.walk(WINDOW).pa == owner.stage2.walk(RAM).pa
    for vm, ipa, reason in ((owner, RAM, Reason.SHARED), (user, WINDOW, Reason.GRANT)):
        with pytest.raises(Stage2Fault) as caught:
            vm.pin(np.array([ipa], dtype=np.uint64))
        assert caught.value.reason is reason
    with pytest.raises(Stage2Fault) as caught:
        user.read(WINDOW, 1)
    assert caught.value.reason is Reason.GRANT


def test_a_foreign_mapping_counts_as_another_map_of_the_frame(domains: tuple[XenVm, XenVm]) -> None:
    owner, user = domains
    user.map_foreign(owner, RAM + PAGE_SIZE, WINDOW, 2)
    with pytest.raises(Stage2Fault) as caught:
        owner.pin(np.array([RAM, RAM + 2 * PAGE_SIZE], dtype=np.uint64))
    assert (caught.value.ipa, caught.value.reason) == (RAM + 2 * PAGE_SIZE, Reason.SHARED)
    with pytest.raises(Stage2Fault) as caught:
        user.pin(np.array([WINDOW], dtype=np.uint64))
    assert caught.value.reason is Reason.FOREIGN


def test_only_mapped_pages_can_be_granted(domains: tuple[XenVm, XenVm]) -> None:
    owner, user = domains
    with pytest.raises(Stage2Fault) as caught:
        user.map_grant(owner, RAM + (4 << 20) - PAGE_SIZE, WINDOW, 2)
    assert caught.value.ipa == RAM + (4 << 20)
    assert user.stage2.walk(WINDOW).pa is None
