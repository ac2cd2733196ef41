"""The order of management servers, and what survives a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssvm_worker.cloudstack.server_list import AgentState, ServerList

THREE = ServerList(("a", "b", "c"))


@pytest.mark.parametrize(
    ("text", "hosts", "algorithm"),
    [("a,b@roundrobin", ("a", "b"), "roundrobin"), ("a", ("a",), "static"), (" a , ,b@", ("a", "b"), "static")],
)
def test_parse(text: str, hosts: tuple[str, ...], algorithm: str) -> None:
    """A list has hosts and an algorithm, which is static by default."""
    found = ServerList.parse(text)
    assert (found.hosts, found.algorithm) == (hosts, algorithm)


def test_text() -> None:
    """The text of a list is what the server compares."""
    assert str(ServerList.parse("a,b@shuffle")) == "a,b@shuffle"


@pytest.mark.parametrize(("name", "first"), [("s-3-VM", "a"), ("s-7-VM", "b"), ("s-8-VM", "c"), ("agent", "a")])
def test_roundrobin(name: str, first: str) -> None:
    """With roundrobin the agents of several system VMs start with different servers."""
    assert ServerList(THREE.hosts, "roundrobin").ordered(name).hosts[0] == first


def test_shuffle() -> None:
    """With shuffle each server is the first one at times, and none is lost."""
    orders = [ServerList(THREE.hosts, "shuffle").ordered("s-1-VM").hosts for _ in range(200)]
    assert {order[0] for order in orders} == {"a", "b", "c"}
    assert {tuple(sorted(order)) for order in orders} == {("a", "b", "c")}


def test_next_server(tmp_path: Path) -> None:
    """The servers are tried in order, from the start again after the last, and those to avoid are skipped."""
    state = AgentState(tmp_path / "state", THREE)
    assert [state.next_server() for _ in range(4)] == ["a", "b", "c", "a"]
    state.learn_servers(ServerList(()), ["b"])
    assert [state.next_server() for _ in range(3)] == ["c", "a", "c"]
    assert state.others("a") == ["c"]
    state.prefer("b")
    state.learn_servers(ServerList(()), ["a", "b", "c"])
    assert [state.next_server() for _ in range(3)] == ["b", "c", "a"]


def test_restart(tmp_path: Path) -> None:
    """Id and list survive a restart, but a change of the settings replaces the list."""
    state = AgentState(tmp_path / "sub" / "state", THREE)
    state.learn_id(7)
    state.learn_servers(ServerList(("d", "e"), "shuffle", 30), [])
    again = AgentState(tmp_path / "sub" / "state", ServerList(("c", "b", "a")))
    assert (again.host_id, again.servers) == (7, ServerList(("d", "e"), "shuffle", 30))
    changed = AgentState(tmp_path / "sub" / "state", ServerList(("a", "x")))
    assert (changed.host_id, changed.servers.hosts) == (7, ("a", "x"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"host_id": "x"}', "\x00", '{"host_id":1,"configured":["a","b","c"]}']
)
def test_damaged_file(tmp_path: Path, text: str) -> None:
    """A damaged file is like a missing one, and the next change replaces it."""
    (tmp_path / "state").write_text(text)
    state = AgentState(tmp_path / "state", THREE)
    assert state.servers == THREE
    state.learn_id(3)
    state.learn_id(4)
    assert AgentState(tmp_path / "state", THREE).host_id == 4


def test_no_place(tmp_path: Path) -> None:
    """If the file cannot be written, the agent works without it."""
    (tmp_path / "file").write_text("")
    state = AgentState(tmp_path / "file" / "state", THREE)
    state.learn_id(3)
    assert state.host_id == 3
