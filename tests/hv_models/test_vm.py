from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_models.frames import Contiguous
from hv_models.machine import Machine, RamBlock
from hv_models.memory import PAGE_SIZE, Frames, PageArray
from hv_models.stage2 import PageKind, Reason, Stage2Fault
from hv_models.vm import VirtualMachine
from tests.hv_models.conftest import Create, whole

RAM = 0x4000_0000
END = RAM + (4 << 20)
HIGH = 0x1_0000_0000
MAX = (1 << 64) - 1

NO_RAM = [RAM - PAGE_SIZE, END, 1 << 39, 1 << 40, 1 << 63, MAX & ~0xFFF]
"""Page addresses at which a VM of 4 MiB has nothing."""
REASON = {
    PageKind.RAM_RO: Reason.READ_ONLY,
    PageKind.MMIO: Reason.DEVICE,
    PageKind.GRANT_RW: Reason.GRANT,
    PageKind.GRANT_RO: Reason.GRANT,
    PageKind.FOREIGN_RW: Reason.FOREIGN,
}


def pages(*ipas: int) -> PageArray:
    return np.array(ipas, dtype=np.uint64)


class TestReadAndWrite:
    @pytest.mark.parametrize("base", [RAM, HIGH])
    def test_reach_the_bytes_that_the_guest_sees(self, two_region_vm: VirtualMachine, base: int) -> None:
        ram = two_region_vm.ram[base == HIGH]
        ram.write(base + 0x1FF8, b"guest   next")
        assert two_region_vm.read(base + 0x1FF8, 8) == b"guest   "
        two_region_vm.write(base + 0x2000, b"host")
        assert ram.read(base + 0x1FF8, 12) == b"guest   host"

    @pytest.mark.parametrize("ipa", [*NO_RAM, 0, -1, -PAGE_SIZE, MAX, END - 1 + PAGE_SIZE])
    def test_fault_where_there_is_no_ram(self, vm: VirtualMachine, ipa: int) -> None:
        for access in (lambda: vm.read(ipa, 1), lambda: vm.write(ipa, b"x")):
            with pytest.raises(Stage2Fault) as caught:
                access()
            assert (caught.value.ipa, caught.value.reason) == (ipa, Reason.UNMAPPED)

    @pytest.mark.parametrize("base", [RAM, HIGH, END - PAGE_SIZE])
    @pytest.mark.parametrize("offset", [0, 1, 4095])
    @pytest.mark.parametrize("excess", [0, 1, PAGE_SIZE, 1 << 32, 1 << 64])
    def test_stay_within_a_page(self, create: Create, base: int, offset: int, excess: int) -> None:
        vm = create("guest", [RamBlock(RAM, 4 << 20), RamBlock(HIGH, 1 << 20)])
        size = PAGE_SIZE - offset + excess
        if not excess:
            assert vm.read(base + offset, size) == bytes(size)
            return
        with pytest.raises(Stage2Fault) as caught:
            vm.read(base + offset, size)
        assert caught.value.reason is Reason.CROSSES_PAGE
        if excess <= PAGE_SIZE:
            with pytest.raises(Stage2Fault):
                vm.write(base + offset, b"x" * size)
            assert vm.read(base + offset, PAGE_SIZE - offset) == bytes(PAGE_SIZE - offset)

    def test_a_negative_size_is_refused(self, vm: VirtualMachine) -> None:
        with pytest.raises(Stage2Fault):
            vm.read(RAM + 8, -1)

    @pytest.mark.parametrize("base", [RAM, HIGH])
    def test_fields_of_a_page_are_written_and_nothing_else(self, two_region_vm: VirtualMachine, base: int) -> None:
        two_region_vm.write(base + PAGE_SIZE, b"." * 64)
        data = b"abcdret" + b"#" * 53 + b"last"
        two_region_vm.write_fields(base + PAGE_SIZE, data, [slice(4, 7), slice(0, 2), slice(60, 64)])
        two_region_vm.write_fields(base + PAGE_SIZE + 32, b"wxyz", [slice(1, 2)])
        page = b"ab..ret" + b"." * 26 + b"x" + b"." * 26 + b"last"
        assert two_region_vm.read(base + PAGE_SIZE, 64) == page
        two_region_vm.set_kind(base + PAGE_SIZE, PageKind.RAM_RO)
        with pytest.raises(Stage2Fault):
            two_region_vm.write_fields(base + PAGE_SIZE, *whole(b"no"))
        assert two_region_vm.read(base + PAGE_SIZE, 64) == page

    @pytest.mark.parametrize("kind", REASON)
    def test_need_ram_of_the_right_kind(self, vm: VirtualMachine, kind: PageKind) -> None:
        vm.write(RAM + PAGE_SIZE, b"data")
        vm.set_kind(RAM + PAGE_SIZE, kind)
        for access in (
            lambda: vm.read(RAM + PAGE_SIZE, 4, writable=True),
            lambda: vm.write(RAM + PAGE_SIZE, b"x"),
            lambda: vm.pin(pages(RAM + PAGE_SIZE)),
        ):
            with pytest.raises(Stage2Fault) as caught:
                access()
            assert caught.value.reason is REASON[kind]
        if kind is PageKind.RAM_RO:
            assert vm.read(RAM + PAGE_SIZE, 4) == b"data"
        else:
            with pytest.raises(Stage2Fault):
                vm.read(RAM + PAGE_SIZE, 4)
        vm.set_kind(RAM + PAGE_SIZE, PageKind.RAM_RW)
        assert vm.read(RAM + PAGE_SIZE, 4, writable=True) == b"data"

    def test_device_registers_are_out_of_reach(self, vm: VirtualMachine) -> None:
        vm.map_device(0x900_0000, 0x1C09_0000, 1)
        for access in (lambda: vm.read(0x900_0000, 4), lambda: vm.pin(pages(0x900_0000))):
            with pytest.raises(Stage2Fault) as caught:
                access()
            assert caught.value.reason is Reason.DEVICE

    def test_ram_with_no_memory_behind_is_a_hole(self, vm: VirtualMachine) -> None:
        vm.stage2.map(0x9000_0000, pages(0x5_0000_0000), PageKind.RAM_RW)
        for access in (lambda: vm.read(0x9000_0000, 4), lambda: vm.pin(pages(0x9000_0000))):
            with pytest.raises(Stage2Fault) as caught:
                access()
            assert caught.value.reason is Reason.HOLE


class TestPin:
    @settings(deadline=None)
    @given(st.data())
    def test_translates_and_counts_each_mention(self, data: st.DataObject) -> None:
        machine = Machine()
        flavours: list[Create] = [machine.create_kvm, machine.create_xen]
        create = data.draw(st.sampled_from(flavours))
        vm = create("guest", [RamBlock(RAM, 16 * PAGE_SIZE), RamBlock(HIGH, 16 * PAGE_SIZE)])
        gfns = st.one_of(st.integers(RAM >> 12, (RAM >> 12) + 15), st.integers(HIGH >> 12, (HIGH >> 12) + 15))
        live = []
        for _ in range(data.draw(st.integers(1, 4))):
            mentioned = data.draw(st.lists(gfns, max_size=20))
            pinned = vm.pin(np.array(mentioned, dtype=np.uint64) << np.uint64(12))
            live.append((pinned, mentioned))
            assert pinned.pas.tolist() == [vm.stage2.walk(gfn << 12).pa for gfn in mentioned]
            assert len(pinned) == len(mentioned)
            if data.draw(st.booleans()):
                vm.unpin(live.pop(data.draw(st.integers(0, len(live) - 1)))[0])
        expected = Counter(gfn for _, mentioned in live for gfn in mentioned)
        assert vm.pinned() == expected
        assert vm.pins == expected.total()
        assert machine.pinned_frames() == {vm.stage2.walk(gfn << 12).pa: count for gfn, count in expected.items()}
        for pinned, _ in live:
            vm.unpin(pinned)
        machine.destroy(vm)
        machine.close()

    @pytest.mark.parametrize("position", [0, 1, 5])
    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            (0, Reason.NULL),
            (RAM + 1, Reason.UNALIGNED),
            (RAM + 8, Reason.UNALIGNED),
            (RAM + 4095, Reason.UNALIGNED),
            (MAX, Reason.UNALIGNED),
            (1, Reason.UNALIGNED),
            *((ipa, Reason.UNMAPPED) for ipa in NO_RAM),
        ],
    )
    def test_is_all_or_nothing_and_names_the_first_bad_page(
        self, two_region_vm: VirtualMachine, vm: VirtualMachine, bad: int, reason: Reason, position: int
    ) -> None:
        for guest in (vm, two_region_vm):
            if guest is two_region_vm and bad == END:
                continue
            ipas = [RAM + 2 * PAGE_SIZE * page for page in range(6)]
            ipas[position] = bad
            ipas.append(RAM + 17)
            with pytest.raises(Stage2Fault) as caught:
                guest.pin(pages(*ipas))
            assert (caught.value.ipa, caught.value.reason) == (bad, reason)
            assert guest.pins == 0

    def test_of_nothing_is_nothing(self, vm: VirtualMachine) -> None:
        pinned = vm.pin(pages())
        assert len(pinned.pas) == 0
        vm.mark_dirty(pinned)
        assert vm.load(pinned, 0, 0) == b""
        vm.unpin(pinned)

    def test_the_callers_array_is_not_kept(self, vm: VirtualMachine) -> None:
        ipas = pages(RAM, RAM + PAGE_SIZE)
        pinned = vm.pin(ipas)
        before = pinned.pas.tolist()
        ipas[:] = 0
        vm.store_fields(pinned, 0, *whole(b"still"))
        assert pinned.pas.tolist() == before
        assert vm.read(RAM, 5) == b"still"
        vm.unpin(pinned)
        assert vm.pins == 0

    def test_page_0_of_ram_that_starts_at_ipa_0(self, create: Create) -> None:
        vm = create("low", [RamBlock(0, 1 << 20)])
        vm.write(0, b"vector table")
        assert vm.read(0, 12) == b"vector table"
        with pytest.raises(Stage2Fault) as caught:
            vm.pin(pages(PAGE_SIZE, 0))
        assert (caught.value.ipa, caught.value.reason) == (0, Reason.NULL)
        pinned = vm.pin(pages(PAGE_SIZE, 2 * PAGE_SIZE))
        assert vm.pinned() == {1: 1, 2: 1}
        vm.unpin(pinned)

    def test_is_undone_once_and_by_its_vm(self, create: Create, vm: VirtualMachine) -> None:
        other = create("other", 1 << 20)
        pinned = vm.pin(pages(RAM))
        with pytest.raises(ValueError, match="not pinned by other"):
            other.unpin(pinned)
        vm.unpin(pinned)
        with pytest.raises(ValueError, match="released"):
            vm.unpin(pinned)
        with pytest.raises(ValueError, match="released"):
            vm.load(pinned, 0, 1)
        assert vm.pins == other.pins == 0

    def test_survives_a_change_of_kind(self, vm: VirtualMachine) -> None:
        pinned = vm.pin(pages(RAM + PAGE_SIZE, RAM + PAGE_SIZE))
        vm.set_kind(RAM + PAGE_SIZE, PageKind.NONE)
        assert vm.stage2.walk(RAM + PAGE_SIZE).pa is None
        assert vm.pinned() == {(RAM >> 12) + 1: 2}
        vm.store_fields(pinned, 0, *whole(b"OP-TEE writes"))
        vm.unpin(pinned)
        assert vm.pins == 0
        vm.set_kind(RAM + PAGE_SIZE, PageKind.RAM_RW)
        assert vm.read(RAM + PAGE_SIZE, 13) == b"OP-TEE writes"

    def test_a_page_mapped_at_another_place_counts_where_its_ram_lies(self, vm: VirtualMachine) -> None:
        vm.set_kind(RAM + 5 * PAGE_SIZE, PageKind.RAM_RW, page=7)
        pinned = vm.pin(pages(RAM + 5 * PAGE_SIZE, RAM + 7 * PAGE_SIZE))
        assert pinned.pas[0] == pinned.pas[1] == vm.regions[0].bank.pa[7]
        assert vm.pinned() == {(RAM >> 12) + 7: 2}
        vm.unpin(pinned)

    def test_a_page_of_one_region_may_be_mapped_into_another(self, two_region_vm: VirtualMachine) -> None:
        vm = two_region_vm
        vm.set_kind(HIGH, PageKind.RAM_RW, page=3)
        pinned = vm.pin(pages(HIGH, HIGH + PAGE_SIZE))
        vm.store_fields(pinned, 0, *whole(b"alias"))
        assert vm.ram[0].read(RAM + 3 * PAGE_SIZE, 5) == b"alias"
        assert vm.read(HIGH, 5) == b"alias"
        assert vm.pinned() == {(RAM >> 12) + 3: 1, (HIGH >> 12) + 1: 1}
        vm.unpin(pinned)
        assert vm.pins == 0


class TestPinnedBytes:
    @settings(deadline=None)
    @given(
        st.lists(st.sampled_from([*range(RAM, RAM + 4 * PAGE_SIZE, PAGE_SIZE), HIGH]), min_size=1, unique=True),
        st.integers(0, 5 * PAGE_SIZE),
        st.binary(max_size=100).map(lambda piece: piece * 90),
    )
    def test_are_one_run_in_the_order_of_the_pages(self, ipas: list[int], offset: int, data: bytes) -> None:
        machine = Machine()
        vm = machine.create_xen("guest", [RamBlock(RAM, 4 * PAGE_SIZE), RamBlock(HIGH, PAGE_SIZE)])
        pinned = vm.pin(np.array(ipas, dtype=np.uint64))
        if offset + len(data) > len(ipas) * PAGE_SIZE:
            with pytest.raises(ValueError, match="outside"):
                vm.store_fields(pinned, offset, *whole(data))
            with pytest.raises(ValueError, match="outside"):
                vm.load(pinned, offset, len(data))
        else:
            vm.store_fields(pinned, offset, *whole(data))
            expected = bytearray(len(ipas) * PAGE_SIZE)
            expected[offset : offset + len(data)] = data
            assert b"".join(vm.read(ipa, PAGE_SIZE) for ipa in ipas) == expected
            assert vm.load(pinned, offset, len(data)) == data
            assert b"".join(machine.memory.read(pa, PAGE_SIZE) for pa in pinned.pas.tolist()) == expected
        machine.close()

    @pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (2 * PAGE_SIZE, 1), (1 << 64, 0)])
    def test_outside_is_an_error(self, vm: VirtualMachine, offset: int, size: int) -> None:
        pinned = vm.pin(pages(RAM, RAM + PAGE_SIZE))
        with pytest.raises(ValueError, match="outside"):
            vm.load(pinned, offset, size)
        vm.unpin(pinned)

    @pytest.mark.parametrize("base", [0, PAGE_SIZE - 100, PAGE_SIZE - 50, PAGE_SIZE - 1, PAGE_SIZE])
    def test_fields_are_written_and_nothing_between(self, vm: VirtualMachine, base: int) -> None:
        pinned = vm.pin(pages(RAM + PAGE_SIZE, RAM))
        data = bytes(range(1, 101))
        vm.store_fields(pinned, base, data, [slice(0, 3), slice(45, 55), slice(99, 100)])
        expected = data[:3] + bytes(42) + data[45:55] + bytes(44) + data[99:]
        assert vm.load(pinned, base, 100) == expected
        assert vm.load(pinned, 0, 2 * PAGE_SIZE).count(0) == 2 * PAGE_SIZE - 14
        vm.unpin(pinned)


class TestSharedFrames:
    """Rule R26: a frame that two VMs map is refused unless it is named."""

    SHARED = RAM + 3 * PAGE_SIZE
    WINDOW = 0x9000_0000

    def shared(self, create: Create) -> tuple[VirtualMachine, VirtualMachine]:
        owner, user = create("owner", 1 << 20), create("user", 1 << 20)
        user.map_frames_of(owner, self.SHARED, self.WINDOW, 2)
        return owner, user

    def test_neither_may_share_it_with_op_tee(self, create: Create) -> None:
        owner, user = self.shared(create)
        for vm, ipa in ((owner, self.SHARED + PAGE_SIZE), (user, self.WINDOW)):
            with pytest.raises(Stage2Fault) as caught:
                vm.pin(pages(RAM, ipa))
            assert (caught.value.ipa, caught.value.reason) == (ipa, Reason.SHARED)
            assert vm.pins == 0

    def test_both_may_use_it_otherwise(self, create: Create) -> None:
        owner, user = self.shared(create)
        owner.write(self.SHARED, b"hello")
        assert user.read(self.WINDOW, 5) == b"hello"
        user.write(self.WINDOW + PAGE_SIZE, b"world")
        assert owner.read(self.SHARED + PAGE_SIZE, 5) == b"world"

    def test_named_ones_are_allowed(self, create: Create) -> None:
        owner, user = self.shared(create)
        owner.allowed_shared_frames = frozenset({self.SHARED})
        assert owner.allowed_shared_frames == {self.SHARED}
        user.allowed_shared_frames = frozenset({self.WINDOW})
        first, second = owner.pin(pages(self.SHARED)), user.pin(pages(self.WINDOW, RAM))
        assert first.pas[0] == second.pas[0]
        assert owner.pinned() == {self.SHARED >> 12: 2}
        assert user.pinned() == {RAM >> 12: 1}
        user.store_fields(second, 4090, *whole(b"two pages"))
        assert owner.load(first, 4090, 6) == b"two pa"
        with pytest.raises(Stage2Fault):
            owner.pin(pages(self.SHARED + PAGE_SIZE))
        user.unpin(second)
        owner.unpin(first)
        owner.allowed_shared_frames = frozenset()
        with pytest.raises(Stage2Fault):
            owner.pin(pages(self.SHARED))

    def test_ends_with_the_other_mapping(self, create: Create) -> None:
        owner, user = self.shared(create)
        user.stage2.unmap(self.WINDOW, 1)
        assert owner.regions[0].entries[3:5].tolist() == [4, 0]
        owner.unpin(owner.pin(pages(self.SHARED)))
        with pytest.raises(Stage2Fault):
            owner.pin(pages(self.SHARED + PAGE_SIZE))

    def test_ends_with_the_other_vm(self, machine: Machine, create: Create) -> None:
        owner, user = self.shared(create)
        machine.destroy(user)
        owner.unpin(owner.pin(pages(self.SHARED, self.SHARED + PAGE_SIZE)))

    def test_a_dead_owner_takes_its_frames_along(self, machine: Machine, create: Create) -> None:
        owner, user = self.shared(create)
        frame = user.stage2.walk(self.WINDOW).pa
        assert frame is not None
        machine.destroy(owner)
        with pytest.raises(Stage2Fault) as caught:
            user.read(self.WINDOW, 1)
        assert caught.value.reason is Reason.UNMAPPED
        assert user.find(frame) is None
        create("next", 1 << 20)
        user.unpin(user.pin(pages(RAM)))

    def test_many_frames_mapped_as_a_block_are_shared_and_given_up_alike(self) -> None:
        machine = Machine(Contiguous())
        owner, user = machine.create_xen("owner", 8 << 20), machine.create_xen("user", 1 << 20)
        user.map_frames_of(owner, RAM + (2 << 20), self.WINDOW, 600)
        assert user.stage2.walk(self.WINDOW).pages == 512
        shared = slice(512, 512 + 600)
        assert not owner.regions[0].entries[shared].any()
        assert np.count_nonzero(owner.regions[0].entries) == 2048 - 600
        user.stage2.unmap(self.WINDOW + PAGE_SIZE, 599)
        assert np.count_nonzero(owner.regions[0].entries) == 2048 - 1
        user.map_frames_of(owner, RAM, self.WINDOW, 512)
        assert np.count_nonzero(owner.regions[0].entries) == 2048 - 512
        machine.destroy(owner)
        assert user.stage2.walk(self.WINDOW).pa is None
        user.unpin(user.pin(pages(RAM)))
        other = machine.create_xen("other", 8 << 20)
        user.map_frames_of(other, RAM, self.WINDOW, 512)
        machine.destroy(user)
        assert np.count_nonzero(other.regions[0].entries) == 2048
        machine.close()

    def test_counts_mappings_not_vms(self, create: Create) -> None:
        owner, user = self.shared(create)
        user.map_frames_of(owner, self.SHARED, 0xA000_0000)
        user.stage2.unmap(self.WINDOW, 2)
        with pytest.raises(Stage2Fault) as caught:
            owner.pin(pages(self.SHARED))
        assert caught.value.reason is Reason.SHARED
        user.stage2.unmap(0xA000_0000, 1)
        owner.unpin(owner.pin(pages(self.SHARED)))


class TestFind:
    def test_turns_translation_round(self, vm: VirtualMachine, machine: Machine) -> None:
        for ipa in (RAM, RAM + 5, END - 1):
            vm.read(ipa, 1)
            pa = vm.stage2.walk(ipa).pa
            assert pa is not None
            assert vm.find(pa) == ipa
            assert machine.find(pa) == (vm, ipa)

    def test_follows_a_frame_to_where_it_is_mapped(self, vm: VirtualMachine) -> None:
        pa = int(vm.regions[0].bank.pa[9])
        vm.set_kind(RAM + 2 * PAGE_SIZE, PageKind.RAM_RW, page=9)
        vm.set_kind(RAM + 9 * PAGE_SIZE, PageKind.NONE)
        assert vm.find(pa + 3) == RAM + 2 * PAGE_SIZE + 3

    def test_knows_unmapped_ram_and_nothing_else(self, vm: VirtualMachine, create: Create) -> None:
        vm.set_kind(RAM + PAGE_SIZE, PageKind.NONE)
        assert vm.find(int(vm.regions[0].bank.pa[1])) == RAM + PAGE_SIZE
        other = create("other", 1 << 20)
        assert vm.find(int(other.regions[0].bank.pa[1])) is None
        assert vm.find(RAM) is None


class TestInterrupts:
    def test_are_taken_in_order_and_merge_while_pending(self, vm: VirtualMachine) -> None:
        calls: list[None] = []
        vm.inject(40)
        vm.on_interrupt = lambda: calls.append(None)
        for interrupt in (33, 40, 33):
            vm.inject(interrupt)
        assert len(calls) == 3
        assert [vm.acknowledge() for _ in range(3)] == [40, 33, None]
        vm.inject(33)
        assert vm.acknowledge() == 33


def test_ram_may_come_and_go_while_others_run(machine: Machine, vm: VirtualMachine) -> None:
    vm.write(RAM, b"kept")
    machine.add_ram(vm, RamBlock(HIGH, 1 << 20))
    pinned = vm.pin(pages(HIGH, RAM, HIGH + PAGE_SIZE))
    assert vm.pinned() == {HIGH >> 12: 1, RAM >> 12: 1, (HIGH >> 12) + 1: 1}
    assert vm.load(pinned, PAGE_SIZE, 4) == b"kept"
    vm.unpin(pinned)
    banks = len(machine.memory.banks)
    with pytest.raises(ValueError, match="overlaps"):
        machine.add_ram(vm, RamBlock(HIGH + PAGE_SIZE, 1 << 20))
    assert len(machine.memory.banks) == banks


def test_a_vm_needs_a_vcpu(machine: Machine) -> None:
    with pytest.raises(ValueError, match="vCPU"):
        machine.create_kvm("none", 1 << 20, 0)


def test_set_kind_outside_of_ram_is_an_error(vm: VirtualMachine) -> None:
    with pytest.raises(ValueError, match="no RAM"):
        vm.set_kind(0x9000_0000, PageKind.RAM_RW)


def test_frames_given_by_the_caller_are_used(machine: Machine) -> None:
    vm = machine.create_xen("chosen", [RamBlock(RAM, 8 * PAGE_SIZE, frames=Frames(0x9_0000_0000, 8, permutation=3))])
    assert vm.pin(pages(RAM)).pas.tolist() == [0x9_0000_3000]
