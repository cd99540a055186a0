"""Unpack zip and tar archives that may be broken or hostile.

Only plain files and folders are written, only below the target folder, and no more bytes than plausible. An
archive is unpacked beside its destination and moved there when complete, so that a half-unpacked dataset is
never taken for a whole one.
"""

import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from mscs.datasets.download import disk_errors, require_space
from mscs.errors import MscsError

CHUNK = 1 << 20
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    RuntimeError,  # encrypted zip
    NotImplementedError,  # unknown compression
)


@dataclass(frozen=True)
class Limits:
    """What an archive may unpack to before it counts as a bomb."""

    num_files: int = 1_000_000
    ratio: int = 200
    """Unpacked bytes per byte of the archive."""
    slack: int = 64 << 20
    """Unpacked bytes that are allowed in any case."""

    def max_bytes(self, archive: Path) -> int:
        """Return how many bytes `archive` may unpack to."""
        return self.slack + self.ratio * archive.stat().st_size


@dataclass(frozen=True)
class Member:
    """One plain file in an archive."""

    name: str
    size: int
    file: IO[bytes]


def is_archive(path: Path) -> bool:
    """Tell whether `path` is a zip or tar file."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def extract(archive: Path, folder: Path, *, limits: Limits | None = None, progress: bool = True) -> None:
    """Unpack `archive` into the new folder `folder`.

    Raises:
        MscsError: broken archive; a member outside the folder, a link or a device; too many files or bytes;
            no space. Nothing is left behind.
    """
    limits = limits or Limits()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with disk_errors(folder):
            _write_members(archive, folder, limits, progress)
    except BROKEN as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise MscsError(f"{archive}: broken archive ({error}). Remove it and fetch again") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_members(archive: Path, folder: Path, limits: Limits, progress: bool) -> None:
    allowed = limits.max_bytes(archive)
    require_space(folder, archive.stat().st_size)
    is_zip = zipfile.is_zipfile(archive)
    members = _zip_members(archive, folder, allowed) if is_zip else _tar_members(archive)
    members = tqdm(members, desc=f"unpacking {archive.name}", unit="file", disable=None if progress else True)
    written = 0
    for count, member in enumerate(members):
        if count >= limits.num_files:
            raise MscsError(f"{archive}: refused, more than {limits.num_files} files")
        target = folder / _safe_name(archive, member.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with target.open("wb") as out:
            while chunk := member.file.read(CHUNK):
                size += len(chunk)
                if written + size > allowed:
                    raise MscsError(f"{archive}: refused, unpacks to more than {allowed} bytes (a bomb?)")
                out.write(chunk)
        if size != member.size:
            raise MscsError(f"{archive}: broken archive, {member.name} has {size} of {member.size} bytes")
        written += size


def _zip_members(archive: Path, folder: Path, allowed: int) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        total = sum(info.file_size for info in infos)
        if total > allowed:
            raise MscsError(f"{archive}: refused, announces {total} bytes, {allowed} are plausible (a bomb?)")
        require_space(folder, total)
        for info in infos:
            mode = stat.S_IFMT(info.external_attr >> 16)
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise MscsError(f"{archive}: refused, {info.filename} is a link or a device")
            if info.is_dir():
                _safe_name(archive, info.filename)
                continue
            with file.open(info) as content:
                yield Member(info.filename, info.file_size, content)


def _tar_members(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive) as file:
        for info in file:
            if info.isdir():
                _safe_name(archive, info.name, allow_top=True)
                continue
            content = file.extractfile(info) if info.isreg() else None
            if content is None:
                raise MscsError(f"{archive}: refused, {info.name} is a link or a device")
            yield Member(info.name, info.size, content)
        while file.fileobj and file.fileobj.read(CHUNK):
            pass  # the checksum of a compressed tar is at its very end


def _safe_name(archive: Path, name: str, allow_top: bool = False) -> PurePosixPath:
    """Return the relative path of a member, or raise if it could leave the folder."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and (path.parts or allow_top)
    if not inside or "\\" in name or ":" in name or "\0" in name:
        raise MscsError(f"{archive}: refused, {name!r} points outside the folder")
    return path


def move_into(source: Path, target: Path) -> None:
    """Move a finished file or folder to `target`, replacing what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        old = source.with_name(source.name + ".replaced")
        os.replace(target, old)
        os.replace(source, target)
        shutil.rmtree(old)
        return
    os.replace(source, target)
