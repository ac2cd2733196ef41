"""OpenPGP signatures of checksum files, verified by gpgv against a keyring of the settings and nothing else."""

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

from .http.request import HttpSettings
from .http.source import HttpSource

#: What publishers append to the name of the file: Ubuntu .gpg, Debian .sign, most others .asc.
_ENDINGS = (".gpg", ".asc", ".sign")
_CLEAR = b"-----BEGIN PGP SIGNED MESSAGE-----"
#: Seconds; a verification takes a few hundredths.
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Keyring:
    """Whose signatures count."""

    #: Of public keys, as ``gpg --export`` writes it (not armoured).
    path: Path
    #: Refuse a file that is not signed at all.
    required: bool = True


def fetch_signed(url: str, settings: HttpSettings, keyring: Keyring, check: Check) -> str:
    """The text behind a URL, if its signature is good: one within it, or one beside it. SourceDenied if it is not.

    Of a file with a signature within it, only what is signed is given.
    """
    data = _fetch(url, settings, check, MiB)
    if data.lstrip().startswith(_CLEAR):
        return decode_text(_verified(keyring, url, data))
    for ending in _ENDINGS:
        path, mark, query = url.partition("?")
        try:
            signature = _fetch(path + ending + mark + query, settings, check, 64 * KiB)
        except SourceNotFound:
            continue
        _verified(keyring, url, data, signature)
        return decode_text(data)
    if keyring.required:
        raise SourceDenied(
            "The checksum file is not signed",
            HttpSource(url, settings).name,
            f"Looked for {', '.join(_ENDINGS)} beside it. Give the digest itself, or set download.require_signature",
        )
    return decode_text(data)


def _fetch(url: str, settings: HttpSettings, check: Check, most: int) -> bytes:
    source = HttpSource(url, settings, check=check)
    return b"".join(limit(source.open(), most, source.name))


def _verified(keyring: Keyring, url: str, data: bytes, signature: bytes | None = None) -> bytes:
    """What the signature is of; a *signature* of its own, or one within *data*."""
    if not keyring.path.is_file():
        raise ConfigError("There is no such keyring", str(keyring.path), "Make it by gpg --export")
    with tempfile.TemporaryDirectory(prefix="ssvm-signature-") as scratch:
        paths = [Path(scratch, "text")] if signature is None else [Path(scratch, "signature"), Path(scratch, "text")]
        for path, content in zip(paths, [data] if signature is None else [signature, data], strict=True):
            path.write_bytes(content)
        output = Path(scratch, "signed")
        ends = ["--output", str(output)] if signature is None else []
        status = _gpgv([*ends, "--keyring", str(keyring.path.resolve()), *map(str, paths)])
        good = set(re.findall(r"(?m)^\[GNUPG:\] (\w+)", status))
        # Of several signatures one of a key that we know is enough; a broken one is never overlooked.
        if "GOODSIG" not in good or "VALIDSIG" not in good or "BADSIG" in good:
            raise SourceDenied(
                f"The signature of the checksum file is not good: {_reason(good)}",
                HttpSource(url, HttpSettings()).name,
                "Compare it with the publisher's; the keys that count are in download.keyring",
            )
        return output.read_bytes() if signature is None else data


def _gpgv(arguments: list[str]) -> str:
    command = ["gpgv", "--status-fd", "1", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, env={"LC_ALL": "C", "PATH": _PATH})
    except FileNotFoundError as error:
        raise ConfigError("gpgv is not installed", "download.keyring", "Install gpgv, or remove the keyring") from error
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable("gpgv did not end", "download.keyring", "Look at the load of this machine") from error
    return done.stdout.decode("utf-8", "replace")


_PATH = "/usr/local/bin:/usr/bin:/bin"


def _reason(words: set[str]) -> str:
    said = {
        "BADSIG": "the file has been changed",
        "NO_PUBKEY": "by a key that is not in the keyring",
        "EXPKEYSIG": "by a key that has expired",
        "EXPSIG": "it has expired",
        "REVKEYSIG": "by a key that was revoked",
    }
    return next((text for word, text in said.items() if word in words), "it cannot be read")
