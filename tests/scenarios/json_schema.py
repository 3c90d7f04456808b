"""As much of JSON Schema as the schemas of the program use."""

import re
from typing import Any

_NAMES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
    "null": type(None),
}
_SILENT = frozenset({"$schema", "$defs", "title", "description", "default", "discriminator"})


def accepts(schema: dict[str, Any], data: object, root: dict[str, Any] | None = None) -> bool:
    """Whether a document is one that the schema describes. Raises KeyError for a keyword that nothing is known of."""
    root = schema if root is None else root
    return all(_KEYWORDS[word](given, data, schema, root) for word, given in schema.items() if word not in _SILENT)


def _is(kind: str, data: object) -> bool:
    if kind == "boolean":
        return isinstance(data, bool)
    if kind == "integer" and isinstance(data, float):
        return data.is_integer()
    return isinstance(data, _NAMES[kind]) and not isinstance(data, bool)


def _properties(given: Any, data: Any, schema: Any, root: Any) -> bool:
    return not isinstance(data, dict) or all(accepts(given[key], data[key], root) for key in given if key in data)


def _patterns(given: Any, data: Any, schema: Any, root: Any) -> bool:
    return not isinstance(data, dict) or all(
        accepts(wanted, value, root)
        for pattern, wanted in given.items()
        for key, value in data.items()
        if re.search(pattern, key)
    )


def _more(given: Any, data: Any, schema: Any, root: Any) -> bool:
    if not isinstance(data, dict):
        return True
    patterns = schema.get("patternProperties", ())
    rest = [
        key
        for key in data
        if key not in schema.get("properties", ()) and not any(re.search(each, key) for each in patterns)
    ]
    return not rest if given is False else given is True or all(accepts(given, data[key], root) for key in rest)


_KEYWORDS: dict[str, Any] = {
    "$ref": lambda given, data, schema, root: accepts(root["$defs"][given.removeprefix("#/$defs/")], data, root),
    "type": lambda given, data, schema, root: _is(given, data),
    "enum": lambda given, data, schema, root: data in given,
    "const": lambda given, data, schema, root: data == given,
    "anyOf": lambda given, data, schema, root: any(accepts(each, data, root) for each in given),
    "oneOf": lambda given, data, schema, root: sum(accepts(each, data, root) for each in given) == 1,
    "required": lambda given, data, schema, root: not isinstance(data, dict) or set(given) <= set(data),
    "properties": _properties,
    "patternProperties": _patterns,
    "additionalProperties": _more,
    "propertyNames": lambda given, data, schema, root: (
        not isinstance(data, dict) or all(accepts(given, key, root) for key in data)
    ),
    "items": lambda given, data, schema, root: (
        not isinstance(data, list) or all(accepts(given, each, root) for each in data)
    ),
    "pattern": lambda given, data, schema, root: not isinstance(data, str) or re.search(given, data) is not None,
    "minLength": lambda given, data, schema, root: not isinstance(data, str) or len(data) >= given,
    "maxLength": lambda given, data, schema, root: not isinstance(data, str) or len(data) <= given,
    "minItems": lambda given, data, schema, root: not isinstance(data, list) or len(data) >= given,
    "maxItems": lambda given, data, schema, root: not isinstance(data, list) or len(data) <= given,
    "minimum": lambda given, data, schema, root: not _is("number", data) or data >= given,
    "maximum": lambda given, data, schema, root: not _is("number", data) or data <= given,
    "multipleOf": lambda given, data, schema, root: not _is("number", data) or data % given == 0,
}
