"""Define the types of settings: strict tables, secrets that files may contain, values with units."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from ssvm_worker.units import parse_duration, parse_rate, parse_size


class Section(BaseModel):
    """A table of the settings file. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def among(known: Collection[str]) -> AfterValidator:
    """Return a validator for lists. It allows the *known* items only."""

    def check(value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - set(known):
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}. Known are {', '.join(known)}")
        return value

    return AfterValidator(check)


def split(value: Any) -> Any:
    """Split a comma-separated string into a list, because an environment variable can only contain a string."""
    return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value


def no_login(value: str | None) -> str | None:
    """Return the URL, or raise ValueError if it contains a login. Other settings contain user and password."""
    if value and "@" in urlsplit(value).netloc:
        raise ValueError("may not contain a user or password. Use the settings for keys")
    return value


def _name(value: str) -> str:
    """Return a name that command lines, URLs, and (with ``_`` for ``.`` and ``-``) variables can contain."""
    if len(value) > 64 or not re.fullmatch(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", value):
        raise ValueError("rename it: up to 64 letters and digits, with single dots, _ or - between them")
    return value


def _network(value: str) -> str:
    ipaddress.ip_network(value)
    return value


def _host_addresses(value: dict[str, str]) -> dict[str, str]:
    for name, address in value.items():
        parts = urlsplit(f"//{address}")
        if not parts.hostname or parts.netloc != address or parts.port == 0 or "@" in address:
            raise ValueError(f"{name}: {address!r} is not a name or address with an optional port")
    return {name.lower(): address for name, address in value.items()}


#: The name or address, with an optional port, for each host name in lower case.
HostAddresses = Annotated[dict[str, str], AfterValidator(_host_addresses)]
Address = Annotated[str, AfterValidator(lambda value: str(ipaddress.ip_address(value)))]
Network = Annotated[str, AfterValidator(_network)]
Networks = Annotated[tuple[Network, ...], BeforeValidator(split)]


@dataclass(frozen=True)
class MustExist:
    """Mark the setting of a path that the worker reads but never creates."""

    kind: Literal["file", "directory"]


def existing_paths(section: Section, place: str = "") -> Iterator[tuple[str, Path, MustExist]]:
    """Yield key, path and mark of each marked path, in a section and all sections inside it."""
    for name, value in section:
        key = f"{place}{name}"
        for part, each in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(each, Section):
                yield from existing_paths(each, f"{key}.{part}." if part else f"{key}.")
        marks = [each for each in type(section).model_fields[name].metadata if isinstance(each, MustExist)]
        paths = value if isinstance(value, tuple) else (value,)
        yield from ((key, path, mark) for mark in marks for path in paths if path)


File = Annotated[Path | None, MustExist("file")]
Directory = Annotated[Path | None, MustExist("directory")]
#: The name of a table that the user chooses, such as that of a store.
Name = Annotated[str, AfterValidator(_name)]


def _seconds(value: Any) -> Any:
    """Convert a time with a unit, such as 90s or 24h, to seconds."""
    return parse_duration(value) if isinstance(value, str) and value.strip()[-1:].isalpha() else value


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_seconds)]


class SecretUrl(SecretStr):
    """A URL that may contain a password. Users see only its scheme, host and path."""


class SecretFields(Section):
    """A section with secrets. ``NAME`` is a secret itself, ``NAME_file`` the path of a file that contains it."""

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in [each for each in values if each.endswith("_file") and each[:-5] in cls.model_fields]:
            path = Path(str(values.pop(name)))
            if name[:-5] in values:
                raise ValueError(f"{name[:-5]} and {name} are both set. Remove one of them")
            try:
                values[name[:-5]] = path.read_text().strip()
            except OSError as error:
                raise ValueError(f"{name} = {path} cannot be read: {error.strerror}") from error
            except UnicodeDecodeError:
                raise ValueError(f"{name} = {path} is not UTF-8 text") from None
        return values


def _size(value: Any) -> Any:
    """Convert a size with a unit to bytes, and "unlimited" to None."""
    if value == "unlimited":
        return None
    return parse_size(value) if isinstance(value, str) else value


Size = Annotated[int | None, Field(ge=0), BeforeValidator(_size)]
#: Bytes, and bytes a second. None is not allowed.
Bytes = Annotated[int, BeforeValidator(lambda value: parse_size(value) if isinstance(value, str) else value)]
Rate = Annotated[int, BeforeValidator(lambda value: parse_rate(value) if isinstance(value, str) else value)]
