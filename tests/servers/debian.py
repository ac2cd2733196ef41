"""A bare Debian with its own systemd: mmdebstrap creates it, systemd-nspawn boots it, and it shares our network."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.neighbours import ROOT, missing
from tests.waiting import PATIENCE_S, until

#: What is passed on from this machine: how to reach the registries of packages.
_PASSED = ("PIP_", "UV_", "SSL_CERT_", "REQUESTS_CA_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
#: The directory of our source in the machine.
SOURCE = "/usr/src/ssvm-worker"
#: Only what debootstrap calls minimal, an init, and certificates for https.
_PACKAGES = "systemd-sysv,dbus,ca-certificates"


def base(suite: str) -> Path:
    """Return a directory with this release, which is created at the first call."""
    for program, package in (("mmdebstrap", "mmdebstrap"), ("systemd-nspawn", "systemd-container")):
        if shutil.which(program) is None:
            missing(program, f"install {package}")
    if os.geteuid() != 0:
        missing("root", "run as root")
    folder = ROOT / ".cache/debian" / suite
    if not folder.exists():
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.parent.mkdir(parents=True, exist_ok=True)
        made = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}", suite, new]
        subprocess.run(made, check=True)
        new.rename(folder)
    return folder


class Debian:
    """A running machine. Its changes are in memory, and end with it."""

    def __init__(self, suite: str, log: Path) -> None:
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={base(suite)}"]
        command += ["--volatile=overlay", "--resolv-conf=copy-host", "--bind-ro=/etc/ssl/certs", "--boot"]
        with log.open("wb") as output:
            self._container = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self._log = log
        until(self._booted, "systemd has started")

    def _booted(self) -> bool:
        assert self._container.poll() is None, self._log.read_text()
        return bool(self._init()) and self.run("systemctl is-system-running --wait", check=False) in (
            "running\n",
            "degraded\n",
        )

    def _init(self) -> str:
        """Return the process id of the container's systemd, or "" before it runs."""
        children = Path(f"/proc/{self._container.pid}/task/{self._container.pid}/children").read_text().split()
        inits = [each for each in children if Path(f"/proc/{each}/comm").read_text() == "systemd\n"]
        return inits[0] if inits else ""

    def run(self, script: str, check: bool = True, stdin: bytes = b"") -> str:
        """Run a script of bash as root in the directory of the source, and return its output with its errors."""
        passed = [f"{name}={value}" for name, value in os.environ.items() if name.upper().startswith(_PASSED)]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        given = [f"PATH={path}", "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", *passed]
        inside = ["nsenter", "--target", self._init(), "--mount", "--uts", "--ipc", "--pid", "env", "-i", *given]
        words = ["bash", "-euo", "pipefail", "-c", f"mkdir -p {SOURCE}; cd {SOURCE}\n{script}"]
        done = subprocess.run([*inside, *words], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        text = done.stdout.decode(errors="replace")
        assert done.returncode == 0 or not check, f"{script}\n{text[-6000:]}"
        return text

    def stop(self) -> None:
        """Shut the machine down."""
        self._container.terminate()
        try:
            self._container.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._container.kill()
            self._container.wait()
