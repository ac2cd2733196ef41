"""Commands of a management server to the dispatcher, for tests: from the vectors, or with some fields changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssvm_worker.cloudstack.commands import Dispatcher
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.image_stores import mount_directory
from ssvm_worker.cloudstack.services import open_services
from ssvm_worker.config.cloudstack_section import CloudStackSection
from ssvm_worker.config.schema import Settings
from tests.unit.cloudstack.recorded import DATA

#: The image store of the vectors, and the directory in which an agent mounts it.
NFS = "nfs://192.0.2.10/export/sec1"
PARENT = mount_directory(NFS)


def vector(name: str, **changed: Any) -> RawMessage:
    """Return the message of a vector. A change to None removes the field."""
    content = json.loads((DATA / f"vectors/{name}.json").read_text())["content"]
    ((full_name, fields),) = json.loads(content)[0].items()
    fields = {key: each for key, each in (fields | changed).items() if each is not None}
    return RawMessage(full_name, fields)


def agent_settings(settings: Settings, web_root: Path | None = None) -> Settings:
    """Return the settings of an agent for which the store *primary* is the store of the vectors."""
    section = CloudStackSection(stores={NFS: "primary"}, web_root=web_root)
    return settings.model_copy(update={"cloudstack": section})


def asker(settings: Settings) -> Callable[[RawMessage], RawMessage]:
    """Return a function that answers a command."""
    return Dispatcher(open_services(settings))
