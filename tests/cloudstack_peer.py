"""A management server that only its API commands, with our worker and agent as processes on this host."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trustme
from urllib3.filepost import encode_multipart_formdata

from ssvm_worker.formats.writers.qcow2 import CLUSTER, qcow2

#: Seconds until a wait is given up, and between two looks.
_WAIT_S = 1800.0
_POLL_S = float(os.environ.get("PEER_POLL_S", "2"))


class StorySkipped(Exception):
    """The story cannot run with this server."""


def signed(parameters: Mapping[str, str], secret: str) -> str:
    """Return the query of a request with its signature, as CloudStack's API wants it."""
    words = [
        f"{name}={quote(value, safe='*')}"
        for name, value in sorted(parameters.items(), key=lambda each: each[0].lower())
    ]
    query = "&".join(words)
    digest = hmac.new(secret.encode(), query.lower().encode(), hashlib.sha1).digest()
    return f"{query}&signature={quote(base64.b64encode(digest).decode(), safe='')}"


class Api:
    """CloudStack's API at one URL, for one user."""

    def __init__(self, url: str, key: str, secret: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise SystemExit(f"CLOUDSTACK_API is no URL: {url}")
        self._url, self._key, self._secret = url, key, secret

    def call(self, command: str, **parameters: str) -> dict[str, Any]:
        """Return the answer to a command. If the command is asynchronous, return the result of its job."""
        given = {"command": command, "apiKey": self._key, "response": "json"} | parameters
        try:
            with urllib.request.urlopen(f"{self._url}?{signed(given, self._secret)}", timeout=120) as answer:
                ((_, content),) = json.load(answer).items()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{command} failed: {error}: {error.read()[:500]!r}") from error
        if "jobid" not in content or command == "queryAsyncJobResult":
            return dict(content)
        found: dict[str, Any] = {}

        def ended() -> bool:
            found.update(self.call("queryAsyncJobResult", jobid=content["jobid"]))
            return bool(found["jobstatus"])

        wait(ended, f"the job of {command}")
        if found["jobstatus"] != 1:
            raise SystemExit(f"{command} failed: {found.get('jobresult')}")
        return dict(found["jobresult"])


class Peer:
    """The processes of this program, and the server that they serve."""

    def __init__(self, api: Api, environ: Mapping[str, str]) -> None:
        self.call = api.call
        self.zone = environ["CLOUDSTACK_ZONE"]
        self._given, self._host = environ, environ["AGENT_NAME"]
        server, _, port = environ["PEER"].rpartition(":")
        self._server = (server, int(port))
        #: Without the values of this program, of which some begin like our settings.
        self._environ = {**environ, "SSVM_CLOUDSTACK__SERVERS": server, "SSVM_CLOUDSTACK__PORT": port}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = Path(tempfile.mkdtemp(prefix="cloudstack-peer-"))

    def needed(self, name: str, what: str) -> str:
        """Return a value of the environment. Without it the story is skipped."""
        if not (value := self._given.get(name)):
            raise StorySkipped(f"set {name} to {what}")
        return value

    def shell(self, command: str) -> None:
        """Run a command of the operator."""
        say(f"$ {command}")
        subprocess.run(command, shell=True, check=True)

    # The processes

    def start(self, certificate: Path | None = None) -> None:
        """Start a worker and an agent, and wait until the host is Up."""
        self._start("worker")
        self._start("agent", certificate)
        self.wait_up()

    def _start(self, command: str, certificate: Path | None = None, log: Path | None = None) -> None:
        words = [sys.executable, "-m", "ssvm_worker", command]
        names = {"CERTIFICATE_FILE": "cloud.crt", "KEY_FILE": "cloud.key"} if certificate else {}
        environ = self._environ | {f"SSVM_CLOUDSTACK__{each}": f"{certificate}/{file}" for each, file in names.items()}
        output = log.open("wb") if log else None
        self._processes.append(
            subprocess.Popen(words, env=environ, start_new_session=True, stdout=output, stderr=output)
        )

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to all processes and wait for their end."""
        for each in self._processes:
            os.killpg(each.pid, number) if number == signal.SIGKILL else each.send_signal(number)
            each.wait(120)
        self._processes.clear()

    def check_refused(self, certificate: Path) -> None:
        """Start an agent with a certificate, and wait until it says that the server has refused it."""
        log = self._directory / f"{certificate.name}.log"
        self._start("agent", certificate, log)
        wait(lambda: "certificate of the agent failed" in log.read_text(), f"the certificate is refused: {log}")
        self.stop()
        if (state := self.host().get("state")) == "Up":
            raise SystemExit(f"{self._host} is {state}")

    # The server

    def host(self) -> dict[str, Any]:
        """Return the row of the agent, or nothing."""
        hosts = self.call("listHosts", type="SecondaryStorageVM", zoneid=self.zone).get("host", [])
        return next((dict(each) for each in hosts if each["name"] == self._host), {})

    def wait_up(self) -> None:
        """Wait until the host is Up."""
        wait(lambda: self.host().get("state") == "Up", f"{self._host} is Up")
        say(f"{self._host} is Up")

    def server_of_host(self) -> str:
        """Return the id of the server that has the connection of the agent."""
        return str(self.host().get("managementserverid", ""))

    def servers(self) -> list[dict[str, Any]]:
        """Return the management servers that are Up."""
        found = self.call("listManagementServers").get("managementserver", [])
        return [each for each in found if each["state"] == "Up"]

    def stores(self) -> list[dict[str, Any]]:
        """Return the image stores of the zone."""
        return list(self.call("listImageStores", zoneid=self.zone).get("imagestore", []))

    def has_system_vm(self) -> bool:
        """Return whether the zone has a running SSVM, whose address links and uploads use."""
        found = self.call("listSystemVms", systemvmtype="secondarystoragevm", zoneid=self.zone)
        return any(each["state"] == "Running" for each in found.get("systemvm", []))

    @contextmanager
    def settings(self, wanted: Mapping[str, str]) -> Iterator[None]:
        """Change global settings while the block runs."""
        before = {}
        for name in wanted:
            found = self.call("listConfigurations", name=name)["configuration"]
            before[name] = next(each["value"] for each in found if each["name"] == name)
        try:
            for name, value in wanted.items():
                self.call("updateConfiguration", name=name, value=value)
            yield
        finally:
            for name, value in before.items():
                self.call("updateConfiguration", name=name, value=value)

    # Certificates

    def address(self) -> str:
        """Return the address from which this host connects to the server."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(self._server)
            return str(probe.getsockname()[0])

    def issue(self, address: str, **fields: str) -> Path:
        """Return the directory of a certificate that the server has issued."""
        result = self.call("issueCertificate", domain=self._host, ipaddress=address, **fields)
        found = result.get("certificates", result)
        return self._keep(found["certificate"].encode(), found["privatekey"].encode())

    def own_certificate(self) -> Path:
        """Return the directory of a certificate for this host that the server has not issued."""
        made = trustme.CA().issue_cert(self.address())
        return self._keep(made.cert_chain_pems[0].bytes(), made.private_key_pem.bytes())

    def _keep(self, certificate: bytes, key: bytes) -> Path:
        directory = Path(tempfile.mkdtemp(dir=self._directory))
        (directory / "cloud.crt").write_bytes(certificate)
        (directory / "cloud.key").write_bytes(key)
        return directory

    # Templates

    def register(self, name: str, url: str = "", **fields: str) -> str:
        """Register the template under that name and return its id."""
        given = self._of_template(name) | {"url": url or self._given["TEMPLATE_URL"]} | fields
        (template,) = self.call("registerTemplate", **given)["template"]
        return str(template["id"])

    def _of_template(self, name: str) -> dict[str, str]:
        name = f"ssvm-peer-{name}"
        fields = {"name": name, "displaytext": name, "zoneid": self.zone, "format": "QCOW2", "hypervisor": "KVM"}
        return fields | {"ostypeid": self._given["CLOUDSTACK_OSTYPE"], "isextractable": "true"}

    def wait_moving(self, template: str) -> None:
        """Wait until the server shows progress of the download, such as "7% Downloaded"."""

        def moving() -> bool:
            found = self._template(template, self.zone)
            if found.get("isready"):
                say("the download has ended already, so this shows little: choose a larger file for TEMPLATE_URL")
            return bool(found.get("isready")) or str(found.get("status", ""))[:1] in tuple("123456789")

        wait(moving, "the download has begun")

    def wait_ready(self, template: str, zone: str = "") -> None:
        """Wait until the template is ready, and end the program if the server shows an error."""

        def ready() -> bool:
            found = self._template(template, zone or self.zone)
            status = str(found.get("status", ""))
            if any(word in status.lower() for word in ("error", "fail", "abandon")):
                raise SystemExit(f"the server shows: {status}")
            return bool(found.get("isready"))

        wait(ready, "the template is ready")
        say(f"template {template} is ready")

    def _template(self, template: str, zone: str) -> dict[str, Any]:
        found = self.call("listTemplates", templatefilter="self", id=template, zoneid=zone)
        return next(iter(found.get("template", [])), {})

    def data_disks(self, template: str) -> list[dict[str, Any]]:
        """Return the templates of the data disks of an OVA."""
        found = self.call("listTemplates", templatefilter="self", parenttemplateid=template, zoneid=self.zone)
        return list(found.get("template", []))

    def link(self, template: str) -> str:
        """Return a download link."""
        found = self.call("extractTemplate", id=template, mode="HTTP_DOWNLOAD", zoneid=self.zone)
        return str(found["template"]["url"])

    def upload(self, name: str) -> str:
        """Upload an image as a browser does, and return the id of the template."""
        content = self.call("getUploadParamsForTemplate", **self._of_template(name))
        ticket = content.get("getuploadparams", content)
        clusters = ((at, os.urandom(CLUSTER)) for at in range(0, 8 * CLUSTER, CLUSTER))
        image = b"".join(qcow2(clusters, 1 << 30, 8, "a.qcow2"))
        body, kind = encode_multipart_formdata({"file": ("a.qcow2", image, "application/octet-stream")})
        headers = {f"X-{each}": ticket[each] for each in ("signature", "metadata", "expires")}
        request = urllib.request.Request(ticket["postURL"], body, headers | {"Content-Type": kind})
        trust = ssl.create_default_context(cafile=self._given.get("UPLOAD_CA_FILE"))
        with urllib.request.urlopen(request, timeout=120, context=trust) as answer:
            say(f"upload to {ticket['postURL']}: {answer.status}")
        return str(ticket["id"])

    def delete(self, template: str, zone: str = "") -> None:
        """Delete the template."""
        self.call("deleteTemplate", id=template, zoneid=zone or self.zone)
        say(f"template {template} is deleted")


def wait(true: Callable[[], bool], what: str) -> None:
    """Wait until *true* returns True. End the program after half an hour.

    A server that does not answer is waited for, because a story restarts it.
    """
    deadline = time.monotonic() + _WAIT_S
    while not _is(true):
        if time.monotonic() > deadline:
            raise SystemExit(f"never came true: {what}")
        time.sleep(_POLL_S)


def _is(true: Callable[[], bool]) -> bool:
    try:
        return true()
    except OSError as error:
        say(f"no answer: {error}")
        return False


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)
