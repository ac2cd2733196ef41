"""Says in plain English what pydantic has found, for requests and settings alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ssvm_worker.units import printable

#: By pydantic's error types; a type that is not here keeps pydantic's own message.
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
#: Characters of an unknown name, or of a wrong choice, that an error repeats.
_SHOWN = 60


def describe(error: Mapping[str, Any], known: Iterable[str], path: str) -> str:
    """One error of pydantic as ``name: what is wrong``; *known*: the names that could stand where an unknown one does.

    The value is not repeated, as it may be a secret; only where a field has a list of choices, to suggest one of them.
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
    """``, did you mean X?`` for the known name that is nearest, or nothing."""
    near = difflib.get_close_matches(name[:_SHOWN], list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def path_of(location: Iterable[Any]) -> str:
    """The place of an error, dotted; what the sender has named is cut short and made printable."""
    return ".".join(printable(str(each)[:_SHOWN]) for each in location)
