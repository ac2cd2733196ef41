"""Imports of small VMs, for ``ssvm doctor --trial``: what a restore cannot know of a vCenter."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.units import MiB, TiB

from .connection import Connection
from .export import ExportLink, pins_of
from .faults import API_ERRORS
from .inventory import config_of, network_names, read_hardware
from .ovf import OvfDisk, build, networks_of
from .placement import find_vm_in
from .upload import HostSink

Answer = dict[str, Any]
_REMOVE_S = 900.0
#: Bytes of the imported disk, and of the disk that only the check of a descriptor sees.
DISK_SIZE, _LARGE = MiB, 3 * TiB
#: A confirmation after more than this many seconds is late. The simulator is then late by as many.
_LATE_S = 1.0
_FILE = "ssvm-trial-disk0.vmdk"


class NotAskedError(Exception):
    """A question cannot be asked."""


class TrialImport:
    """Imports beside the scratch VM: same pool, folder, datastore and networks, and the name NAME-import."""

    def __init__(self, connection: Connection, vm: Any, ready: Callable[[Any], tuple[Any, Any, str]]) -> None:
        """Prepare. *ready* waits for a lease. It returns the lease and its data, or the name of the fault."""
        self._connection = connection
        self._vm = vm
        self._ready = ready
        paths = ("name", "resourcePool", "parent", "datastore", "network", "runtime.host")
        name, self._pool, self._folder, self._datastores, self._networks, self._host = connection.read(
            vm, *paths
        ).values()
        self._name = f"{name}-import"
        #: vCenter's warnings about the last descriptor.
        self._warnings: list[str] = []

    def without_disk(self, descriptor: str) -> tuple[Answer, str]:
        """Import a VM without disks and without a host. Return the answer, and the fault or ""."""
        self._require_free_name()
        spec, errors = self._spec(descriptor, None)
        if spec is None:
            return {"rejected": errors}, ""
        try:
            lease, _, fault = self._ready(self._pool.ImportVApp(spec.importSpec, self._folder, None))
        except vmodl.MethodFault as error:
            return {"fault": fault_of(error)}, fault_of(error)
        return ({"fault": fault} if fault else {"allowed": True}) | self._undo(lease), ""

    def with_disk(self, disk: bytes, export_manifest: str) -> tuple[Answer, dict[str, Any]]:
        """Import a VM with one disk, and compare the lease manifest with what was sent.

        *export_manifest* is the simulator's switch for the lease manifest of an export.
        """
        self._require_free_name()
        spec, errors = self._spec(self._descriptor_with(DISK_SIZE, len(disk)), self._host)
        if spec is None:
            return {"rejected": errors}, {}
        lease = None
        try:
            lease, info, fault = self._ready(self._pool.ImportVApp(spec.importSpec, self._folder, self._host))
            if fault:
                return {"fault": fault}, {}
            answer, switches = self._send(lease, info, spec, disk, export_manifest)
        finally:
            undone = self._undo(lease)
        return answer | undone, switches

    def large_disk(self) -> tuple[Answer, dict[str, Any]]:
        """Ask which disks the datastores can have, and let vCenter check a descriptor. This method creates no VM."""
        found = [self._connection.read(each, "info")["info"] for each in self._datastores or ()]
        largest = max((getattr(each, "maxVirtualDiskCapacity", 0) or 0 for each in found), default=0)
        spec, errors = self._spec(self._descriptor_with(_LARGE, MiB), self._host)
        answer = {"largest": largest, "accepted": spec is not None, "errors": errors}
        return answer, {"max_disk": largest or 2 * TiB} if "FileTooLarge" in errors or 0 < largest < _LARGE else {}

    def _send(
        self, lease: Any, info: Any, spec: Any, disk: bytes, export_manifest: str
    ) -> tuple[Answer, dict[str, Any]]:
        file, item = next(each for each in info.deviceUrl if each.disk), spec.fileItem[0]
        with suppress(vmodl.MethodFault):
            lease.HttpNfcLeaseSetManifestChecksumType([vim.KeyValue(key=file.key, value="sha256")])
        pins = pins_of(file.sslCertificate, file.sslThumbprint)
        link = ExportLink(file.url, pins, self._connection.address, self._connection.cookie)
        with HostSink(link, len(disk), self._connection.check, create=bool(item.create)) as sink:
            sink.write(disk)
            started = time.monotonic()
            sink.commit()
        seconds = round(time.monotonic() - started, 1)
        digests = {name: hashlib.new(name, disk, usedforsecurity=False).hexdigest() for name in ("sha1", "sha256")}
        manifest, found = compare_manifest(lease, file.key, len(disk), digests)
        switches: dict[str, Any] = {"put": {"do": "late", "seconds": _LATE_S}} if seconds >= _LATE_S else {}
        kind = found.get("manifest", "")
        if kind != export_manifest:
            switches["upload_manifest"] = kind or "correct"
        if "calls" in found:
            switches["calls"] = found["calls"]
        if self._warnings:
            switches["import_warning"] = self._warnings[0]
        answer = {"creates": bool(item.create), "confirmed_after_s": seconds, "warnings": self._warnings}
        return answer | {"manifest": manifest}, switches

    def _descriptor_with(self, capacity: int, size: int) -> str:
        """Return a descriptor of the VM with only its first disk, of another capacity."""
        config = config_of(self._connection, self._vm)
        hardware = read_hardware(config, network_names(self._connection, config))
        disk = replace(hardware.disks[0], capacity=capacity)
        return build(replace(hardware, disks=(disk,)), [OvfDisk(disk, _FILE, size, size, "")]).decode()

    def _spec(self, descriptor: str, host: Any) -> tuple[Any, list[str]]:
        """Return the import spec, or None and the classes of vCenter's errors."""
        networks = networks_of(descriptor) if self._networks else []
        mapping = [vim.OvfManager.NetworkMapping(name=each, network=self._networks[0]) for each in networks]
        params = vim.OvfManager.CreateImportSpecParams(
            locale="", deploymentOption="", entityName=self._name, diskProvisioning="thin",
            networkMapping=mapping, hostSystem=host,
        )  # fmt: skip
        manager = self._connection.content.ovfManager
        found = manager.CreateImportSpec(descriptor, self._pool, self._datastores[0], params)
        errors = [fault_of(each) for each in found.error or ()]
        self._warnings = [fault_of(each) for each in found.warning or ()]
        return (None if errors or found.importSpec is None else found), errors

    def _require_free_name(self) -> None:
        if find_vm_in(self._connection, self._folder, self._name):
            raise NotAskedError("the name of the new VM is in use")

    def _undo(self, lease: Any) -> Answer:
        """Abort the lease, and remove the VM if vSphere has not removed it."""
        if lease is not None:
            with suppress(*API_ERRORS):
                lease.HttpNfcLeaseAbort()
        if left := find_vm_in(self._connection, self._folder, self._name):
            self._connection.finish(left.Destroy_Task(), _REMOVE_S)
        return {"removed_by_abort": left is None}


def compare_manifest(lease: Any, key: str, size: int, digests: Mapping[str, str]) -> tuple[Answer, dict[str, Any]]:
    """Compare the lease manifest of a file with its size and digests. Return the answer and the switches."""
    try:
        entries = lease.HttpNfcLeaseGetManifest()
    except vmodl.MethodFault as error:
        return {"fault": fault_of(error)}, {"calls": {"HttpNfcLeaseGetManifest": fault_of(error)}}
    entry = next((each for each in entries if each.key == key), None)
    if entry is None:
        return {"entries": len(entries)}, {"manifest": "absent"}
    algorithm = str(entry.checksumType or "sha1")
    digest = (entry.checksum if entry.checksumType else entry.sha1) or ""
    answer = {"algorithm": algorithm, "digest": digests.get(algorithm) == digest.lower()}
    answer |= {"size": entry.size == size, "zero_size": not entry.size}
    if not answer["digest"]:
        return answer, {"manifest": "wrong"}
    return answer, {"manifest": "zero_size"} if answer["zero_size"] else {}


def fault_of(error: object) -> str:
    """Return the class of a fault, or of the fault behind an error."""
    cause = getattr(error, "__cause__", None)
    return fault_class(cause if isinstance(cause, vmodl.MethodFault) else error)


def fault_class(value: object) -> str:
    """Return the name of a vSphere type without its namespace."""
    return type(value).__name__.rpartition(".")[2]
