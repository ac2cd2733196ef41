"""Answers that a vCenter 8.0.3 gave, replayed to the connection and the readers."""

from __future__ import annotations

import json
import lzma
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim

from ssvm_worker.formats.ova import read_descriptor
from ssvm_worker.vmware.connection import Connection
from ssvm_worker.vmware.descriptor import config_json
from ssvm_worker.vmware.hardware import Hardware
from ssvm_worker.vmware.inventory import config_of, datastores_of, find_vm, host_of, read_hardware
from ssvm_worker.vmware.ovf import OvfDisk, build
from ssvm_worker.vmware.trust import Address
from tests.servers.raw import RawServer

_FILE = Path(__file__).parents[2] / "data/vmware/vcenter-8.0.3.json.xz"
RECORDED: dict[str, Any] = json.loads(lzma.decompress(_FILE.read_bytes()))
_ANSWER = (
    '<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/" '
    'xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
    '<soapenv:Body><{0}Response xmlns="urn:vim25">{1}</{0}Response></soapenv:Body></soapenv:Envelope>'
)
#: The types of properties inside of a recorded one.
_INSIDE = {"runtime.host": "ManagedObjectReference", "summary.config": "HostConfigSummary"}


def answer_to(request: str) -> str:
    """Return the recorded answer to a call, or the properties that it asks for."""
    (method,) = re.findall(r"<soapenv:Body><(\w+)", request)
    if method == "RetrieveServiceContent":
        return str(RECORDED["content"])
    if method == "Login":
        return str(RECORDED["login"])
    if method == "Fetch":
        (name, path) = re.findall(r"<_this[^>]*>([^<]+)</_this><prop[^>]*>(\w+)", request)[0]
        return _ANSWER.format(method, RECORDED["objects"][name]["properties"].get(path, ""))
    if method != "RetrievePropertiesEx":
        return _ANSWER.format(method, "")
    (kind, name) = re.findall(r'<obj type="(\w+)">([^<]+)</obj>', request)[0]
    values = {path: value_of(name, path) for path in re.findall(r"<pathSet>([^<]+)</pathSet>", request)}
    pairs = "".join(f"<propSet><name>{path}</name>{value}</propSet>" for path, value in values.items() if value)
    found = f'<returnval><objects><obj type="{kind}">{name}</obj>{pairs}</objects></returnval>'
    return _ANSWER.format(method, found)


def value_of(name: str, path: str) -> str:
    """Return a property of an object as ``val``; it is empty if the vCenter did not set it."""
    recorded = RECORDED["objects"][name]["properties"]
    outer, _, inner = path.partition(".")
    if not inner:
        return str(recorded.get(path, "")).replace("returnval", "val")
    found = re.search(rf"<{inner}\b([^>]*)>(.*?)</{inner}>", recorded[outer], re.DOTALL)
    assert found
    return f'<val{found[1]} xsi:type="{_INSIDE[path]}">{found[2]}</val>'


def serve(connection: socket.socket, head: bytes) -> None:
    """Answer one request like the recorded vCenter."""
    while b"\r\n\r\n" not in head:
        head += connection.recv(65536)
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    wanted = head.index(b"\r\n\r\n") + 4 + (int(length[1]) if length else 0)
    while len(head) < wanted:
        head += connection.recv(65536)
    answer = RECORDED["versions"] if b"vimServiceVersions" in head else answer_to(head.decode())
    body = str(answer).encode()
    lines = f"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    connection.sendall(lines.encode() + body)


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """Return a connection to the recorded vCenter, logged in."""
    server = RawServer(serve, tls=True)
    address = Address("127.0.0.1", "my_user", "secret", server.port, Path(server.ca_file(tmp_path)))
    it = Connection(address)
    it.open()
    yield it
    it.close()
    server.close()


@pytest.fixture
def hardware(connection: Connection) -> Hardware:
    """Return the hardware of the recorded VM."""
    return read_hardware(config_of(connection, find_vm(connection, "vm-19")))


def test_login(connection: Connection) -> None:
    """The worker chooses a version of the API, logs in and knows the product."""
    assert connection.content.about.fullName == "VMware vCenter Server 8.0.3 build-69507950"


def test_vm(connection: Connection, hardware: Hardware) -> None:
    """The readers find hardware, host and datastore of the VM, and its configuration becomes JSON."""
    vm = find_vm(connection, "vm-19")
    assert (hardware.version, hardware.firmware, hardware.cpus, hardware.memory_mib) == ("vmx-11", "bios", 1, 128)
    assert [(disk.place, disk.status, disk.capacity) for disk in hardware.disks] == [("scsi0:0", "exported", 2 << 30)]
    assert host_of(connection, vm).endswith(":host-16")
    (datastore,) = datastores_of(connection, vm)
    assert (datastore.name, datastore.capacity) == ("vsanDatastore", 386479947776)
    assert json.loads(config_json(config_of(connection, vm)))["hardware"]["device"]


def test_own_descriptor(hardware: Hardware) -> None:
    """The worker's own OVF of the VM lists its disks."""
    disks = [OvfDisk(disk, f"d{disk.unit}.vmdk", 1, 1, "") for disk in hardware.disks]
    assert read_descriptor(build(hardware, disks), "vm").disks == tuple(each.name for each in disks)


def test_host(connection: Connection) -> None:
    """A host of 8.0.3 has a thumbprint, and an unset certificate is no error."""
    host = connection.object(vim.HostSystem, "host-14")
    config = connection.read(host, "summary.config")["summary.config"]
    assert (config.port, len(config.sslThumbprint), getattr(config, "sslCertificate", None)) == (443, 59, None)
