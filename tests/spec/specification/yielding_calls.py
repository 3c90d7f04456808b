"""Yielding calls: from the guest's message to OP-TEE's last word (R10 to R13, R23, R29)."""

import struct

from tests.spec.specification.answers import Answers
from tests.spec.specification.messages import Messages
from tests.spec.specification.terms import (
    COMMS,
    EBADADDR,
    ENOMEM,
    ETHREAD_LIMIT,
    FOREIGN_INTR,
    LOW,
    OK,
    OWN_THREADS,
    PAGE,
    RECORD,
    SERVED,
    BadAddress,
    Refused,
    Rejected,
    header,
    not_handled,
    outputs,
)


class YieldingCalls(Messages, Answers):
    """Calls that live until they end. The work on one may be interrupted by turns of others."""

    def call_with(self, guest, name, regs):
        if not self.allows(guest, calls=1):
            guest["counters"]["refused"] += 1
            return self.local(regs, ETHREAD_LIMIT)
        if not self.allows(guest, memory=RECORD + PAGE):
            guest["counters"]["refused"] += 1
            return self.local(regs, ENOMEM)
        guest["entered"] += 1
        call = {"what": "call", "guest": guest, "number": guest["entered"], "function": name, "regs": regs}
        call |= {"state": "TRANSLATING", "command": None, "shadow": None, "size": 0, "place": None, "rpc_at": None}
        call |= {"made": [], "registering": None, "unregistering": None, "allocated": None, "written": []}
        call |= {"thread": None, "rpc": None, "argument": None, "undelivered": 0, "types": [], "shm_type": 0}
        guest["calls"].append(call)
        return self.go_on(call, self.enter(guest, call, regs))

    def go_on(self, call, work):
        """Work on a call until it is done, or others have a turn (R23)."""
        call["work"] = work
        try:
            next(work)
        except StopIteration as stop:
            call["work"] = None
            return stop.value
        return ("turn", call)

    def proceed(self, call):
        if call["guest"]["state"] not in SERVED or call["work"] is None:
            return not_handled(call["regs"])
        return self.go_on(call, call["work"])

    def give_back(self, call):
        """Instead of `proceed`: let the guest take its interrupts; it comes back with a thread id of ours (R29)."""
        if call["guest"]["state"] not in SERVED or call["work"] is None:
            return not_handled(call["regs"])
        call["thread"] = OWN_THREADS + call["number"] % OWN_THREADS
        return self.told("suspended", call["regs"], (FOREIGN_INTR, 0, 0, call["thread"]))

    def enter(self, guest, call, regs):
        try:
            data = self.take_message(guest, call, regs)
            yield from self.translate(guest, call, data, 0, call["shadow"], call["made"])
        except Refused as refused:
            self.end(guest, call)
            self.count(guest, refused)
            return self.local(regs, refused.args[0])
        except Rejected as rejected:
            self.end(guest, call)
            self.count(guest, rejected)
            try:
                self.write_message(guest, call, 20, struct.pack("<2I", rejected.args[0], COMMS))
            except BadAddress:
                guest["counters"]["rejected"] += 1
                return self.local(regs, EBADADDR)
            return self.local(regs, OK)
        if call["command"] == "REGISTER_SHM":
            call["registering"] = call["made"].pop()
            guest["buffers"][call["registering"]]["state"] = "REGISTERING"
        call["state"] = "RUNNING"
        # A registered message goes out as a page of the mediator's own too, its RPC argument behind it (R5).
        function = "CALL_WITH_ARG" if call["rpc_at"] is None else "CALL_WITH_RPC_ARG"
        return self.forward(call, function, call["shadow"], a3=1)

    def completed(self, guest, call, answer):
        if answer[0] & LOW:  # OP-TEE refused the call and left the message alone (R11)
            self.end(guest, call)
            return self.told("failed", call["regs"], answer)
        data = bytes(call["shadow"]["bytes"])
        for cookie in call["written"]:
            self.mark_dirty(guest, cookie)
        if header(data)[5] == 0:
            if call["registering"] is not None:
                buffer = guest["buffers"].get(call["registering"])
                if buffer is not None:
                    buffer |= {"state": "REGISTERED", "lists": 0}
                call["registering"] = None
            elif call["command"] == "UNREGISTER_SHM":
                self.release(guest, self.find(guest, call["cookie"], "REGISTERING", "REGISTERED", "UNREGISTERING"))
        self.end(guest, call)
        try:
            for first, end in [(8, 12), (20, 28), *outputs(call["types"])]:
                self.write_message(guest, call, first, data[first:end])
        except BadAddress:
            guest["counters"]["rejected"] += 1
            return self.local(call["regs"], EBADADDR)
        return self.told("completed", call["regs"], answer)

    def end(self, guest, call):
        """A call ends: it frees exactly what it made (R13)."""
        for number in [*call["made"], call["registering"]]:
            self.release(guest, number)
        buffer = guest["buffers"].get(call["unregistering"])
        if buffer is not None:
            buffer["state"] = "REGISTERED"
        guest["calls"].remove(call)
        call["state"] = "ENDED"
