"""The files with which CloudStack configures the agent of a system VM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssvm_worker.cli.agent import agent_settings
from ssvm_worker.cloudstack.properties import environment_of_cmdline, environment_of_properties, parse_properties
from ssvm_worker.config import load
from ssvm_worker.errors import ConfigError
from tests.unit.config.test_kernel_cmdline import REAL, written

#: As the Java agent of a system VM stores it.
JAVA = r"""#Storage agent
#Sat Nov 28 18:34:19 UTC 2026
guid=s-1-VM
host=10.1.1.5,10.1.1.6@shuffle
port=8250
zone=1
pod=1
resource=org.apache.cloudstack.storage.resource.NfsSecondaryStorageResource
keystore.passphrase=a\=b\:c
id=4
"""


def test_cmdline(tmp_path: Path) -> None:
    """The command line of a system VM gives all settings, and the certificates come from its directory."""
    settings = load(environ=environment_of_cmdline(written(tmp_path, REAL)))
    section = settings.cloudstack
    assert (settings.zone, section.servers, section.port, section.name) == ("1", ("10.1.1.5",), 8250, "s-1-VM")
    assert (section.guid, section.zone, section.pod) == ("s-1-VM", "1", "1")
    assert (section.private.address, section.private.netmask) == ("10.1.1.77", "255.255.255.0")
    assert (section.public.address, section.storage.address) == ("192.0.2.7", "10.2.0.9")
    assert str(section.ca_file) == "/usr/local/cloud/systemvm/conf/cloud.ca.crt"
    assert str(section.key_file) == "/usr/local/cloud/systemvm/conf/cloud.key"


def test_system_vm(tmp_path: Path) -> None:
    """In a system VM, the agent also works for its Apache, without a line in the settings."""
    (tmp_path / "config_ssl.sh").touch()
    section = load(environ=environment_of_cmdline(written(tmp_path, REAL), str(tmp_path / "conf"))).cloudstack
    assert (section.web_root, section.certificate_script) == (Path("/var/www/html"), tmp_path / "config_ssl.sh")
    section = load(environ=environment_of_cmdline(written(tmp_path, REAL), str(tmp_path))).cloudstack
    assert (section.web_root, section.certificate_script) == (None, None)


def test_properties(tmp_path: Path) -> None:
    """The Java agent's file gives the same settings, and its directory has the certificates."""
    (tmp_path / "agent.properties").write_text(JAVA)
    section = load(environ=environment_of_properties(str(tmp_path / "agent.properties"))).cloudstack
    assert (section.servers, section.algorithm, section.name) == (("10.1.1.5", "10.1.1.6"), "shuffle", "s-1-VM")
    assert section.ca_file == tmp_path / "cloud.ca.crt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type=router host=h zone=1 name=n", "type=router"),
        ("root=/dev/vda1", "no type"),
        ("type=secstorage zone=1 name=n", "has no host"),
        ("type=secstorage host=h name=n", "has no zone"),
        ("type=secstorage host=h zone=1", "has no name"),
    ],
)
def test_refused_cmdline(tmp_path: Path, text: str, message: str) -> None:
    """Another machine's command line, and missing words, are errors that name what is missing."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        environment_of_cmdline(written(tmp_path, text))


def test_other_agents_file(tmp_path: Path) -> None:
    """The file of a KVM host's agent is refused."""
    (tmp_path / "p").write_text(
        JAVA.replace("storage.resource.NfsSecondaryStorageResource", "LibvirtComputingResource")
    )
    with pytest.raises(ConfigError, match="another agent"):
        environment_of_properties(str(tmp_path / "p"))


@pytest.mark.parametrize("read", [environment_of_cmdline, environment_of_properties])
def test_missing_file(read) -> None:
    """The error of a missing file names it."""
    with pytest.raises(ConfigError, match="/nowhere"):
        read("/nowhere")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=b", {"a": "b"}),
        ("  a : b c ", {"a": "b c "}),
        ("a b", {"a": "b"}),
        ("# c\n! d\n\na", {"a": ""}),
        ("a\\=b=c\\\\d", {"a=b": "c\\d"}),
        ("a=\\u00e4\\t\\:", {"a": "ä\t:"}),
        ("a=b\\\n   c\\\\\nd=e", {"a": "bc\\", "d": "e"}),
        ("a==b", {"a": "=b"}),
        ("", {}),
    ],
)
def test_java_properties(text: str, expected: dict[str, str]) -> None:
    """The rules of java.util.Properties apply."""
    assert parse_properties(text) == expected


def test_trust_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint in the settings replaces the certificate file of the system VM."""
    monkeypatch.setenv("SSVM_CLOUDSTACK__FINGERPRINT", "sha256:" + "ab" * 32)

    class Arguments:
        config, properties, from_cmdline = None, None, written(tmp_path, REAL)

    section = agent_settings(Arguments()).cloudstack
    assert (section.ca_file, section.fingerprint) == (None, "sha256:" + "ab" * 32)
