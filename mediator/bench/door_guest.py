"""The guest's end of the door benchmark, a process of its own.

    python -m mediator.bench.door_guest BATCHES ECHO LINK IDLE...

The numbers are file descriptors of sockets. It measures, and prints the samples as a line of JSON. For each flavour it
waits for a line, opens a VM on each of its share of the idle links, and says so. It stays until its input ends.
"""

import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final

import trio

import guests
from guests.workloads.applications import HELLO_WORLD, HelloWorld
from hv_models.conduit import Conduit
from hv_models.link import MAX_RECORD, Flavour, call_record
from hv_models.machine import DEFAULT_RAM, RAM_BASE
from hv_models.memory import PAGE_SIZE, GuestRam, PageStore
from hv_models.socket_conduit import open_conduit
from mediator.bench.measure import interleaved
from optee.abi.smc import Function

_FAST: Final = (int(Function.GET_ASYNC_NOTIF_VALUE), *(0,) * 7)


async def _be_guest(batches: int, echo: int, link: int, idle: list[int]) -> None:
    """Measure, then be idle guests."""
    bare = _socket(echo)
    record = call_record(0, _FAST)

    async def there_and_back() -> None:
        await bare.send(record)
        await bare.recv(MAX_RECORD)

    async with AsyncExitStack() as stack:
        conduit, guest = await _boot(stack, link, "measured")
        context = await stack.enter_async_context(guest.context())
        session = await context.open_session(HELLO_WORLD)
        operations: list[Callable[[], Awaitable[object]]] = [
            there_and_back,
            lambda: conduit.call(0, _FAST),
            lambda: session.invoke(HelloWorld.INC_VALUE, guests.Value(1)),
        ]
        taken = await interleaved(operations, batches)
        print(json.dumps(dict(zip(("echo", "fast", "invoke"), taken, strict=True))), flush=True)
        share = len(idle) // len(Flavour)
        for flavour in Flavour:
            await _line()
            for number in range(share):
                await _boot(stack, idle.pop(), f"idle-{flavour.name}-{number}", flavour)
            print("idle", flush=True)
        await _line()
    bare.close()


async def _line() -> None:
    """Wait for a line, or the end, of the input."""
    await trio.lowlevel.wait_readable(sys.stdin)
    os.read(sys.stdin.fileno(), 1)


async def _boot(
    stack: AsyncExitStack, fd: int, name: str, flavour: Flavour = Flavour.KVM
) -> tuple[Conduit, guests.Guest]:
    ram = GuestRam(PageStore(name, DEFAULT_RAM // PAGE_SIZE), RAM_BASE)
    conduit = await stack.enter_async_context(open_conduit(_socket(fd), flavour, name, 2, [ram]))
    method = guests.ConduitMethod(conduit.hypervisor.conduit)
    return conduit, await stack.enter_async_context(guests.open(ram, conduit, name=name, method=method))


def _socket(fd: int) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(socket.socket(fileno=fd))


if __name__ == "__main__":
    count, bare_fd, link_fd, *idle_fds = map(int, sys.argv[1:])
    trio.run(_be_guest, count, bare_fd, link_fd, idle_fds)
