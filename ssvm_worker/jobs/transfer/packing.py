"""Pack the files of an OVF into one OVA next to them. CloudStack offers a VMware volume for download in this form."""

from __future__ import annotations

from functools import partial

from ssvm_worker.artifacts.checksums import Hasher
from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.errors import CorruptImage, ObjectNotFound
from ssvm_worker.formats import ova
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.upload.ova_export import OvaExport, OvaMember
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.streaming.pipeline import read_bytes, store_stream, tap


def pack(attempt: Attempt, store: Store, artifact: Artifact, key: str, to: str) -> int:
    """Write the OVF and the files that it lists as one OVA, the OVF first. Return the bytes of the OVA.

    Raises CorruptImage if a file is missing or changes meanwhile, and what ``read_descriptor`` raises.
    """
    directory, _, name = key.rpartition("/")
    text = read_bytes(store, key, ova.MAX_TEXT)
    listed = ova.read_descriptor(text, f"{store.name}:{key}")
    members = [OvaMember(name, len(text), lambda: iter([text]))]
    for each in (*listed.disks, *listed.others):
        file = f"{directory}/{each}"
        try:
            size = store.stat(file).size
        except ObjectNotFound as error:
            what = f"The OVF names a file that is not there: {each!a}"
            raise CorruptImage(what, f"{store.name}:{directory}", "Copy the volume again") from error
        members.append(OvaMember(each, size, partial(lambda key: iter(attempt.resuming(store.reader(key))), file)))
    package, hasher = OvaExport(artifact, members), Hasher()

    def verify() -> None:
        if hasher.size != package.size:
            what = f"A file has changed: the package has {hasher.size} bytes, not {package.size}"
            raise CorruptImage(what, f"{store.name}:{directory}", "Ask for the link again")
        attempt.confirm()

    attempt.progress.start(f"pack in {store.name}", package.size)
    with store.writer(to, package.size, owner=attempt.owner) as sink:
        chunks = tap(package.chunks(), attempt.progress.observe)
        store_stream(chunks, {"target": sink}, [hasher], verify=verify, check=attempt.check)
    return package.size
