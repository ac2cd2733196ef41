"""Load the settings: defaults, then one TOML file, then the environment.

The file is that of `--config`, else that of SSVM_CONFIG, else /etc/ssvm/worker.toml if it exists.
``SSVM_<SECTION>__<KEY>`` overrides one key: ``SSVM_BROKER__URL``, ``SSVM_STORES__PRIMARY__URL``, ``SSVM_ZONE``.
One error reports all problems. For an unknown key it suggests the most similar key.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError

from ssvm_worker.errors import ConfigError
from ssvm_worker.net.broker_url import shown
from ssvm_worker.units import printable

from .findings import describe, path_of, suggestion
from .schema import Settings
from .types import SecretUrl

_LOG = logging.getLogger("ssvm.config")
_PREFIX = "SSVM_"
_FILE = "SSVM_CONFIG"
#: The file without --config and SSVM_CONFIG. Each systemd unit of config/systemd uses it too.
DEFAULT_FILE = Path("/etc/ssvm/worker.toml")
#: Variables that kubelet and Docker set for a service whose name starts with "ssvm-".
_SERVICE_VARIABLE = re.compile(r"SSVM_\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
#: Variables with a logged warning. A process loads its settings many times, but warns once.
_WARNED: set[str] = set()
#: By the path of a key: the variable that has set it.
_Origins = dict[tuple[str, ...], str]


def load(path: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the effective settings. ``find_file`` chooses the file.

    Raises ConfigError with all problems.
    """
    file = find_file(path, environ)
    values = _read_toml(file) if file else {}
    origins, findings = _overlay(values, environ)
    return parse(values, str(file) if file else "the environment", origins, findings)


def find_file(path: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the settings file: *path*, else that of SSVM_CONFIG, else DEFAULT_FILE if it exists, else None.

    An empty SSVM_CONFIG means no file.
    """
    if path or _FILE in environ:
        given = path or environ[_FILE]
        return Path(given) if given else None
    try:
        DEFAULT_FILE.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass  # it may exist, and reading it reports the reason
    return DEFAULT_FILE


def shipped_files() -> Path:
    """Return the directory config/ of the project. A wheel has it in this package, a checkout at its top."""
    packaged = Path(__file__).with_name("files")
    return packaged if packaged.exists() else packaged.parents[2] / "config"


def parse(
    values: dict[str, Any], location: str, origins: _Origins | None = None, findings: list[str] | None = None
) -> Settings:
    """Validate settings that are given as plain values.

    *origins* are the keys that the environment has set, and *findings* are the problems with its variables. Raises
    ConfigError with all problems.
    """
    found = list(findings or [])
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        found += [_finding(each, origins or {}) for each in error.errors(include_url=False)]
    if found:
        raise invalid(found, location) from None
    return settings


def invalid(problems: Iterable[str], location: str) -> ConfigError:
    """Return the error about all *problems* of the settings in *location*."""
    found = tuple(map(printable, problems))
    error = ConfigError(f"Invalid settings: {'; '.join(found)}", location, "Correct these keys")
    error.problems = found
    return error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        remedy = f"Check --config and {_FILE}"
        if isinstance(error, PermissionError):
            remedy = "Run the command as root, or as a user who may read the file"
        raise ConfigError(f"The settings file cannot be read: {error.strerror}", str(path), remedy) from error
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        raise ConfigError(f"The settings file is not TOML: {error}", str(path), "Correct that line") from error


def _overlay(values: dict[str, Any], environ: Mapping[str, str]) -> tuple[_Origins, list[str]]:
    """Merge the variables of the environment into *values*. Return the origin of each key, and the problems."""
    origins: _Origins = {}
    findings = []
    for name in sorted(environ):
        words = name.removeprefix(_PREFIX).lower().split("__")
        if not name.startswith(_PREFIX) or name == _FILE or _is_foreign(name, words):
            continue
        if len(words) == 1 and not isinstance(Settings.model_fields[words[0]].default, str | Path):
            findings.append(f"{name}: {words[0]} is a section. Set one of its keys with {name}__KEY")
            continue
        try:
            path = _put(values, words, environ[name])
        except ValueError as error:
            findings.append(f"{name}: {error}")
            continue
        origins[path] = name
    return origins, findings


def _is_foreign(name: str, words: list[str]) -> bool:
    """Return whether to ignore the variable: kubelet has set it, or it names no section (this is logged)."""
    if words[0] in Settings.model_fields:
        return bool(len(words) == 1 and _SERVICE_VARIABLE.fullmatch(name))
    if _SERVICE_VARIABLE.fullmatch(name):
        return True
    if len(words) > 1:
        return False
    if name not in _WARNED:
        _WARNED.add(name)
        known = [f"{_PREFIX}{each.upper()}" for each in Settings.model_fields]
        _LOG.warning("%s: unknown setting%s", name, suggestion(name, known))
    return True


def _put(values: dict[str, Any], words: list[str], value: str) -> tuple[str, ...]:
    """Set one key and return its path. Raise ValueError if a part of the path is ambiguous or not a section."""
    *sections, key = words
    table, path = values, []
    for section in sections:
        # In the file, names of stores and the like may have capitals, dashes and dots. A variable has none.
        matches = [each for each in table if re.sub("[-.]", "_", each.lower()) == section]
        if len(matches) > 1:
            raise ValueError(f"it could mean {' or '.join(matches)}. Rename one of them")
        path.append(matches[0] if matches else section)
        table = table.setdefault(path[-1], {})
        if not isinstance(table, dict):
            raise ValueError(f"{'.'.join(path)} is a value, not a section")
    table[key] = value
    # A secret is either a value or the path of a file. The environment overrides both.
    table.pop(key.removesuffix("_file") if key.endswith("_file") else f"{key}_file", None)
    return (*path, key)


def _finding(error: Any, origins: _Origins) -> str:
    """Describe one error of pydantic: the key, the variable that has set it, and the problem."""
    location = tuple(str(each) for each in error["loc"] if each != "[key]")  # pydantic's mark of a wrong name
    name = origins.get(location, "")
    if error["type"] == "value_error":  # the error of a section names the key, for example that of a secret's file
        for path, each in origins.items():
            is_named = path[:-1] == location and re.search(rf"\b{re.escape(path[-1])}\b", error["msg"])
            name = name or (each if is_named else "")
    else:  # an unknown section, or a value that a variable has replaced by a section
        name = name or next((each for path, each in origins.items() if path[: len(location)] == location), "")
    shown_path = path_of(location)
    known = _known_keys(location[:-1]) if error["type"] == "extra_forbidden" else ()
    return describe(error, known, f"{name} ({shown_path})" if name else shown_path)


def _known_keys(path: tuple[str, ...]) -> list[str]:
    """Return the keys of the table at this path of the settings."""
    model: Any = Settings
    for part in path:
        model = typing.get_args(model)[1] if typing.get_origin(model) is dict else model.model_fields[part].annotation
    fields = model.model_fields
    return [*fields, *(f"{name}_file" for name in fields if "Secret" in str(fields[name].annotation))]


def redacted(settings: Settings) -> dict[str, Any]:
    """Return the effective settings as plain values, with secrets as ``***``."""
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
