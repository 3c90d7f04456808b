"""What passes the mediator on either side, counted: SMCs of each guest, and messages and RPCs at OP-TEE."""

from collections import Counter, defaultdict

from mediator.board import Board
from optee.abi.message import HEADER, HEADER_SIZE, PARAM, PARAM_SIZE, Command
from optee.abi.rpc import FsOperation, NotificationOperation, RpcCommand
from optee.abi.smc import Function, RpcReturn, from_pair, is_rpc

NAMED = {RpcCommand.FS: FsOperation, RpcCommand.NOTIFICATION: NotificationOperation}


class Traffic:
    """Stands on both sides of a board's mediator; everything is counted by guest (client id)."""

    def __init__(self, board: Board) -> None:
        self.smcs: dict[int, list[str]] = defaultdict(list)
        """Functions in their order, as the guest called them; RETURN_FROM_RPC left out."""
        self.at_optee: Counter[tuple[int, str]] = Counter()
        """(guest, function or message command or RPC command): `RpcCommand.FS` is named with its operation."""
        self._memory = board.machine.memory
        self._argument: dict[tuple[int, int], int | None] = {}
        self._pages: dict[tuple[int, int], int] = {}
        self._asked_for_page: set[tuple[int, int]] = set()
        self._mediate, board.service.mediate = board.service.mediate, self.mediate
        self._call, board.world.call = board.world.call, self.call

    def snapshot(self, client: int) -> Counter[str]:
        """All counters of one guest."""
        return Counter({name: count for (guest, name), count in self.at_optee.items() if guest == client})

    async def mediate(self, vm, vcpu, regs):
        if regs[0] != Function.RETURN_FROM_RPC:
            self.smcs[vm.client_id].append(Function(regs[0]).name)
        return await self._mediate(vm, vcpu, regs)

    def call(self, regs):
        function, client = regs[0], regs[7]
        message = None
        if function in (Function.CALL_WITH_ARG, Function.CALL_WITH_RPC_ARG):
            message = from_pair(regs[1], regs[2])
            command, *_, count = HEADER.unpack(self._memory.read(message, HEADER_SIZE))
        elif function == Function.RETURN_FROM_RPC and (client, regs[3]) in self._asked_for_page:
            self._asked_for_page.discard((client, regs[3]))
            self._pages[client, from_pair(regs[4], regs[5])] = from_pair(regs[1], regs[2])
        answer = self._call(regs)
        if message is not None:
            self.at_optee[client, Command(command).name] += 1
        if not is_rpc(answer[0]):
            return answer
        thread = client, answer[3]
        if message is not None:
            behind = message + HEADER_SIZE + count * PARAM_SIZE
            self._argument[thread] = behind if function == Function.CALL_WITH_RPC_ARG else None
        if answer[0] == RpcReturn.ALLOC:
            self._asked_for_page.add(thread)
        if answer[0] == RpcReturn.CMD:
            self._count(client, self._argument[thread], from_pair(answer[1], answer[2]))
        else:
            self.at_optee[client, RpcReturn(answer[0]).name] += 1
        return answer

    def _count(self, client: int, argument: int | None, cookie: int) -> None:
        at = self._pages[client, cookie] if argument is None else argument
        command, *_ = HEADER.unpack(self._memory.read(at, HEADER_SIZE))
        _, operation, _, _ = PARAM.unpack(self._memory.read(at + HEADER_SIZE, PARAM_SIZE))
        name = RpcCommand(command).name
        if command in NAMED:
            name = f"{name}.{NAMED[command](operation).name}"
        self.at_optee[client, name] += 1
