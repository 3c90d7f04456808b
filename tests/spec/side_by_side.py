"""The core and its specification, driven by the same moves, and compared after each."""

import yaml
from hypothesis import note

from hv_models.machine import RAM_BASE, RamBlock
from hv_models.memory import PAGE_SIZE
from hv_models.stage2 import PageKind
from mediator.core.policy import PolicyLimits
from mediator.core.steps import Forward, Preempt, Queue, Reply
from mediator.policies import PolicyDocument, policy_text
from optee.abi.smc import from_pair
from tests.core.pair import Pair
from tests.spec.specification.mediator import Specification
from tests.spec.specification.terms import SERVED, Ram

PAGES = 12
THREADS = 3
BASES = (RAM_BASE, 0, RAM_BASE)
"""Where the RAM of each guest begins: the second one's at IPA 0 (R9)."""
KINDS = {"rw": PageKind.RAM_RW, "ro": PageKind.RAM_RO, "device": PageKind.MMIO, "grant": PageKind.GRANT_RW}
LIMITS = ("pages", "buffers", "pages_per_buffer", "rpc_arguments", "calls", "memory", "reserved_pages")


class Memory:
    """The core's port to a guest's memory: notes what is reported dirty, and lets another vCPU write in between."""

    def __init__(self, vm):
        self.vm = vm
        self.dirty = set()
        self.after_read = None
        self.ipa_of = {
            int(pa): region.base + n * PAGE_SIZE for region in vm.regions for n, pa in enumerate(region.bank.pa)
        }

    def read(self, ipa, size, *, writable=False):
        return self._then_flip(self.vm.read(ipa, size, writable=writable))

    def load(self, pinned, offset, size):
        return self._then_flip(self.vm.load(pinned, offset, size))

    def _then_flip(self, data):
        if self.after_read is not None:
            self.after_read, change = None, self.after_read
            change()
        return data

    def mark_dirty(self, pinned):
        self.dirty.update(self.ipa_of[int(pa)] for pa in pinned.pas)
        self.vm.mark_dirty(pinned)

    def write_fields(self, ipa, data, fields):
        self.vm.write_fields(ipa, data, fields)

    def store_fields(self, pinned, base, data, fields):
        self.vm.store_fields(pinned, base, data, fields)

    def pin(self, ipas):
        return self.vm.pin(ipas)

    def unpin(self, pinned):
        self.vm.unpin(pinned)


class SideBySide:
    """Both mediators, their guests, and what OP-TEE has: calls that are with it, threads, pages."""

    def __init__(self, policy, pool=None, **limits):
        document = yaml.safe_load(policy_text(policy))
        document["limits"].update(limits)
        document["pool"] = {"pages": pool}
        self.pair = Pair(PolicyDocument.model_validate(document).policy(), threads=THREADS)
        self.checker = self.pair.checker
        self.checker.threads_held = None  # this OP-TEE keeps no books of its own
        self.spec = Specification(document, THREADS)
        self.agree = True
        """Nothing was found to differ so far."""
        self.rams = {}
        self.memories = {}
        self.pending = []
        """(ticket of the core's, ticket of the specification's, registers or None for a turn)"""
        self.places = {}
        """Where a page of the specification's mediator is in the core's machine."""
        for who, base in enumerate(BASES):
            create = self.pair.machine.create_xen if who == 1 else self.pair.machine.create_kvm
            vm = create(f"guest-{who}", [RamBlock(base, PAGES * PAGE_SIZE)])
            self.memories[vm.client_id] = Memory(vm)
            self.rams[vm.client_id] = Ram([base + n * PAGE_SIZE for n in range(PAGES)])

    # What a guest's memory holds

    def write(self, vm, ipa, data):
        """The guest's own writes, over as many pages as it takes; what lies outside of its RAM is lost."""
        ram = self.rams[vm]
        while data:
            size = min(len(data), PAGE_SIZE - ipa % PAGE_SIZE)
            page = ram.pages.get(ipa - ipa % PAGE_SIZE)
            if page is not None:
                page[ipa % PAGE_SIZE : ipa % PAGE_SIZE + size] = data[:size]
                self.memories[vm].vm.ram[0].write(ipa, data[:size])
            ipa, data = ipa + size, data[size:]

    def flip(self, vm, ipa, data):
        """Another vCPU will write this as soon as the next message or reply was read."""
        place = ipa - ipa % PAGE_SIZE
        data = data[: PAGE_SIZE - ipa % PAGE_SIZE]

        def in_core():
            self.memories[vm].vm.ram[0].write(ipa, data)

        def in_specification():
            self.rams[vm].pages[place][ipa % PAGE_SIZE : ipa % PAGE_SIZE + len(data)] = data

        self.memories[vm].after_read, self.rams[vm].after_read = in_core, in_specification

    def set_kind(self, vm, ipa, kind):
        self.memories[vm].vm.set_kind(ipa, KINDS[kind])
        self.rams[vm].kinds[ipa] = kind

    def short_of_pages(self, left):
        """The host has only so many pages left for the mediator, in the next move; None: enough."""
        self.pair.host.left = self.spec.pages_left = left

    # Moves

    def create(self, vm):
        memory, ram = self.memories[vm], self.rams[vm]
        return self.both(self.checker.create(vm, memory), self.spec.create(vm, ram))

    def destroy(self, vm, again=False):
        request = self.checker.reset if again else self.checker.destroy
        return self.both(request(vm), self.spec.destroy(vm, again))

    def abandon(self, vm):
        return self.both(self.checker.abandon(vm), self.spec.abandon(vm))

    def pause(self, vm):
        assert self.checker.pause(vm) == self.spec.pause(vm)
        self.compare()

    def resume(self, vm):
        assert self.checker.resume(vm) == self.spec.resume(vm)
        self.compare()

    def change_limits(self, vm, **limits):
        guest = self.spec.guests.get(vm)
        if guest is None:
            return
        asked = guest["asked"] | limits
        wanted = {name: count for name, count in asked.items() if name != "memory_kib"}
        self.pair.mediator.change_limits(
            {vm: PolicyLimits(memory=asked["memory_kib"] * 1024, **wanted)}, self.pair.mediator.pool.capacity
        )
        guest |= {"asked": asked, "limits": self.spec.limits(asked)}
        self.compare()

    def smc(self, vm, regs):
        note(f"guest {vm}: {', '.join(map(hex, regs))}")
        return self.both(self.checker.submit(vm, 0, regs), self.spec.smc(vm, regs))

    def answer(self, index, regs):
        """OP-TEE answers one of the calls that are with it."""
        ticket, mine, asked = self.pending.pop(index)
        note(f"OP-TEE, asked {', '.join(map(hex, asked))}: {', '.join(map(hex, regs))}")
        return self.both(self.checker.returned(ticket, regs), self.spec.answered(mine, regs))

    def lose(self, index):
        ticket, mine, _ = self.pending.pop(index)
        return self.both(self.checker.lost(ticket, "lost"), self.spec.lost(mine))

    def proceed(self, index):
        ticket, mine, _ = self.pending.pop(index)
        return self.both(self.checker.proceed(ticket), self.spec.proceed(mine))

    def give_back(self, index):
        ticket, mine, _ = self.pending.pop(index)
        return self.both(self.checker.give_back(ticket), self.spec.give_back(mine))

    def op_tee_writes(self, page, offset, data):
        """OP-TEE writes a page of the mediator's."""
        self.pair.machine.memory.write(self.places[id(page)][1] + offset, data)
        page["bytes"][offset : offset + len(data)] = data
        for place in [place for place in page["lists"] if offset - 8 < place < offset + len(data)]:
            del page["lists"][place]

    # Comparing

    def both(self, step, expected):
        """What came of a move: the same on both sides. Returns the registers of an answer."""
        while isinstance(step, Preempt) and expected[0] != "turn":
            step = self.checker.proceed(step.ticket)  # the specification releases a guest's buffers in one go
        self.agree = False
        self.short_of_pages(None)
        for memory in (*self.memories.values(), *self.rams.values()):
            memory.after_read = None
        kinds = {"reply": Reply, "forward": Forward, "turn": Preempt, "wait": Queue}
        assert type(step) is kinds[expected[0]], f"{step!r}, expected {expected[:2]}"
        regs = None
        if isinstance(step, Reply):
            regs = step.regs
            assert regs == expected[1], f"{step!r}, expected {tuple(map(hex, expected[1]))}"
        elif isinstance(step, Forward):
            self.compare_forward(step, *expected[1:])
        elif isinstance(step, Preempt):
            self.pending.append((step.ticket, expected[1], None))
        self.compare()
        self.agree = True
        return regs

    def compare_forward(self, step, regs, page, ticket):
        seen = step.regs
        if page is not None:
            self.places[id(page)] = page, from_pair(seen[1], seen[2])
            seen = (seen[0], 0, 0, *seen[3:])
            regs = (regs[0], 0, 0, *regs[3:])
        if ticket["what"] == "call":
            if page is None and ticket["function"] and id(ticket["shadow"]) not in self.places:
                raise AssertionError("a call that OP-TEE has not seen")
            if step.regs[0] in (0x32000004, 0x32000012):
                self.places[id(ticket["shadow"])] = ticket["shadow"], from_pair(step.regs[1], step.regs[2])
                seen, regs = (seen[0], 0, 0, *seen[3:]), (regs[0], 0, 0, *regs[3:])
            self.compare_page(ticket["guest"], ticket["shadow"])
            for argument in ticket["guest"]["arguments"].values():
                self.compare_page(ticket["guest"], argument["page"])
        assert seen == regs, f"{step!r}, expected {tuple(map(hex, regs))}"
        self.pending.append((step.ticket, ticket, step.regs))

    def compare_page(self, guest, page):
        """What OP-TEE finds in a page of the mediator's, and behind the page lists in it."""
        at = self.places[id(page)][1]
        data = bytearray(self.pair.machine.memory.frame(at))
        for place, buffer in page["lists"].items():
            pointer = int.from_bytes(data[place : place + 8], "little")
            data[place : place + 8] = bytes(8)
            if buffer["lists"]:
                found = self.walk(pointer, buffer["pages"], self.memories[guest["vm"]].ipa_of)
                assert (pointer % PAGE_SIZE, found) == (buffer["offset"], buffer["pinned"])
        assert data == page["bytes"]

    def walk(self, pointer, pages, ipa_of):
        """The guest's pages that a page list of the mediator's names; it is zero behind them."""
        found = []
        while pages:
            frame = self.pair.machine.memory.frame(pointer - pointer % PAGE_SIZE)
            words = [int.from_bytes(frame[n : n + 8], "little") for n in range(0, PAGE_SIZE, 8)]
            count = min(pages, 511)
            assert not any(words[count:511])
            found += [ipa_of[pa] for pa in words[:count]]
            pages -= count
            pointer = words[511]
            assert (pointer != 0) == (pages != 0)
        return found

    def compare(self):
        """What both hold: memory, pins, sums, records, states, counters."""
        assert not self.checker.violations, str(self.checker.violations[0])
        assert self.pair.machine.pages.allocated == self.spec.own_pages()
        assert set(self.pair.mediator.guests) == set(self.spec.guests)
        for vm, memory in self.memories.items():
            ram = self.rams[vm]
            held = memory.vm.ram[0].read(min(ram.pages), PAGES * PAGE_SIZE)
            if held != b"".join(ram.pages.values()):
                wrong = [hex(ipa) for n, ipa in enumerate(ram.pages) if held[n << 12 : n + 1 << 12] != ram.pages[ipa]]
                raise AssertionError(f"guest {vm}: pages at {wrong} differ")
            guest = self.spec.guests.get(vm)
            pins = {gfn << 12: count for gfn, count in memory.vm.pinned().items()}
            assert pins == ({} if guest is None else self.spec.pins(guest))
            if guest is not None:
                self.compare_guest(guest, self.pair.mediator.guests[vm], memory)

    def compare_guest(self, guest, record, memory):
        assert record.state.name == guest["state"]
        assert record.ledger.sums() == self.spec.held(guest)
        assert {name: getattr(record.ledger.limits, name) for name in LIMITS} == {
            name: guest["limits"][name] for name in LIMITS
        }
        assert {name: getattr(record.counters, name) for name in guest["counters"]} == guest["counters"]
        assert record.notifications == guest["notifications"]
        buffers = {each["cookie"]: each for each in guest["buffers"].values()}
        assert {cookie: (each.state.name, each.pages[cookie]) for cookie, each in record.buffers.items()} == {
            cookie: (each["state"], each["pages"]) for cookie, each in buffers.items()
        }
        for cookie, each in record.buffers.items():
            assert len(each.pages) > 1 or each.offset == buffers[cookie]["offset"]
        assert {cookie: each.ipa for cookie, each in record.arguments.items()} == {
            cookie: each["ipa"] for cookie, each in guest["arguments"].items()
        }
        assert [(each.state.name, each.thread, each.function.name) for each in record.calls.values()] == [
            (each["state"], each["thread"], each["function"]) for each in guest["calls"]
        ]
        assert {each.thread for each in record.suspended.values()} == {
            each["thread"] for each in guest["calls"] if each["thread"] is not None
        }
        # A page of a message that is told dirty although another buffer of it was written is no mistake (R27).
        assert guest["dirty"] <= memory.dirty

    def finish(self):
        """Everything ends: nothing is left of any guest."""
        for vm in self.rams:
            for _ in range(100):
                if vm not in self.spec.guests:
                    break
                mine = [n for n, (_, ticket, _) in enumerate(self.pending) if ticket["guest"]["vm"] == vm]
                turns = [n for n in mine if self.pending[n][2] is None]
                if turns:
                    self.proceed(turns[0])
                elif mine:
                    self.answer(mine[0], (0, 0, 0, 0))
                elif self.spec.guests[vm]["state"] in (*SERVED, "ISOLATED", "DYING", "QUARANTINED"):
                    self.destroy(vm)
            assert vm not in self.spec.guests, f"guest {vm} cannot be destroyed"
        self.checker.finish()
        assert not self.checker.violations, str(self.checker.violations[0])
        assert self.pair.machine.pages.allocated == 0
        assert self.pair.machine.pinned_frames() == {}
