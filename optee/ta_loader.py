"""Loading a TA: pseudo TAs and early TAs from OP-TEE's image, all others from the normal world.

Source: OP-TEE core behaviour, section 7: stores in order are the image, secure storage, and the REE file
system by LOAD_TA; a store that fails with anything but "not found" ends the search.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.errors import TeeError
from optee.rpc import (
    RMEM_OUTPUT,
    TMEM_OUTPUT,
    VALUE_INPUT,
    RpcParam,
    allocate_payload,
    free_payload,
    rpc_command,
)
from optee.shared_memory import SharedMemory
from optee.steps import WORK, Steps
from optee.ta_image import verify_image
from optee.threads import Thread
from optee.trusted_application import TrustedApplication

_LOAD_TA: Final = int(RpcCommand.LOAD_TA)
_GO_ON: Final = (Result.ITEM_NOT_FOUND, Result.STORAGE_NOT_AVAILABLE)


def load_ta(thread: Thread, uuid: UUID) -> Steps[type[TrustedApplication]]:
    """Find and load the TA with that UUID. Raises TeeError."""
    world = thread.partition.world
    ta = world.tas.get(uuid)
    if ta is not None and (ta.is_pseudo or world.config.is_early(uuid)):
        return ta
    database = thread.partition.storage.ta_database
    try:
        yield from database.look_for_ta(thread)
    except TeeError as error:
        if error.result not in _GO_ON:
            raise
    image, size = yield from _request_image(thread, uuid)
    try:
        version = verify_image(image.load(0, size), uuid)
        yield WORK
        if ta is None:  # well signed, but no code that the model could run
            raise TeeError(Result.BAD_FORMAT)
        yield from database.check_version(thread, uuid, version)
    except TeeError:
        yield from free_payload(thread, image)
        raise
    yield from free_payload(thread, image)
    return ta


def _request_image(thread: Thread, uuid: UUID) -> Steps[tuple[SharedMemory, int]]:
    """LOAD_TA twice: for the size in bytes, then into a buffer of that size."""
    octets = uuid.bytes
    name: RpcParam = (
        VALUE_INPUT,
        int.from_bytes(octets[:8], "little"),
        int.from_bytes(octets[8:], "little"),
        0,
    )
    reply = yield from rpc_command(thread, _LOAD_TA, (name, (TMEM_OUTPUT, 0, 0, 0)))
    if reply.ret:
        raise TeeError(reply.ret)
    size = reply.params[1][2]
    image = yield from allocate_payload(thread, size)
    reply = yield from rpc_command(thread, _LOAD_TA, (name, (RMEM_OUTPUT, 0, size, image.cookie)))
    if reply.ret:
        yield from free_payload(thread, image)
        raise TeeError(reply.ret)
    return image, size
