"""Who may fetch objects for copies between zones, and from which internal networks the agent may download.

The Java agent writes files of Apache. This agent writes to the ledger, which `ssvm serve` reads. With
``cloudstack.web_root`` it also writes the files of Apache.
"""

from __future__ import annotations

import contextlib
import ipaddress
from pathlib import Path

from ssvm_worker.cloudstack.apache import ApacheFiles
from ssvm_worker.cloudstack.messages import Answer, SecStorageFirewallCfgCommand, SecStorageVMSetupCommand
from ssvm_worker.cloudstack.services import Services
from ssvm_worker.errors import InvalidRequest, WorkerError
from ssvm_worker.ledger.cloudstack_web import CopyLogin

#: Time limit in seconds of a question to a store.
_STORE_S = 5.0


def configure_firewall(command: SecStorageFirewallCfgCommand, services: Services) -> Answer:
    """Store the addresses that may fetch objects. The server replaces the list, or adds addresses to it."""
    addresses = [_address(each.source_ip) for each in command.port_configs or [] if each.add is not False]
    services.web.set_copy_addresses(addresses, append=command.is_append_a_ip)
    _write_apache(services)
    return Answer(result=True)


def set_up_vm(command: SecStorageVMSetupCommand, services: Services) -> Answer:
    """Store the login of zone copies, and the internal networks from which downloads are allowed."""
    if command.copy_user_name and command.copy_password:
        if ":" in command.copy_user_name or not command.copy_user_name.isprintable():  # a line of Apache's .htpasswd
            raise InvalidRequest("The user name of copies has a colon or a control character", "copyUserName")
        login = CopyLogin(command.copy_user_name, command.copy_password.get_secret_value())
        services.web.set_copy_login(login)
    sites = [str(_network(each)) for each in command.allowed_internal_sites or [] if each.strip()]
    services.web.set_internal_sites(sites)
    _write_apache(services)
    return Answer(result=True, details="")


def _write_apache(services: Services) -> None:
    """Write the rules of Apache, if the settings name its root. Omit all other stores than directories of this host."""
    root = services.settings.cloudstack.web_root
    if root is None:
        return
    points: dict[str, Path] = {}
    for directory, name in services.web.stores().items():
        with contextlib.suppress(WorkerError):
            store = services.stores.named(name)
            points[directory] = services.stores.call(store, lambda opened: opened.root, _STORE_S)  # type: ignore[attr-defined]
    web = services.web
    ApacheFiles(root).allow_copies(web.copy_login(), web.copy_addresses(), points)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text.strip()))
    except ValueError as error:
        raise InvalidRequest("The command has an invalid address", ascii(text[:64]), "Send an IP address") from error


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text.strip(), strict=False)
    except ValueError as error:
        what = "The command has an invalid network"
        raise InvalidRequest(what, ascii(text[:64]), "Correct secstorage.allowed.internal.sites") from error
