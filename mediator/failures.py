"""Allocations of the mediator that fail on demand: the nth one of a kind."""

from mediator.core.ledger import Charge, Ledger, Limits, OverLimit


class Countdown:
    """The nth call of `due` is True, once; -1 never."""

    def __init__(self) -> None:
        self.left = -1

    def due(self) -> bool:
        """Count one."""
        if self.left < 0:
            return False
        self.left -= 1
        return self.left < 0


class FaultyLedger(Ledger):
    """Every record (call, buffer, RPC argument) is one allocation, which may fail."""

    __slots__ = ("_objects",)

    def __init__(self, limits: Limits, objects: Countdown) -> None:
        super().__init__(limits)
        self._objects = objects

    def charge(
        self, pages: int = 0, buffers: int = 0, rpc_arguments: int = 0, calls: int = 0, memory: int = 0
    ) -> Charge:
        """See `Ledger.charge`."""
        if calls and self.calls + calls > self.limits.calls:
            raise OverLimit("calls", calls, self.calls, self.limits.calls)
        if buffers > 1:
            raise OverLimit("memory")  # then they are asked for one by one, and each can be the one that fails
        if (calls or buffers or rpc_arguments) and self._objects.due():
            raise OverLimit("memory")
        return super().charge(pages, buffers, rpc_arguments, calls, memory)
