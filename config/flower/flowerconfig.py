"""Flower with a login.

    python -P -m tasks flower --conf=config/flower/flowerconfig.py

The environment defines the logins, so that no committed file contains them:

    FLOWER_BASIC_AUTH=name:password[,name:password]     or
    FLOWER_BASIC_AUTH_FILE=/run/secrets/flower          the same text in a file
    FLOWER_AUTH, FLOWER_AUTH_PROVIDER, FLOWER_OAUTH2_*  Flower's own OAuth, instead of both

Without any of these Flower does not start. The pages /metrics and /healthcheck need no login (Flower 2.2). So Flower
listens on loopback. Put a TLS proxy in front of Flower, and set FLOWER_ADDRESS if the proxy runs on another host.
Flower executes this file, so root should own it.
"""

import os
from pathlib import Path


def _logins() -> list[str]:
    """Return the ``name:password`` pairs of the environment; raise SystemExit if there is no login."""
    text = os.environ.get("FLOWER_BASIC_AUTH", "")
    if path := os.environ.get("FLOWER_BASIC_AUTH_FILE"):
        text = Path(path).read_text()
    pairs = [each.strip() for each in text.split(",") if each.strip()]
    if not pairs and not os.environ.get("FLOWER_AUTH"):
        raise SystemExit("Flower needs a login: set FLOWER_BASIC_AUTH=name:password, or FLOWER_BASIC_AUTH_FILE")
    for number, (name, _, password) in enumerate((pair.partition(":") for pair in pairs), 1):
        if not name or not password:
            raise SystemExit(f"Flower's login {number} must have the form name:password")
    return pairs


if pairs := _logins():
    basic_auth = pairs
address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")

# Retry and Cancel buttons, and the page of jobs. Users in FLOWER_READERS (name,name) have read-only access.
from tasks.flower import install, readers_of_environment  # noqa: E402 - the login comes first

install(readers_of_environment())
