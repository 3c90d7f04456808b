"""Every line of what a real OP-TEE answered has a test: the page that lists them is complete, and names real tests."""

import re
from pathlib import Path
from uuid import UUID

from mediator.board import Board
from optee.abi.message import Command, Message, Param, ParamType
from optee.abi.smc import HYPERVISOR_CLIENT_ID, Function, RpcReturn, to_pair
from optee.config import Config
from tests.optee.rig import Rig, open_message
from tests.shared import SHARED, needs_shared
from tests.xtest.test_linux_and_xen import Raw

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "optee-model.md"
ROW = re.compile(r"^\| (.+?) \| (`[\w/]+\.py::.+`) \|$", re.MULTILINE)


def table() -> dict[str, list[tuple[str, str]]]:
    """By the first words of a line: (file, test) of each test."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    return {line: re.findall(r"`([\w/]+\.py)::(\w+)`", tests) for line, tests in rows}


@needs_shared
def test_every_line_is_in_the_table_once_and_in_its_order() -> None:
    text = (SHARED / "reference" / "real_answers.md").read_text(encoding="utf-8")
    lines = [line.removeprefix("* ") for line in text.splitlines() if line.startswith("* ")]
    assert len(lines) == 26
    assert [line[: len(key)] for key, line in zip(table(), lines, strict=True)] == list(table())


def test_every_test_that_it_names_exists() -> None:
    assert len(table()) == 26
    for file, function in (test for tests in table().values() for test in tests):
        source = (TESTS / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *(async )?def {function}\(", source, re.MULTILINE), (file, function)


async def test_nothing_that_kills_optee_is_sent_for_the_host() -> None:
    """Guests that come, work, notify and go: for client 0 OP-TEE sees what the host may ask, and no guest's call."""
    async with Board() as board, board.guest("kvm") as first, board.guest("xen"):
        await first.driver.smc(Function.ENABLE_ASYNC_NOTIF, 0, 0, 0, 0, 0, 0, HYPERVISOR_CLIENT_ID)
        await first.driver.smc(Function.DISABLE_SHM_CACHE, 0, 0, 0, 0, 0, 0, 0x10000)
        await first.driver.smc(Function.ENABLE_SHM_CACHE)
    of_the_host = {function for function, client in board.world.inbox if client == HYPERVISOR_CLIENT_ID}
    allowed = {Function.CALLS_UID, Function.GET_THREAD_COUNT, Function.VM_CREATED, Function.VM_DESTROYED}
    assert of_the_host <= allowed | {Function.EXCHANGE_CAPABILITIES, Function.CALLS_REVISION}
    assert Function.ENABLE_ASYNC_NOTIF in {function for function, client in board.world.inbox if client}
    assert board.model.died is None and board.violations == []


async def test_the_rpc_argument_stands_behind_its_own_message() -> None:
    """At message + 32 + 32 * num_params, however many parameters: at OP-TEE, and at a guest through the mediator."""
    nobody = open_message(UUID(int=0x4000_8000_0000_0000_0001))
    for more in range(5):
        message = Message(Command.OPEN_SESSION, params=[*nobody.params, *[Param(ParamType.NONE)] * more])
        at = 32 + 32 * len(message.params)
        rig = Rig(Config(threads=2, early_tas=frozenset()))
        pa = rig.write(message)
        assert rig.call(Function.CALL_WITH_RPC_ARG, *to_pair(pa))[0] == RpcReturn.CMD
        asked = Message.unpack(rig.memory.read(pa + at, 64))
        async with Board(config=Config(early_tas=frozenset())) as board:
            guest = Raw(board, await board.create("kvm"))
            ipa = guest.put(message)
            answer = await guest.smc(Function.CALL_WITH_RPC_ARG, *to_pair(ipa))
            assert answer[0] == RpcReturn.CMD
            mediated = Message.unpack(guest.ram.read(ipa + at, 64))
        assert (asked.cmd, asked.params) == (mediated.cmd, mediated.params)
        assert asked.params[0].b > 0
