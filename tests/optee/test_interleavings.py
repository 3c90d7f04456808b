"""Client programs side by side in every order: all end, with the right results, and leave nothing."""

from collections.abc import Callable, Generator
from random import Random
from typing import TypeAlias

import pytest

from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.rpc import NotificationOperation, RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn, to_pair
from optee.config import Config
from optee.secure_world import Answer
from optee.tas.exercise import ExerciseTa, KeepAliveTa, SingleInstanceTa, SingleSessionTa
from optee.tas.hello_world import HelloWorld
from optee.tas.invoke_tests import InvokeTests
from tests.optee.rig import (
    Rig,
    invoke_message,
    is_notification,
    open_message,
    register_message,
    unregister_message,
    value,
)

TAS = (ExerciseTa, SingleInstanceTa, SingleSessionTa, KeepAliveTa)
THREADS = 3
Program: TypeAlias = Generator[Message, Message, None]
"""Yields messages; is sent each as it came back."""
Flight: TypeAlias = tuple[Program, int, Answer]
"""A program, the PA of its message, and the RPC return that it has to serve."""


def number(a: int, b: int = 0) -> Param:
    return value(a, b, ParamType.VALUE_INPUT)


def client(rig: Rig, draw: Random, cookie: int) -> Program:
    """Open, invoke a few times, close; a panic of anybody's makes TARGET_DEAD a right answer."""
    ta = draw.choice(TAS)
    _, listed = rig.buffer(5000)
    assert (yield register_message(listed, 5000, cookie)).ret == 0
    opened = yield open_message(ta.uuid)
    if opened.ret:
        allowed = {Result.TARGET_DEAD} | ({Result.BUSY} if ta is SingleSessionTa else set())
        assert opened.ret in allowed
        assert opened.ret_origin == Origin.TEE
    else:
        for _ in range(draw.randrange(6)):
            message, check = invoke(draw, opened.session, cookie)
            answer = yield message
            if answer.ret == Result.TARGET_DEAD:
                assert answer.ret_origin == Origin.TEE
            else:
                check(answer)
        assert (yield Message(Command.CLOSE_SESSION, session=opened.session)).ret == 0
    assert (yield unregister_message(cookie)).ret == 0


def invoke(draw: Random, session: int, cookie: int) -> tuple[Message, Callable[[Message], None]]:
    def good(answer: Message) -> None:
        assert answer.ret == 0, hex(answer.ret)

    def incremented(answer: Message) -> None:
        assert (answer.ret, answer.params[1].a) == (0, 8)

    def dead(answer: Message) -> None:
        raise AssertionError("a panic goes unnoticed")

    copy = (Param(ParamType.RMEM_INPUT, 0, 64, cookie), Param(ParamType.RMEM_OUTPUT, 128, 64, cookie))
    return draw.choice(
        [
            (invoke_message(session, 7, value(1)), good),
            (invoke_message(session, 1, number(5)), good),
            (invoke_message(session, 8, *copy), good),
            (invoke_message(session, 6, number(3)), good),
            (invoke_message(session, 9, number(2), value(7)), incremented),
            (invoke_message(session, 10, value(kind=ParamType.VALUE_OUTPUT)), good),
            (invoke_message(session, 0, number(0xDEAD)), dead),
        ]
    )


def mutex(draw: Random) -> Program:
    """Xtest 1003: writers alone, readers together."""
    opened = yield open_message(InvokeTests.uuid)
    for _ in range(5):
        writer = draw.random() < 0.4
        request = number(0 if writer else 1, 200_000)
        answer = yield invoke_message(opened.session, 7, request, value(kind=ParamType.VALUE_OUTPUT))
        assert answer.ret == 0
        assert not writer or answer.params[1].b == 1
    assert (yield Message(Command.CLOSE_SESSION, session=opened.session)).ret == 0


class Scheduler:
    """Linux with one process for each program: retries on ETHREAD_LIMIT, remembers a SEND before its WAIT."""

    def __init__(self, rig: Rig, draw: Random, programs: list[Program]) -> None:
        self.rig = rig
        self.draw = draw
        self.sent: set[int] = set()
        self.ready = [(program, next(program)) for program in programs]
        self.flying: list[Flight] = []
        self.notifications = 0

    def run(self) -> None:
        while self.ready or self.flying:
            runnable = [flight for flight in self.flying if self._runnable(flight)]
            if self.ready and (not runnable or self.draw.random() < 0.3):
                self._start()
            else:
                assert runnable, "deadlock"
                self._go_on(self.draw.choice(runnable))

    def _runnable(self, flight: Flight) -> bool:
        _, pa, answer = flight
        if answer[0] != RpcReturn.CMD:
            return True
        rpc = self.rig.rpc(answer, pa)
        waits = is_notification(rpc, NotificationOperation.WAIT)
        return not waits or rpc.params[0].b in self.sent or self.draw.random() < 0.02

    def _start(self) -> None:
        program, message = self.ready.pop(self.draw.randrange(len(self.ready)))
        pa = self.rig.write(message)
        answer = self.rig.call(Function.CALL_WITH_RPC_ARG, *to_pair(pa))
        if answer[0] == ReturnCode.ETHREAD_LIMIT:
            assert len(self.flying) == THREADS
            self.ready.append((program, message))
            self._go_on(self.draw.choice([flight for flight in self.flying if self._runnable(flight)]))
        else:
            self._returned(program, pa, answer)

    def _go_on(self, flight: Flight) -> None:
        self.flying.remove(flight)
        program, pa, answer = flight
        if answer[0] == RpcReturn.CMD:
            rpc = self.rig.rpc(answer, pa)
            if rpc.command == RpcCommand.NOTIFICATION:
                self.notifications += 1
                wait = is_notification(rpc, NotificationOperation.WAIT)
                (self.sent.discard if wait else self.sent.add)(rpc.params[0].b)
            self.rig.supplicant.serve(rpc)
        self._returned(program, pa, self.rig.resume(answer[3]))

    def _returned(self, program: Program, pa: int, answer: Answer) -> None:
        if answer[0] != ReturnCode.OK:
            self.flying.append((program, pa, answer))
            return
        try:
            self.ready.append((program, program.send(self.rig.read(pa))))
        except StopIteration:
            return


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_programs(seed: int, early: bool) -> None:
    draw = Random(seed)
    rig = Rig(Config(threads=THREADS, early_tas=None if early else frozenset(), seed=seed))
    rig.world.interrupt_pending = lambda _: draw.random() < 0.3
    programs = [client(rig, draw, cookie) for cookie in range(1, 7)]
    scheduler = Scheduler(rig, draw, programs)
    scheduler.run()
    assert rig.world.threads_held(1) == 0
    assert rig.world.shared_objects(1) == ()
    assert rig.world.session_count(1) == 0
    assert not rig.supplicant.buffers
    assert rig.invoke(rig.open(HelloWorld.uuid), 0, value(1)).params[0].a == 2


def test_mutex_programs_meet() -> None:
    notifications = 0
    for seed in range(10):
        draw = Random(seed)
        rig = Rig(Config(threads=THREADS))
        rig.world.interrupt_pending = lambda _, draw=draw: draw.random() < 0.8
        scheduler = Scheduler(rig, draw, [mutex(draw) for _ in range(4)])
        scheduler.run()
        notifications += scheduler.notifications
        assert rig.world.threads_held(1) == 0
    assert notifications > 20
