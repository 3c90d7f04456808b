"""A failure as a scenario: what `mediator run` plays again, through the same shell as every guest's calls.

Addresses are those of the run; what a guest and OP-TEE say is written by the names of the ABI. Where an answer of
OP-TEE came late, and something else happened before it, the call is a branch of its own in virtual time, one
millisecond for each thing that happened.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any, Final

from hv_models.machine import RAM_BASE
from hv_models.memory import PAGE_SIZE
from mediator.fuzz.journal import Answer, Asked, Called, Changed, Happening, Journal, Wrote
from mediator.fuzz.moves import ENDLESS, LISTS, PAGES
from optee.abi.message import ENTRIES_PER_PAGE, HEADER, HEADER_SIZE, META, NONCONTIG, PARAM, Command, ParamType
from optee.abi.registers import Named, name_of
from optee.abi.results import Result
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, ReturnCode, RpcReturn

Data = dict[str, Any]
_HEADER: Final = ("message", "func", "session", "cancel_id", "pad", "ret", "ret_origin")
_WORDS: Final = {"VALUE": ("a", "b", "c"), "TMEM": ("buf_ptr", "size", "shm_ref"), "RMEM": ("offs", "size", "shm_ref")}
_REGISTERS: Final = tuple(f"a{number}" for number in range(8))
_WHOSE: Final = ("guest", "kill", "create", "kexec", "abandon", "pause", "resume")
"""Keys that name a guest."""
_LIVES: Final = 16
"""Guests for whom OP-TEE has room beside those that are there: it is not told of one that is abandoned."""
_REFUSED: Final = 5
"""What OP-TEE answers in a0 where it refuses to forget a VM."""


@dataclass
class Story:
    """A scenario: steps that are done one after the other, and branches beside them.

    policy: a name, or the YAML of a policy; guests: by name, as the language has them; comment: lines at its head.
    """

    name: str
    purpose: str
    policy: str
    guests: dict[str, Data]
    threads: int
    steps: list[Data] = field(default_factory=list)
    branches: list[list[Data]] = field(default_factory=list)
    comment: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> list[list[Data]]:
        """All steps, as the sequences that they stand in."""
        return [self.steps, *self.branches]

    def text(self) -> str:
        """The scenario's YAML."""
        branches = [steps for steps in self.branches if steps]
        named = {step[key] for steps in self.sequences for step in steps for key in _WHOSE if key in step}
        guests = {name: spec for name, spec in self.guests.items() if name in named}
        vcpus = 1 + max((step.get("vcpu", 0) for steps in branches for step in steps), default=0)
        lines = [
            *(f"# {line}" for line in self.comment),
            f"scenario: {self.name}",
            f"purpose: {self.purpose}",
            "machine:",
            *(["  policy:", indent(self.policy, "    ")] if "\n" in self.policy else [f"  policy: {self.policy}"]),
            f"  each: {_flow({'driver': 'none', 'ram': f'{PAGES} pages', 'vcpus': vcpus})}",
            f"  guests: {_flow(guests or self.guests)}",
            f"  optee: {_flow({'threads': self.threads, 'guests': len(guests) + _LIVES})}",
            "steps:",
        ]
        if branches:
            lines.append("- parallel:")
            for steps in (self.steps, *branches):
                lines += ["  - sequence:", *(f"    - {_flow(step)}" for step in steps)] if steps else []
        else:
            lines += [f"- {_flow(step)}" for step in self.steps]
        return "\n".join(lines) + "\n"

    def tell(self, journal: Journal) -> None:
        """Say what happened."""
        apart = [call for call in _calls(journal) if _waited(call)]
        moments = sorted({moment for call in apart for moment in (call.moment, *(one.moment for one in call.answers))})
        now = 0
        callers = {call.vm for call in _calls(journal)}
        for moment, what in journal.happenings:
            if what.vm not in callers:
                continue
            if isinstance(what, Called) and what in apart:
                call = _smc(what) | {"vcpu": len(self.branches) + 1}
                self.branches.append([_pause(moment), *_secure_world(what, timed=True), call])
                continue
            if any(now < each < moment for each in moments):
                self.steps.append(_pause(moment - now))
                now = moment
            self.steps += _steps(what)
            if isinstance(what, Asked):
                # What ends a guest waits until OP-TEE has answered its calls.
                now = max([now, *(one.moment for one in _until(journal, moment, what.vm, apart))])


def _calls(journal: Journal) -> Iterator[Called]:
    return (what for _, what in journal.happenings if isinstance(what, Called))


def _waited(call: Called) -> bool:
    """Whether something else happened between a call and its last answer."""
    if not call.answers:
        return False
    own = {call.moment, *(one.moment for one in call.answers)}
    return len(own) <= call.answers[-1].moment - call.moment


def _until(journal: Journal, moment: int, vm: str, apart: Sequence[Called]) -> Iterator[Answer]:
    """Answers to calls of a guest that come before the next thing happens."""
    following = min((at for at, _ in journal.happenings if at > moment), default=1 << 62)
    return (one for call in apart if call.vm == vm for one in call.answers if moment < one.moment < following)


def _pause(moments: int) -> Data:
    return {"advance": f"{moments} ms"}


def _steps(what: Happening) -> list[Data]:
    if isinstance(what, Called):
        return [*_secure_world(what, timed=False), _smc(what)]
    if isinstance(what, Wrote):
        return [_write(what)]
    if isinstance(what, Changed):
        return [{"guest": what.vm, "stage2": _Hex(what.ipa), "becomes": what.kind.name.lower()}]
    steps: list[Data] = [{what.what: what.vm}]
    if what.refused:
        steps.insert(0, {"guest": what.vm, "secure_world": [{"to": "VM_DESTROYED", "a0": _REFUSED}]})
    return steps


def _smc(call: Called) -> Data:
    step: Data = {"guest": call.vm, "smc": _name(Function, call.regs[0])}
    return step | {name: _Hex(word) for name, word in zip(_REGISTERS[1:], call.regs[1:], strict=True) if word}


def _secure_world(call: Called, *, timed: bool) -> list[Data]:
    """What OP-TEE answers to a call, as a step before it."""
    answers: list[Data] = []
    before = call.moment
    for answer in call.answers:
        said: Data = {"to": _name(Function, answer.function)}
        if timed and answer.moment > before + 1:
            said["takes"] = f"{answer.moment - before} ms"
        before = answer.moment
        a0 = answer.regs[0]
        said["a0"] = _name(RpcReturn, a0) if a0 >> 16 == 0xFFFF else _name(ReturnCode, a0)
        said |= {name: _Hex(word) for name, word in zip(_REGISTERS[1:], answer.regs[1:], strict=False) if word}
        if answer.regs[3] == 0:
            said["a3"] = 0
        for where, offset, data in answer.writes:
            said[where] = _written(offset, data)
        answers.append(said)
    return [{"guest": call.vm, "secure_world": answers}] if answers else []


def _written(offset: int, data: bytes) -> Data:
    """What OP-TEE writes: the result of a call, or a whole request."""
    if offset:
        ret, origin = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4))
        return {"ret": _name(Result, ret), "ret_origin": origin}
    fields = _message(data, RpcCommand)
    fields["cmd"] = fields.pop("message")
    return fields if "params" in fields else {"num_params": 0} | fields


def _write(what: Wrote) -> Data:
    page, offset = divmod(what.at - RAM_BASE, PAGE_SIZE)
    if page in LISTS or page == ENDLESS:
        words = [int.from_bytes(what.data[at : at + 8], "little") for at in range(0, len(what.data), 8)]
        step: Data = {"guest": what.vm, "list": list(map(_Hex, words[:ENTRIES_PER_PAGE])), "at": _Hex(what.at)}
        return step | ({"next": _Hex(words[-1])} if len(words) > ENTRIES_PER_PAGE else {})
    kind = Command if page < LISTS.start and not offset else RpcCommand
    return {"guest": what.vm, "at": _Hex(what.at)} | _message(what.data, kind)


def _message(data: bytes, commands: type[Named]) -> Data:
    """A message by its fields; those that are 0 are left out."""
    *header, count = HEADER.unpack_from(data)
    fields: Data = {name: _Hex(value) for name, value in zip(_HEADER, header, strict=True) if value}
    fields["message"] = _command(commands, header[0])
    if header[5]:
        fields["ret"] = _name(Result, header[5])
    params = list(PARAM.iter_unpack(data[HEADER_SIZE : HEADER_SIZE + (len(data) - HEADER_SIZE) // 32 * 32]))
    if count != len(params):
        fields["num_params"] = _Hex(count)
    if params:
        fields["params"] = [_param(*param) for param in params]
    return fields


def _command(commands: type[Named], number: int) -> "str | _Hex":
    name = name_of(commands, number)
    if name not in commands.__members__:
        return _Hex(number)
    other = Command if commands is RpcCommand else RpcCommand
    return f"{commands.__name__}.{name}" if name in other.__members__ else name


def _param(attribute: int, *words: int) -> Data:
    kind = attribute & 0xFF
    flags = [name for name, bit in (("META", META), ("NONCONTIG", NONCONTIG)) if attribute & bit]
    known = next((member.name for member in ParamType if member == kind), None)
    if known is None or attribute & ~(0xFF | META | NONCONTIG):
        found: Data = {"attr": _Hex(attribute)}
        names = _WORDS["VALUE"]
    else:
        found = {"attr": " | ".join([known, *flags])}
        names = _WORDS.get(known.split("_")[0], _WORDS["VALUE"])
    return found | {name: _Hex(word) for name, word in zip(names, words, strict=True) if word}


def _name(kind: type[Named], number: int) -> "str | _Hex":
    name = name_of(kind, number)
    return name if name in kind.__members__ else _Hex(number)


class _Hex(int):
    """A number that is written as one of the ABI's or of memory."""

    def __str__(self) -> str:
        return hex(self) if self > 9 else int.__repr__(self)


def _flow(value: object) -> str:
    """A value as it stands in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return str(value)
