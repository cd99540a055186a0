"""Unpack zip and tar archives that may be broken or hostile.

Only plain files are written, only below the target folder, each once, and no more bytes than plausible. The
standard library writes them; what it would silently repair or skip is refused here.
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
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from mscs.errors import MscsError
from mscs.results import inside

MIN_FREE_AFTER = 64 << 20  # bytes that a download or an archive must leave free
LONGEST_READ = 1 << 20  # tarfile reads contents in smaller pieces, but a header of any size at once
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZ": bz2.open,
    b"\xfd7": lzma.open,
}


class BrokenArchive(MscsError):
    """The archive is at fault: broken, hostile, or not what it should be."""


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to before it counts as a bomb."""

    num_files: int = 1_000_000
    ratio: int = 200
    """Unpacked bytes per byte of the archive."""
    slack: int = 64 << 20
    """Unpacked bytes that are allowed in any case."""


class _Member(NamedTuple):
    name: str
    size: int
    is_folder: bool
    is_file: bool
    write: Callable[[], Any]


class _TarStream:
    """The uncompressed bytes of a tar file, at most `allowed` of them and in bounded pieces."""

    def __init__(self, path: Path, allowed: int) -> None:
        with path.open("rb") as file:
            opener = DECOMPRESSORS.get(file.read(2), open)
        self.file, self.left = opener(path, "rb"), allowed
        self.seek, self.tell, self.close = self.file.seek, self.file.tell, self.file.close

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_READ:
            raise MscsError(f"a header of {size} bytes")
        data: bytes = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise MscsError("it unpacks to more bytes than are plausible (a bomb?)")
        return data


def is_archive(path: Path) -> bool:
    """Tell whether `path` is a zip or tar file."""
    if not path.is_file():
        return False
    try:
        with closing(_TarStream(path, tarfile.BLOCKSIZE)) as stream:
            tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except Exception:  # as many kinds as there are compressions
        return zipfile.is_zipfile(path)
    return True


def require_space(folder: Path, needed: int) -> None:
    """Raise MscsError unless `needed` bytes and a margin are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + MIN_FREE_AFTER:
        raise MscsError(
            f"{folder}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Free some space or choose another folder with --root or MSCS_DATA"
        )


def extract(archive: Path, folder: Path, *, limits: Limits | None = None, progress: bool = True) -> None:
    """Unpack `archive` into the new folder `folder`.

    Raises:
        BrokenArchive: it cannot be read; a member lies outside the folder, comes twice, is a link or a
            device; too many files or bytes. Nothing is left behind.
        MscsError: no space, or another fault of the disk. Nothing is left behind.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    require_space(folder, archive.stat().st_size)
    try:
        _write_members(archive, folder, limits or Limits(), progress)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, MscsError):
            raise BrokenArchive(f"{archive}: refused, {error}") from error
        if isinstance(error, OSError) and error.errno:
            raise MscsError(f"{folder}: cannot write ({error.strerror})") from error
        if isinstance(error, Exception):  # as many kinds as there are formats
            raise BrokenArchive(
                f"{archive}: broken archive ({error!r}). Remove it and fetch again"
            ) from error
        raise


def _write_members(archive: Path, folder: Path, limits: Limits, progress: bool) -> None:
    left = limits.slack + limits.ratio * archive.stat().st_size
    members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    seen: set[PurePosixPath] = set()
    quiet = None if progress else True  # None: no bar where the output is no terminal
    for member in tqdm(
        members(archive, folder, left), f"unpacking {archive.name}", unit="file", disable=quiet
    ):
        path, left = PurePosixPath(member.name), left - member.size
        if member.is_folder and not path.parts:
            continue  # "./"
        inside(folder, member.name)
        if member.is_folder:
            continue
        if not member.is_file:
            raise MscsError(f"{member.name!r} is a link or a device")
        if path in seen:
            raise MscsError(f"{member.name!r} is in it twice")
        seen.add(path)
        if len(seen) > limits.num_files:
            raise MscsError(f"more than {limits.num_files} files")
        if left < 0:
            raise MscsError("it unpacks to more bytes than are plausible (a bomb?)")
        member.write()


def _zip_members(archive: Path, folder: Path, allowed: int) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        total = sum(info.file_size for info in file.infolist())
        if total > allowed:
            raise MscsError(f"it announces {total} bytes, {allowed} are plausible (a bomb?)")
        if shutil.disk_usage(folder).free < total + MIN_FREE_AFTER:
            raise OSError(errno.ENOSPC, f"{total} bytes do not fit on the disk")
        for info in file.infolist():
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            write = partial(file.extract, info, folder)
            yield _Member(info.filename, info.file_size, info.is_dir(), plain, write)


def _tar_members(archive: Path, folder: Path, allowed: int) -> Iterator[_Member]:
    with closing(_TarStream(archive, allowed)) as stream:
        with tarfile.open(fileobj=stream, mode="r:") as file:  # type: ignore[call-overload]
            while (info := file.next()) is not None:
                file.members.clear()  # tarfile keeps every member that it has seen
                write = partial(file.extract, info, folder, filter="data")
                yield _Member(info.name, info.size, info.isdir(), info.isreg(), write)
        while chunk := stream.read(LONGEST_READ):  # the checksum of a compressed tar is at its very end
            if chunk.strip(b"\0"):
                raise ValueError("unreadable members")
