"""Workload `ramp`: more and more callers, until answers become too slow or are refused."""

from typing import Final

import trio

from guests.guest import Guest
from guests.operation import TeeError
from guests.parameters import Value
from guests.workloads.applications import HELLO_WORLD, HelloWorld
from guests.workloads.report import Knee, LoadStep, Report
from optee.abi.results import Result

OPERATIONS: Final = 64
"""Operations of each caller in a step."""

MAX_CALLERS: Final = 1024
"""Where the ramp ends if nothing is crossed before."""

_BUFFER: Final = 64 * 1024  # bytes that each caller has registered, so that memory is part of the load
_REFUSALS: Final = (Result.OUT_OF_MEMORY, Result.BUSY)


async def ramp(
    guest: Guest,
    report: Report,
    *,
    rounds: int | None = None,
    p99_limit: float = 0.1,
    refusal_share: float = 0.01,
) -> None:
    """Double the callers step by step, from one, and stop at the first step that crosses a bound.

    p99_limit: seconds that 99 of 100 operations may take. refusal_share: part of the operations that may
    fall out because their caller was refused something (OUT_OF_MEMORY, BUSY). rounds: steps at most. The steps
    are in the report, and its `knee` names the last good one and the bound that the next one crossed.
    """
    callers = 1
    while callers <= MAX_CALLERS and (rounds is None or len(report.steps) < rounds):
        step = await _step(guest, report, callers)
        report.steps.append(step)
        crossed = None
        if step.refusals > refusal_share * step.operations:
            crossed = "refusals"
        elif step.p99 > p99_limit:
            crossed = "p99"
        if crossed is not None:
            good = report.steps[-2] if len(report.steps) > 1 else step
            report.knee = Knee(good.callers, good.rate, crossed)
            return
        callers *= 2
    last = report.steps[-1]
    report.knee = Knee(last.callers, last.rate, "callers")


async def _step(guest: Guest, report: Report, callers: int) -> LoadStep:
    load = _Load(guest, report)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(load.caller)
    seconds = trio.current_time() - start
    latencies = sorted(load.latencies)
    p99 = latencies[len(latencies) * 99 // 100] if latencies else 0.0
    return LoadStep(callers, len(latencies) + load.refusals, seconds, p99, load.refusals)


class _Load:
    """One step: what its callers met."""

    def __init__(self, guest: Guest, report: Report) -> None:
        self._guest = guest
        self._report = report
        self.latencies: list[float] = []
        self.refusals = 0

    async def caller(self) -> None:
        """Work like one process: a buffer, a session, operations."""
        done = 0
        async with self._guest.context() as context:
            try:
                async with (
                    await context.allocate(_BUFFER),
                    await context.open_session(HELLO_WORLD) as session,
                ):
                    for number in range(OPERATIONS):
                        start = trio.current_time()
                        await session.invoke(HelloWorld.INC_VALUE, Value(number))
                        self.latencies.append(trio.current_time() - start)
                        self._report.invokes += 1
                        done += 1
            except TeeError as error:
                if error.result in _REFUSALS:
                    self.refusals += OPERATIONS - done
                    self._report.refusals["load"] += 1
                else:
                    self._report.unexpected(f"ramp: {error}")
