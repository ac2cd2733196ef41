"""HandleConfigDriveIsoCommand: write or delete the ISO image with the configuration of a VM.

The server makes the image. It has the passwords of the guest, so it goes straight to the store and is in no job.

Differences from the Java agent: the image is complete or absent, also while it is written. Only keys below
``configdrive/`` are allowed. A bucket is allowed. The details of a deletion are empty in both.
"""

from __future__ import annotations

import base64
import binascii

from ssvm_worker.cloudstack.keys import key_of
from ssvm_worker.cloudstack.messages import HandleConfigDriveIsoAnswer, HandleConfigDriveIsoCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, TooLarge
from ssvm_worker.streaming.interfaces import Owner
from ssvm_worker.streaming.pipeline import put_bytes
from ssvm_worker.units import MiB

#: The directories of CloudStack: since 4.12, and before.
_DIRECTORIES = ("configdrive", "ConfigDrive")
#: The largest image. That of the server is 64 MiB (ConfigDriveBuilder).
_MAX_BYTES = 64 * MiB
#: Time limit in seconds of a write or a deletion.
_STORE_S = 20.0
_OWNER = Owner("config-drive")


def handle_config_drive(command: HandleConfigDriveIsoCommand, services: Services) -> HandleConfigDriveIsoAnswer:
    """Write or delete a config drive."""
    key = key_of(command.iso_file)
    if key.split("/")[0] not in _DIRECTORIES or not key.endswith(".iso"):
        raise InvalidRequest("This is not the path of a config drive", key, "Give configdrive/NAME.iso")
    store = services.stores.find(command.dest_store)
    if not command.create:
        services.stores.call(store, lambda each: each.delete(key), _STORE_S)
        return HandleConfigDriveIsoAnswer(result=True)
    data = _decoded(command)
    services.stores.call(store, lambda each: put_bytes(each, key, data, _OWNER), _STORE_S)
    text = "Successfully saved config drive at secondary storage"
    return HandleConfigDriveIsoAnswer(location="SECONDARY", result=True, details=text)


def _decoded(command: HandleConfigDriveIsoCommand) -> bytes:
    text = command.iso_data.get_secret_value() if command.iso_data else ""
    if len(text) > _MAX_BYTES * 4 // 3 + 4:
        raise TooLarge(f"The config drive has more than {_MAX_BYTES} bytes", command.iso_file)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise InvalidRequest("Invalid config drive ISO data", command.iso_file, "Send the image in Base64")
    return data
