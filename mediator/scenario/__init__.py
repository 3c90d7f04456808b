"""Scenarios: what guests do, written down, run in virtual time, and the same each time for the same seed.

    outcome = run_scenario(find_scenario("hello"), seed=1)

`docs/reference/scenario.md` is the language, `mediator/scenario/library/` what is shipped.
"""

from mediator.scenario.catalogue import find_scenario, library
from mediator.scenario.language import Scenario, load_scenario
from mediator.scenario.run import Outcome, run_scenario

__all__ = ["Outcome", "Scenario", "find_scenario", "library", "load_scenario", "run_scenario"]
