"""A secure world that says whatever comes up, within its contract but now and then."""

from collections import defaultdict
from collections.abc import Sequence
from random import Random
from typing import Final

from hv_models.memory import PhysicalMemory
from mediator.core.steps import Regs
from mediator.fuzz.journal import Writes
from mediator.fuzz.moves import request
from mediator.fuzz.seeds import Exchange
from optee.abi.message import HEADER, HEADER_SIZE, MAX_PARAMS, PARAM, PARAM_SIZE, TYPE_MASK, ParamType
from optee.abi.smc import API_UID, Function, RpcReturn, is_rpc, to_pair

THREADS: Final = 4
HOSTILE: Final = 0.03
"""How often it breaks its contract."""
_WITH_MESSAGE: Final = (int(Function.CALL_WITH_ARG), int(Function.CALL_WITH_RPC_ARG))
_FAST: Final[dict[int, Regs]] = {
    int(Function.CALLS_UID): API_UID,
    int(Function.EXCHANGE_CAPABILITIES): (0, 0xFD, 0x42, 4),
    int(Function.GET_THREAD_COUNT): (0, THREADS, 0, 0),
}
_TYPES: Final = frozenset(map(int, ParamType))
_ASKED: Final = ("end", "end", "end", "cmd", "cmd", "cmd", "alloc", "alloc", "interrupt")


class Talk:
    """A call as the secure world knows it."""

    __slots__ = ("behind", "cookies", "pa", "rpc")

    def __init__(self, pa: int, *, behind: bool) -> None:
        self.pa = pa
        self.behind = behind
        self.rpc = 0
        self.cookies: dict[int, int] = {}


class HostileWorld:
    """Answers SMCs. `choose` and `planned` decide what, `refusing` whether the next VM is refused.

    memory: what it reaches; items: told which parts of the ABI occurred. `told` has the threads by client of which a
    guest knows, `writes` what the last answer wrote.
    """

    def __init__(self, memory: PhysicalMemory, items: set[tuple[str, int | str]]) -> None:
        self._memory = memory
        self.items = items
        self.choose = Random(0)
        self.planned: Exchange | None = None
        self.refusing = False
        self.writes: Writes = []
        self.talks: dict[tuple[int, int], Talk] = {}
        self.told: defaultdict[int, list[int]] = defaultdict(list)

    def threads_held(self, vm: int) -> int:
        """Calls that are suspended."""
        return sum(owner == vm for owner, _ in self.talks)

    def forget(self, vm: int) -> None:
        """A VM is gone."""
        for key in [key for key in self.talks if key[0] == vm]:
            del self.talks[key]

    def answer(self, regs: Sequence[int], *, plain: bool = False) -> Regs:
        """Answer an SMC. plain: with nothing but the end of what it is asked."""
        self.writes = []
        choose, function, vm = self.choose, regs[0], regs[7]
        if function in (Function.VM_CREATED, Function.VM_DESTROYED) and self.refusing:
            self.refusing = False
            return (5, 0, 0, 0)
        if function == Function.VM_DESTROYED:
            self.forget(regs[1])
            return (0, 0, 0, 0)
        if function in _WITH_MESSAGE:
            talk = Talk(regs[1] << 32 | regs[2], behind=function == Function.CALL_WITH_RPC_ARG)
            frame = self._memory.frame(talk.pa)
            command, *_, count = HEADER.unpack_from(frame)
            self.items.add(("command", command))
            params = PARAM.iter_unpack(frame[HEADER_SIZE : HEADER_SIZE + PARAM_SIZE * min(count, MAX_PARAMS)])
            self.items.update(("attribute", param[0] & TYPE_MASK) for param in params if param[0] & TYPE_MASK in _TYPES)
        elif function == Function.RETURN_FROM_RPC:
            found = self.talks.pop((vm, regs[3]), None)
            if found is None:
                return (0, 0, 0, 0)
            talk = found
            if talk.rpc == RpcReturn.ALLOC and (regs[1] or regs[2]):
                talk.cookies[regs[4] << 32 | regs[5]] = regs[1] << 32 | regs[2]
        elif function == Function.DISABLE_SHM_CACHE:
            return (7, 0, 0, 0)
        else:
            return _FAST.get(function, (0, 0, 0, 0))
        return self._speak(choose, talk, vm, plain=plain)

    def _speak(self, choose: Random, talk: Talk, vm: int, *, plain: bool) -> Regs:
        free = [thread for thread in range(THREADS) if (vm, thread) not in self.talks]
        if self.planned is not None and free and not plain:
            return self._repeat(talk, vm, free[0], self.planned)
        kind = choose.choice(_ASKED)
        broken = choose.random() < HOSTILE and not plain
        if plain or not free or kind == "end":
            if talk.cookies and free and not broken:
                return self._suspend(talk, vm, free[0], RpcReturn.FREE, talk.cookies.popitem()[0])
            if choose.random() < 0.1:
                return (4, 0, 0, 0)
            self._say("message", talk.pa, 20, choose.choice((0, 0, 0, 0xFFFF0006)).to_bytes(4, "little") + b"\3\0\0\0")
            return (0, 0, 0, 0)
        thread = choose.choice((*self.told[vm], 1 << 30, 0xFFFFFFFF)) if broken else free[0]
        if kind == "cmd" and (talk.behind or talk.cookies):
            cookie = self._request(talk, request(choose))
            return self._suspend(talk, vm, thread, RpcReturn.CMD, choose.getrandbits(64) if broken else cookie)
        if kind == "alloc" and not talk.behind:
            return self._suspend(talk, vm, thread, RpcReturn.ALLOC, 160 << 32)
        code = 0xFFFF0000 | choose.getrandbits(16) if broken else int(RpcReturn.FOREIGN_INTR)
        return self._suspend(talk, vm, thread, code if code != 0xFFFFFFFF else 0xFFFF0004, 0)

    def _repeat(self, talk: Talk, vm: int, thread: int, recorded: Exchange) -> Regs:
        """Answer what was recorded."""
        code = recorded.answer
        if not is_rpc(code):
            if len(recorded.told) >= HEADER_SIZE:
                self._say("message", talk.pa, 20, recorded.told[20:28])
            return (code, 0, 0, 0)
        if code == RpcReturn.CMD and (talk.behind or talk.cookies):
            return self._suspend(talk, vm, thread, code, self._request(talk, recorded.told))
        if code == RpcReturn.FREE and talk.cookies:
            return self._suspend(talk, vm, thread, code, talk.cookies.popitem()[0])
        if code in (RpcReturn.CMD, RpcReturn.FREE, RpcReturn.ALLOC) and not talk.behind:
            return self._suspend(talk, vm, thread, RpcReturn.ALLOC, 160 << 32)
        return self._suspend(talk, vm, thread, RpcReturn.FOREIGN_INTR, 0)

    def _request(self, talk: Talk, data: bytes) -> int:
        """Write the request of an RPC CMD into the call's argument, and give its cookie."""
        self.items.add(("RPC command", HEADER.unpack_from(data)[0]))
        cookie = 0 if talk.behind else next(iter(talk.cookies))
        place = talk.pa + self._behind(talk.pa) if talk.behind else talk.cookies[cookie]
        if place % 4096 + len(data) <= 4096:
            self._say("argument", place, 0, data)
        return cookie

    def _say(self, where: str, pa: int, offset: int, data: bytes) -> None:
        self._memory.write(pa + offset, data)
        self.writes.append((where, offset, data))

    def _suspend(self, talk: Talk, vm: int, thread: int, rpc: int, pair: int) -> Regs:
        talk.rpc = int(rpc)
        self.talks.setdefault((vm, thread), talk)
        return (int(rpc), *to_pair(pair), thread)

    def _behind(self, pa: int) -> int:
        return HEADER_SIZE + PARAM_SIZE * int(HEADER.unpack_from(self._memory.frame(pa))[7])
