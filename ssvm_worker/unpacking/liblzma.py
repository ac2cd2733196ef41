"""liblzma's decoder: that of the extra ``xz``, which is never older than 5.8, else the one that Python was built with.

Before 5.6 it took 1.6 times as long for the same stream, and the distributions of 2023 and 2024 still have 5.4. Both
raise ``lzma.LZMAError``.
"""

from __future__ import annotations

try:
    from lzma_mt import LZMADecompressor
except ImportError:
    from lzma import LZMADecompressor  # type: ignore[assignment]  # the same methods

__all__ = ["LZMADecompressor"]
