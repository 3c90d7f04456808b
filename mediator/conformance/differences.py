"""What of a step is not as recorded, field by field."""

from collections.abc import Iterator
from typing import Any, Final

from mediator.conformance import vectors as v
from mediator.conformance.intended import Difference
from mediator.conformance.run import Observed
from optee.abi.message import OFFSET_RET

_COMPARED_STATE: Final = ("call_count", "quota_pages", "quota_bufs", "rpc_bufs")


def differences(recorded: v.Step, ours: Observed) -> Iterator[Difference]:
    """What of a step is not as recorded, as far as it is compared; a relinquish is compared with its whole run."""
    done = ours.step
    if isinstance(recorded, v.Probe) and isinstance(done, v.Probe):
        yield from _field("result", recorded.out.result, done.out.result)
        yield from _forwards(recorded.out.forwarded, done.out.forwarded, None)
    elif isinstance(recorded, v.Create) and isinstance(done, v.Create):
        yield from _field("rc", recorded.out.rc, done.out.rc)
        yield from _forwards(recorded.out.forwarded, done.out.forwarded, None)
    elif isinstance(recorded, v.Smc) and isinstance(done, v.Smc):
        theirs, mine = recorded.out, done.out
        yield from _field("handled", theirs.handled, mine.handled)
        if theirs.handled == mine.handled:
            yield from _field("regs", hexes(theirs.regs), hexes(mine.regs))
        yield from _forwards(theirs.forwarded, mine.forwarded, recorded.domain)
        if ours.memory is not None:
            yield Difference("mem_changes", *ours.memory)
        yield from _pins("pins", theirs.pins, mine.pins, recorded.domain)
        for name in _COMPARED_STATE:
            yield from _field(f"state.{name}", getattr(theirs.state, name), getattr(mine.state, name))
        yield from _field("state.shm_bufs", _buffers(theirs.state), _buffers(mine.state))


def _field(name: str, expected: Any, got: Any) -> Iterator[Difference]:
    if expected != got:
        yield Difference(name, expected, got)


def hexes(regs: list[int]) -> list[str]:
    """Registers as they are reported."""
    return [hex(word) for word in regs]


def _buffers(state: v.State) -> list[tuple[str, int, bool]]:
    return sorted((hex(buffer.cookie), buffer.pages, buffer.has_page_list) for buffer in state.shm_bufs)


def _pins(
    name: str, expected: dict[str, dict[str, int]], got: dict[str, dict[str, int]], domain: int
) -> Iterator[Difference]:
    """Pins of the calling domain, by guest frame."""
    yield from _field(name, gfns(expected, domain), gfns(got, domain))


def gfns(pins: dict[str, dict[str, int]], domain: int) -> dict[str, int]:
    """One domain's pins, the frames written in one way."""
    return {hex(int(gfn, 16)): count for gfn, count in pins.get(str(domain), {}).items()}


def _forwards(expected: list[v.Forwarded], got: list[v.Forwarded], domain: int | None) -> Iterator[Difference]:
    if len(expected) != len(got):
        yield Difference("forwarded", len(expected), len(got))
    for index, (theirs, mine) in enumerate(zip(expected, got, strict=False)):
        name = f"forwarded[{index}]"
        symbolic = "a1:a2" in theirs.sym
        yield from _field(f"{name}.sym", theirs.sym, mine.sym)
        hidden = slice(1, 3) if symbolic else slice(0, 0)
        words, own = hexes(theirs.regs), hexes(mine.regs)
        words[hidden] = own[hidden] = []
        yield from _field(f"{name}.regs", words, own)
        yield from _field(f"{name}.resumes", theirs.resumes, mine.resumes)
        if theirs.arg is not None:
            yield from _shadow(f"{name}.arg", theirs.arg, mine.arg, preset=True)
        if theirs.rpc_arg is not None:
            yield from _shadow(f"{name}.rpc_arg", theirs.rpc_arg, mine.rpc_arg, preset=False)
        if domain is not None and theirs.pins_during is not None:
            yield from _pins(f"{name}.pins_during", theirs.pins_during, mine.pins_during or {}, domain)


def _shadow(name: str, expected: v.Shadow, got: v.Shadow | None, *, preset: bool) -> Iterator[Difference]:
    if got is None:
        yield Difference(name, "a message", None)
        return
    yield from _field(f"{name}.owner", expected.owner, got.owner)
    theirs, mine = bytearray(expected.hex), bytearray(got.hex)
    if preset:
        # R11 presets ret before the first forward of a call.
        theirs[OFFSET_RET : OFFSET_RET + 4] = mine[OFFSET_RET : OFFSET_RET + 4] = bytes(4)
    yield from _field(f"{name}.hex", theirs.hex(), mine.hex())
    for index in sorted(expected.translated.keys() | got.translated.keys()):
        lists = [
            None
            if shadow.translated.get(index) is None
            else (
                shadow.translated[index].offset,
                [(owner, hex(gfn)) for owner, gfn in shadow.translated[index].pages],
            )
            for shadow in (expected, got)
        ]
        yield from _field(f"{name}.translated.{index}", *lists)
