from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.kvm import KvmVm, VmidAllocator
from hv_models.machine import KVM_GIC_IPA, Machine, RamBlock
from hv_models.memory import PAGE_SIZE, PageArray, PhysicalFault
from hv_models.stage2 import PageKind, Reason, Stage2Fault
from tests.hv_models.conftest import whole

RAM = 0x4000_0000
GFN = RAM >> 12


@pytest.fixture
def vm(machine: Machine) -> KvmVm:
    return machine.create_kvm("kvm-1", 4 << 20)


def pages(*numbers: int) -> PageArray:
    return np.array([RAM + number * PAGE_SIZE for number in numbers], dtype=np.uint64)


def mapped(vm: KvmVm) -> set[int]:
    leaves = vm.stage2.descriptors(RAM, 1024)
    return set(np.flatnonzero(leaves).tolist())


class TestFaults:
    def test_ram_is_mapped_page_by_page_when_it_is_touched(self, vm: KvmVm) -> None:
        assert mapped(vm) == set()
        assert vm.stage2.walk(KVM_GIC_IPA).kind is PageKind.MMIO
        vm.touch(RAM + 3 * PAGE_SIZE - 1, 2)
        vm.read(RAM + 7 * PAGE_SIZE, 1)
        vm.write(RAM + 8 * PAGE_SIZE, b"x")
        vm.unpin(vm.pin(pages(600, 20, 20, 601)))
        assert mapped(vm) == {2, 3, 7, 8, 20, 600, 601}

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 1023), max_size=60))
    def test_each_page_gets_the_frame_of_its_place(self, numbers: list[int]) -> None:
        machine = Machine()
        vm = machine.create_kvm("kvm-1", 4 << 20)
        pinned = vm.pin(pages(*numbers))
        assert pinned.pas.tolist() == vm.regions[0].bank.pa[numbers].tolist()
        assert mapped(vm) == set(numbers)
        assert np.flatnonzero(vm.regions[0].entries).tolist() == sorted(set(numbers))
        assert np.flatnonzero(vm.regions[0].pas).tolist() == sorted(set(numbers))
        machine.close()

    def test_a_fault_does_not_override_a_kind(self, vm: KvmVm) -> None:
        vm.set_kind(RAM, PageKind.RAM_RO)
        with pytest.raises(Stage2Fault) as caught:
            vm.write(RAM, b"x")
        assert caught.value.reason is Reason.READ_ONLY
        with pytest.raises(Stage2Fault) as caught:
            vm.touch(RAM, 1, write=True)
        assert caught.value.reason is Reason.READ_ONLY
        assert vm.stage2.walk(RAM).kind is PageKind.RAM_RO

    def test_the_guest_faults_outside_of_its_slots(self, vm: KvmVm) -> None:
        with pytest.raises(Stage2Fault) as caught:
            vm.touch(RAM + (4 << 20) - 1, 2)
        assert (caught.value.ipa, caught.value.reason) == (RAM + (4 << 20), Reason.UNMAPPED)

    def test_a_refused_pin_leaves_no_pins_though_it_faulted_pages_in(self, vm: KvmVm) -> None:
        with pytest.raises(Stage2Fault):
            vm.pin(np.append(pages(1, 2), np.uint64(0)))
        assert vm.pins == 0


class TestSlots:
    def test_a_removed_one_faults(self, vm: KvmVm, machine: Machine) -> None:
        slot = vm.regions[0]
        pa = vm.pin(pages(1))
        vm.unpin(pa)
        vm.remove_slot(slot)
        for access in (lambda: vm.read(RAM + PAGE_SIZE, 1), lambda: vm.pin(pages(1))):
            with pytest.raises(Stage2Fault) as caught:
                access()
            assert caught.value.reason is Reason.UNMAPPED
        with pytest.raises(PhysicalFault):
            machine.memory.frame(int(pa.pas[0]))
        assert machine.find(int(pa.pas[0])) is None

    def test_pins_outlive_it(self, vm: KvmVm, machine: Machine) -> None:
        pinned, other = vm.pin(pages(5, 6, 5)), vm.pin(pages(6))
        frame = int(pinned.pas[1])
        vm.remove_slot(vm.regions[0])
        assert vm.pinned() == {GFN + 5: 2, GFN + 6: 2}
        machine.memory.write(frame, b"OP-TEE writes late")
        assert vm.load(pinned, PAGE_SIZE, 18) == b"OP-TEE writes late"
        assert machine.find(frame) == (vm, RAM + 6 * PAGE_SIZE)
        vm.mark_dirty(pinned)
        vm.unpin(pinned)
        assert vm.pinned() == {GFN + 6: 1}
        assert machine.memory.read(frame, 6) == b"OP-TEE"
        vm.unpin(other)
        assert vm.pins == 0
        with pytest.raises(PhysicalFault):
            machine.memory.frame(frame)

    def test_new_ram_in_its_place_has_other_frames_while_pins_are_held(self, vm: KvmVm, machine: Machine) -> None:
        old = vm.pin(pages(1))
        vm.store_fields(old, 0, *whole(b"old"))
        vm.remove_slot(vm.regions[0])
        machine.add_ram(vm, RamBlock(RAM, 2 << 20))
        new = vm.pin(pages(1))
        assert new.pas[0] != old.pas[0]
        assert vm.read(RAM + PAGE_SIZE, 3) == bytes(3)
        assert vm.load(old, 0, 3) == b"old"
        assert vm.pinned() == {GFN + 1: 2}
        vm.unpin(old)
        vm.unpin(new)

    def test_the_other_slots_go_on(self, machine: Machine) -> None:
        vm = machine.create_kvm("two", [RamBlock(RAM, 1 << 20), RamBlock(1 << 32, 1 << 20)])
        vm.write(1 << 32, b"high")
        vm.remove_slot(vm.regions[0])
        assert vm.read(1 << 32, 4) == b"high"
        pinned = vm.pin(np.array([1 << 32], dtype=np.uint64))
        vm.unpin(pinned)
        vm.remove_slot(vm.regions[0])
        with pytest.raises(Stage2Fault):
            vm.read(1 << 32, 4)
        with pytest.raises(Stage2Fault):
            vm.pin(np.array([0], dtype=np.uint64))


class TestDirtyLogging:
    def test_collects_what_anybody_wrote(self, vm: KvmVm) -> None:
        vm.touch(RAM, 10 * PAGE_SIZE)
        first = vm.pin(pages(1, 2, 3, 200))  # faults a page in
        vm.start_dirty_logging()
        vm.read(RAM, 1)
        vm.touch(RAM + 6 * PAGE_SIZE, 2)
        assert vm.dirty_pages() == []
        vm.touch(RAM + 4 * PAGE_SIZE - 1, 2, write=True)  # the guest
        vm.write(RAM + 9 * PAGE_SIZE, b"mediator")
        vm.store_fields(first, PAGE_SIZE - 1, *whole(b"two pages"))
        vm.write(RAM + 300 * PAGE_SIZE, b"a page that was not mapped")
        assert vm.dirty_pages() == [GFN + page for page in (1, 2, 3, 4, 9, 300)]
        assert vm.dirty_pages() == []
        again = vm.pin(pages(3, 200))
        vm.store_fields(again, PAGE_SIZE + 4, *whole(b"second page"))
        vm.write_fields(RAM + 4 * PAGE_SIZE, b"ret     session", [slice(0, 3), slice(8, 15)])
        assert vm.dirty_pages() == [GFN + 4, GFN + 200]
        vm.mark_dirty(first)  # the secure world
        assert vm.dirty_pages() == [GFN + page for page in (1, 2, 3, 200)]
        vm.mark_dirty(again)
        assert vm.dirty_pages() == [GFN + 3, GFN + 200]
        vm.unpin(again)
        vm.unpin(first)

    def test_takes_only_the_guests_write_access(self, vm: KvmVm) -> None:
        vm.touch(RAM, 2 * PAGE_SIZE)
        vm.set_kind(RAM + 5 * PAGE_SIZE, PageKind.RAM_RO)
        entries = vm.regions[0].entries.tolist()
        vm.start_dirty_logging()
        leaf = vm.stage2.walk(RAM).descriptor
        assert (leaf.writable, leaf.kind) == (False, PageKind.RAM_RW)
        assert vm.regions[0].entries.tolist() == entries
        assert vm.read(RAM, 1, writable=True) == b"\0"
        vm.unpin(vm.pin(pages(0, 1, 700)))
        with pytest.raises(Stage2Fault):
            vm.pin(pages(5))
        assert not vm.stage2.walk(RAM + 700 * PAGE_SIZE).descriptor.writable

    def test_every_round_begins_with_a_fault(self, vm: KvmVm) -> None:
        vm.start_dirty_logging()
        for _ in range(3):
            vm.touch(RAM, 1, write=True)
            assert vm.stage2.walk(RAM).descriptor.writable
            assert vm.dirty_pages() == [GFN]
            assert not vm.stage2.walk(RAM).descriptor.writable

    def test_its_end_gives_access_back(self, vm: KvmVm) -> None:
        vm.touch(RAM, 2 * PAGE_SIZE)
        vm.set_kind(RAM + PAGE_SIZE, PageKind.RAM_RO)
        vm.start_dirty_logging()
        vm.stop_dirty_logging()
        assert vm.stage2.walk(RAM).descriptor.writable
        assert vm.stage2.walk(RAM + PAGE_SIZE).kind is PageKind.RAM_RO
        vm.write(RAM, b"x")
        assert vm.dirty_pages() == []

    def test_covers_ram_that_comes_later(self, vm: KvmVm, machine: Machine) -> None:
        vm.start_dirty_logging()
        machine.add_ram(vm, RamBlock(1 << 32, 1 << 20))
        vm.write(1 << 32, b"x")
        vm.write(RAM, b"x")
        vm.unpin(vm.pin(np.array([1 << 32, RAM], dtype=np.uint64)))
        vm.write_fields(RAM + PAGE_SIZE, *whole(b"x"))
        assert vm.dirty_pages() == [GFN, GFN + 1, 1 << 20]
        pinned = vm.pin(np.array([(1 << 32) + PAGE_SIZE, RAM, RAM + PAGE_SIZE], dtype=np.uint64))
        vm.store_fields(pinned, PAGE_SIZE - 1, *whole(b"xy"))
        assert vm.dirty_pages() == [GFN, (1 << 20) + 1]
        vm.mark_dirty(pinned)
        assert vm.dirty_pages() == [GFN, GFN + 1, (1 << 20) + 1]
        vm.unpin(pinned)

    def test_follows_the_guests_address_of_a_page_that_is_mapped_twice(self, machine: Machine) -> None:
        vm = machine.create_kvm("two", [RamBlock(RAM, 1 << 20), RamBlock(1 << 32, 1 << 20)])
        vm.set_kind(1 << 32, PageKind.RAM_RW, page=3)
        vm.start_dirty_logging()
        pinned = vm.pin(np.array([1 << 32], dtype=np.uint64))
        vm.mark_dirty(pinned)
        assert vm.dirty_pages() == [1 << 20]
        vm.unpin(pinned)

    def test_splits_blocks(self, machine: Machine) -> None:
        vm = machine.create_kvm("blocks", [RamBlock(RAM, 4 << 20)])
        vm.stage2.map(RAM, np.arange(512, dtype=np.uint64) * np.uint64(4096) + np.uint64(1 << 44), PageKind.RAM_RW)
        assert vm.stage2.walk(RAM).pages == 512
        vm.start_dirty_logging()
        vm.touch(RAM + PAGE_SIZE, 1, write=True)
        assert [vm.stage2.walk(RAM + page * PAGE_SIZE).descriptor.writable for page in (0, 1, 2)] == [
            False,
            True,
            False,
        ]


class TestHardwareVmid:
    def test_rolls_over_and_is_no_identity(self, machine: Machine) -> None:
        vms = [machine.create_kvm(f"kvm-{number}", 1 << 20) for number in range(300)]
        seen = [vm.hw_vmid for vm in vms]
        assert 0 not in seen
        assert max(seen) == 255
        assert seen[0] == seen[255]
        assert len({vm.client_id for vm in vms}) == 300

    def test_is_unique_within_a_generation_and_stays(self) -> None:
        allocator = VmidAllocator(3)
        given = [allocator.allocate() for _ in range(20)]
        assert len(set(given)) == 20
        assert {vmid for _, vmid in given} == set(range(1, 8))

    def test_a_running_vm_keeps_it_until_the_roll_over(self, machine: Machine) -> None:
        vm, other = machine.create_kvm("a", 1 << 20), machine.create_kvm("b", 1 << 20)
        first = vm.hw_vmid
        assert vm.hw_vmid == first != other.hw_vmid
        client_id = vm.client_id
        for number in range(260):
            _ = machine.create_kvm(f"more-{number}", PAGE_SIZE).hw_vmid
        assert vm.hw_vmid != first
        assert vm.client_id == client_id
