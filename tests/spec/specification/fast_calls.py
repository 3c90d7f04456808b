"""Fast calls: forwarded as they are, but for what a guest must not see (R4)."""

from optee.abi.smc import NsecCapability, SecCapability
from tests.spec.specification.answers import Answers
from tests.spec.specification.terms import ENOTAVAIL, IDENTITIES, LOW, SERVED, not_handled, pair


class FastCalls(Answers):
    """Each is one forward, and no call that lives on."""

    def fast(self, guest, name, regs):
        if name == "GET_SHM_CONFIG":  # there is no reserved shared memory (R4)
            return self.local(regs, ENOTAVAIL)
        if name == "CALLS_COUNT":
            return self.local(regs, len(self.policy["functions"]))
        a1 = 0
        if name == "EXCHANGE_CAPABILITIES":
            known = self.policy["capabilities"]["nsec"]
            a1 = regs[1] & (LOW if known is None else sum(NsecCapability[each] for each in known))
        return self.forward({"what": "fast", "guest": guest, "regs": regs, "name": name}, name, a1=a1)

    def fast_answered(self, ticket, answer):
        guest, name, regs = ticket["guest"], ticket["name"], ticket["regs"]
        if guest["state"] not in SERVED:
            return not_handled(regs)
        if name in IDENTITIES:  # a0 is data
            return self.told(name, regs, answer)
        if answer[0] & LOW:
            return self.told("failed", regs, answer)
        if name == "EXCHANGE_CAPABILITIES":  # R4
            offered = sum(SecCapability[each] for each in self.policy["capabilities"]["sec"]) & answer[1]
            if not offered & SecCapability.DYNAMIC_SHM:
                return ("reply", (ENOTAVAIL, *regs[1:]))
            if offered & SecCapability.RPC_ARG:
                self.rpc_params = answer[3] & 0xFF
            a2 = answer[2] if offered & SecCapability.ASYNC_NOTIF else 0
            a3 = answer[3] if offered & SecCapability.RPC_ARG else 0
            answer = (answer[0], offered, a2, a3)
        elif name == "DISABLE_SHM_CACHE":  # OP-TEE gave an RPC argument back
            guest["arguments"].pop(pair(answer[1], answer[2]), None)
        elif name == "ENABLE_ASYNC_NOTIF":
            guest["notifications"] = True
        elif name == "GET_THREAD_COUNT":
            answer = (answer[0], min(answer[1] & LOW, guest["limits"]["calls"]), *answer[2:])
        return self.told(name, regs, answer)
