"""Check that prose is plain English: ``python -m tests.project.prose [--count] [PATH…]``.

It reads comments of every language, docstrings, help texts, error messages, alerts, and Markdown without code blocks.
In tests, strings other than docstrings are data, so it does not read them. It reports sentences of more than 20 words,
and words that the style guide forbids, as ``file:line: rule``.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The longest sentence, in words.
MOST_WORDS = 20
#: Archaic or poetic words, and words that do not name the actor. Each is a regular expression.
_WORDS = """
    whoever  whatever  whichever  whence  anew  mends?  mended  hears?  heard  lies  stands  tells?  somebody  nobody
    thereof  thereby  therein  wherein  whereby  hence  thence  thus  lest  albeit  yonder  shall  ought  upon  till
    amid  seldom  whilst  hitherto  naught  sound
"""
_PHRASES = (
    *("of ours", "of theirs", "of its own", "by itself", "in vain", "for ever", "the dead", "the living"),
    *("(?:is|are|was|were|be) told", "go(?:es)? on", "went on", "lay in", "stands? in", "looks? whether"),
    *("comes? to be", "sooner or later", r"(?:is|are) no \w+ (?:of|that)", "nothing of (?:it|them|both)"),
    *("but for", "in place of", "only then"),
)
#: How a sentence must not begin: the subject comes first.
_BEGINNINGS = ("Within,", "Of ", "Nor ")
FORBIDDEN = re.compile(rf"\b(?:{'|'.join([*_WORDS.split(), *_PHRASES])})\b", re.IGNORECASE)
INVERTED = re.compile(rf"\W*(?:{'|'.join(_BEGINNINGS)})")
#: Where prose is checked.
PLACES = (
    *("ssvm_worker", "tasks", "tests", "benchmarks", "chaos", "fuzz", "docs", "config", "client", ".ci", ".github"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "Dockerfile", "docker-compose.yml"),
    *("pyproject.toml", ".pre-commit-config.yaml"),
)
#: What begins a comment, by the suffix of the file. Files without a suffix are scripts, the Makefile and the like.
_MARKS = dict.fromkeys((".go", ".c", ".js", ".mjs", ".css"), "//") | {".lua": "--"}
_MARKS |= dict.fromkeys(("", ".sh", ".toml", ".yaml", ".yml", ".conf", ".service", ".timer", ".slice"), "#")
#: The fields of an alert, a panel or a form that people read.
_FIELDS = re.compile(r"^.*?\b(?:summary|description)\"?: *(?P<text>\S.*)$", re.M)
_BLOCK_COMMENT = re.compile(r"/\*(?P<text>.*?)\*/", re.S)
#: A comment for a program.
_DIRECTIVE = re.compile(r"shellcheck |syntax=|nosec|SPDX|yaml-language-server|-----|hadolint ")
#: A code span, a URL or a bracketed target counts as one word.
_CODE = re.compile(r"``.+?``|`[^`\n]+`|\]\([^)]*\)|https?://\S+|\*[\w, ]+\*")
_WORD = re.compile(r"[A-Za-z0-9][\w'’./:=-]*")
_END = re.compile(r"(?<=[.!?])[)\"'”]?\s+|(?<=[:;])\s+|\n\s*\n|\n\s*(?:[-*·]|\d+\.)\s|\s\|\s|\s·\s")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|cf|No|approx|etc)\.", re.IGNORECASE)


def check(path: Path) -> Iterator[str]:
    """Yield each breach in a file."""
    for line, text in _prose(path):
        for offset, sentence in _sentences(text):
            at = f"{path.relative_to(ROOT)}:{line + text.count(chr(10), 0, offset)}"
            plain, shown = _CODE.sub("code", sentence), " ".join(sentence.split())[:90]
            if (words := len(_WORD.findall(plain))) > MOST_WORDS:
                yield f"{at}: {words} words: {shown}"
            if begins := INVERTED.match(plain):
                yield f"{at}: begins with {begins[0].strip()!r}: {shown}"
            yield from (f"{at}: {found[0]!r}: {shown}" for found in FORBIDDEN.finditer(plain))


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    if path.suffix == ".md":
        return _markdown(text)
    if path.suffix == ".py":
        return _python(text, strings=not path.is_relative_to(ROOT / "tests"))
    return _comments(text, _MARKS[path.suffix])


def _comments(text: str, mark: str) -> Iterator[tuple[int, str]]:
    """Yield comments, consecutive ones as one text, and the fields that people read."""
    block: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        found = re.search(rf"(?:^|\s){mark}\s(.*)", line)
        prose = found[1] if found and not _DIRECTIVE.match(found[1]) else ""
        behind_code = bool(found and line[: found.start()].strip())
        if block and (not prose or behind_code):
            yield number - len(block), "\n".join(block)
            block = []
        if prose.startswith("  "):
            block.append("\n")  # a command or an example
        elif prose and behind_code:
            yield number, prose
        elif prose:
            block.append(prose)
    for each in [*(_BLOCK_COMMENT.finditer(text) if mark == "//" else ()), *_FIELDS.finditer(text)]:
        yield text.count("\n", 0, each.start()) + 1, each["text"]


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    text = _ABBREVIATION.sub(lambda found: found[0].replace(".", "·"), text)
    start = 0
    for end in [*_END.finditer(text), None]:
        sentence = text[start : end.start() if end else len(text)]
        if sentence.strip():
            yield start + len(sentence) - len(sentence.lstrip()), sentence
        start = end.end() if end else start


def _python(source: str, strings: bool) -> Iterator[tuple[int, str]]:
    """Yield comments, consecutive ones as one text, docstrings, and with *strings* text that people read."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(("#!", "# noqa", "# type:", "# fmt")):
            continue
        line, text = token.start[0], token.string.lstrip("#: ")
        if block and (line != last + 1 or source.splitlines()[line - 1].strip() != token.string.strip()):
            yield first, "\n".join(block)
            block = []
        if not block:
            first = line
        block.append(text.partition("noqa:")[0].partition("type: ignore")[0])
        last = line
    if block:
        yield first, "\n".join(block)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            # Its lines are indented like the code. Without this they would look like the lines of a table.
            constant = node.body[0].value  # type: ignore[attr-defined]
            constant.value, constant.kind = inspect.cleandoc(constant.value), "docstring"
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if node.kind == "docstring" or (strings and re.search(r"[a-z] [a-z]+ [a-z]", node.value)):
            yield node.lineno, re.sub(r"\n {8,}\S.*|\n    {1,4}[$\w].{0,24}  +.*", "\n\n", node.value)


def _markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield the text with code blocks, tables' rules and headings blanked, so that lines stay."""
    text = re.sub(r"^```.*?^```", lambda found: "\n" * (found[0].count("\n") + 1), text, flags=re.S | re.M)
    text = re.sub(r"^(?: {4,}|\t).*$|^\|?[-:| ]+\|?$|^#+ .*$|<!--.*?-->", "", text, flags=re.M)
    yield 1, re.sub(r"^\||\|$", "\n\n", text, flags=re.M)


def files(paths: list[str]) -> Iterator[Path]:
    """Yield the files to check below *paths*, or below PLACES."""
    for place in paths or PLACES:
        path = (ROOT / place).resolve()
        if path.is_file():
            yield path
        else:
            yield from sorted(each for each in path.rglob("*") if each.is_file() and _is_prose(each))


def _is_prose(path: Path) -> bool:
    """Return whether people write that file. Python writes caches, and recorded data keeps its words."""
    is_data = path.is_relative_to(ROOT / "tests/data") and path.suffix != ".md"
    return path.suffix in {".py", ".md", *_MARKS} and not is_data and "__pycache__" not in path.parts


def main(argv: list[str]) -> int:
    """Print the breaches, or with ``--count`` their number by folder."""
    breaches = [each for path in files([arg for arg in argv if arg != "--count"]) for each in check(path)]
    if "--count" in argv:
        for folder, count in sorted(
            Counter("/".join(each.split("/")[:2]).partition(":")[0] for each in breaches).items()
        ):
            print(f"{count:6} {folder}")
    else:
        print("\n".join(breaches))
    print(f"{len(breaches)} breaches", file=sys.stderr)
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
