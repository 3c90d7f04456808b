"""What the mediator does, said as plainly as it can be: rules R1 to R29 as a program that is slow and obvious.

Dictionaries, integers and bytes; nothing of the core, no numpy. Nothing is counted that can be looked up: what a guest
holds is worked out from the objects that are there, so there are no books that could be wrong. Each move returns what
comes of it: ("reply", x0..x7), ("forward", x0..x7, page, ticket), ("turn", ticket) where others come first (R23), or
("wait",). Where `page` is one of the mediator's own pages, its address is what stands in a1:a2 of a forward; where a
page names a page list of the mediator's, `page["lists"]` says so, and 0 stands for the address. So no host address
occurs in here at all.

Flow control is not described; see `mediator.core.flow`.
"""

import struct

from optee.abi.message import Command
from optee.abi.rpc import RpcCommand
from optee.abi.smc import Function, NsecCapability, SecCapability

PAGE, LOW, NOT_HANDLED = 4096, 2**32 - 1, 2**64 - 1
OK, ETHREAD_LIMIT, EBUSY, ERESUME, EBADADDR, EBADCMD, ENOMEM, ENOTAVAIL = range(8)
GENERIC, BAD_PARAMETERS, NOT_SUPPORTED, OUT_OF_MEMORY = 0xFFFF0000, 0xFFFF0006, 0xFFFF000A, 0xFFFF000C
STORAGE_NOT_AVAILABLE, COMMS = 0xF0100003, 2
ALLOC, FREE, FOREIGN_INTR, CMD = 0xFFFF0000, 0xFFFF0002, 0xFFFF0004, 0xFFFF0005
VALUE_BACK, SIZE_BACK, RMEM, TMEM, NONCONTIG = (2, 3), (6, 7, 10, 11), (5, 6, 7), (9, 10, 11), 0x200
FUNCTIONS = {int(function): function.name for function in Function}
COMMANDS = {int(command): command.name for command in Command}
RPC_COMMANDS = {int(command): command.name for command in RpcCommand}
IDENTITIES = ("CALLS_UID", "CALLS_REVISION", "GET_OS_UUID", "GET_OS_REVISION")
SERVED = ("LIVE", "PAUSED")
OWN_THREADS = 0x40000000
"""Thread ids from here on are the mediator's own (R29)."""
UNDELIVERED = 64
"""RPCs of a call that fail to reach the guest, one after the other, before OP-TEE is stopped (R18)."""
RECORD, PIN = 256, 16
"""Bytes of the mediator's memory that a record, and a pinned page, count for (R21)."""


class BadAddress(Exception):
    """There is no such memory, or it may not be used so (R7)."""


class Refused(Exception):
    """The call fails in a0 (R10): `args` are the code, and whether a limit was passed."""


class Rejected(Exception):
    """The message fails in `ret` (R10): `args` are the result, and whether a limit was passed."""


class Undeliverable(Exception):
    """An RPC does not go to the guest (R18): `args` are what OP-TEE is told, and whether its contract is broken."""


class OutOfContract(Exception):
    """OP-TEE did what it must not do (R25)."""


def pair(high, low):
    return (high & LOW) << 32 | low & LOW


def header(data, at=0):
    return struct.unpack_from("<8I", data, at)  # cmd, func, session, cancel_id, pad, ret, ret_origin, num_params


def params(data, at=0):
    count = header(data, at)[7]
    return [struct.unpack_from("<4Q", data, at + 32 + 32 * n) for n in range(count)]


def outputs(types):
    """Where whoever receives a message answers: values, and sizes of memory references. (start, stop) each."""
    fields = []
    for n, kind in enumerate(types):
        if kind in VALUE_BACK:
            fields.append((40 + 32 * n, 64 + 32 * n))
        elif kind in SIZE_BACK:
            fields.append((48 + 32 * n, 56 + 32 * n))
    return fields


def fresh_page():
    return {"bytes": bytearray(PAGE), "lists": {}}


class Ram:
    """A guest's memory: `pages` by IPA, and what each is to it; only "rw" and "ro" are RAM."""

    def __init__(self, pages):
        self.pages = {ipa: bytearray(PAGE) for ipa in pages}
        self.kinds = dict.fromkeys(pages, "rw")
        self.after_read = None  # what another vCPU does once the message of a move was read

    def page(self, ipa, writable=False):
        at = ipa - ipa % PAGE
        if self.kinds.get(at) not in (("rw",) if writable else ("rw", "ro")):
            raise BadAddress
        return self.pages[at]

    def read(self, ipa, size, writable=False):
        return bytes(self.page(ipa, writable)[ipa % PAGE : ipa % PAGE + size])

    def write(self, ipa, data):
        self.page(ipa, True)[ipa % PAGE : ipa % PAGE + len(data)] = data

    def check_shareable(self, ipa):
        """Only normal read-write RAM, named exactly, and not at address 0 (R7, R9)."""
        if ipa % PAGE or ipa == 0:
            raise BadAddress
        self.page(ipa, True)


class Specification:
    """The mediator. `policy` is a policy's document, `threads` are OP-TEE's for each guest."""

    def __init__(self, policy, threads, lists_per_turn=33):
        self.policy = policy
        self.threads = threads
        self.lists_per_turn = lists_per_turn
        self.rpc_params = 4  # until OP-TEE has said it
        self.guests = {}
        self.pool = policy.get("pool", {}).get("pages")
        self.pages_left = None  # of the host's, for the mediator; None: enough

    # What a guest holds (R21), and the pool behind it (R22)

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
        before = self.held(guest)["pages"]
        others = sum(
            max(self.held(each)["pages"], each["limits"]["reserved_pages"])
            for each in self.guests.values()
            if each is not guest
        )
        return before + pages <= reserved or others + max(before + pages, reserved) <= self.pool

    def lend(self):
        """Take one of the host's pages; whether there was one."""
        if self.pages_left == 0:
            return False
        if self.pages_left is not None:
            self.pages_left -= 1
        return True

    # Requests of the host (R24, R28)

    def limits(self, limits):
        rpc_arguments = 2 * self.threads if limits["rpc_arguments"] is None else limits["rpc_arguments"]
        calls = self.threads if limits["calls"] is None else min(limits["calls"], self.threads)
        memory = limits["memory_kib"] * 1024
        return {"reserved_pages": 0, **limits, "rpc_arguments": rpc_arguments, "calls": calls, "memory": memory}

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
        committed = sum(
            max(self.held(each)["pages"], each["limits"]["reserved_pages"]) for each in self.guests.values()
        )
        if self.pool is not None and limits["reserved_pages"] and committed + limits["reserved_pages"] > self.pool:
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

    def announce(self, function, guest, again=False):
        regs = (int(Function[function]), guest["vm"], 0, 0, 0, 0, 0, 0)  # a7 = 0: the hypervisor's own id (R1)
        return ("forward", regs, None, {"what": "host", "guest": guest, "again": again})

    def to_host(self, code):
        return ("reply", (code, 0, 0, 0, 0, 0, 0, 0))

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

    # Requests of guests

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

    def told(self, what, regs, answer):
        """What the guest finds in x0..x7: one table per policy (R3)."""
        words = self.policy["answers"].get(what, self.policy["answers"]["completed"])
        found = [{"pass": answer[n], "keep": regs[n], "zero": 0}[words[n - 1]] for n in (1, 2, 3)]
        return ("reply", (answer[0], *found, *regs[4:]))

    def local(self, regs, code):
        return self.told("local", regs, (code, 0, 0, 0))

    def forward(self, ticket, name, page=None, a1=0, a2=0, a3=0, a4=0, a5=0):
        guest = ticket["guest"]
        guest["away"] += 1
        guest["counters"]["forwarded"] += 1
        return ("forward", (int(Function[name]), a1, a2, a3, a4, a5, 0, guest["vm"]), page, ticket)  # a7: R1

    def count(self, guest, fault):
        guest["counters"]["refused" if fault.args[1] else "rejected"] += 1

    # Fast calls

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

    # Yielding calls (R5 to R15)

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

    def take_message(self, guest, call, regs):
        """Copy the message once, look at it, lay out the shadow (R5)."""
        name, rules = call["function"], self.policy["rules"]
        where = pair(regs[1], regs[2])
        if name == "CALL_WITH_REGD_ARG":
            data = self.registered_message(guest, call, where, regs[3] & LOW)
        elif where % PAGE:
            raise Refused(EBADADDR, False)
        if not self.lend():
            raise Refused(ENOMEM, True)
        call["shadow"] = fresh_page()
        if name != "CALL_WITH_REGD_ARG":
            try:
                data = self.read(guest["ram"], guest["ram"].read, where, PAGE)
            except BadAddress:
                raise Refused(EBADADDR, False) from None
            call["place"] = (None, where)
        count = header(data)[7]
        size = 32 + 32 * count  # exact, whatever the count (R8)
        if name != "CALL_WITH_ARG":
            if size + 32 + 32 * self.rpc_params > len(data):
                raise Refused(EBADADDR, False)
            call |= {"rpc_at": size, "rpc_room": 32 + 32 * self.rpc_params}  # for good, whatever OP-TEE says later
        elif size > PAGE:
            raise Rejected(BAD_PARAMETERS, False)
        command = COMMANDS.get(header(data)[0])
        if command not in self.policy["commands"]:
            raise Refused(EBADCMD, False)
        call |= {"command": command, "size": size, "types": [each[0] & 0xFF for each in params(data)]}
        call["shadow"]["bytes"][:size] = data[:size]
        call["shadow"]["bytes"][20:24] = struct.pack("<I", GENERIC)  # R11
        if command in ("REGISTER_SHM", "UNREGISTER_SHM"):  # R15
            if count != 1:
                raise Rejected(BAD_PARAMETERS, False)
            attribute, pointer, _, cookie = params(data)[0]
            if command == "REGISTER_SHM":
                if attribute not in rules["register_attributes"] or pointer == 0 or cookie == 0:
                    raise Rejected(BAD_PARAMETERS, False)
            else:
                if rules["unregister_attributes"] is not None and attribute not in rules["unregister_attributes"]:
                    raise Rejected(BAD_PARAMETERS, False)
                call["cookie"] = cookie
                number = self.find(guest, cookie)
                if number is not None and guest["buffers"][number]["state"] == "REGISTERED":
                    guest["buffers"][number]["state"] = "UNREGISTERING"
                    call["unregistering"] = number
        for attribute, _, _, cookie in params(data):
            if attribute & 0xFF in RMEM:
                if cookie == 0 and not rules["cookie_zero"]:  # R13
                    raise Rejected(BAD_PARAMETERS, False)
                if attribute & 0xFF in SIZE_BACK:
                    call["written"].append(cookie)
        return data

    def registered_message(self, guest, call, cookie, offset):
        number = self.find(guest, cookie)
        if number is None or guest["buffers"][number]["state"] != "REGISTERED":
            raise Refused(EBADADDR, False)
        buffer = guest["buffers"][number]
        start = buffer["offset"] + offset
        room = buffer["pages"] * PAGE - start
        if start % 8 or room < 32:
            raise Refused(EBADADDR, False)
        call["place"] = (number, start)
        return self.read(guest["ram"], self.read_message, guest, call, 0, min(PAGE, room))

    def read(self, ram, how, *what):
        """Read a message or a reply: whatever the guest writes afterwards does not matter (R5)."""
        data = how(*what)
        if ram.after_read is not None:
            ram.after_read, change = None, ram.after_read
            change()
        return data

    def locate(self, guest, call, offset, size):
        """The pieces (page, first byte, end) that bytes of a message lie in: its page, or its pinned buffer (R14)."""
        number, start = call["place"]
        start += offset
        if number is None:
            return [(None, start, start + size)]
        if number not in guest["buffers"]:
            raise BadAddress
        pieces = []
        while size:
            length = min(size, PAGE - start % PAGE)
            page = guest["ram"].pages[guest["buffers"][number]["pinned"][start // PAGE]]
            pieces.append((page, start % PAGE, start % PAGE + length))
            start, size = start + length, size - length
        return pieces

    def read_message(self, guest, call, offset, size):
        pieces = self.locate(guest, call, offset, size)
        return b"".join(
            guest["ram"].read(first, end - first) if page is None else bytes(page[first:end])
            for page, first, end in pieces
        )

    def write_message(self, guest, call, offset, data):
        for page, first, end in self.locate(guest, call, offset, len(data)):
            part, data = data[: end - first], data[end - first :]
            if page is None:
                guest["ram"].write(first, part)
            else:
                page[first:end] = part

    def find(self, guest, cookie):
        """The number of the one live buffer with a cookie (R13)."""
        return next((number for number, each in guest["buffers"].items() if each["cookie"] == cookie), None)

    def translate(self, guest, call, data, base, page, made):
        """Replace each page list by one of the mediator's own (R6 to R8). Nothing is left of one that fails (R12)."""
        done = 0
        for n, (attribute, pointer, size, cookie) in enumerate(params(data)):
            if attribute & 0xFF not in TMEM or pointer == 0:
                continue
            if not attribute & NONCONTIG:
                raise Rejected(BAD_PARAMETERS, False)
            offset = pointer % PAGE
            pages = (size + offset + PAGE - 1) // PAGE
            lists = (pages + 510) // 511
            if pages > guest["limits"]["pages_per_buffer"]:
                raise Rejected(OUT_OF_MEMORY, True)
            if pages == 0:
                raise Rejected(BAD_PARAMETERS, False)
            memory = RECORD + PIN * pages + PAGE * lists
            if not self.allows(guest, buffers=1, pages=pages, memory=memory) or not self.pool_allows(guest, pages):
                raise Rejected(OUT_OF_MEMORY, True)
            if self.find(guest, cookie) is not None:
                raise Rejected(BAD_PARAMETERS, False)
            guest["objects"] += 1
            buffer = {"cookie": cookie, "state": "PINNED", "offset": offset, "written": False}
            buffer |= {"pages": pages, "lists": 0, "pinned": [], "output": attribute & 0xFF in SIZE_BACK}
            guest["buffers"][guest["objects"]] = buffer
            made.append(guest["objects"])
            for _ in range(lists):
                if not self.lend():
                    raise Rejected(OUT_OF_MEMORY, True)
                buffer["lists"] += 1
            at = pointer - offset
            while len(buffer["pinned"]) < pages:  # a list ends by count (R7)
                if done == self.lists_per_turn:
                    yield
                    done = 0
                done += 1
                left = pages - len(buffer["pinned"])
                try:
                    words = struct.unpack("<512Q", guest["ram"].read(at, PAGE, True))
                    for ipa in words[: min(left, 511)]:
                        guest["ram"].check_shareable(ipa)
                        buffer["pinned"].append(ipa)
                    if left > 511 and words[511] % PAGE:
                        raise BadAddress
                except BadAddress:
                    raise Rejected(BAD_PARAMETERS, False) from None
                at = words[511]
            place = base + 40 + 32 * n
            page["bytes"][place : place + 8] = bytes(8)
            page["lists"][place] = buffer
        for number in made:  # from now on OP-TEE may write it
            guest["buffers"][number]["written"] = guest["buffers"][number]["output"]

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
                number = self.find(guest, call["cookie"])
                if number is not None and guest["buffers"][number]["state"] != "PINNED":
                    self.release(guest, number)
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

    def release(self, guest, number):
        buffer = guest["buffers"].pop(number, None)
        if buffer is not None:
            self.unpin(guest, buffer)

    def unpin(self, guest, buffer):
        buffer["lists"] = 0
        if buffer["written"]:
            guest["dirty"].update(buffer["pinned"])

    def mark_dirty(self, guest, cookie):
        """OP-TEE may have written what is registered with this cookie (R27)."""
        number = self.find(guest, cookie)
        if number is not None:
            guest["dirty"].update(guest["buffers"][number]["pinned"])

    # RPC (R16 to R20)

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
                number = self.find(guest, b)
                if number is not None and guest["buffers"][number]["state"] in ("REGISTERED", "UNREGISTERING"):
                    self.release(guest, number)
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
            page["bytes"][base + 20 : base + 24] = struct.pack("<I", result)
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
            page["bytes"][base + 20 : base + 24] = struct.pack("<I", GENERIC)
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


def not_handled(regs):
    return ("reply", (NOT_HANDLED, *regs[1:]))
