from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.frames import FRAMES_BASE, Contiguous, Interleaved, domain_frames
from hv_models.machine import MAX_CLIENT_ID, MEDIATOR_BASE, RAM_BASE, TABLES_BASE, Machine, RamBlock
from hv_models.memory import PAGE_SIZE, PageStore, PhysicalFault
from hv_models.stage2 import PageKind
from tests.hv_models.conftest import Create


class TestFrames:
    def test_no_pa_is_an_ipa_and_no_frame_has_two_owners(self, machine: Machine) -> None:
        vms = [machine.create_xen(f"xen-{n}", (1 + n) << 20) for n in range(12)]
        pas = np.concatenate([vm.regions[0].bank.pa for vm in vms])
        ipas = np.concatenate([vm.regions[0].addresses() for vm in vms])
        assert len(np.unique(pas)) == len(pas)
        assert not np.isin(pas, ipas).any()
        assert not (pas == 0).any()
        assert pas.min() >= FRAMES_BASE
        assert pas.max() < TABLES_BASE

    def test_a_guest_address_taken_for_a_physical_one_hits_nothing(self, machine: Machine, create: Create) -> None:
        vm = create("guest", 4 << 20)
        for ipa in vm.regions[0].addresses()[::37].tolist():
            with pytest.raises(PhysicalFault):
                machine.memory.frame(ipa)

    def test_the_next_frame_is_never_the_same_vms(self, machine: Machine) -> None:
        vms = [machine.create_xen(f"xen-{n}", 2 << 20) for n in range(8)]
        for vm in vms:
            pas = vm.regions[0].bank.pa
            owners = {found and found[0] for pa in pas[::17].tolist() for found in [machine.find(pa + PAGE_SIZE)]}
            assert vm not in owners
            assert owners - {None}
            steps = np.diff(pas.astype(np.int64))
            assert PAGE_SIZE not in steps
            assert (steps < 0).any()

    def test_writes_of_one_vm_reach_no_other(self, machine: Machine) -> None:
        vms = [machine.create_kvm(f"kvm-{n}", 1 << 20) for n in range(9)]
        for number, vm in enumerate(vms):
            for page in range(256):
                vm.write(RAM_BASE + page * PAGE_SIZE, bytes([number, page]))
        for number, vm in enumerate(vms):
            seen = [vm.ram[0].read(RAM_BASE + page * PAGE_SIZE, 2) for page in range(256)]
            assert seen == [bytes([number, page]) for page in range(256)]

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=40), st.sampled_from([1, 2, 8]))
    def test_layouts_never_give_a_frame_twice(self, requests: list[tuple[int, bool]], lanes: int) -> None:
        for layout in (Interleaved(lanes), Contiguous()):
            out: list[tuple[object, set[int]]] = []
            for pages, release in requests:
                frames = layout.allocate(pages)
                pas = set(frames.addresses().tolist())
                assert len(pas) == pages
                assert all(pas.isdisjoint(others) for _, others in out)
                if release:
                    layout.release(frames)
                else:
                    out.append((frames, pas))

    def test_a_given_back_place_is_used_again(self) -> None:
        layout = Interleaved()
        first = layout.allocate(64)
        for _ in range(7):
            layout.allocate(64)
        layout.release(first)
        assert layout.allocate(64) == first

    def test_a_contiguous_layout_lets_the_tables_use_blocks(self) -> None:
        machine = Machine(Contiguous())
        vm = machine.create_xen("blocks", 1 << 30)
        other = machine.create_xen("other", 2 << 20)
        assert [vm.stage2.walk(ipa).pages for ipa in (RAM_BASE, RAM_BASE + (1 << 30) - 1)] == [262144, 262144]
        assert other.stage2.walk(RAM_BASE).pages == 512
        vm.set_kind(RAM_BASE + PAGE_SIZE, PageKind.RAM_RO)
        assert [vm.stage2.walk(RAM_BASE + page * PAGE_SIZE).kind for page in range(3)] == [
            PageKind.RAM_RW,
            PageKind.RAM_RO,
            PageKind.RAM_RW,
        ]
        machine.close()

    @pytest.mark.parametrize(("domain", "permutation"), [(0, 0x2B), (1, 0x2B), (5, 0), (32751, 0x2B)])
    def test_domains_of_vector_files_lie_where_these_say(self, domain: int, permutation: int) -> None:
        machine = Machine(fill=0xA5)
        frames = domain_frames(domain, 64, permutation)
        vm = machine.create_xen("vector", [RamBlock(RAM_BASE, 64 * PAGE_SIZE, frames=frames)], domain=domain)
        pinned = vm.pin(vm.regions[0].addresses())
        expected = [((domain + 8) << 32) + ((page ^ permutation) << 12) for page in range(64)]
        assert pinned.pas.tolist() == expected
        page = machine.pages.allocate()
        assert page.pa >= 0x10_0000_0000
        assert page.pa not in expected
        assert set(page.view) == {0xA5}
        vm.unpin(pinned)
        machine.destroy(vm)
        machine.close()


class TestClientIds:
    def test_are_unique_and_not_reused_at_once(self, machine: Machine) -> None:
        first, second = machine.create_kvm("a", PAGE_SIZE), machine.create_xen("b", PAGE_SIZE)
        assert (first.client_id, second.client_id, second.domain) == (1, 2, 1)
        machine.destroy(second)
        assert machine.create_kvm("c", PAGE_SIZE).client_id == 3
        assert machine.create_kvm("d", PAGE_SIZE, client_id=2).client_id == 2

    @pytest.mark.parametrize("client_id", [-1, 0, MAX_CLIENT_ID + 1, 2])
    def test_bad_or_taken_ones_are_refused(self, machine: Machine, client_id: int) -> None:
        machine.create_kvm("taken", PAGE_SIZE, client_id=2)
        with pytest.raises(ValueError, match="client id"):
            machine.create_kvm("new", PAGE_SIZE, client_id=client_id)
        with pytest.raises(ValueError, match="client id"):
            machine.create_xen("new", PAGE_SIZE, domain=client_id - 1)
        assert list(machine.vms) == [2]

    def test_wrap_around_past_those_in_use(self, machine: Machine) -> None:
        machine.create_kvm("last", PAGE_SIZE, client_id=MAX_CLIENT_ID)
        assert [machine.create_kvm(name, PAGE_SIZE).client_id for name in "abc"] == [1, 2, 3]
        machine.create_kvm("last but one", PAGE_SIZE, client_id=MAX_CLIENT_ID - 1)
        assert machine.create_xen("next", PAGE_SIZE).client_id == 4


class TestLifeCycle:
    def test_a_vm_with_pins_is_not_destroyed_unless_forced(self, machine: Machine, create: Create) -> None:
        vm = create("guest", 1 << 20)
        vm.write(RAM_BASE, b"data")
        pinned = vm.pin(np.array([RAM_BASE, RAM_BASE + PAGE_SIZE, RAM_BASE], dtype=np.uint64))
        frame = int(pinned.pas[0])
        assert machine.pins() == {vm.client_id: 3}
        with pytest.raises(ValueError, match="3 references"):
            machine.destroy(vm)
        assert vm.read(RAM_BASE, 4) == b"data"
        machine.destroy(vm, force=True)
        assert not vm.alive
        assert machine.pins() == {}
        assert machine.pinned_frames() == {frame: 2, int(pinned.pas[1]): 1}
        assert machine.memory.read(frame, 4) == b"data"
        assert machine.find(frame) is None
        vm.unpin(pinned)
        assert machine.pinned_frames() == {}
        with pytest.raises(PhysicalFault):
            machine.memory.frame(frame)

    def test_a_destroyed_vm_leaves_nothing(self, machine: Machine, create: Create) -> None:
        create("warm-up", 1 << 20)
        banks, tables = machine.memory.banks, machine.tables.allocated
        vm = create("guest", 4 << 20)
        vm.touch(RAM_BASE, 4 << 20)
        fd = vm.regions[0].bank.store.fd
        machine.destroy(vm)
        assert machine.memory.banks == banks
        assert machine.tables.allocated == tables
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        with pytest.raises(ValueError, match="not a VM"):
            machine.destroy(vm)

    @pytest.mark.parametrize(
        "ram",
        [
            0,
            4097,
            -PAGE_SIZE,
            [RamBlock(RAM_BASE, 1 << 20), RamBlock(RAM_BASE, 1 << 20)],
            [RamBlock(RAM_BASE, 1 << 20), RamBlock(RAM_BASE + (1 << 20), 100)],
            [RamBlock((1 << 39) - PAGE_SIZE, 2 * PAGE_SIZE)],
            [RamBlock(RAM_BASE + 1, PAGE_SIZE)],
        ],
    )
    def test_a_failed_creation_leaves_nothing(
        self, machine: Machine, create: Create, ram: int | list[RamBlock]
    ) -> None:
        create("warm-up", 1 << 20)
        banks, tables = machine.memory.banks, machine.tables.allocated
        with pytest.raises(ValueError, match="RAM"):
            create("guest", ram)
        assert machine.memory.banks == banks
        assert machine.tables.allocated == tables
        assert len(machine.vms) == 1

    def test_reused_frames_start_empty(self) -> None:
        machine = Machine(Interleaved(lanes=1))
        vm = machine.create_kvm("first", 1 << 20)
        vm.write(RAM_BASE, b"secret")
        pa = vm.stage2.walk(RAM_BASE).pa
        machine.destroy(vm)
        vm = machine.create_kvm("second", 1 << 20)
        assert vm.read(RAM_BASE, 6) == bytes(6)
        assert vm.stage2.walk(RAM_BASE).pa == pa
        machine.close()


class TestMemoryOfOthers:
    def test_ram_may_be_a_memfd_of_another_process(self, machine: Machine, create: Create) -> None:
        theirs = PageStore("vmm", 8)
        mapped = PageStore.attach(os.dup(theirs.fd))
        vm = create("external", [RamBlock(RAM_BASE, 8 * PAGE_SIZE, mapped)])
        theirs.view[PAGE_SIZE : PAGE_SIZE + 4] = b"from"
        assert vm.read(RAM_BASE + PAGE_SIZE, 4) == b"from"

    def test_one_memfd_may_hold_several_blocks_of_one_vm_but_never_ram_of_two(
        self, machine: Machine, create: Create
    ) -> None:
        theirs = PageStore("vmm", 8)
        low = PageStore.attach(os.dup(theirs.fd), pages=4)
        high = PageStore.attach(os.dup(theirs.fd), offset=4 * PAGE_SIZE)
        again = PageStore.attach(os.dup(theirs.fd), offset=4 * PAGE_SIZE)
        create("external", [RamBlock(RAM_BASE, low.pages << 12, low), RamBlock(1 << 32, high.pages << 12, high)])
        with pytest.raises(ValueError, match="that of external"):
            create("thief", [RamBlock(RAM_BASE, again.pages << 12, again)])

    def test_size_and_memory_must_agree(self, create: Create) -> None:
        with pytest.raises(ValueError, match="pages"):
            create("external", [RamBlock(RAM_BASE, 8 * PAGE_SIZE, PageStore("vmm", 4))])


class TestDiagnosis:
    def test_an_address_is_named(self, machine: Machine) -> None:
        vm = machine.create_xen("xen-1", 1 << 20)
        pa = vm.stage2.walk(RAM_BASE + 5).pa
        assert pa is not None
        assert machine.describe(pa) == "IPA 0x40000005 of xen-1"
        assert machine.describe(vm.stage2.root) == "page 0 of stage-2 tables"
        assert machine.describe(machine.pages.allocate().pa) == "page 0 of mediator"
        assert machine.describe(RAM_BASE) == "no memory"

    def test_mediator_pages_lie_above_everything_else(self, machine: Machine) -> None:
        machine.create_xen("xen-1", 1 << 20)
        assert machine.pages.allocate().pa == MEDIATOR_BASE
        assert all(bank.frames.end <= MEDIATOR_BASE for bank in machine.memory.banks if bank.name != "mediator")
