"""GetDatadisksCommand and CreateDatadiskTemplateCommand: the templates of the disks of an OVA, for VMware.

The server asks for the disks of a downloaded OVA. Then it asks for a template of each disk, also of the boot disk,
whose template is the OVA's own. Without the right answers the template never becomes ready.

Differences from the Java agent:

- ``path`` of a disk is its key. The Java agent sends the path below its mount directory; this agent accepts both.
- The OVF is checked: it cannot name files outside its directory, include others, or contain entities.
- A file that the OVF names must exist. The Java agent checks only that it is no directory.
- The template of the boot disk keeps its package, so its path stays. The Java agent answers with a path without a file.
- ``ova=true`` in template.properties: the Java agent writes ``ova=false``. So it does not list the template after a
  reconnect, and the server downloads it again.
- ``size`` is that of the disk. The Java agent repeats the size in the command.
- A bucket is allowed.
"""

from __future__ import annotations

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.cloudstack.jobs_to_end import limit_of, run_job
from ssvm_worker.cloudstack.keys import key_of
from ssvm_worker.cloudstack.messages import (
    CreateDatadiskTemplateAnswer,
    CreateDatadiskTemplateCommand,
    GetDatadisksAnswer,
    GetDatadisksCommand,
)
from ssvm_worker.cloudstack.ovf_information import read_datadisks
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import TemplateObjectTO
from ssvm_worker.errors import InvalidRequest

#: Time limit in seconds of the read of an OVF and the check of its files.
_READ_S = 20.0


def get_datadisks(command: GetDatadisksCommand, services: Services) -> GetDatadisksAnswer:
    """Answer with the disks and ISO images of an OVA: ids, sizes, controllers, and which disk boots."""
    template = _template(command.data)
    artifact = _artifact_of(key_of(template.path))
    store, configuration = services.stores.find(template.store), command.configuration_id or ""
    disks = services.stores.call(store, lambda each: read_datadisks(each, artifact, configuration), _READ_S)
    return GetDatadisksAnswer(result=True, data_disk_details=disks)


def create_datadisk_template(
    command: CreateDatadiskTemplateCommand, services: Services
) -> CreateDatadiskTemplateAnswer:
    """Make the template of one disk, and answer with it. Its id must be that of the command."""
    template = _template(command.data_disk_template)
    key = key_of(command.path)
    source, disk = _artifact_of(key), key.rpartition("/")[2]
    made = Artifact("template", str(template.account_id), str(template.id))
    if made.account != source.account:
        raise InvalidRequest("The disk belongs to another account", key, "Name a disk of an OVA of the same account")
    if bool(command.bootable) != (made.id == source.id):
        what = "Only the boot disk stays in the template of its OVA"
        raise InvalidRequest(what, key, "Send the command with the id of the OVA's template for the boot disk only")
    store = services.stores.find(template.store)
    request = {
        "account": source.account,
        "id": source.id,
        "disk": disk,
        "template": made.id,
        "unique_name": template.unique_name or template.name or "",
        "store": store.name,
    }
    result = run_job(services, "split", request, limit_of(command.wait))
    size = result["virtual_size"] or template.size
    new = TemplateObjectTO.new(path=result["package"], id=template.id, size=size, physical_size=result["size"])
    return CreateDatadiskTemplateAnswer(result=True, data_disk_template=new)


def _template(data: object) -> TemplateObjectTO:
    if not isinstance(data, TemplateObjectTO):
        raise InvalidRequest("The command names no template", type(data).__name__)
    return data


def _artifact_of(key: str) -> Artifact:
    """Return the template with this key: its directory, or a file in it."""
    artifact = Artifact.of_prefix("/".join(key.split("/")[:4]))
    if artifact.kind != "template" or key.count("/") > 4:
        raise InvalidRequest("This is not the path of a template", key, "Give template/tmpl/ACCOUNT/ID")
    return artifact
