"""The section ``[cloudstack]``."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ssvm_worker import config
from ssvm_worker.errors import ConfigError

GIVEN: dict[str, Any] = {"servers": "10.0.0.2, ms2.example,fd00::2", "name": "s-7-VM"}
DIGEST = "sha256:" + "ab" * 32


def _parsed(**values: Any) -> Any:
    return config.parse({"cloudstack": GIVEN | values}, "worker.toml").cloudstack


@pytest.mark.parametrize("trust", [{"ca_file": "/x/cloud.ca.crt"}, {"fingerprint": DIGEST}, {"insecure": True}])
def test_one_way_of_trust(trust: dict[str, Any]) -> None:
    """One way of trusting the server is enough."""
    assert _parsed(**trust).servers == ("10.0.0.2", "ms2.example", "fd00::2")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Given: none"),
        ({"insecure": True, "fingerprint": DIGEST}, "Given: fingerprint, insecure"),
        ({"fingerprint": "sha1:" + "ab" * 20}, "must be sha256:"),
        ({"fingerprint": "ab" * 32}, "must be sha256:"),
        ({"insecure": True, "name": None}, "servers need name"),
        ({"insecure": True, "certificate_file": "/x"}, "belong together"),
        ({"insecure": True, "servers": ["nfs://h"]}, "is not a host"),
        ({"insecure": True, "private": {"mac": "02-fc"}}, "cloudstack.private.mac"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    """Contradictions and malformed values are errors that say what to do."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        _parsed(**values)


def test_fingerprint_with_colons() -> None:
    """A fingerprint may have colons and capitals, as openssl prints it."""
    assert _parsed(fingerprint="SHA256:" + ":".join(["AB"] * 32)).fingerprint == DIGEST


def test_absent() -> None:
    """Without servers nothing is required, because workers do not need the section."""
    assert config.parse({}, "worker.toml").cloudstack.servers == ()
