"""The command line: the output of each command for people and for programs, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssvm_worker.cli import main
from ssvm_worker.cli.output import table_lines
from ssvm_worker.jobs import JOBS
from tests import images
from tests.servers.broker import Broker
from tests.servers.http import HttpServer
from tests.waiting import PATIENCE_S

Run = Callable[..., tuple[int, Any]]
HERE = ("--account", "2", "--id", "7")


@pytest.fixture
def ssvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with ``--json``, and return its exit status and its parsed output."""
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("SSVM_STORES__PRIMARY__URL", f"file://{tmp_path}/store")
    monkeypatch.setenv("SSVM_DOWNLOAD__ALLOW_NETWORKS", "127.0.0.0/8")

    def run(*argv: str) -> tuple[int, Any]:
        status = main([*argv, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def template(ssvm: Run, http_server: HttpServer) -> str:
    """Return the key of a stored template."""
    status, result = ssvm("run", "download", "--url", http_server.serve("image", images.qcow2()), *HERE)
    assert status == 0
    return str(result["key"])


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, broker: Broker) -> None:
    """Return settings with a real broker and a key prefix of this test."""
    monkeypatch.setenv("SSVM_BROKER__URL", broker.url)
    monkeypatch.setenv("SSVM_BROKER__PREFIX", broker.prefix)


def test_list_stat_verify_delete(ssvm: Run, template: str) -> None:
    """A stored artifact is listed, described, verified and deleted, by its path or by its names."""
    place = template.rpartition("/")[0]

    assert [row["artifact"] for row in ssvm("list")[1]] == [place]
    assert ssvm("stat", place)[1]["objects"][0]["key"] == template
    assert ssvm("stat", "--kind", "template", *HERE)[1]["objects"][0]["key"] == template
    assert ssvm("stat", template)[1]["objects"][0]["key"] == template
    assert ssvm("verify", place)[1]["objects"] == 2
    assert ssvm("delete", *HERE)[0] == 0
    assert ssvm("list")[1] == []


def test_what_is_not_there(ssvm: Run) -> None:
    """stat and verify of a missing artifact fail, but delete succeeds."""
    assert ssvm("stat", *HERE)[0] == 1
    assert ssvm("verify", *HERE)[1]["error"] == "ObjectNotFound"
    assert ssvm("delete", *HERE)[0] == 0


def test_verify_says_damage(ssvm: Run, template: str, tmp_path: Path) -> None:
    """A damaged object is a permanent failure that names it."""
    with (tmp_path / "store" / template).open("ab") as file:
        file.write(b"!")

    status, error = ssvm("verify", *HERE)

    assert (status, error["error"]) == (1, "CorruptImage")
    assert template in error["message"]


def test_stores(ssvm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stores shows usage and health, and an absent store makes the exit status 75."""
    assert ssvm("stores")[1][0]["state"] == "up"
    monkeypatch.setenv("SSVM_STORES__OTHER__URL", f"file://{tmp_path}/nowhere")

    status, rows = ssvm("stores")

    assert status == 75
    assert {row["name"]: row["state"] for row in rows} == {"primary": "up", "other": "down"}


def test_unreadable_store_is_not_empty(ssvm: Run, tmp_path: Path) -> None:
    """An absent store is an error of list, never an empty list."""
    (tmp_path / "store").rmdir()

    status, error = ssvm("list")

    assert (status, error["error"]) == (75, "StoreUnavailable")


@pytest.mark.parametrize("job", JOBS)
def test_schema(ssvm: Run, job: str) -> None:
    """Each job's request has a JSON Schema in which each field is described or self-explanatory."""
    schema = ssvm("schema", job)[1]

    assert schema["type"] == "object"
    assert {"job_id", "callback_url"} <= schema["properties"].keys()
    assert schema == ssvm("schema")[1][f"ssvm.{job}"]


def test_config_is_redacted(ssvm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """config shows the effective settings without secrets."""
    monkeypatch.setenv("SSVM_CALLBACK__SECRET", "s3cret")

    shown = ssvm("config")[1]

    assert shown["callback"]["secret"] == "***"
    assert shown["stores"]["primary"]["url"].startswith("file://")


def test_submit_jobs_job_cancel_retry(ssvm: Run, ledger: None) -> None:
    """A job without a worker is queued, listed, shown, cancelled and queued again."""
    status, record = ssvm("submit", "delete", *HERE, "--job-id", "a-1")
    assert (status, record["state"]) == (0, "queued")

    assert [row["job_id"] for row in ssvm("jobs")[1]] == ["a-1"]
    assert ssvm("job", "a-1")[1]["job"] == "delete"
    assert ssvm("cancel", "a-1")[1]["state"] == "cancelled"
    assert ssvm("jobs", "--state", "queued")[1] == []
    assert ssvm("cancel", "a-1")[0] == 1
    assert ssvm("retry", "a-1")[1]["state"] == "queued"


def test_submit_again(ssvm: Run, ledger: None) -> None:
    """The same job id with the same request is the same job; with another request it is refused."""
    ssvm("submit", "delete", *HERE, "--job-id", "a-1")

    assert ssvm("submit", "delete", *HERE, "--job-id", "a-1")[0] == 0
    assert ssvm("submit", "delete", "--account", "2", "--id", "8", "--job-id", "a-1")[1]["error"] == "InvalidRequest"
    assert len(ssvm("jobs")[1]) == 1


def test_unknown_job_id(ssvm: Run, ledger: None) -> None:
    """The error of an unknown job id says that the ledger does not have it."""
    status, error = ssvm("job", "nobody")

    assert (status, error["error"]) == (1, "ObjectNotFound")


def test_broker_down(ssvm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its broker, submit fails with a temporary error that names the broker without its password."""
    monkeypatch.setenv("SSVM_BROKER__URL", "redis://:s3cret@127.0.0.1:1/0")

    status, error = ssvm("submit", "delete", *HERE)

    assert (status, error["error"]) == (75, "StoreUnavailable")
    assert "127.0.0.1:1" in error["message"]
    assert "s3cret" not in error["message"]


def test_doctor(ssvm: Run, ledger: None) -> None:
    """doctor names everything that it checked, and each problem."""
    rows = {row["check"]: row["state"] for row in ssvm("doctor")[1]}

    assert rows["broker"] == rows["store primary"] == "ok"
    assert rows["settings"] == "warning"  # the environment alone sets them


def test_doctor_warns(ssvm: Run, ledger: None, broker: Broker) -> None:
    """A broker that may evict jobs is a warning, not a failure."""
    with broker.client() as client:
        before = client.config_get("maxmemory-policy")["maxmemory-policy"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        status, rows = ssvm("doctor")
        client.config_set("maxmemory-policy", before)

    assert (status, {row["check"]: row["state"] for row in rows}["broker durability"]) == (0, "warning")


def test_doctor_without_settings(ssvm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """doctor checks everything it can, and an absent broker is one finding among others."""
    monkeypatch.setenv("SSVM_BROKER__URL", "redis://127.0.0.1:1/0")

    status, rows = ssvm("doctor")

    assert status == 1
    assert {row["check"]: row["ok"] for row in rows}["broker"] is False


def test_tables_for_people(ssvm: Run, template: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json the output is a table with readable sizes."""
    main(["list"])

    shown = capsys.readouterr().out
    assert "artifact" in shown
    assert template.rpartition("/")[0] in shown


def test_table_in_a_narrow_terminal() -> None:
    """The last column is wrapped beside the others, or gets separate lines where it would be too narrow."""
    cells, widths = {"check": "store primary", "detail": "a b " * 12}, {"check": 13, "detail": 48}

    assert list(table_lines(cells, widths, None)) == ["store primary  " + ("a b " * 12).strip()]
    beside = list(table_lines(cells, widths, 50))
    assert [each[:15] for each in beside] == ["store primary  ", " " * 15]
    assert max(map(len, beside)) <= 50
    assert next(table_lines(cells, widths, 40)) == "store primary"


def test_sound_for_people(ssvm: Run, template: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An intact artifact ends in a line that begins with ok."""
    main(["verify", *HERE])

    assert capsys.readouterr().out.startswith("ok: 2 objects, ")


def test_errors_for_people(ssvm: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json an error is one line on standard error that names its class."""
    status = main(["stat", *HERE])

    shown = capsys.readouterr()
    assert status == 1
    assert shown.out == ""
    assert shown.err.startswith("ssvm: ObjectNotFound: There is no complete template there")


@pytest.mark.parametrize("argv", [["frobnicate"], ["run"], ["run", "frobnicate"], ["job"], ["jobs", "--state", "x"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage ends with status 2 and names the command's help on standard error."""
    assert main(argv) == 2
    assert "--help`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["jbos"], "unknown 'jbos', did you mean jobs? See `ssvm --help`"),
        (["jobs", "--stat", "failed"], "unknown argument '--stat', did you mean --state? See `ssvm jobs --help`"),
        (["submit", "downlaod"], "did you mean download? See `ssvm submit --help`"),
        (["submit", "download", "--acount", "2"], "did you mean --account? See `ssvm submit download --help`"),
        (["list", "--store", "primry"], "did you mean primary?"),
        (["config", "chekc"], "did you mean check?"),
        (["run", "backup", *HERE, "--volume", "web", "--vm", "vm-1", "--vcenter", "vc2"], "'vc2', did you mean vc1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_did_you_mean(ssvm: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str) -> None:
    """A misspelled command, option, job, store or vCenter is an error that suggests the right word, also as JSON."""
    monkeypatch.setenv("SSVM_VCENTERS__VC1__HOST", "127.0.0.1")
    monkeypatch.setenv("SSVM_VCENTERS__VC1__USERNAME", "u")
    monkeypatch.setenv("SSVM_VCENTERS__VC1__PASSWORD", "p")
    status, error = ssvm(*argv)

    assert (status, error["error"]) == (2, "InvalidRequest")
    assert said in error["message"]


def test_options_on_both_sides(ssvm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The common options work before and after the command."""
    (tmp_path / "a.toml").write_text('zone = "zone-a"\n')
    file = str(tmp_path / "a.toml")

    shown = []
    for argv in (["--config", file, "--json", "config"], ["config", "--config", file, "--json"]):
        main(argv)
        shown.append(json.loads(capsys.readouterr().out)["zone"])

    assert shown == ["zone-a", "zone-a"]


def test_help_for_beginners(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command, the program lists its commands."""
    assert main([]) == 2
    assert "submit" in capsys.readouterr().err


def test_request_from_a_file_and_options(ssvm: Run, http_server: HttpServer, tmp_path: Path) -> None:
    """--request gives the whole request, and options override its fields."""
    file = tmp_path / "request.json"
    url = http_server.serve("image", images.qcow2())
    file.write_text(json.dumps({"url": url, "account": 2, "id": "8", "stores": ["nowhere"]}))

    status, result = ssvm("run", "download", "--request", str(file), "--stores", "primary", "--id", "9")

    assert (status, result["key"]) == (0, "template/tmpl/2/9/9.qcow2")


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_request_that_is_no_object(ssvm: Run, tmp_path: Path, content: str) -> None:
    """The error of a request file without a JSON object names the file."""
    file = tmp_path / "request.json"
    file.write_text(content)

    status, error = ssvm("run", "download", "--request", str(file))

    assert (status, error["error"]) == (2, "InvalidRequest")
    assert str(file) in error["message"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["run", "download"], "account: missing; id: missing; url: missing"),
        (["submit", "download", "--url", "http://x/y"], "account: missing; id: missing"),
        (["run", "upload", "--url", "http://x/y"], "give key, or kind, account and id"),
        (["run", "delete", "--request", "/nowhere"], "Cannot read the request file"),
        (["delete"], "Missing argument: PLACE"),
        (["verify", "--all", *HERE], "choose from many artifacts"),
        (["link"], "Missing argument: KEY"),
        (["doctor", "--vm", "web"], "Missing argument: --vcenter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fields_missing(ssvm: Run, ledger: None, argv: list[str], said: str) -> None:
    """Missing fields are wrong usage, and the error names them."""
    status, error = ssvm(*argv)
    assert (status, error["error"]) == (2, "InvalidRequest")
    assert said in error["what"]


DOWNLOAD = ["run", "download", "--url", "http://x/y", *HERE]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*DOWNLOAD, "--format", "rwa"], "format: Unknown image format"),
        ([*DOWNLOAD, "--kind", "tmpl"], "kind: must be one of template, iso, volume, did you mean template?"),
        ([*DOWNLOAD, "--account", "a b"], "account: The account has characters"),
        ([*DOWNLOAD, "--max-rate", "10X"], "max_rate: must be a number of bytes"),
        ([*DOWNLOAD, "--stores", "nope"], "There is no image store named 'nope'"),
        ([*DOWNLOAD, "--credentials", "nope"], "There are no credentials named 'nope'"),
        (["submit", "download", "--url", "http://[x", *HERE], "url: The URL's host or port is malformed"),
        (["submit", "download", "--url", "http://x/y", *HERE, "--zone", "a b"], "Invalid name of a zone"),
        (["submit", "upload", "--url", "ftp://x/y", "--key", "template/tmpl/2/1/x"], "url: URLs of scheme 'ftp'"),
        (["submit", "upload", "--url", "s3://x/y", "--key", "elsewhere/x"], "key: Invalid prefix of an artifact"),
        (["link", "template/tmpl/2/1/1.raw", "--for", "2y"], "--for must be a number with"),
        (["link", "template/tmpl/2/1/1.raw", "--for", "2w"], "between 1 second and 7 days"),
        (["link", "template/tmpl/2/1/1.raw", "--store", "nope"], "There is no image store named 'nope'"),
        (["list", "--store", "nope"], "There is no image store named 'nope'"),
        (["list", "--store", "no\x1bpe"], "There is no image store named"),
        (["stat", "elsewhere/x"], "Invalid prefix of an artifact"),
        (["stat", "--kind", "tmpl", "--account", "2", "--id", "1"], "Unknown kind of artifact"),
        (["delete", "--account", "a b", "--id", "1"], "account: The account has characters"),
        (["verify", "--sample", "many"], "sample: must be a number"),
        (["verify", "--all", "--rate", "fast"], "rate: must be a number of bytes"),
        (["cleanup", "--older-than", "5"], "older_than: must be a number with"),
        (["schema", "downlaod"], "There is no job named 'downlaod', did you mean download"),
        (["doctor", "--vcenter", "nope"], "There is no vCenter named 'nope'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values(ssvm: Run, ledger: None, argv: list[str], said: str) -> None:
    """A wrong value is wrong usage, and no job is created."""
    status, error = ssvm(*argv)
    assert (status, error["error"]) == (2, "InvalidRequest")
    assert said in error["what"]
    assert ssvm("jobs") == (0, [])


def test_unknown_field(ssvm: Run, tmp_path: Path) -> None:
    """Unknown fields and invalid values are wrong usage."""
    for given, expected in (({"chekcsum": "md5:1"}, 2), ({"checksum": "crc32:1"}, 2)):
        (tmp_path / "r.json").write_text(json.dumps({"url": "http://x/y", "account": "2", "id": "8"} | given))
        assert ssvm("run", "download", "--request", str(tmp_path / "r.json"))[0] == expected


def test_starts_without_the_sdks() -> None:
    """Each SDK is imported at first use, so no command waits for an unused SDK."""
    heavy = ("boto3", "botocore", "celery", "oslo_utils", "paramiko", "pyVmomi", "redis", "requests", "urllib3")
    code = f"import sys, ssvm_worker.cli; print([each for each in {heavy} if each in sys.modules])"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "[]"


def test_two_runs_at_once(ssvm: Run, http_server: HttpServer) -> None:
    """A second foreground job with the same target must wait, and the first job continues."""
    url = http_server.serve("image", images.mbr(1 << 20), stall_after=1000)
    first = subprocess.Popen(
        [sys.executable, "-m", "ssvm_worker", "run", "download", "--url", url, *HERE], stderr=subprocess.DEVNULL
    )
    assert http_server.stalled.wait(PATIENCE_S)

    status, error = ssvm("run", "download", "--url", url, *HERE)
    first.terminate()

    assert (status, error["error"]) == (75, "ResourceBusy")
    assert first.wait(PATIENCE_S) == 130
