"""Settings of Sphinx for ``make docs``."""

import re
from typing import Any

project = "ssvm-worker"
extensions = ["myst_parser"]
root_doc = "README"
html_theme = "furo"
html_title = "The secondary storage worker"
myst_heading_anchors = 4
exclude_patterns = ["examples/**/node_modules"]


def setup(app: Any) -> None:
    """Connect the event that adds the navigation."""
    app.connect("source-read", _add_navigation)


def _add_navigation(_app: Any, page: str, source: list[str]) -> None:
    """Add the pages that the index links as a hidden table of contents. GitHub would show such a table as code."""
    if page == root_doc:
        linked = dict.fromkeys(re.findall(r"\]\(([\w/-]+)\.md\)", source[0]))
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", "", *linked, "```", ""])
