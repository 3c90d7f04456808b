"""The OP-TEE driver of a guest's kernel, as that of Linux 6.1 behaves towards the SMC interface.

Sources: the recordings of a real driver; Linux 6.1 drivers/tee/optee; "real answers", section "Linux and Xen
around it". Order and content of the calls are Linux'; what Linux does only towards its own processes is left out.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import trio

from guests.calls import Answer, ArgumentCache, Caller
from guests.clock import BOOT_TIME, Clock
from guests.errors import OutOfGuestMemoryError, ProbeError, RegistrationError
from guests.memory import Buffer, PageAllocator
from guests.notifications import MAX_WITHOUT_ASYNC, Notifications
from guests.rpc import RpcHandler
from guests.shm import SharedMemory, SharedMemoryTable
from guests.supplicant_device import SupplicantDevice, SupplicantProcess
from guests.uninterruptible import Uninterruptible
from guests.vcpus import Vcpus
from hv_models.conduit import Conduit
from hv_models.memory import PAGE_SIZE, GuestRam
from optee.abi.message import META, Command, Login, Param, ParamType
from optee.abi.results import Origin, Result
from optee.abi.smc import (
    API_REVISION,
    API_UID,
    Function,
    NotificationStatus,
    Registers,
    ReturnCode,
    SecCapability,
    from_pair,
)

DEVICE_ENUMERATION: Final = UUID("7011a688-ddde-4053-a5a9-7b3c4ddf13b8")
"""The pseudo TA that lists TAs a kernel may want to bind a driver to."""

NIL_UUID: Final = UUID(int=0)

_GET_DEVICES: Final = 0
_GET_DEVICES_WITH_SUPPLICANT: Final = 1
_DO_BOTTOM_HALF: Final = 0
_UUID_SIZE: Final = 16
_LOW_WORD: Final = 0xFFFFFFFF
_OCTETS: Final = struct.Struct("<2Q")
_META_VALUE: Final = ParamType.VALUE_INPUT | META
_NO_PARAM: Final = Param(ParamType.NONE)


@dataclass(frozen=True, slots=True)
class DriverStatistics:
    """Counters for debugging. smcs: SMCs made; calls: messages sent; the rest says why a call took several."""

    smcs: int
    calls: int
    thread_limits: int
    waiting_for_thread: int
    foreign_interrupts: int
    rpc_commands: int
    supplicant_requests: int
    pages_used: int
    shared_memory_objects: int


class Driver:
    """One guest kernel's OP-TEE driver.

    ram: the guest's RAM, all of which the driver may allocate from. conduit: what executes an SMC. vcpus: how
    many SMCs can be in execution at once. boot_time: wall-clock seconds at the time of construction.

    `probe` first; then sessions, invocations and shared memory; `remove` (or `shutdown`) last. It is made and
    used inside one trio run.
    """

    def __init__(self, ram: GuestRam, conduit: Conduit, *, vcpus: int = 2, boot_time: int = BOOT_TIME) -> None:
        self.ram = ram
        self.allocator = PageAllocator(ram.base, ram.size)
        self.clock = Clock(boot_time)
        self.uninterruptible = Uninterruptible()
        self.capabilities = SecCapability(0)
        self.revision: Registers = (0, 0)
        self.devices: list[UUID] = []
        self.invokes = 0
        """Commands that reached a TA, as far as their answers tell."""
        self._dead: set[int] = set()
        self._shms = SharedMemoryTable()
        self._conduit = conduit
        self._vcpus = Vcpus(conduit, vcpus, self.uninterruptible)
        self._notifications = Notifications(self.uninterruptible)
        self._supplicant = SupplicantDevice(ram, self.allocator, self._shms, self.uninterruptible)
        self._rpc = RpcHandler(ram, self.allocator, self._shms, self._notifications, self.clock, self._supplicant)
        self._bus_scanned = False
        self._bottom_halves = trio.Event()
        self._interrupts = trio.CancelScope()
        self._interrupts_done: trio.Event | None = None
        self._set_up(rpc_argument=False)

    def _set_up(self, *, rpc_argument: bool) -> None:
        """Choose how messages travel: with RPC_ARG in registered pages, else in pages of their own."""
        self.rpc_argument = rpc_argument
        self._arguments = ArgumentCache(
            lambda: self._rpc.allocate_private(PAGE_SIZE), self._register, rpc_argument=rpc_argument
        )
        self._caller = Caller(
            self.ram,
            self.allocator,
            self._vcpus,
            self._rpc,
            self._arguments,
            self.uninterruptible,
            rpc_argument=rpc_argument,
        )

    async def smc(self, *regs: int) -> Registers:
        """Execute an SMC with any registers (missing ones are 0) and return x0..x7, no more."""
        return await self._vcpus.call((*regs, *(0,) * (8 - len(regs))))

    def statistics(self) -> DriverStatistics:
        """Return the counters now."""
        return DriverStatistics(
            smcs=self._vcpus.smcs,
            calls=self._caller.calls,
            thread_limits=self._caller.thread_limits,
            waiting_for_thread=self._caller.queue.waiting,
            foreign_interrupts=self._rpc.foreign_interrupts,
            rpc_commands=self._rpc.commands,
            supplicant_requests=self._supplicant.requests,
            pages_used=self.allocator.used,
            shared_memory_objects=len(self._shms),
        )

    async def probe(self) -> None:
        """Find OP-TEE, agree on capabilities, and enumerate its devices.

        Raises ProbeError where there is no OP-TEE, or one that Linux cannot use. Hangs, as Linux does, where
        DISABLE_SHM_CACHE or ENABLE_SHM_CACHE is answered EBUSY although nothing is under way.
        """
        uid = await self.smc(Function.CALLS_UID)
        if tuple(word & _LOW_WORD for word in uid[:4]) != API_UID:
            raise ProbeError("API UID is not OP-TEE's")
        self.revision = (await self.smc(Function.GET_OS_REVISION))[:2]
        major, minor = (await self.smc(Function.CALLS_REVISION))[:2]
        if major != API_REVISION[0] or minor < API_REVISION[1]:
            raise ProbeError(f"API revision {major}.{minor} is not compatible with {API_REVISION}")
        status, capabilities, maximum, rpc_params = (await self.smc(Function.EXCHANGE_CAPABILITIES))[:4]
        if status != ReturnCode.OK:
            raise ProbeError(f"capabilities mismatch: a0={status:#x}")
        self.capabilities = SecCapability(capabilities)
        if SecCapability.DYNAMIC_SHM not in self.capabilities:
            raise ProbeError("no dynamic shared memory, and reserved memory is not used here")
        self._set_up(rpc_argument=SecCapability.RPC_ARG in self.capabilities and bool(rpc_params & 0xFF))
        asynchronous = SecCapability.ASYNC_NOTIF in self.capabilities
        self._notifications.maximum = maximum if asynchronous else MAX_WITHOUT_ASYNC
        if asynchronous:
            await self.smc(Function.ENABLE_ASYNC_NOTIF)
        await self._disable_shm_cache(free=False)
        if not self.rpc_argument:
            await self._enable_shm_cache()
        await self._enumerate_devices(_GET_DEVICES)

    async def remove(self) -> None:
        """Unload: stop notifications, then give back the argument pages (or empty OP-TEE's cache of them)."""
        if not self.rpc_argument:
            await self._disable_shm_cache(free=True)
        if SecCapability.ASYNC_NOTIF in self.capabilities:
            await self._caller.message(Command.STOP_ASYNC_NOTIF)
            self._interrupts.cancel()
            if self._interrupts_done is not None:
                await self._interrupts_done.wait()
        for page in list(self._arguments.pages):
            if page.used:
                continue  # a lost call's message: OP-TEE may still write there
            self._arguments.pages.remove(page)
            if page.shm.registered:
                await self._unregister(page.shm)
            self._rpc.free_private(page.shm)
        self._supplicant.close()

    async def shutdown(self) -> None:
        """Power off: only OP-TEE's cache of RPC arguments is emptied, so nothing at all with RPC_ARG."""
        if not self.rpc_argument:
            await self._disable_shm_cache(free=True)

    async def _disable_shm_cache(self, *, free: bool) -> None:
        """Empty OP-TEE's cache. At probe its cookies are some earlier kernel's, and are not followed."""
        while True:
            completed = self._caller.queue.completed
            status, upper, lower, *_ = await self.smc(Function.DISABLE_SHM_CACHE)
            if status == ReturnCode.ENOTAVAIL:
                break
            if status != ReturnCode.OK:
                await self._caller.queue.wait(completed)
            elif free:
                self._rpc.free_cookie(from_pair(upper, lower))
        self._caller.queue.complete()

    async def _enable_shm_cache(self) -> None:
        while True:
            completed = self._caller.queue.completed
            if (await self.smc(Function.ENABLE_SHM_CACHE))[0] == ReturnCode.OK:
                break
            await self._caller.queue.wait(completed)
        self._caller.queue.complete()

    async def _enumerate_devices(self, function: int) -> None:
        """Ask the device pseudo TA for UUIDs: once without memory for the size, once with."""
        opened = await self.open_session(DEVICE_ENUMERATION)
        if opened.ret != Result.SUCCESS:
            return
        empty = [Param(ParamType.TMEM_OUTPUT), _NO_PARAM, _NO_PARAM, _NO_PARAM]
        answer = await self.invoke(opened.session, function, empty)
        if answer.ret in (Result.SUCCESS, Result.SHORT_BUFFER) and answer.params and answer.params[0].b:
            size = answer.params[0].b
            shm = await self.allocate_shared(size)
            whole = [Param(ParamType.RMEM_OUTPUT, 0, size, shm.cookie), _NO_PARAM, _NO_PARAM, _NO_PARAM]
            answer = await self.invoke(opened.session, function, whole)
            if answer.ret == Result.SUCCESS:
                octets = shm.buffer.read(0, min(answer.params[0].b, size))
                ends = range(_UUID_SIZE, len(octets) + 1, _UUID_SIZE)
                self.devices += [UUID(bytes=octets[end - _UUID_SIZE : end]) for end in ends]
            await self.free_shared(shm)
        await self.close_session(opened.session)

    async def open_session(
        self,
        ta: UUID,
        params: Sequence[Param] = (),
        *,
        login: int = Login.PUBLIC,
        client: UUID = NIL_UUID,
        cancel_id: int = 0,
    ) -> Answer:
        """Open a session to a TA (at most four parameters); `session` of the answer counts if `ret` is SUCCESS."""
        meta = [
            Param(_META_VALUE, *_OCTETS.unpack(ta.bytes)),
            Param._make((_META_VALUE, *_OCTETS.unpack(client.bytes), login)),
        ]
        return await self._caller.message(Command.OPEN_SESSION, cancel_id=cancel_id, params=[*meta, *params])

    async def invoke(self, session: int, function: int, params: Sequence[Param] = (), *, cancel_id: int = 0) -> Answer:
        """Invoke a TA's command (at most four parameters)."""
        answer = await self._caller.message(Command.INVOKE_COMMAND, function, session, cancel_id, params)
        if answer.origin == Origin.TRUSTED_APP:
            self.invokes += 1
        elif answer.ret == Result.TARGET_DEAD and answer.origin == Origin.TEE and session not in self._dead:
            # The command in which the TA panicked reached it; those after it do not.
            self._dead.add(session)
            self.invokes += 1
        return answer

    async def close_session(self, session: int) -> Answer:
        """Close a session."""
        self._dead.discard(session)
        return await self._caller.message(Command.CLOSE_SESSION, session=session)

    async def cancel(self, session: int, *, cancel_id: int = 0) -> Answer:
        """Ask for the cancellation of what a session is doing; it takes a secure thread of its own."""
        return await self._caller.message(Command.CANCEL, session=session, cancel_id=cancel_id)

    async def register(self, buffer: Buffer) -> SharedMemory:
        """Register a process's memory with OP-TEE. Raises RegistrationError, OutOfGuestMemoryError."""
        shm = self._shms.add(buffer)
        try:
            await self._register(shm)
        except (RegistrationError, OutOfGuestMemoryError, trio.Cancelled):
            self._shms.discard(shm)
            raise
        return shm

    async def unregister(self, shm: SharedMemory) -> None:
        """Take memory back from OP-TEE; blocks while a call uses it. Raises RegistrationError if refused."""
        await self._unregister(shm)
        self._shms.discard(shm)

    async def allocate_shared(self, size: int) -> SharedMemory:
        """Allocate whole pages of the kernel's and register them. Raises like `register`."""
        shm = self._rpc.allocate_private(size)
        shm.private = False
        try:
            await self._register(shm)
        except (RegistrationError, OutOfGuestMemoryError):
            self._rpc.free_private(shm)
            raise
        return shm

    async def free_shared(self, shm: SharedMemory) -> None:
        """Unregister such pages and free them. Raises RegistrationError if OP-TEE keeps them."""
        await self._unregister(shm)
        self._rpc.free_private(shm)

    async def _register(self, shm: SharedMemory) -> None:
        answer = await self._caller.register(shm)
        if answer.ret != Result.SUCCESS:
            raise RegistrationError(answer.status, answer.ret, answer.origin)
        shm.registered = True

    async def _unregister(self, shm: SharedMemory) -> None:
        answer = await self._caller.unregister(shm)
        if answer.ret != Result.SUCCESS:
            raise RegistrationError(answer.status, answer.ret, answer.origin)
        shm.registered = False

    async def start_supplicant(self, process: SupplicantProcess) -> None:
        """Start tee-supplicant; the first time, devices that need one are enumerated."""
        self._supplicant.open(process)
        if not self._bus_scanned:
            self._bus_scanned = True
            await self._enumerate_devices(_GET_DEVICES_WITH_SUPPLICANT)

    def stop_supplicant(self) -> None:
        """End tee-supplicant: requests under way fail with COMMUNICATION, later ones wait for a new one."""
        self._supplicant.close()

    async def handle_interrupts(self) -> None:
        """Serve OP-TEE's notification interrupt until `remove`: run it as a task beside the guest's other work.

        Returns at once where OP-TEE does not offer asynchronous notification.
        """
        if SecCapability.ASYNC_NOTIF not in self.capabilities:
            return
        done = self._interrupts_done = trio.Event()
        try:
            with self._interrupts:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._do_bottom_halves)
                    while True:
                        await self._conduit.wait_for_interrupt()
                        await self._take_values()
        finally:
            done.set()

    async def _take_values(self) -> None:
        """Ask which notifications are pending (from hard interrupt context, in Linux), and deliver them."""
        pending = True
        while pending:
            status, value, flags, *_ = await self.smc(Function.GET_ASYNC_NOTIF_VALUE)
            state = NotificationStatus(flags)
            if status != ReturnCode.OK or not state.VALID:
                return
            if value == _DO_BOTTOM_HALF:
                self._bottom_halves.set()
            else:
                self._notifications.send(value)
            pending = bool(state.PENDING)

    async def _do_bottom_halves(self) -> None:
        """The interrupt's thread: notifications that come while it works are one further round."""
        while True:
            await self._bottom_halves.wait()
            self._bottom_halves = trio.Event()
            await self._caller.message(Command.DO_BOTTOM_HALF)
