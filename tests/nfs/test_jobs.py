"""Jobs with a real export as store: the server has exactly the received bytes."""

from __future__ import annotations

import hashlib

from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from tests import images
from tests.attempts import attempt
from tests.backup_bench import Bench, assert_whole
from tests.nfs.server import Server
from tests.servers.http import HttpServer
from tests.servers.vcenter import TestVM

pytest_plugins = ["tests.servers.http", "tests.servers.vcenter", "tests.backup_bench"]

IMAGE = images.mbr(6 << 20)
SHA256 = hashlib.sha256(IMAGE).hexdigest()


def test_download(server: Server, http_server: HttpServer) -> None:
    """A template from HTTP is verified and completely on the export, with its manifest."""
    export = server.export("download")
    store = export.store()
    asked = {"url": http_server.serve("image", IMAGE), "account": 2, "id": "7", "checksum": f"sha256:{SHA256}"}
    result = download.run(parse_request(download.Request, asked, "download"), attempt(store))
    assert result["digest"] == f"sha256:{SHA256}"
    below = "template/tmpl/2/7"
    assert export.files() == [f"{below}/7.raw", f"{below}/manifest.json", f"{below}/template.properties"]
    assert export.read(f"{below}/7.raw") == IMAGE


def test_backup(server: Server, bench: Bench, vm: TestVM) -> None:
    """A VM's disks are stored on the export as the host sends them, and nothing is left."""
    store, in_memory = server.export("backup").store(), bench.primary
    bench.primary = store
    bench.run(vm)
    bench.primary = in_memory  # the bench checks its leftovers
    assert_whole(store, *vm.streams)
    assert store.sweep(0) == 0
