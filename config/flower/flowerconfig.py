"""Flower, with login on: python -P -m tasks flower --conf=config/flower/flowerconfig.py

Who may log in comes from the environment and never from a file that is committed:

    FLOWER_BASIC_AUTH=name:password[,name:password]     or
    FLOWER_BASIC_AUTH_FILE=/run/secrets/flower          the same text in a file
    FLOWER_AUTH, FLOWER_AUTH_PROVIDER, FLOWER_OAUTH2_*  Flower's own OAuth, in place of both

Without any of these it refuses to start. /metrics and /healthcheck are open even with a login (Flower 2.2), so it
listens on loopback; put a TLS proxy before it, and set FLOWER_ADDRESS where that runs on another host.
Flower executes this file: it should belong to root.
"""

import os
from pathlib import Path


def _logins() -> list[str]:
    """The ``name:password`` pairs of the environment; without any login Flower does not start."""
    text = os.environ.get("FLOWER_BASIC_AUTH", "")
    if path := os.environ.get("FLOWER_BASIC_AUTH_FILE"):
        text = Path(path).read_text()
    pairs = [each.strip() for each in text.split(",") if each.strip()]
    if not pairs and not os.environ.get("FLOWER_AUTH"):
        raise SystemExit("Flower needs a login: set FLOWER_BASIC_AUTH=name:password, or FLOWER_BASIC_AUTH_FILE")
    for number, (name, _, password) in enumerate((pair.partition(":") for pair in pairs), 1):
        if not name or not password:
            raise SystemExit(f"Flower's login {number} is not of the form name:password")
    return pairs


if pairs := _logins():
    basic_auth = pairs
address = os.environ.get("FLOWER_ADDRESS", "127.0.0.1")

# Retry and Cancel buttons, and the page of jobs. Logins named in FLOWER_READERS (name,name) may only look.
from tasks.flower import install, readers_of_environment  # noqa: E402 - the login comes first

install(readers_of_environment())
