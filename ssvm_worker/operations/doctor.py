"""Check every dependency of a worker: whether it works, and why not."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import ConfigError, StoreUnavailable, WorkerError
from ssvm_worker.formats.qemu_img import tool
from ssvm_worker.streaming.interfaces import Store
from ssvm_worker.units import human_duration, human_size
from ssvm_worker.vm_boot.boot import try_accelerator
from ssvm_worker.wiring import assembly
from ssvm_worker.wiring.connections import ConfiguredConnections
from ssvm_worker.wiring.message_transport import MessageRoute

from .finding import Finding
from .host_checks import examine_host

if TYPE_CHECKING:
    from ssvm_worker.ledger.job_metrics import LaneMetrics
    from ssvm_worker.ledger.workers import WorkerStatus
    from ssvm_worker.stores.s3.store import S3Store
    from ssvm_worker.vmware.placement import VmTarget

#: Seconds after which a queued job gives a warning, and the number of failed jobs that are read.
_MAX_WAIT_S, _MAX_FAILED = 900, 1000
#: A smaller free share of a store is a warning, as in the alert SsvmStoreFull.
_FULL_SHARE = 0.05
#: Seconds after which a snapshot of a backup job gives a warning. Few backups take longer.
_MAX_SNAPSHOT_S = 24 * 3600
#: Seconds between this host's clock and the broker's clock that give a warning. S3 refuses 15 minutes.
_MAX_CLOCK_S = 30


def examine(settings: Settings, file: str = "") -> list[Finding]:
    """Check everything that the settings name, and the workers. This takes as long as the slowest time-out.

    *file* is the settings file, or "" for none.
    """
    nowhere = "no settings file: create one with `ssvm config init`. Defaults and SSVM_… variables are in force"
    missing = "The settings name no image store. Add [stores.primary] with a url"
    return [
        Finding("settings", True, f"{file or nowhere}; zone {settings.zone}", warning=not file),
        *examine_host(settings),
        _check("state_dir", lambda: _state_dir(settings)),
        *_broker(settings),
        *_workers(settings),
        *_snapshots(settings),
        *(_check(f"store {name}", lambda name=name: _store(settings, name)) for name in settings.stores),  # type: ignore[misc]
        *(_uploads(settings, name) for name, each in settings.stores.items() if each.url.startswith("s3://")),
        *([] if settings.stores else [Finding("stores", False, missing)]),
        *([_spill_dir(settings)] if settings.vcenters else []),
        *(_check(f"vcenter {name}", lambda name=name: _vcenter(settings, name)) for name in settings.vcenters),  # type: ignore[misc]
        _check("conversion", lambda: _conversion(settings)),
        *([_boot(settings)] if settings.vcenters or shutil.which("qemu-system-x86_64") else []),
    ]


def examine_vcenter(settings: Settings, name: str, vm: str | None, target: VmTarget | None = None) -> list[Finding]:
    """Return the findings of a backup's preflight: for the vCenter, or for one VM and all stores.

    With *target*, return those of a restore to it. Raise InvalidRequest, SourceDenied, SourceNotFound or
    SourceUnavailable if the check itself is impossible.
    """
    from ssvm_worker.jobs.backup.preflight import preflight  # imports pyVmomi

    with ConfiguredConnections(settings).vcenter(name, lambda: None) as session:
        if target is not None:
            found = session.examine_target(target)
        elif vm is None:
            found = session.examine()
        else:
            machine = session.find_vm(vm)
            disks = machine.hardware().disks
            found = preflight(machine, assembly.Stores(settings, answering=True), disks, own_snapshot=True)
    details = [f"{each.detail}. {each.remedy}" if each.remedy else each.detail for each in found]
    return [
        Finding(each.check, each.state != "error", detail, each.state == "warning")
        for each, detail in zip(found, details, strict=True)
    ]


def examine_messages(settings: Settings) -> list[Finding]:
    """Check whether RabbitMQ answers, and count the messages of this worker's queues. Returns [] without RabbitMQ."""
    route = MessageRoute.of(settings)
    if not route.is_rabbitmq:
        return []
    from ssvm_worker.ledger.record import queue_name
    from ssvm_worker.wiring.celery_sender import count_messages  # Celery takes half a second to import

    queues = [queue_name(settings.zone, lane) for lane in settings.worker.lanes]
    try:
        found = [(queue, *count_messages(route, queue)) for queue in queues]
    except StoreUnavailable as error:
        return [Finding("messages", False, f"StoreUnavailable: {error}; jobs wait in the ledger")]
    used = [f"{queue}: {count} waiting, {workers} workers" for queue, count, workers in found if workers or count]
    return [Finding("messages", True, f"{route.shown}; {', '.join(used) or 'no worker has created its queues yet'}")]


def _check(check: str, examination: Callable[[], str | Finding]) -> Finding:
    try:
        found = examination()
        return found if isinstance(found, Finding) else Finding(check, True, found)
    except WorkerError as error:
        return Finding(check, False, f"{type(error).__name__}: {error}")
    except OSError as error:
        return Finding(check, False, f"{error.strerror}: {error.filename}. Check the path and its owner")


def _state_dir(settings: Settings) -> str:
    if not settings.broker.embedded:
        return f"{settings.state_dir} (for the embedded broker, and scratch files of backups)"
    os.makedirs(settings.state_dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=settings.state_dir):
        return f"{settings.state_dir} can be written"


def _conversion(settings: Settings) -> str:
    """Check the tools and the directory that ``convert_to`` of a download needs."""
    directory = settings.download.scratch_dir
    if directory is None:
        return "off: download.scratch_dir is not set"
    tools = ", ".join(tool(name) for name in ("qemu-img", "prlimit"))
    with tempfile.TemporaryFile(dir=directory):
        return f"{tools}; {directory} can be written, {human_size(shutil.disk_usage(directory).free)} free"


def _boot(settings: Settings) -> Finding:
    """Start QEMU, which only ``ssvm verify --boot`` needs."""
    if (qemu := shutil.which("qemu-system-x86_64")) is None:
        return Finding("verify --boot", True, "not possible: qemu-system-x86_64 is not installed (qemu-system-x86)")
    try:
        tried = try_accelerator(settings.boot.accelerator)
    except ConfigError as error:
        return Finding("verify --boot", True, f"not possible: {error}", warning=True)
    if tried.kvm:
        return Finding("verify --boot", True, f"{qemu} with KVM")
    if settings.boot.accelerator == "tcg":
        return Finding("verify --boot", True, f"{qemu} with TCG, as boot.accelerator says")
    detail = f"{qemu} with TCG, slow: KVM does not work here"
    # A site that boots its backups has settings for it.
    return Finding("verify --boot", True, detail, warning=bool(settings.boot.model_fields_set))


def _spill_dir(settings: Settings) -> Finding:
    """Check the spill directory. A failure is only a warning, because backups work without it."""

    def write() -> str:
        directory = settings.spill_dir
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return f"{directory} can be written, {human_size(shutil.disk_usage(directory).free)} free"

    if not settings.backup.spill_bytes:
        return Finding("backup.spill_dir", True, "off: backup.spill_bytes is 0")
    found = _check("backup.spill_dir", write)
    return replace(found, ok=True, warning=not found.ok)


def _broker(settings: Settings) -> Iterator[Finding]:
    def reach() -> str:
        with assembly.open_ledger(settings) as ledger:
            warnings.extend(ledger.warnings())
            clock.append(ledger.clock_difference())
            counts = ledger.counts()
        return ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "no jobs yet"

    warnings: list[str] = []
    clock: list[float] = []
    yield _check("broker", reach)
    for warning in warnings:
        yield Finding("broker durability", True, warning, warning=True)
    if clock and not warnings:
        yield Finding("broker durability", True, "appendonly is on, and no job can be evicted")
    for seconds in clock:
        detail = f"differs from the broker's clock by {human_duration(seconds)}"
        is_wrong = seconds > _MAX_CLOCK_S
        yield Finding("clock", True, f"{detail}. Synchronize both hosts" if is_wrong else detail, warning=is_wrong)


def _workers(settings: Settings) -> Iterator[Finding]:
    """Check the workers of each zone that has jobs or workers. Warn of jobs that wait too long or have failed.

    Without a broker nothing is yielded, because another finding reports this.
    """
    try:
        with (
            closing(assembly.open_job_metrics(settings)) as counters,
            closing(assembly.open_registry(settings)) as registry,
        ):
            lanes = [each for each in counters.lanes() if each.lane in LANES]
            seen = registry.workers()
        with assembly.open_ledger(settings) as ledger:
            failed = ledger.page(state="failed", limit=_MAX_FAILED)
    except WorkerError:
        return
    busy = {each.zone for each in lanes if each.counts.get("queued") or each.counts.get("running")}
    for zone in sorted({settings.zone, *busy, *(each.info.zone for each in seen)}):
        here = [each for each in lanes if each.zone == zone]
        yield from _zone(zone, here, [each for each in seen if each.info.zone == zone], is_ours=zone == settings.zone)
    recent = [each.error or {} for each in failed if each.updated > time.time() - 3600]
    if waiting := [each for each in lanes if each.oldest_s]:
        oldest = max(waiting, key=lambda each: each.oldest_s)
        place = f"zone {oldest.zone}, lane {oldest.lane}"
        yield Finding("oldest job", True, f"waits for {human_duration(oldest.oldest_s)} in {place}")
    for name, count in Counter(each.get("error", "?") for each in recent).most_common():
        newest = next(each for each in recent if each.get("error", "?") == name)
        remedy = f"{newest['remedy'].rstrip('.')}. " if newest.get("remedy") else ""
        detail = f"{count} failed in the last hour with {name}. {remedy}See `ssvm jobs --state failed --error {name}`"
        yield Finding("jobs", True, detail, warning=True)


def _snapshots(settings: Settings) -> Iterator[Finding]:
    """Report the open snapshots of backup jobs, and warn of old ones and of disks that need consolidation."""
    try:
        found = assembly.open_services(settings).open_snapshots.all()
    except WorkerError:
        return
    if not found:
        return
    unmerged = [each for each in found if each.needs_consolidation]
    oldest = max((time.time() - each.created for each in found if not each.needs_consolidation), default=0.0)
    detail = f"{len(found) - len(unmerged)} of backup jobs, the oldest made {human_duration(max(0.0, oldest))} ago"
    if unmerged:
        detail += "; these VMs need consolidation: " + ", ".join(f"{each.vm} of {each.vcenter}" for each in unmerged)
    is_wrong = bool(unmerged) or oldest > _MAX_SNAPSHOT_S
    remedy = ". See `ssvm doctor --vcenter NAME` and `ssvm jobs --job consolidate`" if is_wrong else ""
    yield Finding("snapshots", True, detail + remedy, warning=is_wrong)


def _zone(zone: str, lanes: list[LaneMetrics], seen: list[WorkerStatus], *, is_ours: bool) -> Iterator[Finding]:
    up = [each.info for each in seen if each.state == "Up" and each.info.connected]
    queued = {each.lane: each.counts["queued"] for each in lanes if each.counts.get("queued")}
    running = sum(each.counts.get("running", 0) for each in lanes)
    start = f"Start one: systemctl start ssvm-worker@{zone}"
    if not up:
        starting = [each.info.name for each in seen if each.state == "Up"]
        draining = [each.info.name for each in seen if each.state == "Draining"]
        what = f"zone {zone}: {sum(queued.values())} queued, {running} running, no worker is up"
        what += f". {', '.join(draining)} ends its jobs and takes no new ones" if draining else ""
        # A worker that starts needs two seconds until it receives messages.
        wait = f"{', '.join(starting)} runs, but receives no messages yet. If this stays so, check its log"
        what += f". {wait if starting else start}"
        yield Finding("workers", not (is_ours and (queued or running)), what, warning=True)
    else:
        active, capacity = sum(each.active for each in up), sum(each.capacity for each in up)
        yield Finding("workers", True, f"zone {zone}: {len(up)} up, {active} of {capacity} places in use")
        for lane in sorted(set(queued) - {each for info in up for each in info.lanes}):
            what = f"zone {zone}: {queued[lane]} queued in lane {lane}, which no worker takes. Add it to worker.lanes"
            yield Finding("workers", not is_ours, what, warning=True)
    if down := [each for each in seen if each.state == "Down"]:
        names = ", ".join(f"{each.info.name} since {_moment(each.seen)}" for each in down)
        what = f"zone {zone}: killed or cut off: {names}. Check their hosts and logs"
        yield Finding("workers", True, what, warning=True)
    for each in lanes:
        if each.oldest_s > _MAX_WAIT_S:
            what = f"zone {zone}: a job of lane {each.lane} waits for {human_duration(each.oldest_s)}. See `ssvm scale`"
            yield Finding("jobs", True, what, warning=True)


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _store(settings: Settings, name: str) -> str | Finding:
    with assembly.store_to_examine(settings, name) as store:
        next(iter(store.list("template/tmpl/0")), None)
        usage = store.usage()
    if store.url.startswith("s3://"):
        return f"{store.url}: {_s3(store).examine()}"
    if usage.free is None:
        return store.url
    detail = f"{store.url}, {human_size(usage.free)} free"
    if usage.total and usage.free / usage.total < _FULL_SHARE:
        remedy = "Delete artifacts (`ssvm list`, `ssvm delete`), or enlarge the store"
        detail = f"{detail}, less than {_FULL_SHARE:.0%}. {remedy}"
        return Finding(f"store {name}", True, detail, warning=True)
    return detail


def _s3(store: Store) -> S3Store:
    from ssvm_worker.stores.s3.store import S3Store  # imports the SDK, so only for an S3 store

    assert isinstance(store, S3Store)
    return store


def _uploads(settings: Settings, name: str) -> Finding:
    """Check whether the bucket itself aborts abandoned uploads. This is a hint, because clean-up does so too."""

    def examination() -> str:
        rule = _s3(assembly.open_store_named(settings, name)).abandoned_uploads_rule()
        if rule is None:
            return "`ssvm cleanup` aborts them; the server has no lifecycle rules"
        if rule:
            return f"`ssvm cleanup` aborts them; to make the bucket abort them too: {rule}"
        return "a lifecycle rule of the bucket aborts them, and so does `ssvm cleanup`"

    found = _check(f"store {name}: abandoned uploads", examination)
    unseen = f"`ssvm cleanup` aborts them; not checked whether the bucket does so too: {found.detail}"
    return found if found.ok else replace(found, ok=True, warning=True, detail=unseen)


def _vcenter(settings: Settings, name: str) -> str:
    with ConfiguredConnections(settings).vcenter(name, lambda: None) as session:
        return str(session.about)
