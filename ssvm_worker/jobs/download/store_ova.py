"""Stores an OVA as its members come: each disk inspected and streamed to the stores, then what describes them.

    <id>.ovf   the descriptor, with the new names      <id>-diskN.vmdk   the disks, from 0 as the descriptor lists them
    <id>.mf    digests of all of these                 <id>-fileN        other small files that it names (NVRAM)

Objects that are committed before a later member turns out bad belong to no artifact, as there is no manifest: the next
attempt overwrites them, and the job's ``discard`` removes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from ssvm_worker.artifacts.checksums import Digest, Hasher, digest_of
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import Entry, discard
from ssvm_worker.errors import CorruptImage, TooLarge, UnknownFormat, UnsafeImage, WorkerError
from ssvm_worker.formats import ova
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.store_set import StoreSet
from ssvm_worker.streaming.pipeline import limit
from ssvm_worker.units import MiB
from ssvm_worker.unpacking.tar import TarMember

from .image_pass import ImagePass

#: What is kept of files that are no disks, all together: an NVRAM has some 270 KiB. They are held in memory.
_MAX_OTHERS = 16 * MiB
_AGAIN = "Ask its publisher for a whole one"


@dataclass
class StoredOva:
    """An OVA on its way to the stores."""

    attempt: Attempt
    artifact: Artifact
    targets: StoreSet
    where: str
    #: What each member is, by its name in the package: its digests, in every algorithm that was wanted.
    _digests: dict[str, dict[str, Digest]] = field(default_factory=dict)
    _expected: dict[str, Digest] | None = None
    #: Whether there was a `.cert`: a signature of the `.mf`, which nobody here can judge.
    _signed: bool = False
    _others: dict[str, bytes] = field(default_factory=dict)
    _disks: dict[str, Entry] = field(default_factory=dict)

    def store(self, members: Iterator[TarMember]) -> tuple[Entry, ...]:
        """Take every member; returns the entries of the disks, in the descriptor's order."""
        self._text = self._read(next(members), ova.MAX_TEXT)
        self._descriptor = ova.read_descriptor(self._text, self.where)
        for member in members:
            self._take(member)
        for name in (*self._descriptor.disks, *self._descriptor.others):
            if name not in self._disks and name not in self._others:
                raise CorruptImage(f"The package lacks a file that its OVF names: {name!a}", self.where, _AGAIN)
        self._verify()
        self._discard_owed()
        return tuple(self._disks[name] for name in self._descriptor.disks)

    def descriptor(self) -> Entry:
        """The entry of the descriptor, as it will be stored; it stands for the whole package."""
        data = self.small()[self._named("ovf")]
        size = sum(int(each.facts["virtual_size"]) for each in self._disks.values())
        facts: dict[str, object] = {"format": "ova", "virtual_size": size, "disks": len(self._disks)}
        facts |= {"signature": "unverified"} if self._signed else {}
        return Entry(self._named("ovf"), len(data), str(digest_of(data)), "descriptor", facts)

    def small(self) -> dict[str, bytes]:
        """The small objects by name: the descriptor first, other files, the checksums last."""
        names = self._names()
        others = {names[name]: data for name, data in self._others.items()}
        small = {self._named("ovf"): ova.renamed(self._text, names, self.where)} | others
        digests = {name: digest_of(data) for name, data in small.items()}
        digests |= {each.name: Digest(*each.digest.split(":")) for each in self._disks.values()}
        return small | {self._named("mf"): ova.write_checksums(digests)}

    def _named(self, extension: str) -> str:
        return f"{self.artifact.id}.{extension}"

    def _names(self) -> dict[str, str]:
        """Our names by those in the package, which are never used as names of anything."""
        disks = {name: f"{self.artifact.id}-disk{n}.vmdk" for n, name in enumerate(self._descriptor.disks)}
        return disks | {name: f"{self.artifact.id}-file{n}" for n, name in enumerate(self._descriptor.others)}

    def _take(self, member: TarMember) -> None:
        kind = member.name.lower().rpartition(".")[2]
        if member.name in self._descriptor.disks:
            self._disks[member.name] = self._store_disk(member, self._names()[member.name])
        elif member.name in self._descriptor.others:
            room = _MAX_OTHERS - sum(map(len, self._others.values()))
            self._others[member.name] = self._read(member, room)
        elif kind == "mf" and self._expected is None:
            self._expected = ova.read_checksums(self._unhashed(member), self.where)
            # Some writers list the .mf in itself, with the digest that it had before it was written.
            self._expected.pop(member.name, None)
        elif kind == "cert" and not self._signed:
            self._unhashed(member)
            self._signed = True
        else:
            second = kind in ("ovf", "mf", "cert")
            what = "a second descriptor, checksum file or signature" if second else "a member that no OVF names"
            raise UnsafeImage(f"The package has {what}: {member.name!a}", self.where, _AGAIN)

    def _read(self, member: TarMember, most: int) -> bytes:
        """A small member, hashed."""
        data = self._unhashed(member, most)
        hasher = Hasher(*ova.ALGORITHMS)
        hasher(data)
        self._note(member, hasher)
        return data

    def _unhashed(self, member: TarMember, most: int = ova.MAX_TEXT) -> bytes:
        if member.size > most:
            what = f"The package has {member.size} bytes of {member.name!a}, which is no disk; {most} are allowed"
            raise TooLarge(what, self.where, "Leave it out of the package")
        return b"".join(limit(member.chunks, most, self.where))

    def _note(self, member: TarMember, hasher: Hasher) -> None:
        self._digests[member.name] = {each.algorithm: each for each in hasher.digests()}

    def _store_disk(self, member: TarMember, name: str) -> Entry:
        expected = (self._expected or {}).get(member.name)
        # Where the `.mf` is the last member, a disk is hashed before it is known by which algorithm.
        hasher = Hasher(*([expected.algorithm] if expected else () if self._expected else ova.ALGORITHMS))
        where = f"{self.where}: {member.name}"
        one = ImagePass(self.attempt, "vmdk", where, hasher, verify=partial(hasher.verify, expected, where))
        key, owner = self.artifact.key(name), self.attempt.owner
        with ExitStack() as stack:
            sinks = self.targets.open(stack, lambda store: store.writer(key, member.size, owner=owner))
            image, stored = one.store(member.chunks, sinks)
        self.targets.owed |= stored.owed
        self._note(member, hasher)
        return one.entry(name, image, "disk")

    def _discard_owed(self) -> None:
        """A store that failed at one disk got no other, and need not keep those it has."""
        for label in self.targets.owed:
            with contextlib.suppress(WorkerError):  # what cannot be removed now is found by clean-up
                discard(self.targets.stores[label], self.artifact, self.attempt.confirm)

    def _verify(self) -> None:
        """Every file is what the `.mf` says, and it says something of every file. A package may have none."""
        for name, expected in (self._expected or {}).items():
            actual = self._digests.get(name, {}).get(expected.algorithm)
            if actual != expected:
                what = f"is {actual}, its .mf says {expected}" if actual else "is named by the .mf, but not there"
                raise CorruptImage(f"The package is damaged: {name!a} {what}", self.where, _AGAIN)
        if self._expected is not None and (missing := self._digests.keys() - self._expected.keys()):
            raise UnknownFormat(f"The .mf says nothing of {', '.join(sorted(missing))!a}", self.where, _AGAIN)
