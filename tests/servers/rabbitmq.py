"""A real RabbitMQ with its own epmd, directory and ports, with and without TLS."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import kombu
import pytest
import trustme

from tests.neighbours import free_port, missing
from tests.waiting import CLAIM_S, PATIENCE_S

#: Debian's start scripts require a certain user.
_SCRIPT = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_CONFIG = """
listeners.tcp.1 = 127.0.0.1:{plain}
listeners.ssl.1 = 127.0.0.1:{tls}
ssl_options.cacertfile = {directory}/ca.pem
ssl_options.certfile = {directory}/server.pem
ssl_options.keyfile = {directory}/server.key
ssl_options.verify = verify_none
default_user = ssvm
default_pass = hush-rabbit
log.console = true
# A message in the hands of a worker that does not run it costs that worker its channel: after half an hour in
# operation, after seconds here.
consumer_timeout = {claim_ms}
"""


class RabbitMQ:
    """One node. *ca* signs its certificate for ``localhost``."""

    def __init__(self, directory: Path, ca: trustme.CA) -> None:
        self.directory = directory
        self.plain, self.tls = free_port(), free_port()
        self.ca_file = directory / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca_file))
        issued = ca.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(str(directory / "server.pem"))
        issued.private_key_pem.write_to_path(str(directory / "server.key"))
        text = _CONFIG.format(plain=self.plain, tls=self.tls, directory=directory, claim_ms=int(1000 * CLAIM_S))
        (directory / "rabbitmq.conf").write_text(text)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._epmd = free_port()

    @property
    def url(self) -> str:
        """Return the URL without TLS."""
        return f"amqp://ssvm:hush-rabbit@127.0.0.1:{self.plain}//"

    @property
    def tls_url(self) -> str:
        """Return the URL with TLS, with the name in the certificate."""
        return f"amqps://ssvm:hush-rabbit@localhost:{self.tls}//"

    @property
    def log(self) -> Path:
        """Return its log."""
        return self.directory / "rabbitmq.log"

    def start(self) -> None:
        """Start the node, and wait until it accepts connections."""
        environ = {
            **os.environ,
            "HOME": str(self.directory),
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"ssvm{self.plain}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "data"),
            "RABBITMQ_LOG_BASE": str(self.directory),
            # An idle node must not use a core that the tests need.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none"
            # The interval in seconds of the check for expired messages. The default is 60.
            " -rabbit channel_tick_interval 1000",
        }
        with self.log.open("ab") as log:
            for command in (["epmd", "-port", str(self._epmd), "-address", "127.0.0.1"], [str(_SCRIPT)]):
                given = {"env": environ, "cwd": self.directory, "stdout": log, "stderr": log}
                self._processes.append(subprocess.Popen(command, start_new_session=True, **given))
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_up():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def stop(self) -> None:
        """Stop the node, and wait until it has ended. Durable data is kept."""
        for each in reversed(self._processes):
            with suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGTERM)
            each.wait(PATIENCE_S)
        self._processes.clear()

    def _is_up(self) -> bool:
        assert self._processes[-1].poll() is None, self.log.read_text()
        try:
            with kombu.Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
        except (OSError, kombu.exceptions.OperationalError):
            return False
        return True


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[RabbitMQ]:
    """Return a running node."""
    if not _SCRIPT.exists() or not shutil.which("epmd"):
        missing("rabbitmq-server", "apt-get install rabbitmq-server")
    with tempfile.TemporaryDirectory(prefix="ssvm-rabbitmq-", ignore_cleanup_errors=True) as directory:
        server = RabbitMQ(Path(directory), trustme.CA())
        try:
            server.start()
            yield server
        finally:
            server.stop()
