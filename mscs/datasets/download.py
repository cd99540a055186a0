"""Download one file: resumed, retried, checked, atomic. Standard library and a progress bar only.

While a download runs its bytes are in `<file>.part`; the file itself appears only when it is whole and
checked. Where a publisher gives no checksum, the SHA-256 of the first download is written to `checksums.json`
beside the file, and later downloads of the same address must match it.
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mscs.errors import MscsError
from mscs.results import write_json

CHUNK = 1 << 20
TIMEOUT_S = 60
MIN_FREE_AFTER = 64 << 20  # bytes that a download must leave free
RECORD = "checksums.json"


@dataclass(frozen=True)
class Retry:
    """How often a dropped connection or a busy server is tried again, and the first pause in seconds."""

    tries: int = 6
    pause: float = 1.0

    def wait(self, failures: int) -> None:
        """Sleep: twice as long after every further failure."""
        time.sleep(self.pause * 2 ** (failures - 1))


class _Interrupted(Exception):
    """The connection ended early or the server was busy: worth another try."""


def download(
    url: str,
    path: Path,
    *,
    checksum: str | None = None,
    retry: Retry | None = None,
    progress: bool = True,
) -> str:
    """Bring `url` to `path` and return its SHA-256. A `.part` file of an earlier attempt is continued.

    Args:
        url: http or https address.
        path: the file to write; its folder is made.
        checksum: published sum, e.g. "sha1:bf99..."; None means: as recorded at the first download.
        retry: number of tries and first pause; doubles after every failure without progress.
        progress: show a bar on stderr.

    Raises:
        MscsError: access refused, not found, no space, wrong checksum, or still failing after the last try.
    """
    retry = retry or Retry()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, progress)
            break
        except _Interrupted as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= retry.tries:
                raise MscsError(
                    f"{url}: {error}; gave up after {failures} tries. "
                    f"Run the same command again: it goes on from {part}"
                ) from error
            retry.wait(failures)
    sha256 = _check(url, part, checksum)
    os.replace(part, path)
    _tag_of(part).unlink(missing_ok=True)
    return sha256


def require_space(folder: Path, needed: int) -> None:
    """Raise MscsError unless `needed` bytes and a margin are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed + MIN_FREE_AFTER:
        raise MscsError(
            f"{folder}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. "
            "Free some space or choose another folder with --root or MSCS_DATA"
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write into an MscsError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise MscsError(f"{path}: cannot write ({error.strerror})") from error
        raise


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag_of(part: Path) -> Path:
    """Return the file that remembers which version of the remote file `part` belongs to."""
    return part.with_name(part.name + ".tag")


def _receive(url: str, part: Path, progress: bool) -> None:
    """Append the rest of the remote file to `part`, or start over where the server cannot continue."""
    tag_file = _tag_of(part)
    have = _size(part) if tag_file.exists() else 0
    headers = {"User-Agent": "mscs", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        _refused(url, error, part)
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"no answer ({getattr(error, 'reason', error)})") from error
    with response:
        if not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
            have = 0  # the server sends the whole file
        length = int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
        require_space(part.parent, length or 0)
        tag = response.headers["ETag"] or response.headers["Last-Modified"]
        with disk_errors(part):
            if tag and not tag.startswith("W/"):
                tag_file.write_text(tag)
            else:
                tag_file.unlink(missing_ok=True)
            _copy(response, part, have, length, progress)


def _copy(response: Any, part: Path, have: int, length: int | None, progress: bool) -> None:
    received = 0
    bar = tqdm(
        total=None if length is None else have + length,
        initial=have,
        unit="B",
        unit_scale=True,
        desc=part.stem,
        disable=not progress,
    )
    with part.open("r+b" if have else "wb") as file, bar:
        file.seek(have)
        while True:
            try:
                chunk = response.read(CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(f"connection lost after {have + received} bytes") from error
            if not chunk:
                break
            file.write(chunk)
            received += len(chunk)
            bar.update(len(chunk))
    if length is not None and received < length:
        raise _Interrupted(f"connection closed after {have + received} of {have + length} bytes")


def _refused(url: str, error: urllib.error.HTTPError, part: Path) -> None:
    """Raise what an HTTP error means."""
    status = error.code
    if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        part.unlink(missing_ok=True)
        raise _Interrupted("the partial file did not fit the remote one; starting over") from error
    if status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
        raise MscsError(
            f"{url}: access refused (HTTP {status}). Download it in a browser and use --from PATH"
        ) from error
    if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
        raise MscsError(
            f"{url}: not there any more (HTTP {status}). Get the archive elsewhere and use --from PATH"
        ) from error
    if status >= http.HTTPStatus.INTERNAL_SERVER_ERROR or status == http.HTTPStatus.TOO_MANY_REQUESTS:
        raise _Interrupted(f"server busy (HTTP {status})") from error
    raise MscsError(f"{url}: HTTP {status} {error.reason}") from error


def _check(url: str, part: Path, checksum: str | None) -> str:
    """Compare with the published sum, else with the recorded one, else record; return the SHA-256."""
    sha256 = file_digest(part)
    record = part.parent / RECORD
    known = json.loads(record.read_text()) if record.exists() else {}
    if checksum is None:
        expected = known.get(url, {}).get("sha256", sha256)
        found, source = (
            sha256,
            f"recorded in {record} at the first download; remove that entry to accept the new file",
        )
    else:
        algorithm, expected = checksum.split(":")
        found, source = file_digest(part, algorithm), "published"
    if found != expected:
        part.unlink()
        raise MscsError(f"{url}: wrong checksum {found}, expected {expected} ({source})")
    write_json(record, known | {url: {"size": part.stat().st_size, "sha256": sha256}})
    return sha256
