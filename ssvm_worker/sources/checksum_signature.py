"""Verify OpenPGP signatures of checksum files with gpgv. Only keys of the configured keyring count."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.artifacts.checksum_files import decode_text
from ssvm_worker.errors import ConfigError, SourceDenied, SourceNotFound, SourceUnavailable
from ssvm_worker.streaming.interfaces import Check
from ssvm_worker.streaming.pipeline import limit
from ssvm_worker.units import KiB, MiB

from .http.source import HttpSource
from .options import HttpSettings

#: File extensions of signatures: Ubuntu uses .gpg, Debian .sign, most others .asc.
_ENDINGS = (".gpg", ".asc", ".sign")
_CLEAR_SIGNED = b"-----BEGIN PGP SIGNED MESSAGE-----"
#: Seconds. A verification takes a few hundredths of a second.
_TIMEOUT_S = 30.0
#: Where gpgv is searched.
_PATH = "/usr/local/bin:/usr/bin:/bin"
#: The status words of gpgv (doc/DETAILS of GnuPG), and the text for a user.
_REASONS = {
    "BADSIG": "the file has been changed",
    "NO_PUBKEY": "the signing key is not in the keyring",
    "EXPKEYSIG": "the signing key has expired",
    "EXPSIG": "the signature has expired",
    "REVKEYSIG": "the signing key was revoked",
}


@dataclass(frozen=True)
class Keyring:
    """Public keys whose signatures are accepted."""

    #: A file that ``gpg --export`` wrote, not armoured.
    path: Path
    #: Whether a file without any signature is refused.
    required: bool = True


def fetch_signed(url: str, settings: HttpSettings, keyring: Keyring, check: Check) -> str:
    """Return the text behind a URL after its signature was verified.

    The signature is in the file or beside it. For a signature in the file, only the signed part is returned.
    Raises SourceDenied for a bad signature.
    """
    data = _fetch(url, settings, check, MiB)
    if data.lstrip().startswith(_CLEAR_SIGNED):
        return decode_text(_verify(keyring, url, data))
    for ending in _ENDINGS:
        path, mark, query = url.partition("?")
        try:
            signature = _fetch(path + ending + mark + query, settings, check, 64 * KiB)
        except SourceNotFound:
            continue
        _verify(keyring, url, data, signature)
        return decode_text(data)
    if keyring.required:
        raise SourceDenied(
            "The checksum file is not signed",
            HttpSource(url, settings).name,
            f"No {', '.join(_ENDINGS)} file is beside it. Give the digest itself, or set download.require_signature",
        )
    return decode_text(data)


def _fetch(url: str, settings: HttpSettings, check: Check, max_bytes: int) -> bytes:
    source = HttpSource(url, settings, check=check)
    return b"".join(limit(source.open(), max_bytes, source.name))


def _verify(keyring: Keyring, url: str, data: bytes, signature: bytes | None = None) -> bytes:
    """Return the signed bytes. *signature* None: the signature is in *data*."""
    if not keyring.path.is_file():
        raise ConfigError("The keyring does not exist", str(keyring.path), "Create it with gpg --export")
    with tempfile.TemporaryDirectory(prefix="ssvm-signature-") as scratch:
        inputs = {"text": data} if signature is None else {"signature": signature, "text": data}
        for name, content in inputs.items():
            Path(scratch, name).write_bytes(content)
        signed = Path(scratch, "signed")
        output = ["--output", str(signed)] if signature is None else []
        names = [str(Path(scratch, name)) for name in inputs]
        # Run gpgv, and read its status lines.
        arguments = [*output, "--keyring", str(keyring.path.resolve()), *names]
        command = ["gpgv", "--status-fd", "1", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, env={"LC_ALL": "C", "PATH": _PATH})
        except FileNotFoundError as error:
            raise ConfigError(
                "gpgv is not installed", "download.keyring", "Install gpgv, or remove the keyring"
            ) from error
        except subprocess.TimeoutExpired as error:
            what = f"gpgv did not end within {_TIMEOUT_S:g} s"
            raise SourceUnavailable(what, "download.keyring", "Check the load of this machine") from error
        status = done.stdout.decode("utf-8", "replace")
        words = set(re.findall(r"(?m)^\[GNUPG:\] (\w+)", status))
        # One signature of a known key is enough. A broken signature always counts.
        if "GOODSIG" not in words or "VALIDSIG" not in words or "BADSIG" in words:
            reason = next((text for word, text in _REASONS.items() if word in words), "it cannot be read")
            raise SourceDenied(
                f"The signature of the checksum file is not valid: {reason}",
                HttpSource(url, HttpSettings()).name,
                "Compare the file with the publisher's. Trusted keys are in download.keyring",
            )
        return signed.read_bytes() if signature is None else data
