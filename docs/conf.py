"""Settings of Sphinx for ``make docs``."""

project = "ssvm-worker"
extensions = ["myst_parser"]
root_doc = "README"
html_theme = "furo"
html_title = "The secondary storage worker"
myst_heading_anchors = 4
exclude_patterns = ["examples/**/node_modules"]
