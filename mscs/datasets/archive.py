"""Unpack zip and tar archives that may be broken or hostile.

Only plain files are written, only below the target folder, each once, and no more bytes than plausible. The
standard library writes them; what it would silently repair, skip or read into memory is refused here.
"""

import bz2
import errno
import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mscs.errors import MscsError
from mscs.results import inside

MAX_FILES = 1_000_000
MAX_RATIO, SLACK = 200, 64 << 20  # unpacked bytes per byte of the archive, and in any case
MAX_READ = 1 << 20  # tarfile reads contents in smaller pieces, but a header of any size at once
MIN_FREE_AFTER = 64 << 20  # bytes that a download or an archive must leave free
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}

# Python has filters from 3.11.4 on; before, attributes stay unset, and the checks here are all there is.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {"set_attrs": False}

Member = tuple[str, int, bool, Callable[[], Any]]
"""Name, size, whether it is a plain file, and what writes it."""


class BrokenArchive(MscsError):
    """The archive is at fault: broken, hostile, or not what it should be."""


def require_space(folder: Path, needed: int) -> None:
    """Raise MscsError unless `needed` bytes and a margin are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + MIN_FREE_AFTER:
        raise MscsError(
            f"{folder}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Free some space or choose another folder with --root or MSCS_DATA"
        )


def extract(archive: Path, folder: Path, *, progress: bool = True) -> None:
    """Unpack `archive` into the new folder `folder`; of one that fails nothing is left.

    Raises:
        BrokenArchive: it cannot be read; a member lies outside the folder, comes twice, is a link or a
            device; too many files or bytes.
        MscsError: no space, or another fault of the disk.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    require_space(folder, archive.stat().st_size)
    try:
        _write_members(archive, folder, progress)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, MscsError):
            raise BrokenArchive(f"{archive}: refused, {error}") from error
        if isinstance(error, OSError) and error.errno:
            raise MscsError(f"{folder}: cannot write ({error.strerror})") from error
        if isinstance(error, Exception):  # as many kinds as there are formats
            raise BrokenArchive(f"{archive}: broken archive ({error!r}). Fetch it again") from error
        raise


def _write_members(archive: Path, folder: Path, progress: bool) -> None:
    left = SLACK + MAX_RATIO * archive.stat().st_size
    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    seen: set[Path] = set()
    quiet = None if progress else True  # None: no bar where the output is no terminal
    for name, size, plain, write in tqdm(
        members(archive, folder, left), f"unpacking {archive}", disable=quiet
    ):
        path, left = inside(folder, name), left - size
        if not plain:
            raise MscsError(f"{name!r} is a link or a device")
        if path in seen:
            raise MscsError(f"{name!r} is in it twice")
        seen.add(path)
        if len(seen) > MAX_FILES or left < 0:
            raise MscsError(f"more than {MAX_FILES} files or more bytes than are plausible (a bomb?)")
        write()


def _zip_members(archive: Path, folder: Path, allowed: int) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        total = sum(info.file_size for info in file.infolist())
        if total <= allowed and shutil.disk_usage(folder).free < total + MIN_FREE_AFTER:
            raise OSError(errno.ENOSPC, f"{total} bytes do not fit")
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if not info.is_dir():
                plain = kind in (0, stat.S_IFREG)
                yield info.filename, info.file_size, plain, partial(file.extract, info, folder)


def _tar_members(archive: Path, folder: Path, allowed: int) -> Iterator[Member]:
    with archive.open("rb") as start:
        opener = DECOMPRESSORS.get(start.read(2), open)
    with opener(archive, "rb") as content:
        stream: Any = _BoundedReader(content, allowed)
        with tarfile.open(fileobj=stream, mode="r:") as file:
            while (info := file.next()) is not None:
                file.members.clear()  # type: ignore[attr-defined]  # it keeps all that it has seen
                if not info.isdir():
                    write = partial(file.extract, info, folder, **SAFELY)
                    yield info.name, info.size, info.isreg(), write
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
