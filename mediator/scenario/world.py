"""Steps of the world around a guest: its VM, its stage-2 tables, its quotas, time, interrupts, the secure world."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

import trio
from pydantic import AfterValidator, Field

from hv_models.kvm import KvmVm
from hv_models.memory import PhysicalFault
from hv_models.stage2 import PageKind
from mediator.core.ledger import OverLimit
from mediator.core.steps import Regs
from mediator.documents import Path, Problems
from mediator.policies import MAX_PAGES, check_quota
from mediator.scenario.driver import ParamSpec, write_ram
from mediator.scenario.expressions import (
    EvaluationError,
    Expression,
    FunctionId,
    MessageCommand,
    Number,
    OriginCode,
    ResultCode,
    Seconds,
    Status,
    where_constant,
)
from mediator.scenario.guest import PowerCut
from mediator.scenario.memory import PageAddress, guest_page, page_addresses, whole_page
from mediator.scenario.secure_side import Conversation
from mediator.scenario.steps import Name, Octets, Step, StepFailed, Strict, octets
from optee.abi.message import HEADER_SIZE, OFFSET_NUM_PARAMS, OFFSET_RET, OFFSET_SESSION, PARAM, PARAM_SIZE
from optee.abi.smc import Function, ReturnCode, from_pair, to_pair

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor

_LOW: Final = 0xFFFFFFFF
LimitName = Literal["pages", "reserved_pages", "buffers", "pages_per_buffer", "rpc_arguments", "calls", "memory_kib"]
"""What `mediator ctl quota` and policy files call it."""
QuotaName = LimitName | Literal["pool_pages"]


class OnGuest(Step):
    """A step that names the guest it is about."""

    needs_guest: ClassVar[bool] = False

    def target(self, actor: Actor) -> Actor:
        """The guest that the step's own key names."""
        name = getattr(self, self.verb)
        assert isinstance(name, str)
        return actor.of(name)


class Create(OnGuest):
    """Create a guest's VM and boot it. `refused: true` expects that OP-TEE has no room for it."""

    verb = "create"
    create: Name
    refused: bool = False

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        from mediator.board import BoardError

        guest = self.target(actor).guest
        try:
            await guest.create()
        except BoardError as error:
            if self.refused:
                return
            raise StepFailed(f"create {guest.name}", "a VM", str(error)) from None
        if self.refused:
            raise StepFailed(f"create {guest.name}", "refused", "created")
        await guest.boot(actor.run.nursery)


class Kill(OnGuest):
    """Cut a guest's power: at once, or at its nth SMC from now, before it is mediated or before it is answered."""

    verb = "kill"
    kill: Name
    at_call: Number | None = None
    at_return: Number | None = None

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = self.target(actor).guest
        calls = self.at_call if self.at_call is not None else self.at_return
        if calls is not None:
            guest.cut = PowerCut(actor.number(calls), answered=self.at_call is None)
        elif guest.alive:
            # Not by this task: it may be a step of that guest, which ends with it.
            actor.run.nursery.start_soon(guest.kill)
            await guest.destroyed.wait()


class Destroy(OnGuest):
    """End a guest in order: memory released, sessions closed, driver unloaded, VM destroyed."""

    verb = "destroy"
    destroy: Name

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        await self.target(actor).guest.shut_down()


class Abandon(OnGuest):
    """Release what a guest holds whom OP-TEE did not let go of when it was ended: the host knows better."""

    verb = "abandon"
    abandon: Name

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        if not await self.target(actor).guest.abandon():
            raise StepFailed("abandon", "a guest in quarantine", "one that is not")


class Kexec(OnGuest):
    """A new kernel starts in the same VM without a word to OP-TEE, and the hypervisor resets the VM."""

    verb = "kexec"
    kexec: Name

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        await self.target(actor).guest.kexec(actor.run.nursery)


class Pause(OnGuest):
    """Let a guest's calls wait until `resume`."""

    verb = "pause"
    pause: Name

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        if not actor.run.board.service.pause(self.target(actor).guest.vm):
            raise StepFailed("pause", "a live guest", "one that is not")


class Resume(OnGuest):
    """End a pause."""

    verb = "resume"
    resume: Name

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        if not actor.run.board.service.resume(self.target(actor).guest.vm):
            raise StepFailed("resume", "a paused guest", "one that is not")


def _constant_limits(quotas: dict[QuotaName, Number]) -> dict[QuotaName, Number]:
    constants = {name: value.constant for name, value in quotas.items() if value.constant is not None}
    pool = constants.pop("pool_pages", None)
    found: list[tuple[Path, str]] = []
    if pool is not None and not 1 <= pool <= MAX_PAGES:
        found.append((("pool_pages",), f"1 to {MAX_PAGES} are possible"))
    try:
        check_quota(constants)
    except Problems as problems:
        found += problems.found
    if found:
        raise Problems(found)
    return quotas


class Quota(Step):
    """Change what the guest may hold, from now on; what it holds it keeps. `pool_pages` is the host's pool.

    refused: the change cannot be, since the pool could not hold what is reserved.
    """

    verb = "quota"
    quota: Annotated[dict[QuotaName, Number], AfterValidator(_constant_limits)]
    refused: bool = False

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        try:
            actor.run.set_limits(actor.guest, {name: actor.number(value) for name, value in self.quota.items()})
        except OverLimit as over:
            if not self.refused:
                raise StepFailed("quota", "changed", f"refused: {over}") from None
        else:
            if self.refused:
                raise StepFailed("quota", "refused", "changed")


class Stage2(Step):
    """Change stage-2 entries of the guest: the type of pages, or what they map.

    becomes: the type; `none` unmaps. page: map that page of its RAM instead. from: map the frame that another guest
    has at `from_at`.
    """

    verb = "stage2"
    stage2: Annotated[PageAddress, where_constant(guest_page)]
    pages: Number | None = None
    becomes: Literal["none", "ram_rw", "ram_ro", "mmio", "grant_rw", "grant_ro", "foreign_rw"] = "ram_rw"
    page: Number | None = None
    source: Annotated[Name | None, Field(alias="from")] = None
    from_at: PageAddress | None = None

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        vm, kind = actor.guest.vm, PageKind[self.becomes.upper()]
        addresses = page_addresses(actor, self.stage2, self.pages)
        for ipa in (*addresses[:1], *addresses[-1:]):
            whole_page(guest_page(ipa))
        for number, ipa in enumerate(addresses):
            if self.source is not None:
                other = actor.of(self.source)
                at = 0 if self.from_at is None else whole_page(other.number(self.from_at))
                vm.map_frames_of(other.guest.vm, at + number * 4096, ipa, 1, kind)
            elif self.page is not None:
                vm.set_kind(ipa, kind, page=actor.size(self.page) + number)
            else:
                vm.set_kind(ipa, kind)


class Advance(Step):
    """Let virtual time pass."""

    verb = "advance"
    needs_guest: ClassVar[bool] = False
    advance: Seconds

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        await trio.sleep(self.advance)


class Interrupt(Step):
    """Make a virtual interrupt pending for the guest."""

    verb = "interrupt"
    interrupt: Number

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        actor.guest.vm.inject(actor.small(self.interrupt))


class Notify(Step):
    """OP-TEE sends the guest an asynchronous notification; 0 asks for a bottom half."""

    verb = "notify"
    notify: Number

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        try:
            actor.run.model.notify(actor.guest.client, actor.small(self.notify))
        except ValueError as error:
            raise EvaluationError(str(error)) from None


class DirtyLogging(Step):
    """Start or stop the dirty log of a KVM guest."""

    verb = "dirty_logging"
    dirty_logging: Literal["start", "stop"]

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        vm = actor.guest.vm
        if not isinstance(vm, KvmVm):
            raise EvaluationError(f"{actor.guest.name} is no KVM guest: there is no dirty log")
        if self.dirty_logging == "start":
            vm.start_dirty_logging()
        else:
            vm.stop_dirty_logging()


class Fail(Step):
    """Make an allocation of the mediator fail, the nth one of its kind from now on, whoever it is for.

    Or its nth access to the memory of the guest, as if that had just taken the page away.

    mediator_page: a page for a shadow or a page list. record: the record of a call, a buffer or an RPC argument.
    guest_memory: to read or write it, or to translate and pin.
    """

    verb = "fail"
    needs_guest: ClassVar[bool] = False
    fail: Literal["mediator_page", "record", "guest_memory"]
    nth: Number | None = None

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        if self.fail == "guest_memory":
            memory = actor.guest.memory
            assert memory is not None
            countdown = memory.accesses
        else:
            world = actor.run.host
            countdown = world.pages if self.fail == "mediator_page" else world.records
        countdown.left = 0 if self.nth is None else actor.number(self.nth) - 1


class Flip(Step):
    """The guest changes its memory just before the mediator's nth look at that page: to read it, or to pin it."""

    verb = "flip"
    flip: Number
    offset: Number | None = None
    content: Octets
    at_look: Number = Expression(1, {})

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = actor.guest
        at = actor.number(self.flip) + (0 if self.offset is None else actor.number(self.offset))
        data = octets(self.content, actor)
        assert guest.memory is not None
        guest.memory.flip(at, actor.number(self.at_look), lambda: write_ram(actor, at, data))


class ScriptedMessage(Strict):
    """What OP-TEE writes into a message or an RPC argument."""

    cmd: MessageCommand | None = None
    func: Number | None = None
    session: Number | None = None
    ret: ResultCode | None = None
    ret_origin: OriginCode | None = None
    params: list[ParamSpec | None] | None = None
    num_params: Number | None = None
    """What the header says, if not the number of `params`."""
    offset: Number | None = None
    content: Octets | None = None
    """Plain bytes at `offset`, written last."""

    def write(self, actor: Actor, pa: int) -> None:
        """Write those fields that are given."""
        world = actor.run.world
        fields = ((0, self.cmd), (4, self.func), (OFFSET_SESSION, self.session), (OFFSET_RET, self.ret))
        for offset, field in (*fields, (OFFSET_RET + 4, self.ret_origin)):
            if field is not None:
                world.write(pa + offset, actor.small(field).to_bytes(4, "little"))
        if self.params is not None or self.num_params is not None:
            count = len(self.params or ()) if self.num_params is None else actor.small(self.num_params)
            world.write(pa + OFFSET_NUM_PARAMS, count.to_bytes(4, "little"))
        for index, spec in enumerate(self.params or ()):
            if spec is not None:
                world.write(pa + HEADER_SIZE + PARAM_SIZE * index, PARAM.pack(*spec.build(actor)))
        if self.content is not None:
            start = 0 if self.offset is None else actor.size(self.offset)
            world.write(pa + start, octets(self.content, actor))


class ScriptedAnswer(Strict):
    """One answer of the secure world.

    to: only to calls of this function. after: so many such calls are answered by the model before. message, argument:
    what it writes first into the call's message, and into the call's RPC argument. a3: that of the call unless given.
    takes: time until it writes and answers, in which others have their turn.
    """

    to: FunctionId | None = None
    after: Number | None = None
    a0: Status
    a1: Number | None = None
    a2: Number | None = None
    a3: Number | None = None
    a1_a2: Annotated[Number | None, Field(alias="a1:a2")] = None
    message: ScriptedMessage | None = None
    argument: ScriptedMessage | None = None
    takes: Seconds = 0.0


class SecureWorld(Step):
    """Say what OP-TEE answers to the guest's next calls, one after the other, in the model's place.

    In life-cycle calls the guest is the one that they are about. A script takes the place of the model for that one
    call: its threads know nothing of it.
    """

    verb = "secure_world"
    answers: Annotated[list[ScriptedAnswer], Field(alias="secure_world", min_length=1)]

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        inbox = actor.run.world.inboxes[actor.guest.client]
        for answer in self.answers:
            inbox.scripts.append(_Scripted(answer, actor))


class _Scripted:
    """An answer that waits for its call."""

    def __init__(self, answer: ScriptedAnswer, actor: Actor) -> None:
        self._answer = answer
        self._actor = actor
        self._client = actor.guest.client
        self._after = 0 if answer.after is None else actor.number(answer.after)
        self.takes = answer.takes

    def fits(self, regs: Regs) -> bool:
        """Whether it is meant for this call."""
        if self._answer.to is not None and self._actor.small(self._answer.to) != regs[0] & _LOW:
            return False
        self._after -= 1
        return self._after < 0

    def __call__(self, regs: Regs, conversation: Conversation | None) -> Regs:
        """Write, and answer. What cannot be said ends the run: the mediator has to have an answer all the same."""
        try:
            return self._say(regs, conversation)
        except (EvaluationError, PhysicalFault) as error:
            failed = StepFailed("this answer", "names and numbers that fit", str(error))
        except StepFailed as noticed:
            failed = noticed
        failed.place, failed.step, failed.guest = self._answer.place, "secure_world", self._actor.guest_name
        self._actor.run.give_up(failed)
        return int(ReturnCode.ENOMEM), 0, 0, 0

    def _say(self, regs: Regs, conversation: Conversation | None) -> Regs:
        answer, actor = self._answer, self._actor
        given = (answer.a1, answer.a2, answer.a3)
        a1, a2, a3 = [0 if word is None else actor.number(word) for word in given]
        if answer.a1_a2 is not None:
            a1, a2 = to_pair(actor.number(answer.a1_a2))
        if answer.a3 is None and regs[0] & _LOW == Function.RETURN_FROM_RPC:
            a3 = regs[3]
        if answer.message is not None:
            if conversation is None:
                raise StepFailed("this answer", "a call with a message", "one without")
            answer.message.write(actor, conversation.message)
        if answer.argument is not None:
            at = None
            if conversation is not None:
                at = actor.run.world.argument(self._client, conversation, from_pair(a1, a2))
            if at is None:
                raise StepFailed("this answer", "a call with an RPC argument", "none")
            answer.argument.write(actor, at)
        return actor.number(answer.a0) & _LOW, a1, a2, a3


STEPS: Final = (
    Create,
    Kill,
    Destroy,
    Abandon,
    Kexec,
    Pause,
    Resume,
    Quota,
    Stage2,
    Advance,
    Interrupt,
    Notify,
    DirtyLogging,
    Fail,
    Flip,
    SecureWorld,
)
