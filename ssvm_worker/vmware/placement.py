"""Finding where a new VM goes: folder, pool, datastore and networks by name, before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyVmomi import vim, vmodl

from ssvm_worker.errors import InvalidRequest

from .connection import Connection
from .faults import translated
from .place import VmTarget


@dataclass(frozen=True)
class FoundObjects:
    """The managed objects of a place."""

    pool: Any
    folder: Any
    datastore: Any
    #: By the network's name where the VM came from.
    networks: dict[str, Any]


@dataclass(frozen=True)
class _Choice:
    """One object that could be meant, and what it may be called; the first name is shown."""

    it: Any
    names: tuple[str, ...]


def find_place(connection: Connection, place: VmTarget, networks: list[str]) -> FoundObjects:
    """Find all that the place names; *networks* are those that the VM wants.

    Raises InvalidRequest, which lists what there is, for a name that nothing or several things have, and where nothing
    is named though there are several.
    """
    with translated("Looking for the place", place.name):
        pool = _choose("resource pool", place.pool, _pools(connection))
        owner = connection.read(pool, "owner")["owner"]
        reach = connection.read(owner, "datastore", "network")
        datastore = _choose("datastore", place.datastore, _named(connection, reach["datastore"]))
        here = _named(connection, reach["network"])
        found = {each: _choose("network", place.networks.get(each, each), here) for each in networks}
        _refuse_unknown(place.networks, networks)
        return FoundObjects(pool, _folder(connection, place.folder, pool), datastore, found)


def find_vm_in(connection: Connection, folder: Any, name: str) -> Any:
    """The VM of that name in a folder, or None."""
    with translated("Looking for the VM", name):
        found = connection.content.searchIndex.FindChild(folder, name)
    return found if isinstance(found, vim.VirtualMachine) else None


def _pools(connection: Connection) -> list[_Choice]:
    """Every resource pool: a cluster's or a host's own is called by its owner."""
    found = _all(connection, vim.ResourcePool, "name", "owner")
    owners = dict.fromkeys(values["owner"] for _, values in found)
    names = {owner: connection.read(owner, "name", "resourcePool") for owner in owners}
    choices = []
    for it, values in found:
        owner = names[values["owner"]]
        path = f"{owner['name']}/{values['name']}"
        own = owner["resourcePool"] == it
        choices.append(_Choice(it, (owner["name"], path) if own else (path, values["name"])))
    return choices


def _folder(connection: Connection, wanted: str | None, pool: Any) -> Any:
    """The VM folder of that name, path or id; the one of the pool's datacenter where none is named."""
    if wanted is None:
        above = pool
        while above is not None and not isinstance(above, vim.Datacenter):
            above = connection.read(above, "parent")["parent"]
        return connection.read(above, "vmFolder")["vmFolder"]
    if "/" in wanted:
        found = connection.content.searchIndex.FindByInventoryPath(wanted.strip("/"))
        if isinstance(found, vim.Folder):
            return found
    folders = _all(connection, vim.Folder, "name", "childType")
    able = [_Choice(it, (values["name"],)) for it, values in folders if "VirtualMachine" in (values["childType"] or ())]
    return _choose("VM folder", wanted, able)


def _named(connection: Connection, things: Any) -> list[_Choice]:
    return [_Choice(it, (values["name"],)) for it, values in _read_all(connection, list(things or ()), "name")]


def _choose(what: str, wanted: str | None, choices: list[_Choice]) -> Any:
    """The one that is meant; without a name, the only one there is."""
    listed = ", ".join(sorted({f"{each.names[0]} ({each.it._moId})" for each in choices})) or "none"
    if wanted is None:
        if len(choices) == 1:
            return choices[0].it
        raise InvalidRequest(f"Which {what}?", what, f"Name one. There are: {listed}")
    found = [each for each in choices if wanted in (each.it._moId, *each.names)]
    if len(found) != 1:
        how = "no" if not found else "more than one"
        raise InvalidRequest(f"There is {how} {what} {wanted!r}", what, f"There are: {listed}")
    return found[0].it


def _refuse_unknown(mapped: Mapping[str, str], wanted: list[str]) -> None:
    if unknown := [each for each in mapped if each not in wanted]:
        listed = ", ".join(wanted) or "none"
        raise InvalidRequest(f"The VM has no network {unknown[0]!r}", "networks", f"It has: {listed}")


def _all(connection: Connection, kind: type, *paths: str) -> list[tuple[Any, dict[str, Any]]]:
    """Every object of a kind, with some of its properties."""
    content = connection.content
    view = content.viewManager.CreateContainerView(content.rootFolder, [kind], True)
    try:
        return _read_all(connection, connection.read(view, "view")["view"] or [], *paths)
    finally:
        view.DestroyView()


def _read_all(connection: Connection, things: list[Any], *paths: str) -> list[tuple[Any, dict[str, Any]]]:
    """Some properties of many objects in as few calls as the server allows."""
    if not things:
        return []
    property_ = vmodl.query.PropertyCollector
    kinds = [property_.PropertySpec(type=kind, pathSet=list(paths)) for kind in {type(each) for each in things}]
    spec = property_.FilterSpec(objectSet=[property_.ObjectSpec(obj=each) for each in things], propSet=kinds)
    collector = connection.content.propertyCollector
    answer = collector.RetrievePropertiesEx([spec], property_.RetrieveOptions())
    found: list[tuple[Any, dict[str, Any]]] = []
    while answer is not None:
        for each in answer.objects:
            found.append((each.obj, dict.fromkeys(paths) | {pair.name: pair.val for pair in each.propSet}))
        answer = collector.ContinueRetrievePropertiesEx(answer.token) if answer.token else None
    return found
