"""Write `docs/reference/scenario-library.md` from the scenarios that are shipped.

    python docs/library.py           print the page as it should be
    python docs/library.py --write   bring the page up to date

The packages must be installed (CONTRIBUTING says how).
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from mediator.scenario import Scenario, find_scenario, library

PAGE: Final = Path(__file__).with_name("reference") / "scenario-library.md"
RULES: Final = tuple(f"R{number}" for number in range(1, 30))
CLASSES: Final = tuple(f"B{number}" for number in range(1, 16))

_TEXT: Final = """# The library of scenarios

These are shipped. `mediator run NAME` runs one, `mediator run` all of them; [how they are written](scenario.md). This
page is made from them by `docs/library.py`.

Those for any number of guests take `--guests N`. Those marked *quick* are run often, with many seeds.

{scenarios}

## By rule

Which scenario shows which [rule of the mediator](../design.md): it fails where the rule is broken in our code
(`tests/scenarios/test_rules.py`).

{rules}

## By class of mistakes

Which scenario would find which [class of mistakes](../threat_model.md):

{classes}
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def showing(name: str, scenarios: Iterable[Scenario]) -> list[str]:
    """The scenarios that name a rule or a class."""
    return [scenario.scenario for scenario in scenarios if name in (*scenario.rules, *scenario.classes)]


def page() -> str:
    """The whole page."""
    scenarios = [find_scenario(name) for name in library()]
    rows = [
        (
            f"`{scenario.scenario}`",
            scenario.purpose,
            "any" if scenario.parametrised else str(len(scenario.machine.specs(None))),
            "quick" if scenario.quick else "",
        )
        for scenario in scenarios
    ]
    by_rule = [(rule, ", ".join(f"`{name}`" for name in showing(rule, scenarios))) for rule in RULES]
    by_class = [(each, ", ".join(f"`{name}`" for name in showing(each, scenarios))) for each in CLASSES]
    return _TEXT.format(
        scenarios=table(("scenario", "purpose", "guests", ""), rows),
        rules=table(("rule", "scenarios"), by_rule),
        classes=table(("class", "scenarios"), by_class),
    )


def main() -> None:
    """Print the page, or write it."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
