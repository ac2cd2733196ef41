"""The files of the agent's certificate, which a management server renews before it expires."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.errors import ConfigError, StoreDenied

_log = logging.getLogger("ssvm.agent")

#: The size of a key in bits, as CloudStack's keystore-setup makes it, and the limit in seconds to make it.
_KEY_BITS, _OPENSSL_S = 2048, 60


@dataclass(frozen=True)
class CertificateFiles:
    """The paths of [cloudstack]. Each new connection reads the files again."""

    certificate: Path | None
    key: Path | None
    authorities: Path | None

    def install(self, certificate: str, key: str | None, authorities: str | None) -> None:
        """Replace the files. Without a *key*, the last ``request`` has made it.

        Raise ConfigError if the paths are not set, or if certificate and key do not match. Then nothing changes. Raise
        StoreDenied if a file cannot be written.
        """
        own, own_key = self._own()
        waiting = own_key.with_suffix(".new")
        parts = {own: certificate, own_key: key}
        if self.authorities and authorities:
            parts[self.authorities] = authorities
        try:
            if key is None and waiting.exists():
                parts[own_key] = waiting.read_text()
            written = [(path, _written(path, text)) for path, text in parts.items() if text is not None]
            _check(_part(own), _part(own_key) if parts[own_key] else own_key)
            for path, part in written:
                os.replace(part, path)
            waiting.unlink(missing_ok=True)
        except OSError as error:
            raise StoreDenied(f"A new certificate cannot be written: {error.strerror}", str(own)) from error
        finally:
            for path in parts:
                _part(path).unlink(missing_ok=True)
        _log.info("the server has renewed the agent's certificate %s", own)

    def request(self, name: str, address: str) -> str:
        """Make a key and return a certificate request for it. Raise ConfigError without openssl."""
        _, key = self._own()
        if shutil.which("openssl") is None:
            raise ConfigError("openssl is not installed, so no key can be made", "", "Install openssl")
        waiting = key.with_suffix(".new")
        command = ["openssl", "req", "-new", "-newkey", f"rsa:{_KEY_BITS}", "-nodes", "-keyout", str(waiting)]
        command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address},DNS:{name}"]
        try:
            os.close(os.open(waiting, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
            done = subprocess.run(command, capture_output=True, text=True, timeout=_OPENSSL_S, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", None) or getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"A new key cannot be made: {why.strip()[-300:]}", str(waiting), "Check openssl"
            ) from error
        return done.stdout

    def _own(self) -> tuple[Path, Path]:
        if self.certificate is None or self.key is None:
            remedy = "Set certificate_file and key_file in [cloudstack]"
            raise ConfigError("The agent has no place for a certificate", "cloudstack.certificate_file", remedy)
        return self.certificate, self.key


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _written(path: Path, text: str) -> Path:
    """Write a file next to *path* that only its owner can read, and return its path."""
    part = _part(path)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text if text.endswith("\n") else f"{text}\n")
    return part


def _check(certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        what = f"The server sent a certificate that does not match its key: {error.reason}"
        raise ConfigError(what, str(certificate), "The agent keeps the old one") from error
