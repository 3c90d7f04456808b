"""The fault sweep: whatever fails, and wherever, nothing is left behind and the next run is healthy (B3, B13).

A golden sequence is run once to count its fault points: each page that is lent, each access to guest memory, each
charge, each answer of the secure world. Then once per point with that one failing.
"""

import pytest

from hv_models.stage2 import Reason, Stage2Fault
from mediator.core.ledger import Ledger, OverLimit
from mediator.core.mediator import Mediator
from mediator.core.steps import Forward, Preempt, Reply
from mediator.invariants import Checker
from optee.abi.smc import Function, ReturnCode, RpcReturn, is_rpc, to_pair
from tests.core.pair import GuestSide, Pair, invoke, smc
from tests.core.test_lifecycle import GOLDEN, with_alloc, with_rpc_argument


def with_longer_lists(guest):
    """Work in several pieces, of fewer pages than the kill sweep's."""
    message = invoke(*[guest.tmem(9000, cookie=n + 1) for n in range(2)])
    yield smc(Function.CALL_WITH_ARG, *to_pair(guest.write(message)))


SWEPT = [with_alloc, with_rpc_argument, with_longer_lists]
LENDS = 7
"""Of the pages that are lent for one long list only every so manieth fails: the others are the same case."""


class Faults:
    """Counts fault points, and lets one of them fail."""

    def __init__(self):
        self.armed = False
        self.count = 0
        self.failing = None
        self.kinds = []

    def hit(self, kind):
        if not self.armed:
            return False
        self.kinds.append(kind)
        self.count += 1
        return self.count - 1 == self.failing


class FailingMemory:
    """Guest memory of which one access fails as if the guest had taken the page away."""

    def __init__(self, vm, faults):
        self.vm = vm
        self.faults = faults

    def __getattr__(self, name):
        method = getattr(self.vm, name)
        if name not in ("read", "write_fields", "pin", "load", "store_fields"):
            return method

        def access(*args, **options):
            if self.faults.hit(name):
                raise Stage2Fault(args[0] if isinstance(args[0], int) else 0, Reason.UNMAPPED)
            return method(*args, **options)

        return access


def failing_ledger(faults):
    class FailingLedger(Ledger):
        __slots__ = ()

        def charge(self, pages=0, buffers=0, rpc_arguments=0, calls=0, memory=0):
            if faults.hit("charge"):
                raise OverLimit("calls" if calls else "rpc_arguments" if rpc_arguments else "pages")
            return super().charge(pages, buffers, rpc_arguments, calls, memory)

    return FailingLedger


class Sweep(Pair):
    def __init__(self, faults):
        super().__init__()
        self.faults = faults
        self.host.on_lend = lambda: not faults.hit("lend")
        self.mediator = Mediator(self.policy, self.host, failing_ledger(faults))
        self.checker = Checker(self.mediator, self.host, self.threads_held)
        assert self.drive(self.checker.probe())[0] == 0

    def guest(self, ram=16 << 20):
        vm = self.machine.create_kvm("swept", ram)
        assert self.drive(self.checker.create(vm.client_id, FailingMemory(vm, self.faults)))[0] == 0
        self.records.append(self.mediator.guests[vm.client_id])
        return GuestSide(self, vm)

    def answer(self, step):
        words = super().answer(step)
        if self.faults.hit("answer") and not is_rpc(words[0]):
            return (int(ReturnCode.EBUSY), 0, 0, 0)
        return words


def run(pair, guest, golden):
    """The sequence as far as it makes sense; a guest whose call ended early goes on with its next one."""
    for regs in golden(guest):
        if regs[0] == Function.RETURN_FROM_RPC and not guest.record.suspended:
            continue
        step = guest.submit(regs)
        while not isinstance(pair.note(step), Reply):
            if isinstance(step, Forward):
                step = pair.checker.returned(step.ticket, pair.answer(step))
            else:
                assert isinstance(step, Preempt)
                step = pair.checker.proceed(step.ticket)
    # what waits is answered without a word until it ends
    pair.world.script.clear()
    for thread in list(guest.record.suspended):
        while thread in guest.record.suspended:
            pair.drive(guest.submit((int(Function.RETURN_FROM_RPC), 0, 0, thread, 0, 0, 0, 0)))


@pytest.mark.parametrize("golden", SWEPT)
def test_each_single_fault_leaves_nothing_behind(golden):
    counting = Faults()
    pair = Sweep(counting)
    guest = pair.guest()
    counting.armed = True
    run(pair, guest, golden)
    counting.armed = False
    pair.check()
    pair.close()
    total = counting.count
    assert {"lend", "read", "write_fields", "pin", "charge", "answer"} <= set(counting.kinds)
    for failing in range(total):
        if total > 50 and counting.kinds[failing] == "lend" and failing % LENDS:
            continue
        faults = Faults()
        faults.failing = failing
        pair = Sweep(faults)
        guest = pair.guest()
        faults.armed = True
        run(pair, guest, golden)
        faults.armed = False
        where = f"{faults.kinds[failing]} (point {failing})"
        assert faults.count > failing
        record = guest.record
        assert not record.calls and not record.suspended, where
        sums = guest.sums()
        assert sums["calls"] == 0, where
        assert guest.pins() == sums["pages"] + sums["rpc_arguments"], where
        # the same guest, reset, and a healthy run
        step = pair.checker.reset(guest.id)
        assert pair.drive(step)[0] == 0, where
        pair.records.append(guest.record)
        pair.settle(guest)
        guest._used = 1
        before = len(pair.names())
        run(pair, guest, golden)
        names = pair.names()[before:]
        assert not {"call_refused", "rpc_undelivered", "secure_world_fault"} & set(names), where
        pair.check()
        pair.close()


def test_the_sweep_meets_every_kind_of_rpc():
    faults = Faults()
    pair = Sweep(faults)
    guest = pair.guest()
    seen = set()
    for golden in GOLDEN:
        for regs in golden(guest):
            seen.add(pair.drive(guest.submit(regs))[0])
    assert set(RpcReturn) <= seen
    pair.check()
    pair.close()
