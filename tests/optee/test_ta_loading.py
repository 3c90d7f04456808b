"""Loading TAs from the normal world: the RPCs of the recordings, and what can go wrong."""

import gzip
import json
from pathlib import Path
from uuid import UUID

import pytest

from optee.abi.message import Message, Param
from optee.abi.results import Origin, Result
from optee.abi.rpc import FsOperation, RpcCommand
from optee.abi.smc import Function, RpcReturn
from optee.config import Config
from optee.ta_image import build_image, write_images
from optee.tas.hello_world import HelloWorld
from optee.trusted_application import TrustedApplication
from tests.optee.rig import Rig, Rpc, invoke_message, open_message, value
from tests.shared import SHARED, needs_shared


class SecureStorage(TrustedApplication):
    """Stands for secure_storage of optee_examples, of which only the loading matters here."""

    uuid = UUID("f4e750bb-1437-4fbf-8785-8d3580c34994")


def make_rig() -> Rig:
    rig = Rig(Config(early_tas=frozenset(), extra_tas=(SecureStorage,)))
    rig.supplicant.images[SecureStorage.uuid] = build_image(SecureStorage)
    return rig


Asked = tuple[int, list[Param]]


def neutral(command: int, params: list[Param]) -> Asked:
    """An RPC without what the guest chose: descriptors and cookies."""
    shown = []
    for index, param in enumerate(params):
        if command == RpcCommand.FS and index == 0 and param.a != FsOperation.OPEN:
            param = param._replace(b=0)
        if command == RpcCommand.SHM_FREE:
            param = param._replace(b=0)
        if param.attr in (5, 6, 7):
            param = param._replace(c=0)
        shown.append(param)
    return command, shown


def recorded(mark: str) -> list[Asked]:
    """The RPC commands of the first OPEN_SESSION of a mark that needs any."""
    at = ""
    asked: list[Asked] = []
    with gzip.open(SHARED / "traces" / "native.jsonl.gz", "rt") as lines:
        for line in lines:
            event = json.loads(line)
            at = event.get("name", at)
            if at != mark or event["e"] != "return":
                continue
            status = int(event["regs"][0], 16)
            memory = {entry["is"]: bytes.fromhex(entry["hex"]) for entry in event.get("memory", ())}
            if status == RpcReturn.CMD:
                rpc = Message.unpack(memory["rpc"])
                asked.append(neutral(rpc.cmd, rpc.params))
            elif status == 0 and asked and Message.unpack(memory.get("message", bytes(32))).session:
                break
    return asked


def load(rig: Rig, uuid: UUID) -> tuple[Message, list[Asked]]:
    asked = []

    def serve(rpc: Rpc) -> None:
        asked.append(neutral(rpc.command, rpc.params))
        rig.supplicant.serve(rpc)

    return rig.run(open_message(uuid), serve=serve), asked


@needs_shared
def test_rpcs_are_those_of_the_recordings() -> None:
    rig = make_rig()
    marks = {"hello_world": HelloWorld, "hello_world_again": HelloWorld, "secure_storage_example": SecureStorage}
    for mark, ta in marks.items():
        opened, asked = load(rig, ta.uuid)
        assert opened.ret == 0
        assert asked == recorded(mark), mark
        assert rig.close(opened.session).ret == 0
    assert not rig.supplicant.buffers
    assert not rig.supplicant.open_files


def test_loaded_ta_works_and_leaves_nothing() -> None:
    rig = make_rig()
    session = rig.open(HelloWorld.uuid, function=Function.CALL_WITH_ARG)
    assert rig.run(invoke_message(session, 0, value(41))).params[0].a == 42
    assert rig.world.shared_objects(1) == ()
    assert not rig.rpc_pages


def test_unknown_ta() -> None:
    rig = make_rig()
    refused, asked = load(rig, UUID(int=1))
    assert (refused.ret, refused.ret_origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)
    assert asked[-2][0] == RpcCommand.LOAD_TA
    assert rig.world.shared_objects(1) == ()


@pytest.mark.parametrize("at", [0, 4, 8, 12, 16, 20, 60, 84, 100, 104, 1000, -1])
def test_damaged_image(at: int) -> None:
    rig = make_rig()
    image = bytearray(rig.supplicant.images[HelloWorld.uuid])
    image[at] ^= 1
    rig.supplicant.images[HelloWorld.uuid] = bytes(image)
    refused, _ = load(rig, HelloWorld.uuid)
    assert (refused.ret, refused.ret_origin) == (Result.SECURITY, Origin.TEE)
    assert not rig.supplicant.buffers


@pytest.mark.parametrize("size", [0, 10, 83, 5000])
def test_short_image(size: int) -> None:
    rig = make_rig()
    rig.supplicant.images[HelloWorld.uuid] = rig.supplicant.images[HelloWorld.uuid][:size]
    refused, _ = load(rig, HelloWorld.uuid)
    assert refused.ret in (Result.SECURITY, Result.OUT_OF_MEMORY)
    assert rig.world.shared_objects(1) == ()


def test_image_of_another_ta() -> None:
    rig = make_rig()
    rig.supplicant.images[HelloWorld.uuid] = rig.supplicant.images[SecureStorage.uuid]
    assert load(rig, HelloWorld.uuid)[0].ret == Result.SECURITY


def test_older_version_is_refused() -> None:
    rig = make_rig()
    old = rig.supplicant.images[SecureStorage.uuid]
    SecureStorage.version = 2
    try:
        rig.supplicant.images[SecureStorage.uuid] = build_image(SecureStorage)
    finally:
        del SecureStorage.version
    assert load(rig, SecureStorage.uuid)[0].ret == 0
    assert load(rig, HelloWorld.uuid)[0].ret == 0
    rig.supplicant.images[SecureStorage.uuid] = old
    assert load(rig, SecureStorage.uuid)[0].ret == Result.ACCESS_CONFLICT


def load_with_failure(failing: int) -> bool:
    """Load with one RPC failing; tells whether there were that many."""
    rig = make_rig()
    count = 0

    def serve(rpc: Rpc) -> None:
        nonlocal count
        count += 1
        if count == failing and rpc.command != RpcCommand.SHM_FREE:
            rig.answer(rpc, Result.GENERIC)
        else:
            rig.supplicant.serve(rpc)

    opened = rig.run(open_message(HelloWorld.uuid), serve=serve)
    assert opened.ret_origin == (Origin.TEE if opened.ret else Origin.TRUSTED_APP)
    assert rig.world.shared_objects(1) == ()
    rig.run(open_message(HelloWorld.uuid))
    assert not rig.supplicant.buffers, failing
    return count >= failing


def test_every_rpc_may_fail() -> None:
    """Whichever RPC of a load fails, the call ends and nothing is left in OP-TEE."""
    assert next(failing for failing in range(1, 1000) if not load_with_failure(failing)) > 72


def test_no_supplicant() -> None:
    rig = make_rig()
    opened = rig.run(open_message(HelloWorld.uuid), serve=lambda rpc: rig.answer(rpc, Result.COMMUNICATION))
    assert (opened.ret, opened.ret_origin) == (Result.OUT_OF_MEMORY, Origin.TEE)


def test_images_on_disk(tmp_path: Path) -> None:
    write_images(tmp_path / "tas", HelloWorld, SecureStorage)
    image = (tmp_path / "tas" / f"{HelloWorld.uuid}.ta").read_bytes()
    assert image == build_image(HelloWorld)
    assert len(image) == 0x1BE00
