"""Logins, addresses and certificates that the server sends: they reach the ledger, and the answers are as recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.config.schema import Settings
from ssvm_worker.ledger.cloudstack_web import CloudStackWeb, CopyLogin
from ssvm_worker.wiring import assembly
from tests.cloudstack_commands import agent_settings, asker, vector
from tests.servers.broker import Broker
from tests.servers.service import settings_of

from .agents import Agent

Ask = Callable[[RawMessage], RawMessage]


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    return settings_of(broker, tmp_path / "store")


@pytest.fixture
def ask(settings: Settings) -> Ask:
    return asker(settings)


@pytest.fixture
def web(settings: Settings) -> CloudStackWeb:
    return assembly.open_cloudstack_web(settings)


def test_firewall(ask: Ask, web: CloudStackWeb) -> None:
    """Addresses are added, or replace the list, which an empty command clears."""
    answer, expected = ask(vector("req-secstorage-firewall")), vector("ans-secstorage-firewall")
    assert (answer.name, answer.content) == (expected.name, expected.content)
    assert web.copy_addresses() == ("198.51.100.78", "198.51.100.79")
    one = [{"add": True, "sourceIp": "2001:DB8::1", "port": "443", "intf": "eth2"}]
    ask(vector("req-secstorage-firewall", portConfigs=one))
    assert web.copy_addresses() == ("198.51.100.78", "198.51.100.79", "2001:db8::1")
    ask(vector("req-secstorage-firewall-empty"))
    assert web.copy_addresses() == ()


def test_invalid_address(ask: Ask, web: CloudStackWeb) -> None:
    """An invalid address is refused, and the list stays."""
    ask(vector("req-secstorage-firewall"))
    bad = [{"sourceIp": "all"}]
    assert not ask(vector("req-secstorage-firewall", portConfigs=bad, isAppendAIp=False)).content["result"]
    assert web.copy_addresses() == ("198.51.100.78", "198.51.100.79")


def test_vm_setup(ask: Ask, web: CloudStackWeb) -> None:
    """The login and the internal sites are stored, and the answer is that of the running Java agent."""
    answer, expected = ask(vector("req-secstorage-vm-setup")), vector("ans-secstorage-vm-setup", details="")
    assert (answer.name, answer.content) == (expected.name, expected.content)
    assert web.copy_login() == CopyLogin("cloud", "examplepw")
    assert web.internal_sites() == ("192.0.2.0/24",)


def test_certificate_of_apache(settings: Settings, tmp_path: Path) -> None:
    """The program of the system VM gets the files of each new certificate once, with the Java agent's options."""
    script, log = tmp_path / "config_ssl.sh", tmp_path / "log"
    shown = "while [ $# -gt 1 ]; do case $1 in -[kptu]) cat $2;; esac; shift; done"
    script.write_text(f'#!/bin/sh\nexec >> {log}\necho "$@"\n{shown}\n')
    script.chmod(0o755)
    section = agent_settings(settings).cloudstack.model_copy(update={"certificate_script": script, "name": "s-1-VM"})
    ask = asker(settings.model_copy(update={"cloudstack": section}))
    for _ in range(2):
        ask(vector("req-secstorage-setup-certs"))
    options, *contents = log.read_text().splitlines()
    assert options.startswith("-i 127.0.0.1 -h s-1-VM -c -k ")
    assert "".join(contents) == "-----BEGIN KEY-----xcertchainroot"


def test_certificate(web: CloudStackWeb, settings: Settings) -> None:
    """The certificate of a setup command is stored, and a command without one keeps it."""
    ask = asker(agent_settings(settings))
    for name in ("req-secstorage-setup-certs", "req-secstorage-setup"):
        ask(vector(name))
    found = web.certificate()
    assert (found.certificate, found.chain, found.key) == ("cert", "chain", "-----BEGIN KEY-----\nx\n")
    assert "BEGIN" not in repr(found)


@pytest.mark.parametrize("user", ["cloud\nroot:x", "cloud:x", "cloud\x00"])
def test_hostile_user(settings: Settings, user: str) -> None:
    """A user name cannot add a line to Apache's file of passwords."""
    agent = Agent(settings)
    answer = agent.send("SecStorageVMSetupCommand", copyUserName=user, copyPassword="hunter2")
    assert answer["result"] is False
    assert agent.services.web.copy_login() is None
