"""ComputeChecksumCommand."""

from __future__ import annotations

import hashlib

from ssvm_worker.artifacts.checksums import algorithm_of
from ssvm_worker.artifacts.layout import check_key
from ssvm_worker.cloudstack.messages import Answer, ComputeChecksumCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.jobs.cloudstack_properties import java_digest
from ssvm_worker.streaming.interfaces import Store

#: Time limit in seconds. The server waits for an hour. A file of 100 GiB needs 50 MiB/s for half of it.
_COMPUTE_S = 1800.0


def compute_checksum(command: ComputeChecksumCommand, services: Services) -> Answer:
    """Read the file, and answer with its digest, as ``{SHA-512}HEX``. Without an algorithm it is MD5."""
    algorithm = algorithm_of(command.algorithm or "MD5")
    if algorithm is None:
        raise InvalidRequest("Unknown algorithm of a checksum", ascii((command.algorithm or "")[:60]))
    key = check_key("/".join(each for each in command.template_path.split("/") if each))

    def digest(store: Store) -> str:
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        for chunk in store.reader(key).open():
            hasher.update(chunk)
        return hasher.hexdigest()

    found = services.stores.call(services.stores.find(command.store), digest, _COMPUTE_S)
    return Answer(result=True, details=java_digest(f"{algorithm}:{found}"))
