"""A guest as OP-TEE and the guest's own vCPUs know it: what was forwarded, and what was answered.

Nothing here is read from the core. Which calls live, which threads wait, which buffers OP-TEE knows by which cookie
and how many pages they have: all of it follows from the registers and messages that passed. The core's books are
compared with it (invariants 2, 3, 5, 6).
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from hv_models.memory import PAGE_SIZE
from mediator.core.fast import FastCall
from mediator.core.records import Guest
from mediator.core.rpc import MAX_UNDELIVERED, OWN_THREADS
from mediator.core.steps import Regs, Ticket
from optee.abi.message import (
    HEADER,
    HEADER_SIZE,
    NONCONTIG,
    PARAM,
    PARAM_SIZE,
    TYPE_MASK,
    Command,
    ParamType,
    page_count,
)
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, RpcReturn

LOW: Final = 0xFFFFFFFF
_TMEM: Final = range(int(ParamType.TMEM_INPUT), int(ParamType.TMEM_INOUT) + 1)
_RMEM: Final = range(int(ParamType.RMEM_INPUT), int(ParamType.RMEM_INOUT) + 1)
_SHM_ALLOC_REPLY: Final = int(ParamType.TMEM_OUTPUT) | NONCONTIG
_WITH_RPC_ARG: Final = int(Function.CALL_WITH_RPC_ARG)
WITH_MESSAGE: Final = frozenset({int(Function.CALL_WITH_ARG), _WITH_RPC_ARG})
"""Functions whose a1 and a2 are the address of a message."""
_REGISTER: Final = int(Command.REGISTER_SHM)
_UNREGISTER: Final = int(Command.UNREGISTER_SHM)
SHM_ALLOC: Final = int(RpcCommand.SHM_ALLOC)
_SHM_FREE: Final = int(RpcCommand.SHM_FREE)
_CMD: Final = int(RpcReturn.CMD)
_ALLOC: Final = int(RpcReturn.ALLOC)
_FREE: Final = int(RpcReturn.FREE)

Params = list[tuple[int, int, int, int]]


class Text(NamedTuple):
    """A message or an RPC argument as it stands in a page of the mediator's."""

    command: int
    ret: int
    params: Params


def read_text(frame: memoryview, base: int = 0) -> Text:
    """Read a message at an offset of a page; what would stand behind the page is left out."""
    header = HEADER.unpack_from(frame, base)
    size = PARAM_SIZE * header[7]
    room = (PAGE_SIZE - base - HEADER_SIZE) // PARAM_SIZE * PARAM_SIZE
    start = base + HEADER_SIZE
    params = list(PARAM.iter_unpack(frame[start : start + min(size, room)])) if size else []
    return Text(header[0], header[5], params)


def page_lists(params: Params) -> Iterator[tuple[int, int, int]]:
    """The page lists that a message names: cookie, address, pages."""
    for attribute, pointer, size, cookie in params:
        if attribute & TYPE_MASK in _TMEM and pointer and attribute & NONCONTIG:
            yield cookie, pointer, page_count(size, pointer % PAGE_SIZE)


def addresses_in(params: Params) -> Iterator[int]:
    """What a message names by address."""
    for attribute, pointer, _, _ in params:
        if attribute & TYPE_MASK in _TMEM and pointer:
            yield pointer


def is_rpc(a0: int) -> bool:
    """Whether a0 asks for an RPC."""
    return a0 & LOW >= 0xFFFF0000 and a0 & LOW != LOW


class Named:
    """A buffer that OP-TEE knows by its cookie; `call` made it and ends it, unless it is kept."""

    __slots__ = ("call", "kept", "pages")

    def __init__(self, pages: int, call: "OutsideCall | None", *, kept: bool) -> None:
        self.pages = pages
        self.call = call
        self.kept = kept


class OutsideCall:
    """A call that OP-TEE has a thread for. `request` is (page, offset) of the RPC argument that asks now."""

    __slots__ = ("bounced", "command", "cookie", "message", "named", "parameters", "request", "rpc", "thread", "words")

    def __init__(self, message: int, behind: int, text: Text) -> None:
        self.message = message
        self.parameters = behind
        """Where an RPC argument stands behind the message; 0 if none does."""
        self.command = text.command
        self.cookie = text.params[0][3] if text.params else 0
        self.named: list[int] = []
        self.rpc = 0
        self.words = (0, 0)
        self.request: tuple[int, int] | None = None
        self.thread: int | None = None
        self.bounced = 0


class Outside:
    """One guest. `frame` gives the mediator's page with an address, and None for any other."""

    def __init__(self, frame: Callable[[int], memoryview | None]) -> None:
        self.calls: dict[Ticket, OutsideCall] = {}
        self.fresh: set[Ticket] = set()
        """Calls that are being prepared, of which OP-TEE knows nothing yet."""
        self.translating: set[Ticket] = set()
        """Calls that the mediator has paused in the middle of a page list: its books run ahead of OP-TEE's."""
        self.waiting: dict[int, Ticket] = {}
        """Threads that the guest was told of and has not resumed."""
        self.buffers: dict[int, Named] = {}
        self.arguments: dict[int, int] = {}
        self.pages = 0
        self.unsure = False
        """OP-TEE asked to free something in a request that could not be delivered: whether it is gone is open."""
        self._frame = frame

    def forwarded(self, ticket: Ticket, regs: Regs, text: Text | None) -> Iterator[str]:
        """A yielding call goes to OP-TEE, which finds `text`; yields names that are live already."""
        self.fresh.discard(ticket)
        self.translating.discard(ticket)
        call = self.calls.get(ticket)
        if regs[0] != Function.RETURN_FROM_RPC:
            if text is None:
                return
            behind = HEADER_SIZE + PARAM_SIZE * len(text.params) if regs[0] == _WITH_RPC_ARG else 0
            call = self.calls[ticket] = OutsideCall((regs[1] & LOW) << 32 | regs[2] & LOW, behind, text)
            for cookie, _, pages in page_lists(text.params):
                yield from self._name(call, cookie, pages, kept=False)
        elif call is not None:
            call.thread = None
            if call.rpc == _ALLOC and (regs[1] or regs[2]):
                cookie = (regs[4] & LOW) << 32 | regs[5] & LOW
                if cookie in self.arguments:
                    yield f"an RPC argument {cookie:#x}"
                self.arguments[cookie] = (regs[1] & LOW) << 32 | regs[2] & LOW
            elif call.rpc == _CMD and text is not None and text.command == SHM_ALLOC and text.ret == 0:
                for cookie, _, pages in page_lists(text.params[:1]):
                    if text.params[0][0] == _SHM_ALLOC_REPLY:
                        yield from self._name(call, cookie, pages, kept=True)
            call.rpc = 0

    def _name(self, call: OutsideCall, cookie: int, pages: int, *, kept: bool) -> Iterator[str]:
        if cookie in self.buffers:
            yield f"a buffer {cookie:#x}"
            self._forget(cookie)
        self.buffers[cookie] = Named(pages, call, kept=kept)
        self.pages += pages
        call.named.append(cookie)

    def _forget(self, cookie: int) -> None:
        named = self.buffers.pop(cookie, None)
        if named is not None:
            self.pages -= named.pages

    def answered(self, ticket: Ticket, answer: Regs) -> bool:
        """OP-TEE answers a yielding call; whether what it says is within its contract."""
        call = self.calls.get(ticket)
        if call is None:
            return True
        a0 = answer[0] & LOW
        if not is_rpc(a0):
            self._ended(ticket, call, a0)
            return True
        call.rpc = a0
        call.words = (answer[1] & LOW, answer[2] & LOW)
        call.request = None
        thread = answer[3] & LOW
        if thread >= OWN_THREADS or thread in self.waiting:
            return False
        call.thread = thread
        cookie = (answer[1] & LOW) << 32 | answer[2] & LOW
        if a0 == _FREE:
            self.arguments.pop(cookie, None)
        elif a0 == _CMD:
            if call.parameters:
                call.request = call.message, call.parameters
            elif cookie in self.arguments:
                call.request = self.arguments[cookie], 0
            self._look_at_request(call)
        return call.bounced < MAX_UNDELIVERED

    def text_of(self, ticket: Ticket) -> Text | None:
        """What stands now in the RPC argument of a call that answers a CMD."""
        call = self.calls.get(ticket)
        if call is None or call.rpc != _CMD or call.request is None:
            return None
        page, base = call.request
        frame = self._frame(page)
        if frame is None or (not call.parameters and page not in self.arguments.values()):
            return None
        return read_text(frame, base)

    def _look_at_request(self, call: OutsideCall) -> None:
        frame = None if call.request is None else self._frame(call.request[0])
        if frame is None or call.request is None:
            return
        text = read_text(frame, call.request[1])
        if text.command != _SHM_FREE:
            return
        for attribute, _, cookie, _ in text.params:
            named = self.buffers.get(cookie)
            if named is not None and attribute & TYPE_MASK not in _RMEM and named.kept:
                self._forget(cookie)
        self.unsure = True

    def reconcile(self, guest: Guest) -> None:
        """A SHM_FREE did not reach the guest: its buffer may be gone or not, so the core is believed, once."""
        self.unsure = False
        for cookie, named in list(self.buffers.items()):
            if named.kept and cookie not in guest.buffers:
                self._forget(cookie)
        for cookie, shared in guest.buffers.items():
            if cookie not in self.buffers:
                self.buffers[cookie] = Named(shared.pages[cookie], None, kept=True)
                self.pages += shared.pages[cookie]

    def _ended(self, ticket: Ticket, call: OutsideCall, a0: int) -> None:
        frame = self._frame(call.message)
        good = a0 == 0 and frame is not None and HEADER.unpack_from(frame)[5] == 0
        for cookie in call.named:
            named = self.buffers.get(cookie)
            if named is None or named.call is not call or named.kept:
                continue
            if good and call.command == _REGISTER:
                named.kept = True
            else:
                self._forget(cookie)
        if good and call.command == _UNREGISTER:
            named = self.buffers.get(call.cookie)
            if named is not None and (named.kept or (named.call is not None and named.call.command == _REGISTER)):
                self._forget(call.cookie)
        del self.calls[ticket]

    def told(self, ticket: Ticket, regs: Regs) -> None:
        """The guest gets an answer to an SMC of this call. A fast call has no thread, whatever OP-TEE answers."""
        if isinstance(ticket, FastCall):
            return
        if is_rpc(regs[0]):
            self.waiting[regs[3] & LOW] = ticket
            self.unsure = False
            if regs[3] & LOW >= OWN_THREADS:
                return  # the vCPU was given back, the page list is not done
        else:
            self.fresh.discard(ticket)
        self.translating.discard(ticket)
