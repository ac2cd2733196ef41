"""A real Apache with the parts of a system VM's configuration that concern files, links, uploads and copies."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import urllib3

from ssvm_worker.demo.ports import free_port
from tests.neighbours import missing
from tests.waiting import PATIENCE_S, until

_MODULES = ("mpm_event", "authn_core", "authn_file", "authz_core", "authz_user", "authz_host", "auth_basic")
_MODULES += ("alias", "dir", "headers", "mime", "proxy", "proxy_http", "rewrite")
_CONFIG = """
ServerRoot "{directory}"
Listen 127.0.0.1:{port}
ServerName 127.0.0.1
PidFile "{directory}/apache.pid"
ErrorLog "{directory}/error.log"
Mutex file:{directory}
TypesConfig /etc/mime.types
{modules}
{user}
DocumentRoot "{root}"
<Directory />
    Require all denied
</Directory>
<Directory "{root}">
    Options FollowSymLinks
    AllowOverride All
    Require all granted
</Directory>
<FilesMatch "^\\.ht">
    Require all denied
</FilesMatch>
RewriteEngine On
RewriteCond %{{REQUEST_METHOD}} =POST
RewriteRule ^/upload/(.*) http://{upload}/upload?uuid=$1 [P,L]
Header always set Access-Control-Allow-Origin "*"
"""


class ApacheServer:
    """An Apache that answers requests."""

    def __init__(self, directory: Path, port: int) -> None:
        self.root = directory / "www"
        self.url = f"http://127.0.0.1:{port}"

    def request(self, method: str, path: str, **given: object) -> urllib3.BaseHTTPResponse:
        return urllib3.PoolManager(retries=False, timeout=PATIENCE_S).request(method, self.url + path, **given)


@contextmanager
def running_apache(directory: Path, upload: str = "127.0.0.1:9") -> Iterator[ApacheServer]:
    """Run Apache while the block runs. It sends uploads to *upload*, HOST:PORT."""
    program = shutil.which("apache2") or shutil.which("httpd")
    modules = Path("/usr/lib/apache2/modules")
    if not program or not modules.is_dir():
        missing("apache2", "install Debian's apache2")
    server = ApacheServer(directory, free_port())
    server.root.mkdir()
    loaded = "\n".join(f"LoadModule {name}_module {modules}/mod_{name}.so" for name in _MODULES)
    user = "User www-data\nGroup www-data" if os.getuid() == 0 else ""
    port = server.url.rpartition(":")[2]
    text = _CONFIG.format(directory=directory, root=server.root, port=port, modules=loaded, user=user, upload=upload)
    (directory / "apache.conf").write_text(text)
    process = subprocess.Popen([program, "-f", directory / "apache.conf", "-DFOREGROUND"], stderr=subprocess.PIPE)
    try:
        until(lambda: _answers(server) or process.poll() is not None, "Apache answers")
        assert process.poll() is None, process.stderr.read()
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _answers(server: ApacheServer) -> bool:
    try:
        return bool(server.request("GET", "/").status)
    except urllib3.exceptions.HTTPError:
        return False


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Return a directory that all users may read. Apache does not run as root."""
    with tempfile.TemporaryDirectory(prefix="ssvm-apache-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
