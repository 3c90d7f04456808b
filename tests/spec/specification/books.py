"""Guests and their objects. What guests hold (R21) and what the pool has left (R22) follows from what is there."""

from tests.spec.specification.terms import PAGE, PIN, RECORD


class Books:
    """`policy` is a policy's document, `threads` are OP-TEE's for each guest."""

    def __init__(self, policy, threads, lists_per_turn=33):
        self.policy = policy
        self.threads = threads
        self.lists_per_turn = lists_per_turn
        self.rpc_params = 4  # until OP-TEE has said it
        self.guests = {}
        self.pool = policy.get("pool", {}).get("pages")
        self.pages_left = None  # of the host's, for the mediator; None: enough

    def held(self, guest):
        calls, buffers, arguments = guest["calls"], guest["buffers"].values(), guest["arguments"]
        memory = len(calls) * (RECORD + PAGE) + len(arguments) * (RECORD + PIN + PAGE)
        memory += sum(RECORD + PIN * buffer["pages"] + PAGE * buffer["lists"] for buffer in buffers)
        return {
            "pages": sum(buffer["pages"] for buffer in buffers),
            "buffers": len(buffers),
            "rpc_arguments": len(arguments),
            "calls": len(calls),
            "memory": memory,
        }

    def pins(self, guest):
        """A page is pinned as often as live objects contain it (invariant 1)."""
        count = {}
        for buffer in guest["buffers"].values():
            for ipa in buffer["pinned"]:
                count[ipa] = count.get(ipa, 0) + 1
        for argument in guest["arguments"].values():
            count[argument["ipa"]] = count.get(argument["ipa"], 0) + 1
        return count

    def own_pages(self):
        """Pages of the mediator that are in use: a shadow for each call, page lists, and one for each RPC argument."""
        count = 0
        for guest in self.guests.values():
            count += sum(call["shadow"] is not None for call in guest["calls"]) + len(guest["arguments"])
            count += sum(buffer["lists"] for buffer in guest["buffers"].values())
        return count

    def allows(self, guest, **more):
        """Whether the guest may have so much more."""
        held, limits = self.held(guest), guest["limits"]
        return all(held[name] + count <= limits[name] for name, count in more.items())

    def pool_allows(self, guest, pages):
        if self.pool is None or not pages:
            return True
        reserved = guest["limits"]["reserved_pages"]
        wanted = self.held(guest)["pages"] + pages
        return wanted <= reserved or self.committed(guest) + max(wanted, reserved) <= self.pool

    def committed(self, but=None):
        """Pages of the pool that guests, but for one, have or are promised."""
        return sum(
            max(self.held(guest)["pages"], guest["limits"]["reserved_pages"])
            for guest in self.guests.values()
            if guest is not but
        )

    def lend(self):
        """Take one of the host's pages; whether there was one."""
        if self.pages_left == 0:
            return False
        if self.pages_left is not None:
            self.pages_left -= 1
        return True

    def limits(self, limits):
        rpc_arguments = 2 * self.threads if limits["rpc_arguments"] is None else limits["rpc_arguments"]
        calls = self.threads if limits["calls"] is None else min(limits["calls"], self.threads)
        memory = limits["memory_kib"] * 1024
        return {"reserved_pages": 0, **limits, "rpc_arguments": rpc_arguments, "calls": calls, "memory": memory}
