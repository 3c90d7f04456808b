"""What comes of a move: an answer to the guest or the host, or a forward to OP-TEE (R1 to R3)."""

from optee.abi.smc import Function
from tests.spec.specification.books import Books


class Answers(Books):
    """Registers that leave the mediator, and the counters of what comes of calls."""

    def told(self, what, regs, answer):
        """What the guest finds in x0..x7: one table per policy (R3)."""
        words = self.policy["answers"].get(what, self.policy["answers"]["completed"])
        found = [{"pass": answer[n], "keep": regs[n], "zero": 0}[words[n - 1]] for n in (1, 2, 3)]
        return ("reply", (answer[0], *found, *regs[4:]))

    def local(self, regs, code):
        return self.told("local", regs, (code, 0, 0, 0))

    def to_host(self, code):
        return ("reply", (code, 0, 0, 0, 0, 0, 0, 0))

    def forward(self, ticket, name, page=None, a1=0, a2=0, a3=0, a4=0, a5=0):
        guest = ticket["guest"]
        guest["away"] += 1
        guest["counters"]["forwarded"] += 1
        return ("forward", (int(Function[name]), a1, a2, a3, a4, a5, 0, guest["vm"]), page, ticket)  # a7: R1

    def announce(self, function, guest, again=False):
        regs = (int(Function[function]), guest["vm"], 0, 0, 0, 0, 0, 0)  # a7 = 0: the hypervisor's own id (R1)
        return ("forward", regs, None, {"what": "host", "guest": guest, "again": again})

    def count(self, guest, fault):
        guest["counters"]["refused" if fault.args[1] else "rejected"] += 1
