"""Locks on files, and the file systems that have none.

`flock` holds a file for one process. Some network file systems refuse it, some grant it twice, and some are
mounted so that it holds on one machine only; a training that trusted such a lock could be written by two.
"""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mscs.errors import MscsError, UsageError

REMEDY = (
    "mount it with locks (Lustre: flock; NFS: without nolock and local_lock), or link this folder to a disk "
    "that has them"
)
LOCAL = ("localflock", "nolock", "local_lock=all", "local_lock=flock")
"""Options of a mount whose locks other machines do not see."""


@contextmanager
def locked(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold a file, made if missing, or a folder that is there.

    Args:
        path: what is held.
        waiting: what is printed when another process holds it, before this one waits for its turn.

    Raises:
        BlockingIOError: another process holds it, and `waiting` is None.
        UsageError: the file system has no locks that work.
    """
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                raise
            print(waiting, file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UsageError(f"{path}: this file system has no locks ({error.strerror}); {REMEDY}") from None
        if not _is_held(path):
            raise UsageError(f"{path}: this file system gives one lock to two; {REMEDY}")
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise MscsError(f"cannot open {path}: {error.strerror}; check the folder's rights") from None


def _is_held(path: Path) -> bool:
    """Return whether a second opening of a locked file is refused the lock."""
    second = _open(path)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(second)
    return False


def check_shared(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> None:
    """Raise UsageError if the locks in `folder` hold on this machine only, as its mount's options say."""
    place, found = folder.resolve(), ("", "")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        _, point, _, options, *_ = line.split()
        point = point.encode().decode("unicode_escape")
        if place.is_relative_to(point) and len(point) >= len(found[0]):
            found = point, options
    for option in LOCAL:
        if option in found[1].split(","):
            raise UsageError(f"{folder} is on {found[0]}, mounted with {option}: {REMEDY}")
