"""Download from HTTP straight to S3, verified, compared with curl to a file and then s5cmd."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from .contest import Contender, Row, contest, left_out
from .download import Site, found, job, serving, write_random
from .stored import BUCKET, AnyS3, fresh, servers
from .upload import s5cmd
from .workers import own_sides, warm_worker

_FAST = "versitygw"


def bench(scratch: Path, size: int, runs: int) -> list[Row]:
    """Download to a new server in every run. There is no target: the bench is for the table of costs."""
    server, nginx, curl, program = servers(scratch).get(_FAST), found("nginx"), found("curl"), s5cmd()
    if not (server and nginx and curl and program):
        return [left_out("download to S3", "Go, nginx, curl or s5cmd is not installed")]
    (scratch / "www").mkdir()
    digest = write_random(scratch / "www/image.raw", size)
    with serving(nginx, scratch, "image.raw", digest) as site:
        site.config.write_text(
            f'[stores.archive]\nurl = "s3://{BUCKET}"\nendpoint = "{server.endpoint}"\n'
            f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"\n'
            '[download]\nallow_networks = ["127.0.0.0/8"]\n'
        )
        fields, made = job(site, site.plain)[0] | {"stores": "archive"}, partial(_stored, server)
        with warm_worker(site.config) as worker:
            sides = [*own_sides(site.config, worker, "download", fields, made), _peer(site, server, curl, program)]
            new = partial(fresh, server, scratch / "server")
            return contest(f"download to {_FAST}, HTTP", sides, size, runs, fresh=new)


def _peer(site: Site, server: AnyS3, curl: str, program: Path) -> Contender:
    file = str(site.root / "out/image.raw")
    get = [curl, "-sS", "--fail", "-o", file, site.plain]
    copy = [str(program), "--endpoint-url", server.endpoint, "cp", file, f"s3://{BUCKET}/"]
    keys = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    command = ["/bin/sh", "-c", f"{shlex.join(get)} && {shlex.join(copy)}"]
    return Contender(
        "curl -o, s5cmd cp", command, partial(_stored, server), {**keys, "AWS_REGION": "us-east-1"}, None, None
    )


def _stored(server: AnyS3) -> int:
    """Return the bytes of the image in the bucket."""
    listed = server.client().list_objects_v2(Bucket=BUCKET).get("Contents", [])
    return sum(each["Size"] for each in listed if each["Key"].endswith("image.raw"))
