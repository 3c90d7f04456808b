"""What a declaration of an intended difference may say."""

from pathlib import Path

import pytest

from mediator.conformance import intended
from mediator.conformance.facts import Facts
from mediator.conformance.intended import CONDITIONS, Declaration, Difference, declarations
from mediator.documents import DocumentError, load_document
from optee.abi.message import Command
from optee.abi.smc import Function

PINS = Difference("pins", {}, {"0x40000": 1})
GOOD = """\
- rule: R11
  step: smc
  functions: [CALL_WITH_ARG]
  fields: [pins]
  condition: register_refused_in_a0
  holds: leftovers
  why: because
"""


def load(text: str) -> list[Declaration]:
    return load_document(intended._Declarations, text, "intended.yaml").root


def test_the_good_one_is_good() -> None:
    (declaration,) = load(GOOD)
    assert declaration.rule == "R11"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("rule: R11", "rule: R30", 1),
        ("rule: R11", "rule: R0", 1),
        ("rule: R11", "rule: B3", 1),
        ("rule: R11", "rule: 11", 1),
        ("step: smc", "step: p2m", 2),
        ("[CALL_WITH_ARG]", "[CALL_WITH_ARGS]", 3),
        ("[CALL_WITH_ARG]", "CALL_WITH_ARG", 3),
        ("fields: [pins]", "fields: []", 4),
        ("register_refused_in_a0", "register_refused", 5),
        ("holds: leftovers", "holds: leftover", 6),
        ("  why: because\n", "", 1),
        ("  why: because\n", "  why: because\n  vector: random_18\n", 8),
    ],
)
def test_an_unknown_word_in_a_declaration_is_refused_where_it_stands(old: str, new: str, line: int) -> None:
    assert old in GOOD
    with pytest.raises(DocumentError) as caught:
        load(GOOD.replace(old, new, 1))
    assert caught.value.lines[0].startswith(f"intended.yaml:{line}:"), caught.value.lines


def test_every_condition_is_declared_for_some_kind() -> None:
    """A declared kind that cannot occur is an error; so is a condition that nobody uses."""
    assert {declaration.condition for declaration in declarations()} == set(CONDITIONS)


def test_a_declaration_covers_its_step_functions_and_fields_only() -> None:
    (declaration,) = load(GOOD)
    facts = Facts(function=Function.CALL_WITH_ARG, command=Command.REGISTER_SHM, final_answer=5)
    assert declaration.covers("smc", facts, PINS)
    assert not declaration.covers("relinquish", facts, PINS)
    for field in ("regs", "state.quota_pages", "forwarded", "forwarded[0].pins_during", "mem_changes", "handled"):
        assert not declaration.covers("smc", facts, Difference(field, (0,) * 8, (1,) * 8)), field
    other = Facts(function=Function.RETURN_FROM_RPC, command=Command.REGISTER_SHM, final_answer=5)
    assert not declaration.covers("smc", other, PINS)


@pytest.mark.parametrize("command", [*Command, None])
@pytest.mark.parametrize("answer", [None, 0, 1, 4, 5])
def test_r11_speaks_of_refused_registrations(command: Command | None, answer: int | None) -> None:
    holds = command is Command.REGISTER_SHM and answer not in (None, 0)
    assert CONDITIONS["register_refused_in_a0"](Facts(command=command, final_answer=answer), PINS) == holds


@pytest.mark.parametrize(
    ("attributes", "pointers", "cookies", "malformed"),
    [
        ((0x20A,), (1,), (1,), False),
        ((0x209,), (1,), (1,), False),
        ((0x20B,), (1,), (1,), False),
        ((0x20A,), (0,), (1,), True),
        ((0x20A,), (1,), (0,), True),
        ((0xA,), (1,), (1,), True),
        ((0x30A,), (1,), (1,), True),
        ((0x206,), (1,), (1,), True),
        ((), (), (), True),
        ((0x20A, 0), (1, 0), (1, 0), True),
    ],
)
def test_r15_speaks_of_malformed_registrations(
    attributes: tuple[int, ...], pointers: tuple[int, ...], cookies: tuple[int, ...], malformed: bool
) -> None:
    def facts(command: Command) -> Facts:
        return Facts(
            command=command, num_params=len(attributes), attributes=attributes, pointers=pointers, cookies=cookies
        )

    condition = CONDITIONS["malformed_registration"]
    assert condition(facts(Command.REGISTER_SHM), PINS) == malformed
    assert condition(facts(Command.UNREGISTER_SHM), PINS) == (len(attributes) != 1)
    assert not condition(facts(Command.INVOKE_COMMAND), PINS)


def test_the_documentation_lists_each_kind_with_its_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = {line for line in page.splitlines() if line.startswith("| R")}
    assert rows == {f"| {kind.rule} | `{kind.condition}` | {kind.why} | {kind.holds} |" for kind in declarations()}
