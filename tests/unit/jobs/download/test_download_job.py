"""The download job with real HTTP and both kinds of stores: one pass, resumable, owed stores, and never incomplete."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.artifacts.layout import Artifact
from ssvm_worker.artifacts.manifest import find_manifest, read_draft, read_manifest, write_draft
from ssvm_worker.errors import Cancelled, ChecksumMismatch, InvalidRequest, SourceChanged, SourceUnavailable, StoreFull
from ssvm_worker.jobs.attempt import Attempt
from ssvm_worker.jobs.connections import RemoteSource, SourceRequest
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.file.store import FileStore
from ssvm_worker.stores.memory import MemoryStore
from ssvm_worker.streaming.interfaces import BURST, CHUNK, Store
from ssvm_worker.streaming.pipeline import read_bytes
from ssvm_worker.wiring.connections import ConfiguredConnections
from tests import images
from tests.attempts import again, attempt
from tests.faults import store_unreachable
from tests.servers.http import Behaviour, HttpServer

IMAGE = images.mbr(6 << 20)
SHA256 = hashlib.sha256(IMAGE).hexdigest()
KEY = "template/tmpl/2/7/7.raw"


def request(url: str, **fields: Any) -> download.Request:
    return parse_request(download.Request, {"url": url, "account": 2, "id": "7"} | fields, "download")


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return a store that can resume."""
    return MemoryStore("primary") if request.param == "memory" else FileStore("primary", tmp_path)


def broken_off(server: HttpServer, asked: download.Request, *stores: Store) -> None:
    """Make a first attempt that stored 2 MiB of the image before its server failed; now the server works again."""
    server.serve("image", IMAGE, cut_after=2 << 20, then=Behaviour(status=503))
    with pytest.raises(SourceUnavailable):
        download.run(asked, attempt(*stores, will_resume=again))
    server.serve("image", IMAGE)


def stored(store: Store) -> list[str]:
    return [each.key.rpartition("/")[2] for each in store.list()]


@pytest.mark.parametrize(
    "checksum",
    [
        pytest.param(None, id="none"),
        pytest.param(f"sha256:{SHA256}", id="algorithm and colon"),
        pytest.param(f"{{SHA-256}}{SHA256.upper()}", id="CloudStack's braces"),
        pytest.param(hashlib.md5(IMAGE).hexdigest(), id="bare digest"),
        pytest.param("sha512:" + hashlib.sha512(IMAGE).hexdigest(), id="another algorithm"),
    ],
)
def test_stores_a_verified_image(http_server: HttpServer, store: Store, checksum: str | None) -> None:
    """An image with the right checksum in any form is stored with its properties, and its manifest lists both."""
    result = download.run(request(http_server.serve("image", IMAGE), checksum=checksum), attempt(store))

    assert read_bytes(store, KEY) == IMAGE
    assert stored(store) == ["7.raw", "manifest.json", "template.properties"]
    assert (result["format"], result["size"], result["digest"]) == ("raw", len(IMAGE), f"sha256:{SHA256}")
    assert read_manifest(store, request("http://x").artifact).entries[0].digest == f"sha256:{SHA256}"


@pytest.mark.parametrize(
    "form", ["{digest}  image\n", "{digest} *./image\n", "SHA256 (image) = {digest}\n", "{digest}"]
)
def test_checksum_from_a_sums_file(http_server: HttpServer, form: str) -> None:
    """A checksum may be the URL of a SHA256SUMS-style file in GNU's form, BSD's, or a bare digest."""
    sums = http_server.serve("SUMS", form.format(digest=SHA256).encode())

    result = download.run(request(http_server.serve("image", IMAGE), checksum=sums), attempt())

    assert result["digest"] == f"sha256:{SHA256}"


def test_resumes_in_place(http_server: HttpServer, store: Store) -> None:
    """After a break the stream resumes at that byte, with the first answer's ETag."""
    url = http_server.serve("image", IMAGE, cut_after=3 << 20, cut_times=1)

    result = download.run(request(url, checksum=SHA256), attempt(store))

    assert result["resumptions"] == 1
    assert http_server.requests[1].headers["If-Range"] == '"v1"'
    assert read_bytes(store, KEY) == IMAGE


def test_a_second_attempt_goes_on(http_server: HttpServer, store: Store) -> None:
    """An attempt before a retry keeps its bytes and a draft, and the next one fetches only the rest."""
    asked = request(http_server.url("image"), checksum=SHA256)
    broken_off(http_server, asked, store)
    assert stored(store) == ["manifest.draft.json"]

    result = download.run(asked, attempt(store, token=1))

    assert http_server.requests[-1].headers["Range"] == f"bytes={2 << 20}-"
    assert result["resumptions"] == 1
    assert read_bytes(store, KEY) == IMAGE
    assert stored(store) == ["7.raw", "manifest.json", "template.properties"]
    assert store.sweep(0) == 0


def test_what_a_dead_host_wrote_last_is_not_trusted(http_server: HttpServer, tmp_path: Path) -> None:
    """Bytes of the part that were not flushed to disk, and are zeros now, are fetched again."""
    primary, asked = FileStore("primary", tmp_path), request(http_server.url("image"))
    broken_off(http_server, asked, primary)
    (part,) = tmp_path.rglob("*.part")
    with part.open("ab") as file:
        file.write(bytes(1 << 20))

    download.run(asked, attempt(primary, token=1))

    assert http_server.requests[-1].headers["Range"] == f"bytes={2 << 20}-"
    assert read_bytes(primary, KEY) == IMAGE


def test_a_part_that_was_swept(http_server: HttpServer, store: Store) -> None:
    """If the part is missing, the draft forgets its bytes before another byte is written."""
    asked = request(http_server.url("image"))
    broken_off(http_server, asked, store)
    assert store.sweep(0) == 1
    http_server.serve("image", IMAGE, then=Behaviour(status=503), status=503)
    with pytest.raises(SourceUnavailable):
        download.run(asked, attempt(store, token=1, will_resume=again))
    draft = read_draft(store, asked.artifact)
    assert draft is not None
    assert draft.facts["settled"] == 0


def test_a_draft_that_tells_nothing_of_the_disk(http_server: HttpServer, store: Store) -> None:
    """If no draft records what was flushed to disk, the part is not reused."""
    asked = request(http_server.url("image"))
    broken_off(http_server, asked, store)
    draft = read_draft(store, asked.artifact)
    assert draft is not None
    del draft.facts["settled"]
    write_draft(store, draft, attempt(store).owner)

    download.run(asked, attempt(store, token=1))

    assert "Range" not in http_server.requests[-1].headers
    assert read_bytes(store, KEY) == IMAGE


def test_a_second_attempt_feeds_the_other_store_from_the_first(http_server: HttpServer, tmp_path: Path) -> None:
    """A store that cannot resume gets the first bytes from the primary's part, not from the source."""
    primary, other = FileStore("primary", tmp_path), MemoryStore("other", resumable=False)
    asked = request(http_server.url("image"), stores=["primary", "other"])
    broken_off(http_server, asked, primary, other)

    download.run(asked, attempt(primary, other, token=1))

    assert "Range" in http_server.requests[-1].headers
    assert read_bytes(primary, KEY) == read_bytes(other, KEY) == IMAGE


@pytest.mark.parametrize(("others", "expected"), [(0, BURST), (1, CHUNK)], ids=["directory", "directory and S3"])
def test_chunk_size(
    http_server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: int, expected: int
) -> None:
    """A download reads large chunks, unless one of the stores holds many chunks."""
    sizes: list[int] = []
    open_source = ConfiguredConnections.source

    def source(self: ConfiguredConnections, request: SourceRequest) -> RemoteSource:
        sizes.append(request.chunk_size)
        return open_source(self, request)

    monkeypatch.setattr(ConfiguredConnections, "source", source)
    http_server.serve("image", IMAGE)
    stores = [FileStore("primary", tmp_path), *[MemoryStore("other")] * others]
    names = [each.name for each in stores]

    download.run(request(http_server.url("image"), stores=names), attempt(*stores))

    assert sizes == [expected]


def test_a_second_attempt_begins_again_where_no_part_is_kept(http_server: HttpServer) -> None:
    """With a store that keeps no parts, such as S3, the next attempt fetches all into one artifact."""
    store = MemoryStore("primary", resumable=False)
    asked = request(http_server.url("image"), checksum=SHA256)
    broken_off(http_server, asked, store)

    assert download.run(asked, attempt(store, token=1))["resumptions"] == 0

    assert "Range" not in http_server.requests[-1].headers
    assert read_bytes(store, KEY) == IMAGE
    assert (stored(store), store.sweep(0)) == (["7.raw", "manifest.json", "template.properties"], 0)


def test_source_changed_since_the_last_attempt(http_server: HttpServer, store: Store) -> None:
    """If the object has changed since the last attempt, the download restarts from its first byte."""
    asked = request(http_server.url("image"))
    broken_off(http_server, asked, store)
    newer = images.mbr(5 << 20)
    http_server.serve("image", newer, etag='"v2"')

    download.run(asked, attempt(store, token=1))

    assert read_bytes(store, KEY) == newer


@pytest.mark.parametrize("checksum", [None, f"sha256:{hashlib.sha256(IMAGE).hexdigest()}"], ids=["none", "checksum"])
def test_another_copy_behind_a_redirector(http_server: HttpServer, store: Store, checksum: str | None) -> None:
    """A mirror that breaks off and disappears causes a clean start at the next one, in the same attempt."""
    http_server.serve("one", IMAGE, cut_after=3 << 20, etag='"one"', then=Behaviour(status=404))
    http_server.serve("two", IMAGE, etag='"two"')
    url = http_server.redirect("image", "/one")
    http_server.paths["/image"].then = Behaviour(status=302, headers={"Location": "/two"})
    result = download.run(request(url, checksum=checksum), attempt(store))
    assert read_bytes(store, result["key"]) == IMAGE
    assert stored(store) == sorted(["7.raw", "manifest.json", "template.properties"])


def test_copies_that_change_each_time(http_server: HttpServer, store: Store) -> None:
    """A source that changes at each resumption is given up after a few clean starts, without leftovers."""
    changing = [Behaviour(IMAGE, cut_after=3 << 20, etag=f'"{number}"') for number in range(40)]
    for each, following in itertools.pairwise(changing):
        each.then = following
    http_server.paths["/image"] = changing[0]
    asked = request(http_server.url("image"))
    with pytest.raises(SourceChanged):
        download.run(asked, attempt(store))
    download.discard(asked, attempt(store))  # as a worker does after a failed job
    assert stored(store) == []


def test_wrong_checksum_over_a_seam_is_tried_once_more(http_server: HttpServer, store: Store) -> None:
    """A wrong checksum after a resumption causes one clean start, because the rest may be wrong."""
    lying = Behaviour(images.mbr(1 << 20) * 6, then=Behaviour(IMAGE))
    url = http_server.serve("image", IMAGE, cut_after=3 << 20, then=lying)

    result = download.run(request(url, checksum=SHA256), attempt(store))

    assert result["resumptions"] == 0
    assert read_bytes(store, KEY) == IMAGE


def test_wrong_checksum_leaves_nothing(http_server: HttpServer, store: Store) -> None:
    """A wrong checksum stores nothing, and a discarded job leaves no draft."""
    asked, trying = request(http_server.serve("image", IMAGE), checksum="0" * 64), attempt(store)

    with pytest.raises(ChecksumMismatch):
        download.run(asked, trying)
    download.discard(asked, trying)

    assert stored(store) == []
    assert store.sweep(0) == 0


def test_a_failing_second_store_is_owed(http_server: HttpServer) -> None:
    """A store that fails during the download does not affect the primary, and is owed with the reason."""
    primary, full = MemoryStore("primary"), MemoryStore("archive", capacity=1 << 20)
    url = http_server.serve("image", IMAGE, content_length="")

    result = download.run(request(url, stores=["primary", "archive"]), attempt(primary, full))

    assert result["stores"] == ["primary"]
    assert result["owed"]["archive"]["error"] == "StoreFull"
    assert find_manifest(full, request(url).artifact) is None
    assert stored(full) == []


@pytest.mark.parametrize("method", ["sweep", "writer"])
def test_a_second_store_that_is_away_is_owed(http_server: HttpServer, method: str) -> None:
    """A store that is absent from the start does not affect the primary either."""
    primary, away = MemoryStore("primary"), store_unreachable(MemoryStore("archive"), method)
    it = attempt(primary, away)
    result = download.run(request(http_server.serve("image", IMAGE), stores=["primary", "archive"]), it)
    assert list(result["owed"]) == ([] if method == "sweep" else ["archive"])
    assert find_manifest(primary, Artifact.of_prefix(result["key"].rpartition("/")[0]))


def test_a_failing_primary_fails_the_job(http_server: HttpServer) -> None:
    """A failing primary fails the job, and nothing is left on the other store."""
    primary, other = MemoryStore("primary", capacity=1 << 20), MemoryStore("other")
    url = http_server.serve("image", IMAGE, content_length="")

    with pytest.raises(StoreFull):
        download.run(request(url, stores=["primary", "other"]), attempt(primary, other))

    assert stored(other) == []
    assert other.sweep(0) == 0


def test_the_same_download_again_is_a_no_op(http_server: HttpServer, store: Store) -> None:
    """A repeated download returns the same result and fetches nothing."""
    asked = request(http_server.serve("image", IMAGE), checksum=SHA256)
    first = download.run(asked, attempt(store))
    fetched = len(http_server.requests)

    second = download.run(asked, attempt(store, job_id="job-2"))

    assert len(http_server.requests) == fetched
    assert second == first | {"reused": True}


def test_another_download_under_the_same_id(http_server: HttpServer, store: Store) -> None:
    """An id that another image has is refused, and that image stays."""
    download.run(request(http_server.serve("image", IMAGE)), attempt(store))

    with pytest.raises(InvalidRequest, match="another template under this id"):
        download.run(request(http_server.serve("other", images.qcow2())), attempt(store))

    assert read_bytes(store, KEY) == IMAGE


def test_cancel_leaves_nothing(http_server: HttpServer, store: Store) -> None:
    """A cancelled download stops between two chunks and leaves nothing."""
    trying = attempt(store)
    trying.stop_reason = lambda: "user" if trying.progress.bytes > 1 << 20 else None
    asked = request(http_server.serve("image", IMAGE, rate=4e6))

    with pytest.raises(Cancelled):
        download.run(asked, trying)
    trying.stop_reason = lambda: None
    download.discard(asked, trying)

    assert stored(store) == []
    assert store.sweep(0) == 0


def test_a_fenced_attempt_commits_nothing(http_server: HttpServer, store: Store) -> None:
    """An attempt that has lost its claim when all bytes have arrived commits nothing."""

    def fenced() -> None:
        raise Cancelled("fenced")

    with pytest.raises(Cancelled):
        download.run(request(http_server.serve("image", IMAGE)), attempt(store, confirm=fenced))

    assert find_manifest(store, request("http://x").artifact) is None


def test_progress_sums_to_the_bytes(http_server: HttpServer) -> None:
    """Progress shows the total as soon as it is known, and ends at the size of the image."""
    seen: list[dict[str, Any]] = []
    trying: Attempt = attempt()
    trying.progress._publish = seen.append

    download.run(request(http_server.serve("image", IMAGE)), trying)

    assert next(each["stage"] for each in seen if each["total"] == len(IMAGE)) == "download"
    assert max(each["bytes"] for each in seen if each["stage"] == "verifying") == len(IMAGE)


@pytest.mark.parametrize(
    ("kind", "prefix", "file"),
    [
        ("template", "template/tmpl/2/7", "template.properties"),
        ("iso", "template/tmpl/2/7", "template.properties"),
        ("volume", "volumes/2/7", "volume.properties"),
    ],
)
def test_cloudstack_layout(http_server: HttpServer, kind: str, prefix: str, file: str) -> None:
    """Each kind has its CloudStack directory, with a properties file that CloudStack can load."""
    store = MemoryStore("primary")

    download.run(request(http_server.serve("image", images.qcow2()), kind=kind, name="Größe"), attempt(store))

    lines = dict(line.split("=", 1) for line in read_bytes(store, f"{prefix}/{file}").decode().splitlines())
    assert {"id", "uniquename", "filename", "size", "virtualsize", "qcow2.filename", "qcow2.size"} <= lines.keys()
    assert lines["qcow2"] == "true"
    assert lines["description"] == "Gr\\u00f6\\u00dfe"


def test_no_draft_where_the_source_cannot_resume(http_server: HttpServer, store: Store) -> None:
    """Bytes of a source that cannot resume are not kept."""
    url = http_server.serve("image", IMAGE, ranges=False, etag=None, cut_after=1 << 20)
    asked = request(url)

    with pytest.raises(SourceUnavailable):
        download.run(asked, attempt(store, will_resume=again))

    assert read_draft(store, asked.artifact) is None
