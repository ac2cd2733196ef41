"""The route to a storage network, in the test's own network namespace."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ssvm_worker.errors import ConfigError, StoreUnavailable
from ssvm_worker.stores.nfs.network_path import NetworkPath, source_address_for
from tests.neighbours import missing


def refuse(command: object) -> str:
    """Fail if a command runs."""
    raise AssertionError(command)


def test_our_address_already() -> None:
    """If the kernel uses the configured address already, or none is configured, nothing is changed."""
    NetworkPath("127.0.0.1").ensure("127.0.0.1", 2049, refuse)
    NetworkPath("127.0.0.1", "127.0.0.9").ensure("localhost", 2049, refuse)
    NetworkPath().ensure("no.such.host.invalid", 2049, refuse)


def test_another_address() -> None:
    """Without a gateway, the error of another source address names it and the missing route."""
    with pytest.raises(ConfigError, match=r"from 127\.0\.0\.1, not from .* 10\.1\.2\.3.*src 10\.1\.2\.3"):
        NetworkPath("10.1.2.3").ensure("127.0.0.1", 2049, refuse)


def test_route_that_is_refused() -> None:
    """The error of a refused route has the text of `ip`."""
    with pytest.raises(ConfigError, match="not permitted"):
        NetworkPath("10.1.2.3", "10.1.2.1").ensure("127.0.0.1", 2049, lambda _: "Operation not permitted")


def test_unknown_host() -> None:
    """The error of an unknown name is temporary."""
    with pytest.raises(StoreUnavailable, match="No address"):
        NetworkPath("10.1.2.3").ensure("no.such.host.invalid", 2049, refuse)


def test_no_route() -> None:
    """An unreachable address has no source address."""
    assert source_address_for("127.0.0.1", 2049) == "127.0.0.1"
    assert source_address_for("255.255.255.255", 2049) is None


IN_A_NETWORK = """
import subprocess
from ssvm_worker.stores.nfs.network_path import NetworkPath, source_address_for
from tests.neighbours import missing

def run(command):
    return subprocess.run(command, capture_output=True, text=True).stderr

for line in ("link add v0 type veth peer name v1", "link set v0 up", "link set v1 up",
             "addr add 10.9.0.2/24 dev v0", "addr add 10.9.0.3/24 dev v0"):
    subprocess.run(["ip", *line.split()], check=True)
assert source_address_for("10.50.0.5", 2049) is None
NetworkPath("10.9.0.3", "10.9.0.1").ensure("10.50.0.5", 2049, run)
assert source_address_for("10.50.0.5", 2049) == "10.9.0.3"
"""


def test_route_is_made() -> None:
    """With a gateway the server gets its own route from the configured address."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        missing("the right to create a network namespace", "run the test as root")
    subprocess.run(["unshare", "-n", sys.executable, "-c", IN_A_NETWORK], check=True)
