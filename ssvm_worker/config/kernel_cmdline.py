"""Read settings from the kernel command line of a CloudStack system VM: ``type=secstorage zone=1 host=10.1.1.5 …``.

CloudStack configures a system VM in this way (SecondaryStorageManagerImpl.finalizeVirtualMachineProfile). So an image
of a system VM can run the worker. Other keys (networks, passwords, keystores) are ignored.
"""

from __future__ import annotations

from pathlib import Path

from ssvm_worker.errors import ConfigError

#: The kernel command line.
KERNEL = "/proc/cmdline"
#: The port of CloudStack's agents, and the port of Redis.
_AGENT_PORT, _REDIS_PORT = "8250", "6379"


def environment_of(path: str = KERNEL) -> dict[str, str]:
    """Return the file as variables of the environment: zone, broker, and the number of concurrent jobs if present.

    ``host`` is the management server, where Redis must listen. ``port`` is the port of Redis, except for the default
    8250 of the agents. From a list of hosts (``a,b@static``) the first counts. Raises ConfigError if the file cannot be
    read or does not belong to a secondary storage VM.
    """
    try:
        words = Path(path).read_text().split()
    except OSError as error:
        raise ConfigError(
            f"The command line cannot be read: {error.strerror}", path, "Give the path of its file"
        ) from error
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if given.get("type") != "secstorage":
        kind = f"type={given['type']}" if "type" in given else "no type"
        what = f"This is not the command line of a secondary storage VM: {kind}"
        raise ConfigError(what, path, "Use a command line with type=secstorage")
    for name in ("zone", "host"):
        if not given.get(name):
            raise ConfigError(f"The command line has no {name}", path, f"Add {name}=…")
    host = given["host"].partition("@")[0].partition(",")[0]
    port = _number("port", given.get("port", _AGENT_PORT), path)
    address = f"[{host}]" if ":" in host else host
    url = f"redis://{address}:{_REDIS_PORT if port == _AGENT_PORT else port}/0"
    found = {"SSVM_ZONE": given["zone"], "SSVM_BROKER__URL": url}
    if workers := given.get("workers"):
        found["SSVM_WORKER__CONCURRENCY"] = _number("workers", workers, path)
    return found


def _number(name: str, text: str, path: str) -> str:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"{name}={text} is invalid", path, f"Give {name}= a number from 1 to 65535")
    return text
