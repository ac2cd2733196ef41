"""The files of Apache in a stock system VM: links to objects, and who may copy from another zone.

The layout is that of the Java agent. Apache needs ``FollowSymLinks`` and ``AllowOverride All``, as in a system VM.

    userdata/DIRECTORY/NAME         a symbolic link to a file of an image store
    copy/SecStorage/DIRECTORY       a symbolic link to the mount point of an image store
    copy/.htaccess  .htpasswd       the login and the addresses that copies need

Differences from the Java agent: copies need the login and an allowed address. The Java agent asks for the login below
``copy/template`` only, which no URL of a copy has.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.config.cloudstack_section import CloudStackSection
from ssvm_worker.ledger.cloudstack_web import USERDATA, CopyLogin, WebCertificate, check_path

_log = logging.getLogger("ssvm.cloudstack")
#: Time limit in seconds of the program that installs a certificate. It restarts Apache.
_SCRIPT_S = 20.0


@dataclass(frozen=True)
class ApacheFiles:
    """The files below the root of a web server."""

    root: Path

    def make_link(self, path: str, target: Path) -> None:
        """Link a path below ``userdata`` to a file. Replace an older link."""
        _link(self.root / USERDATA / check_path(path), target)

    def remove_link(self, path: str) -> None:
        """Remove a link below ``userdata`` and its directory. Leave everything else alone."""
        link = self.root / USERDATA / check_path(path)
        with contextlib.suppress(OSError):
            if link.is_symlink():
                link.unlink()
            if link.parent != self.root / USERDATA:
                link.parent.rmdir()

    def allow_copies(self, login: CopyLogin | None, addresses: Sequence[str], stores: Mapping[str, Path]) -> None:
        """Let these addresses copy from these mount points, by directory, with the login. Without one, refuse all."""
        directory = self.root / "copy"
        rules = ["Options -Indexes +FollowSymLinks"]
        if login and addresses:
            digest = base64.b64encode(hashlib.sha1(login.password.encode(), usedforsecurity=False).digest()).decode()
            _write(directory / ".htpasswd", f"{login.user}:{{SHA}}{digest}\n")
            rules += ["AuthType Basic", 'AuthName "copy"', f'AuthUserFile "{directory / ".htpasswd"}"']
            rules += ["<RequireAll>", "Require valid-user", f"Require ip {' '.join(addresses)}", "</RequireAll>"]
        else:
            rules.append("Require all denied")
        _write(directory / ".htaccess", "\n".join(rules) + "\n")
        for name, mount_point in stores.items():
            _link(directory / "SecStorage" / check_path(name), mount_point)


def install_certificate(section: CloudStackSection, certificate: WebCertificate, root: str) -> None:
    """Install the certificate of Apache with the program of the system VM, which also restarts Apache.

    Its options are those with which the Java agent calls it. An error is logged only: links without TLS still work.
    """
    if section.certificate_script is None:
        return
    with tempfile.TemporaryDirectory(prefix="ssvm-certificate-") as directory:  # mode 0700
        texts = {"-k": certificate.key, "-p": certificate.certificate, "-t": certificate.chain, "-u": root}
        address = section.public.address or section.private.address or "127.0.0.1"
        command = [str(section.certificate_script), "-i", address, "-h", section.name or "localhost", "-c"]
        for option, text in texts.items():
            if text:
                file = Path(directory, option[1:])
                file.write_text(text)
                command += [option, str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SCRIPT_S, check=False)
            problem = f"status {done.returncode}: {done.stderr.strip()[-500:]}" if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    if problem:
        _log.error("the certificate of Apache is not installed: %s", problem)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.replace(link)


def _write(file: Path, text: str) -> None:
    """Write a file that appears complete. Apache reads it as another user; a request for ``.ht*`` is refused."""
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(text)
    new.chmod(0o644)
    new.replace(file)
