"""One grain: inflated, and the digest by which it is told from every other."""

from __future__ import annotations

import hashlib

from isal import isal_zlib
from isal.igzip_lib import IsalError

from ssvm_worker.errors import CorruptImage

#: Bytes of a digest: BLAKE2b-160. That two of the 1.7e8 grains of 10 TiB collide by chance is 1e-32 probable;
#: on purpose it takes 2^80 tries, and would hurt only the volume of whoever does it, as volumes share nothing.
SIZE = 20


def digest(data: bytes) -> bytes:
    """BLAKE2b: 900 MB/s a core on any machine; SHA-256 is faster where the CPU has SHA-NI, and slower where not."""
    return hashlib.blake2b(data, digest_size=SIZE).digest()


def inflate(data: bytes, most: int, where: str) -> bytes:
    """The bytes of one deflated grain, *most* of them at the most; CorruptImage for anything but one whole zlib stream.

    zlib's own Adler-32 is checked on the way.
    """
    inflater = isal_zlib.decompressobj()
    try:
        grain = inflater.decompress(data, most + 1)
    except IsalError as error:  # type: ignore[misc] # its stub takes the class for an instance
        raise CorruptImage(f"A grain cannot be inflated: {error}", where, REMEDY) from error
    if not inflater.eof or len(grain) > most:
        raise CorruptImage(f"A grain inflates to more than {most} bytes, or does not end", where, REMEDY)
    return grain


REMEDY = "`ssvm verify` tells which backups are hit; take a full backup, or restore from another store"
