"""Where things lie on a store: CloudStack's layout, and the rules that every key obeys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssvm_worker.errors import InvalidRequest, misused

MANIFEST = "manifest.json"
DRAFT = "manifest.draft.json"
#: Beside the backups of a volume: the packs of grains that its incremental backups share. No backup may have this id.
PACKS = "_packs"
#: One component of a key. NAME_MAX is 255 bytes on every file system here; the rest is room for a `.part` suffix.
MAX_NAME = 180
#: How many names a place has that one artifact's objects lie in.
_DEPTHS = {"template": 4, "volumes": 3, "snapshots": 4}
#: The name of a zone stands in names of queues and counters.
ZONE = r"[A-Za-z0-9_-]{1,64}"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+=-]*")


def check_name(name: str, what: str = "name") -> str:
    """Return *name* if it is safe as one component of a key, else raise InvalidRequest saying which rule it breaks."""
    if not name or len(name) > MAX_NAME:
        remedy = f"Give one of 1 to {MAX_NAME} characters"
        raise misused(InvalidRequest(f"The {what} has {len(name)} characters", ascii(name[:40]), remedy))
    if not _NAME.fullmatch(name):
        remedy = "Use letters, digits and . _ @ + = - and start with a letter, a digit or _"
        raise misused(InvalidRequest(f"The {what} holds characters that a key may not have", ascii(name[:80]), remedy))
    return name


def check_zone(zone: str) -> str:
    """Return the name of a zone if queues and counters can have it, else raise InvalidRequest."""
    if not re.fullmatch(ZONE, zone):
        raise misused(InvalidRequest("That is no name of a zone", ascii(zone[:80]), "Use 1 to 64 of A-Z a-z 0-9 _ -"))
    return zone


def check_key(key: str) -> str:
    """Return *key* if each of its components is safe; the one gate before any store opens anything."""
    for part in key.split("/"):
        check_name(part, "key")
    return key


@dataclass(frozen=True)
class Artifact:
    """One thing that is whole or absent: a template, an ISO, a volume or a backup."""

    #: template | iso | volume | backup
    kind: str
    account: str
    id: str
    #: Backups only: the volume (or VM) that the snapshot is of.
    volume: str = ""

    @property
    def prefix(self) -> str:
        """The directory of the artifact, without a slash at its end."""
        account, id_ = check_name(self.account, "account"), check_name(self.id, "id")
        if self.kind in ("template", "iso"):
            return f"template/tmpl/{account}/{id_}"
        if self.kind == "volume":
            return f"volumes/{account}/{id_}"
        if self.kind == "backup":
            if id_ == PACKS:
                raise misused(InvalidRequest("The grain store uses that id", id_, "Give the backup another id"))
            return f"snapshots/{account}/{check_name(self.volume, 'volume')}/{id_}"
        raise misused(
            InvalidRequest("Unknown kind of artifact", ascii(self.kind), "Give template, iso, volume or backup")
        )

    @property
    def family(self) -> str:
        """The directory in which a backup lies with the others of its volume, and with the packs that they share."""
        return self.prefix.rpartition("/")[0]

    @property
    def resource(self) -> str:
        """What only one job at a time may write: an artifact; of backups all of a volume, as they share packs."""
        return self.family if self.kind == "backup" else self.prefix

    def key(self, name: str) -> str:
        """The key of one object of the artifact."""
        return f"{self.prefix}/{check_name(name)}"

    @classmethod
    def of_prefix(cls, prefix: str) -> Artifact:
        """The artifact that lies at *prefix*; InvalidRequest for a place outside the layout."""
        match prefix.strip("/").split("/"):
            case ["template", "tmpl", account, id_]:
                return cls("template", account, id_)
            case ["volumes", account, id_]:
                return cls("volume", account, id_)
            case ["snapshots", account, volume, id_]:
                return cls("backup", account, id_, volume)
        remedy = "Give template/tmpl/ACCOUNT/ID, volumes/ACCOUNT/ID or snapshots/ACCOUNT/VOLUME/ID"
        raise misused(InvalidRequest("No artifact can lie there", prefix, remedy))


def place_of(key: str) -> str:
    """The prefix of the artifact that an object belongs to, or the place of a volume's packs; "" for another's."""
    names = key.split("/")
    depth = _DEPTHS.get(names[0], 0)
    place = "/".join(names[:depth])
    if not depth or len(names) <= depth:
        return ""
    try:
        return place if names[depth - 1] == PACKS else Artifact.of_prefix(place).prefix
    except InvalidRequest:
        return ""
