"""The documentation is checked like code: generated pages, links, and the code blocks of every page."""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from docs.generate import FOLDER, pages
from ssvm_worker import config
from ssvm_worker.cli import make_parser
from ssvm_worker.cli.request_options import read_request
from ssvm_worker.jobs import JOBS
from ssvm_worker.jobs.download import job as download
from ssvm_worker.jobs.request import parse_request
from ssvm_worker.stores.file.part_file import FileSink
from ssvm_worker.stores.file.store import FileStore
from tests import images
from tests.attempts import SETTINGS, attempt
from tests.neighbours import ROOT
from tests.servers.http import HttpServer

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
#: A fenced block: its indentation, language and text. An indented block has no language.
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.S | re.M)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n)+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
Block = tuple[str, str, str]


def _blocks() -> Iterator[Block]:
    """Yield place, language and text of each code block."""
    for page in PAGES:
        text = page.read_text()
        for found in FENCED.finditer(text):
            yield _place(page, text, found.start()), found[2], re.sub(f"(?m)^{found[1]}", "", found[3])
        rest = FENCED.sub(lambda found: re.sub(r"[^\n]", "", found[0]), text)
        for found in INDENTED.finditer(rest):
            if found[1].strip():
                yield _place(page, rest, found.start()), "", re.sub("(?m)^    ", "", found[1]).strip("\n")


def _place(page: Path, text: str, offset: int) -> str:
    return f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, offset) + 1}"


def _of(language: str) -> list[Block]:
    found = [each for each in _blocks() if each[1] == language]
    assert found or language == "yaml"
    return found


def test_generated_pages() -> None:
    """The pages of names are what ``python -m docs.generate`` writes."""
    old = [name for name, text in pages().items() if (FOLDER / name).read_text() != text]
    assert not old, "run `python -m docs.generate`"


def test_each_setting_has_a_meaning() -> None:
    """The generated pages explain each field of a job, a result, a setting, a command and a metric."""
    empty = [line for text in pages().values() for line in text.splitlines() if line.endswith("| |")]
    assert empty == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


def test_links() -> None:
    """Each link to a file or to a heading of a page has a target, and none is a directory."""
    broken = []
    for page in PAGES:
        for target in LINK.findall(FENCED.sub("", page.read_text())):
            name, _, anchor = target.partition("#")
            if "://" in target:
                continue
            path = (page.parent / name).resolve() if name else page
            found = path.is_file() if page.is_relative_to(ROOT / "docs") else path.exists()
            if not found or (anchor and path.suffix == ".md" and anchor not in _anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_toml_blocks() -> None:
    """Each TOML block is a part of a valid settings file."""
    for place, _, text in _of("toml"):
        # Files of secrets do not exist here.
        _load(place, re.sub(r'"/etc/ssvm/[^"]*"', '"/dev/null"', text))


def _load(place: str, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        try:
            config.load(file.name, {})
        except Exception as error:  # the message must name the block
            pytest.fail(f"{place}: {error}", pytrace=False)


def test_json_blocks() -> None:
    """Each JSON block is valid, and the requests among them are valid requests."""
    for place, _, text in _of("json"):
        value: Any = json.loads(text.replace("…", "..."))
        if isinstance(value, dict) and (name := value.get("headers", {}).get("task", "").removeprefix("ssvm.")):
            body = json.loads(base64.b64decode(value["body"]))
            parse_request(JOBS[name].Request, body[0][0], place)


def test_python_blocks() -> None:
    """Each Python block compiles."""
    for place, _, text in _of("python"):
        ast.parse(text, place)


def test_yaml_blocks() -> None:
    """Each YAML block can be read."""
    for _, _, text in _of("yaml"):
        list(yaml.safe_load_all(text))


def _commands(text: str) -> Iterator[str]:
    """Yield each command line of a shell block that starts our program."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^\s*(\$ )?(\w+=\S* )*(\.venv/bin/)?", "", line)
        if re.match(r"ssvm [a-z-]", line) and "…" not in line:
            line = re.split(r" (?:&&|\||&|>|>>)(?: |$)|;", line)[0]
            yield line


def test_command_lines() -> None:
    """Our parser accepts each ``ssvm`` command line in a code block, with valid values for the fields of a job."""
    parser, checked = make_parser(), 0
    for place, language, text in _blocks():
        for line in _commands(text) if language in ("", "sh", "shell", "bash") else ():
            words = shlex.split(line, comments=True)[1:]
            if any(word in ("JOB", "COMMAND", "[JOB]") for word in words[:2]):
                continue  # a synopsis, not a command
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    args = parser.parse_args(words)
                job = getattr(args, "job", None)
                if words[0] in ("run", "submit") and not isinstance(job, str):
                    parse_request(job.Request, read_request(args, job.Request), job.name)
            except (SystemExit, Exception) as error:  # the message must name the line
                pytest.fail(f"{place}: {line}: {said.getvalue() or error}", pytrace=False)
            checked += 1
    assert checked > 20


def test_named_files() -> None:
    """Every file that the architecture page names exists, and contains the name in brackets behind it."""
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    below = (ROOT, ROOT / "ssvm_worker", ROOT / "ssvm_worker/jobs/download")
    wrong = []
    for name, _, inside in re.findall(r"`([\w/.]+\.(?:py|lua))`( \(`(\w+)`\))?", page):
        found = [folder / name for folder in below if (folder / name).is_file()]
        if not found or (inside and not re.search(rf"\b{inside}\b", found[0].read_text())):
            wrong.append(f"{name} {inside}")
    assert not wrong


#: The functions that move a byte on, or make it permanent: read the socket, hash, write, rename.
MOVES = {("read", "_SSLSocket"), ("update", "HASH")} | {(name, "module") for name in ("write", "rename")}


def test_path_of_a_download(https_server: HttpServer, tmp_path: Path) -> None:
    """The architecture page names the files that an https download passes from socket to manifest, at most twelve."""
    passed = _files_passed(https_server, tmp_path)
    page = (ROOT / "docs/explanation/architecture.md").read_text()
    section = page.partition("## One https download, from the socket to the manifest")[2].partition("\n`tests/")[0]
    named = set(re.findall(r"`((?:ssvm_worker|tasks)/[\w/]+\.py)`", section))

    assert named == passed
    assert len(passed) <= 12


def _files_passed(server: HttpServer, folder: Path) -> set[str]:
    """Download an image, and return our files below each call that moves a byte or creates a sink.

    A file counts if one of its functions calls such a function, directly or through others. So files that only look up
    a value, and files that create objects before the first byte, do not count.
    """
    image = images.mbr(3 << 20)
    fields = {"url": server.serve("image", image), "account": 2, "id": "7"}
    fields["checksum"] = f"sha256:{hashlib.sha256(image).hexdigest()}"
    settings = {"download": SETTINGS["download"] | {"ca_file": server.ca_file(folder)}}
    (folder / "store").mkdir()
    passed: set[str] = set()

    def observe(frame: FrameType, event: str, called: Any) -> None:
        moves = event == "c_call" and (called.__name__, type(called.__self__).__name__) in MOVES
        if moves or (event == "call" and frame.f_code is FileSink.__init__.__code__):
            caller: FrameType | None = frame
            while caller:
                passed.add(os.path.relpath(caller.f_code.co_filename, ROOT))
                caller = caller.f_back

    request = parse_request(download.Request, fields, "download")
    job = attempt(FileStore("primary", folder / "store"), settings=settings)
    threading.setprofile(observe)
    sys.setprofile(observe)
    try:
        download.run(request, job)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {each for each in passed if each.startswith(("ssvm_worker/", "tasks/"))}
