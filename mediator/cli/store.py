"""`mediator store`: look into a directory of OP-TEE's secure storage. It never writes."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias

import typer

from mediator.cli.options import Json
from mediator.cli.output import (
    CLOSED_PIPE,
    FAILED,
    GOOD,
    BadInput,
    emit,
    emit_json,
    heading,
    note,
    show,
    table,
    verdict,
)

if TYPE_CHECKING:
    from optee.storage.keys import StorageKeys
    from optee.storage.store_reader import StoredObject, StoreReader

FORMAT: Final = "mediator-store/1"

_EXCERPT: Final = 32  # hexadecimal digits of a long value that a listing for people shows

app = typer.Typer(help="Look into OP-TEE's secure storage (REE FS). Nothing is written.", rich_markup_mode="rich")

Directory: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", help="The directory that tee-supplicant keeps: dirf.db and numbered files.")
]
Huk: TypeAlias = Annotated[
    str, typer.Option("--huk", metavar="HEX", help="Hardware unique key; none: 16 zero bytes, as OP-TEE without one.")
]
ChipId: TypeAlias = Annotated[
    str, typer.Option("--chip-id", metavar="HEX", help='Chip id of 32 bytes; none: "BEEF" 8 times, as OP-TEE.')
]
Guest: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--guest",
        metavar="ID",
        min=1,
        max=65535,
        help="Client id of the guest, if its keys are its own (not OP-TEE's).",
    ),
]


@app.callback()
def _store() -> None:
    pass


@app.command("ls")
def list_objects(
    directory: Directory, huk: Huk = "", chip_id: ChipId = "", guest: Guest = None, json: Json = False
) -> int:
    """List the objects: owner, id, size, type, file, counter, and whether they are whole."""
    from optee.storage.attributes import type_name
    from optee.storage.describe import describe_store

    store = _open(directory, huk, chip_id, guest)
    document = describe_store(store)
    _complain(store)
    if json:
        emit_json({"format": FORMAT, **document})
        return verdict(not store.damages)
    rows = []
    for each in document["objects"]:
        kind = type_name(each["objectType"]) if "objectType" in each else "core" if each["raw"] else ""
        numbers = (str(each.get("size", "")), kind, each["file"], str(each.get("head_counter", "")))
        rows.append((each["ta"], each["id"], *numbers, each["status"]))
    columns = ("TA", "id", "bytes", "type", "file", "counter", "status")
    show(table(*columns, right=("bytes", "file", "counter"), rows=rows))
    return verdict(not store.damages)


@app.command("cat")
def print_data(
    directory: Directory,
    object_id: Annotated[str, typer.Argument(metavar="ID", help="The object's id: text, or hex: and digits.")],
    ta: Annotated[str, typer.Option("--ta", metavar="UUID", help="The TA that owns the object.")],
    huk: Huk = "",
    chip_id: ChipId = "",
    guest: Guest = None,
    json: Json = False,
) -> int:
    """Print the data of one object, byte for byte."""
    from optee.storage.damage import DamagedError
    from optee.storage.describe import describe_object

    store = _open(directory, huk, chip_id, guest)
    stored = _find(store, ta, object_id)
    if stored is None:
        note(f"error: {store.opened.damages[0]}")
        return FAILED
    try:
        data = stored.data
    except DamagedError as error:
        note(f"error: {error}")
        return FAILED
    if json:
        emit_json({"format": FORMAT, **describe_object(stored), "data": data.hex()})
        return GOOD
    return _emit_bytes(data)


@app.command()
def check(
    directory: Directory,
    huk: Huk = "",
    chip_id: ChipId = "",
    guest: Guest = None,
    rpmb: Annotated[
        Path | None,
        typer.Option("--rpmb", metavar="FILE", help="The blocks of the RPMB device that holds the anchor."),
    ] = None,
    json: Json = False,
) -> int:
    """Verify every hash and tag of the live state, and say what is damaged, left over and free."""
    from optee.storage.describe import describe_store

    store = _open(directory, huk, chip_id, guest, rpmb)
    document = describe_store(store)
    good = not store.damages
    if json:
        corrupt = [each["id"] for each in document["objects"] if each["status"] != "ok"]
        counts = {"objects": len(document["objects"]), "corrupt": corrupt}
        rest = {key: document[key] for key in ("damages", "orphans", "free_entries", "dirf", "half_made", "notes")}
        emit_json({"format": FORMAT, "good": good, **counts, **rest})
        return verdict(good)
    for line in _damage_lines(store):
        emit(f"damaged: {line}")
    for line in document["notes"]:
        emit(f"note: {line}")
    summary = f"{len(store.objects)} objects"
    emit(f"good: {summary}" if good else f"{summary}, {len(store.damages)} damages")
    return verdict(good)


@app.command()
def dump(directory: Directory, huk: Huk = "", chip_id: ChipId = "", guest: Guest = None, json: Json = False) -> int:
    """Print the structures: heads, nodes and blocks of each file with their places, entries, headers."""
    from optee.storage.describe import dump_store

    store = _open(directory, huk, chip_id, guest)
    document = dump_store(store)
    _complain(store)
    if json:
        emit_json({"format": FORMAT, **document})
    else:
        _show_dump(document)
    return verdict(not store.damages)


def _open(directory: Path, huk: str, chip_id: str, guest: int | None, rpmb: Path | None = None) -> "StoreReader":
    """The store with these keys, read. Raises BadInput."""
    from optee.storage.keys import CHIP_ID_SIZE, DEFAULT_CHIP_ID, DEFAULT_HUK, StorageKeys
    from optee.storage.store_reader import NotAStoreError, StoreReader

    key, chip = _hex("--huk", huk) or DEFAULT_HUK, _hex("--chip-id", chip_id) or DEFAULT_CHIP_ID
    if len(chip) != CHIP_ID_SIZE:
        raise BadInput(f"store: --chip-id has {CHIP_ID_SIZE} bytes, not {len(chip)}")
    keys = StorageKeys(key, chip, guest)
    try:
        store = StoreReader(directory, keys, None if rpmb is None else _anchor(rpmb, keys))
        # Files are read here, so that one that cannot be read is told before anything is printed.
        _ = store.damages
    except NotAStoreError as error:
        raise BadInput(str(error)) from None
    return store


def _anchor(file: Path, keys: "StorageKeys") -> bytes:
    """What the blocks of an RPMB device have as anchor. Raises BadInput, DocumentError."""
    from mediator.documents import read_bytes
    from optee.storage.rpmb_reader import NotAnImageError, read_anchor

    try:
        anchor = read_anchor(read_bytes(file), keys)
    except NotAnImageError as error:
        raise BadInput(f"{file}: not the blocks of an RPMB device: {error}") from None
    if anchor is None:
        raise BadInput(f"{file}: this RPMB device holds no anchor")
    return anchor


def _hex(option: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        raise BadInput(f"store: {option} wants whole bytes, two hexadecimal digits each") from None


def _find(store: "StoreReader", ta: str, object_id: str) -> "StoredObject | None":
    """The object; None where the directory is too damaged to say whether there is one. Raises BadInput."""
    from uuid import UUID

    from optee.storage.describe import parse_id

    try:
        owner = UUID(ta)
    except ValueError:
        raise BadInput(f"store cat: --ta {ta!r} is no UUID") from None
    try:
        wanted = parse_id(object_id)
    except ValueError as error:
        raise BadInput(f"store cat: {object_id!r} is no object id: {error}") from None
    stored = store.find(owner.bytes_le, wanted)
    if stored is None and not store.opened.damages:
        raise BadInput(f"store cat: TA {owner} has no object {object_id!r} here")
    return stored


def _damage_lines(store: "StoreReader") -> list[str]:
    """Each damage, and whose object it is."""
    from optee.storage.describe import id_text

    lines = [str(damage) for damage in store.opened.damages]
    for stored in store.objects:
        owner = f" (object {id_text(stored.entry.object_id)} of {stored.entry.uuid})"
        lines += [f"{damage}{owner}" for damage in stored.damages]
    return lines


def _complain(store: "StoreReader") -> None:
    for line in _damage_lines(store):
        note(f"damaged: {line}")


def _emit_bytes(data: bytes) -> int:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        raise BadInput(f"standard output: {error.strerror}") from None
    return GOOD


def _show_dump(document: dict[str, Any]) -> None:
    for file in document["files"]:
        meta = file["meta"]
        content = f", {meta['length']} bytes of content, max_node_id {meta['max_node_id']}" if meta else ""
        show(heading(f"{file['file']}: {file['bytes']} bytes{content}"))
        heads = [_row(head, "slot", "offset", "counter", "iv", "tag", "enc_fek", "live") for head in file["heads"]]
        show(table("head slot", "at", "counter", "iv", "tag", "enc_fek", "live", rows=heads))
        nodes = [_row(node, "id", "version", "offset", "flags", "hash", "iv", "tag") for node in file["nodes"]]
        if nodes:
            show(table("node", "version", "at", "flags", "hash", "iv", "tag", rows=nodes))
        blocks = [_row(block, "block", "version", "offset") for block in file["blocks"]]
        if blocks:
            show(table("block", "version", "at", rows=blocks))
    show(heading("objects"))
    for each in document["objects"]:
        lists = ("damages", "attributes")
        emit(" ".join(f"{key}={_short(value)}" for key, value in each.items() if key not in lists))
        for attribute in each["attributes"]:
            emit(f"    {attribute['name']}: {attribute['hex']}")
    for line in document["notes"]:
        emit(f"note: {line}")


def _row(values: dict[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(_short(values[key]) for key in keys)


def _short(value: object) -> str:
    text = {True: "yes", False: ""}[value] if isinstance(value, bool) else str(value)
    return text if len(text) <= 2 * _EXCERPT else text[:_EXCERPT] + "..."
