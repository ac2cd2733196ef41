"""What the settings' sections are made of: strict tables, secrets that may stand in files, values with units."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .units import parse_size


class Section(BaseModel):
    """A table of the settings file: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def among(known: Collection[str]) -> AfterValidator:
    """A validator of a list whose items are some of these."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - set(known):
            raise ValueError(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return value

    return AfterValidator(check)


def split(value: Any) -> Any:
    """A list may be given as one comma-separated string, which is all that an environment variable can hold."""
    return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value


def _network(value: str) -> str:
    ipaddress.ip_network(value)
    return value


def _address(value: str) -> str:
    return str(ipaddress.ip_address(value))


Address = Annotated[str, BeforeValidator(_address)]
Network = Annotated[str, BeforeValidator(_network)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(split)]
Seconds = Annotated[float, Field(gt=0)]


class SecretFields(Section):
    """A section with secrets: each may be given as itself, or as ``NAME_file``, the path of a file that holds it."""

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in [each for each in values if each.endswith("_file") and each[:-5] in cls.model_fields]:
            path = Path(str(values.pop(name)))
            try:
                values[name[:-5]] = path.read_text().strip()
            except OSError as error:
                raise ValueError(f"{name} = {path} cannot be read: {error.strerror}") from error
        return values


def _size(value: Any) -> Any:
    """Bytes may be given with a unit; "unlimited" is no limit."""
    if value == "unlimited":
        return None
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int | None, Field(ge=0), BeforeValidator(_size)]
