"""``ssvm doctor --cloudstack``: check what an agent needs to get Up, without disturbing an agent that runs.

No check sends Startup: the server would disconnect the agent that has the GUID now.
"""

from __future__ import annotations

import email.utils
import http.client
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from ssvm_worker.config.schema import SERVER_PREFIX, Settings
from ssvm_worker.errors import WorkerError
from ssvm_worker.operations.finding import Finding
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import human_size
from ssvm_worker.wiring import assembly
from ssvm_worker.wiring.server_names import server_names

from .certificate_check import ShownServer, describe_certificate, look_at, problems_of
from .image_stores import ImageStores
from .link import AgentLink, LinkLost, LinkTrust

#: Time limits in seconds: of a connection, and of a store.
_CONNECT_S, _STORE_S = 10.0, 30.0
#: The port of a management server's web interface, whose answers have its time.
_WEB_PORT = 8080
#: Seconds of difference between two clocks that give a warning.
_MAX_SKEW_S = 60.0
#: Seconds for which the doctor reports that an agent was replaced.
_RECENT_S = 3600.0


@dataclass(frozen=True)
class _Probe:
    """What one connection to one server has shown."""

    finding: Finding
    shown: ShownServer | None


def examine_agent(settings: Settings, *, web_port: int = _WEB_PORT, store_s: float = _STORE_S) -> list[Finding]:
    """Check servers, certificate, clock, GUID and image stores. This takes as long as the slowest time-out."""
    section = settings.cloudstack
    if not section.servers:
        what = "[cloudstack] names no management server. Set servers, name and ca_file, or give --from-cmdline"
        return [Finding("cloudstack", False, what)]
    with ThreadPoolExecutor(len(section.servers)) as threads:
        probes = list(threads.map(lambda host: _probe(settings, host), section.servers))
    reached = [each for each in probes if each.shown]
    return [
        *(each.finding for each in probes),
        _trust(settings),
        _certificate(settings, reached),
        _clock(section.servers, web_port),
        *_guid(settings),
        *_stores(settings, store_s),
        _links(settings),
    ]


def _probe(settings: Settings, host: str) -> _Probe:
    section = settings.cloudstack
    check = f"server {host}"
    trust = LinkTrust(section.ca_file, section.fingerprint, section.certificate_file, section.key_file)
    try:
        shown = look_at(host, section.port, _CONNECT_S)
    except (OSError, UnicodeError) as error:
        what = f"port {section.port} cannot be reached: {getattr(error, 'strerror', None) or error}"
        return _Probe(Finding(check, False, f"{what}. Check the address, the port and the firewalls"), None)
    if not shown.certificate:
        what = f"port {section.port} does not answer with TLS 1.2. Check that it is the agents' port of the server"
        return _Probe(Finding(check, False, what), None)
    try:
        with closing(AgentLink(host, section.port, trust, timeout_s=_CONNECT_S)) as link:
            accepted = f"accepts the agent from {link.local_address} with {link.cipher}"
    except LinkLost as error:
        return _Probe(Finding(check, False, f"{error}. It shows {describe_certificate(shown.certificate)}"), shown)
    return _Probe(Finding(check, True, f"{accepted}; it shows {describe_certificate(shown.certificate)}"), shown)


def _trust(settings: Settings) -> Finding:
    section = settings.cloudstack
    if section.insecure:
        what = "insecure = true: any server gets the secrets of all stores. Set ca_file or fingerprint"
        return Finding("trust", True, what, warning=True)
    try:
        if section.ca_file:
            LinkTrust(section.ca_file).authorities()
    except LinkLost as error:
        what = f"{error.what} [{error.where}]. Copy the server's cloud.ca.crt (cacertificates of issueCertificate)"
        return Finding("trust", False, what)
    return Finding("trust", True, f"the server must show {section.ca_file or section.fingerprint}")


def _certificate(settings: Settings, reached: list[_Probe]) -> Finding:
    """Check the agent's certificate. A problem is only a warning while every server accepts the agent."""
    section = settings.cloudstack
    accepted = bool(reached) and all(each.finding.ok for each in reached)
    local = next((each.shown.local_address for each in reached if each.shown), "")
    strict = "A server with ca.plugin.root.auth.strictness, the default of new installations, requires one"
    get = f"issueCertificate ipaddress={local or 'ADDRESS'} returns it; the server writes that of a system VM itself"
    if section.certificate_file is None or section.key_file is None:
        return Finding("certificate", accepted, f"none is set. {strict}: {get}", warning=True)
    missing = [str(each) for each in (section.certificate_file, section.key_file) if not each.exists()]
    if missing:
        what = f"{' and '.join(missing)} do not exist. {strict}: {get}"
        return Finding("certificate", accepted, what, warning=True)
    authorities = sorted({each.shown.certificate for each in reached if each.shown})
    try:
        found = problems_of(section.certificate_file, section.key_file, local, authorities)
    except OSError as error:
        return Finding("certificate", False, f"{error.filename} cannot be read: {error.strerror}. Check its owner")
    if found:
        what = "; ".join(found)
        return Finding("certificate", accepted, f"{section.certificate_file}: {what}", warning=True)
    if not reached:
        return Finding("certificate", True, "not compared: no server can be reached", warning=True)
    return Finding(
        "certificate", True, f"{section.certificate_file} is valid, for {local}, from the server's authority"
    )


def _clock(servers: tuple[str, ...], port: int) -> Finding:
    for host in servers:
        connection = http.client.HTTPConnection(host, port, timeout=_CONNECT_S)
        try:
            connection.request("HEAD", "/client/")
            date = email.utils.parsedate_to_datetime(connection.getresponse().headers["Date"])
        except (OSError, http.client.HTTPException, ValueError, TypeError):
            continue
        finally:
            connection.close()
        skew = time.time() - date.timestamp()
        if abs(skew) > _MAX_SKEW_S:
            order = "ahead of" if skew > 0 else "behind"
            what = f"this host is {abs(skew):.0f} s {order} {host}. Certificates and uploads depend on it: set up NTP"
            return Finding("clock", True, what, warning=True)
        return Finding("clock", True, f"differs from {host} by less than {_MAX_SKEW_S:.0f} s")
    what = f"not compared: no server has answered at port {port}. Compare `date -u` by hand"
    return Finding("clock", True, what, warning=True)


def _guid(settings: Settings) -> Iterator[Finding]:
    """Report who holds the GUID in the ledger, and whether a server has preferred another agent."""
    guid = settings.cloudstack.guid or settings.cloudstack.name or ""
    try:
        with closing(assembly.open_agents(settings)) as registry:
            claim = next((each for each in registry.agents() if each.guid == guid), None)
    except WorkerError as error:
        yield Finding("guid", False, f"{guid}: the ledger is away: {error}")
        return
    if claim is None or not claim.held:
        yield Finding("guid", True, f"{guid}: no agent of this broker holds it")
    else:
        info = claim.info
        where = f"the agent on {info.host} (process {info.pid}) holds it"
        state = f"Up at {info.server} as host {info.host_id}" if claim.connected else "not Up"
        yield Finding(
            "guid", True, f"{guid}: {where}, {state}. A further agent with it waits", warning=not claim.connected
        )
    if claim and claim.info.replaced_at and time.time() - claim.info.replaced_at < _RECENT_S:
        ago = time.time() - claim.info.replaced_at
        what = (
            f"{guid}: {ago:.0f} s ago a server ended the connection just after Up. Another agent with this GUID is "
            "probably connected, but not to this broker. Stop the Java agent of the system VM (systemctl stop cloud)"
        )
        yield Finding("guid", False, what)


def _stores(settings: Settings, limit_s: float) -> Iterator[Finding]:
    """Open each store that a server has named, or that [cloudstack.stores] names."""
    mapped = settings.cloudstack.stores
    places = {name: place for place, name in mapped.items()}
    try:
        for name, values in server_names(settings).stores().items():
            place = str(values["url"]).partition("?")[0]
            if place not in mapped:  # it was named before the operator mapped it
                places[name] = place
    except WorkerError as error:
        yield Finding("stores", False, f"the stores of the server are unknown: {error}")
    if not places:
        what = "no server has named an image store yet, and [cloudstack.stores] is empty. Start the agent"
        yield Finding("stores", True, what, warning=True)
        return
    stores = ImageStores(settings)
    with ThreadPoolExecutor(len(places)) as threads:
        yield from threads.map(lambda each: _store(stores, each[0], each[1], limit_s), places.items())


def _store(stores: ImageStores, name: str, place: str, limit_s: float) -> Finding:
    def look(store: Store) -> str:
        next(iter(store.list("template/tmpl/0")), None)
        free = store.usage().free
        return f"{store.url}" + (f", {human_size(free)} free" if free is not None else "")

    try:
        return Finding(f"store {name}", True, stores.call(stores.named(name), look, limit_s))
    except WorkerError as error:
        gone = ". If the zone does not have this store any more, ignore this" if name.startswith(SERVER_PREFIX) else ""
        return Finding(f"store {name}", False, f"{place}: {type(error).__name__}: {error}{gone}")


def _links(settings: Settings) -> Finding:
    section = settings.cloudstack
    address = section.public.address or section.private.address
    if not address:
        what = "the server builds links with the public address of the system VM. Set cloudstack.public.address"
        return Finding("links", True, what, warning=True)
    return Finding("links", True, f"users get http://{address}/userdata/…; `ssvm serve` or Apache must answer there")
