"""``make cloudstack-peer PEER=host:port``: stories with a real management server, through its API.

docs/how-to/cloudstack-peer.md says what the operator prepares. All values come from the environment.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

_WAIT_S = 1800.0
_POLL_S = 2.0


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
        """Return the answer to a command. Of an asynchronous one, return the result of its job."""
        given = {"command": command, "apiKey": self._key, "response": "json"} | parameters
        with urllib.request.urlopen(f"{self._url}?{signed(given, self._secret)}", timeout=120) as answer:
            ((_, content),) = json.load(answer).items()
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
        self._api, self._zone, self._os_type = api, environ["CLOUDSTACK_ZONE"], environ["CLOUDSTACK_OSTYPE"]
        self._url, self._host = environ["TEMPLATE_URL"], environ["AGENT_NAME"]
        server, _, port = environ["PEER"].rpartition(":")
        self._environ = {**environ, "SSVM_CLOUDSTACK__SERVERS": server, "SSVM_CLOUDSTACK__PORT": port}
        self._environ = {name: each for name, each in self._environ.items() if name not in ("PEER", "AGENT_NAME")}
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start a worker and an agent, and wait until the host is Up."""
        for command in ("worker", "agent"):
            words = [sys.executable, "-m", "ssvm_worker", command]
            self._processes.append(subprocess.Popen(words, env=self._environ, start_new_session=True))
        wait(lambda: self._state() == "Up", f"{self._host} is Up")
        say(f"{self._host} is Up")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to all processes and wait for their end."""
        for each in self._processes:
            os.killpg(each.pid, number) if number == signal.SIGKILL else each.send_signal(number)
            each.wait(120)
        self._processes.clear()

    def _state(self) -> str:
        hosts = self._api.call("listHosts", type="SecondaryStorageVM", zoneid=self._zone).get("host", [])
        return next((each["state"] for each in hosts if each["name"] == self._host), "unknown")

    def register(self, name: str) -> str:
        """Register the template under that name and return its id."""
        fields = {"name": name, "displaytext": name, "url": self._url, "zoneid": self._zone}
        fields |= {"format": "QCOW2", "hypervisor": "KVM", "ostypeid": self._os_type, "isextractable": "true"}
        (template,) = self._api.call("registerTemplate", **fields)["template"]
        return str(template["id"])

    def wait_ready(self, template: str) -> None:
        """Wait until the template is ready, and end the program if the server shows an error."""

        def ready() -> bool:
            fields = {"templatefilter": "self", "id": template, "zoneid": self._zone}
            (found,) = self._api.call("listTemplates", **fields)["template"]
            status = str(found.get("status", ""))
            if any(word in status.lower() for word in ("error", "fail", "abandon")):
                raise SystemExit(f"the server shows: {status}")
            return bool(found["isready"])

        wait(ready, "the template is ready")
        say(f"template {template} is ready")

    def life(self) -> None:
        """Register a template, make a link to it, and delete it."""
        template = self.register("ssvm-peer-life")
        self.wait_ready(template)
        link = self._api.call("extractTemplate", id=template, mode="HTTP_DOWNLOAD", zoneid=self._zone)
        say(f"link: {link['template']['url']}")
        self._delete(template)

    def killed(self) -> None:
        """Kill agent and worker during a download, and start both again."""
        template = self.register("ssvm-peer-killed")
        time.sleep(_POLL_S)
        self.stop(signal.SIGKILL)
        say("agent and worker are killed")
        self.start()
        self.wait_ready(template)
        self._delete(template)

    def _delete(self, template: str) -> None:
        self._api.call("deleteTemplate", id=template, zoneid=self._zone)
        say(f"template {template} is deleted")


def wait(true: Callable[[], bool], what: str) -> None:
    """Wait until *true* returns True. End the program after half an hour."""
    deadline = time.monotonic() + _WAIT_S
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"never came true: {what}")
        time.sleep(_POLL_S)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main() -> int:
    """Run all stories."""
    needed = ("PEER", "CLOUDSTACK_API", "CLOUDSTACK_API_KEY", "CLOUDSTACK_SECRET_KEY", "CLOUDSTACK_ZONE")
    needed += ("CLOUDSTACK_OSTYPE", "TEMPLATE_URL", "AGENT_NAME", "SSVM_CONFIG")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise SystemExit(f"set {', '.join(missing)}: docs/how-to/cloudstack-peer.md")
    given = os.environ
    api = Api(given["CLOUDSTACK_API"], given["CLOUDSTACK_API_KEY"], given["CLOUDSTACK_SECRET_KEY"])
    peer = Peer(api, given)
    try:
        peer.start()
        peer.life()
        peer.killed()
    finally:
        peer.stop()
    say("all stories have ended well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
