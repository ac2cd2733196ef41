"""Parse and format sizes, rates and durations, and make foreign text printable."""

from __future__ import annotations

import re

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB
#: The forms that ``parse_size``, ``parse_rate`` and ``parse_duration`` accept, as patterns of JSON Schema.
SIZE = r"^\s*[0-9]{1,20}(?:\.[0-9]{1,20})?\s*(?:[kKmMgGtTpP](?:[iI]?[bB])?|[bB])?\s*$"
RATE = SIZE.removesuffix(r"\s*$") + r"(?:/s)?\s*$"
DURATION = r"^\s*(?:[0-9]{1,9}(?:\.[0-9]{1,9})?\s*[smhdw]|0)\s*$"


def human_size(size: float) -> str:
    """Return bytes with a binary unit and at most three digits: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5:  # a number that rounds to four digits gets the next unit
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if abs(size) < 999.5 else f"{size:.0f} TiB"


def parse_size(text: str) -> int:
    """Return the bytes of ``4096``, ``50MiB``, ``500 GB`` or ``2T``. K and KiB are 1024, kB is 1000.

    Raises ValueError for any other text.
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([KMGTP])(i?B)?|B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError("must be a number of bytes, or a number with a unit, such as 50MiB or 2TB")
    unit, rest = (match[2] or "").upper(), (match[3] or "").upper()
    scale = (1000 if rest == "B" else 1024) ** " KMGTP".index(unit or " ")
    size = int(match[1]) * scale if match[1].isdecimal() else int(float(match[1]) * scale)
    if size >= 1 << 63:
        raise ValueError("must be less than 8 EiB")
    return size


def parse_rate(text: str) -> int:
    """Return the bytes a second of ``50MiB/s``, ``50MiB`` or a number. Raise ValueError for other texts and for 0."""
    rate = parse_size(text.strip().removesuffix("/s"))
    if not rate:
        raise ValueError("must be more than 0 bytes a second")
    return rate


def parse_duration(text: str) -> float:
    """Return the seconds of ``90s``, ``15m``, ``24h``, ``7d`` or ``2w``.

    Raises ValueError for other texts, and for a number without a unit, except for 0.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smhdw])|0", text.strip())
    if not match:
        raise ValueError("must be a number with s, m, h, d or w, such as 24h")
    scales = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    return float(match[1]) * scales[match[2]] if match[1] else 0.0


def human_duration(seconds: float) -> str:
    """Return seconds in readable units: ``850 ms``, ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


#: - C0, DEL and C1 control characters
#: - marks and overrides of the writing direction (Unicode TR 9, sections 2.1 to 2.6)
#: - line and paragraph separators
#: - lone surrogates, which have no UTF-8 form
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""Replace each unsafe character by its JSON escape, such as ``\u001b``, unless *keep* contains it.

    JSON text stays valid.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04x}", text)
