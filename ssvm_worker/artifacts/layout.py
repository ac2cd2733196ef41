"""Define the keys of artifacts in CloudStack's layout, and check keys."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssvm_worker.errors import InvalidRequest, misused

MANIFEST = "manifest.json"
DRAFT = "manifest.draft.json"
#: The directory of a volume with the packs of grains that its incremental backups share. It is next to the backups, so
#: no backup may have this id.
PACKS = "_packs"
#: The longest component of a key, in characters. NAME_MAX is 255 bytes on every supported file system. The rest is
#: room for a `.part` suffix.
MAX_NAME = 180
#: The number of components in the prefix of an artifact, by the first of them.
_DEPTHS = {"template": 4, "volumes": 3, "snapshots": 4}
#: Names of queues and counters contain the name of the zone.
ZONE = r"[A-Za-z0-9_-]{1,64}"
#: One component of a key.
NAME = r"[A-Za-z0-9_][A-Za-z0-9._@+=-]*"
_NAME = re.compile(NAME)


def check_name(name: str, what: str = "name") -> str:
    """Return *name* if it is a valid component of a key, else raise InvalidRequest with the broken rule."""
    if not name or len(name) > MAX_NAME:
        remedy = f"Give 1 to {MAX_NAME} characters"
        raise misused(InvalidRequest(f"The {what} has {len(name)} characters", ascii(name[:40]), remedy))
    if not _NAME.fullmatch(name):
        remedy = "Use letters, digits and . _ @ + = - only. Start with a letter, a digit or _"
        raise misused(InvalidRequest(f"The {what} has characters that a key may not have", ascii(name[:80]), remedy))
    return name


def check_zone(zone: str) -> str:
    """Return *zone* if it is a valid name of a zone, else raise InvalidRequest."""
    if not re.fullmatch(ZONE, zone):
        raise misused(InvalidRequest("Invalid name of a zone", ascii(zone[:80]), "Use 1 to 64 of A-Z a-z 0-9 _ -"))
    return zone


def check_key(key: str) -> str:
    """Return *key* if each component is valid, else raise InvalidRequest.

    Every store calls this function before it opens an object.
    """
    for part in key.split("/"):
        check_name(part, "key")
    return key


def check_foreign_key(key: str) -> str:
    """Return *key* if it is safe on every store, although this program may give no object such a name.

    CloudStack's Java agent keeps the names of the files in an OVA, with blanks. Raise InvalidRequest for other keys.
    """
    for part in key.split("/"):
        hidden = part.startswith(".") or not part.isprintable() or "\\" in part
        if not part or hidden or len(part.encode(errors="replace")) > MAX_NAME:
            what = "The key has a part that is empty, hidden, too long or not printable"
            raise misused(InvalidRequest(what, ascii(key[:80]), "Rename the file"))
    return key


@dataclass(frozen=True)
class Artifact:
    """A template, ISO, volume or backup. It exists completely or not at all."""

    #: template | iso | volume | backup
    kind: str
    account: str
    id: str
    #: For backups only: the volume or VM of the snapshot.
    volume: str = ""

    @property
    def prefix(self) -> str:
        """Return the directory of the artifact, without a slash at the end."""
        account, id_ = check_name(self.account, "account"), check_name(self.id, "id")
        if self.kind in ("template", "iso"):
            return f"template/tmpl/{account}/{id_}"
        if self.kind == "volume":
            return f"volumes/{account}/{id_}"
        if self.kind == "backup":
            if id_ == PACKS:
                raise misused(InvalidRequest("The grain store reserves this id", id_, "Give the backup another id"))
            return f"snapshots/{account}/{check_name(self.volume, 'volume')}/{id_}"
        raise misused(
            InvalidRequest("Unknown kind of artifact", ascii(self.kind), "Give template, iso, volume or backup")
        )

    @property
    def family(self) -> str:
        """Return the directory of all backups of the volume. It also contains the packs that they share."""
        return self.prefix.rpartition("/")[0]

    @property
    def resource(self) -> str:
        """Return the name of the lock that a job holds while it writes the artifact.

        All backups of a volume have one lock, because they share packs.
        """
        return self.family if self.kind == "backup" else self.prefix

    def key(self, name: str) -> str:
        """Return the key of one object of the artifact."""
        return f"{self.prefix}/{check_name(name)}"

    @classmethod
    def of_prefix(cls, prefix: str) -> Artifact:
        """Return the artifact with this prefix, or raise InvalidRequest if the prefix is not in the layout."""
        match prefix.strip("/").split("/"):
            case ["template", "tmpl", account, id_]:
                return cls("template", account, id_)
            case ["volumes", account, id_]:
                return cls("volume", account, id_)
            case ["snapshots", account, volume, id_]:
                return cls("backup", account, id_, volume)
        remedy = "Give template/tmpl/ACCOUNT/ID, volumes/ACCOUNT/ID or snapshots/ACCOUNT/VOLUME/ID"
        raise misused(InvalidRequest("Invalid prefix of an artifact", prefix, remedy))


def place_of(key: str) -> str:
    """Return the prefix of the artifact, or of the packs, that an object belongs to. Return "" for any other object."""
    names = key.split("/")
    depth = _DEPTHS.get(names[0], 0)
    prefix = "/".join(names[:depth])
    if not depth or len(names) <= depth:
        return ""
    try:
        return prefix if names[depth - 1] == PACKS else Artifact.of_prefix(prefix).prefix
    except InvalidRequest:
        return ""
