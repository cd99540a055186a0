"""Download one file with pooch, which tries again and puts a file in its place when its checksum is right."""

import dataclasses
import getpass
import os
import re
import sys
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mscs.datasets.archive import require_space
from mscs.datasets.spec import Part
from mscs.errors import MscsError, UsageError

try:
    import requests
    from cityscapesscripts.download.downloader import get_available_packages
    from pooch import Pooch, file_hash
except ImportError as error:
    raise UsageError(f"downloads need more packages ({error}): pip install 'mscs[data]'") from error

RETRIES = 5
LONGEST_PAUSE_S = 60
CHUNK = 1 << 20
CITYSCAPES = "https://www.cityscapes-dataset.com"


def download(part: Part, folder: Path, checksum: str | None, session: requests.Session | None = None) -> Path:
    """Return the downloaded file of a part; one that is there with the right checksum is used as it is.

    With a session, what has arrived stays in `folder`/partial, whatever goes wrong, and the next download
    goes on there; without, nothing of a download that fails is left.
    """
    name = part.package or part.url.rsplit("/", 1)[-1]

    def receive(url: str, output: str, _pooch: Any) -> None:
        partial = folder / "partial" / name if session else Path(output)
        partial.parent.mkdir(exist_ok=True)
        with partial.open("ab") as file:
            _receive(session or requests.Session(), url, file, part.max_bytes)
        method, _, digest = (checksum or "").partition(":")
        if checksum and file_hash(partial, method) != digest:
            partial.unlink()
            raise MscsError(
                f"{url}: wrong checksum, expected {checksum}. Get it elsewhere and use --from PATH"
            )
        partial.replace(output)

    manager = Pooch(folder, "", registry={name: checksum}, urls={name: part.url}, retry_if_failed=RETRIES)
    try:
        return Path(manager.fetch(name, downloader=receive))
    except requests.RequestException as error:
        raise MscsError(f"{part.url}: {error}; gave up after {RETRIES + 1} tries") from error
    except OSError as error:
        raise MscsError(f"{folder}: cannot write ({error.strerror})") from error


def _receive(session: requests.Session, url: str, file: IO[bytes], max_bytes: int) -> None:
    """Append to `file` what it lacks; MscsError for an answer that asking again will not mend."""
    folder, start = Path(file.name).parent, file.tell()
    wanted = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with session.get(url, headers=wanted, stream=True, timeout=60) as answer:
        status, headers = answer.status_code, answer.headers
        if status == 429 or status >= 500:
            wait = headers.get("Retry-After", "")
            time.sleep(min(int(wait), LONGEST_PAUSE_S) if wait.isdecimal() else 0)
            answer.raise_for_status()
        place, encoding = headers.get("Content-Range", ""), headers.get("Content-Encoding", "identity")
        total = place.removeprefix("bytes */")
        if status == 416 and total.isdecimal() and int(total) <= start:
            return  # all of it was there, only not checked yet
        if answer.ok and "html" in headers.get("Content-Type", ""):
            raise MscsError(f"{answer.url}: a web page, not a file (a login?). Use a browser and --from PATH")
        goes_on = start and status == 206 and place.startswith(f"bytes {start}-")
        if encoding != "identity" or not (goes_on or status == 200):
            what = f"HTTP {status}, encoding {encoding!r}, range {place!r} where {start} bytes are there"
            raise MscsError(f"{url}: {what}. Get it elsewhere and use --from PATH")
        length = headers.get("Content-Length")
        if length and (not length.isdecimal() or int(length) > max_bytes):
            raise MscsError(f"{url}: refused, announces {length!r} bytes")
        left = int(length or max_bytes)
        require_space(folder, left if length else 0)
        if not goes_on:
            file.truncate(0)
        for chunk in tqdm(
            answer.iter_content(CHUNK), url.rsplit("/", 1)[-1], left // CHUNK, unit="MiB", disable=None
        ):
            left -= len(chunk)
            if left < 0:
                raise MscsError(f"{url}: refused, sends more bytes than announced or plausible")
            require_space(folder, len(chunk))
            file.write(chunk)
        if length and left:
            raise requests.ConnectionError(f"the connection broke {left} bytes before the end")


def cityscapes_package(part: Part, folder: Path) -> Path:
    """Return one archive of Cityscapes, compared with the MD5 that its site gives."""
    if (folder / part.package).exists():  # only what was compared gets there
        return folder / part.package
    try:
        session = _log_in()
        packages = {found["name"]: found["packageID"] for found in get_available_packages(session=session)}
        if part.package not in packages:
            raise MscsError(f"{part.package}: you don't have access to it. Ask for it at {CITYSCAPES}")
        number = f"?packageID={packages[part.package]}"
        answer = session.get(f"{CITYSCAPES}/md5-sum/{number}", allow_redirects=False, timeout=60)
        answer.raise_for_status()
    except (requests.RequestException, KeyError, TypeError) as error:  # no answer, or not the list
        raise MscsError(f"{CITYSCAPES}: {error}. Run the same command again") from error
    if not (md5 := re.match(r"[0-9a-f]{32}\b", answer.text)):
        raise MscsError(f"{part.package}: {CITYSCAPES} gives no MD5 of it. Run the same command again later")
    file = dataclasses.replace(part, url=f"{CITYSCAPES}/file-handling/{number}")
    return download(file, folder, f"md5:{md5[0]}", session)


def _log_in() -> requests.Session:
    """Log in with CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, or ask; neither is stored or printed."""
    user, password = (os.environ.get(f"CITYSCAPES_{key}") for key in ("USERNAME", "PASSWORD"))
    if not (user and password) and not sys.stdin.isatty():
        raise UsageError(
            f"Cityscapes needs an account ({CITYSCAPES}/register/): set CITYSCAPES_USERNAME and "
            "CITYSCAPES_PASSWORD, or name a folder or archives that are there in MSCS_FROM_CITYSCAPES"
        )
    user = user or input("Cityscapes user name or email: ")
    password = password or getpass.getpass("Cityscapes password: ")
    session = requests.Session()
    session.get(f"{CITYSCAPES}/login", allow_redirects=False).raise_for_status()
    form = {"username": user, "password": password, "submit": "Login"}
    answer = session.post(f"{CITYSCAPES}/login", data=form, allow_redirects=False)
    answer.raise_for_status()
    if answer.status_code != 302:  # the site redirects after a successful login only
        raise MscsError(
            "Cityscapes refused the account. Check CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, "
            f"or register at {CITYSCAPES}/register/"
        )
    return session
