"""Bursts of calls to one TA, held back in four ways, in virtual time: one table says what each costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from guests.workloads.burst import Burst, Form, burst
from mediator.board import Board
from mediator.core.policy import FlowPolicy, Policy
from mediator.costs import Costs
from mediator.interleaving import run
from optee.tas.load import AllocatingTa, ReusingTa
from optee.trusted_application import TrustedApplication

BURST: Final = "burst"
CALLS: Final = 100
"""As was reported of a TA that died: so many calls in 15 seconds (OP-TEE/optee_os #7077)."""
SECONDS: Final = 15.0
TIMES: Final = 100
"""The second load: so many times as many calls, each client's next one as soon as it has its answer."""
FLOW: Final = FlowPolicy(queue=32, secure_cores=2)
FLOW_CALLS: Final = 2
TAS: Final[tuple[type[TrustedApplication], ...]] = (AllocatingTa, ReusingTa)
ROWS: Final = len(TAS) * 2 * len(Form)
_VCPUS: Final = 8
_SEED: Final = 1


@dataclass(frozen=True, slots=True)
class BurstRow:
    """One burst. queue: the most that waited, of `bound` (None: nobody bounds it); heap: bytes of all TAs at most."""

    ta: str
    load: str
    burst: Burst
    queue: int
    bound: int | None
    heap: int

    def as_data(self) -> dict[str, Any]:
        """The same for JSON."""
        burst = self.burst
        return {
            "ta": self.ta,
            "load": self.load,
            "form": str(burst.form),
            "calls": burst.calls,
            "answered": burst.answered,
            "thread_limits": burst.thread_limits,
            "p50_us": round(1e6 * burst.took(0.5)),
            "p99_us": round(1e6 * burst.took(0.99)),
            "per_second": round(burst.rate, 1),
            "peak_queue": self.queue,
            "queue_bound": self.bound,
            "peak_ta_heap": self.heap,
        }


def bursts(policy: Policy, times: int = TIMES) -> Iterator[BurstRow]:
    """Every form, of both TAs, under both loads."""
    for ta in TAS:
        for load, calls, within in (("as reported", CALLS, SECONDS), (f"{times} times", CALLS * times, 0.0)):
            for form in Form:
                yield one_burst(policy, ta, form, load, calls, within)


def one_burst(
    policy: Policy, ta: type[TrustedApplication], form: Form, load: str, calls: int, within: float
) -> BurstRow:
    """One burst on a board of its own."""
    flow = FLOW if form is Form.BACK_PRESSURE else None
    if flow is not None:
        policy = replace(policy, flow=flow, limits=replace(policy.limits, calls=FLOW_CALLS))

    async def main() -> BurstRow:
        async with (
            Board(policy, check=False, costs=Costs()) as board,
            board.guest("kvm", "burst", vcpus=_VCPUS) as guest,
        ):
            found = await burst(guest, ta.uuid, form, calls=calls, within=within)
            (record,) = board.core.guests.values()
            heap = board.model.ta_heap_peak(record.vm)
            queue = found.queue if flow is None else record.lane.peak
            return BurstRow(ta.__name__, load, found, queue, found.bound if flow is None else flow.queue, heap)

    return run(main, _SEED)
