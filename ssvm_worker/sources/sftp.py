"""Files over SSH: sftp://, and scp:// by the same protocol, as OpenSSH's scp does since 9.0. The adapter of paramiko.

The server is believed only if the settings know its host key. No agent, no keys of the user that the worker runs as.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ssvm_worker.errors import (
    ConfigError,
    InvalidRequest,
    SourceChanged,
    SourceDenied,
    SourceNotFound,
    SourceUnavailable,
)
from ssvm_worker.sockets import TICK, Dial, Watch, connect
from ssvm_worker.stream import CHUNK, Check
from ssvm_worker.weburl import WebUrl, parse

from .access import Access
from .ending import empty, whole
from .exchange import translate

#: Bytes that are asked for, and held, at once.
_AHEAD = 4 * CHUNK


@dataclass(frozen=True)
class SftpVersion:
    """Tells one state of a file from another."""

    size: int
    #: Seconds since the epoch, as the server gives it.
    modified: int


class SftpSource:
    """``stream.Source`` of sftp://HOST/PATH; the path is taken from the root, the user from the credentials."""

    resumable = True

    def __init__(self, url: str, access: Access, version: SftpVersion | None = None) -> None:
        """Raises InvalidRequest for what is no such URL, or without a user; touches nothing."""
        self._url: WebUrl = parse(url, ("sftp", "scp"))
        if not access.username:
            raise InvalidRequest("SSH needs a user", self._url.name, "Name credentials with a username")
        self._access = access
        self.name = self._url.name
        self.validator = version
        self.size = version.size if version else None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on; SourceNotFound, SourceDenied, SourceChanged, SourceUnavailable."""
        with self._connected() as client, client.open_sftp() as session:
            file = session.open(self._url.path, "rb")
            self._compare(file.stat(), offset)
            assert self.size is not None
            position = offset
            while position < self.size:
                before = position
                for chunk in filter(None, file.readv(list(_ahead(position, self.size)))):
                    position += len(chunk)
                    yield chunk
                if position < min(self.size, before + _AHEAD):
                    break
        whole(position, self.size, self.name)

    def _compare(self, seen: Any, offset: int) -> None:
        if seen.st_size is None:
            raise SourceDenied("The server does not tell the file's size", self.name, "Look at the server")
        version = SftpVersion(seen.st_size, int(seen.st_mtime or 0))
        if offset and version != self.validator:
            raise SourceChanged("The file has changed since its first bytes came", self.name, "Ask again")
        self.validator, self.size = version, version.size
        if not self.size:
            raise empty(self.name)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        paramiko = _paramiko()
        http = self._access.http
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        try:
            self._load_host_keys(client)
            watch = Watch(self._access.check, http.stall_s, http.min_rate)
            sock = connect(self._url.host, self._url.port, Dial(http.rule, http.connect_timeout_s), watch)
            with _interruptible(client, sock, self._access.check):
                self._log_in(client, sock)
                yield client
        except paramiko.BadHostKeyException as error:
            raise SourceDenied("The host key is another one than the settings know", self.name, _KNOWN_HOSTS) from error
        except paramiko.AuthenticationException as error:
            raise SourceDenied(f"The server refuses us: {error}", self.name, "Look at the credentials") from error
        except paramiko.SSHException as error:
            raise self._ssh_error(error) from error
        except FileNotFoundError as error:
            raise SourceNotFound("There is no such file", self.name, "Look at the path") from error
        except PermissionError as error:
            raise SourceDenied("The server does not let us read the file", self.name, "Look at its mode") from error
        except (OSError, EOFError) as error:
            raise translate(error, self.name) from error
        finally:
            client.close()

    def _log_in(self, client: Any, sock: socket.socket) -> None:
        access = self._access
        client.connect(
            self._url.host,
            self._url.port,
            access.username,
            access.password,
            key_filename=access.private_key,
            sock=sock,
            allow_agent=False,
            look_for_keys=False,
            banner_timeout=access.http.stall_s,
            auth_timeout=access.http.stall_s,
            channel_timeout=access.http.stall_s,
        )

    def _load_host_keys(self, client: Any) -> None:
        path = self._access.known_hosts
        if path is None:
            raise SourceDenied("No host key is known", self.name, _KNOWN_HOSTS)
        try:
            client.load_host_keys(path)
        except OSError as error:
            raise ConfigError(f"No host keys can be read: {error.strerror}", path, _KNOWN_HOSTS) from error

    def _ssh_error(self, error: Exception) -> SourceDenied | SourceUnavailable:
        if "not found in known_hosts" in str(error):
            return SourceDenied("The host key is not known", self.name, _KNOWN_HOSTS)
        return SourceUnavailable(f"The connection failed: {error}", self.name, "Look at the server")


def _ahead(position: int, end: int) -> Iterator[tuple[int, int]]:
    """The next chunks, to be asked for together: one by one, each would wait for the network there and back."""
    for start in range(position, min(end, position + _AHEAD), CHUNK):
        yield start, min(CHUNK, end - start)


_KNOWN_HOSTS = "Put the server's key, as ssh-keyscan prints it, into download.known_hosts when you have checked it"


@contextmanager
def _interruptible(client: Any, sock: socket.socket, check: Check) -> Iterator[None]:
    """Within, a cancel closes the connection, and is what is raised: paramiko's waits cannot be ended otherwise."""
    done = threading.Event()
    raised: list[BaseException] = []

    def look() -> None:
        while not done.wait(TICK):
            try:
                check()
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
                raised.append(error)
                client.close()
                sock.close()
                return

    watcher = threading.Thread(target=look, name="sftp-check", daemon=True)
    watcher.start()
    try:
        yield
    except Exception:
        if raised:
            raise raised[0] from None
        raise
    finally:
        done.set()
        watcher.join()


def _paramiko() -> Any:
    try:
        import paramiko
    except ImportError as error:
        raise ConfigError("sftp:// needs paramiko", "sftp", "Install the extra: uv sync --extra sftp") from error
    return paramiko
