"""Get a dataset: from its publisher, from an archive, or from a folder that is already there.

What `fetch` leaves in the root folder is the layout that the dataset's module describes. Every part (a folder
or file of the root) appears whole or not at all, so a second run does only what is missing.
"""

import getpass
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mscs.datasets.archive import extract, is_archive, move_into
from mscs.datasets.download import Retry, download, require_space
from mscs.datasets.labels import GENERATED, check_dataset
from mscs.errors import MscsError, UsageError

DOWNLOADS = ".downloads"
STAGING = ".unpacking"
WRAPPER_DEPTH = 2  # archives and folders may wrap the layout in that many more folders


@dataclass(frozen=True)
class Part:
    """Something that a dataset's root folder must hold, and where it comes from."""

    pattern: str
    """Glob for its name(s) in the root folder."""
    url: str = ""
    """Archive that contains it, or the file itself; empty where a download needs an account."""
    checksum: str | None = None
    optional: bool = False
    """It may be missing from what the user points at."""


@dataclass(frozen=True)
class Source:
    """How one dataset is distributed."""

    parts: tuple[Part, ...]
    home: str
    """Page to read or register at."""
    licence: str


PASCAL_CONTEXT_URL = "https://cs.stanford.edu/~roozbeh/pascal-context"
SOURCES = {
    "cityscapes": Source(
        (Part("leftImg8bit"), Part("gtFine")),
        "https://www.cityscapes-dataset.com",
        "own licence, non-commercial, account needed",
    ),
    "ade20k": Source(
        (
            Part(
                "ADEChallengeData2016",
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            ),
        ),
        "http://sceneparsing.csail.mit.edu",
        "images: non-commercial research and education; annotations: BSD 3-clause",
    ),
    "pascal_context": Source(
        (
            Part(
                "VOCdevkit",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
                "sha1:bf9985e9f2b064752bf6bd654d89f017c76c395a",
            ),
            Part("trainval", f"{PASCAL_CONTEXT_URL}/trainval.tar.gz"),
            Part("labels.txt", f"{PASCAL_CONTEXT_URL}/labels.txt"),
            Part("59_labels.txt", f"{PASCAL_CONTEXT_URL}/59_labels.txt", optional=True),
        ),
        PASCAL_CONTEXT_URL,
        "photographs: Flickr terms of use, as for Pascal VOC",
    ),
    "cadis": Source(
        (Part("Video[0-9][0-9]"),),
        "https://cataracts-semantic-segmentation2020.grand-challenge.org",
        "terms of the challenge, registration needed",
    ),
}
CITYSCAPES_PACKAGES = {"leftImg8bit": "leftImg8bit_trainvaltest.zip", "gtFine": "gtFine_trainvaltest.zip"}


def fetch(
    name: str,
    root: Path,
    *,
    given: Path | None = None,
    keep_archives: bool = False,
    retry: Retry | None = None,
    progress: bool = True,
) -> list[str]:
    """Bring dataset `name` into `root` and return the names of the parts that were added.

    Args:
        name: cityscapes, ade20k, pascal_context or cadis.
        root: the dataset's root folder.
        given: a folder in the official layout (linked, not copied), an archive, or a folder of archives; None
            means download.
        keep_archives: keep downloaded archives after unpacking.
        retry: for downloads.
        progress: show bars on stderr.

    Raises:
        UsageError: nothing usable at `given`; the dataset cannot be downloaded without it.
        MscsError: download or archive failed.
    """
    check_dataset(name)
    if (root / GENERATED).exists():
        raise UsageError(f"{root} holds generated scenes. Remove that folder, or choose another with --root")
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / STAGING, ignore_errors=True)
    missing = [part for part in SOURCES[name].parts if not _present(root, part)]
    if all(part.optional for part in missing):
        return []
    if given is not None:
        added = _take_given(name, root, missing, given, progress)
    else:
        added = []
        for part in missing:
            if not _present(root, part):  # an earlier archive may have brought it
                try:
                    added += _download_part(name, root, part, retry, progress)
                except MscsError:
                    if not part.optional:
                        raise
        if not keep_archives:
            _drop_archives(root / DOWNLOADS)
    absent = [part.pattern for part in missing if not part.optional and not _present(root, part)]
    if absent:
        raise UsageError(
            f"{name}: {given or root} has no {', '.join(absent)}. Point --from at the official archive, "
            f"or at a folder with {', '.join(part.pattern for part in SOURCES[name].parts)}"
        )
    return added


def _present(root: Path, part: Part) -> bool:
    return any(path.exists() for path in root.glob(part.pattern))


def _take_given(name: str, root: Path, parts: list[Part], given: Path, progress: bool) -> list[str]:
    given = given.expanduser().resolve()
    if not given.exists():
        raise UsageError(f"{name}: --from {given} does not exist")
    archives = [given] if given.is_file() else []
    if given.is_dir():
        found = _matches(given, parts)
        if found:
            return [_link(path, root) for path in found]
        archives = sorted(path for path in given.iterdir() if is_archive(path))
    if not archives or not is_archive(archives[0]):
        raise UsageError(
            f"{name}: {given} is neither an archive (zip, tar) nor a folder with "
            f"{', '.join(part.pattern for part in SOURCES[name].parts)}"
        )
    return [added for archive in archives for added in _unpack(archive, root, parts, progress)]


def _matches(base: Path, parts: Iterable[Part]) -> list[Path]:
    """Return what fits the parts, deepest first: `base` itself, in it, or a few folders below."""
    if any(base.match(part.pattern) for part in parts):
        return [base]
    found: set[Path] = set()
    for part in parts:
        for depth in range(WRAPPER_DEPTH + 1):
            paths = list(base.glob("*/" * depth + part.pattern))
            if paths:
                found.update(paths)
                break
    return sorted(found, key=lambda path: (-len(path.parts), path))


def _link(path: Path, root: Path) -> str:
    target = root / path.name
    if target.is_symlink():
        target.unlink()
    target.symlink_to(path)
    return path.name


def _unpack(archive: Path, root: Path, parts: Iterable[Part], progress: bool) -> list[str]:
    staging = root / STAGING
    extract(archive, staging / "content", progress=progress)
    found = _matches(staging / "content", parts)
    for path in found:
        move_into(path, root / path.name)
    shutil.rmtree(staging)
    return [path.name for path in found]


def _download_part(name: str, root: Path, part: Part, retry: Retry | None, progress: bool) -> list[str]:
    if name == "cityscapes":
        archive = _cityscapes_package(CITYSCAPES_PACKAGES[part.pattern], root / DOWNLOADS, retry or Retry())
    elif not part.url:
        raise UsageError(
            f"{name} is given out after registration: get the archive at {SOURCES[name].home} and run "
            f"`mscs data fetch {name} --from ARCHIVE`"
        )
    else:
        archive = root / DOWNLOADS / part.url.rsplit("/", 1)[-1]
        if not archive.exists():
            download(part.url, archive, checksum=part.checksum, retry=retry, progress=progress)
    if archive.name == part.pattern:
        move_into(archive, root / part.pattern)
        return [part.pattern]
    return _unpack(archive, root, SOURCES[name].parts, progress)


def _drop_archives(folder: Path) -> None:
    """Delete unpacked archives; the record of their checksums stays."""
    for path in folder.glob("*"):
        if is_archive(path):
            path.unlink()


def _cityscapes_package(package: str, folder: Path, retry: Retry) -> Path:
    """Download one package with the official downloader, which resumes and checks the published MD5."""
    try:
        import requests
        from cityscapesscripts.download import downloader
    except ImportError as error:
        raise UsageError("Cityscapes needs its official downloader: pip install 'mscs[data]'") from error
    target, partial = folder / package, folder / "partial"
    if target.exists():
        return target
    partial.mkdir(parents=True, exist_ok=True)
    try:
        session = _cityscapes_session(requests.Session())
        listed = downloader.get_available_packages(session=session)
        sizes = {entry["name"]: downloader.parse_size_to_bytes(entry["size"]) for entry in listed}
        require_space(folder, int(sizes.get(package, 0)))
        for attempt in range(retry.tries):
            try:
                downloader.download_packages(
                    session=session, package_names=[package], destination_path=str(partial), resume=True
                )
                break
            except requests.HTTPError as error:
                if (
                    getattr(error.response, "status_code", None)
                    != requests.codes.requested_range_not_satisfiable
                ):
                    raise
                (partial / package).unlink()
            except requests.RequestException:
                if attempt == retry.tries - 1:
                    raise
                retry.wait(attempt + 1)
    except MscsError:
        raise
    except requests.RequestException as error:
        raise MscsError(
            f"{package}: download failed ({error}). Run the same command again: it goes on"
        ) from error
    except Exception as error:
        # The downloader raises bare exceptions: unknown package or no access, wrong MD5.
        (partial / package).unlink(missing_ok=True)
        raise MscsError(f"{package}: {error}") from error
    os.replace(partial / package, target)
    return target


def _cityscapes_session(session: Any) -> Any:
    """Log in with CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, or ask; neither is stored or printed."""
    login = "https://www.cityscapes-dataset.com/login"
    user = os.environ.get("CITYSCAPES_USERNAME") or input("Cityscapes user name or email: ")
    password = os.environ.get("CITYSCAPES_PASSWORD") or getpass.getpass("Cityscapes password: ")
    session.get(login, allow_redirects=False).raise_for_status()
    form = {"username": user, "password": password, "submit": "Login"}
    answer = session.post(login, data=form, allow_redirects=False)
    answer.raise_for_status()
    if answer.status_code != 302:  # the site redirects after a successful login only
        raise MscsError(
            "Cityscapes refused the account. Check CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, "
            "or register at https://www.cityscapes-dataset.com/register/"
        )
    return session
