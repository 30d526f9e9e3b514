"""Compressed files from elsewhere: nothing is written to disk, and what they unpack to is bounded."""

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 1 << 30
"""What all of a file may unpack to."""

DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError)


class _Bounded:
    """The unpacked bytes of a gzip file, of which there may be at most `left`."""

    def __init__(self, packed: gzip.GzipFile, left: int) -> None:
        self._packed, self._left = packed, left

    def read(self, size: int = -1) -> bytes:
        content = self._packed.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise OSError("it unpacks to more than it should")
        return content


def read_gzip(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return what a .gz file holds.

    Raises:
        OSError, EOFError, zlib.error: A damaged file, or one that holds more than max_bytes.
    """
    with gzip.open(path) as packed:
        return _Bounded(packed, max_bytes).read()


def members(archive: Path, wanted: re.Pattern[str], max_bytes: int) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the regular files of a .tar.gz archive whose whole path matches, in archive order.

    Links, devices and files elsewhere are passed over.

    Raises:
        ValueError: A damaged archive, a wanted file over max_bytes, or more than MAX_BYTES in all.
    """
    try:
        with (
            gzip.open(archive) as packed,
            tarfile.open(fileobj=_Bounded(packed, MAX_BYTES), mode="r|") as tar,  # type: ignore[call-overload]
        ):
            for member in tar:
                path = wanted.fullmatch(member.name)
                if path is None or not member.isreg():
                    continue
                if member.size > max_bytes:
                    raise ValueError(
                        f"{archive.name}: {member.name} has {member.size} bytes, over {max_bytes}"
                    )
                file = tar.extractfile(member)
                assert file is not None
                yield path, file.read()
    except DAMAGE as error:
        raise ValueError(f"{archive.name}: not a complete .tar.gz archive ({error})") from error
