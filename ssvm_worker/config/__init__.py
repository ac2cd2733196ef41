"""Reads the settings: defaults, then the TOML file named by SSVM_CONFIG, then the environment.

``SSVM_<SECTION>__<KEY>`` overrides one key: ``SSVM_BROKER__URL``, ``SSVM_STORES__PRIMARY__URL``, ``SSVM_ZONE``.
All that is wrong is reported at once, each key with the nearest right one.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError

from ssvm_worker.errors import ConfigError
from ssvm_worker.net.broker_url import shown

from .findings import describe, path_of, suggestion
from .schema import Settings
from .types import SecretUrl

_LOG = logging.getLogger("ssvm.config")
_PREFIX = "SSVM_"
_FILE = "SSVM_CONFIG"
#: What kubelet and Docker put into the environment for a service whose name begins with "ssvm-".
_OF_A_SERVICE = re.compile(r"SSVM_\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
#: Variables that a warning was logged for: settings are read many times in a process.
_WARNED: set[str] = set()
#: The variable that a key was set by, by the key's path.
_Origins = dict[tuple[str, ...], str]


def load(path: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings in force. *path* wins over SSVM_CONFIG; without either, defaults and the environment.

    Raises ConfigError with every finding.
    """
    file = path or environ.get(_FILE)
    values = _read_toml(Path(file)) if file else {}
    origins, findings = _overlay(values, environ)
    return parse(values, str(file) if file else "the environment", origins, findings)


def parse(
    values: dict[str, Any], where: str, origins: _Origins | None = None, findings: list[str] | None = None
) -> Settings:
    """Validate settings given as plain values; *findings* are those of the environment, which set *origins*."""
    found = list(findings or [])
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        found += [_finding(each, origins or {}) for each in error.errors(include_url=False)]
    if found:
        raise ConfigError("Wrong settings: " + "; ".join(found), where, "Correct these keys") from None
    return settings


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"The settings file cannot be read: {error.strerror}", str(path), f"Check {_FILE}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The settings file is not TOML: {error}", str(path), "Correct that line") from error


def _overlay(values: dict[str, Any], environ: Mapping[str, str]) -> tuple[_Origins, list[str]]:
    """Put the variables into *values*; returns which key is whose, and what is wrong with the variables themselves."""
    origins: _Origins = {}
    findings = []
    for name in sorted(environ):
        words = name.removeprefix(_PREFIX).lower().split("__")
        if not name.startswith(_PREFIX) or name == _FILE or _is_foreign(name, words):
            continue
        if len(words) == 1 and not isinstance(Settings.model_fields[words[0]].default, str | Path):
            findings.append(f"{name}: {words[0]} is a section; set one of its keys, as {name}__KEY")
            continue
        try:
            path = _put(values, words, environ[name])
        except ValueError as error:
            findings.append(f"{name}: {error}")
            continue
        origins[path] = name
    return origins, findings


def _is_foreign(name: str, words: list[str]) -> bool:
    """Return whether to ignore the variable: kubelet sets it, or it names no section. The latter is logged."""
    if words[0] in Settings.model_fields:
        return bool(len(words) == 1 and _OF_A_SERVICE.fullmatch(name))
    if _OF_A_SERVICE.fullmatch(name):
        return True
    if len(words) > 1:
        return False
    if name not in _WARNED:
        _WARNED.add(name)
        known = [f"{_PREFIX}{each.upper()}" for each in Settings.model_fields]
        _LOG.warning("%s is no setting%s", name, suggestion(name, known))
    return True


def _put(values: dict[str, Any], words: list[str], value: str) -> tuple[str, ...]:
    """Set one key, and return its path; ValueError where there is no place for it."""
    *sections, key = words
    table, path = values, []
    for section in sections:
        # Names of stores and the like may have capitals and dashes in the file; a variable can have neither.
        same = [each for each in table if each.lower().replace("-", "_") == section]
        if len(same) > 1:
            raise ValueError(f"it could mean {' or '.join(same)}; rename one of them")
        path.append(same[0] if same else section)
        table = table.setdefault(path[-1], {})
        if not isinstance(table, dict):
            raise ValueError(f"{'.'.join(path)} is a value, not a section")
    table[key] = value
    # A secret may stand in a file or be given as itself; what the environment says goes before either.
    table.pop(key.removesuffix("_file") if key.endswith("_file") else f"{key}_file", None)
    return (*path, key)


def _finding(error: Any, origins: _Origins) -> str:
    """One pydantic error in our words: the key, or the variable that has set it, and what is wrong."""
    location = tuple(str(each) for each in error["loc"])
    name = origins.get(location, "")
    if error["type"] == "value_error":  # a section's own finding names the key: that of a secret's file
        name = name or next((each for path, each in origins.items() if _names(error, location, path)), "")
    else:  # an unknown section, or a value where a variable has put a section
        name = name or next((each for path, each in origins.items() if path[: len(location)] == location), "")
    path = path_of(location)
    known = _keys_of(_table_at(location[:-1])) if error["type"] == "extra_forbidden" else ()
    return describe(error, known, f"{name} ({path})" if name else path)


def _names(error: Any, location: tuple[str, ...], path: tuple[str, ...]) -> bool:
    return path[:-1] == location and re.search(rf"\b{re.escape(path[-1])}\b", error["msg"]) is not None


def _table_at(path: tuple[str, ...]) -> Any:
    """The model of the table at a dotted path of the settings."""
    model: Any = Settings
    for part in path:
        model = typing.get_args(model)[1] if typing.get_origin(model) is dict else model.model_fields[part].annotation
    return model


def _keys_of(model: type[BaseModel]) -> list[str]:
    fields = model.model_fields
    return [*fields, *(f"{name}_file" for name in fields if "Secret" in str(fields[name].annotation))]


def redacted(settings: Settings) -> dict[str, Any]:
    """The effective settings as plain values, secrets as ``***``."""
    return _plain(settings)  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, SecretUrl):
        url = value.get_secret_value()
        return shown(url) if "://" in url else url if url == "embedded" else "***"
    if isinstance(value, SecretStr):
        return "***"
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
