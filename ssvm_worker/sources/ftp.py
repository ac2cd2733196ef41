"""Read files over FTP with passive transfers. The address rule and the stall watch apply to both connections."""

from __future__ import annotations

import ftplib
import re
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from ssvm_worker.errors import SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable
from ssvm_worker.net.sockets import ConnectOptions, Stalled, StallWatch, WatchedSocket, WatchedTLSSocket, connect
from ssvm_worker.net.urls import WebUrl, parse
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import KiB

from .http.source import translate_error
from .options import SourceOptions, empty_file, require_complete_body

Socket = WatchedSocket | WatchedTLSSocket

#: Lines and characters of one reply. ftplib keeps all lines of a reply, without a limit.
_MAX_LINES, _MAX_REPLY = 64, 64 * KiB
#: The replies to MDTM and SIZE: RFC 3659, 2.3 and 4.1.
_TIME = re.compile(r"\d{14}(\.\d{1,9})?")
_SIZE = re.compile(r"\d{1,19}")


@dataclass(frozen=True)
class FtpVersion:
    """Identity of one version of a file, from the replies to SIZE and MDTM (RFC 3659)."""

    size: int
    modified: str


class FtpSource:
    """``Source`` of ftp://HOST/PATH. The path is absolute. The transfer type is binary (TYPE I)."""

    def __init__(self, url: str, options: SourceOptions, version: FtpVersion | None = None) -> None:
        """Parse the URL without a connection. Raises InvalidRequest."""
        self._url: WebUrl = parse(url, ("ftp",))
        self._options = options
        self.name = self._url.name
        self.validator = version
        self.size = version.size if version else None

    @property
    def resumable(self) -> bool:
        """Return whether the server reports size and time of the file. Such a server is expected to support REST."""
        return self.validator is not None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on.

        Raises SourceNotFound, SourceDenied, SourceChanged or SourceUnavailable.
        """
        if offset and offset == self.size:
            return
        position = offset
        with self._translating(), closing(_Control(self._url, self._options)) as control:
            control.login(self._options.username or "anonymous", self._options.password or "anonymous@")
            control.voidcmd("TYPE I")  # binary
            self._compare(control, offset)
            data = control.retrieve(self._url.path, offset)
            try:
                while size := data.recv_into(buffer := bytearray(CHUNK)):
                    position += size
                    yield bytes(memoryview(buffer)[:size])
            finally:
                data.close()
            control.voidresp()
        self.size = require_complete_body(position, self.size, self.name)

    def _compare(self, control: _Control, offset: int) -> None:
        version = control.version(self._url.path)
        if offset and (version is None or version != self.validator):
            raise SourceChanged("The file has changed since the download began", self.name, "Submit the job again")
        self.validator, self.size = version, version.size if version else None
        if self.size == 0:
            raise empty_file(self.name)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except ftplib.error_perm as error:
            reply = str(error)
            if reply[:3] == "550":  # most servers use this code for a missing file and for missing permission
                what = f"The file does not exist or is not readable: {reply[:200]!a}"
                raise SourceNotFound(what, self.name, "Check the path") from error
            what, remedy = f"The server refused the request: {reply[:200]!a}", "Check the server"
            if reply[:3] == "530":  # not logged in
                what = f"The server refused the login: {reply[:200]!a}"
                remedy = "Correct username and password of the credentials that the job names"
                if not self._options.username:
                    remedy = "Name credentials with a username and password. The worker logged in as anonymous"
            raise SourceDenied(what, self.name, remedy) from error
        except (ftplib.Error, EOFError) as error:
            what = f"The server replied: {str(error)[:200]!a}"
            raise SourceUnavailable(what, self.name, "Check the server") from error
        except (ValueError, LookupError) as error:  # ftplib parses replies without checking them
            what = f"The server's reply has an unknown form: {str(error)[:200]!a}"
            raise SourceUnavailable(what, self.name, "Check the server") from error
        except OSError as error:
            raise translate_error(error, self.name) from error


class _Control(ftplib.FTP):
    """Control connection of ftplib over a watched socket."""

    def __init__(self, url: WebUrl, options: SourceOptions) -> None:
        super().__init__()
        http = options.http
        self._connect_options = ConnectOptions(http.rule, http.connect_timeout_s)
        self._options = options
        self.host, self.port = url.host, url.port
        self.sock = connect(url.host, url.port, self._connect_options, self._new_watch())
        self.af = self.sock.family
        self.file = self.sock.makefile("r", encoding=self.encoding, errors="replace")
        try:
            self.welcome = self.getresp()
        except BaseException:
            self.close()
            raise

    def _new_watch(self) -> StallWatch:
        http = self._options.http
        return StallWatch(self._options.check, http.stall_s, http.min_rate)

    def getmultiline(self) -> str:
        """Read one reply.

        Raises Stalled if the reply takes too long. Raises ``ftplib.error_proto`` if it is too long.
        """
        deadline = time.monotonic() + self._options.http.stall_s
        lines = [self.getline()]
        code = lines[0][:3]
        # RFC 959, 4.2: "123-" begins a reply of several lines. "123 " begins its last line.
        while lines[0][3:4] == "-" and not (lines[-1][:3] == code and lines[-1][3:4] != "-"):
            lines.append(self.getline())
            if len(lines) > _MAX_LINES or sum(map(len, lines)) > _MAX_REPLY:
                raise ftplib.error_proto(f"{lines[0][:80]} … a reply without an end")  # noqa: S321
            if time.monotonic() > deadline:
                raise Stalled(f"The end of a reply did not arrive within {self._options.http.stall_s:g} s")
        return "\n".join(lines)

    def version(self, path: str) -> FtpVersion | None:
        """Return size and time of a file, or None if the server does not report both."""
        try:
            modified = self.voidcmd(f"MDTM {path}").partition(" ")[2].strip()
            size = self.voidcmd(f"SIZE {path}").partition(" ")[2].strip()
        except ftplib.error_perm as error:
            if str(error)[:3] == "550":
                raise
            return None
        is_plain = size.isascii() and modified.isascii() and _SIZE.fullmatch(size) and _TIME.fullmatch(modified)
        return FtpVersion(int(size), modified) if is_plain else None

    def retrieve(self, path: str, offset: int) -> Socket:
        """Open the data connection, to the host of the control connection.

        The address in the server's reply is ignored (RFC 2577, 3).
        """
        host, port = self.makepasv()
        if not 0 < port < 1 << 16:
            raise ftplib.error_proto(f"a data connection to port {port}")  # noqa: S321
        data = connect(host, port, self._connect_options, self._new_watch())
        try:
            if offset:
                self.sendcmd(f"REST {offset}")
            reply = self.sendcmd(f"RETR {path}")
            if reply[0] != "1":
                raise ftplib.error_reply(reply)  # noqa: S321 - an exception class; the user chose FTP

            return data
        except BaseException:
            data.close()
            raise
