"""What the settings' sections are made of: strict tables, secrets that may stand in files, values with units."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from ssvm_worker.units import parse_duration, parse_rate, parse_size


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


def no_login(value: str | None) -> str | None:
    """A validator of URLs that people see: user and password have settings of their own."""
    if value and "@" in urlsplit(value).netloc:
        raise ValueError("may not hold a user or password; there are settings for keys")
    return value


def _network(value: str) -> str:
    ipaddress.ip_network(value)
    return value


def _address(value: str) -> str:
    return str(ipaddress.ip_address(value))


Address = Annotated[str, BeforeValidator(_address)]
Network = Annotated[str, BeforeValidator(_network)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(split)]


def _seconds(value: Any) -> Any:
    """Seconds may be given with a unit, as 90s or 24h."""
    return parse_duration(value) if isinstance(value, str) and value.strip()[-1:].isalpha() else value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_seconds)]


class SecretUrl(SecretStr):
    """A URL that may hold a password: people see its scheme, host and path."""


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
            except UnicodeDecodeError:
                raise ValueError(f"{name} = {path} is not UTF-8 text") from None
        return values


def _size(value: Any) -> Any:
    """Bytes may be given with a unit; "unlimited" is no limit."""
    if value == "unlimited":
        return None
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int | None, Field(ge=0), BeforeValidator(_size)]
#: Bytes, and bytes a second, that must be given.
Bytes = Annotated[int, BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)]
Rate = Annotated[int, BeforeValidator(lambda value: parse_rate(value) if isinstance(value, str) else value)]
