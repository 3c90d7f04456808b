"""The ABI's facts as data, to compare the code with."""

from pathlib import Path
from typing import ClassVar

import yaml


class FactsLoader(yaml.SafeLoader):
    """A loader to which `off` is a word: the facts have offsets, and YAML 1.1 takes their name for a boolean."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


PATH = Path(__file__).parents[1] / "data" / "abi.yaml"
ABI = yaml.load(PATH.read_text(), FactsLoader)


def values(table, skip=()):
    """Name -> value of a table whose entries are numbers or mappings with `value`; prose is left out."""
    result = {}
    for name, entry in table.items():
        value = entry.get("value") if isinstance(entry, dict) else entry
        if isinstance(value, int) and name not in skip:
            result[name] = value
    return result
