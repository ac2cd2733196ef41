"""The Lua scripts are files of the package, built from shared parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ssvm_worker.ledger import connection
from ssvm_worker.ledger.connection import connect, load_script
from ssvm_worker.ledger.record import ENDED_FIELDS
from tests.servers.broker import Broker

LUA = Path(connection.__file__).parent / "lua"
NAMES = sorted(path.stem for path in LUA.glob("*.lua"))


@pytest.mark.parametrize("name", NAMES)
def test_every_script_compiles(broker: Broker, name: str) -> None:
    """The broker accepts every script with its parts inserted."""
    text = load_script(name)
    assert "-- include:" not in text
    assert connect(broker.url).script_load(text)


def test_both_sides_know_the_same_fields() -> None:
    """The writer and the reader of an ended record have the same fields in the same order."""
    found = re.search(r"local ENDED_FIELDS = {(.*?)}", (LUA / "include" / "records.lua").read_text(), re.DOTALL)
    assert found
    assert tuple(re.findall(r"'(\w+)'", found[1])) == ENDED_FIELDS


def test_every_part_is_used() -> None:
    """A script uses each file of include/."""
    used = " ".join(re.findall(r"^-- include: (.+)$", "\n".join(path.read_text() for path in LUA.glob("*.lua")), re.M))
    assert set(used.split()) == {path.stem for path in (LUA / "include").glob("*.lua")}
