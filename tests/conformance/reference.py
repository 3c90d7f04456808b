"""A naive model of the reference mediator, from part A of the mediation reference: what it would have recorded.

It reads a vector's inputs and the scripted secure world, and fills in `out`. Plain dictionaries and integers, no numpy,
nothing of our core. That it reproduces every recorded vector is a test; so vectors that nobody recorded can be made.
"""

from copy import deepcopy
from typing import Any

PAGE = 4096
LOW = 0xFFFFFFFF
NOT_HANDLED = 2**64 - 1
GENERIC, BAD_PARAMETERS, OUT_OF_MEMORY, COMMS = 0xFFFF0000, 0xFFFF0006, 0xFFFF000C, 2
OK, ETHREAD_LIMIT, ERESUME, EBADADDR, EBADCMD, ENOMEM, ENOTAVAIL = 0, 1, 3, 4, 5, 6, 7
ALLOC, FREE, INTR, CMD = 0xFFFF0000, 0xFFFF0002, 0xFFFF0004, 0xFFFF0005
CALL, RETURN = 0x32000004, 0x32000003
REGISTER, UNREGISTER = 4, 5
IDENTITIES = {0xBF00FF01: 4, 0xBF00FF03: 2, 0xB2000000: 4, 0xB2000001: 2}
TMEM, RMEM_OUT, TMEM_OUT, VALUE_OUT = (9, 10, 11), (6, 7), (10, 11), (2, 3)
PAGES_PER_BUFFER, BUFFERS, PAGES = 129, 16, 16384


class Fail(Exception):
    """A negative errno."""


def number(data: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(data[at : at + size], "little")


def word(value: int | str) -> int:
    return int(value, 16) if isinstance(value, str) else value


class Domain:
    """The guest's memory, and what the mediator keeps of it."""

    def __init__(self, described: dict[str, Any]) -> None:
        self.id = described["id"]
        self.base = word(described["base_gfn"])
        self.count = described["npages"]
        self.perm = word(described["perm"])
        self.pages = {index: bytearray(PAGE) for index in range(self.count)}
        self.p2m = {self.base + index: (index, "ram_rw") for index in range(self.count)}
        self.flips: list[list[Any]] = []
        self.context = False
        self.pins: dict[int, int] = {}
        self.calls: list[dict[str, Any]] = []
        self.rpcs: dict[int, dict[str, Any]] = {}
        self.bufs: dict[int, dict[str, Any]] = {}
        self.quota_pages = self.quota_bufs = self.call_count = 0

    def pa(self, index: int) -> int:
        return (self.id + 8 << 32) + ((index ^ self.perm) << 12)

    def look_up(self, gfn: int, *types: str) -> bytearray | None:
        """A stage-2 look-up, before which the guest's memory may change."""
        index, kind = self.p2m.get(gfn, (-1, "none"))
        for flip in self.flips:
            if flip[0] == gfn and flip[1] >= 0:
                flip[1] -= 1
                if flip[1] < 0 and index >= 0:
                    self.pages[index][flip[2] : flip[2] + len(flip[3])] = flip[3][: PAGE - flip[2]]
        return self.pages[index] if kind in types else None

    def pin(self, gfn: int) -> int | None:
        if self.look_up(gfn, "ram_rw") is None:
            return None
        index = self.p2m[gfn][0]
        self.pins[index] = self.pins.get(index, 0) + 1
        return index

    def unpin(self, index: int) -> None:
        self.pins[index] -= 1
        if not self.pins[index]:
            del self.pins[index]


class Reference:
    """One vector."""

    def __init__(self, vector: dict[str, Any]) -> None:
        self.vector = vector
        self.domains = {each["id"]: Domain(each) for each in vector["setup"]["domains"]}
        self.threads = vector["setup"]["max_threads"]
        self.args: dict[str, bytearray] = {}
        self.lists: dict[int, list[int]] = {}
        self.shadows = 0
        self.page_fault = self.object_fault = -1

    def run(self) -> dict[str, Any]:
        done = {**self.vector, "steps": []}
        for step in self.vector["steps"]:
            step = deepcopy(step)
            getattr(self, step["op"])(step)
            done["steps"].append(step)
        return done

    # Steps

    def probe(self, step: dict[str, Any]) -> None:
        for forward, function in zip(step["out"]["forwarded"], (0xBF00FF01, 0xB200000F, 0xB200000E), strict=True):
            forward["regs"] = [hex(function), *["0x0"] * 7]

    def create(self, step: dict[str, Any]) -> None:
        domain = self.domain(step["domain"])
        self.begin(step, domain)
        if self.no_object():
            step["out"] = {"rc": -12, "forwarded": []}
            return
        answer = self.forward((0xB200000D, domain.id + 1, 0, 0, 0, 0, 0, 0))
        domain.context = answer[0] == 0
        step["out"] = {"rc": 0 if domain.context else -19, "forwarded": self.forwarded}

    def p2m(self, step: dict[str, Any]) -> None:
        domain = self.domain(step["domain"])
        gfn = word(step["gfn"])
        index = step.get("page_index")
        if index is None:
            index = gfn - domain.base
        if 0 <= index < domain.count:
            domain.p2m[gfn] = (index, step["type"])

    def flip(self, step: dict[str, Any]) -> None:
        value = (word(step["value"]) & (1 << 8 * step["size"]) - 1).to_bytes(step["size"], "little")
        flip = [word(step["gfn"]), step["nth_lookup"], step["offset"], value]
        self.domain(step["domain"]).flips.append(flip)

    def alloc_fault(self, step: dict[str, Any]) -> None:
        self.page_fault, self.object_fault = step["heap_page_alloc_nth"], step["xzalloc_nth"]

    def relinquish(self, step: dict[str, Any]) -> None:
        domain = self.domain(step["domain"])
        self.begin(step, domain)
        checks = 0

        def preempted() -> bool:
            nonlocal checks
            checks += 1
            return checks - 1 == step["preempt_after"]

        rc = 0
        if domain.context:
            domain.calls.clear()
            domain.call_count = 0
            rc = -85 if preempted() else 0
            if not rc:
                for cookie in list(domain.rpcs):
                    self.free_rpc(domain, cookie)
                for cookie in list(domain.bufs):
                    if preempted():
                        rc = -85
                        break
                    self.free_buffer(domain, cookie)
            if not rc:
                rc = -85 if preempted() else 0
            if not rc:
                self.forward((0xB200000E, domain.id + 1, 0, 0, 0, 0, 0, 0))
                domain.context = False
                domain.quota_pages = domain.quota_bufs = 0
        step["out"] = {"rc": rc, "forwarded": self.forwarded, **self.held(domain)}

    def smc(self, step: dict[str, Any]) -> None:
        domain = self.domain(step["domain"])
        for write in step.get("mem_writes") or []:
            data = bytes.fromhex(write["hex"]) + bytes(write.get("zeros_after", 0))
            at = word(write["ipa"])
            while data:
                index, _ = domain.p2m.get(at >> 12, (-1, "none"))
                room = PAGE - at % PAGE
                if index < 0:
                    index = (at >> 12) - domain.base
                if 0 <= index < domain.count:
                    domain.pages[index][at % PAGE : at % PAGE + len(data[:room])] = data[:room]
                data, at = data[room:], at + room
        before = {each.id: [bytes(page) for page in each.pages.values()] for each in self.domains.values()}
        self.begin(step, domain)
        self.regs = [word(each) for each in step["regs"]]
        handled = domain.context and self.call(domain, self.regs[0] & LOW)
        regs = self.regs if handled else [NOT_HANDLED, *self.regs[1:]]
        step["out"] = {
            "handled": handled,
            "regs": [hex(each) for each in regs],
            "forwarded": self.forwarded,
            "mem_changes": [change for each in self.domains.values() for change in changes(each, before[each.id])],
            **self.held(domain),
        }

    # What the harness does

    def domain(self, number: int) -> Domain:
        if number not in self.domains:
            first = self.vector["setup"]["domains"][0]
            same = {"base_gfn": first["base_gfn"], "perm": first["perm"]}
            self.domains[number] = Domain({"id": number, "npages": 64, **same})
        return self.domains[number]

    def begin(self, step: dict[str, Any], domain: Domain) -> None:
        self.serving = domain
        recorded = step.get("out", {}).get("forwarded", [])
        self.answers = [each["answer"] for each in recorded]
        self.forwarded: list[dict[str, Any]] = []

    def forward(self, regs: tuple[int, ...], **seen: Any) -> list[int]:
        number = len(self.forwarded)
        answer = self.answers[number] if number < len(self.answers) else {"ret": ["0x0"] * 4}
        self.forwarded.append({"regs": [hex(each) for each in regs], **seen, "answer": answer})
        for target, offset, data in answer.get("writes", ()):
            page = self.args.get(target)
            if target.startswith("rpc:"):
                rpc = self.serving.rpcs.get(int(target[4:], 16))
                page = None if rpc is None else rpc["page"]
            if page is not None:
                page[offset : offset + len(data) // 2] = bytes.fromhex(data)
        return [word(each) for each in answer["ret"]]

    def held(self, domain: Domain) -> dict[str, Any]:
        if not domain.context:
            return {"pins": self.pins(domain), "state": {"tee_ctx": False}}
        return {
            "pins": self.pins(domain),
            "state": {
                "call_count": domain.call_count,
                "quota_pages": domain.quota_pages,
                "quota_bufs": domain.quota_bufs,
                "rpc_bufs": len(domain.rpcs),
                "shm_bufs": [
                    {"cookie": hex(cookie), "pages": len(each["pages"]), "has_page_list": each["list"] is not None}
                    for cookie, each in domain.bufs.items()
                ],
            },
        }

    def pins(self, domain: Domain) -> dict[str, dict[str, int]]:
        return {str(domain.id): {hex(domain.base + index): count for index, count in sorted(domain.pins.items())}}

    def no_page(self) -> bool:
        due, self.page_fault = self.page_fault == 0, max(self.page_fault - 1, -1)
        return due

    def no_object(self) -> bool:
        due, self.object_fault = self.object_fault == 0, max(self.object_fault - 1, -1)
        return due

    # Fast calls

    def call(self, domain: Domain, function: int) -> bool:
        regs, client = self.regs, domain.id + 1
        if function == 0xBF00FF00:
            regs[0] = 11
        elif function in IDENTITIES:
            answer = self.forward((function, 0, 0, 0, 0, 0, 0, client))
            regs[: IDENTITIES[function]] = answer[: IDENTITIES[function]]
        elif function == 0xB200000B:
            regs[0] = self.forward((function, 0, 0, 0, 0, 0, 0, client))[0]
        elif function == 0xB200000A:
            answer = self.forward((function, 0, 0, 0, 0, 0, 0, client))
            regs[0] = answer[0]
            if answer[0] == OK:
                regs[1:3] = answer[1:3]
                self.free_rpc(domain, pair(answer[1], answer[2]))
        elif function == 0xB2000007:
            regs[0] = ENOTAVAIL
        elif function == 0xB2000009:
            answer = self.forward((function, regs[1] & 1, 0, 0, 0, 0, 0, client))
            regs[0] = answer[0]
            if answer[0] == OK:
                if answer[1] & 4:
                    regs[1] = answer[1] & 0x16
                else:
                    regs[0] = ENOTAVAIL
        elif function == CALL:
            regs[0] = self.call_with_arg(domain)
        elif function == RETURN:
            regs[0] = self.resume(domain)
        else:
            return False
        return True

    # Yielding calls

    def call_with_arg(self, domain: Domain) -> int:
        if domain.call_count >= self.threads:
            return ETHREAD_LIMIT
        if self.no_object():
            return ENOMEM
        ipa = pair(self.regs[1], self.regs[2])
        if ipa % PAGE:
            return EBADADDR
        if self.no_page():
            return ENOMEM
        page = domain.look_up(ipa >> 12, "ram_rw", "ram_ro")
        if page is None:
            return EBADADDR
        shadow = bytearray(page)
        call = {"ipa": ipa, "page": shadow, "thread": None, "op": 0, "words": (0, 0), "list": None, "kind": 0}
        if number(shadow, 28, 4) > 127:
            self.reject(domain, call, BAD_PARAMETERS, params=0)
            return self.regs[0]
        command = number(shadow, 0, 4)
        if command > 5:
            return EBADCMD
        try:
            for at in range(32, 32 + 32 * number(shadow, 28, 4), 32):
                self.translate(domain, shadow, at)
        except Fail as fail:
            self.reject(domain, call, OUT_OF_MEMORY if fail.args[0] == -12 else BAD_PARAMETERS)
            return OK
        domain.calls.append(call)
        domain.call_count += 1
        name = f"arg:{self.shadows}"
        self.shadows += 1
        self.args[name] = shadow
        call["name"] = name
        regs = (CALL, 0x10, 0, 1, 0, 0, 0, domain.id + 1)
        answer = self.forward(regs, sym={"a1:a2": name}, arg=self.seen(domain, shadow), pins_during=self.pins(domain))
        return self.answered(domain, call, answer)

    def reject(self, domain: Domain, call: dict[str, Any], result: int, params: int | None = None) -> None:
        shadow = call["page"]
        shadow[20:28] = result.to_bytes(4, "little") + COMMS.to_bytes(4, "little")
        if params is not None:
            shadow[28:32] = params.to_bytes(4, "little")
        self.copy_back(domain, call)

    def copy_back(self, domain: Domain, call: dict[str, Any]) -> None:
        page, shadow = domain.look_up(call["ipa"] >> 12, "ram_rw"), call["page"]
        if page is None:
            return
        page[8:12], page[20:28] = shadow[8:12], shadow[20:28]
        for at in range(32, 32 + 32 * min(number(shadow, 28, 4), 127), 32):
            kind = shadow[at]
            if kind in (*TMEM_OUT, *RMEM_OUT):
                page[at + 16 : at + 24] = shadow[at + 16 : at + 24]
            elif kind in VALUE_OUT:
                page[at + 8 : at + 32] = shadow[at + 8 : at + 32]

    def answered(self, domain: Domain, call: dict[str, Any], answer: list[int]) -> int:
        while answer[0] & 0xFFFF0000 == 0xFFFF0000 and answer[0] & LOW != LOW:
            call["op"], call["words"], call["thread"] = answer[0] & LOW, (answer[1], answer[2]), answer[3] & LOW
            self.regs[1:4] = answer[1:4]
            if self.rpc(domain, call, answer):
                return answer[0]
            again = (RETURN, 0, 0, answer[3], 0, 0, 0, domain.id + 1)
            answer = self.forward(again, resumes="CMD", pins_during=self.pins(domain))
        shadow = call["page"]
        self.copy_back(domain, call)
        del self.args[call["name"]]
        domain.calls.remove(call)
        domain.call_count -= 1
        command, good = number(shadow, 0, 4), number(shadow, 20, 4) == 0
        cookie = number(shadow, 56)
        if command == REGISTER:
            if good:
                if cookie in domain.bufs:
                    domain.bufs[cookie]["list"] = None
            else:
                self.free_buffer(domain, cookie)
        elif command == UNREGISTER:
            if good:
                self.free_buffer(domain, cookie)
        else:
            for at in range(32, 32 + 32 * min(number(shadow, 28, 4), 127), 32):
                if shadow[at] in TMEM:
                    self.free_buffer(domain, number(shadow, at + 24))
        return answer[0]

    def rpc(self, domain: Domain, call: dict[str, Any], answer: list[int]) -> bool:
        """Whether the request reached the guest."""
        cookie = pair(answer[1], answer[2])
        if call["op"] == FREE:
            self.free_rpc(domain, cookie)
        elif call["op"] == CMD:
            rpc = domain.rpcs.get(cookie)
            if rpc is None:
                return True
            data = rpc["page"][: 32 + 32 * number(rpc["page"], 28, 4)]
            page = domain.look_up(rpc["gfn"], "ram_rw", "ram_ro")
            if page is None:
                rpc["page"][20:24] = GENERIC.to_bytes(4, "little")
                return False
            page[: len(data)] = data[:PAGE]
            if number(data, 0, 4) == 6:
                call["kind"] = number(data, 40)
            elif number(data, 0, 4) == 7:
                self.free_buffer(domain, number(data, 48))
        return True

    def resume(self, domain: Domain) -> int:
        thread = self.regs[3] & LOW
        call = next((each for each in domain.calls if each["thread"] == thread), None)
        if call is None:
            return ERESUME
        client = domain.id + 1
        resumes = {ALLOC: "ALLOC", CMD: "CMD", FREE: "FREE", INTR: "INTR"}.get(
            call["op"], f"UNKNOWN{call['op'] & 0xFFFF:x}"
        )
        if call["op"] == ALLOC:
            call["thread"] = None
            cookie = pair(self.regs[4], self.regs[5])
            given = self.allocate(domain, cookie)
            regs = (RETURN, 0x10 if given else 0, 0, *self.regs[3:6], 0, client)
            more = {"sym": {"a1:a2": f"rpc:{cookie:x}"}} if given else {}
            answer = self.forward(regs, resumes=resumes, pins_during=self.pins(domain), **more)
        elif call["op"] == CMD:
            cookie = pair(self.regs[1], self.regs[2])
            rpc = domain.rpcs.get(cookie)
            if rpc is None:
                return ERESUME
            call["thread"] = None
            if call.pop("freeing", False):
                rpc["page"][20:24], rpc["page"][28:32] = GENERIC.to_bytes(4, "little"), bytes(4)
            elif self.reply(domain, call, rpc):
                call["thread"] = thread
                return CMD
            regs = (RETURN, 0, 0, self.regs[3], 0, 0, 0, client)
            seen = self.seen(domain, rpc["page"])
            held = self.pins(domain)
            answer = self.forward(regs, resumes=resumes, rpc_arg=seen, rpc_cookie=hex(cookie), pins_during=held)
        else:
            call["thread"] = None
            regs = (RETURN, *call["words"], thread, 0, 0, 0, client)
            answer = self.forward(regs, resumes=resumes, pins_during=self.pins(domain))
        return self.answered(domain, call, answer)

    def allocate(self, domain: Domain, cookie: int) -> bool:
        ipa = pair(self.regs[1], self.regs[2])
        if ipa % PAGE or self.no_object():
            return False
        index = domain.pin(ipa >> 12)
        if index is None:
            return False
        if cookie in domain.rpcs or self.no_page():
            domain.unpin(index)
            return False
        domain.rpcs[cookie] = {"gfn": ipa >> 12, "pin": index, "page": bytearray(b"\xa5" * PAGE)}
        return True

    def reply(self, domain: Domain, call: dict[str, Any], rpc: dict[str, Any]) -> bool:
        """Take over a reply; whether the guest was asked to free something instead."""
        shadow = rpc["page"]
        page = domain.look_up(rpc["gfn"], "ram_rw", "ram_ro")
        if page is not None:
            shadow[:32] = page[:32]
            size = 32 + 32 * number(shadow, 28, 4)
            page = domain.look_up(rpc["gfn"], "ram_rw", "ram_ro") if size <= PAGE else None
        if page is None:
            shadow[20:24] = GENERIC.to_bytes(4, "little")
            return False
        shadow[:size] = page[:size]
        good = number(shadow, 20, 4) == 0 and number(shadow, 28, 4) == 1
        if number(shadow, 0, 4) != 6 or not good or number(shadow, 32) != 0x20A:
            return False
        old = domain.bufs.get(call["list"]) if call["list"] is not None else None
        if old is not None:
            old["list"] = None
        try:
            self.translate(domain, shadow, 32)
        except Fail:
            call["list"] = None
            cookie = number(shadow, 56)
            shadow[0:4], shadow[20:24], shadow[28:32] = (
                (7).to_bytes(4, "little"),
                GENERIC.to_bytes(4, "little"),
                b"\1\0\0\0",
            )
            shadow[32:56] = b"".join(each.to_bytes(8, "little") for each in (1, call["kind"], cookie))
            page = domain.look_up(rpc["gfn"], "ram_rw", "ram_ro")
            if page is None:
                shadow[20:24], shadow[28:32] = GENERIC.to_bytes(4, "little"), bytes(4)
                return False
            page[:64] = shadow[:64]
            call["freeing"] = True
            self.regs[1:3] = call["words"]
            return True
        call["list"] = number(shadow, 56)
        return False

    # Buffers

    def translate(self, domain: Domain, message: bytearray, at: int) -> None:
        attribute, pointer, size, cookie = (number(message, at + each) for each in (0, 8, 16, 24))
        if attribute & 0xFF not in TMEM or not pointer:
            return
        if not attribute & 0x200:
            raise Fail(-22)
        count = ((size + pointer % PAGE + PAGE - 1) % 2**64) // PAGE % 2**32
        if count > PAGES_PER_BUFFER:
            raise Fail(-12)
        if self.no_page() or domain.quota_bufs >= BUFFERS or domain.quota_pages + count >= PAGES or self.no_object():
            raise Fail(-12)
        if cookie in domain.bufs:
            raise Fail(-22)
        domain.quota_bufs += 1
        domain.quota_pages += count
        buffer = domain.bufs[cookie] = {"pages": [], "pins": [], "list": pointer % PAGE}
        page = domain.look_up(pointer >> 12, "ram_rw")
        for entry in range(count):
            index = None if page is None else domain.pin(number(page, entry % 511 * 8) >> 12)
            if index is None:
                self.free_buffer(domain, cookie)
                raise Fail(-22)
            buffer["pages"].append(index)
            if entry % 511 == 510 and page is not None:
                page = domain.look_up(number(page, 4088) >> 12, "ram_rw")
        message[at + 8 : at + 16] = (0x1000000000 + pointer % PAGE).to_bytes(8, "little")
        self.lists[cookie] = list(buffer["pages"])

    def free_buffer(self, domain: Domain, cookie: int) -> None:
        buffer = domain.bufs.pop(cookie, None)
        if buffer is not None:
            for index in buffer["pages"]:
                domain.unpin(index)
            domain.quota_bufs -= 1
            domain.quota_pages -= len(buffer["pages"])

    def free_rpc(self, domain: Domain, cookie: int) -> None:
        rpc = domain.rpcs.pop(cookie, None)
        if rpc is not None:
            domain.unpin(rpc["pin"])

    def seen(self, domain: Domain, page: bytearray) -> dict[str, Any]:
        """A message as the recorder writes it down."""
        count = number(page, 28, 4)
        data = bytearray(page[: 32 + 32 * count])
        lists = {}
        for at in range(32, min(len(data), PAGE), 32):
            attribute, pointer, size, cookie = (number(data, at + each) for each in (0, 8, 16, 24))
            if attribute & 0xFF in TMEM and attribute & 0x200 and pointer >> 36 == 1:
                offset = pointer % PAGE
                data[at + 8 : at + 16] = offset.to_bytes(8, "little")
                pages = self.lists.get(cookie, [])
                lists[str(at // 32 - 1)] = {
                    "offset": offset,
                    "n_pages_from_size": (size + offset + PAGE - 1) // PAGE,
                    "list_pages": 1,
                    "pages": [[domain.id, hex(domain.base + index)] for index in pages],
                }
        return {"owner": "mediator", "hex": data.hex(), "num_params": count, **({"translated": lists} if lists else {})}


def pair(high: int, low: int) -> int:
    return (high & LOW) << 32 | low & LOW


def changes(domain: Domain, before: list[bytes]) -> list[dict[str, Any]]:
    """Runs of bytes that differ; runs closer than 8 bytes are one."""
    found: list[dict[str, Any]] = []
    for index, old in enumerate(before):
        new = domain.pages[index]
        if new == old:
            continue
        start = last = None
        runs = []
        for at in range(PAGE):
            if old[at] != new[at]:
                if last is None or start is None or at - last >= 8:
                    start = at
                    runs.append([at, at])
                last = at
                runs[-1][1] = at
        base = (domain.base + index) * PAGE
        found += [{"domain": domain.id, "ipa": hex(base + a), "hex": bytes(new[a : b + 1]).hex()} for a, b in runs]
    return found
