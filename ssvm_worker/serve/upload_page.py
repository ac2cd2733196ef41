"""The page on which a person sends an image: one file, no framework, usable by keyboard and screen reader."""

from __future__ import annotations

import html
import secrets
from importlib.resources import files

from starlette.responses import HTMLResponse, Response

from ssvm_worker.ledger.links import Link

#: The page knows a secret, its own address: it is told to nobody, kept nowhere, and nothing foreign runs beside it.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_OVER = {"succeeded": "This link has been used: the image is stored.", "cancelled": "This upload was cancelled."}


def page(link: Link, state: str) -> Response:
    """The form, or that the link has been used."""
    nonce = secrets.token_urlsafe(16)
    text = files(__package__).joinpath("upload.html").read_text()
    values = {"nonce": nonce, "what": link.key, "over": _OVER.get(state, "")}
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(value))
    headers = {
        "Content-Security-Policy": _POLICY.format(nonce=nonce),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text, headers=headers)
