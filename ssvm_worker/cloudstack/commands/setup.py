"""SecStorageSetupCommand and GetStorageStatsCommand.

A lost connection during the setup blocks a host on the server for an hour. So the setup is answered within seconds,
even if the export hangs. The mount then continues, and the next command may find it.
"""

from __future__ import annotations

from ssvm_worker.cloudstack.apache import install_certificate
from ssvm_worker.cloudstack.image_stores import mount_directory
from ssvm_worker.cloudstack.messages import (
    Answer,
    GetStorageStatsAnswer,
    GetStorageStatsCommand,
    SecStorageSetupAnswer,
    SecStorageSetupCommand,
)
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.cloudstack.transfer_objects import NfsTO
from ssvm_worker.ledger.cloudstack_web import WebCertificate
from ssvm_worker.streaming.interfaces import Store

#: Time limits in seconds of a mount, and of a question about free space.
_MOUNT_S, _STATS_S = 15.0, 15.0
#: The capacity that the Java agent reports for a bucket. S3 reports none.
_S3_CAPACITY = (1 << 31) - 1


def set_up_store(command: SecStorageSetupCommand, services: Services) -> Answer:
    """Mount the store, and keep the key of uploads and the certificate of links.

    ``_dir`` is the name of the Java agent's mount directory. The server stores it and sends it back in other commands.
    """
    if command.post_upload_key:
        services.web.set_upload_key(command.post_upload_key.get_secret_value())
    if (given := command.certs) and given.priv_key and given.priv_cert:
        key, chain = given.priv_key.get_secret_value(), given.cert_chain or ""
        certificate = WebCertificate(key, given.priv_cert, chain)
        if certificate != services.web.certificate():
            services.web.set_certificate(certificate)
            install_certificate(services.settings.cloudstack, certificate, given.root_ca_cert or "")
    store = services.stores.find(command.store, command.nfs_version)
    if not isinstance(command.store, NfsTO):
        return Answer(result=True)
    url = command.store.url

    def mount(opened: Store) -> str:
        opened.usage()
        return mount_directory(url)  # asks the DNS, which may be slow too

    directory = services.stores.call(store, mount, _MOUNT_S)
    return SecStorageSetupAnswer(dir=directory, result=True, details="success")


def storage_stats(command: GetStorageStatsCommand, services: Services) -> GetStorageStatsAnswer:
    """Answer with the space of a store in bytes. A bucket has the capacity that the Java agent reports."""
    store = services.stores.find(command.store, command.nfs_version)
    if store.is_s3:
        return GetStorageStatsAnswer(used_bytes=0, capacity_bytes=_S3_CAPACITY, result=True)
    usage = services.stores.call(store, lambda each: each.usage(), _STATS_S)
    return GetStorageStatsAnswer(used_bytes=usage.used or 0, capacity_bytes=usage.total or 0, result=True)
