"""Two states of this project side by side: commits, as files in a folder, and where two results differ."""

import io
import operator
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mscs.errors import MscsError, UsageError


def git(*arguments: str) -> bytes:
    """Return what git prints; MscsError with its message where it fails."""
    done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    if done.returncode:
        raise MscsError(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def find_commit(name: str) -> str:
    """Return the commit of a revision or of a DVC experiment, which is a git reference of its own."""
    try:
        git("rev-parse", "--git-dir")
    except MscsError:
        raise UsageError(f"{Path.cwd()} is in no git repository, which holds the revisions") from None
    with suppress(MscsError):
        return git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}").decode().strip()
    found = git("for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").decode().split()
    if not found:
        raise UsageError(
            f"unknown revision {name!r}; accepted: a commit, branch, tag or DVC experiment (see `git log`, "
            "`dvc exp show`)"
        )
    return found[0]


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Give the files of a commit in a temporary folder (a git worktree would outlive a killed process)."""
    with tempfile.TemporaryDirectory(prefix="mscs-revision-") as folder:
        zipfile.ZipFile(io.BytesIO(git("archive", "--format=zip", commit))).extractall(folder)
        yield Path(folder)


def differences(
    first: Any, second: Any, prefix: str = "", same: Callable[[Any, Any], bool] = operator.eq
) -> dict[str, list[Any]]:
    """Return {dotted key: [first, second]} of the leaves in which two mappings differ; None is absent."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return {} if same(first, second) else {prefix: [first, second]}
    found: dict[str, list[Any]] = {}
    for key in {**first, **second}:
        place = f"{prefix}.{key}" if prefix else str(key)
        found |= differences(first.get(key), second.get(key), place, same)
    return found
