"""Makes text from outside safe to print: a terminal or a log must not take it for commands or for lines of our own."""

from __future__ import annotations

import re

#: C0, DEL and C1 control characters; marks and overrides of the writing direction (Unicode TR 9, 2.1 to 2.6);
#: line and paragraph separators; lone surrogates, which have no UTF-8 form.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""Replace each such character by its JSON escape, ``\u001b``; those in *keep* stay. JSON text stays valid."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)
