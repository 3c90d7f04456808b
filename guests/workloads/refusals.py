"""Things that a mediator must refuse, each tried once: they are counted as refusals, not as errors."""

from typing import Final

from guests.errors import OutOfGuestMemoryError, RegistrationError
from guests.guest import Guest
from guests.memory import Buffer
from guests.shm import SharedMemory
from guests.workloads.report import Report
from hv_models.memory import PAGE_SIZE
from optee.abi.results import Result
from optee.abi.smc import API_UID, Function, ReturnCode

UNDEFINED: Final = 0xFFFF_FFFF_FFFF_FFFF
"""a0 of a call that is not defined for a guest: -1, all 64 bits."""

_FORGED_CLIENT: Final = 0x7FFF
_LOW_WORD: Final = 0xFFFFFFFF
_FORBIDDEN: Final = (
    Function.VM_CREATED,
    Function.VM_DESTROYED,
    Function.BOOT_SECONDARY,
    Function.L2CC_MUTEX,
    Function.LOAD_IMAGE,
)
_PAGES: Final = 16385  # one more than any policy gives a buffer
_MOST_BUFFERS: Final = 8  # together more than any policy gives a guest


async def try_refusals(guest: Guest, report: Report) -> None:
    """Try each forbidden thing once.

    A forged client id in a7 (must have no effect: a real OP-TEE refuses unknown ids), reserved shared memory,
    functions that are the hypervisor's alone, and more shared memory than the quota.
    """
    smc = guest.driver.smc
    uid = await smc(Function.CALLS_UID, 0, 0, 0, 0, 0, 0, _FORGED_CLIENT)
    genuine = tuple(word & _LOW_WORD for word in uid[:4]) == API_UID
    report.refused("forged client id", good=genuine, answer=f"a0={uid[0]:#x}")

    status = (await smc(Function.GET_SHM_CONFIG))[0]
    report.refused("GET_SHM_CONFIG", good=status == ReturnCode.ENOTAVAIL, answer=f"a0={status:#x}")

    for function in _FORBIDDEN:
        status = (await smc(function, 1))[0]
        report.refused(function.name, good=status == UNDEFINED, answer=f"a0={status:#x}")

    await _exceed_quota(guest, report)


async def _exceed_quota(guest: Guest, report: Report) -> None:
    """Register buffers, of one page named many times, until one is refused; then give all back."""
    driver = guest.driver
    try:
        page = driver.allocator.page()
    except OutOfGuestMemoryError:
        return
    held: list[SharedMemory] = []
    answer = "none was refused"
    good = False
    try:
        while len(held) < _MOST_BUFFERS:
            held.append(await driver.register(Buffer(driver.ram, (page,) * _PAGES, _PAGES * PAGE_SIZE)))
    except RegistrationError as error:
        good, answer = error.result == Result.OUT_OF_MEMORY, str(error)
    except OutOfGuestMemoryError:
        answer = "the guest's own RAM is full"
    finally:
        with driver.uninterruptible.scope():
            for shm in held:
                await driver.unregister(shm)
        driver.allocator.release((page,))
    report.refused("quota", good=good, answer=answer)
