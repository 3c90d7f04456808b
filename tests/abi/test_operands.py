"""What registers and RPC parameters mean, compared with the facts."""

import re

import pytest

from optee.abi.rpc import OPERATIONS, RpcCommand
from optee.abi.rpc_operands import Memory, Values, operands_of, operation_of
from optee.abi.smc import Function, RpcReturn
from optee.abi.smc_operands import ANSWERS, ARGUMENTS, DATA_ANSWERS, RPC_RETURNS

from .facts import ABI

FUNCTIONS = ABI["smc_functions"]


def taken(operands):
    """The registers that operands take."""
    return {register for operand in operands for register in range(operand.first, operand.last + 1)}


def used(facts):
    """Register -> prose of a table of registers, without the client id and what is said to be unused or 0."""
    if isinstance(facts, str):
        facts = FUNCTIONS["CALL_WITH_ARG"]["args"]
    registers = {int(name[1:]): text for name, text in facts.items() if re.fullmatch("a[0-6]", name)}
    return {register: str(text) for register, text in registers.items() if text != 0 and "unused" not in str(text)}


def pairs_are_pairs(operands, facts):
    return all(
        re.search("upper|_hi", facts[operand.first]) and re.search("lower|_lo", facts[operand.last])
        for operand in operands
        if operand.pair
    )


@pytest.mark.parametrize("function", Function, ids=str)
def test_arguments_are_those_of_the_facts(function):
    facts = used(FUNCTIONS[function.name]["args"])
    operands = ARGUMENTS.get(function, ())
    assert taken(operands) == set(facts)
    assert pairs_are_pairs(operands, facts)


@pytest.mark.parametrize("function", Function, ids=str)
def test_answers_are_those_of_the_facts(function):
    entry = FUNCTIONS[function.name]
    beside_ok = used(entry.get("ret_ok", {}))
    beside_ok.pop(0, None)
    assert taken(ANSWERS.get(function, ())) == set(beside_ok)
    assert pairs_are_pairs(ANSWERS.get(function, ()), beside_ok)
    data = entry.get("ret", {})
    registers = {int(name[1:]) for name in data} if isinstance(data, dict) else set()
    assert taken(DATA_ANSWERS.get(function, ())) == registers


@pytest.mark.parametrize("rpc", RpcReturn, ids=str)
def test_rpc_returns_are_those_of_the_facts(rpc):
    facts = used(ABI["rpc_returns"][rpc.name]["out"])
    assert taken(RPC_RETURNS[rpc]) == set(facts)
    assert pairs_are_pairs(RPC_RETURNS[rpc], facts)


def declared(text):
    """Kind, direction, and for a value its letters -> first word, of a parameter as the facts put it."""
    kind, direction, rest = re.fullmatch(r"([VM]) (inout|in|out)(.*)", text.partition(";")[0]).groups()
    if kind == "M":
        return kind, direction, {}
    words = {}
    for letters, word in re.findall(r"\b((?:[abc],)*[abc])=([\w.]+)", rest):
        words |= dict.fromkeys(letters.split(","), word)
    return kind, direction, words


def named(operand):
    if isinstance(operand, Memory):
        return "M", operand.direction, {}
    return "V", operand.direction, {letter: name for letter in "abc" if (name := getattr(operand, letter))}


def agree(operand, text):
    """Compare an operand with the prose; a number there is the operation here, or an unnamed constant."""
    kind, direction, words = declared(text)
    own_kind, own_direction, names = named(operand)
    if (kind, direction) != (own_kind, own_direction):
        return False
    meant = {letter: word for letter, word in words.items() if letter in names}
    unnamed = {word for letter, word in words.items() if letter not in names}
    return (
        set(meant) == set(names)
        and unnamed <= {"0"}
        and all(
            word.isdigit() or word == "sub" if name == "operation" else word.isdigit() or name.startswith(word)
            for letter, word in meant.items()
            for name in [names[letter]]
        )
    )


def cases():
    for command in RpcCommand:
        entry = ABI["rpc_commands"][command.name]
        kind = OPERATIONS.get(command)
        if kind is None or "params" in entry:
            yield command, operation_of(command, 0), entry.get("params", [])
            continue
        for operation in kind:
            yield command, operation, entry["sub"][operation.name]["params"]


@pytest.mark.parametrize(("command", "operation", "facts"), [*cases()], ids=str)
def test_rpc_parameters_are_those_of_the_facts(command, operation, facts):
    operands = operands_of(command, operation)
    if command is RpcCommand.SHM_ALLOC:
        facts = [text.partition(";")[0] for text in facts]
    assert len(operands) == len(facts)
    for operand, text in zip(operands, facts, strict=True):
        assert agree(operand, text), (operand, text)


@pytest.mark.parametrize("command", OPERATIONS, ids=str)
def test_an_operation_is_found_by_its_first_value(command):
    for operation in OPERATIONS[command]:
        assert operation_of(command, int(operation)) is operation
        first = operands_of(command, operation)[0]
        assert isinstance(first, Values)
        assert first.a == "operation"
    assert operation_of(command, 1000) == 1000
    assert operands_of(command, 1000) == ()


def test_what_is_not_known_has_no_operands():
    assert operation_of(1000, 0) is None
    assert operands_of(1000, None) == ()
    assert operation_of(RpcCommand.GET_TIME, 5) is None
