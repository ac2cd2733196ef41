"""Pages for people: the form of an upload, and messages for a link that does not work."""

from __future__ import annotations

import html
import secrets
from datetime import UTC, datetime
from importlib.resources import files

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ssvm_worker.errors import WorkerError
from ssvm_worker.ledger.links import Link
from ssvm_worker.units import human_size

from .responses import failure

#: The page's address is a secret. So the page sends no referrer, is not cached, and runs no foreign script.
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ENDED = {
    "succeeded": ("This link has been used", "The image is stored. You can close this page."),
    "cancelled": ("This upload was cancelled", "Ask the person who sent you the link for a new one."),
}


def upload_page(link: Link, state: str, max_bytes: int) -> Response:
    """Return the form for a browser, without a framework, or a page that says that the link has been used."""
    if state in _ENDED:
        return _message(*_ENDED[state])
    until = datetime.fromtimestamp(link.until, UTC)
    return _page(
        "upload.html",
        name=str(link.request.get("name") or link.key),
        limit=human_size(max_bytes),
        limit_bytes=str(max_bytes),
        until=f"{until:%Y-%m-%d %H:%M} UTC",
        until_iso=until.isoformat(),
    )


def is_for_people(request: Request) -> bool:
    """Return whether a browser shows the response to a person."""
    return request.method == "GET" and "text/html" in request.headers.get("accept", "")


def error_page(error: HTTPException | WorkerError) -> Response:
    """Return the page for a request that was refused or has failed, with the status that a program gets."""
    if isinstance(error, HTTPException):
        title, _, text = str(error.detail).strip().partition(". ")
        return _message(title.rstrip("."), text, error.status_code)
    status = failure(error).status_code
    if status in (423, 503):
        return _message("The service is not available now", "Try again in a few minutes.", status)
    return _message(error.what, "Ask the person who sent you the link.", status)


def _message(title: str, text: str, status: int = 200) -> Response:
    return _page("message.html", status, title=title, text=text)


def _page(file: str, status: int = 200, **values: str) -> Response:
    """Return a page of this package with *values*, which are escaped."""
    folder, nonce = files(__package__), secrets.token_urlsafe(16)
    text = folder.joinpath(file).read_text().replace("{{style}}", folder.joinpath("page.css").read_text())
    for key, value in {"nonce": nonce, **values}.items():
        text = text.replace(f"{{{{{key}}}}}", html.escape(value))
    headers = {
        "Content-Security-Policy": _POLICY.format(nonce=nonce),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text, status, headers=headers)
