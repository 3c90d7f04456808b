"""Whether OP-TEE's model does what the arithmetic says: each limit is run at, and one unit beyond.

The client here speaks to the model by SMC, without a driver and its own buffers, so that every byte is accounted for.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from hv_models.memory import PAGE_SIZE, Bank, Frames, PageStore, PhysicalMemory
from optee.abi.message import ENTRIES_PER_PAGE, NONCONTIG, Command, Message, Param, ParamType
from optee.abi.results import Result
from optee.abi.smc import Function, ReturnCode, to_pair
from optee.config import Config
from optee.memory.build import PAGE, Build, up
from optee.memory.failures import ALLOCATE, CREATE, INVOKE, LOAD, REGISTER, first_failure, set_up_heap_failure
from optee.memory.profile import SET_UPS, TaProfile
from optee.memory.sizing import Load, Sizing
from optee.secure_world import SecureWorld
from optee.tas.exercise import sized_ta

_RAM: Final = 0x1_0000_0000
_MUCH: Final = 1 << 36
"""Bytes of secure RAM for each guest where it shall not limit anything."""
_TAKE, _SET_UP = 13, 14
_RSA_SIGN: Final = SET_UPS.index("rsa-sign")
_META: Final = 0x100 | ParamType.VALUE_INPUT
_REGISTER: Final = NONCONTIG | ParamType.TMEM_OUTPUT
_VALUE: Final = ParamType.VALUE_INPUT
MOST_GUESTS: Final = 256
"""Guests that are run, at most."""
MOST_PAGES: Final = 1 << 19
"""Pages of shared buffers that are run, at most: 2 GiB."""
MOST_SESSIONS: Final = 4096


@dataclass(frozen=True, slots=True)
class Check:
    """One limit, run at and beyond."""

    what: str
    limit: int
    unit: str
    expected: str
    """Place and result one unit beyond."""
    seen: str
    """The same, of the model; or what went wrong at the limit."""

    @property
    def good(self) -> bool:
        """Whether the model agrees."""
        return self.seen == self.expected


class Client:
    """A guest that makes messages by hand, and the machine around it."""

    def __init__(self, build: Build, tas: Sequence[TaProfile], guests: int = 1) -> None:
        # A page of stack is taken anyhow, and the commands need some.
        named = [replace(ta, name=f"{ta.name} {number}", stack=max(ta.stack, PAGE)) for number, ta in enumerate(tas)]
        self.tas = list(map(sized_ta, named))
        if build.secure_ram is None:
            build = replace(build, secure_ram=_MUCH * (MOST_GUESTS + 1), guest_count=MOST_GUESTS + 1)
        config = Config(extra_tas=tuple(self.tas)).built(build)
        memory = PhysicalMemory()
        pages = 8 + MOST_PAGES // ENTRIES_PER_PAGE + 1
        memory.add(Bank("ram", PageStore("ram", pages), Frames(_RAM, pages)))
        self.memory = memory
        self.world = SecureWorld(memory, config)
        self.created = sum(map(self.create, range(1, guests + 1))) if build.virtualization else 1
        self._cookie = 1

    def create(self, guest: int) -> bool:
        """VM_CREATED."""
        return self.world.call((Function.VM_CREATED, guest, 0, 0, 0, 0, 0, 0))[0] == ReturnCode.OK

    def send(self, message: Message) -> Message:
        """Have a message carried out."""
        self.memory.write(_RAM, message.pack())
        answer = self.world.call((Function.CALL_WITH_ARG, *to_pair(_RAM), 0, 0, 0, 0, 1))
        if answer[0] == ReturnCode.EBADCMD:  # not part of this build
            return replace(message, ret=Result.NOT_SUPPORTED)
        assert answer[0] == ReturnCode.OK, answer
        return Message.unpack(self.memory.read(_RAM, PAGE_SIZE))

    def open(self, number: int) -> Message:
        """Open a session with the TA of that number."""
        first, second = struct.unpack("<QQ", _uuid(self.tas[number].uuid))
        meta = [Param(_META, first, second, 0), Param(_META, 0, 0, 0)]
        return self.send(Message(Command.OPEN_SESSION, params=meta))

    def set_up(self, session: int, kind: int, count: int) -> tuple[int, int]:
        """Allocate key objects and operations: result, and how many were made."""
        params = [Param(_VALUE, kind, count), Param(ParamType.VALUE_OUTPUT)]
        done = self.send(_invoke(session, _SET_UP, params))
        return done.ret, done.params[1].a

    def register(self, pages: int) -> tuple[int, int]:
        """Register a buffer of so many pages, all of them the same: result and cookie."""
        self._cookie += 1
        page = _RAM + PAGE_SIZE
        at = page + PAGE_SIZE
        for first in range(0, pages, ENTRIES_PER_PAGE):
            count = min(ENTRIES_PER_PAGE, pages - first)
            words = [page] * count + [0] * (ENTRIES_PER_PAGE - count) + [at + PAGE_SIZE]
            self.memory.write(at, struct.pack(f"<{len(words)}Q", *words))
            at += PAGE_SIZE
        param = Param(_REGISTER, page + PAGE_SIZE, pages * PAGE_SIZE, self._cookie)
        return self.send(Message(Command.REGISTER_SHM, params=[param])).ret, self._cookie

    def load(self, profiles: Sequence[TaProfile]) -> list[int] | None:
        """Open all sessions of these TAs with their set-ups: ids; None if that fails."""
        sessions = []
        for number, ta in enumerate(profiles):
            for _ in range(ta.sessions):
                opened = self.open(number)
                if opened.ret:
                    return None
                sessions.append(opened.session)
                for kind, count in ta.set_ups:
                    if self.set_up(opened.session, SET_UPS.index(kind), count)[0]:
                        return None
        return sessions

    def use(self, number: int, ta: TaProfile) -> str:
        """Load a TA and make a call with its parameters: where that fails, or "works"."""
        opened = self.open(number)
        if opened.ret:
            return _seen(LOAD, opened.ret)
        params = []
        for size in filter(None, ta.parameters):
            ret, cookie = self.register(up(size) // PAGE)
            if ret:
                return _seen(REGISTER, ret)
            params.append(Param(ParamType.RMEM_INOUT, 0, size, cookie))
        return self._called(opened.session, params)

    def _called(self, session: int, params: list[Param]) -> str:
        # TAKE wants one reference; with another number of them it answers BAD_PARAMETERS, having been mapped.
        done = self.send(_invoke(session, _TAKE, params))
        if done.ret in (Result.SUCCESS, Result.BAD_PARAMETERS):
            return "works"
        return _seen(INVOKE, done.ret)


def _invoke(session: int, command: int, params: list[Param]) -> Message:
    padded = [*params, *[Param(ParamType.NONE)] * (4 - len(params))]
    return Message(Command.INVOKE_COMMAND, command, session, params=padded)


def _uuid(uuid: UUID) -> bytes:
    return uuid.bytes


def _seen(place: str, result: int) -> str:
    return f"{place}: {Result(result).name}"


_OUT_OF_MEMORY: Final = Result.OUT_OF_MEMORY


def verify(sizing: Sizing) -> Iterator[Check]:
    """Run every limit of a sizing that can be run."""
    build, load = sizing.build, sizing.load
    if build.virtualization and sizing.guests is not None and sizing.guests <= MOST_GUESTS:
        yield _guests(build, sizing.guests)
    yield from _usable(sizing)
    yield from _sessions(sizing)
    if Client(build, load.tas).load(load.tas) is None:
        return
    yield _set_ups(sizing)
    if build.dynamic_shm and sizing.largest_buffer < MOST_PAGES:
        yield _largest_buffer(sizing)
        if sizing.total_pages < MOST_PAGES:
            yield _all_buffers(sizing)


def _guests(build: Build, guests: int) -> Check:
    client = Client(build, (), guests)
    seen = f"{CREATE}: ENOTAVAIL"
    if client.created < guests:
        seen = f"only {client.created} guests"
    elif client.create(guests + 1):
        seen = "one more works"
    return Check("guests", guests, "guests", f"{CREATE}: ENOTAVAIL", seen)


def _usable(sizing: Sizing) -> Iterator[Check]:
    """The largest heap of the first TA, after the others have been loaded; and a page more."""
    build, (ta, *others) = sizing.build, sizing.load.tas
    beyond = max(sizing.usable + PAGE, 0) if sizing.usable >= 0 else 0
    failure = first_failure(build, sizing.load.tas, beyond)
    expected = "works" if failure is None else _seen(failure.place, _result(build, failure.place))
    for heap in (sizing.usable, beyond):
        if heap < 0:
            continue
        one = replace(ta, heap=heap, sessions=1, set_ups=())
        client = Client(build, (*others, one))
        if client.load(others) is None:
            return
        seen = client.use(len(others), one)
        if heap == sizing.usable:
            if seen != "works":
                yield Check("heap of a TA", sizing.usable, "bytes", expected, f"at the limit {seen}")
            continue
        yield Check("heap of a TA", max(sizing.usable, 0), "bytes", expected, seen)


def _result(build: Build, place: str) -> int:
    if place != REGISTER:
        return _OUT_OF_MEMORY
    return Result.BAD_PARAMETERS if build.dynamic_shm else Result.NOT_SUPPORTED


def _sessions(sizing: Sizing) -> Iterator[Check]:
    ta, *others = sizing.load.tas
    sessions = sizing.sessions
    if sessions is None or sessions > MOST_SESSIONS:
        return
    client = Client(sizing.build, (*others, ta))
    if client.load(others) is None or not _loads(sizing, ta):
        return
    seen, opened = "", 0
    while not seen and opened <= sessions:
        made = client.open(len(others))
        if made.ret:
            seen = _seen(LOAD, made.ret)
            break
        for kind, count in ta.set_ups:
            ret, _ = client.set_up(made.session, SET_UPS.index(kind), count)
            if ret:
                seen = _seen(ALLOCATE, ret)
        opened += not seen
    expected = _seen(set_up_heap_failure(sizing.build, sizing.load.tas, sessions), _OUT_OF_MEMORY)
    if opened != sessions:
        seen = f"{opened} sessions"
    yield Check("sessions", sessions, "sessions", expected, seen or "one more works")


def _loads(sizing: Sizing, ta: TaProfile) -> bool:
    return first_failure(sizing.build, sizing.load.tas, ta.heap or 0) is None


def _set_ups(sizing: Sizing) -> Check:
    client = Client(sizing.build, sizing.load.tas)
    sessions = client.load(sizing.load.tas) or [0]
    count = sizing.rsa_operations
    ret, made = client.set_up(sessions[0], _RSA_SIGN, count + 1)
    seen = _seen(ALLOCATE, ret) if made == count else f"{made} set-ups"
    return Check("RSA signing set-ups", count, "set-ups", _seen(ALLOCATE, _OUT_OF_MEMORY), seen)


def _largest_buffer(sizing: Sizing) -> Check:
    pages = sizing.largest_buffer
    client = Client(sizing.build, sizing.load.tas)
    client.load(sizing.load.tas)
    ret, _ = client.register(pages + 1)
    seen = _seen(REGISTER, ret) if ret else "one more works"
    if pages and client.register(pages)[0]:
        seen = "does not work at the limit"
    return Check("largest buffer", pages, "pages", _seen(REGISTER, Result.BAD_PARAMETERS), seen)


def _all_buffers(sizing: Sizing) -> Check:
    each = up(sizing.load.buffer) // PAGE
    count = sizing.total_pages // each if each else 0
    client = Client(sizing.build, sizing.load.tas)
    client.load(sizing.load.tas)
    made = 0
    while made <= count and not client.register(each)[0]:
        made += 1
    expected = _seen(REGISTER, Result.BAD_PARAMETERS)
    seen = expected if made == count else f"{made * each} pages"
    return Check(f"buffers of {each} pages", count, "buffers", expected, seen)


def verify_load(build: Build, load: Load) -> bool:
    """Whether the whole load runs: guests, TAs with sessions and set-ups, a call of each, and buffers."""
    client = Client(build, load.tas, load.guests if build.virtualization else 1)
    if client.created < load.guests:
        return False
    sessions = client.load(load.tas)
    if sessions is None:
        return False
    first = 0
    for ta in load.tas:
        params = []
        for size in filter(None, ta.parameters):
            ret, cookie = client.register(up(size) // PAGE)
            if ret:
                return False
            params.append(Param(ParamType.RMEM_INOUT, 0, size, cookie))
        if client._called(sessions[first], params) != "works":
            return False
        for param in params:
            client.send(Message(Command.UNREGISTER_SHM, params=[Param(ParamType.RMEM_INPUT, 0, 0, param.c)]))
        first += ta.sessions
    return all(not client.register(up(load.buffer) // PAGE)[0] for _ in range(load.buffers))
