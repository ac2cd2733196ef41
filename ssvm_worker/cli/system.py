"""The worker itself and what surrounds it: worker, demo, doctor, schema, config."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ssvm_worker import config
from ssvm_worker.config import kernel_cmdline
from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import ConfigError, InvalidRequest, misused
from ssvm_worker.jobs import JOBS, find_job
from ssvm_worker.operations import doctor
from ssvm_worker.operations.mounts import nfs_mounts

from .output import Bar, Output


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """``ssvm demo | worker | doctor | schema | config``."""
    demo = commands.add_parser(
        "demo", help="everything embedded on this machine; real jobs end to end", parents=[common]
    )
    demo.add_argument("--url", help="download this in place of the image that the demo makes")
    demo.add_argument("--keep", action="store_true", help="leave it running, with Flower, until Ctrl-C")
    demo.set_defaults(command=_demo)
    worker = commands.add_parser("worker", help="run a worker until SIGTERM", parents=[common])
    worker.add_argument("--zone", help="in place of the settings' zone")
    worker.add_argument("--lanes", metavar="A,B", help=f"of {', '.join(LANES)}; all when absent")
    worker.add_argument("--concurrency", type=int, metavar="N", help="jobs at once")
    worker.add_argument(
        "--from-cmdline",
        nargs="?",
        const=kernel_cmdline.KERNEL,
        metavar="FILE",
        help=f"read zone, broker and concurrency as CloudStack gives them to a system VM ({kernel_cmdline.KERNEL}); "
        "SSVM_… variables take precedence",
    )
    worker.set_defaults(command=_worker)
    check = commands.add_parser("doctor", help="every dependency: reachable or not, and why", parents=[common])
    check.add_argument(
        "--vcenter", metavar="NAME", help="look at this vCenter alone, as a backup does before it begins"
    )
    check.add_argument("--vm", metavar="VM", help="and at this VM: id, instance UUID or inventory path")
    check.set_defaults(command=_doctor)
    schema = commands.add_parser("schema", help="the JSON Schema of requests", parents=[common])
    schema.add_argument("job", nargs="?", metavar="JOB", help="one job's; an object of all of them when absent")
    schema.set_defaults(command=_schema)
    settings = commands.add_parser("config", help="the settings in force, secrets as ***", parents=[common])
    settings.set_defaults(command=_config)


def _demo(args: argparse.Namespace, output: Output) -> int:
    # Its servers are imported only when they are wanted: a worker has no use for them.
    from ssvm_worker.demo.run import run_demo

    bars: dict[str, Bar] = {}

    def show(label: str, record: dict[str, Any]) -> None:
        if label not in bars:
            _close(bars)
            bars[label] = Bar(label, disable=output.as_json)
        bars[label].show(record)

    def say(text: str) -> None:
        _close(bars)
        print(text, file=sys.stderr if output.as_json else sys.stdout, flush=True)

    values = run_demo(url=args.url, keep=args.keep, say=say, show=show)
    output.result(values, "")
    return 0


def _close(bars: dict[str, Bar]) -> None:
    for bar in bars.values():
        bar.close()


def _worker(args: argparse.Namespace, output: Output) -> int:  # noqa: ARG001 - every command has both
    # The ledger comes with it, and with that redis, which every other command would wait for.
    from ssvm_worker.ledger.embedded import require_server
    from ssvm_worker.runner.worker_command import worker_command

    if args.config:
        os.environ["SSVM_CONFIG"] = os.path.abspath(args.config)
    if args.from_cmdline:
        os.environ.update(kernel_cmdline.environment_of(args.from_cmdline) | os.environ)
    overrides = {"zone": args.zone, "worker__lanes": args.lanes, "worker__concurrency": args.concurrency}
    for name, value in overrides.items():
        if value is not None:
            os.environ[f"SSVM_{name.upper()}"] = str(value)
    settings = config.load()
    if settings.broker.embedded:
        require_server()
    nfs_mounts(settings)  # a wrong URL ends the command here, not the worker later
    argv, environ = worker_command(settings)
    sys.stdout.flush()
    os.execvpe(argv[0], argv, {**os.environ, **environ})


def _doctor(args: argparse.Namespace, output: Output) -> int:
    if args.vm and not args.vcenter:
        raise misused(InvalidRequest("Which vCenter is the VM on?", "--vm", "Give --vcenter NAME too"))
    try:
        settings = config.load(args.config)
        findings = (
            doctor.examine_vcenter(settings, args.vcenter, args.vm) if args.vcenter else _examine_all(settings, args)
        )
    except ConfigError as error:
        findings = [doctor.Finding("settings", False, str(error))]
    rows = [finding.as_dict() for finding in findings]
    output.table(rows, ("check", "state", "detail"), "nothing to check")
    return 0 if all(finding.ok for finding in findings) else 1


def _examine_all(settings: Settings, args: argparse.Namespace) -> list[doctor.Finding]:
    found = doctor.examine(settings, args.config or os.environ.get("SSVM_CONFIG", ""))
    if settings.broker.messages:
        found += doctor.examine_messages(settings)
    return found


def _schema(args: argparse.Namespace, output: Output) -> int:
    if args.job:
        schema = find_job(args.job).Request.model_json_schema()
    else:
        schema = {f"ssvm.{job.name}": job.Request.model_json_schema() for job in JOBS.values()}
    output.result(schema, json.dumps(schema, indent=2))
    return 0


def _config(args: argparse.Namespace, output: Output) -> int:
    values = config.redacted(config.load(args.config))
    output.result(values, json.dumps(values, indent=2))
    return 0
