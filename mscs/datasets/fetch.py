"""Get a dataset: from its publisher, from an archive, or from a folder that is already there.

What `fetch` leaves in the root folder is the layout that the dataset's module describes. A part appears whole
or not at all, and counts as there when it has as many files as published; so a second run does nothing.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mscs.datasets.archive import BrokenArchive, extract
from mscs.datasets.registry import dataset_spec
from mscs.datasets.spec import GENERATED, Part, Spec
from mscs.errors import MscsError, UsageError
from mscs.locks import locked
from mscs.results import file_sha256, read_mapping, write_json

DOWNLOADS = ".downloads"
STAGING = ".unpacking"
RECORD = "digests.json"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
WRAPPERS = ("", "*/", "*/*/")  # archives and folders may wrap the layout in that many more folders


def fetch(
    name: str | Spec, root: Path, *, given: Path | None = None, needed: Collection[str] = ()
) -> list[str]:
    """Bring a dataset into `root` and return the names of the files and folders that were added.

    A second process that asks for the same root waits for the first.

    Args:
        name: one of `DATASETS`, or the facts of another dataset.
        root: the dataset's root folder.
        given: a folder in the official layout (linked, not copied), an archive, or a folder of archives; None
            means what the environment names for the dataset (as MSCS_FROM_CADIS does), or download.
        needed: splits; where these can be read, each as large as published, nothing is missing.

    Raises:
        UsageError: nothing usable at `given`; the dataset cannot be downloaded without it.
        MscsError: download or archive failed, or has fewer files than published.
    """
    spec = dataset_spec(name)
    name = spec.name
    if (root / GENERATED).exists():
        raise UsageError(f"{root} holds generated scenes. Remove that folder, or choose another with --root")
    if root.is_symlink() and not root.exists():
        raise UsageError(f"{root} is a link to {root.readlink()}, which is not there")
    if not _missing(spec, root) or _readable(spec, root, needed):
        return []
    variable = f"MSCS_FROM_{name.upper()}"
    if given is None and os.environ.get(variable):
        given = Path(os.environ[variable])
    if given is not None and not given.expanduser().exists():
        raise UsageError(f"{name}: {given} (--from or {variable}) does not exist")
    if given is None and not spec.home:
        raise UsageError(f"{name} has no download; name the folder that holds it with --from or {variable}")
    if given is None and not all(part.url or part.package for part in spec.parts):
        raise UsageError(
            f"{name} is given out after registration: get the archive at {spec.home} and run "
            f"`mscs data fetch {name} --from ARCHIVE`, or name it in {variable}"
        )
    added: list[str] = []
    with _alone(root):
        missing = _missing(spec, root)  # another process may have brought them
        if given is not None and missing:
            added = _take_given(spec, root, given.expanduser().resolve())
        for part in missing if given is None else ():
            if part.shortage(root):  # else an earlier archive has brought it
                added += _download_part(spec, root, part)
        for path in _archives(root / DOWNLOADS):
            path.unlink()
    for part in _missing(spec, root):
        raise UsageError(f"{name}: {given or root} has {part.shortage(root)}. {_accepted(spec)}")
    return added


def _missing(spec: Spec, root: Path) -> list[Part]:
    return [part for part in spec.parts if part.shortage(root)]


def _readable(spec: Spec, root: Path, splits: Collection[str]) -> bool:
    """Return whether the splits are there for a reader, whatever else was published with them."""
    try:
        counts = {split: len(spec.open_index(split, root).entries) for split in splits}
    except MscsError:
        return False
    return bool(counts) and all(counts[split] == spec.splits[split] for split in counts)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let one process at a time work in `root`, and leave nothing half-done there."""
    (root / DOWNLOADS).mkdir(parents=True, exist_ok=True)
    with locked(root / DOWNLOADS / "lock", waiting=f"waiting for another fetch into {root}"):
        try:
            for stale in (root / DOWNLOADS).glob("tmp*"):  # of a killed download
                stale.unlink()
            shutil.rmtree(root / STAGING, ignore_errors=True)
            yield
        finally:
            shutil.rmtree(root / STAGING, ignore_errors=True)


def _accepted(spec: Spec) -> str:
    names = ", ".join(part.pattern for part in spec.parts)
    return f"Point --from at the official archive, or at a folder with {names}"


def _archives(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(ARCHIVES))


def _take_given(spec: Spec, root: Path, given: Path) -> list[str]:
    if given.is_dir() and _matches(given, _missing(spec, root)):
        return _install(spec, root, given, link=True)
    archives = _archives(given) if given.is_dir() else [given]
    if not archives:
        raise UsageError(f"{spec.name}: {given} holds no archive ({', '.join(ARCHIVES)}). {_accepted(spec)}")
    return [name for archive in archives for name in _unpack(spec, root, archive)]


def _matches(base: Path, parts: Sequence[Part]) -> list[Path]:
    """Return what fits the parts: `base` itself, or what lies in it or a few folders below."""
    if any(base.match(part.pattern) for part in parts):
        return [base]
    levels = ([list(base.glob(wrapper + part.pattern)) for wrapper in WRAPPERS] for part in parts)
    found = {path for level in levels for path in next(filter(None, level), [])}
    return sorted(found, key=lambda path: (-len(path.parts), path))  # what lies in another match goes first


def _install(spec: Spec, root: Path, source: Path, *, link: bool = False) -> list[str]:
    """Move or link what `source` holds of the missing parts to their places, if it is complete."""
    found, ready = _matches(source, _missing(spec, root)), root / STAGING / "ready"
    ready.mkdir(parents=True)
    for path in found:
        if link:
            (ready / path.name).symlink_to(path)
        else:
            path.rename(ready / path.name)
    for part in spec.parts:
        if any(ready.glob(part.pattern)) and (shortage := part.shortage(ready)):
            raise BrokenArchive(f"{spec.name}: not all of it is there, {shortage}. {_accepted(spec)}")
    changed = [path for path in spec.changed_files(ready) if (ready / path.split("/")[0]).exists()]
    if changed:
        raise BrokenArchive(
            f"{spec.name}: {len(changed)} files are not the official ones, such as {changed[0]} (SHA-256). "
            f"{_accepted(spec)}"
        )
    for path in found:
        target = root / path.name
        if target.is_dir() and not target.is_symlink():
            _put_aside(target)
        else:
            target.unlink(missing_ok=True)
        os.replace(ready / path.name, target)
    shutil.rmtree(root / STAGING)
    return [path.name for path in found]


def _put_aside(folder: Path) -> None:
    """Keep a folder that lacks files under another name: it may hold what did not come from here."""
    aside = folder.with_name(f"{folder.name}.incomplete")
    if aside.exists():
        raise MscsError(
            f"{folder} lacks files, and {aside} is there from an earlier time. Remove one of them"
        )
    folder.rename(aside)
    print(f"{folder} lacked files; what was in it is in {aside} now", file=sys.stderr)


def _unpack(spec: Spec, root: Path, archive: Path) -> list[str]:
    content = root / STAGING / "content"
    extract(archive, content)
    return _install(spec, root, content)


def _download_part(spec: Spec, root: Path, part: Part) -> list[str]:
    from mscs.datasets.download import cityscapes_package, download

    folder = root / DOWNLOADS
    if part.package:
        return _unpack(spec, root, cityscapes_package(part, folder))
    record = read_mapping(folder / RECORD) if (folder / RECORD).exists() else {}
    if not all(str(x).startswith("sha256:") for x in record.values()):
        raise MscsError(f"{folder / RECORD} holds no table of checksums; remove it")
    archive = download(part, folder, part.checksum or record.get(part.url))
    if archive.name == part.pattern:  # a list of names; what is in it is looked at when it is used
        return _install(spec, root, archive)
    try:
        added = _unpack(spec, root, archive)
        if shortage := part.shortage(root):
            raise BrokenArchive(f"{part.url}: not what it should be, {shortage}")
    except BrokenArchive:
        archive.unlink()
        raise
    # Only now: a login page or an error page must not become the file that all later ones are compared with.
    write_json(folder / RECORD, record | {part.url: f"sha256:{file_sha256(archive)}"})
    return added
