"""Read the files with which CloudStack configures the agent of a system VM, as settings of ``[cloudstack]``.

``/var/cache/cloud/cmdline`` has words ``name=value``, such as ``type=secstorage host=10.1.1.5 name=s-7-VM``.
``agent.properties`` is a Java property file with the same names. In a system VM, the certificates are next to it.
"""

from __future__ import annotations

import re
from pathlib import Path

from ssvm_worker.errors import ConfigError

#: The file that a system VM writes from its kernel command line, and the directory of the Java agent's files.
CMDLINE, CONF = "/var/cache/cloud/cmdline", "/usr/local/cloud/systemvm/conf"
_PREFIX = "SSVM_CLOUDSTACK__"
#: Names of the files, and the keys for their values. The last interface is that of public links.
_KEYS = {
    "port": "PORT",
    "name": "NAME",
    "guid": "GUID",
    "zone": "ZONE",
    "pod": "POD",
    "gateway": "GATEWAY",
    "eth1ip": "PRIVATE__ADDRESS",
    "eth1mask": "PRIVATE__NETMASK",
    "eth2ip": "PUBLIC__ADDRESS",
    "eth2mask": "PUBLIC__NETMASK",
    "storageip": "STORAGE__ADDRESS",
    "storagenetmask": "STORAGE__NETMASK",
}
#: Escapes of java.util.Properties.
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.S)
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


def environment_of_cmdline(path: str = CMDLINE, folder: str = CONF) -> dict[str, str]:
    """Return the settings of a command line as variables of the environment.

    *folder* has the certificates. The management server writes them soon after the start of a system VM. If its parent
    has the program of a system VM for Apache, the agent also works for Apache. Raises
    ConfigError if the file is unreadable, or is not that of a secondary storage VM.
    """
    given = dict(word.split("=", 1) for word in _read(path).split() if "=" in word)
    if given.get("type") != "secstorage":
        kind = f"type={given['type']}" if "type" in given else "no type"
        what = f"This is not the command line of a secondary storage VM: {kind}"
        raise ConfigError(what, path, "Use a command line with type=secstorage")
    return _environment(given, path, Path(folder))


def environment_of_properties(path: str) -> dict[str, str]:
    """Return the settings of an agent.properties as variables of the environment. The certificates are next to it.

    Raises ConfigError if the file is unreadable, or is not that of a secondary storage agent.
    """
    given = parse_properties(_read(path))
    resource = given.get("resource", "")
    if resource and "SecondaryStorage" not in resource:
        what = f"This is the file of another agent: resource={resource}"
        raise ConfigError(what, path, "Give the file of a secondary storage agent")
    # The Java agent of a system VM stores only what changes. The rest comes from its command line.
    given.setdefault("name", given.get("guid", ""))
    return _environment(given, path, Path(path).absolute().parent)


def _environment(given: dict[str, str], path: str, folder: Path) -> dict[str, str]:
    for name in ("host", "zone", "name"):
        if not given.get(name):
            raise ConfigError(f"The file has no {name}", path, f"Add {name}=…")
    hosts, _, algorithm = given["host"].partition("@")
    found = {f"{_PREFIX}SERVERS": hosts, "SSVM_ZONE": given["zone"]}
    if algorithm:
        found[f"{_PREFIX}ALGORITHM"] = algorithm
    found |= {f"{_PREFIX}{key}": given[name] for name, key in _KEYS.items() if given.get(name)}
    files = {
        "CA_FILE": folder / "cloud.ca.crt",
        "CERTIFICATE_FILE": folder / "cloud.crt",
        "KEY_FILE": folder / "cloud.key",
    }
    # A system VM has this program for its Apache.
    if (script := folder.parent / "config_ssl.sh").exists():
        files |= {"CERTIFICATE_SCRIPT": script, "WEB_ROOT": Path("/var/www/html")}
    return found | {f"{_PREFIX}{key}": str(file) for key, file in files.items()}


def parse_properties(text: str) -> dict[str, str]:
    """Parse Java properties: ``name=value``, ``name: value`` or ``name value``, comments, escapes, long lines."""
    found = {}
    for line in re.sub(r"(?<!\\)((?:\\\\)*)\\\r?\n[ \t\f]*", r"\1", text).splitlines():
        line = line.lstrip(" \t\f")
        if not line or line[0] in "#!":
            continue
        parts = re.match(r"((?:\\.|[^=: \t\f\\])*)[ \t\f]*[=:]?[ \t\f]*(.*)", line, re.S)
        assert parts  # it matches every line
        found[_unescaped(parts[1])] = _unescaped(parts[2])
    return found


def _unescaped(text: str) -> str:
    def plain(escape: re.Match[str]) -> str:
        kind = escape[1]
        return chr(int(kind[1:], 16)) if len(kind) == 5 else _CONTROL.get(kind, kind)

    return _ESCAPE.sub(plain, text)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"The file cannot be read: {error.strerror}", path, "Give the path of its file") from error
