"""Check that prose is plain English: ``python -m tests.project.prose [--count] [PATH…]``.

It reads comments and docstrings of Python, help texts and error messages, and Markdown without its code blocks.
It reports sentences of more than 20 words and words that the style guide forbids, as ``file:line: rule``.
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
"""
_PHRASES = (
    *("of ours", "of theirs", "of its own", "by itself", "in vain", "for ever", "the dead", "the living"),
    *("(?:is|are|was|were|be) told", "go(?:es)? on", "went on", "lay in", "stands? in", "looks? whether"),
    *("comes? to be", "sooner or later", r"(?:is|are) no \w+ (?:of|that)"),
)
FORBIDDEN = re.compile(rf"\b(?:{'|'.join([*_WORDS.split(), *_PHRASES])})\b|(?:^|[.:] )Within,", re.IGNORECASE)
#: Where prose is checked.
PLACES = ("ssvm_worker", "tasks", "benchmarks", "chaos", "fuzz", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
#: A code span, a URL or a bracketed target counts as one word.
_CODE = re.compile(r"``.+?``|`[^`\n]+`|\]\([^)]*\)|https?://\S+|\*[\w, ]+\*")
_WORD = re.compile(r"[A-Za-z0-9][\w'’./:=-]*")
_END = re.compile(r"(?<=[.!?])[)\"'”]?\s+(?=[A-Z*`\"“(])|(?<=[:;])\s+|\n\s*\n|\n\s*(?:[-*·]|\d+\.)\s|\s\|\s|\s·\s")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|cf|No|approx|etc)\.", re.IGNORECASE)


def check(path: Path) -> Iterator[str]:
    """Yield each breach in a file."""
    for line, text in (_markdown if path.suffix == ".md" else _python)(path.read_text()):
        for offset, sentence in _sentences(text):
            at = f"{path.relative_to(ROOT)}:{line + text.count(chr(10), 0, offset)}"
            words = len(_WORD.findall(_CODE.sub("code", sentence)))
            if words > MOST_WORDS:
                yield f"{at}: {words} words: {' '.join(sentence.split())[:90]}"
            for found in FORBIDDEN.finditer(_CODE.sub("code", sentence)):
                yield f"{at}: {found[0].strip()!r}: {' '.join(sentence.split())[:90]}"


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    text = _ABBREVIATION.sub(lambda found: found[0].replace(".", "·"), text)
    start = 0
    for end in [*_END.finditer(text), None]:
        sentence = text[start : end.start() if end else len(text)]
        if sentence.strip():
            yield start + len(sentence) - len(sentence.lstrip()), sentence
        start = end.end() if end else start


def _python(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments, one behind the other as one text, docstrings, and text that people read, with their lines."""
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
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            # Its lines are indented like the code. Without this they would look like the lines of a table.
            constant = node.body[0].value  # type: ignore[attr-defined]
            constant.value = inspect.cleandoc(constant.value)
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.search(r"[a-z] [a-z]+ [a-z]", node.value)
        ):
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
            yield from sorted(each for each in path.rglob("*") if each.suffix in (".py", ".md"))


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
