"""What the host asks for: guests come, are paused, and end (R24, R28)."""

from tests.spec.specification.answers import Answers
from tests.spec.specification.buffers import Buffers
from tests.spec.specification.terms import EBUSY, ENOMEM, ENOTAVAIL, LOW, OK


class Host(Buffers, Answers):
    """The life cycle of guests."""

    def create(self, vm, ram, limits=None):
        asked = limits or self.policy["limits"]
        limits = self.limits(asked)
        if not 0 < vm < 65536 or vm in self.guests:
            return self.to_host(ENOTAVAIL)
        guest = {"vm": vm, "ram": ram, "limits": limits, "state": "CREATING", "away": 0, "asked": asked}
        guest |= {
            "calls": [],
            "buffers": {},
            "arguments": {},
            "notifications": False,
            "dirty": set(),
            "objects": 0,
            "entered": 0,
        }
        guest["counters"] = dict.fromkeys(("calls", "denied", "rejected", "refused", "forwarded", "rpcs"), 0)
        reserved = limits["reserved_pages"]
        if self.pool is not None and reserved and self.committed() + reserved > self.pool:
            return self.to_host(ENOMEM)
        self.guests[vm] = guest
        return self.announce("VM_CREATED", guest)

    def destroy(self, vm, again=False):
        guest = self.guests.get(vm)
        if guest is None:
            return self.to_host(OK)
        if guest["state"] == "CREATING":
            return ("wait",)
        guest["state"] = "DYING"
        if guest["away"]:  # what is with OP-TEE comes back first
            return ("wait",)
        guest["away"] = 1
        return self.announce("VM_DESTROYED", guest, again)

    def abandon(self, vm):
        guest = self.guests.get(vm)
        if guest is None or guest["state"] != "QUARANTINED":
            return self.to_host(ENOTAVAIL)
        self.forget(guest)
        return self.to_host(OK)

    def pause(self, vm):
        return self.change(vm, "LIVE", "PAUSED")

    def resume(self, vm):
        return self.change(vm, "PAUSED", "LIVE")

    def change(self, vm, old, new):
        guest = self.guests.get(vm)
        if guest is None or guest["state"] != old:
            return False
        guest["state"] = new
        return True

    def host_answered(self, ticket, answer):
        guest = ticket["guest"]
        ok = answer[0] & LOW == 0
        if guest["state"] == "CREATING":
            guest["state"] = "LIVE" if ok else "GONE"
            if not ok:
                del self.guests[guest["vm"]]
            return self.to_host(OK if ok else ENOTAVAIL)
        if not ok:  # OP-TEE may still touch the guest's memory: it stays pinned
            return self.quarantine(guest)
        self.forget(guest)
        if ticket["again"]:
            return self.create(guest["vm"], guest["ram"], guest["asked"])
        return self.to_host(OK)

    def quarantine(self, guest):
        guest["away"], guest["state"] = 0, "QUARANTINED"
        return self.to_host(EBUSY)

    def forget(self, guest):
        guest["state"] = "GONE"
        for buffer in guest["buffers"].values():
            self.unpin(guest, buffer)
        guest["calls"], guest["buffers"], guest["arguments"] = [], {}, {}
        del self.guests[guest["vm"]]
