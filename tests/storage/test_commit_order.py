"""What the model asks of the normal world, and in which order, against what a real OP-TEE did."""

import gzip
import json
from collections.abc import Callable
from uuid import UUID

import pytest

from optee.abi.message import Message, Param, ParamType
from optee.abi.results import Result
from optee.abi.rpc import FsOperation, RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn
from optee.storage.registry import DataFlag
from optee.ta_image import build_image
from optee.tas.hello_world import HelloWorld
from optee.tas.secure_storage import SecureStorage
from optee.trusted_application import TrustedApplication
from tests.optee.rig import Rpc, invoke_message, open_message
from tests.shared import SHARED, needs_shared
from tests.storage import independent
from tests.storage.rig import ALL, Client, Disk, StorageRig

pytestmark = needs_shared
STORES = SHARED / "stores"
MAX_SIZE = 7000


OWNER = UUID("5f0c0a11-7e57-4a57-8e5e-c0ffee000001")


def owner_ta() -> type[TrustedApplication]:
    from optee.tas.secure_storage_test import StorageTest

    return type("StoreOwner", (StorageTest,), {"uuid": OWNER})


def write(client: Client) -> None:
    client.write(client.open(b"big"), bytes(143000))


def append(client: Client) -> None:
    handle = client.open(b"big")
    client.seek(handle, 0, 2)
    client.write(handle, bytes(9000))


def overwrite(client: Client) -> None:
    client.create(b"big", bytes(6000), ALL | DataFlag.OVERWRITE)


def delete(client: Client) -> None:
    client.unlink(client.open(b"big"))


def rename(client: Client) -> None:
    client.rename(client.open(b"big"), b"big2")


def truncate(client: Client) -> None:
    client.truncate(client.open(b"big"), 100)


def create(client: Client) -> None:
    client.create(b"fresh", bytes(5000))


OPERATIONS: dict[str, Callable[[Client], None]] = {
    "write": write,
    "append": append,
    "ow": overwrite,
    "delete": delete,
    "rename": rename,
    "trunc": truncate,
    "create": create,
}


def recorded_changes(name: str) -> list[str]:
    order = json.loads((STORES / "commit_order.json").read_text())
    return [f"{kind} {what}" for _, kind, what in order[name]]


@pytest.mark.parametrize("name", OPERATIONS)
def test_changes_on_disk(name: str) -> None:
    ta = owner_ta()
    rig = StorageRig(Disk.load(STORES / "store-torn/states/base/tee"), extra_tas=(ta,))
    before = independent.read(rig.disk.snapshot())
    client = rig.session(ta.uuid)
    OPERATIONS[name](client)
    changes = recorded_changes(name)
    if name == "trunc":  # ours commits first, with the parents of dropped nodes, and cuts the file last
        changes = [*changes[1:], changes[0]]
    assert rig.disk.changes == changes
    after = {o.id: o.data for o in independent.read(rig.disk.snapshot()).objects if o.owner == ta.uuid.bytes_le}
    old = {o.id: o.data for o in before.objects if o.owner == ta.uuid.bytes_le}
    assert after.keys() - {b"big", b"big2", b"fresh"} == old.keys() - {b"big"}
    assert (
        after.get(b"big", after.get(b"big2"))
        == {
            "write": bytes(143000),
            "append": old[b"big"] + bytes(9000),
            "ow": bytes(6000),
            "delete": None,
            "rename": old[b"big"],
            "trunc": old[b"big"][:100],
            "create": old[b"big"],
        }[name]
    )
    assert client.content(b"small") == old[b"small"]


def test_first_use() -> None:
    ta = owner_ta()
    rig = StorageRig(early_tas=frozenset(), extra_tas=(ta,))
    rig.supplicant.images[ta.uuid] = build_image(ta)
    rig.session(ta.uuid).create(b"first", bytes(10))
    assert rig.disk.changes == recorded_changes("first")


Asked = tuple[int, list[Param]]


def neutral(command: int, params: list[Param]) -> Asked:
    """An RPC without what the guest chose: descriptors and cookies."""
    shown = []
    for index, param in enumerate(params):
        if command == RpcCommand.FS and index == 0 and param.a not in (FsOperation.OPEN, FsOperation.CREATE):
            param = param._replace(b=0)
        if command == RpcCommand.SHM_FREE:
            param = param._replace(b=0)
        if param.attr in (5, 6, 7):
            param = param._replace(c=0)
        shown.append(param)
    return command, shown


def recorded_calls() -> list[tuple[int, int, list[Asked]]]:
    """Command of the TA, result, and RPCs of each invocation under the mark secure_storage_example."""
    at, calls, under_way = "", [], {}
    with gzip.open(SHARED / "traces/native.jsonl.gz", "rt") as lines:
        for line in lines:
            event = json.loads(line)
            at = event.get("name", at)
            if at != "secure_storage_example" or event["e"] == "mark":
                continue
            memory = {entry["is"]: bytes.fromhex(entry["hex"]) for entry in event.get("memory", ())}
            regs = [int(word, 16) for word in event["regs"]]
            if event["e"] == "call" and "message" in memory and regs[0] != Function.RETURN_FROM_RPC:
                message = Message.unpack(memory["message"])
                if message.cmd == 1:
                    under_way = {"func": message.func, "asked": []}
            elif event["e"] == "return" and regs[0] == RpcReturn.CMD and under_way:
                rpc = Message.unpack(memory["rpc"])
                under_way["asked"].append(neutral(rpc.cmd, list(rpc.params)))
            elif event["e"] == "return" and regs[0] == ReturnCode.OK and "message" in memory and under_way:
                message = Message.unpack(memory["message"])
                if message.cmd == 1:
                    calls.append((under_way["func"], message.ret, under_way["asked"]))
                    under_way = {}
    return calls


def test_rpcs_of_the_example_are_the_recorded_ones() -> None:
    rig = StorageRig(early_tas=frozenset())
    for ta in (HelloWorld, SecureStorage):
        assert rig.send(open_message(ta.uuid)).ret == 0
    session = rig.send(open_message(SecureStorage.uuid)).session
    steps = [
        (1, b"object#1", b"\xa1" * MAX_SIZE),
        (0, b"object#1", MAX_SIZE),
        (2, b"object#1", None),
        (0, b"object#2", MAX_SIZE),
        (1, b"object#2", b"This is data stored in the secure storage.\n\0"),
    ]
    calls = recorded_calls()
    assert [func for func, _, _ in calls] == [func for func, _, _ in steps]
    for (func, ret, asked), (_, name, data) in zip(calls, steps, strict=True):
        params = [rig.memref("id", name, ParamType.TMEM_INPUT)]
        if data is not None:
            params.append(rig.memref("data", data, ParamType.TMEM_OUTPUT if func == 0 else ParamType.TMEM_INPUT))
        rig.served.clear()
        done = rig.send(invoke_message(session, func, *params))
        assert done.ret == ret
        assert [ours(rpc) for rpc in rig.served] == asked, func
        if func == 0 and not ret:
            assert rig.output(MAX_SIZE) == b"\xa1" * MAX_SIZE
    assert calls[3][1] == Result.ITEM_NOT_FOUND


def ours(rpc: Rpc) -> Asked:
    return neutral(rpc.command, rpc.params)
