"""Describe errors of pydantic in plain English, for requests and settings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ssvm_worker.units import printable

#: Texts by error type of pydantic. Other types keep the message of pydantic.
_WORDS = {
    "missing": "missing",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_unicode": "must be text that has a UTF-8 form",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object with names and values",
    "model_type": "must be a table with names and values",
    "model_attributes_type": "must be a table with names and values",
    "path_type": "must be a path",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length}",
    "too_long": "must have at most {max_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}
#: The maximum of characters of an unknown name or a wrong choice in an error.
_SHOWN = 60


def describe(error: Mapping[str, Any], known: Iterable[str], path: str) -> str:
    """Return one error of pydantic as ``name: problem``. *known* are valid names, to suggest one for an unknown name.

    The text does not repeat the value, which may be a secret. Only a field with a fixed list of choices compares its
    value with them, to suggest one.
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{path}: unknown{suggestion(str(error['loc'][-1]), known)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = suggestion(error["input"], choices) if isinstance(error.get("input"), str) else ""
        return f"{path}: must be one of {', '.join(choices)}{near}"
    if kind in _WORDS:
        return f"{path}: {_WORDS[kind].format(**context)}"
    return f"{path}: {printable(error['msg'].removeprefix('Value error, '))}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ``, did you mean X?`` with the most similar known name, or an empty text."""
    near = difflib.get_close_matches(name[:_SHOWN], list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def path_of(location: Iterable[Any]) -> str:
    """Return the path of an error with dots. Names of the sender are shortened and made printable."""
    return ".".join(printable(str(each)[:_SHOWN]) for each in location)
