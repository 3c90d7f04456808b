"""`mediator show`: what is built in."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mediator.cli.options import Json
from mediator.cli.output import GOOD, BadInput, emit, emit_json, heading, show, table

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT: Final = "mediator-abi/1"

app = typer.Typer(help="Print what is built in: policies, the ABI, schemas.", rich_markup_mode="rich")


@app.callback()
def _show() -> None:
    pass


@app.command()
def policy(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The policy to print; none: list them.")] = None,
) -> int:
    """Print a built-in policy as YAML, to be used as it is or to start from."""
    from mediator.policies import BUILT_IN, load_policy, policy_text

    if name is None:
        show(table("policy", "purpose", rows=[(known, load_policy(known).purpose) for known in BUILT_IN]))
    elif name in BUILT_IN:
        emit(policy_text(name).rstrip("\n"))
    else:
        raise BadInput(f"show policy: {name!r} is none of {', '.join(BUILT_IN)}")
    return GOOD


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="policy|scenario", help="Which document's schema.")],
) -> int:
    """Print the JSON Schema of a document, for editors."""
    from pydantic import BaseModel
    from pydantic.json_schema import GenerateJsonSchema

    from mediator.scenario.expressions import Expression

    model: type[BaseModel]
    if kind == "policy":
        from mediator.policies import PolicyDocument

        model = PolicyDocument
    elif kind == "scenario":
        from mediator.scenario.language import Scenario

        model = Scenario
    else:
        raise BadInput(f"show schema: there is a schema of policy and of scenario, none of {kind!r}")

    class ByName(GenerateJsonSchema):
        """Documents name the members of enumerations; numbers are the ABI's."""

        def encode_default(self, dft: Any) -> Any:
            """Sizes and names are shown as they are written."""
            return super().encode_default(dft.text if isinstance(dft, Expression) else dft)

        def dict_schema(self, schema: Any) -> dict[str, Any]:
            """A key that has not the pattern of the keys is none."""
            made = super().dict_schema(schema)
            if "patternProperties" in made:
                made["additionalProperties"] = False
            return made

        def enum_schema(self, schema: Any) -> dict[str, Any]:
            made = super().enum_schema(schema)
            if all(isinstance(member, int) for member in schema["members"]):
                made["enum"] = [member.name for member in schema["members"]]
                made["type"] = "string"
            return made

    document = model.model_json_schema(schema_generator=ByName)
    emit_json({"$schema": ByName.schema_dialect, **document})
    return GOOD


@app.command()
def abi(json: Json = False) -> int:
    """Print the ABI: functions, codes, capabilities, commands, attribute types, results."""
    groups = _groups()
    if json:
        emit_json({"format": FORMAT, **{key: _numbers(rows) for key, _, rows in groups}})
        return GOOD
    parts: list[RenderableType] = []
    for _, title, rows in groups:
        extra = ("",) * (max(map(len, rows)) - 2)
        words = [(row[0], _hex(row[1]), *row[2:]) for row in rows]
        parts += [heading(title), table("name", "value", *extra, rows=words)]
    show(*parts)
    return GOOD


Row = tuple[Any, ...]
"""Name, number, and words about it."""


def _groups() -> list[tuple[str, str, list[Row]]]:
    from optee.abi.results import Origin, Result
    from optee.abi.rpc import OPERATIONS, RpcCommand
    from optee.abi.smc import Function, FunctionId, NsecCapability, ReturnCode, RpcReturn, SecCapability
    from optee.abi.terms import Command, ParamType

    functions = [(each.name, each.value, "fast" if FunctionId(each).fast else "yielding") for each in Function]
    commands = [
        (
            each.name,
            each.value,
            ", ".join(f"{operation.name} {operation.value}" for operation in OPERATIONS.get(each, ())),
        )
        for each in RpcCommand
    ]
    attributes = [(name, int(kind), _shared(name)) for name, kind in ParamType.__members__.items()]
    return [
        ("functions", "functions (a0 of a call)", functions),
        ("return_codes", "return codes (a0 of an answer)", _rows(ReturnCode)),
        ("rpcs", "RPCs (a0 of a call that suspends)", _rows(RpcReturn)),
        ("nsec_capabilities", "capabilities of the normal world", _rows(NsecCapability)),
        ("sec_capabilities", "capabilities of the secure world", _rows(SecCapability)),
        ("commands", "commands of a message", _rows(Command)),
        ("rpc_commands", "commands of an RPC argument, with their operations", commands),
        ("attribute_types", "types of a parameter (low byte of its attribute)", attributes),
        ("results", "results (ret of a message)", _rows(Result)),
        ("origins", "origins of a result", _rows(Origin)),
    ]


def _rows(members: Iterable[Any]) -> list[Row]:
    return [(member.name, int(member)) for member in members]


def _shared(name: str) -> str:
    return "with FF-A, in the place of RMEM" if name.startswith("FMEM") else ""


def _numbers(rows: list[Row]) -> dict[str, str]:
    return {row[0]: hex(row[1]) for row in rows}


def _hex(value: int) -> str:
    return f"{value:#x}" if value < 1 << 31 else f"{value:#010x}"
