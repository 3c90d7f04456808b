"""Workload `hello`: hello_world's INC_VALUE over and over."""

from guests.guest import Guest
from guests.parameters import Value, Values
from guests.workloads.applications import HELLO_WORLD, HelloWorld
from guests.workloads.refusals import try_refusals
from guests.workloads.report import Report

_START = 42


async def hello(guest: Guest, report: Report, *, rounds: int | None = None) -> None:
    """Try the refusals once, then open hello_world and increment a value `rounds` times (None: for ever)."""
    await try_refusals(guest, report)
    async with guest.context() as context:
        session = await report.open_if_present(context, HELLO_WORLD, "hello_world")
        if session is None:
            report.unexpected("hello_world is absent")
            return
        value = _START
        done = 0
        while rounds is None or done < rounds:
            with report.operation("hello_world INC_VALUE"):
                outputs = await session.invoke(HelloWorld.INC_VALUE, Value(value))
                value = value + 1 & 0xFFFFFFFF
                report.expect("hello_world INC_VALUE", outputs == (Values(value, 0),))
            done += 1
        await session.close()
