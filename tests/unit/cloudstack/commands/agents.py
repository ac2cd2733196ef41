"""A dispatcher with real parts: a broker, and the directories or buckets of a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssvm_worker.cloudstack.commands import Dispatcher
from ssvm_worker.cloudstack.frame import RawMessage
from ssvm_worker.cloudstack.messages import MESSAGES
from ssvm_worker.cloudstack.services import Services, open_services
from ssvm_worker.config import parse
from ssvm_worker.config.schema import Settings
from tests.servers.broker import Broker
from tests.servers.s3 import S3Server

PLACE = "nfs://192.0.2.10/export/sec1"
NFS = {"com.cloud.agent.api.to.NfsTO": {"_url": PLACE, "_role": "Image"}}
_FULL = {name.rpartition(".")[2]: name for name in MESSAGES}


def settings_of(broker: Broker, directory: Path, **sections: Any) -> Settings:
    """Return settings in which the server's store is a directory of the test."""
    (directory / "store").mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "zone": "z",
        "state_dir": str(directory / "state"),
        "broker": {"url": broker.url, "prefix": broker.prefix},
        "stores": {"primary": {"url": f"file://{directory / 'store'}", "shared": True}},
        "cloudstack": {"stores": {PLACE: "primary"}},
    }
    return parse(values | sections, "the test")


class Agent:
    """Sends commands to a dispatcher as a server does."""

    def __init__(self, settings: Settings, services: Services | None = None) -> None:
        self.services = services or open_services(settings)
        self.dispatch = Dispatcher(self.services)

    def send(self, command: str, **fields: Any) -> dict[str, Any]:
        """Return the fields of the answer, with the short name of its class."""
        answer = self.dispatch(RawMessage(_FULL[command], json.loads(json.dumps(fields))))
        return {"class": answer.short} | answer.content


def data_object(kind: str, path: str | None, store: dict[str, Any] = NFS) -> dict[str, Any]:
    """Return the transfer object of a template, volume or snapshot."""
    field = "imageDataStore" if kind == "Template" else "dataStore"
    fields = {field: store, "id": 1} | ({} if path is None else {"path": path})
    return {f"org.apache.cloudstack.storage.to.{kind}ObjectTO": fields}


def s3_object(server: S3Server, bucket: str) -> dict[str, Any]:
    """Return the transfer object of a bucket."""
    host = server.endpoint.removeprefix("http://")
    fields = {"bucketName": bucket, "endPoint": host, "httpsFlag": False, "socketTimeout": 30000}
    keys = {"accessKey": server.access_key, "secretKey": server.secret_key}
    return {"com.cloud.agent.api.to.S3TO": fields | keys}


def java_template(store: Path, account: int, number: int, name: str, size: int = 3, file: str = "9e8d.qcow2") -> None:
    """Write a template as the Java agent does, on NFS."""
    folder = store / f"template/tmpl/{account}/{number}"
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"x" * size)
    _properties(folder / "template.properties", number, name, size, file)


def java_volume(store: Path, account: int, number: int, name: str, size: int = 3) -> None:
    """Write a volume as the Java agent does, on NFS."""
    folder = store / f"volumes/{account}/{number}"
    folder.mkdir(parents=True)
    (folder / "9e8d.qcow2").write_bytes(b"x" * size)
    _properties(folder / "volume.properties", number, name, size)


def _properties(file: Path, number: int, name: str, size: int, image: str = "9e8d.qcow2") -> None:
    extension = image.rpartition(".")[2]
    lines = [
        *("#", "#Sat Nov 28 18:34:19 UTC 2026", f"uniquename={name}", "description=", f"{extension}.size={size}"),
        *(f"filename={image}", f"size={size}", "public=true", "checksum=", f"{extension}.virtualsize=1073741824"),
        *(f"id={number}", f"{extension}=true", "hvm=false", "virtualsize=1073741824", f"{extension}.filename={image}"),
    ]
    file.write_text("\n".join(lines) + "\n")
