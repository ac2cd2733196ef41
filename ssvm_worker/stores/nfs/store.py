"""An image store on an NFS export that the worker mounts. It is a file store whose root is checked before each use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssvm_worker.net.nfs_url import parse_export
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.file.tree import DirectoryTree

from .commands import MountCommands, SystemCommands
from .health import ExportHealth
from .mount import DEFAULTS, Mounted, MountTimeouts
from .network_path import NetworkPath


@dataclass(frozen=True)
class NfsSettings:
    """How this host mounts exports."""

    #: The directory of this host for mountpoints and their lock files.
    mount_root: Path
    #: Default mount options. A URL can override them.
    options: str = DEFAULTS.options
    #: Time limit in seconds of a mount, and of an unmount.
    mount_s: float = DEFAULTS.mount_s
    #: Time limit in seconds of a probe. After it the breaker opens.
    probe_s: float = DEFAULTS.probe_s
    #: The address of this host in the storage network, and the router there.
    source_address: str | None = None
    gateway: str | None = None
    #: All users of all clients may read what the store writes.
    shared: bool = False
    #: Called while the store waits for a mount, a probe or another process. Raises to cancel.
    check: Callable[[], None] = lambda: None


class NfsStore(FileStore):
    """See FileStore. Each call opens the export's root first, which ``Mounted`` checks."""

    def __init__(self, name: str, url: str, settings: NfsSettings, commands: MountCommands | None = None) -> None:
        export = parse_export(name, url, settings.options)
        commands = commands or SystemCommands(
            settings.mount_s, NetworkPath(settings.source_address, settings.gateway), check=settings.check
        )
        timeouts = MountTimeouts(settings.mount_s, settings.probe_s)
        self.mounted = Mounted(export, settings.mount_root, commands, timeouts, settings.check)
        super().__init__(name, self.mounted.paths.point)
        self.url = url
        self._tree = _MountedTree(self.mounted, shared=settings.shared)

    def health(self) -> ExportHealth:
        """Return what this host knows about the export. The function does not touch the mount."""
        return self.mounted.health.read()


class _MountedTree(DirectoryTree):
    def __init__(self, mounted: Mounted, *, shared: bool) -> None:
        super().__init__(mounted.paths.point, shared=shared)
        self._mounted = mounted

    def _open_root(self) -> int:
        return self._mounted.open_root()
