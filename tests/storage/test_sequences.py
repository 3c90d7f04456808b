"""Any sequence of operations: a dictionary says what must come of it, a second reader what is on the disk."""

from dataclasses import replace
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from guests.rpmb import RpmbDevice
from optee.abi.results import Result
from optee.storage.memory.collector import PASS_BOUND
from optee.storage.registry import DataFlag
from optee.tas.secure_storage_test import StorageTest
from tests.storage import independent
from tests.storage.rig import ALL, MANAGED, PRIVATE, RPMB, Disk, StorageError, StorageRig

NAMES = st.sampled_from([b"", b"a", b"\1", b"b" * 64])
SIZES = st.one_of(st.sampled_from([0, 1, 4071, 4072, 4073, 8168, 20000]), st.integers(0, 30000))
BYTES = st.builds(lambda size, byte: bytes([byte]) * size, SIZES, st.integers(1, 255))


class Storage(RuleBasedStateMachine):
    handles: Bundle = Bundle("handles")

    storage = PRIVATE
    config: ClassVar[dict[str, object]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.start(Disk(rpmb=RpmbDevice()))
        self.contents: dict[bytes, bytearray] = {}
        self.positions: dict[tuple[int, int], int] = {}
        self.names: dict[tuple[int, int], bytes] = {}

    def refused(self, call, *arguments) -> Result | None:
        try:
            call(*arguments)
        except StorageError as error:
            return error.result
        return None

    @rule(target=handles, who=st.integers(0, 1), name=NAMES, data=BYTES, overwrite=st.booleans())
    def create(self, who: int, name: bytes, data: bytes, overwrite: bool):
        flags = ALL | (DataFlag.OVERWRITE if overwrite else 0)
        taken = name in self.names.values() or (name in self.contents and not overwrite)
        try:
            handle = self.clients[who].create(name, data, flags)
        except StorageError as error:
            assert taken and error.result == Result.ACCESS_CONFLICT
            return None
        assert not taken
        self.contents[name] = bytearray(data)
        return self.hold(who, handle, name)

    @rule(target=handles, who=st.integers(0, 1), name=NAMES)
    def open(self, who: int, name: bytes):
        try:
            handle = self.clients[who].open(name)
        except StorageError as error:
            expected = Result.ACCESS_CONFLICT if name in self.names.values() else Result.ITEM_NOT_FOUND
            assert error.result == expected
            return None
        assert name in self.contents and name not in self.names.values()
        return self.hold(who, handle, name)

    def hold(self, who: int, handle: int, name: bytes) -> tuple[int, int]:
        self.names[who, handle] = name
        self.positions[who, handle] = 0
        return who, handle

    def release(self, held: tuple[int, int]) -> bytes:
        del self.positions[held]
        return self.names.pop(held)

    @rule(held=handles, data=BYTES)
    def write(self, held: tuple[int, int] | None, data: bytes) -> None:
        if held not in self.names:
            return
        who, handle = held
        self.clients[who].write(handle, data)
        content, position = self.contents[self.names[held]], self.positions[held]
        if data:
            content.extend(bytes(max(0, position - len(content))))
            content[position : position + len(data)] = data
        self.positions[held] += len(data)

    @rule(held=handles, size=SIZES)
    def read(self, held: tuple[int, int] | None, size: int) -> None:
        if held not in self.names:
            return
        who, handle = held
        position = self.positions[held]
        expected = bytes(self.contents[self.names[held]][position : position + size])
        assert self.clients[who].read(handle, size) == expected
        self.positions[held] += len(expected)

    @rule(held=handles, offset=st.integers(-40000, 40000), whence=st.integers(0, 2))
    def seek(self, held: tuple[int, int] | None, offset: int, whence: int) -> None:
        if held not in self.names:
            return
        who, handle = held
        self.clients[who].seek(handle, offset, whence)
        base = (0, self.positions[held], len(self.contents[self.names[held]]))[whence]
        self.positions[held] = max(0, base + offset)

    @rule(held=handles, size=SIZES)
    def truncate(self, held: tuple[int, int] | None, size: int) -> None:
        if held not in self.names:
            return
        who, handle = held
        self.clients[who].truncate(handle, size)
        content = self.contents[self.names[held]]
        content.extend(bytes(max(0, size - len(content))))
        del content[size:]

    @rule(held=handles, name=NAMES)
    def rename(self, held: tuple[int, int] | None, name: bytes) -> None:
        if held not in self.names:
            return
        who, handle = held
        result = self.refused(self.clients[who].rename, handle, name)
        assert result == (Result.ACCESS_CONFLICT if name in self.contents else None)
        if result is None:
            self.contents[name] = self.contents.pop(self.names[held])
            self.names[held] = name

    @rule(held=consumes(handles))
    def close(self, held: tuple[int, int] | None) -> None:
        if held in self.names:
            self.clients[held[0]].close(held[1])
            self.release(held)

    @rule(held=consumes(handles))
    def unlink(self, held: tuple[int, int] | None) -> None:
        if held in self.names:
            self.clients[held[0]].unlink(held[1])
            del self.contents[self.release(held)]

    def start(self, disk: Disk) -> None:
        self.rig = StorageRig(disk, **self.config)
        self.clients = [self.rig.session(storage=self.storage), self.rig.session(storage=self.storage)]

    @rule()
    def restart(self) -> None:
        files = {name: bytearray(content) for name, content in self.rig.disk.snapshot().items()}
        self.start(Disk(files, rpmb=self.rig.disk.rpmb))
        self.names.clear()
        self.positions.clear()

    @invariant()
    def the_disk_has_it(self) -> None:
        assert self.on_disk() == self.contents

    def on_disk(self) -> dict[bytes, bytes]:
        if "dirf.db" not in self.rig.disk.files:
            return {}
        return independent.read(self.rig.disk.snapshot()).by_id

    def teardown(self) -> None:
        for who, handle in list(self.names):
            self.clients[who].close(handle)
        assert not self.rig.disk.open_files
        assert dict(self.clients[0].enumerate()) == self.enumerated()

    def enumerated(self) -> dict[bytes, int]:
        return {name: len(data) for name, data in self.contents.items()}


class AnchoredStorage(Storage):
    """REE FS with its anchor in RPMB: the same answers and the same files."""

    config: ClassVar[dict[str, object]] = {"rpmb_fs": True, "rpmb_write_key": True}

    def on_disk(self) -> dict[bytes, bytes]:
        found = super().on_disk()
        device = self.rig.disk.rpmb
        if found and device is not None:
            anchor = independent.read_rpmb(bytes(device.content))["/dirfile.db.hash"]
            assert independent.root_hashes(self.rig.disk.snapshot()["dirf.db"])[-1] == anchor
        return found


class ManagedStorage(Storage):
    """With caches that are far too small, and a collector that runs all the time."""

    config: ClassVar[dict[str, object]] = {
        "storage": replace(MANAGED, object_cache_size=2, block_cache_size=3, htree_node_count=9, gc_interval_ms=10)
    }

    @rule(milliseconds=st.integers(1, 200))
    def wait(self, milliseconds: int) -> None:
        self.rig.world.slept(milliseconds)

    def teardown(self) -> None:
        super().teardown()
        for client in self.clients:
            client.close_session()
        memory = self.rig.storage_memory
        assert memory.charged <= memory.bound
        assert memory.collector.statistics.longest_pass <= PASS_BOUND
        memory.clear()
        assert memory.held() == {}


class ManagedAnchoredStorage(AnchoredStorage):
    """The same with everything kept in the core's heap."""

    config: ClassVar[dict[str, object]] = {**AnchoredStorage.config, "storage": MANAGED}


class RpmbStorage(Storage):
    storage = RPMB
    config: ClassVar[dict[str, object]] = {"rpmb_fs": True, "rpmb_write_key": True}

    def on_disk(self) -> dict[bytes, bytes]:
        device = self.rig.disk.rpmb
        if device is None or device.key is None:
            return {}
        return independent.rpmb_objects(bytes(device.content), StorageTest.uuid.bytes_le)

    def enumerated(self) -> dict[bytes, int]:
        """As in OP-TEE, an object with the empty id is not among them."""
        return {name: size for name, size in super().enumerated().items() if name}


class ManagedRpmbStorage(RpmbStorage):
    config: ClassVar[dict[str, object]] = {
        **RpmbStorage.config,
        "storage": replace(MANAGED, rpmb_fs_cache_entries=5),
    }


TestSequences = Storage.TestCase
TestSequences.settings = settings(max_examples=settings.default.max_examples // 4, stateful_step_count=30)
"""A sequence takes as long as several examples of other tests."""
TestAnchoredSequences = AnchoredStorage.TestCase
TestAnchoredSequences.settings = settings(TestSequences.settings, max_examples=TestSequences.settings.max_examples // 3)
TestManagedSequences = ManagedStorage.TestCase
TestManagedSequences.settings = TestAnchoredSequences.settings
TestManagedAnchoredSequences = ManagedAnchoredStorage.TestCase
TestManagedAnchoredSequences.settings = TestAnchoredSequences.settings
TestRpmbSequences = RpmbStorage.TestCase
TestRpmbSequences.settings = TestAnchoredSequences.settings
TestManagedRpmbSequences = ManagedRpmbStorage.TestCase
TestManagedRpmbSequences.settings = TestAnchoredSequences.settings
