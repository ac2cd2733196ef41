"""A real SSH server with files, from paramiko."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest


class SftpServer:
    """Listens on a free port of loopback until ``close``. The user joe may log in, by password or key."""

    def __init__(self, directory: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.modified = 1_600_000_000
        #: After so many read bytes the connection breaks, once.
        self.cut_after: int | None = None
        #: Break the connection instead of an answer to a password.
        self.breaks_at_login = False
        #: So many more bytes than requested are in each answer to a read.
        self.excess = 0
        #: If set, the server answers no read.
        self.stalled = threading.Event()
        self.stall = False
        self.closing = threading.Event()
        self.key = paramiko.ECDSAKey.generate()
        self.user_key = directory / "user-key"
        user_key = paramiko.ECDSAKey.generate()
        user_key.write_private_key_file(str(self.user_key))
        self.accepted = user_key
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.known_hosts = directory / "known_hosts"
        self.know(self.key)
        self._transports: list[paramiko.Transport] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def know(self, key: paramiko.PKey) -> None:
        """Write that key into known_hosts as this server's key."""
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key.get_name()} {key.get_base64()}\n")

    def serve(self, name: str, data: bytes) -> str:
        """Serve *data* at that path, and return the URL."""
        self.files[f"/{name}"] = data
        return self.url(name)

    def url(self, name: str, scheme: str = "sftp") -> str:
        """Return the URL of a path. The path need not exist."""
        return f"{scheme}://127.0.0.1:{self.port}/{name}"

    def break_off(self) -> None:
        """Close every connection."""
        for each in self._transports:
            each.close()

    def close(self) -> None:
        """Stop the server."""
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.break_off()
        self._thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                transport = paramiko.Transport(sock)
                transport.add_server_key(self.key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files, self)
                self._transports.append(transport)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=_Door(self), event=threading.Event())


class _Door(paramiko.ServerInterface):
    def __init__(self, owner: SftpServer) -> None:
        self.owner = owner

    def check_auth_password(self, username: str, password: str) -> int:
        if self.owner.breaks_at_login:
            self.owner.break_off()
        good = (username, password) == ("joe", "secret")
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        good = username == "joe" and key == self.owner.accepted
        return paramiko.AUTH_SUCCESSFUL if good else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "password,publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


class _Files(paramiko.SFTPServerInterface):
    def __init__(self, server: paramiko.ServerInterface, owner: SftpServer) -> None:
        super().__init__(server)
        self.owner = owner

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        if path not in self.owner.files:
            return paramiko.SFTP_NO_SUCH_FILE
        return _Handle(self.owner, self.owner.files[path])


class _Handle(paramiko.SFTPHandle):
    def __init__(self, owner: SftpServer, data: bytes) -> None:
        super().__init__()
        self.owner, self.data, self.given = owner, io.BytesIO(data), 0

    def stat(self) -> paramiko.SFTPAttributes:
        attributes = paramiko.SFTPAttributes()
        attributes.st_size = len(self.data.getvalue())
        attributes.st_atime = attributes.st_mtime = self.owner.modified
        attributes.st_mode = 0o100644
        return attributes

    def read(self, offset: int, length: int) -> bytes | int:
        owner = self.owner
        if owner.stall:
            owner.stalled.set()
            owner.closing.wait()
        self.given += length
        if owner.cut_after is not None and self.given > owner.cut_after:
            owner.cut_after = None
            owner.break_off()
        self.data.seek(offset)
        return self.data.read(length) + bytes(owner.excess)


@pytest.fixture
def sftp_server(tmp_path: Path) -> Iterator[SftpServer]:
    """Return a server whose host key is in known_hosts."""
    server = SftpServer(tmp_path)
    yield server
    server.close()
