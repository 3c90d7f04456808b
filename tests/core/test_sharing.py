"""Shared memory: rules R5 to R9, R12, R26, R27 (B1, B2, B3, B4, B7, B8, B15)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hv_models.machine import MEDIATOR_BASE, RamBlock
from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind
from optee.abi.message import ENTRIES_PER_PAGE, META, NONCONTIG, Command, Message, Param, list_pages, page_count
from optee.abi.smc import Function, ReturnCode, to_pair
from tests.core.pair import (
    BAD_PARAMETERS,
    COMMS,
    OUT_OF_MEMORY,
    RMEM_IN,
    TMEM_IN,
    TMEM_INOUT,
    TMEM_OUT,
    VALUE_IN,
    VALUE_INOUT,
    Pair,
    ask_alloc,
    interrupt,
    invoke,
    policy_of,
    register,
    smc,
    succeed,
)

LENGTHS = [1, 2, 128, 129, 130, 510, 511, 512, 513, 1022, 1023, 16384]


@pytest.mark.parametrize("pages", LENGTHS)
@pytest.mark.parametrize("kind", ["kvm", "xen"])
def test_op_tee_sees_the_frames_of_the_named_pages_in_order_and_they_are_pinned(make, kind, pages):
    pair = make()
    guest = pair.guest(kind, ram=16 << 20)
    param = guest.tmem(pages, offset=5)
    seen = []

    def look(world, now, regs):
        (translated,) = world.message(now).params
        seen.append((world.pages_of(translated), translated, guest.pins(), guest.sums()["pages"]))
        return succeed()(world, now, regs)

    pair.world.script.append(look)
    assert guest.invoke(param).ret == 0
    ((frames, translated, pins, charged),) = seen
    named, at = [], param.a & ~0xFFF
    while len(named) < pages:
        words = np.frombuffer(guest.ram.read(at, PAGE_SIZE), np.uint64).tolist()
        named += words[: min(ENTRIES_PER_PAGE, pages - len(named))]
        at = words[-1]
    assert [pair.machine.find(pa) for pa in frames] == [(guest.vm, ipa) for ipa in named]
    assert (translated.attr, translated.b, translated.c, translated.a % PAGE_SIZE) == (*param[:1], *param[2:], 5)
    assert pins == charged == pages
    pair.settle(guest)


def test_a_list_page_is_zero_behind_its_entries_and_a_shadow_behind_its_message(make):
    pair = make()
    guest = pair.guest()
    seen = []

    def look(world, now, regs):
        frame = bytes(world.memory.frame(now.pa))
        (first, second) = world.message(now).params
        lists = bytes(world.memory.frame(first.a & ~0xFFF))
        seen.append((frame[96:], lists[8 * 3 :], second))
        return succeed()(world, now, regs)

    pair.world.script.append(look)
    message = invoke(guest.tmem(3), Param(VALUE_IN, 1, 2, 3))
    ipa = guest.page()
    guest.ram.write(ipa, b"\xee" * PAGE_SIZE)  # what stands behind the message is nobody's business
    guest.write(message, ipa)
    assert guest.call(ipa)[0][0] == 0
    ((behind, behind_list, second),) = seen
    assert not any(behind) and not any(behind_list)
    assert second == Param(VALUE_IN, 1, 2, 3)


SIZES = [0, 1, 4095, 4096, 4097, 2**32 - 4096, 2**32, 2**32 + 4096, 2**44 + 4096, 2**63, 2**64 - 4096, 2**64 - 1]


@pytest.mark.parametrize(("name", "limit"), [("default", 16384), ("xen", 129), ("minimal", 512)])
def test_sizes_are_counted_in_true_integers(make, name, limit):
    """The boundary product: pages = ceil((size + offset) / 4096), refused above the limit, never wrapped."""
    pair = make(name)
    guest = pair.guest(ram=16 << 20)
    near = [limit * PAGE_SIZE + delta for delta in (-PAGE_SIZE, -1, 0, 1, PAGE_SIZE)]
    data = guest.page()
    lists = [guest.page() for _ in range(list_pages(limit) + 1)]
    guest.page_list([data] * (limit + 1), lists)
    counted = []

    def count(world, now, regs):
        (param,) = world.message(now).params
        counted.append((len(world.pages_of(param)), param.b, param.a % PAGE_SIZE, guest.pins()))
        return succeed()(world, now, regs)

    for size, offset in itertools.product([*SIZES, *near], (0, 1, 4095)):
        pages = -(-(size + offset) // PAGE_SIZE)
        assert pages == page_count(size, offset)
        counted.clear()
        pair.world.script.append(count)
        message = guest.invoke(Param(TMEM_INOUT, lists[0] | offset, size, 7))
        if 0 < pages <= limit:
            assert (message.ret, counted) == (0, [(pages, size, offset, pages)])
        else:
            pair.world.script.clear()
            expected = OUT_OF_MEMORY if pages else BAD_PARAMETERS
            assert (message.ret, message.ret_origin, counted) == (expected, COMMS, [])
        pair.settle(guest)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 126, 127, 128, 129, 0x07FF_FFFF, 0x0800_0000, 0xFFFF_FFFF])
@pytest.mark.parametrize("function", [Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG])
def test_the_number_of_parameters_is_looked_at_before_it_is_used(make, function, count):
    pair = make()
    guest = pair.guest()
    ipa = guest.write(Message(Command.INVOKE_COMMAND))
    guest.ram.write(ipa + 28, count.to_bytes(4, "little"))
    before = len(pair.world.inbox)
    regs = guest.smc(function, *to_pair(ipa))
    header = Message.unpack(guest.ram.read(ipa, 28) + bytes(4))
    room = 127 if function is Function.CALL_WITH_ARG else (4096 - 160 - 32) // 32
    if count <= room:
        assert (regs[0], header.ret) == (0, 0)
    elif function is Function.CALL_WITH_ARG:
        assert (regs[0], header.ret, header.ret_origin) == (0, BAD_PARAMETERS, COMMS)
    else:
        assert (regs[0], header.ret) == (ReturnCode.EBADADDR, 0)
    assert len(pair.world.inbox) == before + (count <= room)
    pair.settle(guest)


BAD_PAGES = ["zero", "unaligned", "last-bit", "beyond", "huge", "device", "read-only", "unmapped", "grant", "foreign"]


def bad_page(pair, guest, what):
    """The IPA of a page that cannot be shared. As a list page it would be a good one: all it names can be."""
    entries = np.full(512, guest.page(), np.uint64).tobytes()
    ipa = guest.page(2)
    guest.ram.write(ipa, entries + entries)
    top = guest.ram.base + guest.ram.size
    numbers = {"zero": 0, "unaligned": ipa + 8, "last-bit": ipa + 1, "beyond": top, "huge": 2**64 - PAGE_SIZE}
    if what in numbers:
        return numbers[what]
    if what in ("grant", "foreign"):
        other = pair.guest("xen")
        page = other.page()
        other.ram.write(page, entries)
        (guest.vm.map_grant if what == "grant" else guest.vm.map_foreign)(other.vm, page, ipa)
    else:
        kinds = {"device": PageKind.MMIO, "read-only": PageKind.RAM_RO, "unmapped": PageKind.NONE}
        guest.vm.set_kind(ipa, kinds[what])
    return ipa


@pytest.mark.parametrize("position", [0, 1, 511, 700])
@pytest.mark.parametrize("what", BAD_PAGES)
def test_one_page_that_is_not_the_guests_ram_rejects_the_message_and_undoes_the_rest(make, what, position):
    pair = make()
    guest = pair.guest("xen")
    bad = bad_page(pair, guest, what)
    good = guest.page()
    pages = [good] * 701
    pages[position] = bad
    param = Param(TMEM_INOUT, guest.page_list(pages), 701 * PAGE_SIZE, 2)
    before = len(pair.world.inbox)
    for params in ([param], [guest.tmem(3, cookie=1), param], [param, guest.tmem(3, cookie=1)]):
        message = guest.invoke(*params)
        assert (message.ret, message.ret_origin) == (BAD_PARAMETERS, COMMS)
        assert len(pair.world.inbox) == before
        pair.settle(guest)


def test_any_pages_and_kinds_are_pinned_iff_all_are_read_write_ram():
    """Random stage-2 tables and lists: OP-TEE is asked exactly if every page is shareable."""
    kinds = [PageKind.RAM_RW, PageKind.RAM_RW, PageKind.RAM_RW, PageKind.RAM_RO, PageKind.MMIO, PageKind.NONE]
    pair = Pair()
    guest = pair.guest("xen")
    pages = [guest.page() for _ in range(12)]
    place = guest.page()

    @given(st.lists(st.sampled_from(kinds), min_size=12, max_size=12), st.lists(st.integers(0, 13), min_size=1))
    def check(chosen, named):
        for ipa, kind in zip(pages, chosen, strict=True):
            guest.vm.set_kind(ipa, kind)
        names = [*pages, 0, pages[0] + 16]
        guest.page_list([names[index] for index in named], [place])
        good = all(index < 12 and chosen[index] is PageKind.RAM_RW for index in named)
        message = guest.invoke(Param(TMEM_INOUT, place, len(named) * PAGE_SIZE, 3))
        assert message.ret == (0 if good else BAD_PARAMETERS)
        pair.settle(guest)

    check()
    pair.check()
    pair.close()


def chained(guest, pages, next_pointer, after):
    """A list of so many pages of which the next pointer behind list page `after` is what is given."""
    lists = [guest.page() for _ in range(list_pages(pages))]
    guest.page_list([guest.page()] * pages, lists)
    guest.ram.write(lists[after] + 8 * ENTRIES_PER_PAGE, (next_pointer % 2**64).to_bytes(8, "little"))
    return lists


@pytest.mark.parametrize(
    "pointer", ["zero", "unaligned", "last-bit", "beyond", "huge", "device", "read-only", "unmapped", "grant"]
)
@pytest.mark.parametrize(("pages", "after"), [(512, 0), (1023, 1), (16384, 0), (16384, 31)])
def test_a_next_pointer_that_is_not_page_aligned_ram_rejects_the_message(make, pages, after, pointer):
    pair = make()
    guest = pair.guest("xen", ram=16 << 20)
    lists = chained(guest, pages, bad_page(pair, guest, pointer), after)
    for message in (
        invoke(Param(TMEM_INOUT, lists[0], pages * PAGE_SIZE, 3)),
        invoke(guest.tmem(2, cookie=9), Param(TMEM_INOUT, lists[0], pages * PAGE_SIZE, 3)),
        register(Param(TMEM_OUT, lists[0], pages * PAGE_SIZE, 3)),
    ):
        answer = guest.run(message)
        assert (answer.ret, answer.ret_origin) == (BAD_PARAMETERS, COMMS)
        pair.settle(guest)


def test_next_pointers_are_checked_in_every_step_of_long_work(make):
    """R7 also where the list goes on after others had their turn."""
    pair = make(policy_of(pages_per_buffer=60000, pages=60000, memory=64 << 20))
    guest = pair.guest(ram=32 << 20)
    for pages, after in ((33 * 511 + 5, 32), (66 * 511 + 1, 32), (66 * 511 + 1, 65)):
        lists = chained(guest, pages, 0, after)
        good = lists[after + 1]
        guest.ram.write(good + 8, guest.ram.read(good, 64))
        for pointer, ret in ((good, 0), (good + 8, BAD_PARAMETERS), (good + 4095, BAD_PARAMETERS), (0, BAD_PARAMETERS)):
            guest.ram.write(lists[after] + 8 * ENTRIES_PER_PAGE, pointer.to_bytes(8, "little"))
            assert guest.invoke(Param(TMEM_INOUT, lists[0], pages * PAGE_SIZE, 3)).ret == ret
            pair.settle(guest)


def test_the_first_list_page_is_read_write_ram_too(make):
    pair = make()
    guest = pair.guest("xen")
    for what in ("beyond", "huge", "device", "read-only", "unmapped", "foreign"):
        assert guest.invoke(Param(TMEM_INOUT, bad_page(pair, guest, what) & ~0xFFF, 10, 3)).ret == BAD_PARAMETERS
        pair.settle(guest)


def test_a_list_that_points_to_itself_ends_at_its_count(make):
    """B9: every next pointer leads back; the work is that of the count, and OP-TEE sees the count."""
    pair = make()
    guest = pair.guest()
    place = guest.page()
    guest.page_list([guest.page()] * ENTRIES_PER_PAGE, [place])
    guest.ram.write(place + PAGE_SIZE - 8, place.to_bytes(8, "little"))
    assert guest.invoke(Param(TMEM_INOUT, place, 16384 * PAGE_SIZE, 3)).ret == 0
    assert guest.invoke(Param(TMEM_INOUT, place, 2**64 - 1, 3)).ret == OUT_OF_MEMORY
    pair.settle(guest)


def test_a_list_page_may_be_a_data_page_and_the_message_its_own_buffer(make):
    guest = make().guest()
    place = guest.page()
    guest.page_list([place, place], [place])
    assert guest.invoke(Param(TMEM_INOUT, place, 2 * PAGE_SIZE, 3)).ret == 0
    ipa = guest.page()
    guest.write(invoke(Param(TMEM_INOUT, guest.page_list([ipa]), 100, 3)), ipa)
    assert guest.call(ipa)[0][0] == 0
    guest.pair.settle(guest)


def test_a_page_is_pinned_once_per_mention(make):
    guest = make().guest()
    page = guest.page()
    param = Param(TMEM_OUT, guest.page_list([page] * 5), 5 * PAGE_SIZE, 3)
    guest.register(param)
    assert set(guest.vm.pinned().values()) == {5}
    guest.register(param._replace(c=4))
    assert set(guest.vm.pinned().values()) == {10}
    guest.unregister(3)
    assert set(guest.vm.pinned().values()) == {5}
    guest.unregister(4)
    guest.pair.settle(guest)


@pytest.mark.parametrize(
    ("attr", "pointer", "size", "ret"),
    [
        (TMEM_INOUT, 0, 0, 0),
        (TMEM_INOUT, 0, 4096, 0),
        (TMEM_INOUT, 0, 2**64 - 1, 0),
        (TMEM_INOUT & ~NONCONTIG, 0, 0, 0),
        (TMEM_INOUT & ~NONCONTIG, 0, 4096, 0),
        (TMEM_INOUT & ~NONCONTIG, 0x4000_1000, 0, BAD_PARAMETERS),
        (TMEM_INOUT & ~NONCONTIG, 0x4000_1000, 4096, BAD_PARAMETERS),
        (TMEM_INOUT & ~NONCONTIG, 1, 1, BAD_PARAMETERS),
        (TMEM_INOUT, 0x4000_1000, 0, BAD_PARAMETERS),
        (RMEM_IN, 0, 0, BAD_PARAMETERS),  # cookie 0
    ],
)
def test_null_and_empty_references_have_one_meaning(make, attr, pointer, size, ret):
    """B15: NULL goes through as NULL whatever its size; an empty list is refused; so is RMEM cookie 0."""
    guest = make().guest()
    seen = []

    def look(world, now, regs):
        seen.append(world.message(now).params[0])
        return succeed()(world, now, regs)

    guest.pair.world.script.append(look)
    message = guest.invoke(Param(attr, pointer, size, 0))
    assert message.ret == ret
    assert seen == ([] if ret else [Param(attr, 0, size, 0)])
    guest.pair.settle(guest)


@pytest.mark.parametrize("kind", ["kvm", "xen"])
def test_ram_at_ipa_0_is_not_shared_and_no_frame_is_at_pa_0(make, kind):
    pair = make()
    guest = pair.guest(kind, ram=[RamBlock(0, 8 << 20)])
    assert guest.ram.base == 0
    assert guest.invoke(guest.tmem(2)).ret == 0
    assert guest.invoke(Param(TMEM_INOUT, guest.page_list([0]), 1, 3)).ret == BAD_PARAMETERS
    assert guest.invoke(Param(TMEM_INOUT, guest.page_list([guest.page(), 0]), 8192, 3)).ret == BAD_PARAMETERS
    assert all(bank.pa.min() > 0 for bank in pair.machine.memory.banks)
    pair.settle(guest)


def test_a_frame_that_two_vms_map_is_shared_by_neither_unless_named(make):
    """R26."""
    pair = make()
    first, second = pair.guest("xen"), pair.guest("xen")
    ipa, window = first.page(), second.page()
    assert first.invoke(Param(TMEM_INOUT, first.page_list([ipa]), 1, 3)).ret == 0
    second.vm.map_frames_of(first.vm, ipa, window)
    for guest, page in ((first, ipa), (second, window)):
        assert guest.invoke(Param(TMEM_INOUT, guest.page_list([page]), 1, 3)).ret == BAD_PARAMETERS
    first.vm.allowed_shared_frames = frozenset({ipa})
    assert first.invoke(Param(TMEM_INOUT, first.page_list([ipa]), 1, 3)).ret == 0
    assert second.invoke(Param(TMEM_INOUT, second.page_list([window]), 1, 3)).ret == BAD_PARAMETERS
    first.vm.allowed_shared_frames = frozenset()
    second.vm.set_kind(window, PageKind.NONE)
    assert first.invoke(Param(TMEM_INOUT, first.page_list([ipa]), 1, 3)).ret == 0


@pytest.mark.parametrize("kind", range(256))
def test_every_type_byte_is_a_buffer_or_goes_through_as_it_is(make, kind):
    """B7: only TMEM is translated, whatever META and reserved bits say; nothing else is touched."""
    guest = make().guest()
    world = guest.pair.world
    tmem = kind in (9, 10, 11)
    for extra in (0, META, NONCONTIG, META | NONCONTIG, 7 << 16, 1 << 40 | NONCONTIG, 2**64 - 2**32):
        for position in (0, 3):
            given = Param(kind | extra, guest.page(), 64, 0x55)
            params = [Param(VALUE_INOUT, 1, 2, 3)] * position + [given]
            seen = []

            def look(world, now, regs, seen=seen):
                seen.append(world.message(now).params)
                return succeed()(world, now, regs)

            world.script.append(look)
            guest.ram.write(given.a, guest.page().to_bytes(8, "little"))
            message = guest.invoke(*params)
            if tmem and not extra & NONCONTIG:
                assert message.ret == BAD_PARAMETERS
                world.script.clear()
            elif tmem:
                (got,) = seen
                assert got[position].a >= MEDIATOR_BASE
                assert got[position]._replace(a=given.a) == given
            else:
                assert seen == [params]
    guest.pair.settle(guest)


def test_a_guest_that_writes_while_it_is_read_gains_nothing(make, monkeypatch):
    """B1: the k-th read of an address returns version k. Each byte is read once, so only version 0 counts."""
    pair = make()
    guest = pair.guest()
    honest, other = guest.page(), guest.page()
    place = guest.page_list([honest])
    ipa = guest.write(invoke(Param(TMEM_INOUT, place, 1, 3), Param(VALUE_IN, 1, 2, 3)))
    seen = []

    def look(world, now, regs):
        message = world.message(now)
        seen.append(
            (message.cmd, [pair.machine.find(pa)[1] for pa in world.pages_of(message.params[0])], len(message.params))
        )
        return succeed()(world, now, regs)

    reads = []
    read = type(guest.vm).read

    def changing(self, address, size, *, writable=False):
        data = read(self, address, size, writable=writable)
        reads.append((address, size))
        # as soon as something was read, the guest has another idea
        if address == ipa:
            guest.write(Message(Command.UNREGISTER_SHM, params=[Param(TMEM_IN, 8, 2**63, 0)] * 127), ipa)
        else:
            guest.page_list([other], [place])
        return data

    monkeypatch.setattr(type(guest.vm), "read", changing)
    pair.world.script.append(look)
    regs = pair.drive(guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(ipa))))
    assert regs[0] == 0
    assert seen == [(Command.INVOKE_COMMAND, [honest], 2)]
    assert sorted(address for address, _ in reads) == sorted({ipa, place})


def test_memory_above_4_gib_is_shared_like_any_other(make):
    """Messages, page lists, data pages and pages for RPC arguments; addresses come in two halves."""
    pair = make()
    guest = pair.guest(ram=[RamBlock(0x3_4000_0000, 8 << 20)])
    guest.register(guest.tmem(2, cookie=1, kind=TMEM_OUT))
    assert guest.pins() == 2
    pair.world.script += [ask_alloc(), interrupt()]
    guest.call(invoke())
    _, page = guest.give_page(0xC0)
    assert guest.record.arguments[0xC0].ipa == page > 1 << 32
    assert guest.resume()[0] == 0
    assert guest.unregister(1).ret == 0


def test_what_op_tee_wrote_is_reported_dirty_at_completion_and_at_unpin(make):
    """R27; and a page that is write-protected for logging counts as read-write RAM."""
    pair = make()
    guest = pair.guest("kvm")
    quiet, outgoing, both, kept = (
        guest.tmem(2, cookie=n, kind=k) for n, k in enumerate((TMEM_IN, TMEM_OUT, TMEM_INOUT, TMEM_OUT), 1)
    )
    data = {
        n: np.frombuffer(guest.ram.read(p.a, 16), np.uint64).tolist()
        for n, p in enumerate((quiet, outgoing, both, kept), 1)
    }
    assert guest.register(kept).ret == 0
    guest.vm.start_dirty_logging()

    def dirty():
        return {gfn << 12 for gfn in guest.vm.dirty_pages()}

    assert guest.invoke(quiet).ret == 0
    assert not dirty() & set(data[1])
    for number, param in ((2, outgoing), (3, both)):
        assert guest.invoke(param).ret == 0
        assert set(data[number]) <= dirty()
    guest.invoke(Param(RMEM_IN, 0, 8, 4))
    assert not dirty() & set(data[4])
    guest.invoke(Param(6, 0, 8, 4))
    assert set(data[4]) <= dirty()
    guest.unregister(4)
    assert set(data[4]) <= dirty()
    guest.vm.stop_dirty_logging()


def test_each_buffer_of_a_message_may_be_the_one_that_op_tee_writes(make):
    """R27: all lists of a message are pinned at once."""
    pair = make()
    guest = pair.guest("kvm")
    kinds = (TMEM_IN, TMEM_OUT, TMEM_IN)
    params = [guest.tmem(1, cookie=n, kind=kind) for n, kind in enumerate(kinds, 1)]
    (written,) = np.frombuffer(guest.ram.read(params[1].a, 8), np.uint64).tolist()
    guest.vm.start_dirty_logging()
    guest.vm.dirty_pages()
    assert guest.invoke(*params).ret == 0
    assert written >> 12 in set(guest.vm.dirty_pages())
    guest.vm.stop_dirty_logging()


def test_no_host_address_is_in_a_guest_afterwards(make):
    """B8: pages come with a canary; neither it nor any address above 2^40 stands in guest RAM afterwards."""
    pair = make(fill=0xA5)
    guest = pair.guest()
    message = guest.invoke(guest.tmem(600, cookie=1), guest.tmem(3, cookie=2), Param(VALUE_INOUT, 1, 2, 3))
    assert message.ret == 0
    assert guest.invoke(guest.tmem(1), Param(TMEM_INOUT, 8, 10, 4)).ret == BAD_PARAMETERS
    assert host_words(pair, guest) == []


def host_words(pair, guest):
    """Words of a guest's RAM that are addresses of frames, tables or mediator pages, or the canary."""
    words = np.frombuffer(guest.dump(), np.uint64)
    suspicious = words[(words >= 1 << 40) & (words < 1 << 48)].tolist()
    found = [
        word for word in suspicious if any(bank.frames.page(word) is not None for bank in pair.machine.memory.banks)
    ]
    return found + words[words == 0xA5A5A5A5A5A5A5A5].tolist()


def mistaken_buffers(guest):
    """One parameter per mistake, as the guest's second one: (what is wrong, parameter)."""
    unreadable = guest.tmem(600)
    guest.ram.write(unreadable.a + PAGE_SIZE - 8, (8).to_bytes(8, "little"))
    entry = guest.tmem(2)
    guest.ram.write(entry.a, bytes(8))
    return {
        "contiguous": Param(TMEM_INOUT & ~NONCONTIG, guest.page(), 64, 2),
        "too large": Param(TMEM_INOUT, guest.page(), 2000 * PAGE_SIZE, 2),
        "empty": Param(TMEM_INOUT, guest.page(), 0, 2),
        "over the limit": Param(TMEM_INOUT, guest.page(), 900 * PAGE_SIZE, 2),
        "live": Param(TMEM_INOUT, guest.page_list([guest.page()]), PAGE_SIZE, 77),
        "over the limit and live": Param(TMEM_INOUT, guest.page(), 900 * PAGE_SIZE, 77),
        "no list": Param(TMEM_INOUT, 1 << 38, PAGE_SIZE, 2),
        "no second list page": unreadable._replace(c=2),
        "not to be shared": entry._replace(c=2),
    }


def test_of_two_mistakes_the_first_one_is_told(make):
    """By the event: what is wrong, apart from how much was asked for in all."""
    pair = make(policy_of(pages=800, pages_per_buffer=1000))
    guest = pair.guest()
    assert guest.register(guest.tmem(1, cookie=77)).ret == 0
    good = guest.tmem(1, cookie=1)
    mistakes = mistaken_buffers(guest)

    def told(*params):
        pair.events.clear()
        message = guest.invoke(*params)
        (event,) = (event for event in pair.events if event.name in ("call_rejected", "call_refused"))
        assert guest.record.ledger.sums()["buffers"] == 1
        detail = {key: event.detail.get(key) for key in ("answer", "rule", "resource")}
        return message.ret, detail | ({} if "resource" in event.detail else {"why": event.detail["why"]})

    alone = {name: told(good, param) for name, param in mistakes.items()}
    assert alone["over the limit and live"] == alone["over the limit"] != alone["live"]
    for first, second in itertools.permutations(mistakes, 2):
        param = mistakes[second]
        later = param if param.c == 77 else param._replace(c=3)
        assert told(good, mistakes[first], later) == alone[first], (first, second)
    assert guest.unregister(77).ret == 0
    pair.settle(guest)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (16, 16, 16, 16), (3, 512, 511), (1022, 1, 1100)])
def test_all_buffers_of_a_message_are_charged_and_named_while_op_tee_has_them(make, sizes):
    pair = make()
    guest = pair.guest()
    message = invoke(*[guest.tmem(pages, cookie=n) for n, pages in enumerate(sizes, 1)])
    step = guest.submit(smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message))))
    sums = guest.record.ledger.sums()
    lists = sum(map(list_pages, sizes))
    assert (sums["calls"], sums["buffers"], sums["pages"]) == (1, len(sizes), sum(sizes))
    assert sums["memory"] == 256 + PAGE_SIZE + 256 * len(sizes) + 16 * sum(sizes) + PAGE_SIZE * lists
    for cookie in range(1, len(sizes) + 1):
        assert guest.invoke(guest.tmem(1, cookie=cookie)).ret == BAD_PARAMETERS
        assert guest.invoke(guest.tmem(1, cookie=9), guest.tmem(1, cookie=cookie)).ret == BAD_PARAMETERS
    pair.checker.scan()
    assert pair.drive(step)[0] == 0
    pair.settle(guest)


def test_our_own_list_comes_before_the_guest_s(make):
    """No page of ours is left for the second page of a list whose first entry cannot be shared either."""
    pair = make()
    guest = pair.guest()
    param = guest.tmem(600)
    guest.ram.write(param.a, bytes(8))
    assert guest.invoke(param).ret == BAD_PARAMETERS
    pair.host.left = 2
    assert guest.invoke(param).ret == OUT_OF_MEMORY
    pair.settle(guest)
