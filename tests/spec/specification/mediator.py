"""The mediator as a whole: whom it serves, what it lets through (R2), what OP-TEE's answers and death mean (R25)."""

from tests.spec.specification.fast_calls import FastCalls
from tests.spec.specification.host import Host
from tests.spec.specification.rpc import Rpcs
from tests.spec.specification.terms import ENOTAVAIL, FUNCTIONS, LOW, SERVED, OutOfContract, not_handled


class Specification(Host, FastCalls, Rpcs):
    """The mediator."""

    def smc(self, vm, regs):
        guest = self.guests.get(vm)
        if guest is not None and guest["state"] == "PAUSED":
            return ("wait",)
        if guest is None or guest["state"] != "LIVE":
            return not_handled(regs)
        guest["counters"]["calls"] += 1
        name = FUNCTIONS.get(regs[0] & LOW)
        if name not in self.policy["functions"]:  # R2
            guest["counters"]["denied"] += 1
            return not_handled(regs)
        if name == "RETURN_FROM_RPC":
            return self.return_from_rpc(guest, regs)
        if name.startswith("CALL_WITH"):
            return self.call_with(guest, name, regs)
        return self.fast(guest, name, regs)

    def answered(self, ticket, answer):
        """OP-TEE answered a forward."""
        if ticket["what"] == "host":
            return self.host_answered(ticket, answer)
        guest = ticket["guest"]
        guest["away"] -= 1
        if ticket["what"] == "fast":
            return self.fast_answered(ticket, answer)
        rpc = answer[0] & LOW >= 0xFFFF0000 and answer[0] & LOW != LOW
        if guest["state"] not in SERVED:  # it died meanwhile; a thread that is suspended ends with VM_DESTROYED
            if not rpc:
                self.end(guest, ticket)
            return not_handled(ticket["regs"])
        if not rpc:
            return self.completed(guest, ticket, answer)
        try:
            return self.suspended(guest, ticket, answer)
        except OutOfContract:
            return self.isolate(guest, ticket["regs"])

    def lost(self, ticket):
        """OP-TEE died of a forward (R25)."""
        guest = ticket["guest"]
        if ticket["what"] == "host":
            if guest["state"] != "CREATING":
                return self.quarantine(guest)
            return self.host_answered(ticket, (ENOTAVAIL, 0, 0, 0))
        guest["away"] -= 1
        return self.isolate(guest, ticket["regs"]) if guest["state"] in SERVED else not_handled(ticket["regs"])

    def isolate(self, guest, regs):
        guest["state"] = "ISOLATED"
        return not_handled(regs)
