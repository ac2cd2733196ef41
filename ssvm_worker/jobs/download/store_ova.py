"""Store an OVA while its members arrive: inspect and stream each disk, then write the small files.

    ID.ovf          the descriptor, with the new names
    ID-diskN.vmdk   the disks, numbered from 0 in the order of the descriptor
    ID-fileN        other small files that the descriptor names (NVRAM)
    ID-fileN.iso    ISO images of any size
    ID.mf           the digests of all of these
    ID.ova          the package itself, if the request has keep_package

A later member may be invalid when earlier disks are committed. Without a manifest these objects belong to no artifact.
The next attempt overwrites them, and the job's ``discard`` removes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from ssvm_worker.artifacts.checksums import Digest, Hasher, digest_of
from ssvm_worker.artifacts.manifest import Entry, Manifest, discard
from ssvm_worker.errors import CorruptImage, TooLarge, UnknownFormat, UnsafeImage, WorkerError
from ssvm_worker.formats import ova
from ssvm_worker.jobs.store_set import StoreSet, add_small_objects
from ssvm_worker.streaming.interfaces import Sink
from ssvm_worker.streaming.pipeline import limit
from ssvm_worker.units import MiB
from ssvm_worker.unpacking.tar import TarMember

from .image import ImagePass, OriginFile

#: The most bytes of all files that are not disks. They are held in memory. An NVRAM has about 270 KiB.
_MAX_OTHERS = 16 * MiB
#: A smaller ISO image is held in memory and not examined. Seeds for cloud-init are small.
_MAX_SMALL_ISO = MiB
_ASK_PUBLISHER = "Ask its publisher for a complete package"


class PackageTee:
    """Observer of a file that also writes it to sinks, if it is an OVA.

    It holds the first bytes, about 2 MiB, until ``begin`` or ``drop`` says whether the file is an OVA.
    """

    def __init__(self) -> None:
        self._write: Callable[[bytes], None] | None = None
        self._held: list[bytes] = []

    def __call__(self, chunk: bytes) -> None:
        """Write a chunk, or hold it."""
        (self._write or self._held.append)(chunk)

    def begin(self, write: Callable[[bytes], None]) -> None:
        """Write the held chunks, and all later ones at once."""
        held, self._held, self._write = self._held, [], write
        for chunk in held:
            write(chunk)

    def drop(self) -> None:
        """Forget the held chunks, and ignore all later ones."""
        self.begin(lambda _: None)


class StoredOva:
    """An OVA on its way to the stores."""

    def __init__(self, origin: OriginFile, store_set: StoreSet, tee: PackageTee) -> None:
        self._origin = origin
        self._store_set = store_set
        self._tee = tee
        self._packages: dict[str, Sink] = {}
        self._attempt, self._artifact, self._location = origin.attempt, origin.request.artifact, origin.location
        #: The digests of each member, by its name in the OVA and by algorithm.
        self._digests: dict[str, dict[str, Digest]] = {}
        #: The digests in the `.mf`, by name. None: no `.mf` has arrived.
        self._expected: dict[str, Digest] | None = None
        #: Whether there is a `.cert`: a signature of the `.mf`, which the worker cannot verify.
        self._signed = False
        self._others: dict[str, bytes] = {}
        self._disks: dict[str, Entry] = {}

    def store(self, members: Iterator[TarMember], offered: Hasher) -> tuple[Manifest, dict[str, bytes]]:
        """Store the disks. Return the manifest and the small objects, which are not written yet.

        Raises UnknownFormat if the request names another format, or a conversion.
        """
        request = self._origin.request
        if request.convert_to:
            raise UnknownFormat("The file is an OVA, which is not converted", self._location, "Omit convert_to")
        if request.format not in ("auto", "ova"):
            what = f"The file is an OVA, but {request.format} was asked for"
            raise UnknownFormat(what, self._location, "Give the format ova or auto if this is the right file")
        self._text = self._read(next(members), ova.MAX_TEXT)
        self._descriptor = ova.read_descriptor(self._text, self._location)
        # The objects have new names. The names in the OVA never become names of files or keys.
        self._names = {name: f"{request.id}-disk{n}.vmdk" for n, name in enumerate(self._descriptor.disks)}
        self._names |= {
            name: f"{request.id}-file{n}{'.iso' if _is_iso(name) else ''}"
            for n, name in enumerate(self._descriptor.others)
        }
        with ExitStack() as stack:
            if request.keep_package:
                self._begin_package(stack)
            for member in members:
                self._take(member)
            self._verify()
            self._origin.verify(offered)
            self._commit_package()
        for store_name in self._store_set.owed:  # a store that failed at one disk got no further disk
            with contextlib.suppress(WorkerError):  # clean-up removes the rest
                discard(self._store_set.stores[store_name], self._artifact, self._attempt.confirm)
        small = self._small_objects()
        descriptor, *others = small
        disks = [self._disks[name] for name in self._descriptor.disks]
        images = [self._disks[name] for name in self._descriptor.others if name in self._disks]
        size = sum(int(each.facts["virtual_size"]) for each in disks)
        facts: dict[str, object] = {"format": "ova", "virtual_size": size, "disks": len(disks)}
        facts |= {"signature": "unverified"} if self._signed else {}
        data = small[descriptor]
        entry = Entry(descriptor, len(data), str(digest_of(data)), "descriptor", facts)
        package = Entry(f"{request.id}.ova", offered.size, str(offered.digest()), "package", {"virtual_size": size})
        kept = (package,) if request.keep_package else ()
        manifest = self._origin.manifest("ova", offered, (entry, *disks, *images, *kept))
        return add_small_objects(manifest, {name: small[name] for name in others}, "config"), small

    def _begin_package(self, stack: ExitStack) -> None:
        """Write the package itself too. Its bytes pass the tee while the members are read."""
        key, size, owner = self._artifact.key(f"{self._artifact.id}.ova"), self._origin.size, self._attempt.owner
        self._packages = self._store_set.open_sinks(stack, lambda store: store.writer(key, size, owner=owner))
        self._tee.begin(self._write_package)

    def _write_package(self, chunk: bytes) -> None:
        self._attempt.held.took(chunk)
        for store in self._store_set.active():
            self._store_set.secondary_may_fail(store, partial(self._packages[store.name].write, chunk))

    def _commit_package(self) -> None:
        if self._packages:
            self._attempt.confirm()
        for name, sink in self._packages.items():
            if name not in self._store_set.owed:
                self._store_set.secondary_may_fail(self._store_set.stores[name], sink.commit)

    def _take(self, member: TarMember) -> None:
        kind = member.name.lower().rpartition(".")[2]
        if member.name in self._descriptor.disks:
            self._disks[member.name] = self._store_disk(member, "vmdk")
        elif member.name in self._descriptor.others and _is_iso(member.name) and member.size > _MAX_SMALL_ISO:
            self._disks[member.name] = self._store_disk(member, "iso")
        elif member.name in self._descriptor.others:
            free = _MAX_OTHERS - sum(map(len, self._others.values()))
            self._others[member.name] = self._read(member, free)
        elif kind == "mf" and self._expected is None:
            self._expected = ova.read_checksums(self._read_unhashed(member), self._location)
            # Some writers list the .mf in itself, with the digest that it had before it was written.
            self._expected.pop(member.name, None)
        elif kind == "cert" and not self._signed:
            self._read_unhashed(member)
            self._signed = True
        else:
            second = kind in ("ovf", "mf", "cert")
            what = "a second descriptor, checksum file or signature" if second else "a member that no OVF names"
            raise UnsafeImage(f"The package has {what}: {member.name!a}", self._location, _ASK_PUBLISHER)

    def _read(self, member: TarMember, max_bytes: int) -> bytes:
        """Return a small member, and hash it."""
        data = self._read_unhashed(member, max_bytes)
        hasher = Hasher(*ova.ALGORITHMS)
        hasher(data)
        self._digests[member.name] = {each.algorithm: each for each in hasher.digests()}
        return data

    def _read_unhashed(self, member: TarMember, max_bytes: int = ova.MAX_TEXT) -> bytes:
        if member.size > max_bytes:
            what = (
                f"The package has {member.size} bytes of {member.name!a}, which is not a disk; {max_bytes} are allowed"
            )
            raise TooLarge(what, self._location, "Remove it from the package")
        return b"".join(limit(member.chunks, max_bytes, self._location))

    def _store_disk(self, member: TarMember, form: str) -> Entry:
        """Store a disk or a large ISO image, and examine it."""
        name = self._names[member.name]
        expected = (self._expected or {}).get(member.name)
        # If the `.mf` is the last member, its algorithm is not known yet. Then the disk is hashed with all algorithms.
        hasher = Hasher(*([expected.algorithm] if expected else () if self._expected else ova.ALGORITHMS))
        location = f"{self._location}: {member.name}"
        image_pass = ImagePass(self._attempt, form, location, hasher, verify=partial(hasher.verify, expected, location))
        key, owner = self._artifact.key(name), self._attempt.owner
        with ExitStack() as stack:
            sinks = self._store_set.open_sinks(stack, lambda store: store.writer(key, member.size, owner=owner))
            image, stored = image_pass.store(member.chunks, sinks)
        self._store_set.owed |= stored.owed
        self._digests[member.name] = {each.algorithm: each for each in hasher.digests()}
        return image_pass.entry(name, image, "disk" if form == "vmdk" else "config")

    def _verify(self) -> None:
        """Raise CorruptImage or UnknownFormat if a file of the OVF is missing, or if the `.mf` does not match.

        The `.mf` must list every file, and every file must have the listed digest. An OVA without `.mf` is accepted.
        """
        for name in (*self._descriptor.disks, *self._descriptor.others):
            if name not in self._disks and name not in self._others:
                what = f"The package lacks a file that its OVF names: {name!a}"
                raise CorruptImage(what, self._location, _ASK_PUBLISHER)
        for name, expected in (self._expected or {}).items():
            actual = self._digests.get(name, {}).get(expected.algorithm)
            if actual != expected:
                what = f"has {actual}, but its .mf says {expected}" if actual else "is listed in the .mf, but missing"
                raise CorruptImage(f"The package is damaged: {name!a} {what}", self._location, _ASK_PUBLISHER)
        if self._expected is not None and (missing := self._digests.keys() - self._expected.keys()):
            what = f"The .mf does not list {', '.join(sorted(missing))!a}"
            raise UnknownFormat(what, self._location, _ASK_PUBLISHER)

    def _small_objects(self) -> dict[str, bytes]:
        """Return the small objects by name: the descriptor first, other files, the checksums last."""
        small = {f"{self._artifact.id}.ovf": ova.renamed(self._text, self._names, self._location)}
        small |= {self._names[name]: data for name, data in self._others.items()}
        digests = {name: digest_of(data) for name, data in small.items()}
        digests |= {each.name: Digest(*each.digest.split(":")) for each in self._disks.values()}
        return small | {f"{self._artifact.id}.mf": ova.write_checksums(digests)}


def _is_iso(name: str) -> bool:
    return name.lower().endswith(".iso")
