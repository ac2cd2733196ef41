"""``ssvm demo | worker | doctor | schema``: the worker and checks of its dependencies."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from ssvm_worker import config
from ssvm_worker.config import kernel_cmdline
from ssvm_worker.config.schema import LANES, Settings
from ssvm_worker.errors import ConfigError, InvalidRequest, extra_missing, misused
from ssvm_worker.jobs import JOBS, find_job
from ssvm_worker.operations import doctor
from ssvm_worker.operations.finding import Finding
from ssvm_worker.operations.mounts import nfs_mounts

from .agent import add_sources, agent_settings
from .output import Output
from .progress import Bar
from .trial import add_trial_options, run_trial

if TYPE_CHECKING:
    from ssvm_worker.vmware.placement import VmTarget


_TRIAL = "doctor --vcenter vc1 --vm vm-42 --trial report.json --dry-run"
#: The options of `ssvm doctor --restore` that name the place of a new VM, as the fields of `restore` do.
_PLACES = ("pool", "folder", "datastore", "host")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``ssvm demo | worker | doctor | schema``."""
    demo = commands.add_parser(
        "demo",
        help="run real jobs on this machine, with an embedded broker, store and vCenter",
        examples=("demo", "demo --keep", "demo --url https://example.org/a.qcow2"),
        parents=[common],
    )
    demo.add_argument(
        "--cloudstack",
        action="store_true",
        help="let a simulated CloudStack management server register, link and delete a template instead",
    )
    demo.add_argument("--url", help="download this URL instead of the image that the demo creates")
    demo.add_argument("--keep", action="store_true", help="keep the demo and Flower running until Ctrl-C")
    demo.set_defaults(command=_demo)
    worker = commands.add_parser(
        "worker",
        help="run a worker until SIGTERM",
        examples=("worker", "worker --zone zone2 --lanes download,upload --concurrency 8"),
        parents=[common],
    )
    worker.add_argument("--zone", help="run jobs of this zone (default: the zone of the settings)")
    worker.add_argument("--lanes", metavar="A,B", help=f"run jobs of these lanes: {', '.join(LANES)} (default: all)")
    worker.add_argument("--concurrency", type=int, metavar="N", help="run at most N jobs at the same time")
    worker.add_argument(
        "--from-cmdline",
        nargs="?",
        const=kernel_cmdline.KERNEL,
        metavar="FILE",
        help="read zone, broker and concurrency from FILE, in the form that CloudStack passes to a system VM "
        f"(default: {kernel_cmdline.KERNEL}); SSVM_… variables take precedence",
    )
    worker.set_defaults(command=_worker)
    _add_doctor(commands, common)
    schema = commands.add_parser(
        "schema",
        help="print the JSON Schemas of all documents",
        examples=("schema download", "schema backup --result", "schema record", "schema > schemas.json"),
        parents=[common],
    )
    schema.add_argument(
        "job",
        nargs="?",
        metavar="NAME",
        help="print only this schema: a JOB, record, callback, event or message (default: an object with all schemas)",
    )
    schema.add_argument("--result", action="store_true", help="print the schema of the results of JOB")
    schema.set_defaults(command=_schema)


def _add_doctor(commands: Any, common: argparse.ArgumentParser) -> None:
    check = commands.add_parser(
        "doctor",
        help="check every dependency and explain each failure",
        examples=("doctor", "doctor --vcenter vc1 --vm vm-42", "doctor --cloudstack", _TRIAL),
        parents=[common],
    )
    check.add_argument("--vcenter", metavar="NAME", help="check only this vCenter, as a backup does before it starts")
    check.add_argument("--vm", metavar="VM", help="also check this VM (id, instance UUID or inventory path)")
    check.add_argument(
        "--restore", action="store_true", help="check a restore to this vCenter instead: privileges and ESXi hosts"
    )
    for name in _PLACES:
        check.add_argument(f"--{name}", metavar="NAME", help=f"with --restore: the {name} of the new VM")
    check.add_argument("--network", metavar="NAME", action="append", help="with --restore: a network; repeatable")
    check.add_argument(
        "--cloudstack",
        action="store_true",
        help="check what `ssvm agent` needs: servers, certificate, clock, GUID and image stores",
    )
    add_trial_options(check)
    add_sources(check)
    check.set_defaults(command=_doctor)


def _demo(args: argparse.Namespace, output: Output) -> int:
    # The demo's servers are imported only here, because a worker does not need them.
    from ssvm_worker.demo.run import run_demo

    bars: dict[str, Bar] = {}

    def show(label: str, record: dict[str, Any]) -> None:
        if label not in bars:
            _close(bars)
            bars[label] = Bar(label, disable=output.as_json or output.quiet)
        bars[label].show(record)

    def say(text: str) -> None:
        _close(bars)
        bars.clear()
        print(text, file=sys.stderr if output.as_json else sys.stdout, flush=True)

    if args.cloudstack:
        if args.url or args.keep:
            raise misused(InvalidRequest("--cloudstack excludes --url and --keep", "--cloudstack", "Give only one"))
        try:
            from ssvm_worker.demo.cloudstack.run import run_cloudstack_demo
        except ImportError as error:
            what = f"The demo with a management server needs {error.name}"
            raise extra_missing(what, "--cloudstack", "demo") from error

        values = run_cloudstack_demo(say)
    else:
        interactive = sys.stdin.isatty() and sys.stdout.isatty() and not output.as_json
        values = run_demo(url=args.url, keep=args.keep, interactive=interactive, say=say, show=show)
    output.result(values, "")
    return 0


def _close(bars: dict[str, Bar]) -> None:
    for bar in bars.values():
        bar.close()


def _worker(args: argparse.Namespace, output: Output) -> int:  # noqa: ARG001 - every command has both parameters
    # These modules import redis. Imported here, they do not delay other commands.
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
    nfs_mounts(settings)  # an invalid URL fails here, not later in the worker
    argv, environ = worker_command(settings)
    sys.stdout.flush()
    os.execvpe(argv[0], argv, {**os.environ, **environ})


def _doctor(args: argparse.Namespace, output: Output) -> int:
    if args.vm and not args.vcenter:
        raise misused(InvalidRequest("Missing argument: --vcenter", "--vm", "Give the VM's vCenter: --vcenter NAME"))
    given = [f"--{name}" for name in (*_PLACES, "network") if getattr(args, name)]
    if given and not args.restore:
        raise misused(InvalidRequest("Missing argument: --restore", given[0], "It names the place of a new VM"))
    if args.restore and (args.vm or not args.vcenter):
        raise misused(InvalidRequest("--restore needs --vcenter and excludes --vm", "--restore", "Give --vcenter NAME"))
    if (args.from_cmdline or args.properties) and not args.cloudstack:
        what = "Missing argument: --cloudstack"
        raise misused(InvalidRequest(what, "--from-cmdline", "Only the check of the agent reads these files"))
    try:
        settings = agent_settings(args)
        if args.trial:
            findings = run_trial(args, settings, output)
        elif args.vcenter:
            findings = doctor.examine_vcenter(settings, args.vcenter, args.vm, _target(args) if args.restore else None)
        elif args.cloudstack:
            findings = _examine_agent(settings)
        else:
            findings = doctor.examine(settings, str(config.find_file(args.config) or ""))
            if settings.broker.messages:
                findings += doctor.examine_messages(settings)
    except ConfigError as error:
        each_problem = [f"{each} [{error.where}]" for each in error.problems]
        findings = [Finding("settings", False, detail) for detail in each_problem or [str(error)]]
    rows = [finding.as_dict() for finding in findings]
    output.table(rows, ("check", "state", "detail"), "nothing to check")
    return 0 if all(finding.ok for finding in findings) else 1


def _target(args: argparse.Namespace) -> VmTarget:
    from ssvm_worker.vmware.placement import VmTarget  # imports pyVmomi

    places = {name: getattr(args, name) for name in _PLACES}
    return VmTarget("", networks={name: name for name in args.network or ()}, **places)


def _examine_agent(settings: Settings) -> list[Finding]:
    try:
        from ssvm_worker.cloudstack.examination import examine_agent
    except ImportError as error:
        what = f"`ssvm doctor --cloudstack` needs {error.name}"
        raise extra_missing(what, "--cloudstack", "cloudstack") from error
    return examine_agent(settings)


def _schema(args: argparse.Namespace, output: Output) -> int:
    from ssvm_worker.wiring import json_schemas  # imports all jobs

    if args.job in json_schemas.DOCUMENTS and not args.result:
        schema = json_schemas.DOCUMENTS[args.job]()
    elif args.job:
        job = find_job(args.job)
        schema = json_schemas.result_schema(job.name) if args.result else json_schemas.request_schema(job)
    else:
        schema = {
            f"ssvm.{name.removesuffix('.request')}" if name.partition(".")[0] in JOBS else name: each
            for name, each in json_schemas.schemas().items()
        }
    output.result(schema, json.dumps(schema, indent=2))
    return 0
