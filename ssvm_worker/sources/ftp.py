"""Files over FTP: passive transfers only, with both connections under the address rule and the watch."""

from __future__ import annotations

import ftplib
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ssvm_worker.errors import SourceChanged, SourceDenied, SourceNotFound, SourceUnavailable, WorkerError
from ssvm_worker.net.sockets import ConnectOptions, Stalled, StallWatch, WatchedSocket, WatchedTLSSocket, connect
from ssvm_worker.net.urls import WebUrl, parse
from ssvm_worker.streaming.interfaces import CHUNK
from ssvm_worker.units import KiB

from .ending import empty, whole
from .http.request import translate
from .options import SourceOptions

Socket = WatchedSocket | WatchedTLSSocket

#: Lines, and characters, of one answer. ftplib keeps all lines of an answer, without a limit.
_MOST_LINES, _MOST_ANSWER = 64, 64 * KiB
#: RFC 3659, 2.3 and 4.1: the answers to MDTM and SIZE.
_TIME = re.compile(r"\d{14}(\.\d{1,9})?")
_SIZE = re.compile(r"\d{1,19}")


@dataclass(frozen=True)
class FtpVersion:
    """Tells one state of a file from another, as far as a server can (RFC 3659: SIZE and MDTM)."""

    size: int
    modified: str


class FtpSource:
    """A ``Source`` of ftp://HOST/PATH; the path is taken from the root, by TYPE I."""

    def __init__(self, url: str, access: SourceOptions, version: FtpVersion | None = None) -> None:
        """Raises InvalidRequest for what is no such URL; touches nothing."""
        self._url: WebUrl = parse(url, ("ftp",))
        self._access = access
        self.name = self._url.name
        self.validator = version
        self.size = version.size if version else None

    @property
    def resumable(self) -> bool:
        """Whether the server tells size and time of the file, and takes REST for granted."""
        return self.validator is not None

    def open(self, offset: int = 0) -> Generator[bytes, None, None]:
        """Yield the chunks from *offset* on; SourceNotFound, SourceDenied, SourceChanged, SourceUnavailable."""
        if offset and offset == self.size:
            return
        position = offset
        with self._translated(), self._session() as control:
            self._compare(control, offset)
            data = control.retrieve(self._url.path, offset)
            try:
                while size := data.recv_into(buffer := bytearray(CHUNK)):
                    position += size
                    yield bytes(memoryview(buffer)[:size])
            finally:
                data.close()
            control.voidresp()
        self.size = whole(position, self.size, self.name)

    @contextmanager
    def _session(self) -> Iterator[_Control]:
        control = _Control(self._url, self._access)
        try:
            control.log_in(self._access.username, self._access.password)
            yield control
        finally:
            control.close()

    def _compare(self, control: _Control, offset: int) -> None:
        version = control.version(self._url.path)
        if offset and (version is None or version != self.validator):
            raise SourceChanged("The file has changed since its first bytes came", self.name, "Ask again")
        self.validator, self.size = version, version.size if version else None
        if self.size == 0:
            raise empty(self.name)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except ftplib.error_perm as error:
            raise _refusal(str(error), self.name) from error
        except (ftplib.Error, EOFError) as error:
            raise SourceUnavailable(
                f"The server said: {str(error)[:200]!a}", self.name, "Look at the server"
            ) from error
        except (ValueError, LookupError) as error:  # ftplib takes answers apart without judging them
            what = f"The server gives an answer of no known form: {str(error)[:200]!a}"
            raise SourceUnavailable(what, self.name, "Look at the server") from error
        except OSError as error:
            raise translate(error, self.name) from error


def _refusal(said: str, where: str) -> WorkerError:
    if said[:3] == "550":  # not there, or no right to it: most servers do not say which
        return SourceNotFound(
            f"There is no such file, or we may not read it: {said[:200]!a}", where, "Look at the path"
        )
    return SourceDenied(f"The server refuses us: {said[:200]!a}", where, "Give credentials, or look at the server")


class _Control(ftplib.FTP):
    """ftplib's talk over our own sockets."""

    def __init__(self, url: WebUrl, access: SourceOptions) -> None:
        super().__init__()
        http = access.http
        self._dial = ConnectOptions(http.rule, http.connect_timeout_s)
        self._access = access
        self.host, self.port = url.host, url.port
        self.sock = connect(url.host, url.port, self._dial, self._watch())
        self.af = self.sock.family
        self.file = self.sock.makefile("r", encoding=self.encoding, errors="replace")
        try:
            self.welcome = self.getresp()
        except BaseException:
            self.close()
            raise

    def _watch(self) -> StallWatch:
        http = self._access.http
        return StallWatch(self._access.check, http.stall_s, http.min_rate)

    def log_in(self, user: str | None, password: str | None) -> None:
        """As that user, or as nobody in particular."""
        self.login(user or "anonymous", password or "anonymous@")
        self.voidcmd("TYPE I")

    def getmultiline(self) -> str:
        """Read one answer; Stalled if its end does not come in time, ftplib's error_proto if it is too long."""
        until = time.monotonic() + self._access.http.stall_s
        lines = [self.getline()]
        code = lines[0][:3]
        # RFC 959, 4.2: "123-" begins an answer of several lines, "123 " is its last.
        while lines[0][3:4] == "-" and not (lines[-1][:3] == code and lines[-1][3:4] != "-"):
            lines.append(self.getline())
            if len(lines) > _MOST_LINES or sum(map(len, lines)) > _MOST_ANSWER:
                raise ftplib.error_proto(f"{lines[0][:80]} … an answer without an end")  # noqa: S321
            if time.monotonic() > until:
                raise Stalled(f"The end of an answer did not come within {self._access.http.stall_s:g} s")
        return "\n".join(lines)

    def version(self, path: str) -> FtpVersion | None:
        """Size and time; None where the server tells only one of them, or neither."""
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
        """The data connection, to the host of this one, whatever address the server names (RFC 2577, 3)."""
        host, port = self.makepasv()
        if not 0 < port < 1 << 16:
            raise ftplib.error_proto(f"a data connection to port {port}")  # noqa: S321
        data = connect(host, port, self._dial, self._watch())
        try:
            if offset:
                self.sendcmd(f"REST {offset}")
            answer = self.sendcmd(f"RETR {path}")
            if answer[0] != "1":
                raise ftplib.error_reply(answer)  # noqa: S321 - an exception, and the user chose FTP
            return data
        except BaseException:
            data.close()
            raise
