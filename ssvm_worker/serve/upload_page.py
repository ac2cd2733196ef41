"""The web page for sending an image. It is one file without a framework, for keyboards and screen readers too."""

from __future__ import annotations

import html
import secrets
from importlib.resources import files

from starlette.responses import HTMLResponse, Response

from ssvm_worker.ledger.links import Link

#: The page's address is a secret. So the page sends no referrer, is not cached, and runs no foreign script.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ENDED = {"succeeded": "This link has been used. The image is stored.", "cancelled": "This upload was cancelled."}


def page(link: Link, state: str) -> Response:
    """Return the form, or a page that says that the link has been used."""
    nonce = secrets.token_urlsafe(16)
    text = files(__package__).joinpath("upload.html").read_text()
    values = {"nonce": nonce, "what": link.key, "over": _ENDED.get(state, "")}
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(value))
    headers = {
        "Content-Security-Policy": _POLICY.format(nonce=nonce),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text, headers=headers)
