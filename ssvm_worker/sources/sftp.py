"""Read files over SSH: sftp://, and scp://, which uses the same protocol as OpenSSH's scp since 9.0.

This module is the adapter of paramiko. A server is trusted only if its host key is in the settings. No SSH agent is
used, and no key of the user that runs the worker.
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
    extra_missing,
)
from ssvm_worker.net.sockets import TICK, ConnectOptions, Stalled, StallWatch, WatchedSocket, connect
from ssvm_worker.net.urls import WebUrl, parse
from ssvm_worker.streaming.interfaces import CHUNK, Check
from ssvm_worker.units import KiB, MiB

from .http.source import translate_error
from .options import SourceOptions, empty_file, require_complete_body

#: Bytes that are requested, and held, at once.
_READ_AHEAD = 4 * CHUNK
#: Bytes that a server may send before it has answered the first request about the file.
_MAX_UNREQUESTED = MiB
#: Bytes of one SSH packet. OpenSSH accepts at most 256 KiB (PACKET_MAX_SIZE).
_MAX_PACKET = 512 * KiB
#: Received bytes that were not read yet. paramiko announces a window of 2 MiB, but does not enforce it.
_MAX_UNREAD = 8 * MiB
#: Seconds between two keep-alive messages. Without them a firewall drops the connection while a store is slow.
_KEEPALIVE_S = 15
_KNOWN_HOSTS = "Check the server's key as ssh-keyscan prints it, then add it to download.known_hosts"


@dataclass(frozen=True)
class SftpVersion:
    """Identity of one version of a file."""

    size: int
    #: Seconds since the epoch, as the server reports them.
    modified: int


class SftpSource:
    """``Source`` of sftp://HOST/PATH. The path is absolute. The user comes from the credentials."""

    resumable = True

    def __init__(self, url: str, options: SourceOptions, version: SftpVersion | None = None) -> None:
        """Parse the URL without a connection. Raises InvalidRequest for a wrong URL, or without a user."""
        self._url: WebUrl = parse(url, ("sftp", "scp"))
        if not options.username:
            raise InvalidRequest("An SSH URL needs a user", self._url.name, "Name credentials with a username")
        self._options = options
        self.name = self._url.name
        self.validator = version
        self.size = version.size if version else None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on.

        Raises SourceNotFound, SourceDenied, SourceChanged or SourceUnavailable.
        """
        with self._opened(offset) as (file, channel):
            assert self.size is not None
            position = offset
            while position < self.size:
                before, end = position, min(self.size, position + _READ_AHEAD)
                channel.set_limit(2 * _READ_AHEAD)
                # Requested together: one by one, each chunk would take a round trip.
                ranges = [(start, min(CHUNK, self.size - start)) for start in range(before, end, CHUNK)]
                for chunk in filter(None, file.readv(ranges)):
                    position += len(chunk)
                    yield chunk
                if position < end:
                    break
        require_complete_body(position, self.size, self.name)

    def _compare(self, seen: Any, offset: int) -> None:
        if seen.st_size is None:
            raise SourceDenied("The server does not report the file's size", self.name, "Check the server")
        version = SftpVersion(seen.st_size, int(seen.st_mtime or 0))
        if offset and version != self.validator:
            raise SourceChanged("The file has changed since the download began", self.name, "Submit the job again")
        self.validator, self.size = version, version.size
        if not self.size:
            raise empty_file(self.name)

    @contextmanager
    def _opened(self, offset: int) -> Iterator[tuple[Any, _WatchedChannel]]:
        """Yield the open file and its channel. With an *offset*, the file must be the one of the earlier open.

        The file and the channel are not closed: a close waits for the server, which may be silent.
        """
        paramiko = _import_paramiko()
        http, check = self._options.http, self._options.check
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        with self._translating(paramiko):
            try:
                path = self._options.known_hosts
                if path is None:
                    raise SourceDenied("No host key is known", self.name, _KNOWN_HOSTS)
                try:
                    client.load_host_keys(path)
                except OSError as error:
                    raise ConfigError(f"The host keys cannot be read: {error.strerror}", path, _KNOWN_HOSTS) from error
                watch = StallWatch(check, http.stall_s, http.min_rate)
                connect_options = ConnectOptions(http.rule, http.connect_timeout_s)
                sock = _LimitedSocket(connect(self._url.host, self._url.port, connect_options, watch))
                with _close_on_cancel(client, sock, check, http.stall_s) as opened:
                    self._log_in(client, sock)
                    channel = _WatchedChannel(sock, client.get_transport(), watch)
                    file = paramiko.SFTPClient(channel).open(self._url.path, "rb")
                    self._compare(file.stat(), offset)
                    opened.set()
                    yield file, channel
            finally:
                client.close()

    @contextmanager
    def _translating(self, paramiko: Any) -> Iterator[None]:
        try:
            yield
        except paramiko.BadHostKeyException as error:
            raise SourceDenied("The host key is another one than in the settings", self.name, _KNOWN_HOSTS) from error
        except paramiko.AuthenticationException as error:
            raise self._login_error(error) from error
        except paramiko.SSHException as error:
            if "not found in known_hosts" in str(error):
                raise SourceDenied("The host key is not known", self.name, _KNOWN_HOSTS) from error
            what = f"The connection failed: {str(error)[:200]!a}"
            raise SourceUnavailable(what, self.name, "Check the server") from error
        except FileNotFoundError as error:
            raise SourceNotFound("The file does not exist", self.name, "Check the path") from error
        except PermissionError as error:
            what = "The server does not permit reading the file"
            raise SourceDenied(what, self.name, "Check the file's mode on the server") from error
        except (OSError, EOFError) as error:
            raise translate_error(error, self.name) from error
        except (paramiko.SFTPError, struct.error, ValueError, LookupError) as error:
            raise self._protocol_error(error) from error

    def _log_in(self, client: Any, sock: socket.socket) -> None:
        options = self._options
        # _close_on_cancel ends the login after stall_s. paramiko's own limits, one for each step, are a second line.
        timeout = 2 * options.http.stall_s + TICK
        try:
            client.connect(
                self._url.host,
                self._url.port,
                options.username,
                options.password,
                key_filename=options.private_key,
                sock=sock,
                allow_agent=False,
                look_for_keys=False,
                banner_timeout=timeout,
                auth_timeout=timeout,
                channel_timeout=timeout,
            )
        except (OSError, EOFError, WorkerError, _import_paramiko().SSHException):
            raise
        except Exception as error:  # paramiko's thread raises any class for wrong bytes from the server
            raise self._protocol_error(error) from error
        client.get_transport().set_keepalive(_KEEPALIVE_S)

    def _login_error(self, error: Exception) -> SourceDenied | SourceUnavailable:
        reason = str(error)
        if "timeout" in reason or "shut down" in reason:  # paramiko has one class for a refusal and for a broken line
            return SourceUnavailable("The connection broke during the login", self.name, "Check the server")
        return SourceDenied(f"The server refused the login: {reason[:200]!a}", self.name, "Check the credentials")

    def _protocol_error(self, error: Exception) -> SourceUnavailable:
        what = f"The server violated the protocol: {type(error).__name__}: {str(error)[:200]!a}"
        return SourceUnavailable(what, self.name, "Check the server")


class _LimitedSocket(WatchedSocket):
    """Socket for paramiko's own thread. It limits the bytes that the server may send without a request."""

    def __init__(self, plain: socket.socket) -> None:
        """Take over a connected socket."""
        super().__init__(plain.family, plain.type, plain.proto, plain.detach())
        self._remaining = _MAX_UNREQUESTED
        self._channel: Any = None

    def limit_unread(self, channel: Any) -> None:
        """Limit the unread bytes of *channel* instead of all bytes."""
        self._channel = channel

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Read some bytes. Raises OSError if the server exceeds a limit."""
        data = super().recv(size, flags)
        channel = self._channel
        self._remaining -= len(data) if channel is None else 0
        unread = len(channel.in_buffer) + len(channel.in_stderr_buffer) if channel is not None else 0
        if self._remaining < 0 or size > _MAX_PACKET or unread > _MAX_UNREAD:
            raise OSError(errno.EMSGSIZE, "The server sent more than it was asked for")
        return data


class _WatchedChannel:
    """Channel of an SFTP session under a stall watch. It has the methods that paramiko's SFTPClient calls."""

    def __init__(self, sock: _LimitedSocket, transport: Any, watch: StallWatch) -> None:
        """Open the channel on a transport after the login."""
        self._channel = transport.open_session()
        sock.limit_unread(self._channel)
        self._channel.invoke_subsystem("sftp")
        self._channel.settimeout(TICK)
        self._watch = watch
        self._remaining = _MAX_UNREQUESTED

    def set_limit(self, size: int) -> None:
        """Accept *size* more bytes. ``recv`` raises OSError for the bytes beyond."""
        self._remaining = size

    def get_name(self) -> str:
        """Return the channel's name for paramiko's log."""
        return str(self._channel.get_name())

    def recv(self, size: int) -> bytes:
        """Read some bytes, or b"" at the end. Raises Stalled, and the errors of the watch's check."""
        data = b""

        def receive() -> int:
            nonlocal data
            data = self._channel.recv(size)
            return len(data)

        self._remaining -= self._watch.wait(receive)
        if self._remaining < 0:
            raise OSError(errno.EMSGSIZE, "The server sent more than it was asked for")
        return data

    def send(self, data: bytes) -> int:
        """Send some bytes. If the server accepts none, the thread that waits for the reply raises Stalled.

        Bytes for a closed channel are dropped. paramiko's thread of requests may still send after the reader has ended.
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
def _close_on_cancel(client: Any, sock: socket.socket, check: Check, stall_s: float) -> Iterator[threading.Event]:
    """Close the connection when *check* raises, and raise that error: most waits of paramiko cannot end otherwise.

    The caller sets the yielded event when the file is open. If it is not set after *stall_s*, Stalled is raised.
    """
    opened, done = threading.Event(), threading.Event()
    raised: list[BaseException] = []
    deadline = time.monotonic() + stall_s

    def poll() -> None:
        while not done.wait(TICK):
            try:
                check()
                if not opened.is_set() and time.monotonic() > deadline:
                    raise Stalled(f"The server did not open the file within {stall_s:g} s")
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
                raised.append(error)
                client.close()
                sock.close()
                return

    thread = threading.Thread(target=poll, name="sftp-guard", daemon=True)
    thread.start()
    try:
        yield opened
    except Exception:
        if raised:
            raise raised[0] from None
        raise
    finally:
        done.set()
        thread.join()


def _import_paramiko() -> Any:
    try:
        import paramiko
    except ImportError as error:
        raise extra_missing("sftp:// needs paramiko", "sftp", "sftp") from error
    # Its log repeats each exception with a traceback, and the server's text without escapes.

    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    return paramiko
