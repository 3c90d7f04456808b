"""RPMB FS: its bytes on the device, its space, a device that is not ours, and a supplicant that tampers with frames."""

import copy
import hmac
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests.rpmb import LAST_COUNTER, RpmbDevice
from optee.abi.results import Result, StorageId
from optee.abi.rpc import RpcCommand
from optee.abi.rpmb import FRAME_SIZE, RPMB_BLOCK_SIZE
from optee.storage.registry import DataFlag
from optee.storage.rpmb import MAX_TRIES
from optee.storage.rpmb_layout import Space
from optee.tas.secure_storage_test import StorageTest, StorageTest2
from tests.optee.rig import Rpc
from tests.storage import independent
from tests.storage.rig import ALL, RPMB, RPMB_ASKED, Client, Disk, StorageError, StorageRig

CONFIG = {"rpmb_fs": True, "rpmb_write_key": True, "ree_fs_integrity_rpmb": False}
OWNER = StorageTest.uuid.bytes_le
DATA = bytes(range(250)) * 8


@pytest.fixture
def disk() -> Disk:
    return Disk(rpmb=RpmbDevice())


@pytest.fixture
def client(disk: Disk) -> Client:
    return start(disk)


def start(disk: Disk, **config: object) -> Client:
    return StorageRig(disk, **(CONFIG | config)).session(storage=RPMB)


def refused(call, *arguments) -> Result:
    with pytest.raises(StorageError) as error:
        call(*arguments)
    return error.value.result


def fat_entry(device: RpmbDevice, index: int) -> tuple[int, int, int, bytes]:
    start, size, flags, _, _, name = struct.unpack_from("<4I16s224s", device.content, 512 + 256 * index)
    return start, size, flags, name.rstrip(b"\0")


def test_the_bytes_on_the_device(disk: Disk, client: Client) -> None:
    """Header, FAT and places; the key of the device without revision and checksum of the card."""
    client.close(client.create(b"ob", DATA))
    client.close(client.create(b"\xab", b"x"))
    device, cid = disk.rpmb, bytearray(disk.rpmb.cid)
    cid[9] = cid[15] = 0
    assert device.key == hmac.digest(bytes(16), bytes(cid), "sha256")
    assert device.content[:16] == struct.pack("<4I", 0x52504D42, 2, 0, 512)
    assert not any(device.content[16:512])
    name = b"/" + OWNER.hex().upper().encode() + b"/"
    top = (device.blocks - 1) * RPMB_BLOCK_SIZE
    # A header is written first, to a block of its own; with its data the file is longer, and moves below that block.
    assert fat_entry(device, 0) == (top - 9 * 256, 24 + len(DATA), 1, name + b"6F62")
    assert fat_entry(device, 1) == (top - 10 * 256, 25, 1, name + b"AB")
    assert fat_entry(device, 2) == (0, 0, 2, b"")
    assert independent.rpmb_objects(bytes(device.content), OWNER) == {b"ob": DATA, b"\xab": b"x"}


def test_a_change_within_a_block_is_made_in_place(disk: Disk, client: Client) -> None:
    handle = client.create(b"object", DATA)
    before, counter = fat_entry(disk.rpmb, 0), disk.rpmb.write_counter
    client.seek(handle, 300)
    client.write(handle, b"inside one block")
    assert (fat_entry(disk.rpmb, 0), disk.rpmb.write_counter) == (before, counter + 1)
    client.seek(handle, 480)
    client.write(handle, b"over the border of two")
    blocks = -(-before[1] // RPMB_BLOCK_SIZE)
    assert fat_entry(disk.rpmb, 0)[0] != before[0]
    assert disk.rpmb.write_counter == counter + 1 + blocks + 1, "all blocks anew, then the entry"
    expected = bytearray(DATA)
    expected[300:316], expected[480:502] = b"inside one block", b"over the border of two"
    client.close(handle)
    assert client.content(b"object") == expected


def test_deleted_entries_and_their_space_are_used_again(disk: Disk, client: Client) -> None:
    for name in (b"a", b"b", b"c"):
        client.close(client.create(name, name * 300))
    places = {fat_entry(disk.rpmb, index)[0] for index in range(3)}
    client.unlink(client.open(b"b"))
    assert bytes(disk.rpmb.content[512 + 256 :][:256]) == bytes(256)
    client.close(client.create(b"d", b"d" * 300))
    assert fat_entry(disk.rpmb, 1)[3].endswith(b"/64")
    assert fat_entry(disk.rpmb, 1)[0] >= min(places)
    assert [name for name, _ in client.enumerate()] == [b"a", b"d", b"c"]


def test_more_files_than_one_reading_of_the_fat(disk: Disk, client: Client) -> None:
    names = [b"%d" % number for number in range(20)]
    for name in names:
        client.close(client.create(name, name))
    client = start(disk)
    assert client.enumerate() == [(name, len(name)) for name in names]
    assert client.content(b"19") == b"19"


def test_tas_and_storages_are_kept_apart(disk: Disk, client: Client) -> None:
    other = client.rig.session(StorageTest2.uuid, RPMB)
    client.close(client.create(b"object", b"mine"))
    other.close(other.create(b"object", b"other's"))
    client.close(client.create(b"object", b"file", ALL, StorageId.PRIVATE))
    assert client.content(b"object") == b"mine"
    assert other.content(b"object") == b"other's"
    handle = client.open(b"object", ALL, StorageId.PRIVATE_REE)
    assert client.read(handle, 10) == b"file"
    assert client.enumerate() == [(b"object", 4)]
    assert client.enumerate(StorageId.PRIVATE) == [(b"object", 4)]


def test_a_full_device(disk: Disk, client: Client) -> None:
    """STORAGE_NO_SPACE, and what is there stays; to change an object there must be room for a second copy of it."""
    handle = client.create(b"object", bytes(60000))
    assert refused(client.create, b"large", bytes(80000)) == Result.STORAGE_NO_SPACE
    assert refused(client.write, handle, bytes(80000)) == Result.STORAGE_NO_SPACE
    assert client.enumerate() == [(b"object", 60000)]
    client.close(client.create(b"small", b"fits"))
    assert sorted(independent.read_rpmb(bytes(disk.rpmb.content))) == [
        f"/{OWNER.hex().upper()}/{name.hex().upper()}" for name in (b"object", b"small")
    ]


@given(st.lists(st.integers(1, 3000), max_size=12), st.integers(1, 4000))
def test_space(sizes: list[int], wanted: int) -> None:
    """Places lie apart and as high as possible."""
    top, space = 30 * RPMB_BLOCK_SIZE, Space(30 * RPMB_BLOCK_SIZE)
    taken: set[int] = set()
    for size in [*sizes, wanted]:
        count = -(-size // RPMB_BLOCK_SIZE)
        fitting = [at for at in range(31 - count) if not taken & set(range(at, at + count))]
        place = space.find(size)
        assert place == (fitting[-1] * RPMB_BLOCK_SIZE if fitting else None)
        if place is not None:
            assert space.take(place, size)
            assert not space.take(place, 1)
            taken |= set(range(place // RPMB_BLOCK_SIZE, place // RPMB_BLOCK_SIZE + count))
    assert not space.take(top, 1)


def test_without_a_key_the_device_is_not_available(disk: Disk) -> None:
    client = start(disk, rpmb_write_key=False)
    assert refused(client.create, b"object") == Result.STORAGE_NOT_AVAILABLE
    assert disk.rpmb.key is None
    client.close(client.create(b"object", b"data", ALL, StorageId.PRIVATE))
    start(disk).create(b"object", b"data")
    assert start(disk, rpmb_write_key=False).content(b"object") == b"data", "the key is there now"


def test_the_kernel_is_asked_first_unless_the_key_is_to_be_written(disk: Disk) -> None:
    """RPMB_PROBE_RESET, as OP-TEE 4.4 and later; a kernel that does not know it leaves the device to tee-supplicant."""
    start(disk).create(b"object", b"data")
    for write_key in (True, False):
        client = start(disk, rpmb_write_key=write_key)
        assert client.content(b"object") == b"data"
        asked = [rpc.command for rpc in client.rig.served]
        assert asked.count(RpcCommand.RPMB_PROBE_RESET) == (not write_key)
        assert asked.index(RpcCommand.RPMB) > 0


def test_another_machines_device(disk: Disk, client: Client) -> None:
    """Its key is another one: the answers are not authentic, which no TA survives."""
    client.close(client.create(b"object", b"data"))
    content = bytes(disk.rpmb.content)
    assert refused(start(disk, huk=b"\1" * 16).open, b"object") == Result.TARGET_DEAD
    assert bytes(disk.rpmb.content) == content
    assert start(disk).content(b"object") == b"data"


def test_a_device_of_another_version(disk: Disk, client: Client) -> None:
    client.close(client.create(b"object", b"data"))
    disk.rpmb.content[4] = 3
    assert refused(start(disk).open, b"object") == Result.TARGET_DEAD, "ACCESS_DENIED"
    assert disk.rpmb.content[4] == 3


def test_no_device() -> None:
    """A tee-supplicant that finds no eMMC says ITEM_NOT_FOUND."""
    assert refused(start(Disk()).open, b"object") == Result.ITEM_NOT_FOUND


def test_an_expired_counter(disk: Disk, client: Client) -> None:
    """What is there can be read for ever, and nothing be written: COMMUNICATION, a panic."""
    handle = client.create(b"object", b"data")
    disk.rpmb.write_counter = LAST_COUNTER
    assert refused(client.write, handle, b"more") == Result.TARGET_DEAD


def test_a_write_is_tried_ten_times_and_then_no_more(disk: Disk, client: Client) -> None:
    handle = client.create(b"object", b"data")
    other = client.rig.session(StorageTest2.uuid, RPMB)
    disk.asked.clear()
    disk.cut_after = 2  # FAT and block are read
    assert refused(client.write, handle, b"more") == Result.TARGET_DEAD
    assert len([rpc for rpc in client.rig.served[-30:] if rpc.command == RpcCommand.RPMB]) >= MAX_TRIES
    disk.cut_after, asked = None, len(disk.asked)
    assert refused(other.open, b"object") == Result.TARGET_DEAD
    assert len(disk.asked) == asked, "nothing is asked any more"
    assert start(disk).content(b"object") == b"data"


PARTS = {"mac": 200, "data": 228, "nonce": 484, "counter": 503, "address": 505, "result": 509, "type": 510}


class HostileDisk(Disk):
    """Answers the RPMB request number `at` in its own way."""

    at = -1
    way = ""
    earlier = b""

    def serve_rpmb(self, rig: StorageRig, rpc: Rpc) -> Result:
        attacked = self.asked.count(RPMB_ASKED) - 1 == self.at
        wanted = rpc.params[1]
        place = rig.supplicant.buffers[wanted.c] + wanted.a
        if attacked and self.way == "not done":
            return Result.SUCCESS
        result = super().serve_rpmb(rig, rpc)
        answer = bytearray(rig.memory.read(place, wanted.b))
        if attacked:
            if self.way in PARTS:
                at = len(answer) - FRAME_SIZE + PARTS[self.way]
                if at >= 0:
                    answer[at] ^= 1
            elif self.way == "earlier":
                answer[:] = self.earlier[: len(answer)].ljust(len(answer), b"\0")
            elif self.way == "zeroes":
                answer[:] = bytes(len(answer))
            elif self.way == "swapped" and len(answer) > FRAME_SIZE:
                answer[228:484], answer[FRAME_SIZE + 228 : FRAME_SIZE + 484] = (
                    answer[FRAME_SIZE + 228 : FRAME_SIZE + 484],
                    answer[228:484],
                )
            elif self.way == "longer":
                rpc.params[1] = wanted._replace(b=wanted.b + 1)
            elif self.way == "shorter":
                rpc.params[1] = wanted._replace(b=max(wanted.b - 1, 0))
            rig.memory.write(place, bytes(answer))
        elif result == Result.SUCCESS and len(answer) >= FRAME_SIZE:
            self.earlier = bytes(answer)
        return {"error": Result.GENERIC, "missing": Result.ITEM_NOT_FOUND}.get(self.way, result) if attacked else result


WAYS = [*PARTS, "earlier", "zeroes", "swapped", "longer", "shorter", "error", "missing", "not done"]
NEW = DATA[:500] + b"!" * 300 + DATA[800:]
ERRORS = {Result.CORRUPT_OBJECT, Result.ITEM_NOT_FOUND, Result.TARGET_DEAD, Result.STORAGE_NOT_AVAILABLE}


@pytest.mark.parametrize("way", WAYS)
def test_no_answer_makes_wrong_data(way: str) -> None:
    """Read, change and read again with one answer spoilt: the right data or an error; after a restart old or new."""
    good = Disk(rpmb=RpmbDevice())
    client = start(good)
    client.close(client.create(b"object", DATA))
    at, hit = 0, True
    while hit:
        disk = HostileDisk(rpmb=copy.deepcopy(good.rpmb))
        disk.at, disk.way = at, way
        client = start(disk)
        try:
            assert client.content(b"object") == DATA
            handle = client.open(b"object")
            client.seek(handle, 500)
            client.write(handle, b"!" * 300)
            client.seek(handle, 0)
            assert client.read(handle, 5000) == NEW
        except StorageError as error:
            assert error.result in ERRORS, (at, error)
        hit = at < disk.asked.count(RPMB_ASKED)
        assert independent.rpmb_objects(bytes(disk.rpmb.content), OWNER)[b"object"] in (DATA, NEW), at
        assert start(Disk(rpmb=disk.rpmb)).content(b"object") in (DATA, NEW), at
        at += 1
    assert at > 15


def test_one_spoilt_answer_to_a_write_is_survived(disk: Disk, client: Client) -> None:
    """The write was done and its answer spoilt: it is asked again with the next counter, and succeeds."""
    client.close(client.create(b"object", DATA))
    hostile = HostileDisk(rpmb=disk.rpmb)
    client = start(hostile)
    handle = client.open(b"object", DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE)
    hostile.at, hostile.way = hostile.asked.count(RPMB_ASKED) + 2, "mac"
    counter = disk.rpmb.write_counter
    client.write(handle, b"!")
    assert disk.rpmb.write_counter == counter + 2
    client.close(handle)
    assert client.content(b"object") == b"!" + DATA[1:]
