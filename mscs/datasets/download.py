"""Download one archive: with pooch from an address, or with the official Cityscapes downloader."""

import getpass
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from mscs.datasets.archive import require_space
from mscs.datasets.spec import Part
from mscs.errors import MscsError, UsageError

try:
    import requests
    from cityscapesscripts.download import downloader
    from pooch import HTTPDownloader, Pooch, file_hash
except ImportError as error:
    raise UsageError(f"downloads need more packages ({error}): pip install 'mscs[data]'") from error

RETRIES = 5
LONGEST_PAUSE_S = 60
CHUNK = 1 << 20
CITYSCAPES_LOGIN = "https://www.cityscapes-dataset.com/login"


def download(part: Part, folder: Path, checksum: str | None, progress: bool) -> Path:
    """Return the downloaded file of a part; one that is there with the right checksum is used as it is."""
    name = part.url.rsplit("/", 1)[-1]

    def receive(url: str, output: str, _pooch: Any) -> None:
        with (
            open(output, "wb") as file,
            tqdm(desc=name, total=part.max_bytes, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            checked = _Checked(file, part)
            headers, hooks = {"Accept-Encoding": "identity"}, {"response": checked.look_at}
            HTTPDownloader(bar, CHUNK, headers=headers, hooks=hooks, timeout=60)(url, checked, None)
        if checked.announced and checked.left:
            raise requests.ConnectionError(f"the connection broke {checked.left} bytes before the end")
        if checksum and file_hash(output, checksum.split(":")[0]) != checksum.split(":")[1]:
            raise MscsError(
                f"{url}: wrong checksum, expected {checksum}. Get it elsewhere and use --from PATH"
            )

    manager = Pooch(folder, "", registry={name: checksum}, urls={name: part.url}, retry_if_failed=RETRIES)
    try:
        return Path(manager.fetch(name, downloader=receive))
    except requests.RequestException as error:
        raise MscsError(f"{part.url}: {error}; gave up after {RETRIES + 1} tries") from error
    except OSError as error:
        raise MscsError(f"{folder}: cannot write ({error.strerror})") from error


class _Checked:
    """The file that pooch writes a download to, since pooch itself limits neither answer nor length."""

    def __init__(self, file: IO[bytes], part: Part) -> None:
        self.file, self.part, self.left, self.announced = file, part, part.max_bytes, False
        self.flush = file.flush

    def look_at(self, response: requests.Response, **_: Any) -> None:
        """Raise MscsError for an answer that asking again will not mend; wait while a server is busy."""
        status, length = response.status_code, response.headers.get("Content-Length", "")
        if status == 429 or status >= 500:
            wait = response.headers.get("Retry-After", "")
            time.sleep(min(int(wait), LONGEST_PAUSE_S) if wait.isdecimal() else 0)
        elif not response.is_redirect:
            refuse_page(response)
            encoding = response.headers.get("Content-Encoding", "identity")
            if status != requests.codes.ok or encoding != "identity":
                what = f"HTTP {status}, encoding {encoding!r}"
                raise MscsError(f"{self.part.url}: {what}. Get it elsewhere and use --from PATH")
            if length:
                if not length.isdecimal() or int(length) > self.part.max_bytes:
                    raise MscsError(f"{self.part.url}: refused, announces {length!r} bytes")
                self.left, self.announced = int(length), True
            require_space(Path(self.file.name).parent, int(length or 0))

    def write(self, chunk: bytes) -> None:
        self.left -= len(chunk)
        if self.left < 0:
            raise MscsError(f"{self.part.url}: refused, sends more bytes than announced or plausible")
        require_space(Path(self.file.name).parent, len(chunk))
        self.file.write(chunk)


def refuse_page(response: requests.Response) -> None:
    """Raise MscsError for a web page where a file was asked for."""
    if response.ok and "html" in response.headers.get("Content-Type", ""):
        raise MscsError(f"{response.url}: a web page, not a file (a login?). Use a browser and --from PATH")


def cityscapes_package(package: str, folder: Path) -> Path:
    """Return one archive, got with the official downloader: it resumes and compares the published MD5.

    What has arrived stays in `folder`/partial, whatever goes wrong, unless its MD5 is wrong.
    """
    target, partial = folder / package, folder / "partial" / package
    if target.exists():
        return target
    partial.parent.mkdir(parents=True, exist_ok=True)
    session = requests.Session()
    session.hooks["response"].append(lambda response, **_: _look_at_cityscapes(response, partial))
    try:
        _log_in(session)
        for attempt in range(RETRIES + 1):
            try:
                downloader.download_packages(
                    session=session,
                    package_names=[package],
                    destination_path=str(partial.parent),
                    resume=True,
                )
                break
            except requests.RequestException:
                if attempt == RETRIES:
                    raise
                time.sleep(attempt + 1)
    except MscsError:
        raise
    except Exception as error:  # bare ones: unknown package or no access, wrong MD5
        if "MD5" in str(error):
            partial.unlink()
        raise MscsError(f"{package}: {error}. Run the same command again: it goes on") from error
    os.replace(partial, target)
    return target


def _log_in(session: requests.Session) -> None:
    """Log in with CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, or ask; neither is stored or printed."""
    user, password = (os.environ.get(f"CITYSCAPES_{key}") for key in ("USERNAME", "PASSWORD"))
    if not (user and password) and not sys.stdin.isatty():
        raise UsageError("Cityscapes needs an account: set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD")
    user = user or input("Cityscapes user name or email: ")
    password = password or getpass.getpass("Cityscapes password: ")
    session.get(CITYSCAPES_LOGIN, allow_redirects=False).raise_for_status()
    form = {"username": user, "password": password, "submit": "Login"}
    answer = session.post(CITYSCAPES_LOGIN, data=form, allow_redirects=False)
    answer.raise_for_status()
    if answer.status_code != requests.codes.found:  # the site redirects after a successful login only
        raise MscsError(
            "Cityscapes refused the account. Check CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, "
            "or register at https://www.cityscapes-dataset.com/register/"
        )


def _look_at_cityscapes(response: requests.Response, partial: Path) -> None:
    """Keep out of the partial file what does not belong behind its last byte."""
    if "file-handling" not in response.url:
        return
    refuse_page(response)
    have, status = partial.stat().st_size, response.status_code
    place = response.headers.get("Content-Range", "")
    if status == requests.codes.requested_range_not_satisfiable:
        # All of it is there, only its MD5 was not compared yet: have the last byte sent once more.
        total = place.rpartition("/")[2]
        os.truncate(partial, max(0, min(have, int(total) if total.isdecimal() else have) - 1))
    elif status == requests.codes.partial_content and not place.startswith(f"bytes {have}-"):
        raise MscsError(f"{partial.name}: the server does not go on at byte {have}. Try again later")
    elif response.ok:
        starts_over = status == requests.codes.ok
        length = int(response.headers.get("Content-Length", 0))
        require_space(partial.parent, length - have if starts_over else length)
        if starts_over:
            os.truncate(partial, 0)  # the downloader appends
        chunks = response.iter_content

        def while_space_is_left(**options: Any) -> Iterator[bytes]:
            for chunk in chunks(**options):
                require_space(partial.parent, len(chunk))
                yield chunk

        response.iter_content = while_space_is_left  # type: ignore[assignment]
