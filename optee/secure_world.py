"""The secure world: SMC registers in, registers out.

Source: OP-TEE core behaviour, sections 1 to 3, and what a real OP-TEE 4.10 answered SMC by SMC. Everything
happens inside `SecureWorld.call`; between two calls nothing runs. Memory is reached by PA only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final, NoReturn, TypeAlias
from uuid import UUID

from hv_models.memory import PhysicalFault, PhysicalMemory
from optee.abi.rpc import RPC_PARAMS
from optee.abi.smc import (
    API_REVISION,
    API_UID,
    CLIENT_ID_MASK,
    HYPERVISOR_CLIENT_ID,
    OS_UUID,
    SHM_CACHED,
    Function,
    NsecCapability,
    Registers,
    ReturnCode,
    RpcReturn,
    SecCapability,
    VmId,
    to_pair,
)
from optee.config import DEFAULT, NOTIFICATION_VALUES, Config
from optee.entry import yielding_call
from optee.errors import SecureWorldFault, TeeError
from optee.memory.pool import Allocation
from optee.memory.pools import GuestPools, LowMemory, NexusPools
from optee.normal_world import NormalWorld
from optee.panic import PanicReport
from optee.partition import Partition
from optee.storage.memory.manager import MemoryManager
from optee.tas.catalogue import BUILT_IN
from optee.threads import Thread, ThreadState
from optee.trusted_application import TrustedApplication

Answer: TypeAlias = tuple[int, int, int, int]
"""x0..x3."""

_MASK: Final = 0xFFFFFFFF
_FAST: Final = 1 << 31
_OK: Final = int(ReturnCode.OK)
_ETHREAD_LIMIT: Final = int(ReturnCode.ETHREAD_LIMIT)
_EBUSY: Final = int(ReturnCode.EBUSY)
_ERESUME: Final = int(ReturnCode.ERESUME)
_ENOTAVAIL: Final = int(ReturnCode.ENOTAVAIL)
_UNKNOWN_FUNCTION: Final = int(ReturnCode.UNKNOWN_FUNCTION)
_RETURN_FROM_RPC: Final = int(Function.RETURN_FROM_RPC)
_FOREIGN_INTR: Final = int(RpcReturn.FOREIGN_INTR)
_FREE: Final = ThreadState.FREE
_ACTIVE: Final = ThreadState.ACTIVE
_SUSPENDED: Final = ThreadState.SUSPENDED

_CAPABILITIES: Final = (
    SecCapability.HAVE_RESERVED_SHM
    | SecCapability.MEMREF_NULL
    | SecCapability.ASYNC_NOTIF
    | SecCapability.RPC_ARG
    | SecCapability.RPMB_PROBE
)
_KNOWN_NSEC_CAPABILITIES: Final = int(NsecCapability.UNIPROCESSOR)
_CALLS: Final = 12
_CALLS_WITH_VIRTUALIZATION: Final = 14
_KEPT_REPORTS: Final = 64  # a guest can cause any number of them
_KEPT_LINES: Final = 2048
_VALID: Final = 1
_MORE_PENDING: Final = 2
_ONLY_PARTITION: Final = VmId(0)  # of a build without virtualization


@dataclass(frozen=True, slots=True)
class SharedObject:
    """A shared buffer that OP-TEE knows: what it may read and write at any time."""

    cookie: int
    pages: tuple[int, ...]
    """PAs of the pages, in order."""
    temporary: bool
    """Made for one call or one RPC, not registered."""


class SecureWorld:
    """OP-TEE on one machine, for all its guests."""

    def __init__(self, memory: PhysicalMemory, config: Config = DEFAULT) -> None:
        self.config = config
        reserved = (0, 0) if config.virtualization else config.reserved_shm
        self.normal_world = NormalWorld(memory, config.secure_ram, reserved)
        self.random = Random(config.seed)
        self.tas: dict[UUID, type[TrustedApplication]] = {ta.uuid: ta for ta in (*BUILT_IN, *config.extra_tas)}
        """Every TA whose code the model knows, by UUID."""
        self.interrupt_pending: Callable[[VmId], bool] | None = None
        """Asked at each moment at which secure code of that guest can be interrupted: True makes the call
        return FOREIGN_INTR."""
        self.on_notification: Callable[[VmId], None] | None = None
        """Called when an asynchronous notification becomes pending for a guest: raise its interrupt."""
        self.on_panic: Callable[[PanicReport], None] | None = None
        """Called when a TA panics."""
        self.clock: Callable[[], int] | None = None
        """Milliseconds of the machine's counter; without it time passes only in SUSPEND."""
        self.ta_invokes = 0
        """INVOKE_COMMAND messages that reached a TA."""
        self.cancels = 0
        """CANCEL messages."""
        self.thread_limits = 0
        """Answers ETHREAD_LIMIT."""
        self.panics = 0
        """TA panics."""
        self.panic_reports: deque[PanicReport] = deque(maxlen=_KEPT_REPORTS)
        """The latest of them, described."""
        self.console: deque[str] = deque(maxlen=_KEPT_LINES)
        """The latest lines that OP-TEE printed, panic reports included."""
        self.died: str | None = None
        """Why OP-TEE itself is dead, if it is."""
        self.on_low_memory: Callable[[LowMemory], None] | None = None
        """Called when four fifths of a pool are taken for the first time, or it fails for the first time."""
        self.leaks: list[Allocation] = []
        """With `leak_report`: memory that guests left although nobody held it."""
        self._slept = 0
        self.nexus = NexusPools(config.build, config.secure_ram[0][0], self._low_memory)
        """Memory of the machine."""
        self._partitions: list[Partition] = []  # newest first: it shadows others of its id
        self._by_id: dict[int, Partition] = {}
        if not config.virtualization:
            self._add_partition(_ONLY_PARTITION)

    def call(self, regs: Registers) -> Answer:
        """Execute one SMC with x0..x7. Raises SecureWorldFault where OP-TEE would die, and ever after."""
        if self.died is not None:
            raise SecureWorldFault(self.died)
        function = regs[0] & _MASK
        try:
            if function & _FAST:
                return self._fast(function, regs)
            return self._yielding(function, regs)
        except PhysicalFault as fault:
            self._die(f"external abort in the secure world: {fault}")
        except SecureWorldFault as fault:
            self._die(str(fault))

    def _die(self, reason: str) -> NoReturn:
        self.died = reason
        raise SecureWorldFault(reason)

    def partitions(self) -> tuple[VmId, ...]:
        """Client ids that have a partition, newest first; an id created twice appears twice."""
        return tuple(partition.vm_id for partition in self._partitions)

    def threads_held(self, vm_id: int) -> int:
        """Threads of that guest that are not FREE; 0 for a guest that does not exist."""
        partition = self._by_id.get(vm_id)
        return 0 if partition is None else partition.threads_held()

    def shared_objects(self, vm_id: int) -> tuple[SharedObject, ...]:
        """Shared buffers of that guest that OP-TEE knows now."""
        partition = self._by_id.get(vm_id)
        if partition is None:
            return ()
        return tuple(SharedObject(shm.cookie, tuple(shm.pages), shm.guarded) for shm in partition.shared_memory)

    def session_count(self, vm_id: int) -> int:
        """Sessions of the normal world that are open."""
        partition = self._by_id.get(vm_id)
        return 0 if partition is None else len(partition.sessions.open)

    def storage_memory(self, vm_id: int) -> MemoryManager | None:
        """The memory manager of a guest's secure storage; None if it has none, as in OP-TEE."""
        partition = self._by_id.get(vm_id)
        return None if partition is None else partition.storage.memory

    def stack_peaks(self, vm_id: int) -> dict[str, tuple[int, int]]:
        """By TA: the most bytes of stack ever used by that guest, and the stack's size."""
        partition = self._by_id.get(vm_id)
        if partition is None:
            return {}
        peaks = partition.sessions.stack_peaks
        return {str(uuid): (peak, self.tas[uuid].stack_size) for uuid, peak in peaks.items()}

    def ta_heap_peak(self, vm_id: int) -> int:
        """The most bytes that the heaps of that guest's TAs ever had in use, all together."""
        partition = self._by_id.get(vm_id)
        return 0 if partition is None else partition.sessions.heap_peak

    def notify(self, vm_id: int, value: int) -> None:
        """Send an asynchronous notification to a guest, as a driver in OP-TEE does; 0 asks for a bottom half.

        Raises ValueError for a value or a guest that does not exist.
        """
        partition = self._by_id.get(vm_id)
        if partition is None or not 0 <= value < NOTIFICATION_VALUES:
            raise ValueError(f"no notification {value} for guest {vm_id}")
        partition.notifications |= 1 << value
        if self.on_notification is not None:
            self.on_notification(partition.vm_id)

    def milliseconds(self) -> int:
        """The machine's counter."""
        return self._slept if self.clock is None else self.clock()

    def slept(self, milliseconds: int) -> None:
        """Let time pass where there is no clock: the normal world says it has slept so long."""
        self._slept += milliseconds

    def pools(self, vm_id: int) -> GuestPools | None:
        """Memory of a guest; None for a guest that does not exist."""
        partition = self._by_id.get(vm_id)
        return None if partition is None else partition.pools

    def _low_memory(self, low: LowMemory) -> None:
        if self.on_low_memory is not None:
            self.on_low_memory(low)

    def log(self, line: str) -> None:
        """Print on OP-TEE's console."""
        self.console.append(line)

    def note_panic(self, report: PanicReport) -> None:
        """Record a TA panic and print it."""
        self.panics += 1
        self.panic_reports.append(report)
        self.console.extend(report.text().splitlines())
        if self.on_panic is not None:
            self.on_panic(report)

    def tas_in_image(self) -> Iterator[type[TrustedApplication]]:
        """Pseudo TAs, then early TAs."""
        for ta in self.tas.values():
            if ta.is_pseudo:
                yield ta
        for ta in self.tas.values():
            if not ta.is_pseudo and self.config.is_early(ta.uuid):
                yield ta

    def _find(self, a7: int) -> Partition | None:
        """The partition that a call with this a7 runs in: 16 bits count."""
        if not self.config.virtualization:
            return self._partitions[0]
        return self._by_id.get(a7 & CLIENT_ID_MASK)

    def _add_partition(self, vm_id: VmId) -> bool:
        try:
            pools = self.nexus.create_guest(vm_id)
        except TeeError:
            return False
        partition = Partition(self, vm_id, pools)
        self._partitions.insert(0, partition)
        self._by_id[vm_id] = partition
        return True

    def _remove_partition(self, vm_id: int) -> None:
        partition = self._by_id.pop(vm_id, None)
        if partition is None:
            return
        self._partitions.remove(partition)
        left = partition.destroy()
        self.nexus.destroy_guest(partition.pools)
        if self.config.leak_report:
            self.leaks += left
            self.console.extend(f"leak: {allocation.size} bytes, {allocation.owner}" for allocation in left)
        for other in self._partitions:
            if other.vm_id == vm_id:
                self._by_id[vm_id] = other
                break

    def _yielding(self, function: int, regs: Registers) -> Answer:
        partition = self._find(regs[7])
        if partition is None:
            return _ENOTAVAIL, regs[1], regs[2], regs[3]
        if function == _RETURN_FROM_RPC:
            index = regs[3] & _MASK
            threads = partition.threads
            if index >= len(threads) or threads[index].state is not _SUSPENDED:
                return _ERESUME, regs[1], regs[2], regs[3]
            thread = threads[index]
            return self._run(thread, regs if thread.in_rpc else ())
        free = partition.free_thread()
        if free is None:
            self.thread_limits += 1
            return _ETHREAD_LIMIT, regs[1], regs[2], regs[3]
        free.steps = yielding_call(free, function, regs[1], regs[2], regs[3])
        return self._run(free, None)

    def _run(self, thread: Thread, sent: Registers | None) -> Answer:
        """Run a thread until it ends or the normal world has to do something."""
        steps = thread.steps
        assert steps is not None
        thread.state = _ACTIVE
        try:
            while True:
                step = next(steps) if sent is None else steps.send(sent)
                if step is not None:
                    thread.state = _SUSPENDED
                    thread.in_rpc = True
                    return (*step, thread.index)
                if self.interrupt_pending is not None and self.interrupt_pending(thread.partition.vm_id):
                    thread.state = _SUSPENDED
                    thread.in_rpc = False
                    return _FOREIGN_INTR, 0, 0, thread.index
                sent = ()
        except StopIteration as end:
            thread.state = _FREE
            thread.steps = None
            code: int = end.value
            return code, 0, 0, 0

    def _fast(self, function: int, regs: Registers) -> Answer:
        partition = self._find(regs[7])
        if partition is None and regs[7] & _MASK != HYPERVISOR_CLIENT_ID:
            return _ENOTAVAIL, regs[1], regs[2], regs[3]
        _, a1, a2, a3 = regs[:4]
        match function:
            case Function.GET_ASYNC_NOTIF_VALUE:
                return _next_notification(partition)
            case Function.CALLS_COUNT:
                count = _CALLS_WITH_VIRTUALIZATION if self.config.virtualization else _CALLS
                return count, a1, a2, a3
            case Function.CALLS_UID:
                return API_UID
            case Function.CALLS_REVISION:
                return (*API_REVISION, a2, a3)
            case Function.GET_OS_UUID:
                return OS_UUID
            case Function.GET_OS_REVISION:
                return (*self.config.revision, self.config.build_id, a3)
            case Function.EXCHANGE_CAPABILITIES:
                if a1 & _MASK & ~_KNOWN_NSEC_CAPABILITIES:
                    return _ENOTAVAIL, a1, a2, a3
                return _OK, self._capabilities(), NOTIFICATION_VALUES + self.config.threads, RPC_PARAMS
            case Function.GET_SHM_CONFIG:
                base, size = (0, 0) if self.config.virtualization else self.config.reserved_shm
                return _OK, base, size, SHM_CACHED
            case Function.GET_THREAD_COUNT:
                return _OK, self.config.threads, a2, a3
            case Function.BOOT_SECONDARY:
                return _ENOTAVAIL, a1, a2, a3
            case Function.VM_CREATED | Function.VM_DESTROYED if self.config.virtualization:
                return self._life_cycle(function, regs), a1, a2, a3
            case Function.ENABLE_ASYNC_NOTIF:
                _guest(partition).notifications_started = True
                return _OK, a1, a2, a3
            case Function.ENABLE_SHM_CACHE:
                return _enable_shm_cache(_guest(partition)), a1, a2, a3
            case Function.DISABLE_SHM_CACHE:
                return _disable_shm_cache(_guest(partition), a1, a2, a3)
            case _:
                return _UNKNOWN_FUNCTION, a1, a2, a3

    def _capabilities(self) -> int:
        virtualization = SecCapability.VIRTUALIZATION if self.config.virtualization else 0
        dynamic = SecCapability.DYNAMIC_SHM if self.config.dynamic_shm else 0
        return int(_CAPABILITIES | virtualization | dynamic)

    def _life_cycle(self, function: int, regs: Registers) -> int:
        vm_id = VmId(regs[1] & CLIENT_ID_MASK)
        if regs[7] & _MASK != HYPERVISOR_CLIENT_ID:
            return _ENOTAVAIL
        if function == Function.VM_DESTROYED:
            self._remove_partition(vm_id)
            return _OK
        if vm_id == HYPERVISOR_CLIENT_ID or not self._add_partition(vm_id):
            return _ENOTAVAIL
        return _OK


def _guest(partition: Partition | None) -> Partition:
    """The partition, where OP-TEE relies on there being one without looking."""
    if partition is None:
        raise SecureWorldFault("a call about one guest's state came from client 0")
    return partition


def _next_notification(partition: Partition | None) -> Answer:
    if partition is None or not partition.notifications:
        return _OK, 0, 0, 0
    pending = partition.notifications
    value = (pending & -pending).bit_length() - 1
    partition.notifications &= pending - 1
    return _OK, value, _VALID | (_MORE_PENDING if partition.notifications else 0), 0


def _enable_shm_cache(partition: Partition) -> int:
    if partition.threads_held():
        return _EBUSY
    partition.shm_cache = True
    return _OK


def _disable_shm_cache(partition: Partition, a1: int, a2: int, a3: int) -> Answer:
    """Hand out one cached RPC argument per call, then ENOTAVAIL: the cache is empty and off."""
    if partition.threads_held():
        return _EBUSY, a1, a2, a3
    for thread in partition.threads:
        shm = thread.rpc_buffer
        if shm is not None:
            thread.rpc_buffer = thread.rpc_argument = None
            partition.shared_memory.drop(shm)
            if not shm.cookie:
                return _ENOTAVAIL, a1, a2, a3
            return (_OK, *to_pair(shm.cookie), a3)
    partition.shm_cache = False
    return _ENOTAVAIL, a1, a2, a3
