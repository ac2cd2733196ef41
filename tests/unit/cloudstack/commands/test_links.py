"""Download links: the answers are the recorded ones, and the link works and ends through the service."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.wiring import assembly
from tests.cloudstack_commands import PARENT, agent_settings, asker, vector
from tests.servers.service import Service

IMAGE = os.urandom(1 << 20)
KEY = "template/tmpl/2/202/9e8d7c6b-0000-3000-8000-000000000001.ova"
PATH = "33333333-2222-4333-8444-555555555555/A-test-template.ova"
URL = f"http://198.51.100.77/userdata/{PATH}"
Ask = Callable[[RawMessage], RawMessage]


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    """A service whose store has the object of the vectors."""
    found = start_service(cloudstack=True)
    (found.store / KEY).parent.mkdir(parents=True)
    (found.store / KEY).write_bytes(IMAGE)
    return found


@pytest.fixture
def ask(service: Service) -> Ask:
    return asker(agent_settings(service.settings))


@pytest.fixture
def web_root(tmp_path: Path) -> Path:
    found = tmp_path / "www"
    found.mkdir()
    return found


def create(**changed: object) -> RawMessage:
    return vector("req-create-entity-url-template", **changed)


def delete(**changed: object) -> RawMessage:
    given = {"extractUrl": URL, "path": KEY, "parentPath": PARENT}
    return vector("req-delete-entity-url-template", **given | changed)


def test_answer(ask: Ask) -> None:
    """The answer to a good command is that of the Java agent."""
    expected = vector("ans-create-entity-url-ok")
    answer = ask(create())
    assert (answer.name, answer.content) == (expected.name, expected.content)


def test_life(service: Service, ask: Ask) -> None:
    """A link gives the object until the server deletes it. A second deletion is no error."""
    assert ask(create()).content["result"]
    assert service.request("GET", f"/userdata/{PATH}").data == IMAGE
    answers = [ask(delete()), ask(delete())]
    assert [(each.name, each.content["result"]) for each in answers] == [("com.cloud.agent.api.Answer", True)] * 2
    assert service.request("GET", f"/userdata/{PATH}").status == 404
    assert (service.store / KEY).exists()


def test_after_a_restart(service: Service, ask: Ask) -> None:
    """Another agent deletes the links of a dead one."""
    ask(create())
    asker(agent_settings(service.settings))(delete())
    assert service.request("GET", f"/userdata/{PATH}").status == 404


def test_by_directory(service: Service, ask: Ask) -> None:
    """A command may name only the directory of the store, once a command has named the store."""
    ask(create())
    answer = ask(create(data=None, parent=PARENT, filepathInExtractURL="again"))
    assert answer.content["result"]
    assert service.request("GET", "/userdata/again/A-test-template.ova").data == IMAGE


@pytest.mark.parametrize("key", ["snapshots/2/5/60e97a3c-1", "snapshots/2/5/a.b/a.b.qcow2", "volumes/2/31/v.1.vhd"])
def test_snapshots_and_volumes(service: Service, ask: Ask, key: str) -> None:
    """Snapshots and volumes have links too, also without an extension, and with dots in their names."""
    file = service.store / key
    file.parent.mkdir(parents=True)
    file.write_bytes(IMAGE)
    answer = ask(create(installPath=key, filenameInExtractURL="a.b.c.qcow2"))
    assert answer.content["result"]
    assert service.request("GET", f"/userdata/{PATH.split('/')[0]}/a.b.c.qcow2").data == IMAGE


def test_volume(service: Service, ask: Ask) -> None:
    """The copy of a volume that the server made for the download is deleted with its link."""
    volume = "volumes/2/31/x.ova"
    (service.store / volume).parent.mkdir(parents=True)
    (service.store / volume).write_bytes(IMAGE)
    assert ask(create(installPath=volume)).content["result"]
    assert ask(delete(type="VOLUME", path=volume)).content["result"]
    assert not (service.store / volume).exists()


def test_volume_elsewhere(service: Service, ask: Ask) -> None:
    """With a link to a volume, no file of a template is deleted."""
    ask(create())
    assert not ask(delete(type="VOLUME")).content["result"]
    assert (service.store / KEY).exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"installPath": "template/tmpl/2/202/missing.ova"}, "missing.ova"),
        ({"installPath": "template/tmpl/2/202"}, "202"),
        ({"installPath": "../../etc/passwd"}, "key"),
        ({"installPath": "template/tmpl/2/202/$(reboot)"}, "key"),
        ({"filenameInExtractURL": "../../x"}, "path of a link"),
        ({"filenameInExtractURL": ".htaccess"}, "path of a link"),
        ({"filepathInExtractURL": ".."}, "path of a link"),
        ({"filepathInExtractURL": "a/b"}, "path of a link"),
        ({"data": None, "parent": "unknown"}, "no image store"),
    ],
)
def test_refused(service: Service, ask: Ask, changed: dict[str, object], reason: str) -> None:
    """A missing object, a directory and an unsafe path get ``result: false`` with the reason, and no link."""
    answer = ask(create(**changed))
    assert (answer.content["result"], reason in answer.content["details"]) == (False, True)
    assert assembly.open_cloudstack_web(service.settings).links() == []


def test_symbolic_link_on_the_store(service: Service, ask: Ask) -> None:
    """A symbolic link on the store is no object."""
    (service.store / KEY).with_name("evil.ova").symlink_to("/etc/passwd")
    assert not ask(create(installPath="template/tmpl/2/202/evil.ova")).content["result"]


def test_apache(service: Service, web_root: Path) -> None:
    """With a web root, the path is also a symbolic link to the file, until the server deletes it."""
    ask = asker(agent_settings(service.settings, web_root))
    ask(create())
    assert (web_root / "userdata" / PATH).readlink() == service.store / KEY
    ask(create())
    ask(delete())
    assert list((web_root / "userdata").iterdir()) == []


@pytest.mark.parametrize(
    "url", ["http://x/userdata/../../etc/passwd", "http://x/userdata/%2e%2e/x", "http://x/userdata/"]
)
def test_hostile_deletion(service: Service, web_root: Path, url: str) -> None:
    """An unsafe URL deletes nothing."""
    (web_root / "userdata").mkdir()
    (web_root / "x").symlink_to("/etc")
    answer = asker(agent_settings(service.settings, web_root))(delete(extractUrl=url))
    assert not answer.content["result"]
    assert (web_root / "x").is_symlink()


def test_only_own_links(service: Service, web_root: Path) -> None:
    """A deletion leaves files and foreign directories in the web root alone."""
    file = web_root / "userdata/folder/file.ova"
    file.parent.mkdir(parents=True)
    file.touch()
    asker(agent_settings(service.settings, web_root))(delete(extractUrl="http://x/userdata/folder/file.ova"))
    assert file.exists()
