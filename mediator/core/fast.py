"""Fast calls: answered here or forwarded with nothing of the guest's but its capability word (rules R2-R4)."""

from typing import TYPE_CHECKING, Final

from mediator.core.records import Guest
from mediator.core.sharing import release_argument
from mediator.core.steps import Forward, Regs, Step, Ticket
from optee.abi.smc import Cookie, Function, ReturnCode, SecCapability

if TYPE_CHECKING:
    from mediator.core.mediator import Mediator

LOW: Final = 0xFFFFFFFF

IDENTITIES: Final = frozenset(
    {Function.CALLS_UID, Function.CALLS_REVISION, Function.GET_OS_UUID, Function.GET_OS_REVISION}
)
"""Functions whose a0 is data, not a status."""
LOCAL: Final = frozenset({Function.CALLS_COUNT, Function.GET_SHM_CONFIG})
"""Functions that never reach OP-TEE."""
FORWARDED: Final = IDENTITIES | {
    Function.EXCHANGE_CAPABILITIES,
    Function.DISABLE_SHM_CACHE,
    Function.ENABLE_SHM_CACHE,
    Function.GET_THREAD_COUNT,
    Function.ENABLE_ASYNC_NOTIF,
    Function.GET_ASYNC_NOTIF_VALUE,
}


_CAPABILITIES: Final = Function.EXCHANGE_CAPABILITIES
_SHM_CONFIG: Final = Function.GET_SHM_CONFIG
_COUNT: Final = Function.CALLS_COUNT
_DISABLE: Final = Function.DISABLE_SHM_CACHE
_NOTIFICATIONS: Final = Function.ENABLE_ASYNC_NOTIF
_THREADS: Final = Function.GET_THREAD_COUNT


class FastCall(Ticket):
    """A fast call that is with OP-TEE."""

    __slots__ = ("function", "guest", "regs")

    def __init__(self, guest: Guest, regs: Regs, function: Function) -> None:
        self.guest = guest
        self.regs = regs
        self.function = function


def enter(core: "Mediator", guest: Guest, regs: Regs, function: Function) -> Step:
    """A guest's fast call that the policy allows."""
    if function is _SHM_CONFIG:
        return core.local(regs, ReturnCode.ENOTAVAIL)
    if function is _COUNT:
        return core.local(regs, len(core.policy.functions))
    a1 = 0
    if function is _CAPABILITIES:
        a1 = regs[1] & core.policy.nsec_capabilities & LOW
    guest.in_flight += 1
    guest.counters.forwarded += 1
    return Forward((int(function), a1, 0, 0, 0, 0, 0, guest.vm), FastCall(guest, regs, function))


def returned(core: "Mediator", call: FastCall, answer: Regs) -> Step:
    """OP-TEE's answer to a fast call, as the guest may see it."""
    function = call.function
    regs = call.regs
    if function in IDENTITIES:
        return core.answer(function, regs, answer)
    if answer[0] & LOW != 0:
        return core.failed(regs, answer)
    guest = call.guest
    if function is _CAPABILITIES:
        return _capabilities(core, regs, answer)
    if function is _DISABLE:
        argument = guest.arguments.get(Cookie((answer[1] & LOW) << 32 | answer[2] & LOW))
        if argument is not None:
            release_argument(core.world, guest, argument)
    elif function is _NOTIFICATIONS:
        guest.notifications = True
    elif function is _THREADS:
        threads = min(answer[1] & LOW, guest.ledger.limits.calls)
        answer = (answer[0], threads, answer[2], answer[3])
    return core.answer(function, regs, answer)


def _capabilities(core: "Mediator", regs: Regs, answer: Regs) -> Step:
    """Offer what is mediated (R4): never reserved shared memory, nothing without dynamic shared memory."""
    offered = answer[1] & core.policy.sec_capabilities & ~SecCapability.HAVE_RESERVED_SHM
    if not offered & SecCapability.DYNAMIC_SHM:
        return core.local(regs, ReturnCode.ENOTAVAIL, keep=True)
    a2, a3 = answer[2], answer[3]
    if offered & SecCapability.RPC_ARG:
        core.learn_rpc_params(a3 & 0xFF)
    else:
        a3 = 0
    if not offered & SecCapability.ASYNC_NOTIF:
        a2 = 0
    return core.answer(_CAPABILITIES, regs, (answer[0], int(offered), a2, a3))
