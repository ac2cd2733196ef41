"""Settings from the kernel command line of a CloudStack system VM: ``type=secstorage zone=1 host=10.1.1.5 …``.

CloudStack hands a system VM its part that way (SecondaryStorageManagerImpl.finalizeVirtualMachineProfile), so the
worker can be what a system VM image runs. Keys that say nothing to us (networks, passwords, keystores) are left alone.
"""

from __future__ import annotations

from pathlib import Path

from ssvm_worker.errors import ConfigError

#: Where Linux shows it.
KERNEL = "/proc/cmdline"
#: The port of CloudStack's agents, which is not the broker's, and the broker's own.
_AGENTS, _BROKER = "8250", "6379"


def environment_of(path: str = KERNEL) -> dict[str, str]:
    """The variables that stand for what the file says: zone, broker and, where it names one, jobs at once.

    ``host`` is where the management server is: its Redis listens there, on ``port`` unless that is the agents' 8250.
    Of several hosts, CloudStack's ``a,b@static``, the first. Raises ConfigError for what is no secondary storage VM's.
    """
    try:
        words = Path(path).read_text().split()
    except OSError as error:
        raise ConfigError(f"The command line cannot be read: {error.strerror}", path, "Name its file") from error
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if given.get("type") != "secstorage":
        kind = f"type={given['type']}" if "type" in given else "no type"
        raise ConfigError(
            f"This is not a secondary storage VM's command line: {kind}", path, "type=secstorage is wanted"
        )
    for name in ("zone", "host"):
        if not given.get(name):
            raise ConfigError(f"The command line says nothing of {name}", path, f"Add {name}=…")
    found = {"SSVM_ZONE": given["zone"], "SSVM_BROKER__URL": _broker(given, path)}
    if workers := given.get("workers"):
        found["SSVM_WORKER__CONCURRENCY"] = _number("workers", workers, path)
    return found


def _broker(given: dict[str, str], path: str) -> str:
    host = given["host"].partition("@")[0].partition(",")[0]
    port = _number("port", given.get("port", _AGENTS), path)
    shown = f"[{host}]" if ":" in host else host
    return f"redis://{shown}:{_BROKER if port == _AGENTS else port}/0"


def _number(name: str, text: str, path: str) -> str:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"{name}={text} is no number between 1 and 65535", path, f"Mend {name}=")
    return text
