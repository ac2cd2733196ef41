"""A simulated vCenter for tests and the demo: govmomi's simulator, built from the Go sources in ``vcsim``."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from ssvm_worker.errors import ConfigError, SourceUnavailable

from .go_program import build_program
from .progress_markers import with_progress_markers

#: The directory of the Go sources.
SOURCES = Path(__file__).parent / "vcsim"


@dataclass(frozen=True)
class SimulatedDisk:
    """A disk of a simulated VM."""

    key: int
    label: str
    #: The datastore path: ``[LocalDS_0] name/disk-0.vmdk``. A lease serves the content of this file.
    file: str


@dataclass(frozen=True)
class SimulatedMachine:
    """A simulated VM with all its names."""

    id: str
    instance_uuid: str
    path: str
    datacenter: str
    disks: tuple[SimulatedDisk, ...]


def build() -> Path:
    """Return the path of the simulator's program. See ``build_program``."""
    return build_program("vcsim", SOURCES)


class VCenterSimulator:
    """A simulated vCenter (or ESXi host) on the loopback interface, as a context manager.

    The simulator ends with this process. Without *descriptor*, it lacks CreateDescriptor like old hosts. Its temporary
    files are in *scratch*.
    """

    username = "administrator@vsphere.local"

    def __init__(self, *, esx: bool = False, descriptor: bool = True, scratch: Path | None = None) -> None:
        self._scratch = scratch
        self.password = secrets.token_urlsafe(12)
        self._flags = ["-child", f"-esx={str(esx).lower()}", f"-descriptor={str(descriptor).lower()}"]
        #: Faults that every call of ``fault`` contains, unless it replaces them.
        self._profile: dict[str, Any] = {}
        #: Progress markers in the disks of new VMs: "", "clean" or "dirty".
        self._markers = ""
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> VCenterSimulator:
        with contextlib.ExitStack() as cleanup:
            directory = cleanup.enter_context(
                tempfile.TemporaryDirectory(prefix="vcsim-", dir=self._scratch, ignore_cleanup_errors=True)
            )
            # Its datastores are temporary directories. They are inside this one, so that a kill leaves none.
            environment = os.environ | {"VCSIM_PASSWORD": self.password, "TMPDIR": directory}
            command = [str(build()), "-username", self.username, *self._flags]
            process = cleanup.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            )
            cleanup.callback(process.terminate)
            greeting = json.loads(process.stdout.readline() or b"{}") if process.stdout else {}
            if "url" not in greeting:
                raise SourceUnavailable(
                    "The vCenter simulator did not start", "vcsim", "Run it with -verbose in a shell"
                )
            self._know(greeting, Path(directory))
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._cleanup.close()

    def _know(self, greeting: dict[str, str], directory: Path) -> None:
        self.url = greeting["url"]
        self.host, self.port = urlsplit(self.url).hostname or "", urlsplit(self.url).port or 443
        self.ca_file = directory / "vcsim.pem"
        self.ca_file.write_text(greeting["certificate"])
        der = ssl.PEM_cert_to_DER_cert(greeting["certificate"])
        self.thumbprint = hashlib.sha1(der, usedforsecurity=False).hexdigest()
        tls = ssl.create_default_context(cafile=str(self.ca_file))
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls))

    def add_vm(
        self,
        name: str,
        disks: Sequence[bytes],
        capacities: Sequence[int],
        modes: Sequence[str] = (),
        **more: Any,
    ) -> SimulatedMachine:
        """Create a VM. Exports return *disks* as the content of its disks, see ``sent``; *capacities* are in bytes.

        *modes* has one mode for each disk: persistent, independent_persistent, … or ``rdm``.
        *more* may contain change_id (for all disks), nvram (bytes), firmware, encrypted, tpm, pool (DC0_C0),
        and the obstacles ``states`` and ``levels``. See ``wanted`` in vcsim/machines.go.
        """
        change_id = more.pop("change_id", "")
        wanted = [
            {"capacity": capacity, "mode": modes[number] if modes else "", "change_id": change_id}
            for number, capacity in enumerate(capacities)
        ]
        if "nvram" in more:
            more["nvram"] = base64.b64encode(more["nvram"]).decode()
        made = json.loads(self._call("POST", "/control/machines", {"name": name, "disks": wanted, **more}))
        machine = SimulatedMachine(**made | {"disks": tuple(SimulatedDisk(**each) for each in made["disks"])})
        for disk, content in zip(machine.disks, disks, strict=True):
            self.upload(disk.file, self.sent(content), machine.datacenter)
        return machine

    def sent(self, stream: bytes) -> bytes:
        """Return what exports of a new VM send for the stream of a disk: the profile may add progress markers."""
        return with_progress_markers(stream, dirty=self._markers == "dirty") if self._markers else stream

    def upload(self, path: str, content: bytes, datacenter: str = "DC0") -> None:
        """Write a file to a datastore path: ``[LocalDS_0] name/disk-0.vmdk``."""
        datastore, _, file = path.removeprefix("[").partition("] ")
        query = urlencode({"dcPath": datacenter, "dsName": datastore})
        self._call("PUT", f"/folder/{quote(file)}?{query}", content)

    def change(
        self, machine: SimulatedMachine, disk: SimulatedDisk, change_id: str, areas: Sequence[Sequence[int]] = ()
    ) -> None:
        """Set a disk's change id, and record areas (offset, length) as written since the previous change id."""
        changes = {"vm": machine.id, "disk": disk.key, "change_id": change_id, "areas": list(areas)}
        self._call("POST", "/control/changes", changes)

    def age_snapshots(self, vm: str, days: int) -> None:
        """Set the age of a VM's snapshots."""
        self._call("POST", "/control/age", {"vm": vm, "days": days})

    def strike(self, what: str, vm: str = "") -> None:
        """Start an event: logout, restart, migrate or another one. See ``strike`` in vcsim/disaster.go."""
        self._call("POST", "/control/strike", {"what": what, "vm": vm})

    def fault(self, **faults: Any) -> None:
        """Replace all faults of the simulator; no argument leaves those of the profile.

        See ``faults`` in vcsim/world.go.
        """
        self._call("POST", "/control/faults", self._profile | faults)

    @contextlib.contextmanager
    def behaving_like(self, report: dict[str, Any]) -> Iterator[None]:
        """Behave like the vCenter of a report of ``ssvm doctor --trial`` while the block runs.

        A later fault may replace a switch of the report, except ``progress_markers``, which is about new VMs.
        """
        own = self.ca_file.read_text()
        words = {"own": own, "chain": own + own}
        before, self._profile = (self._profile, self._markers), dict(report["switches"])
        # The simulator sends the content of a disk as it is, so this class adds the markers.
        self._markers = self._profile.pop("progress_markers", "")
        for name in {"certificate", "host_certificate"} & self._profile.keys():
            self._profile[name] = words.get(self._profile[name], self._profile[name])
        if "host_thumbprint" in self._profile:
            self._profile["host_thumbprint"] = self.thumbprint
        self.fault()
        try:
            yield
        finally:
            self._profile, self._markers = before
            self.fault()

    def state(self) -> dict[str, Any]:
        """Return ``snapshots`` (names), ``leases`` by id, ``calls`` (number by method), ``gets`` and ``puts``.

        A lease has state, renewals and percent.
        """
        state: dict[str, Any] = json.loads(self._call("GET", "/control/state"))
        return {key: state[key] or ([] if key in ("snapshots", "gets", "puts") else {}) for key in state}

    def _call(self, method: str, path: str, body: Any = None) -> bytes:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)  # noqa: S310 - our own https URL
        try:
            with self._opener.open(request, timeout=30) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise ConfigError(
                f"The simulator rejected the request: {error.read().decode().strip()}", f"{method} {path}"
            ) from error
