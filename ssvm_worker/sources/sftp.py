"""Files over SSH: sftp://, and scp:// by the same protocol, as OpenSSH's scp does since 9.0. The adapter of paramiko.

The server is believed only if the settings know its host key. No agent, no keys of the user that the worker runs as.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import threading
import time
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
    WorkerError,
)
from ssvm_worker.net.sockets import TICK, ConnectOptions, Stalled, StallWatch, WatchedSocket, connect
from ssvm_worker.net.urls import WebUrl, parse
from ssvm_worker.streaming.interfaces import CHUNK, Check
from ssvm_worker.units import KiB, MiB

from .ending import empty, whole
from .http.request import translate
from .options import SourceOptions

#: Bytes that are asked for, and held, at once.
_AHEAD = 4 * CHUNK
#: Bytes that a server may send before it has answered the first request about the file.
_MOST_UNASKED = MiB
#: Bytes of one SSH packet; OpenSSH takes 256 KiB at most (PACKET_MAX_SIZE).
_MOST_PACKET = 512 * KiB
#: Bytes that wait to be read. paramiko announces a window of 2 MiB, and does not enforce it.
_MOST_HELD = 8 * MiB
#: Seconds between two messages that keep firewalls from forgetting the connection while a store is slow.
_KEEPALIVE_S = 15


@dataclass(frozen=True)
class SftpVersion:
    """Tells one state of a file from another."""

    size: int
    #: Seconds since the epoch, as the server gives it.
    modified: int


class SftpSource:
    """A ``Source`` of sftp://HOST/PATH; the path is taken from the root, the user from the credentials."""

    resumable = True

    def __init__(self, url: str, access: SourceOptions, version: SftpVersion | None = None) -> None:
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
        with self._opened(offset) as (file, channel):
            assert self.size is not None
            position = offset
            while position < self.size:
                before = position
                channel.allow(2 * _AHEAD)
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
    def _opened(self, offset: int) -> Iterator[tuple[Any, _Channel]]:
        """The file, which is the one that an earlier open saw if there is an *offset*, and the channel it comes by.

        Nothing is closed politely: a server that has fallen silent would have to answer.
        """
        paramiko = _paramiko()
        http = self._access.http
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        with self._translated(paramiko):
            try:
                self._load_host_keys(client)
                watch = StallWatch(self._access.check, http.stall_s, http.min_rate)
                line = _Line(
                    connect(self._url.host, self._url.port, ConnectOptions(http.rule, http.connect_timeout_s), watch)
                )
                with _guarded(client, line, self._access.check, http.stall_s) as opened:
                    self._log_in(client, line)
                    channel = _Channel(line, client.get_transport(), watch)
                    file = paramiko.SFTPClient(channel).open(self._url.path, "rb")
                    self._compare(file.stat(), offset)
                    opened.set()
                    yield file, channel
            finally:
                client.close()

    @contextmanager
    def _translated(self, paramiko: Any) -> Iterator[None]:
        try:
            yield
        except paramiko.BadHostKeyException as error:
            raise SourceDenied("The host key is another one than the settings know", self.name, _KNOWN_HOSTS) from error
        except paramiko.AuthenticationException as error:
            raise self._not_let_in(error) from error
        except paramiko.SSHException as error:
            raise self._ssh_error(error) from error
        except FileNotFoundError as error:
            raise SourceNotFound("There is no such file", self.name, "Look at the path") from error
        except PermissionError as error:
            raise SourceDenied("The server does not let us read the file", self.name, "Look at its mode") from error
        except (OSError, EOFError) as error:
            raise translate(error, self.name) from error
        except (paramiko.SFTPError, struct.error, ValueError, LookupError) as error:
            raise self._broken(error) from error

    def _log_in(self, client: Any, line: socket.socket) -> None:
        access = self._access
        # The guard ends the log-in after stall_s. paramiko's own limits, each for one step, only stand behind it.
        behind = 2 * access.http.stall_s + TICK
        try:
            client.connect(
                self._url.host,
                self._url.port,
                access.username,
                access.password,
                key_filename=access.private_key,
                sock=line,
                allow_agent=False,
                look_for_keys=False,
                banner_timeout=behind,
                auth_timeout=behind,
                channel_timeout=behind,
            )
        except (OSError, EOFError, WorkerError, _paramiko().SSHException):
            raise
        except Exception as error:  # what paramiko's thread met in the server's bytes, which may be of any class
            raise self._broken(error) from error
        client.get_transport().set_keepalive(_KEEPALIVE_S)

    def _load_host_keys(self, client: Any) -> None:
        path = self._access.known_hosts
        if path is None:
            raise SourceDenied("No host key is known", self.name, _KNOWN_HOSTS)
        try:
            client.load_host_keys(path)
        except OSError as error:
            raise ConfigError(f"No host keys can be read: {error.strerror}", path, _KNOWN_HOSTS) from error

    def _not_let_in(self, error: Exception) -> SourceDenied | SourceUnavailable:
        said = str(error)
        if "timeout" in said or "shut down" in said:  # paramiko has one class for a refusal and for a broken connection
            return SourceUnavailable("The connection broke during the log-in", self.name, "Look at the server")
        return SourceDenied(f"The server refuses us: {said[:200]!a}", self.name, "Look at the credentials")

    def _ssh_error(self, error: Exception) -> SourceDenied | SourceUnavailable:
        if "not found in known_hosts" in str(error):
            return SourceDenied("The host key is not known", self.name, _KNOWN_HOSTS)
        return SourceUnavailable(f"The connection failed: {str(error)[:200]!a}", self.name, "Look at the server")

    def _broken(self, error: Exception) -> SourceUnavailable:
        what = f"The server broke the protocol: {type(error).__name__}: {str(error)[:200]!a}"
        return SourceUnavailable(what, self.name, "Look at the server")


def _ahead(position: int, end: int) -> Iterator[tuple[int, int]]:
    """The next chunks, to be asked for together: one by one, each would wait for the network there and back."""
    for start in range(position, min(end, position + _AHEAD), CHUNK):
        yield start, min(CHUNK, end - start)


_KNOWN_HOSTS = "Put the server's key, as ssh-keyscan prints it, into download.known_hosts when you have checked it"


class _Line(WatchedSocket):
    """The socket as paramiko's own thread reads it: what a server may send unasked has a limit."""

    def __init__(self, plain: socket.socket) -> None:
        """Take over a connected socket."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self._left = _MOST_UNASKED
        self._channel: Any = None

    def opened(self, channel: Any) -> None:
        """Limit what waits to be read of *channel*, in place of all that comes."""
        self._channel = channel

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Read some bytes; an OSError for what is too much."""
        data = super().recv(size, flags)
        channel = self._channel
        self._left -= len(data) if channel is None else 0
        held = len(channel.in_buffer) + len(channel.in_stderr_buffer) if channel is not None else 0
        if self._left < 0 or size > _MOST_PACKET or held > _MOST_HELD:
            raise OSError(errno.EMSGSIZE, "The server sends more than it was asked for")
        return data


class _Channel:
    """The channel of an SFTP session under a watch: what paramiko's SFTPClient needs of a channel."""

    def __init__(self, line: _Line, transport: Any, watch: StallWatch) -> None:
        """Open it on a transport that is logged in."""
        self._channel = transport.open_session()
        line.opened(self._channel)
        self._channel.invoke_subsystem("sftp")
        self._channel.settimeout(TICK)
        self._watch = watch
        self._left = _MOST_UNASKED

    def allow(self, size: int) -> None:
        """Let that many bytes come from now on; more are an OSError."""
        self._left = size

    def get_name(self) -> str:
        """The channel's name, for paramiko's log."""
        return str(self._channel.get_name())

    def recv(self, size: int) -> bytes:
        """Read some bytes, or b"" at the end; Stalled, and what the watch's check raises."""
        data = b""

        def move() -> int:
            nonlocal data
            data = self._channel.recv(size)
            return len(data)

        self._left -= self._watch.wait(move)
        if self._left < 0:
            raise OSError(errno.EMSGSIZE, "The server sends more than it was asked for")
        return data

    def send(self, data: bytes) -> int:
        """Send some bytes. The reader, which waits for the answer, notices a server that takes none.

        Bytes for a closed channel are dropped. Paramiko's thread of requests may still send when the reader has ended.
        """
        while True:
            try:
                return int(self._channel.send(data))
            except TimeoutError:
                pass
            except OSError:
                if not self._channel.closed:
                    raise
                return len(data)


@contextmanager
def _guarded(client: Any, line: socket.socket, check: Check, stall_s: float) -> Iterator[threading.Event]:
    """Close the connection on a cancel, and raise that: most of paramiko's waits cannot be ended otherwise.

    Raises Stalled too, unless the event that it gives is set within *stall_s*: when the file is open.
    """
    opened, done = threading.Event(), threading.Event()
    raised: list[BaseException] = []
    until = time.monotonic() + stall_s

    def look() -> None:
        while not done.wait(TICK):
            try:
                check()
                if not opened.is_set() and time.monotonic() > until:
                    raise Stalled(f"The server did not open the file within {stall_s:g} s")
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
                raised.append(error)
                client.close()
                line.close()
                return

    guard = threading.Thread(target=look, name="sftp-guard", daemon=True)
    guard.start()
    try:
        yield opened
    except Exception:
        if raised:
            raise raised[0] from None
        raise
    finally:
        done.set()
        guard.join()


def _paramiko() -> Any:
    try:
        import paramiko
    except ImportError as error:
        raise ConfigError("sftp:// needs paramiko", "sftp", "pip install 'ssvm-worker[sftp]'") from error
    # Its log repeats what it raises, with tracebacks and with the server's words as they came.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    return paramiko
