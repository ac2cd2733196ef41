"""Questions that only a real vCenter can answer, asked on a scratch VM for ``ssvm doctor --trial``.

An answer contains only numbers, truth values and words of the vSphere API: no name, address, cookie or ticket.
Each question also gives the switches that make the simulator answer like this vCenter: ``faults`` in vcsim/world.go.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.errors import Cancelled, InvalidRequest, ResourceBusy, WorkerError
from ssvm_worker.units import GiB

from . import snapshot as snapshots
from .connection import Connection
from .export import ExportLink, pins_of
from .faults import API_ERRORS, BUSY
from .inventory import config_of, read_hardware
from .lease import has_place
from .preflight import PRIVILEGES, RESTORE_PRIVILEGES, SNAPSHOT_PRIVILEGES, missing_privileges
from .trial_import import Answer, NotAskedError, TrialImport, compare_manifest
from .trial_import import fault_class as _class
from .trial_import import fault_of as _fault
from .trial_stream import Download

#: The name of a scratch VM begins with this, so that a typing error names no other VM.
PREFIX = "ssvm-trial"
#: The largest scratch VM: each disk is read several times.
_MAX_BYTES = 16 * GiB
_READY_S, _REMOVE_S, _RENEW_S = 300.0, 900.0, 20.0
#: Seconds between two attempts to remove the snapshot.
_PAUSE_S = 5.0
#: Leases that the trial asks for besides the first one.
_MORE_LEASES = 3
#: Bytes of the first disk that show whether a lease still lives.
_FIRST_BYTES = 1 << 16
#: Shorter names, such as a number, can be a part of any answer.
_SHORTEST = 4
_CHANGED_AREAS = "VirtualMachine.Provisioning.DiskRandomRead"


@dataclass(frozen=True)
class Question:
    """One question, with what it does."""

    name: str
    #: What the question does to the vCenter or the VM, for the operator.
    does: str
    ask: Callable[[Trial], tuple[Answer, Answer]]


@dataclass
class TrialReport:
    """The answers, and the switches of the simulator that reproduce them."""

    answers: dict[str, Answer] = field(default_factory=dict)
    switches: Answer = field(default_factory=dict)
    #: Whether the trial's snapshot is removed.
    is_clean: bool = True

    def add(self, name: str, answer: Answer, switches: Answer) -> None:
        """Add the answer to a question."""
        self.answers[name] = answer
        calls = self.switches.get("calls", {}) | switches.get("calls", {})
        self.switches.update(switches | ({"calls": calls} if calls else {}))

    def withhold(self, private: set[str]) -> None:
        """Replace each answer that contains one of these names or secrets. No answer should contain any."""
        for name, answer in self.answers.items():
            text = json.dumps(answer).lower()
            if any(each.lower() in text for each in private if len(each) >= _SHORTEST):
                self.answers[name] = {"withheld": "the answer contained a name or a secret"}


class Trial:
    """The questions to one vCenter. The trial changes only its scratch VM, and removes its snapshot at the end."""

    def __init__(
        self, connection: Connection, vm: Any, job_id: str, pause_s: float = _PAUSE_S, disk: bytes = b""
    ) -> None:
        """Prepare. *disk* is the stream of a disk of 1 MiB that the trial may import. Without it, it creates no VM."""
        self._connection = connection
        self._vm = vm
        self._job_id = job_id
        self._pause_s = pause_s
        self._disk = disk
        #: The server's OVF descriptor of the VM, without disks.
        self._descriptor = ""
        self._snapshot: snapshots.Snapshot | None = None
        self._lease: Any = None
        self._info: Any = None
        self._renewed = 0.0
        self._switches: Answer = {}
        address = connection.address
        #: Names and secrets that the report must not contain.
        self._private = {address.host, address.username, address.password, connection.cookie}

    def run(self, tell: Callable[[str], None]) -> TrialReport:
        """Ask all questions. *tell* gets the name of each question before it is asked.

        Raises InvalidRequest if the VM is no scratch VM. After a cancellation, the report has the answers so far.
        """
        self._require_scratch()
        report = TrialReport()
        self._switches = report.switches
        try:
            for question in QUESTIONS:
                tell(question.name)
                try:
                    self._connection.check()
                    report.add(question.name, *question.ask(self))
                except Cancelled:
                    report.answers[question.name] = {"not_asked": "the trial was stopped"}
                    break
                except NotAskedError as error:
                    report.answers[question.name] = {"not_asked": str(error)}
                except (WorkerError, *API_ERRORS) as error:
                    report.answers[question.name] = {"failed": _fault(error)}
        finally:
            report.is_clean = self._clean_up()
        report.withhold(self._private)
        return report

    def _require_scratch(self) -> None:
        name, found = self._connection.read(self._vm, "name", "snapshot").values()
        self._private |= {name, self._vm._moId}
        size = sum(disk.capacity for disk in read_hardware(config_of(self._connection, self._vm)).disks)
        if not name.startswith(PREFIX):
            what = f"The VM's name does not begin with {PREFIX}"
            raise InvalidRequest(what, name, "Create a scratch VM with such a name: the trial changes it")
        if found or not 0 < size <= _MAX_BYTES:
            what = "The VM has snapshots" if found else f"The VM has disks of {size} bytes in total"
            raise InvalidRequest(what, name, "Use a VM without snapshots and with disks of 1 to 16 GiB in total")

    def _ask_product(self) -> tuple[Answer, Answer]:
        about = self._connection.content.about
        names = ("name", "version", "build", "apiVersion", "apiType", "licenseProductName")
        answer: Answer = {name: str(getattr(about, name) or "") for name in names}
        with suppress(vmodl.fault.SecurityError):
            manager = self._connection.content.licenseManager
            found = self._connection.read(manager, "licenses")["licenses"] if manager else ()
            answer["editions"] = sorted({each.editionKey for each in found or ()})
        return answer, {}

    def _ask_drs(self) -> tuple[Answer, Answer]:
        clusters = self._connection.each(vim.ClusterComputeResource, "configurationEx")
        found = [values["configurationEx"] for _, values in clusters]
        without = sum(not (each and each.drsConfig and each.drsConfig.enabled) for each in found)
        # The fault of an import without a host is not known: the trial creates no VM.
        return {"clusters": len(found), "without_drs": without}, {"no_drs": "InvalidArgument"} if without else {}

    def _ask_host(self) -> tuple[Answer, Answer]:
        host = self._connection.read(self._vm, "runtime.host")["runtime.host"]
        config = self._connection.read(host, "summary.config")["summary.config"]
        self._private |= {config.name, config.sslThumbprint or "", host._moId}
        certificates = _count_certificates(getattr(config, "sslCertificate", None))
        answer = {"thumbprint": bool(config.sslThumbprint), "certificates": certificates}
        switches: Answer = {"host_certificate": _KINDS[min(certificates, 2)]} if certificates else {}
        if certificates and config.sslThumbprint:
            switches["host_thumbprint"] = "own"
        if not certificates and not config.sslThumbprint:
            switches["host_certificate"] = "none"
        return answer, switches

    def _ask_privileges(self) -> tuple[Answer, Answer]:
        parts = ("resourcePool", "parent", "datastore", "network")
        pool, folder, datastores, networks = self._connection.read(self._vm, *parts).values()
        places = {"pool": [pool], "folder": [folder], "datastore": datastores or [], "network": networks or []}
        asked = [(self._vm, [each for ids in steps.values() for each in ids]) for steps in _VM_PRIVILEGES]
        for kind, steps in RESTORE_PRIVILEGES.items():
            ids = [each for needed in steps.values() for each in needed]
            asked += [(entity, ids) for entity in places[kind] if entity is not None]
        lacks = sorted({each for entity, ids in asked for each in missing_privileges(self._connection, entity, ids)[1]})
        return {"lacks": lacks}, {"lacks": lacks} if lacks else {}

    def _ask_machine(self) -> tuple[Answer, Answer]:
        paths = ("runtime.powerState", "guest.toolsRunningStatus", "disabledMethod")
        power, tools, disabled = self._connection.read(self._vm, *paths).values()
        config = config_of(self._connection, self._vm)
        hardware = read_hardware(config)
        cards = [each for each in config.hardware.device if isinstance(each, vim.vm.device.VirtualEthernetCard)]
        return {
            "power": str(power),
            "tools": str(tools),
            "firmware": hardware.firmware,
            "version": hardware.version,
            "encrypted": hardware.encrypted,
            "tpm": any(isinstance(each, vim.vm.device.VirtualTPM) for each in config.hardware.device),
            "controllers": sorted({disk.controller.kind for disk in hardware.disks}),
            "networks": sorted({_class(each.backing) for each in cards}),
            "disabled_methods": sorted(map(str, disabled or ())),
        }, {}

    def _ask_snapshot(self) -> tuple[Answer, Answer]:
        started = time.monotonic()
        try:
            self._snapshot = snapshots.create(self._connection, self._vm, self._job_id, "if_possible")
        except WorkerError as error:
            fault = _fault(error)
            # The question about privileges gives this switch.
            return {"fault": fault}, {} if fault == "NoPermission" else {"snapshot_task": fault}
        answer: Answer = {"quiesced": self._snapshot.quiesced, "seconds": round(time.monotonic() - started, 1)}
        is_escaped = self._snapshot.name != snapshots.own_name(self._job_id)
        answer["escaped_name"] = is_escaped
        switches: Answer = {"escape_names": True} if is_escaped else {}
        remark = self._snapshot.remark
        if self._snapshot.quiesced:
            return answer, switches
        if remark == snapshots.IS_OFF:
            return answer | {"reason": "not asked: the VM is off"}, switches
        if remark.startswith(snapshots.SILENT):
            return answer | {"reason": "vSphere ignored it"}, switches | {"unquiesced": True}
        fault = remark.partition(" ")[0]
        return answer | {"reason": fault}, switches | {"quiesce_task": fault}

    def _ask_descriptor(self) -> tuple[Answer, Answer]:
        params = vim.OvfManager.CreateDescriptorParams(ovfFiles=[], includeImageFiles=False)
        params.snapshot = snapshots.object_of(self._connection, self._made())
        try:
            result = self._connection.content.ovfManager.CreateDescriptor(self._vm, params)
        except vmodl.MethodFault as error:
            return {"fault": _fault(error)}, {"calls": {"CreateDescriptor": _fault(error)}}
        self._descriptor = result.ovfDescriptor or ""
        errors, warnings = ([_fault(getattr(each, "fault", each)) for each in found or ()]
                            for found in (result.error, result.warning))  # fmt: skip
        switches = {"descriptor_error": errors[0]} if errors else {}
        return {"errors": errors, "warnings": warnings}, switches | (
            {"descriptor_warning": warnings[0]} if warnings else {}
        )

    def _ask_areas(self) -> tuple[Answer, Answer]:
        snapshot = snapshots.object_of(self._connection, self._made())
        disks = [disk for disk in read_hardware(config_of(self._connection, snapshot)).disks if disk.change_id]
        if not disks:
            return {"tracking": False}, {}
        try:
            found = snapshots.changed_areas(self._vm, snapshot, disks[0], "*")
        except WorkerError as error:
            return {"tracking": True, "fault": _fault(error)}, {}
        smallest = min((length for _, length in found), default=0)
        return {"tracking": True, "areas": len(found), "smallest": smallest, "bytes": sum(a[1] for a in found)}, {}

    def _ask_lease(self) -> tuple[Answer, Answer]:
        started = time.monotonic()
        self._lease, self._info, fault = self._open_lease()
        if fault:
            return {"fault": fault}, {"lease_error": fault}
        files = [_file(each) for each in self._info.deviceUrl]
        timeout = self._info.leaseTimeout
        self._private |= {part for each in self._info.deviceUrl for part in each.url.split("/")[2:]}
        answer = {"seconds": round(time.monotonic() - started, 1), "timeout_s": timeout, "files": files}
        switches: Answer = {} if timeout == 300 else {"lease_timeout": timeout}
        if any(each["any_host"] for each in files):
            switches["any_host"] = True
        if any(each["disk"] and not each["place"] for each in files):
            switches["plain_keys"] = True
        most = max((each["certificates"] for each in files), default=0)
        if most:
            switches["certificate"] = _KINDS[min(most, 2)]
        if files and not any(each["thumbprint"] for each in files):
            switches["thumbprint"] = ""
        return answer, switches

    def _ask_checksums(self) -> tuple[Answer, Answer]:
        chosen = [vim.KeyValue(key=each.key, value="sha256") for each in self._leased()]
        try:
            self._lease.HttpNfcLeaseSetManifestChecksumType(chosen)
        except vmodl.MethodFault as error:
            return {"fault": _fault(error)}, {"calls": {"HttpNfcLeaseSetManifestChecksumType": _fault(error)}}
        return {"sha256": True}, {}

    def _ask_second_lease(self) -> tuple[Answer, Answer]:
        self._leased()
        granted: list[Any] = []
        fault = ""
        while not fault and len(granted) < _MORE_LEASES:
            lease, _, fault = self._open_lease()
            granted += [lease] if lease is not None else []
        for lease in granted:
            with suppress(*API_ERRORS):
                lease.HttpNfcLeaseAbort()
        answer = {"granted": len(granted)} | ({"fault": fault} if fault else {})
        return answer, {} if granted else {"exclusive": True}

    def _ask_move(self) -> tuple[Answer, Answer]:
        """Move the VM to another host and back. Look at the lease between."""
        first = next(each for each in self._leased() if each.disk)
        paths = ("runtime.host", "resourcePool", "datastore", "network", "disabledMethod")
        host, pool, datastores, networks, disabled = self._connection.read(self._vm, *paths).values()
        other = self._other_host(host, pool, {*(datastores or ()), *(networks or ())})
        answer: Answer = {"disabled_methods": sorted(map(str, disabled or ()))}
        try:
            self._move(other, pool)
        except (vmodl.MethodFault, WorkerError) as error:
            fault = _fault(error)
            return answer | {"fault": fault}, {} if fault == "NoPermission" else {"move": fault}
        answer |= {"allowed": True, "lease_lives": False}
        with suppress(WorkerError, *API_ERRORS):
            self._lease.HttpNfcLeaseProgress(1)
            read = self._download(first, {"Cookie": self._connection.cookie}, limit=_FIRST_BYTES)
            answer["lease_lives"] = read.status == 200 and read.size > 0
        try:
            self._move(host, pool)
        except (vmodl.MethodFault, WorkerError) as error:
            answer["fault_back"] = _fault(error)
        return answer, {"move": "lives"} if answer["lease_lives"] else {}

    def _other_host(self, host: Any, pool: Any, needed: set[Any]) -> Any:
        """Return another usable host of the VM's cluster that has all its datastores and networks."""
        owner = self._connection.read(pool, "owner")["owner"]
        paths = ("name", "runtime.connectionState", "runtime.inMaintenanceMode", "datastore", "network")
        for each in self._connection.read(owner, "host")["host"] or ():
            name, state, is_maintained, datastores, networks = self._connection.read(each, *paths).values()
            self._private |= {name, each._moId}
            is_fit = str(state) == "connected" and not is_maintained and needed <= {*datastores, *networks}
            if each != host and is_fit:
                return each
        raise NotAskedError("no other host of the cluster has the VM's datastores and networks")

    def _move(self, host: Any, pool: Any) -> None:
        self._connection.finish(self._vm.RelocateVM_Task(vim.vm.RelocateSpec(host=host, pool=pool)), _READY_S)

    def _ask_import(self) -> tuple[Answer, Answer]:
        """Import the server's descriptor without a host, with no disk."""
        if not self._descriptor:
            raise NotAskedError("there is no descriptor")
        answer, fault = self._imports().without_disk(self._descriptor)
        is_about_drs = "no_drs" in self._switches and fault not in ("", "NoPermission")
        return answer, {"no_drs": fault} if is_about_drs else {}

    def _ask_upload(self) -> tuple[Answer, Answer]:
        return self._imports().with_disk(self._disk, self._switches.get("manifest", ""))

    def _ask_large_disk(self) -> tuple[Answer, Answer]:
        return TrialImport(self._connection, self._vm, self._ready).large_disk()

    def _imports(self) -> TrialImport:
        if not self._disk:
            raise NotAskedError("--with-import is not given")
        return TrialImport(self._connection, self._vm, self._ready)

    def _ask_renewal(self) -> tuple[Answer, Answer]:
        self._leased()
        faults = []
        for percent in (0, 50, 50):
            try:
                self._lease.HttpNfcLeaseProgress(percent)
            except vmodl.MethodFault as error:
                faults.append(_fault(error))
        calls = {"HttpNfcLeaseProgress": {"fault": faults[0], "times": len(faults)}} if faults else {}
        return {"faults": faults}, {"calls": calls} if calls else {}

    def _ask_power(self) -> tuple[Answer, Answer]:
        self._leased()
        state = str(self._connection.read(self._vm, "runtime.powerState")["runtime.powerState"])
        if state != "poweredOff":
            raise NotAskedError("the VM is on")
        try:
            self._connection.finish(self._vm.PowerOnVM_Task(None), _READY_S)
        except (vmodl.MethodFault, WorkerError) as error:
            return {"fault": _fault(error)}, {"lease_locks": True}
        self._connection.finish(self._vm.PowerOffVM_Task(), _READY_S)
        return {"allowed": True}, {}

    def _ask_stream(self) -> tuple[Answer, Answer]:
        """Read the first disk, without the session's cookie if the host allows it, and compare the lease manifest."""
        file = next(each for each in self._leased() if each.disk)
        first = self._download(file)
        switches: Answer = {}
        answer: Answer = {"without_cookie": first.status}
        if first.status in (401, 403):
            switches = {"get": {"needs_cookie": True}}
            first = self._download(file, {"Cookie": self._connection.cookie})
        answer |= first.facts()
        if first.body_end:
            switches["body_end"] = first.body_end
        if first.walk.kinds["progress"]:
            switches["progress_markers"] = "dirty" if first.walk.dirty else "clean"
        manifest, more = compare_manifest(self._lease, file.key, first.size, first.digests)
        return answer | {"manifest": manifest}, switches | more

    def _ask_again(self) -> tuple[Answer, Answer]:
        """Read the first disk again, a range of it, and every other file of the lease."""
        cookie = {"Cookie": self._connection.cookie}
        first, *others = sorted(self._leased(), key=lambda each: not each.disk)
        same = self._download(first, cookie).facts()
        part = self._download(first, cookie | {"Range": "bytes=0-511"}, limit=1 << 20).facts()
        rest = [self._download(each, cookie).facts() for each in others]
        switches = {"one_file": True} if rest and not any(each["bytes"] for each in rest) else {}
        return {"same_file": same, "range": part, "other_files": rest}, switches

    def _ask_removal(self) -> tuple[Answer, Answer]:
        """Complete the lease and remove the snapshot at once."""
        self._made()
        if self._lease is not None:
            with suppress(*API_ERRORS):
                self._lease.HttpNfcLeaseComplete()
            self._lease = None
        started, faults = time.monotonic(), self._remove()
        needed = snapshots.needs_consolidation(self._connection, self._vm)
        answer = {"faults": faults, "seconds": round(time.monotonic() - started, 1), "consolidation_needed": needed}
        switches: Answer = {"consolidate": True} if needed else {}
        if faults:
            switches["calls"] = {"RemoveSnapshot_Task": {"fault": faults[0], "times": len(faults)}}
        if needed:
            with suppress(ResourceBusy):
                snapshots.consolidate(self._connection, self._vm, _REMOVE_S)
            answer["still_needed"] = snapshots.needs_consolidation(self._connection, self._vm)
            switches |= {"locked": True} if answer["still_needed"] else {}
        return answer, switches

    def _remove(self) -> list[str]:
        """Remove the snapshot, and return the faults of the attempts that failed because the VM was busy."""
        faults: list[str] = []
        deadline = time.monotonic() + _REMOVE_S
        while True:
            try:
                snapshots.remove(self._connection, self._made(), _REMOVE_S)
            except WorkerError as error:
                if not isinstance(error.__cause__, BUSY) or time.monotonic() > deadline:
                    raise
                faults.append(_fault(error))
                self._connection.check()
                time.sleep(self._pause_s)
                continue
            self._snapshot = None
            return faults

    def _clean_up(self) -> bool:
        """Abort the lease and remove the snapshot. Return whether no snapshot is left."""
        with self._connection.shielded():
            if self._lease is not None:
                with suppress(*API_ERRORS):
                    self._lease.HttpNfcLeaseAbort()
            try:
                self._snapshot = self._snapshot or snapshots.find_own(self._connection, self._vm, self._job_id)
                if self._snapshot:
                    self._remove()
                return snapshots.find_own(self._connection, self._vm, self._job_id) is None
            except (WorkerError, *API_ERRORS):
                return False

    def _made(self) -> snapshots.Snapshot:
        if self._snapshot is None:
            raise NotAskedError("there is no snapshot")
        return self._snapshot

    def _leased(self) -> list[Any]:
        if self._info is None:
            raise NotAskedError("there is no lease")
        return list(self._info.deviceUrl)

    def _open_lease(self) -> tuple[Any, Any, str]:
        """Return a lease and its data, or the name of the fault."""
        try:
            return self._ready(snapshots.object_of(self._connection, self._made()).ExportSnapshot())
        except vmodl.MethodFault as error:
            return None, None, _fault(error)

    def _ready(self, lease: Any) -> tuple[Any, Any, str]:
        """Wait for a lease. Return it and its data, or the name of the fault."""
        ended = ("ready", "error", "done")
        found = self._connection.wait(lease, ("state", "info", "error"), lambda it: it["state"] in ended, _READY_S)
        if found and found["state"] == "ready":
            return lease, found["info"], ""
        with suppress(*API_ERRORS):
            lease.HttpNfcLeaseAbort()
        return None, None, _fault(found["error"]) if found else "NotReady"

    def _download(self, file: Any, headers: dict[str, str] | None = None, limit: int | None = None) -> Download:
        pins = pins_of(file.sslCertificate, file.sslThumbprint)
        link = ExportLink(file.url, pins, self._connection.address, self._connection.cookie)
        return Download.of(link, self._renew, headers or {}, limit)

    def _renew(self) -> None:
        """Stop the trial if it must stop, and renew the lease now and then."""
        self._connection.check()
        if time.monotonic() - self._renewed > _RENEW_S:
            self._renewed = time.monotonic()
            with suppress(vmodl.MethodFault):
                self._lease.HttpNfcLeaseProgress(1)


_KINDS = ("", "own", "chain")
_VM_PRIVILEGES = (PRIVILEGES, SNAPSHOT_PRIVILEGES, {"querying changed blocks": (_CHANGED_AREAS,)})


def _count_certificates(pem: str | None) -> int:
    return (pem or "").count(ssl.PEM_FOOTER)


def _file(url: Any) -> Answer:
    """Return facts about a file of a lease."""
    return {
        "disk": bool(url.disk),
        "nvram": url.url.endswith(".nvram"),
        "any_host": "//*" in url.url,
        "place": has_place(url.key),
        "thumbprint": bool(url.sslThumbprint),
        "certificates": _count_certificates(getattr(url, "sslCertificate", None)),
        "size": bool(url.fileSize),
    }


#: The questions in their order.
QUESTIONS = (
    Question("product", "read product, version, build and license", Trial._ask_product),
    Question("drs", "read the settings of the clusters", Trial._ask_drs),
    Question("host_certificate", "read what vCenter says of the host's certificate", Trial._ask_host),
    Question(
        "privileges",
        "ask for your privileges on the VM, its pool, folder, datastores and networks",
        Trial._ask_privileges,
    ),
    Question("vm", "read power state, tools and hardware of the VM", Trial._ask_machine),
    Question("snapshot", "make a snapshot of the VM: quiesced, or else without quiescing", Trial._ask_snapshot),
    Question("descriptor", "ask for an OVF descriptor of the snapshot", Trial._ask_descriptor),
    Question("changed_areas", "ask for the changed areas of a disk, if changed block tracking is on", Trial._ask_areas),
    Question("large_disk", "ask if a datastore and the OVF import take a disk of 3 TiB", Trial._ask_large_disk),
    Question("import", "with --with-import: create a VM NAME-import without a host, and remove it", Trial._ask_import),
    Question("lease", "open an export lease on the snapshot", Trial._ask_lease),
    Question("checksums", "ask for SHA-256 in the lease manifest", Trial._ask_checksums),
    Question("second_lease", "ask for three more leases while the first is open", Trial._ask_second_lease),
    Question("renewal", "renew the lease three times", Trial._ask_renewal),
    Question("stream", "read the first disk, and compare the lease manifest", Trial._ask_stream),
    Question("again", "read the first disk again, a range of it, and the lease's other files", Trial._ask_again),
    Question(
        "upload",
        "with --with-import: create a VM NAME-import, send it a disk of 1 MiB, and remove it",
        Trial._ask_upload,
    ),
    Question("power", "if the VM is off: switch it on during the lease, and off again", Trial._ask_power),
    Question(
        "move",
        "during the lease, move the VM to another host of its cluster that has its datastores, and back",
        Trial._ask_move,
    ),
    Question("removal", "complete the lease, and remove the snapshot at once", Trial._ask_removal),
)
