"""``ssvm demo --cloudstack``: a simulated management server uses the agent, the worker and the HTTP service."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ssvm_worker.demo.ports import free_port
from ssvm_worker.demo.run import exit_on_sigterm, make_image, start_worker
from ssvm_worker.demo.session import READY_S, Demo
from ssvm_worker.errors import SourceUnavailable
from ssvm_worker.ledger.embedded import require_server
from ssvm_worker.units import MiB, human_size

from .management import DownloadLink, ManagementServer, make_management_server
from .server import ServerTimes
from .zone import Entity

#: The image store as the server names it. [cloudstack.stores] maps it to a directory.
_STORE = "nfs://192.0.2.10/export/secondary"
_NAME = "s-1-VM"
_IMAGE_BYTES = 64 * MiB
#: Lines that the demo does not print: each command is named in the line of its answer.
_HIDDEN = ("  server → ", "GET_STATUS", "DOWNLOAD_IN_PROGRESS")


def run_cloudstack_demo(say: Callable[[str], None]) -> dict[str, Any]:
    """Bring an agent Up, register a template, download it through a link, and delete both.

    Return what the server stored about the template, and the seconds until Up. Raise SourceUnavailable if a step fails
    or the agent breaks the protocol.
    """
    require_server()

    def show(line: str) -> None:
        if not any(each in line for each in _HIDDEN):
            say(line)

    with exit_on_sigterm(), ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="ssvm-demo-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        demo = Demo(scratch, say, lambda *_: None, stack)
        (scratch / "store").mkdir()
        image = make_image(demo, _IMAGE_BYTES)
        server = make_management_server(scratch / "authority", say=show, times=ServerTimes(poll=1))
        server.strict = True
        web_port = free_port()
        server.zone.add_store(_STORE)
        server.zone.add_system_vm(_NAME, f"127.0.0.1:{web_port}")
        stack.enter_context(server)
        _write_settings(demo, server)
        start_worker(demo, demo.write_settings())
        demo.start("serve", "--listen", f"127.0.0.1:{web_port}")
        say("starting the HTTP service and the agent …")
        _wait_for_service(demo, web_port)
        started = time.monotonic()
        demo.start("agent")
        try:
            server.wait_up(_NAME, READY_S)
        except TimeoutError as error:
            raise demo.failure("agent") from error
        up_s = time.monotonic() - started
        template = _tell_story(server, image)
        if server.zone.problems:
            raise SourceUnavailable("; ".join(server.zone.problems), _NAME)
        say(f"\ndone: {_NAME} was Up {up_s:.1f} s after its start, and the server saw no breach of the protocol")
        return {"template": template, "up_s": up_s}


def _write_settings(demo: Demo, server: ManagementServer) -> None:
    issued = server.authority.issue("127.0.0.1", name=_NAME)
    demo.settings += [
        'zone = "demo"',
        f'state_dir = "{demo.scratch / "state"}"',
        '[broker]\nurl = "embedded"',
        f'[stores.primary]\nurl = "file://{demo.scratch / "store"}"',
        '[download]\nallow_networks = ["127.0.0.0/8"]',
        "[serve]\ncloudstack = true",
        f'[cloudstack]\nservers = ["{server.host}"]\nport = {server.port}\nname = "{_NAME}"\nzone = "1"\npod = "1"',
        f'ca_file = "{issued.ca}"\ncertificate_file = "{issued.certificate}"\nkey_file = "{issued.key}"',
        f'[cloudstack.stores]\n"{_STORE}" = "primary"',
    ]


def _wait_for_service(demo: Demo, port: int) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return
        time.sleep(0.2)
    raise demo.failure("serve")


def _tell_story(server: ManagementServer, image: dict[str, Any]) -> dict[str, Any]:
    """Register, link, fetch and delete a template. Return its columns."""
    checksum = "{SHA-256}" + image["checksum"].partition(":")[2]
    template = server.register_template(image["url"], "QCOW2", checksum=checksum, description="demo template")
    server.wait(lambda: template.ready or template.error, "the download has ended", READY_S)
    if not template.ready:
        raise SourceUnavailable(f"The template is not ready: {template.error}", image["url"])
    link = server.extract(template)
    _fetch(server, link, template)
    columns = {
        "installPath": template.install_path,
        "size": template.size,
        "physicalSize": template.physical_size,
        "checksum": template.checksum,
    }
    for what, answer in (("link", server.expire(link)), ("template", server.delete(template))):
        if not answer.ok:
            raise SourceUnavailable(f"The {what} was not deleted: {answer.details}", template.install_path)
    return columns


def _fetch(server: ManagementServer, link: DownloadLink, template: Entity) -> None:
    """Download the link as a user does. Raise SourceUnavailable if the bytes differ from those of the template."""
    digest, size, url = hashlib.sha256(), 0, urlsplit(link.url)
    with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=READY_S)) as connection:
        connection.request("GET", url.path)
        response = connection.getresponse()
        while piece := response.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    if digest.hexdigest() not in (template.checksum or ""):
        raise SourceUnavailable("The link gives other bytes than the template has", link.url)
    server.zone.write(f"user has downloaded {human_size(size)} from the link; the checksum is right")
