"""Steps about a guest's disk: the files that its tee-supplicant keeps for OP-TEE. They outlive the guest's VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from pydantic import model_validator

from mediator.scenario.expressions import EvaluationError, Number
from mediator.scenario.flow import Flow, side_by_side
from mediator.scenario.guest import PowerCut
from mediator.scenario.steps import Name, Step

if TYPE_CHECKING:
    from mediator.scenario.actor import Actor
    from mediator.scenario.language import AnyStep


class SaveFiles(Step):
    """Keep a copy of the files as they are now, under a name."""

    verb = "save_files"
    save_files: Name

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        files = actor.guest.files.content
        actor.guest.saved_files[self.save_files] = {path: bytes(content) for path, content in files.items()}


class ServeFiles(Step):
    """Let the supplicant serve other files from now on: what was saved under a name, or a copy of another guest's.

    files: only those of these names, the others stay as they are.
    """

    verb = "serve_files"
    serve_files: Name
    files: list[str] | None = None

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = actor.guest
        source = guest.saved_files.get(self.serve_files)
        if source is None:
            other = actor.of(self.serve_files).guest.files.content
            source = {path: bytes(content) for path, content in other.items()}
        content = guest.files.content
        if self.files is None:
            content.clear()
        for path in source if self.files is None else [(name,) for name in self.files]:
            if path not in source:
                raise EvaluationError(f"{self.serve_files} has no file {'/'.join(path)}")
            content[path] = bytearray(source[path])


class CutPower(Flow):
    """Do steps, while the guest loses its power at its nth SMC from now; then, if it did, it boots again.

    at_call: before the mediator sees that SMC. at_return: before the guest sees its answer.
    """

    verb = "cut_power"
    needs_guest: ClassVar[bool] = True
    needs_driver: ClassVar[bool] = True
    cut_power: list[AnyStep]
    at_call: Number | None = None
    at_return: Number | None = None

    @model_validator(mode="after")
    def _one(self) -> CutPower:
        if (self.at_call is None) is (self.at_return is None):
            raise ValueError("cut_power: at_call or at_return is wanted")
        return self

    async def run(self, actor: Actor) -> None:
        """See `Step`."""
        guest = actor.guest
        calls = self.at_call or self.at_return
        assert calls is not None
        guest.cut = cut = PowerCut(actor.number(calls), answered=self.at_call is None)
        await side_by_side([(actor.branch(), self.cut_power)], actor)
        if guest.cut is cut:  # the steps made fewer SMCs
            guest.cut = None
            return
        await guest.destroyed.wait()
        await actor.run.create(guest)
        await guest.boot(actor.run.nursery)


STEPS: Final = (SaveFiles, ServeFiles, CutPower)
