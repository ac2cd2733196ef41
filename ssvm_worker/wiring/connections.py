"""Open sources, destinations and vCenters from the settings, with address rule, proxy and credentials.

The SDKs of sources and of vSphere are imported at first use: a foreground run of another job does not need them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from ssvm_worker.config.credentials import authorization, named_credentials
from ssvm_worker.config.findings import suggestion
from ssvm_worker.config.schema import CredentialsSection, S3Section, Settings, VCenterSection
from ssvm_worker.errors import ConfigError, InvalidRequest, misused
from ssvm_worker.jobs.connections import DestinationRequest, RemoteSource, SourceRequest
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.stores import open_destination, open_origin, sweep_destination
from ssvm_worker.streaming.interfaces import Check, Owner, Sink, Source

from .own_stores import refuse_stores
from .stores import open_store_named

if TYPE_CHECKING:
    from ssvm_worker.sources.options import HttpSettings
    from ssvm_worker.vmware.session import VCenterSession


@dataclass(frozen=True)
class ConfiguredConnections:
    """``Connections`` of an attempt, from the settings."""

    settings: Settings

    def source(self, request: SourceRequest) -> RemoteSource:
        """Return the source of an object with several URLs. It tries them in order."""
        from ssvm_worker.sources import SourceOptions, find_source

        download, first = self.settings.download, request.urls[0]
        named = named_credentials(self.settings, request.credentials, first)
        for url in request.urls:
            self._refuse_stores(url)

        def stored(url: str) -> Source:
            return self._stored(url, request.credentials if url == first else None, request.check)

        options = SourceOptions(
            replace(self._http(named), chunk_size=request.chunk_size),
            {**request.headers, **authorization(named)},
            request.check,
            username=named.username if named else None,
            password=named.password.get_secret_value() if named and named.password else None,
            directories=download.allow_directories,
            known_hosts=_text(download.known_hosts),
            private_key=_text(named.private_key_file) if named else None,
            stored=stored,
        )
        return find_source(request.urls, options, request.checksum, request.validator)

    def text(self, url: str, check: Check) -> str:
        """Return the content of a small text file. If the settings have a keyring, check its signature."""
        from ssvm_worker.sources.checksum_signature import Keyring, fetch_signed
        from ssvm_worker.sources.http.source import fetch_text

        download = self.settings.download
        self._refuse_stores(url)
        if download.keyring is None:
            return fetch_text(url, self._http(None), check=check)
        return fetch_signed(url, self._http(None), Keyring(download.keyring, download.require_signature), check)

    def destination(self, request: DestinationRequest, size: int, owner: Owner) -> Sink:
        """Return the sink of an upload."""
        upload = self.settings.upload
        values = self._s3_values(request.url, request.credentials) | {
            "rule": AddressRule(self.settings.networks_of(upload)),
            "http_ca_file": _text(upload.ca_file),
        }
        named = named_credentials(self.settings, request.credentials, request.url)
        refuse_stores(self.settings, request.url, values.get("endpoint"))
        headers = {**request.headers, **authorization(named)}
        return open_destination(request.url, size, owner=owner, headers=headers, check=request.check, **values)

    def sweep_destination(self, request: DestinationRequest) -> None:
        """Abort unfinished uploads of earlier attempts to this URL."""
        values = self._s3_values(request.url, request.credentials)
        refuse_stores(self.settings, request.url, values.get("endpoint"))
        sweep_destination(request.url, check=request.check, **values)

    def vcenter(self, name: str, check: Check) -> VCenterSession:
        """Return a session with that vCenter. It is a context manager."""
        from ssvm_worker.vmware.session import Address, VCenterSession

        given = find_vcenter(self.settings, name)
        address = Address(
            given.host,
            given.username,
            given.password.get_secret_value(),
            port=given.port,
            ca_file=given.ca_file,
            thumbprint=given.thumbprint,
            timeout_s=given.timeout_s,
            stream_timeout_s=given.stream_timeout_s,
            hosts=given.hosts,
        )
        options = self.settings.backup.model_copy(update={"spill_dir": self.settings.spill_dir})
        return VCenterSession(address, check, options)

    def _http(self, named: CredentialsSection | None) -> HttpSettings:
        from ssvm_worker.net.proxy import parse_proxy
        from ssvm_worker.sources.http.parallel import ConnectionPolicy
        from ssvm_worker.sources.options import HttpSettings

        download = self.settings.download
        proxy = download.proxy.get_secret_value() if download.proxy else ""
        return HttpSettings(
            rule=AddressRule(download.allow_networks),
            connect_timeout_s=download.connect_timeout_s,
            stall_s=download.stall_s,
            min_rate=download.min_rate,
            max_redirects=download.max_redirects,
            ca_file=_text(download.ca_file),
            origin_ca_file=_text(named.ca_file) if named else None,
            certificate=_text(named.certificate_file) if named else None,
            proxy=parse_proxy(proxy, download.no_proxy) if proxy else None,
            parallel=ConnectionPolicy(connections=download.connections),
        )

    def _refuse_stores(self, url: str) -> None:
        if url.partition(":")[0].lower() != "s3":  # for s3:// the endpoint of the credentials is checked later
            refuse_stores(self.settings, url, allowed=self.settings.download.allow_stores)

    def _stored(self, url: str, credentials: str | None, check: Check) -> Source:
        """Open an s3:// or store: URL. Without credentials the requests to S3 are not signed.

        So a sender of requests cannot use the keys of an image store or the role of the machine.
        """
        download = self.settings.download
        scheme, _, rest = url.partition(":")
        if scheme.lower() != "s3":
            name, _, key = rest.partition("/")
            if name not in download.allow_stores:
                what = f"Downloads may not come from the image store {name[:64]!r}"
                raise InvalidRequest(
                    what, "url", f"download.allow_stores has: {', '.join(download.allow_stores) or 'none'}"
                )
            return open_store_named(self.settings, name).reader(key)
        values = self._s3_values(url, credentials, download.allow_stores) if credentials else {}
        refuse_stores(self.settings, url, values.get("endpoint"), download.allow_stores)
        values |= {"stall_s": download.stall_s, "min_rate": download.min_rate, "check": check}
        values |= {"connect_timeout_s": download.connect_timeout_s}
        section = self.settings.credentials.get(credentials or "")
        anonymous = not values.get("access_key") and not (section and (section.machine_role or section.profile))
        return open_origin(url, **values, anonymous=anonymous)

    def _s3_values(self, url: str, name: str | None, allow_stores: Collection[str] | None = None) -> dict[str, Any]:
        """Return endpoint and keys of the credentials *name* for an s3:// URL. Return nothing for any other URL.

        Only downloads may use the keys of an image store, and only of a store in *allow_stores*. A request must name
        the credentials explicitly, because its sender chooses the bucket. This also applies to the role of the machine.
        """
        if url.partition(":")[0].lower() != "s3":
            return {}
        found: Any
        if name in self.settings.stores and name in (allow_stores or ()):
            found = self.settings.stores[name]
        elif name is None or name in self.settings.stores:
            shown = f"The keys of the image store {name!r} are for its own jobs only"
            known = ", ".join(self.settings.credentials) or "there is none"
            what = shown if name else "s3:// needs credentials"
            raise InvalidRequest(what, "credentials", f"Name one of [credentials.NAME]: {known}")
        else:
            found = named_credentials(self.settings, name, url)
            if allow_stores is None and not (found.access_key or found.machine_role or found.profile):
                what = f"The credentials {name!r} have no S3 keys"
                raise ConfigError(what, f"credentials.{name}", "Set access_key, profile or machine_role")
        values = {key: value for key, value in found if key in S3Section.model_fields}
        return {key: each.get_secret_value() if isinstance(each, SecretStr) else each for key, each in values.items()}


def find_vcenter(settings: Settings, name: str) -> VCenterSection:
    """Return the settings of a vCenter. Raise InvalidRequest if they do not have it."""
    if name not in settings.vcenters:
        known = ", ".join(settings.vcenters) or "none"
        what = f"There is no vCenter named {name!r}{suggestion(name, settings.vcenters).removesuffix('?')}"
        raise misused(InvalidRequest(what, "vcenters", f"The settings have: {known}"))
    return settings.vcenters[name]


def _text(path: object) -> str | None:
    return None if path is None else str(path)
