"""Differences that a rule demands, declared by kind in `intended.yaml`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator

from hv_models.memory import PAGE_SIZE
from mediator.conformance.facts import TMEM, Facts, behind_a_list, outputs, within
from mediator.documents import load_document
from optee.abi.message import MAX_PARAMS, NONCONTIG, OFFSET_RET, TYPE_MASK, Command, page_count
from optee.abi.smc import Function, is_rpc

_LOW: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Difference:
    """One field of one step that is not as recorded."""

    field: str
    expected: Any
    got: Any


def register_refused_in_a0(facts: Facts, difference: Difference) -> bool:
    """OP-TEE ended a REGISTER_SHM with an error in a0."""
    return facts.command == Command.REGISTER_SHM and bool(facts.final_answer)


def refused_in_a0(facts: Facts, difference: Difference) -> bool:
    """OP-TEE ended a call with an error in a0, having written to the message: the guest's message is left alone."""
    return bool(facts.final_answer) and _as_left(facts, outputs(facts.left))


def unregister_refused_in_a0(facts: Facts, difference: Difference) -> bool:
    """OP-TEE ended an UNREGISTER_SHM with an error in a0."""
    return facts.command == Command.UNREGISTER_SHM and bool(facts.final_answer)


def result_left(facts: Facts, difference: Difference) -> bool:
    """OP-TEE ended a call well without writing `ret`: the guest finds the preset, not its own word."""
    return facts.result_left and _as_left(facts, [(OFFSET_RET, OFFSET_RET + 4)])


def registration_result_left(facts: Facts, difference: Difference) -> bool:
    """The same for a call whose result decides what becomes of a buffer."""
    return facts.result_left and facts.command in (Command.REGISTER_SHM, Command.UNREGISTER_SHM)


def shm_alloc_refused(facts: Facts, difference: Difference) -> bool:
    """The mediator asked the guest to free what it offered for SHM_ALLOC."""
    return facts.asked_free


def list_refused(facts: Facts, difference: Difference) -> bool:
    """A message with a page list was rejected by the mediator."""
    return facts.refused_list and bool(difference.expected > difference.got)


def second_list_refused(facts: Facts, difference: Difference) -> bool:
    """The same for a message with another reference after a list, which may have been translated."""
    return facts.refused_list and behind_a_list(facts)


def malformed_registration(facts: Facts, difference: Difference) -> bool:
    """A REGISTER_SHM or UNREGISTER_SHM that has not the one parameter that it needs."""
    told = difference.field == "regs" and not is_rpc(int(difference.expected[0], 16) & _LOW)
    if told and difference.expected[1:] != difference.got[1:]:
        return False  # whatever it is answered, the guest keeps its own words
    if facts.command == Command.UNREGISTER_SHM:
        return facts.num_params != 1
    if facts.command != Command.REGISTER_SHM:
        return False
    if facts.num_params != 1:
        return True
    attribute = facts.attributes[0]
    return (
        attribute & TYPE_MASK not in TMEM
        or attribute & ~TYPE_MASK != NONCONTIG
        or facts.pointers[0] == 0
        or facts.cookies[0] == 0
    )


def reply_does_not_fit(facts: Facts, difference: Difference) -> bool:
    """An RPC reply changes more of the request that OP-TEE made than normal world may."""
    return facts.reply_strays


def shm_alloc_reply_does_not_fit(facts: Facts, difference: Difference) -> bool:
    """The same where it decides whether there is a buffer: OP-TEE is told, or the guest is asked to free it."""
    return facts.reply_strays and facts.answers_shm_alloc


def reply_unreadable(facts: Facts, difference: Difference) -> bool:
    """An RPC reply cannot be read any more."""
    return facts.unreadable_reply


def reply_changed_between(facts: Facts, difference: Difference) -> bool:
    """An RPC reply changed before the recorded mediator looked at it again."""
    return facts.changed_between


def buffer_of_another_call(facts: Facts, difference: Difference) -> bool:
    """An UNREGISTER_SHM or SHM_FREE names a buffer that a live call made for itself."""
    return facts.names_another_calls_buffer


def null_names_buffer(facts: Facts, difference: Difference) -> bool:
    """A call ended that named a live buffer in a temporary reference without a buffer of its own."""
    return facts.null_names_buffer


def message_rewritten(facts: Facts, difference: Difference) -> bool:
    """OP-TEE changed types, cookies or the command in a message that it was given."""
    return facts.rewritten


def rewritten_written_back(facts: Facts, difference: Difference) -> bool:
    """The same, and the guest was given other fields than it asked for, that mediator's addresses too, or not all."""
    if not facts.rewritten or not _in_one_page(facts):
        return False
    given = outputs(facts.left)
    recorded = ((first % PAGE_SIZE + at, byte) for first, run in facts.differing for at, byte in enumerate(run))
    return all(
        within(at, facts.addresses)
        or byte == facts.left[at]
        or (byte in facts.sent[at : at + 1] and not within(at, given))
        for at, byte in recorded
    )


def unaligned_entry(facts: Facts, difference: Difference) -> bool:
    """A page list names an address that is not aligned."""
    return facts.unaligned


def null_page(facts: Facts, difference: Difference) -> bool:
    """The page at IPA 0 is offered."""
    return facts.null_page


def odd_size(facts: Facts, difference: Difference) -> bool:
    """A buffer of no pages, or of more than 32 bits can count."""
    counts = (
        page_count(size, pointer & 0xFFF)
        for attribute, pointer, size in zip(facts.attributes, facts.pointers, facts.sizes, strict=True)
        if attribute & TYPE_MASK in TMEM and attribute & NONCONTIG and pointer
    )
    return any(count == 0 or count > _LOW for count in counts)


def too_many_parameters(facts: Facts, difference: Difference) -> bool:
    """More parameters than fit a page: the guest is answered OK in a0, and not its own function id."""
    return facts.num_params > MAX_PARAMS and bool(difference.expected[1:] == difference.got[1:])


def rejected_written_back(facts: Facts, difference: Difference) -> bool:
    """A message was rejected, and changed while the mediator looked at it: the record has the copy in its outputs."""
    kept = [each for each in outputs(facts.left) if each[0] != OFFSET_RET]
    return facts.rejected and facts.flipping and _as_left(facts, kept)


def not_written_back(facts: Facts, difference: Difference) -> bool:
    """The guest's message cannot be written any more: it is told EBADADDR in a0."""
    return facts.not_written_back and bool(difference.expected[1:] == difference.got[1:])


def other_cookie(facts: Facts, difference: Difference) -> bool:
    """An RPC command is resumed with another cookie than the saved one."""
    return facts.other_cookie


def wide_words(facts: Facts, difference: Difference) -> bool:
    """The words of a resume have more than 32 bits, of which the lower ones count."""
    if max(facts.words[1:6], default=0) <= _LOW:
        return False
    theirs, mine = ([int(word, 16) & _LOW for word in words] for words in (difference.expected, difference.got))
    return theirs == mine


def not_delivered(facts: Facts, difference: Difference) -> bool:
    """An RPC cannot be delivered to the guest."""
    return facts.not_delivered


def dying(facts: Facts, difference: Difference) -> bool:
    """A domain calls whose teardown has begun."""
    return facts.dying


def isolated(facts: Facts, difference: Difference) -> bool:
    """OP-TEE broke its contract with this guest, now or before."""
    return facts.isolated


def _in_one_page(facts: Facts) -> bool:
    return len({first // PAGE_SIZE for first, _ in facts.differing}) == 1


def _as_left(facts: Facts, ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether guest memory differs in these ranges of one message only, where the record has what OP-TEE left."""
    return _in_one_page(facts) and all(
        within(first % PAGE_SIZE + index, ranges) and facts.left[first % PAGE_SIZE + index] == byte
        for first, recorded in facts.differing
        for index, byte in enumerate(recorded)
    )


CONDITIONS: Final[dict[str, Callable[[Facts, Difference], bool]]] = {
    condition.__name__: condition
    for condition in (
        register_refused_in_a0,
        unregister_refused_in_a0,
        refused_in_a0,
        result_left,
        registration_result_left,
        shm_alloc_refused,
        list_refused,
        second_list_refused,
        malformed_registration,
        reply_does_not_fit,
        shm_alloc_reply_does_not_fit,
        reply_unreadable,
        reply_changed_between,
        buffer_of_another_call,
        null_names_buffer,
        message_rewritten,
        rewritten_written_back,
        unaligned_entry,
        null_page,
        odd_size,
        too_many_parameters,
        rejected_written_back,
        not_written_back,
        other_cookie,
        wide_words,
        not_delivered,
        dying,
        isolated,
    )
}


class Declaration(BaseModel):
    """One kind of difference."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rule: Annotated[str, Field(pattern=r"^R([1-9]|[12][0-9])$")]
    step: Literal["probe", "create", "smc", "relinquish"]
    functions: list[str]
    fields: Annotated[list[str], Field(min_length=1)]
    condition: str
    holds: Literal["nothing", "leftovers", "another story"]
    why: str

    @field_validator("functions")
    @classmethod
    def _known_functions(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in Function.__members__:
                raise ValueError(f"{name} is no function")
        return names

    @field_validator("condition")
    @classmethod
    def _known_condition(cls, name: str) -> str:
        if name not in CONDITIONS:
            raise ValueError(f"{name} is none of {', '.join(CONDITIONS)}")
        return name

    def covers(self, op: str, facts: Facts, difference: Difference) -> bool:
        """Whether this kind explains a difference in a step with these facts."""
        if op != self.step or (
            op == "smc" and self.functions and facts.function not in {Function[name] for name in self.functions}
        ):
            return False
        name = difference.field
        if name == "regs" and difference.expected[4:] != difference.got[4:]:
            return False  # no answer changes a4 to a7
        nested = name.split(".")[1:] if name.startswith("forwarded[") else []
        inner = [f"forwarded.{part}" for part in nested]
        if name not in self.fields and not any(part in self.fields for part in (*nested[:1], *inner)):
            return False
        return CONDITIONS[self.condition](facts, difference)


class _Declarations(RootModel[list[Declaration]]):
    pass


def declarations() -> list[Declaration]:
    """All declared kinds."""
    text = resources.files(__package__).joinpath("intended.yaml").read_text(encoding="utf-8")
    return load_document(_Declarations, text, "intended.yaml").root
