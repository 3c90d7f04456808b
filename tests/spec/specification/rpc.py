"""RPC: OP-TEE asks, the guest answers, and only what was asked for is taken over (R16 to R20)."""

import struct

from optee.abi.rpc import RpcCommand
from tests.spec.specification.terms import (
    ALLOC,
    CMD,
    EBADADDR,
    ENOMEM,
    ERESUME,
    FOREIGN_INTR,
    FREE,
    GENERIC,
    LOW,
    NOT_SUPPORTED,
    OWN_THREADS,
    PAGE,
    PIN,
    RECORD,
    RMEM,
    RPC_COMMANDS,
    STORAGE_NOT_AVAILABLE,
    TMEM,
    UNDELIVERED,
    BadAddress,
    OutOfContract,
    Refused,
    Rejected,
    Undeliverable,
    fresh_page,
    header,
    outputs,
    pair,
    params,
    set_ret,
)
from tests.spec.specification.yielding_calls import YieldingCalls


class Rpcs(YieldingCalls):
    """Calls that wait in their guest for something that OP-TEE wants."""

    def suspended(self, guest, call, answer):
        thread, code = answer[3] & LOW, answer[0] & LOW
        if thread >= OWN_THREADS or any(each["thread"] == thread for each in guest["calls"]):
            raise OutOfContract
        guest["counters"]["rpcs"] += 1
        call |= {"rpc": code, "saved": (answer[1], answer[2]), "argument": None}
        if code == CMD:
            try:
                self.deliver(guest, call, pair(answer[1], answer[2]))
            except Undeliverable as fault:
                return self.undelivered(guest, call, thread, *fault.args)
        elif code == FREE:  # dropped before the guest is told (R20)
            guest["arguments"].pop(pair(answer[1], answer[2]), None)
        call |= {"state": "SUSPENDED", "thread": thread}
        return self.told("suspended", call["regs"], answer)

    def request(self, guest, call):
        """Where the saved request stands: page, first byte, room. None: nowhere any more."""
        if call["rpc_at"] is not None:
            return call["shadow"], call["rpc_at"], call["rpc_room"]
        argument = call["argument"]
        if argument is None or all(argument is not each for each in guest["arguments"].values()):
            return None
        return argument["page"], 0, PAGE

    def deliver(self, guest, call, cookie):
        if call["rpc_at"] is None:
            call["argument"] = guest["arguments"].get(cookie)
        elif cookie:
            raise Undeliverable(GENERIC, True)
        request = self.request(guest, call)
        if request is None:
            raise Undeliverable(GENERIC, True)
        page, base, room = request
        command, count = header(page["bytes"], base)[0], header(page["bytes"], base)[7]
        name = RPC_COMMANDS.get(command)
        if 32 + 32 * count > room or name == "BENCH_REG":  # that one carries a physical address (R6)
            raise Undeliverable(GENERIC, True)
        if self.policy["rpc_commands"] is not None and name not in self.policy["rpc_commands"]:
            raise Undeliverable(NOT_SUPPORTED, False)
        if (name or "").startswith("RPMB") and self.policy.get("rpmb_owner") != "any":
            raise Undeliverable(STORAGE_NOT_AVAILABLE, False)
        for attribute, a, b, c in params(page["bytes"], base):
            if attribute & 0xFF in TMEM and a:  # R6
                raise Undeliverable(GENERIC, True)
            if attribute & 0xFF in RMEM:
                self.mark_dirty(guest, c)
            elif name == "SHM_FREE":  # R20; what a call pinned for itself is not OP-TEE's to free
                self.release(guest, self.find(guest, b, "REGISTERED", "UNREGISTERING"))
            elif name == "SHM_ALLOC":
                call["shm_type"] = a
        try:
            self.write_request(guest, call, bytes(page["bytes"][base : base + 32 + 32 * count]))
        except BadAddress:
            raise Undeliverable(GENERIC, False) from None

    def write_request(self, guest, call, data):
        if call["rpc_at"] is not None:
            self.write_message(guest, call, call["rpc_at"], data)
        else:
            guest["ram"].write(call["argument"]["ipa"], data)

    def read_reply(self, guest, call, size):
        if call["rpc_at"] is not None:
            return self.read_message(guest, call, call["rpc_at"], size)
        return guest["ram"].read(call["argument"]["ipa"], size)

    def undelivered(self, guest, call, thread, result, contract):
        """OP-TEE is told in the request, a bounded number of times (R18)."""
        call["undelivered"] += 1
        request = self.request(guest, call)
        if request is not None:
            page, base, _ = request
            set_ret(page, result, base)
        if call["undelivered"] <= UNDELIVERED:
            return self.forward(call, "RETURN_FROM_RPC", a3=thread)
        if contract:
            raise OutOfContract
        call |= {"state": "SUSPENDED", "thread": thread, "rpc": FOREIGN_INTR, "saved": (0, 0)}
        return self.told("suspended", call["regs"], (FOREIGN_INTR, 0, 0, thread))

    def return_from_rpc(self, guest, regs):
        thread = regs[3] & LOW
        call = next((each for each in guest["calls"] if each["thread"] == thread), None)
        compare = self.policy["rules"]["compare_resume_cookie"] and call is not None
        if compare and call["rpc"] == CMD and call["state"] == "SUSPENDED" and thread < OWN_THREADS:
            compare = pair(regs[1], regs[2]) != pair(*call["saved"])  # R17
        else:
            compare = False
        if call is None or compare:
            guest["counters"]["rejected"] += 1
            return self.local(regs, ERESUME)
        call |= {"thread": None, "regs": regs, "undelivered": 0}
        if thread >= OWN_THREADS:
            return self.proceed(call)
        if call["state"] == "FREEING":  # whatever the guest says now, the allocation failed (R19)
            self.answer_failed(guest, call)
            return self.back_to_optee(call, thread)
        if call["rpc"] == CMD:
            return self.go_on(call, self.take_reply(guest, call, thread))
        if call["rpc"] == ALLOC:
            return self.take_argument(guest, call, thread, regs)
        return self.back_to_optee(call, thread, a1=call["saved"][0], a2=call["saved"][1])

    def back_to_optee(self, call, thread, page=None, **words):
        call["state"] = "RUNNING"
        return self.forward(call, "RETURN_FROM_RPC", page, a3=thread, **words)

    def take_argument(self, guest, call, thread, regs):
        """The guest gave a page for RPC arguments: it is pinned, and OP-TEE gets one of the mediator's (R5, R6)."""
        ipa, cookie, page = pair(regs[1], regs[2]), pair(regs[4], regs[5]), None
        try:
            if ipa % PAGE or cookie in guest["arguments"]:
                raise Refused(EBADADDR, False)
            if not self.allows(guest, rpc_arguments=1, memory=RECORD + PIN + PAGE):
                raise Refused(ENOMEM, True)
            guest["ram"].check_shareable(ipa)
            if not self.lend():
                raise Refused(ENOMEM, True)
            page = fresh_page()
            guest["arguments"][cookie] = {"ipa": ipa, "page": page}
        except BadAddress:
            guest["counters"]["rejected"] += 1
        except Refused as refused:
            self.count(guest, refused)
        return self.back_to_optee(call, thread, page, a4=regs[4] & LOW, a5=regs[5] & LOW)

    def answer_failed(self, guest, call):
        request = self.request(guest, call)
        if request is not None:
            page, base, _ = request
            set_ret(page, GENERIC, base)
            page["bytes"][base + 28 : base + 32] = bytes(4)

    def take_reply(self, guest, call, thread):
        """Take over what the *saved* request lets the guest answer (R16)."""
        request = self.request(guest, call)
        if request is None:
            return self.back_to_optee(call, thread)
        page, base, _ = request
        asked, count = header(page["bytes"], base)[0], header(page["bytes"], base)[7]
        alloc = RPC_COMMANDS.get(asked) == "SHM_ALLOC"
        try:
            reply = self.read(guest["ram"], self.read_reply, guest, call, 32 + 32 * count)
        except BadAddress:
            return self.misfit(guest, call, thread)
        ret = header(reply)[5]
        if header(reply)[7] != count and not (alloc and ret):
            return self.misfit(guest, call, thread)
        page["bytes"][base + 20 : base + 28] = reply[20:28]
        if alloc and not ret and (count != 1 or params(reply)[0][0] != 0x20A):
            return self.misfit(guest, call, thread)
        if alloc and not ret:
            return (yield from self.take_allocated(guest, call, thread, page, base, reply))
        if not alloc:
            types = [each[0] & 0xFF for each in params(page["bytes"], base)]
            for first, end in outputs(types):
                page["bytes"][base + first : base + end] = reply[first:end]
        return self.back_to_optee(call, thread)

    def misfit(self, guest, call, thread):
        guest["counters"]["rejected"] += 1
        self.answer_failed(guest, call)
        return self.back_to_optee(call, thread)

    def take_allocated(self, guest, call, thread, page, base, reply):
        """The guest offers a buffer: it is translated, or the guest is asked to free it again (R19)."""
        previous = guest["buffers"].get(call["allocated"])
        if previous is not None:
            previous["lists"] = 0
        call["allocated"] = None
        page["bytes"][base + 32 : base + 64] = reply[32:64]
        page["lists"].pop(base + 40, None)  # of another call that answered in the same page
        made = []
        try:
            yield from self.translate(guest, call, reply, base, page, made)
        except Rejected as rejected:
            self.count(guest, rejected)
            for number in made:
                self.release(guest, number)
            _, func, session, cancel_id, pad, _, origin, _ = header(reply)
            cookie = params(reply)[0][3]
            ask = struct.pack("<8I", RpcCommand.SHM_FREE, func, session, cancel_id, pad, GENERIC, origin, 1)
            ask += struct.pack("<4Q", 1, call["shm_type"], cookie, cookie)
            page["bytes"][base : base + 64] = ask
            try:
                self.write_request(guest, call, ask)
            except BadAddress:
                self.answer_failed(guest, call)
                return self.back_to_optee(call, thread)
            call |= {"state": "FREEING", "thread": thread}
            return self.told("suspended", call["regs"], (CMD, *call["saved"], thread))
        for number in made:
            guest["buffers"][number]["state"] = "REGISTERED"
            call["allocated"] = number
        return self.back_to_optee(call, thread)
