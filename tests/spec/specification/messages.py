"""Messages: read once, looked at, laid out for OP-TEE; and where their bytes are in the guest (R5, R8, R14, R15)."""

from tests.spec.specification.buffers import Buffers
from tests.spec.specification.terms import (
    BAD_PARAMETERS,
    COMMANDS,
    EBADADDR,
    EBADCMD,
    ENOMEM,
    GENERIC,
    LOW,
    PAGE,
    RMEM,
    SIZE_BACK,
    BadAddress,
    Refused,
    Rejected,
    fresh_page,
    header,
    pair,
    params,
    set_ret,
)


class Messages(Buffers):
    """The message of a call, in a page of the guest's or in a buffer that it registered."""

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
        set_ret(call["shadow"], GENERIC)  # R11
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
                number = self.find(guest, cookie, "REGISTERED")
                if number is not None:
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
        number = self.find(guest, cookie, "REGISTERED")
        if number is None:
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
