"""An image store on an NFS export that the worker mounts: the store in a directory, below a root that is proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.net.nfs_url import DEFAULTS, parse_export
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.file.tree import DirectoryTree

from .commands import MountCommands, SystemCommands
from .health import ExportHealth
from .mount import Mounted, MountTimeouts
from .network_path import NetworkPath


@dataclass(frozen=True)
class NfsSettings:
    """How this host mounts."""

    #: Mountpoints and their locks, one host's.
    mount_root: Path
    #: For all exports; a URL may say otherwise.
    options: str = DEFAULTS
    #: Seconds for mounting, and for unmounting.
    mount_s: float = 30.0
    #: Seconds for a look at an export, after which its breaker opens.
    probe_s: float = 10.0
    #: Ours in the storage network, and the router there.
    source_address: str | None = None
    gateway: str | None = None
    #: Heard while the store waits for a mount, a probe or another process.
    check: Callable[[], None] = lambda: None


class NfsStore(FileStore):
    """See FileStore. Each call begins at the root's handle, which ``Mounted`` vouches for."""

    def __init__(self, name: str, url: str, settings: NfsSettings, commands: MountCommands | None = None) -> None:
        export = parse_export(name, url, settings.options)
        self.name = name
        self.url = url
        given = commands or SystemCommands(
            settings.mount_s, NetworkPath(settings.source_address, settings.gateway), check=settings.check
        )
        patience = MountTimeouts(settings.mount_s, settings.probe_s)
        self.mounted = Mounted(export, settings.mount_root, given, patience, settings.check)
        self._tree = _MountedTree(self.mounted)

    def health(self) -> ExportHealth:
        """What this host knows of its export; touches no mount."""
        return self.mounted.health.read()


class _MountedTree(DirectoryTree):
    def __init__(self, mounted: Mounted) -> None:
        super().__init__(mounted.places.point)
        self._mounted = mounted

    def _open_root(self) -> int:
        return self._mounted.open_root()
