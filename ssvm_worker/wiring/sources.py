"""Create the sources of downloads from the settings, with address rule, proxy and credentials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssvm_worker.artifacts.checksums import Digest
from ssvm_worker.config.credentials import authorization, named_credentials
from ssvm_worker.config.schema import CredentialsSection, Settings
from ssvm_worker.errors import InvalidRequest
from ssvm_worker.net.address_policy import AddressRule
from ssvm_worker.sources import find_source
from ssvm_worker.sources.checksum_signature import Keyring, fetch_signed
from ssvm_worker.sources.http.parallel import ConnectionPolicy
from ssvm_worker.sources.http.proxy import parse_proxy
from ssvm_worker.sources.http.request import HttpSettings
from ssvm_worker.sources.http.source import fetch_text
from ssvm_worker.sources.mirrors import Mirrors
from ssvm_worker.sources.options import SourceOptions
from ssvm_worker.streaming.interfaces import Check, Source, Store

from .own_stores import refuse_stores


@dataclass(frozen=True)
class Origins:
    """Factory of sources for downloads."""

    settings: Settings
    #: Returns the image store of a name.
    store: Callable[[str], Store]
    #: Returns the source of an s3:// URL. Without the name of credentials, access is anonymous.
    s3: Callable[[str, str | None, Check], Source]

    def source(
        self,
        urls: Sequence[str],
        *,
        headers: Mapping[str, str],
        credentials: str | None,
        checksum: Digest | None,
        check: Check,
        validator: dict[str, Any] | None,
    ) -> Mirrors:
        """Return the source of an object with several URLs. It tries them in order."""
        download, named = self.settings.download, named_credentials(self.settings, credentials, urls[0])
        for url in urls:
            self._refuse_stores(url)
        access = SourceOptions(
            self._http(named),
            {**headers, **authorization(named)},
            check,
            username=named.username if named else None,
            password=named.password.get_secret_value() if named and named.password else None,
            directories=download.allow_directories,
            known_hosts=_text(download.known_hosts),
            private_key=_text(named.private_key_file) if named else None,
            stored=lambda url: self._stored(url, credentials if url == urls[0] else None, check),
        )
        return find_source(urls, access, checksum, validator)

    def text(self, url: str, *, check: Check) -> str:
        """Return the content of a small text file. If the settings have a keyring, check its signature."""
        download = self.settings.download
        self._refuse_stores(url)
        if download.keyring is None:
            return fetch_text(url, self._http(None), check=check)
        return fetch_signed(url, self._http(None), Keyring(download.keyring, download.require_signature), check)

    def _refuse_stores(self, url: str) -> None:
        if url.partition(":")[0].lower() != "s3":  # for s3:// the endpoint of the credentials is checked later
            refuse_stores(self.settings, url, allowed=self.settings.download.allow_stores)

    def _stored(self, url: str, credentials: str | None, check: Check) -> Source:
        scheme, _, rest = url.partition(":")
        if scheme.lower() == "s3":
            return self.s3(url, credentials, check)
        name, _, key = rest.partition("/")
        allowed = self.settings.download.allow_stores
        if name not in allowed:
            what = f"Downloads may not come from the image store {name[:64]!r}"
            raise InvalidRequest(what, "url", f"download.allow_stores has: {', '.join(allowed) or 'none'}")
        return self.store(name).reader(key)

    def _http(self, named: CredentialsSection | None) -> HttpSettings:
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


def _text(path: object) -> str | None:
    return None if path is None else str(path)
