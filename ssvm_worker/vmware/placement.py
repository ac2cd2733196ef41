"""The target of a new VM: the request's names, and the managed objects that this module finds for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.errors import InvalidRequest

from .connection import Connection
from .faults import translated


@dataclass(frozen=True)
class VmTarget:
    """The target in a request. Each name may also be a managed object id."""

    #: The name of the new VM.
    name: str
    folder: str | None = None
    pool: str | None = None
    datastore: str | None = None
    #: The names of target networks by the names of the networks in the backup.
    networks: Mapping[str, str] = field(default_factory=dict)
    host: str | None = None


@dataclass(frozen=True)
class FoundObjects:
    """The managed objects of a target."""

    pool: Any
    folder: Any
    datastore: Any
    #: By the name of the network in the backup.
    networks: dict[str, Any]
    #: The ESXi host, or None if vSphere chooses it.
    host: Any = None


@dataclass(frozen=True)
class _Candidate:
    """A managed object and the names that a request may use for it. Messages show the first name."""

    entity: Any
    names: tuple[str, ...]


def find_objects(connection: Connection, target: VmTarget, networks: list[str]) -> FoundObjects:
    """Find the managed objects of a target. *networks* are the networks in the OVF descriptor.

    Raises InvalidRequest, with a list of the existing objects, in these cases:
    a name matches no object, a name matches several objects, or a name is absent and several objects exist.
    """
    with translated("Searching for the target", target.name):
        pool = _choose("resource pool", target.pool, _pools(connection))
        owner = connection.read(pool, "owner")["owner"]
        reachable = connection.read(owner, "datastore", "network")
        datastore = _datastore(connection, target.datastore, reachable["datastore"])
        there = _named(connection, reachable["network"])
        found = {each: _choose("network", target.networks.get(each, each), there) for each in networks}
        if unknown := [each for each in target.networks if each not in networks]:
            listed = ", ".join(networks) or "none"
            raise InvalidRequest(f"The VM has no network {unknown[0]!r}", "networks", f"Its networks: {listed}")
        host = _host(connection, owner, target.host, datastore, list(found.values()))
        return FoundObjects(pool, _folder(connection, target.folder, pool), datastore, found, host)


def find_vm_in(connection: Connection, folder: Any, name: str) -> Any:
    """Return the VM with that name in a folder, or None."""
    with translated("Searching for the VM", name):
        found = connection.content.searchIndex.FindChild(folder, name)
    return found if isinstance(found, vim.VirtualMachine) else None


def _pools(connection: Connection) -> list[_Candidate]:
    """Return every resource pool. The root pool of a cluster or host has the name of its owner."""
    found = list(connection.each(vim.ResourcePool, "name", "owner"))
    owners = dict.fromkeys(values["owner"] for _, values in found)
    owner_values = {owner: connection.read(owner, "name", "resourcePool") for owner in owners}
    candidates = []
    for pool, values in found:
        owner = owner_values[values["owner"]]
        path = f"{owner['name']}/{values['name']}"
        is_root = owner["resourcePool"] == pool
        candidates.append(_Candidate(pool, (owner["name"], path) if is_root else (path, values["name"])))
    return candidates


def _datastore(connection: Connection, wanted: str | None, reachable: list[Any]) -> Any:
    """Return the datastore with that name, or the emptiest reachable one of a datastore cluster with that name."""
    candidates = _named(connection, reachable)
    if wanted is None or any(wanted in (each.entity._moId, *each.names) for each in candidates):
        return _choose("datastore", wanted, candidates)
    clusters = dict(connection.each(vim.StoragePod, "name", "childEntity"))
    named = [_Candidate(each, (values["name"],)) for each, values in clusters.items()]
    members = clusters[_choose("datastore", wanted, [*candidates, *named])]["childEntity"] or ()
    usable = []
    for each in members:
        summary = connection.read(each, "summary")["summary"] if each in reachable else None
        if summary and summary.accessible and summary.maintenanceMode in (None, "normal"):
            usable.append((summary.freeSpace, each._moId, each))
    if not usable:
        remedy = "Name a datastore, or check the cluster"
        raise InvalidRequest(f"The pool can use no datastore of the cluster {wanted!r}", "datastore", remedy)
    return max(usable)[2]


def _host(connection: Connection, owner: Any, wanted: str | None, datastore: Any, networks: list[Any]) -> Any:
    """Return the wanted host. Without one, return None if vSphere can choose, otherwise a host that can run the VM.

    vSphere chooses on a standalone host and in a cluster with DRS (reference of ``ResourcePool.ImportVApp``).
    If the user may not read the hosts, the result is None too.
    """
    hosts = connection.read(owner, "host")["host"] or []
    if wanted is not None:
        return _choose("ESXi host", wanted, _named(connection, hosts))
    if not isinstance(owner, vim.ClusterComputeResource):
        return None
    settings = connection.read(owner, "configurationEx")["configurationEx"]
    if not hosts or (settings and settings.drsConfig and settings.drsConfig.enabled):
        return None
    paths = ("name", "runtime.connectionState", "runtime.inMaintenanceMode", "datastore", "network", "vm")
    values = {host: connection.read(host, *paths) for host in hosts}
    reasons = {host: _unfit(each, datastore, networks) for host, each in values.items()}
    if fit := [host for host in hosts if not reasons[host]]:
        return min(fit, key=lambda host: len(values[host]["vm"] or ()))
    listed = "; ".join(f"{values[host]['name']} {why}" for host, why in reasons.items())
    what = "No ESXi host of the cluster, which has no DRS, can run the VM"
    raise InvalidRequest(what, "host", f"{listed}. Choose another datastore, networks or pool")


def _unfit(host: dict[str, Any], datastore: Any, networks: list[Any]) -> str:
    """Return why a host cannot run a VM on a datastore and networks, or an empty string."""
    if str(host["runtime.connectionState"]) != "connected":
        return f"is {host['runtime.connectionState']}"
    if host["runtime.inMaintenanceMode"]:
        return "is in maintenance mode"
    if datastore not in (host["datastore"] or ()):
        return "does not mount the datastore"
    missing = [each for each in networks if each not in (host["network"] or ())]
    return f"lacks {len(missing)} of the networks" if missing else ""


def _folder(connection: Connection, wanted: str | None, pool: Any) -> Any:
    """Return the VM folder with that name, path or id; by default the root VM folder of the pool's datacenter."""
    if wanted is None:
        entity = pool
        while entity is not None and not isinstance(entity, vim.Datacenter):
            entity = connection.read(entity, "parent")["parent"]
        return connection.read(entity, "vmFolder")["vmFolder"]
    if "/" in wanted:
        found = connection.content.searchIndex.FindByInventoryPath(wanted.strip("/"))
        if isinstance(found, vim.Folder):
            return found
    folders = connection.each(vim.Folder, "name", "childType")
    candidates = [
        _Candidate(folder, (values["name"],))
        for folder, values in folders
        if "VirtualMachine" in (values["childType"] or ())
    ]
    return _choose("VM folder", wanted, candidates)


def _choose(what: str, wanted: str | None, candidates: list[_Candidate]) -> Any:
    """Return the candidate with the wanted name, or the only candidate if no name is given."""
    listed = ", ".join(sorted({f"{each.names[0]} ({each.entity._moId})" for each in candidates})) or "none"
    if wanted is None:
        if len(candidates) == 1:
            return candidates[0].entity
        raise InvalidRequest(f"Which {what}?", what, f"Name one. There are: {listed}")
    found = [each for each in candidates if wanted in (each.entity._moId, *each.names)]
    if len(found) != 1:
        how = "no" if not found else "more than one"
        raise InvalidRequest(f"There is {how} {what} {wanted!r}", what, f"There are: {listed}")
    return found[0].entity


def _named(connection: Connection, entities: Any) -> list[_Candidate]:
    """Return the objects with their names, read in as few calls as the server allows."""
    if not entities:
        return []
    query = vmodl.query.PropertyCollector
    kinds = [query.PropertySpec(type=kind, pathSet=["name"]) for kind in {type(each) for each in entities}]
    spec = query.FilterSpec(objectSet=[query.ObjectSpec(obj=each) for each in entities], propSet=kinds)
    collector = connection.content.propertyCollector
    candidates = []
    answer = collector.RetrievePropertiesEx([spec], query.RetrieveOptions())
    while answer is not None:
        for each in answer.objects:
            values = {pair.name: pair.val for pair in each.propSet}
            candidates.append(_Candidate(each.obj, (values["name"],)))
        answer = collector.ContinueRetrievePropertiesEx(answer.token) if answer.token else None
    return candidates
