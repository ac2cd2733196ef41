"""Reads the settings: defaults, then the TOML file named by SSVM_CONFIG, then the environment.

``SSVM_<SECTION>__<KEY>`` overrides one key: ``SSVM_BROKER__URL``, ``SSVM_STORES__PRIMARY__URL``, ``SSVM_ZONE``.
All that is wrong is reported at once, each key with the nearest right one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError

from .errors import ConfigError
from .settings import Settings

_PREFIX = "SSVM_"
_FILE = "SSVM_CONFIG"


def load(path: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings in force. *path* wins over SSVM_CONFIG; without either, defaults and the environment.

    Raises ConfigError with every finding.
    """
    file = path or environ.get(_FILE)
    values = _read_toml(Path(file)) if file else {}
    _overlay(values, environ)
    return parse(values, str(file) if file else "the environment")


def parse(values: dict[str, Any], where: str) -> Settings:
    """Validate settings given as plain values."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        findings = [_finding(each) for each in error.errors(include_url=False, include_input=False)]
        raise ConfigError("Wrong settings: " + "; ".join(findings), where, "Mend these keys") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"The settings file cannot be read: {error.strerror}", str(path), f"Check {_FILE}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file is not TOML: {error}", str(path), "Mend that line") from error


def _overlay(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    for name in sorted(environ):
        if not name.startswith(_PREFIX) or name == _FILE:
            continue
        *sections, key = name.removeprefix(_PREFIX).lower().split("__")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = environ[name]
        # A secret may stand in a file or be given as itself; what the environment says goes before either.
        table.pop(key.removesuffix("_file") if key.endswith("_file") else f"{key}_file", None)


def _finding(error: Any) -> str:
    """One pydantic error in our words: the dotted key, what is wrong, the nearest right key."""
    location = [str(each) for each in error["loc"]]
    key = ".".join(location)
    if error["type"] != "extra_forbidden":
        return f"{key}: {error['msg'].removeprefix('Value error, ')}"
    near = difflib.get_close_matches(location[-1], _keys_of(_table_at(location[:-1])), n=1, cutoff=0.5)
    return f"{key}: unknown" + (f", did you mean {near[0]}?" if near else "")


def _table_at(path: list[str]) -> Any:
    """The model of the table at a dotted path of the settings."""
    model: Any = Settings
    for part in path:
        model = typing.get_args(model)[1] if typing.get_origin(model) is dict else model.model_fields[part].annotation
    return model


def _keys_of(model: type[BaseModel]) -> list[str]:
    fields = model.model_fields
    return [*fields, *(f"{name}_file" for name in fields if "SecretStr" in str(fields[name].annotation))]


def redacted(settings: Settings) -> dict[str, Any]:
    """The effective settings as plain values, secrets as ``***``."""
    return _plain(settings)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _masked(text: str) -> str:
    """A broker's URL keeps everything but its user and password; any other secret is ``***``."""
    scheme, found, rest = text.partition("://")
    if text == "embedded" or (found and "@" not in rest):
        return text
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if found else "***"
