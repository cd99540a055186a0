"""Unpack zip and tar archives that may be broken or hostile.

The standard library reads them; only plain files are written, only below the target folder, each once, and no
more bytes than plausible.
"""

import errno
import gzip
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mscs.errors import MscsError
from mscs.results import inside

MAX_FILES = 1_000_000
MAX_RATIO, SLACK = 200, 64 << 20  # unpacked bytes per byte of the archive, and in any case
MAX_READ = 1 << 20  # tarfile reads contents in smaller pieces, but a header of any size at once
MIN_FREE_AFTER = 64 << 20  # bytes that a download or an archive must leave free
GZIP = b"\x1f\x8b"  # its first bytes

Member = tuple[str, int, Any]
"""Name, size, and the open file; None for what is no plain file."""


class BrokenArchive(MscsError):
    """The archive is at fault: broken, hostile, or not what it should be."""


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError unless `needed` bytes and a margin are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + MIN_FREE_AFTER:
        raise OSError(
            errno.ENOSPC,
            f"it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Free some space or choose another folder with --root or MSCS_DATA",
            str(folder),
        )


def extract(archive: Path, folder: Path) -> None:
    """Unpack `archive` into the new folder `folder`; of one that fails nothing is left.

    Raises:
        BrokenArchive: it cannot be read; a member lies outside the folder, comes twice, is a link or a
            device; too many files or bytes.
        MscsError: no space, or another fault of the disk.
    """
    folder.mkdir(parents=True)
    try:
        _write_members(archive, folder)
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, FileExistsError):
            error = MscsError(f"{error.filename!r} is in it twice")
        if isinstance(error, MscsError):
            raise BrokenArchive(f"{archive}: refused, {error}") from error
        if isinstance(error, OSError) and error.errno:
            raise MscsError(f"{folder}: cannot write ({error.strerror})") from error
        if isinstance(error, Exception):  # as many kinds as there are formats
            raise BrokenArchive(f"{archive}: broken archive ({error!r}). Fetch it again") from error
        raise


def _write_members(archive: Path, folder: Path) -> None:
    left = SLACK + MAX_RATIO * archive.stat().st_size
    members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive, left)
    for number, (name, size, content) in enumerate(tqdm(members, f"unpacking {archive}", disable=None)):
        path, left = inside(folder, name), left - size
        if content is None:
            raise MscsError(f"{name!r} is a link or a device")
        if number == MAX_FILES or left < 0:
            raise MscsError(f"more than {MAX_FILES} files or more bytes than are plausible (a bomb?)")
        require_space(folder, size)
        path.parent.mkdir(parents=True, exist_ok=True)
        with content, path.open("xb") as file:  # x: refuses a name that comes twice
            shutil.copyfileobj(content, file)


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if not info.is_dir():
                plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
                yield info.filename, info.file_size, file.open(info) if plain else None


def _tar_members(archive: Path, allowed: int) -> Iterator[Member]:
    with archive.open("rb") as start:
        opener: Any = gzip.open if start.read(2) == GZIP else open
    with opener(archive, "rb") as content:
        stream: Any = _BoundedReader(content, allowed)
        with tarfile.open(fileobj=stream, mode="r:") as file:
            while (info := file.next()) is not None:
                file.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
                if not info.isdir():
                    yield info.name, info.size, file.extractfile(info) if info.isreg() else None
        while chunk := stream.read(MAX_READ):  # the checksum of a compressed tar is at its very end
            if chunk.strip(b"\0"):
                raise ValueError("unreadable members")


class _BoundedReader:
    """At most `allowed` bytes of a file, in pieces of at most MAX_READ."""

    def __init__(self, file: Any, allowed: int) -> None:
        self.file, self.left, self.seek, self.tell = file, allowed, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_READ:
            raise MscsError(f"a header of {size} bytes")
        data: bytes = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise MscsError("more bytes than are plausible (a bomb?)")
        return data
