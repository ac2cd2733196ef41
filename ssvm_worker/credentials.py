"""The credentials that requests name, from the settings."""

from __future__ import annotations

import base64

from .errors import InvalidRequest
from .settings import Credentials, Settings


def named_credentials(settings: Settings, name: str | None) -> Credentials | None:
    """What a request's ``credentials`` names; None for none, and for an image store, which has keys only."""
    if name is None or name in settings.stores:
        return None
    if name not in settings.credentials:
        known = ", ".join(settings.credentials) or "none"
        raise InvalidRequest(f"There are no credentials named {name!r}", "credentials", f"The settings have: {known}")
    return settings.credentials[name]


def authorization(named: Credentials | None) -> dict[str, str]:
    """The header that they stand for."""
    if named and named.token:
        return {"Authorization": f"Bearer {named.token.get_secret_value()}"}
    if named and named.username is not None:
        password = named.password.get_secret_value() if named.password else ""
        pair = base64.b64encode(f"{named.username}:{password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    return {}
