"""A server is reached from the configured address, or is not mounted: a host with two networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ssvm_worker.errors import ConfigError
from ssvm_worker.stores.nfs.mountinfo import mounts
from ssvm_worker.stores.nfs.store import NfsSettings, NfsStore
from tests.contracts.store import put
from tests.nfs.hosts import Host, command, on_client
from tests.nfs.server import BEHIND, FOR_GAMMA, Server

PLACE = Path("/run/scratch/gamma")
OURS, ROUTER, OTHER = "10.9.8.2", "10.9.8.1", "10.9.3.2"


@pytest.fixture
def gamma() -> Iterator[Host]:
    """Return the host with two networks, without a mount so far."""
    host = on_client("gamma")
    yield host
    host.run(unmount_there)
    host.close()


def store_there(address: str, name: str, **settings: str) -> list[dict[str, str]]:
    """Store an object, and return the mounts by their options."""
    put(NfsStore("primary", f"nfs://{address}/{name}", NfsSettings(PLACE, **settings)), "object", b"1")
    return mounted_there(name)


def unmount_there() -> None:
    for each in [each.point for each in mounts() if each.point.startswith(str(PLACE))]:
        command("umount", each)


def mounted_there(name: str) -> list[dict[str, str]]:
    return [each.options for each in mounts() if each.source.endswith(f":/{name}")]


def test_storage_network(server: Server, gamma: Host) -> None:
    """With another route no mount happens, and with a gateway the server gets its own route."""
    export = server.export("storage")
    with pytest.raises(ConfigError, match=rf"is reached from {OTHER}, not from nfs\.source_address {OURS}"):
        gamma.run(store_there, BEHIND, export.name, source_address=OURS)
    assert (gamma.run(mounted_there, export.name), export.files()) == ([], [])
    [options] = gamma.run(store_there, BEHIND, export.name, source_address=OURS, gateway=ROUTER)
    assert (options["addr"], options["clientaddr"]) == (BEHIND, OURS)
    assert f"via {ROUTER} dev storage src {OURS}" in gamma.run(command, "ip", "route", "get", BEHIND)
    assert export.files() == ["object"]


def test_server_that_the_kernel_knows(server: Server, gamma: Host) -> None:
    """A server that the kernel reaches by an earlier mount's connection is refused, even with the right route."""
    known, export = server.export("known"), server.export("trunked")
    gamma.run(store_there, FOR_GAMMA, known.name)
    with pytest.raises(ConfigError, match=rf"has mounted by {FOR_GAMMA} already, which is reached from {OTHER}"):
        gamma.run(store_there, BEHIND, export.name, source_address=OURS, gateway=ROUTER)
    assert (gamma.run(mounted_there, export.name), export.files()) == ([], [])
