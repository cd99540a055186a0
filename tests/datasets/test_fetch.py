"""Downloads from a local server that misbehaves, hostile archives, and every way to hand over a dataset."""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import shutil
import stat
import sys
import tarfile
import threading
import time
import tracemalloc
import urllib.parse
import zipfile

import numpy as np
import pytest
import scipy.io

from mscs.datasets import DATASETS, archive, build_dataset, download, fetch, label_set
from mscs.datasets.archive import BrokenArchive, extract
from mscs.datasets.spec import Part
from mscs.errors import MscsError, UsageError


class Server:
    """Serves `files`; `faults` lists what the next requests of a path get instead.

    A number below 1: that part of the file, then the connection ends; a status code; bytes or a function of
    the connection: what is sent, headers included.
    """

    def __init__(self):
        self.files = {}
        self.faults = {}
        self.requests = []
        self.ranges = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                form = urllib.parse.parse_qs(self.rfile.read(length).decode())
                server.requests.append(("POST", self.path, form))
                good = form.get("password") == ["secret"]
                self.reply(302 if good else 200, b"", {"Location": "/"} if good else {})

            def do_GET(self):
                server.requests.append(("GET", self.path, self.headers.get("Range")))
                faults = server.faults.get(self.path, [])
                fault = faults.pop(0) if faults else None
                if isinstance(fault, bytes) or callable(fault):
                    self.close_connection = True
                    self.wfile.write(fault) if isinstance(fault, bytes) else fault(self.wfile)
                    return
                if isinstance(fault, int) and fault >= 400:
                    self.reply(fault, b"no")
                    return
                if self.path not in server.files:
                    self.reply(404, b"")
                    return
                data = server.files[self.path]
                start = 0
                wanted = self.headers.get("Range")
                if wanted and server.ranges:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    if start >= len(data):
                        self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                        return
                headers = {}
                if wanted and server.ranges:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                cut = int(fault * len(data)) if fault else None
                self.reply(206 if headers else 200, data[start:], headers, cut)

            def reply(self, status, body, headers=None, cut=None):
                self.send_response(status)
                for key, value in (headers or {}).items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if cut is None else body[:cut])
                if cut is not None:
                    self.close_connection = True

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.handle_error = lambda *_: None  # clients hang up on what they refuse
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.01,), daemon=True).start()

    def ranges_of(self, path):
        return [detail for method, where, detail in self.requests if (method, where) == ("GET", path)]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that were waited between tries."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return waited


DATA = np.random.default_rng(0).bytes(3_000_000)


def get(server, folder, checksum=None, **fields):
    folder.mkdir(exist_ok=True)
    part = Part("file", {}, f"{server.url}/file.bin", **fields)
    return download.download(part, folder, checksum)


def answer(status="200 OK", body=DATA, **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{key.replace('_', '-')}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def brief(value):
    return value.__name__ if callable(value) else str(value)[:30]


def endless(connection):
    connection.write(answer(body=b""))
    with contextlib.suppress(OSError):
        while True:
            connection.write(bytes(1 << 20))


def test_download(server, tmp_path):
    server.files["/file.bin"] = DATA
    target = get(server, tmp_path / "new", f"sha1:{hashlib.sha1(DATA).hexdigest()}")
    assert target.read_bytes() == DATA
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "faults", [[0.4, 0.3], [503, 429], [answer(body=b"zz\r\n", Transfer_Encoding="chunked")]], ids=brief
)
def test_a_dropped_connection_or_busy_server_is_tried_again(server, tmp_path, faults):
    server.files["/file.bin"], server.faults["/file.bin"] = DATA, faults.copy()
    assert get(server, tmp_path).read_bytes() == DATA
    assert len(server.requests) == len(faults) + 1


def test_a_busy_server_says_how_long_to_wait(server, tmp_path, pauses):
    server.files["/file.bin"] = DATA
    server.faults["/file.bin"] = [
        answer("503 Busy", b"", Content_Length=0, Retry_After=s) for s in (7, "9999")
    ]
    get(server, tmp_path)
    assert 7 in pauses
    assert max(pauses) == download.LONGEST_PAUSE_S


@pytest.mark.parametrize(
    "fault",
    [
        0.5,
        503,
        answer("503 \x1b[2J", b"", Content_Length=0),
        answer(body=b"zz\r\n", Transfer_Encoding="chunked"),
        answer(Content_Length=4_000_000),
        b"junk",
    ],
    ids=["cut", "busy", "screen", "chunks", "short", "junk"],
)
def test_what_stays_broken_leaves_nothing(server, tmp_path, fault):
    server.files["/file.bin"], server.faults["/file.bin"] = DATA, [fault] * 10
    with pytest.raises(MscsError, match=r"file\.bin: .*gave up after 6 tries") as error:
        get(server, tmp_path)
    assert str(error.value).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        *((status, rf"HTTP {status}.*--from") for status in (401, 403, 404)),
        (answer("206 Partial", Content_Length=len(DATA), Content_Range="bytes 0-2/9"), r"HTTP 206"),
        (answer(Content_Length="abc"), r"announces 'abc' bytes"),
        (answer(Content_Length=len(DATA), Content_Encoding="gzip"), r"encoding 'gzip'"),
        (answer(Content_Length="\x1b[2J"), r"announces '\\x1b\[2J' bytes"),
        (answer(Content_Length=-1), r"announces '-1' bytes"),
        (answer(Content_Length=10**9), r"announces '1000000000' bytes"),
        (answer(body=b"<html>", Content_Length=6, Content_Type="text/html"), r"a web page.*login"),
        (endless, r"sends more bytes than announced or plausible"),
    ],
    ids=brief,
)
def test_refusals_are_final(server, tmp_path, fault, message):
    server.files["/file.bin"], server.faults["/file.bin"] = DATA, [fault] * 5
    with pytest.raises(MscsError, match=message):
        get(server, tmp_path, max_bytes=20_000_000)
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_to_a_login_page_is_refused(server, tmp_path):
    server.faults["/file.bin"] = [answer("302 Found", b"", Content_Length=0, Location="/login")]
    server.faults["/login"] = [answer(body=b"<html>", Content_Length=6, Content_Type="text/html; charset=x")]
    with pytest.raises(MscsError, match="a web page"):
        get(server, tmp_path)


def test_no_server(tmp_path):
    part = Part("file", {}, "http://127.0.0.1:9/file.bin")
    with pytest.raises(MscsError, match="gave up after 6 tries"):
        download.download(part, tmp_path, None)


def test_a_wrong_checksum_is_refused(server, tmp_path):
    server.files["/file.bin"] = DATA
    with pytest.raises(MscsError, match=r"wrong checksum, expected sha256:00"):
        get(server, tmp_path, "sha256:00")
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 1


def test_a_file_that_is_there_is_used_if_it_is_right(server, tmp_path):
    server.files["/file.bin"] = DATA
    checksum = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    for content in (DATA, DATA[:-1]):
        (tmp_path / "file.bin").write_bytes(content)
        assert get(server, tmp_path, checksum).read_bytes() == DATA
        assert len(server.requests) == (content != DATA)


@pytest.mark.parametrize("fault", [None, endless])
def test_a_full_disk_is_noticed_before_its_last_byte(server, tmp_path, monkeypatch, fault):
    server.files["/file.bin"], server.faults["/file.bin"] = DATA, [fault]
    free = iter([archive.MIN_FREE_AFTER + 2_000_000] * 2 + [archive.MIN_FREE_AFTER] * 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, next(free)))
    with pytest.raises(MscsError, match=r"needs 0\.00 GB, 0\.07 GB are free.*--root"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_named(server, tmp_path, monkeypatch):
    server.files["/file.bin"] = DATA

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "require_space", refuse)
    with pytest.raises(MscsError, match=r"cannot write .No space left"):
        get(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, content)
    return path


def tar_of(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            file.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target="/etc/passwd"):
    """The same special member for zip and tar."""
    in_zip = zipfile.ZipInfo(name)
    in_zip.external_attr = {"symlink": stat.S_IFLNK, "device": stat.S_IFCHR, "fifo": stat.S_IFIFO}.get(
        kind, stat.S_IFLNK
    ) << 16
    in_tar = tarfile.TarInfo(name)
    types = {
        "symlink": tarfile.SYMTYPE,
        "hardlink": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "fifo": tarfile.FIFOTYPE,
    }
    in_tar.type, in_tar.linkname = types[kind], target
    return in_zip, in_tar


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_extract(pack, tmp_path):
    path = pack(
        tmp_path / "archive",
        {"a/b/c.txt": b"hello", "./d.txt": b"", "e": b"1" * 5000},
    )
    extract(path, tmp_path / "out")
    files = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert files == {"a/b/c.txt": b"hello", "d.txt": b"", "e": b"1" * 5000}


@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:evil", "..", "a\x1b[2Jb"]
)
def test_paths_that_leave_the_folder_are_refused(pack, name, tmp_path):
    path = pack(tmp_path / "archive", {"good": b"1", name: b"evil"})
    with pytest.raises(BrokenArchive, match=r"points outside|no plain") as error:
        extract(path, tmp_path / "in" / "out")
    assert str(error.value).isprintable()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive", "in"]


@pytest.mark.parametrize("index", [0, 1], ids=["zip", "tar"])
@pytest.mark.parametrize("kind", ["symlink", "hardlink", "device", "fifo"])
def test_links_and_devices_are_refused(index, kind, tmp_path):
    pack = (zip_of, tar_of)[index]
    path = pack(tmp_path / "archive", {special("link", kind)[index]: b"/etc/passwd", "link/file": b"evil"})
    with pytest.raises(MscsError, match="'link' is a link or a device"):
        extract(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(archive, "SLACK", 20_000)
    monkeypatch.setattr(archive, "MAX_RATIO", 20)


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_bombs_are_refused(pack, tmp_path, tight, monkeypatch):
    path = pack(tmp_path / "archive", {"zeros": bytes(5_000_000)})
    with pytest.raises(BrokenArchive, match="bomb"):
        extract(path, tmp_path / "out")
    many = pack(tmp_path / "many", {f"{i}": b"" for i in range(30)})
    monkeypatch.setattr(archive, "MAX_FILES", 20)
    with pytest.raises(BrokenArchive, match="more than 20 files"):
        extract(many, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_tar_header_of_gigabytes_is_refused_unread(kind, tmp_path):
    header = tarfile.TarInfo("evil")
    header.type, header.size = kind, 4 << 30
    with gzip.open(tmp_path / "archive", "wb") as file:
        file.write(header.tobuf())
        file.write(bytes(300 << 20))
    tracemalloc.start()
    with pytest.raises(BrokenArchive, match=r"header of|bomb"):
        extract(tmp_path / "archive", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    assert not (tmp_path / "out").exists()


def test_zeros_behind_the_end_of_a_tar_are_counted(tmp_path, tight):
    path = tar_of(tmp_path / "archive", {"good": b"1"})
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(5_000_000)))
    with pytest.raises(BrokenArchive, match="bomb"):
        extract(path, tmp_path / "out")


@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_come_twice_are_refused(pack, tmp_path):
    twice = [(zipfile.ZipInfo if pack is zip_of else tarfile.TarInfo)(name) for name in ("a/b", "./a/b")]
    path = pack(tmp_path / "archive", dict.fromkeys(twice, b"1"))
    with pytest.raises(BrokenArchive, match=r"refused, .*a/b' is in it twice"):
        extract(path, tmp_path / "out")
    clash = pack(tmp_path / "clash", {"a": b"1", "a/b": b"2"})
    with pytest.raises(BrokenArchive, match="twice"):
        extract(clash, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_tar_header_is_noticed(tmp_path):
    members = dict.fromkeys("abc", DATA[:1000])
    data = bytearray(gzip.decompress(tar_of(tmp_path / "a", members).read_bytes()))
    data[data.index(b"b\0\0\0")] ^= 255  # the checksum of the second header is wrong now
    (tmp_path / "plain").write_bytes(data)
    with pytest.raises(BrokenArchive, match="broken archive"):
        extract(tmp_path / "plain", tmp_path / "out")


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path, tight):
    path = zip_of(tmp_path / "archive", {"zeros": bytes(3_000_000)})
    data = path.read_bytes().replace((3_000_000).to_bytes(4, "little"), (30).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(MscsError, match=r"broken archive|bomb"):
        extract(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_broken_archives_are_named(pack, tmp_path):
    path = pack(tmp_path / "archive.x", {"noise": DATA})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(MscsError, match=r"archive\.x: broken archive"):
        extract(path, tmp_path / "out")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MscsError, match=r"archive\.x: broken archive"):
        extract(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pack_tree(root, path, kind, prefix=""):
    members = {
        prefix + str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }
    return {"zip": zip_of, "tar": tar_of}[kind](path, members)


def readable(name, root):
    return [len(build_dataset(name, split, root)) for split in ("train", "val")]


@pytest.fixture
def serve_part(monkeypatch):
    """Let the only part of ADE20K come from another address."""

    def change(**fields):
        spec = DATASETS["ade20k"]
        part = dataclasses.replace(spec.parts[0], **fields)
        monkeypatch.setitem(DATASETS, "ade20k", dataclasses.replace(spec, parts=(part,)))

    return change


@pytest.fixture
def ade(server, small, tmp_path, serve_part):
    """A server with ADEChallengeData2016.zip in the true layout, without published checksum."""
    path = pack_tree(small("ade20k"), tmp_path / "ade.zip", "zip")
    server.files["/ade.zip"] = path.read_bytes()
    serve_part(url=f"{server.url}/ade.zip", checksum=None)
    return server


def fetch_ade(root, **options):
    return fetch.fetch("ade20k", root, **options)


def downloads_of(root):
    return sorted(path.name for path in (root / ".downloads").iterdir())


def test_fetch_download_to_dataset(ade, tmp_path):
    root = tmp_path / "fetched"
    assert fetch_ade(root) == ["ADEChallengeData2016"]
    assert readable("ade20k", root) == [3, 2]
    assert sorted(p.name for p in root.iterdir()) == [".downloads", "ADEChallengeData2016"]
    assert downloads_of(root) == ["digests.json", "lock"]
    ade.requests.clear()
    assert fetch_ade(root) == []
    assert ade.requests == []


def test_two_fetches_at_once_are_one(ade, tmp_path, monkeypatch):
    """The second waits for the first, and finds everything there."""
    told = io.StringIO()  # pytest's own capture can lose a line that is written while it is read
    monkeypatch.setattr(sys, "stderr", told)
    root, started, finish = tmp_path / "fetched", threading.Event(), threading.Event()

    def slowly(connection):
        started.set()
        finish.wait(10)
        connection.write(answer(body=ade.files["/ade.zip"]))

    ade.faults["/ade.zip"] = [slowly]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(fetch_ade, root)
        started.wait(10)
        second = pool.submit(fetch_ade, root)
        while f"waiting for another fetch into {root}" not in told.getvalue():
            assert not second.done()
            time.sleep(0.01)
        finish.set()
        assert (first.result(), second.result()) == (["ADEChallengeData2016"], [])
    assert len(ade.requests) == 1
    assert readable("ade20k", root) == [3, 2]


def test_half_a_dataset_is_not_taken_for_a_whole_one(ade, tmp_path):
    root = tmp_path / "fetched"
    fetch_ade(root)
    base = root / "ADEChallengeData2016"
    next((base / "images/training").iterdir()).unlink()
    (base / "my notes.txt").touch()
    assert fetch_ade(root) == ["ADEChallengeData2016"]
    assert readable("ade20k", root) == [3, 2]
    assert (root / "ADEChallengeData2016.incomplete/my notes.txt").exists()
    next((base / "images/training").iterdir()).unlink()
    with pytest.raises(MscsError, match="Remove one of them"):
        fetch_ade(root)


def test_an_archive_that_lacks_files_is_refused(ade, small, make_tree, tmp_path):
    tree = make_tree("ade20k", {"train": 3})
    shutil.rmtree(tree / "ADEChallengeData2016/images/validation")
    ade.files["/ade.zip"] = pack_tree(tree, tmp_path / "less.zip", "zip").read_bytes()
    with pytest.raises(MscsError, match=r"not all of it is there, 0 of 2 files .*validation"):
        fetch_ade(tmp_path / "fetched")
    assert downloads_of(tmp_path / "fetched") == ["lock"]
    assert [p.name for p in (tmp_path / "fetched").iterdir()] == [".downloads"]


def test_an_interrupted_fetch_goes_on_with_the_archive(ade, tmp_path, monkeypatch):
    root = tmp_path / "fetched"

    def interrupt(folder, name):
        if name.endswith("00000002.png"):
            raise KeyboardInterrupt
        return inside(folder, name)

    inside = archive.inside
    monkeypatch.setattr(archive, "inside", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_ade(root)
    assert [p.name for p in root.iterdir()] == [".downloads"]
    monkeypatch.setattr(archive, "inside", inside)
    # Killed outright, half-unpacked and half-downloaded files would still be there.
    (root / ".unpacking/ready/ADEChallengeData2016").mkdir(parents=True)
    (root / ".downloads/tmp123").write_bytes(b"half")
    ade.requests.clear()
    fetch_ade(root)
    assert ade.requests == []
    assert readable("ade20k", root) == [3, 2]
    assert downloads_of(root) == ["digests.json", "lock"]


def test_a_full_disk_keeps_the_archive(ade, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "_write_members", full)
    with pytest.raises(MscsError, match=r"cannot write .No space left"):
        fetch_ade(tmp_path / "fetched")
    assert downloads_of(tmp_path / "fetched") == ["ade.zip", "lock"]


def test_the_first_checksum_is_recorded_and_binding(ade, tmp_path):
    root, data = tmp_path / "fetched", ade.files["/ade.zip"]
    fetch_ade(root)
    record = root / ".downloads/digests.json"
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert json.loads(record.read_text()) == {f"{ade.url}/ade.zip": digest}
    shutil.rmtree(root / "ADEChallengeData2016")
    ade.files["/ade.zip"] = data + b"!"
    with pytest.raises(MscsError, match=f"wrong checksum, expected {digest}"):
        fetch_ade(root)
    for damaged in ("[]", "{", "\xff", json.dumps({f"{ade.url}/ade.zip": 1})):
        record.write_text(damaged)
        with pytest.raises(MscsError, match=r"digests\.json"):
            fetch_ade(root)


def test_a_login_page_is_never_taken_for_the_right_file(ade, tmp_path):
    """Even if the server calls it a zip file: the right one is accepted afterwards."""
    root = tmp_path / "fetched"
    page = answer(body=b"<html>login", Content_Length=11, Content_Type="application/zip")
    ade.faults["/ade.zip"] = [page]
    with pytest.raises(BrokenArchive, match=r"ade\.zip: broken archive"):
        fetch_ade(root)
    assert downloads_of(root) == ["lock"]
    fetch_ade(root)
    assert readable("ade20k", root) == [3, 2]


def test_a_malicious_download_leaves_nothing(ade, tmp_path):
    evil = zip_of(tmp_path / "evil.zip", {"ADEChallengeData2016/../../../evil": b"x"})
    ade.files["/ade.zip"] = evil.read_bytes()
    with pytest.raises(MscsError, match="points outside"):
        fetch_ade(tmp_path / "fetched")
    assert not list(tmp_path.glob("**/evil"))
    assert downloads_of(tmp_path / "fetched") == ["lock"]


@pytest.mark.parametrize("name", DATASETS)
def test_from_folder_is_linked(name, small, tmp_path):
    tree = small(name)
    if name == "pascal_context":
        (tree / "trainval").mkdir()
        (tree / "trainval" / "2008_000001.mat").touch()
        (tree / "labels.txt").write_text("1: wall\n")
    root = tmp_path / "root"
    added = fetch.fetch(name, root, given=tree)
    assert added
    assert all((root / part).is_symlink() for part in added)
    if name == "pascal_context":
        assert set(added) == {"VOCdevkit", "trainval", "labels.txt"}
    else:
        assert readable(name, root) == [3, 2]
    assert fetch.fetch(name, root, given=tree) == []


def test_the_environment_names_what_is_given(small, tmp_path, monkeypatch):
    archive = pack_tree(small("cadis"), tmp_path / "cadis.zip", "zip")
    monkeypatch.setenv("MSCS_FROM_CADIS", str(archive))
    assert fetch.fetch("cadis", tmp_path / "root")
    assert readable("cadis", tmp_path / "root") == [3, 2]
    monkeypatch.setenv("MSCS_FROM_CADIS", str(tmp_path / "gone.zip"))
    with pytest.raises(UsageError, match=r"gone\.zip .*MSCS_FROM_CADIS.* does not exist"):
        fetch.fetch("cadis", tmp_path / "other")


@pytest.mark.parametrize("name", DATASETS)
def test_what_can_be_read_is_not_fetched_for_what_nobody_reads(name, small, tmp_path, server):
    """Such as the annotations that Pascal-Context's label images were made of, or a test split."""
    tree, used = small(name), ("train", "val")
    linked = tmp_path / "linked"
    linked.symlink_to(tree)
    spec = DATASETS[name]
    assert fetch.fetch(name, linked, needed=used) == []
    more = dataclasses.replace(spec.parts[0], pattern="more", files={"more/*": 1}, url="", package="")
    DATASETS[name] = dataclasses.replace(spec, parts=(*spec.parts, more))
    assert fetch.fetch(name, linked, needed=used) == []
    with pytest.raises(UsageError, match=name):
        fetch.fetch(name, linked, needed=())
    entry = spec.open_index("val", tree).entries[0]
    (tree / entry.image).unlink()
    (tree / entry.label).unlink()
    with pytest.raises(UsageError, match=name):
        fetch.fetch(name, linked, needed=used)
    assert linked.is_symlink()


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "ade20k").symlink_to(tmp_path / "unplugged")
    with pytest.raises(UsageError, match=r"ade20k is a link to .*unplugged, which is not there"):
        fetch.fetch("ade20k", tmp_path / "ade20k")


def test_from_the_inner_folder(small, tmp_path):
    tree = small("ade20k")
    fetch.fetch("ade20k", tmp_path / "root", given=tree / "ADEChallengeData2016")
    assert readable("ade20k", tmp_path / "root") == [3, 2]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_cadis_from_a_wrapped_archive(kind, small, tmp_path):
    path = pack_tree(small("cadis"), tmp_path / "cadis.archive", kind, prefix="CaDISv2/")
    added = fetch.fetch("cadis", tmp_path / "root", given=path)
    assert all(part.startswith("Video") for part in added)
    assert readable("cadis", tmp_path / "root") == [3, 2]
    assert path.exists()


def test_cityscapes_from_a_folder_of_archives(small, tmp_path):
    tree, archives = small("cityscapes"), tmp_path / "archives"
    archives.mkdir()
    for part in ("leftImg8bit", "gtFine"):
        pack_tree(tree / part, archives / f"{part}_trainvaltest.zip", "zip", prefix=f"{part}/")
    fetch.fetch("cityscapes", tmp_path / "root", given=archives)
    assert readable("cityscapes", tmp_path / "root") == [3, 2]


def test_cadis_says_where_to_get_it(tmp_path):
    with pytest.raises(UsageError, match=r"grand-challenge\.org.*mscs data fetch cadis --from"):
        fetch.fetch("cadis", tmp_path / "cadis")
    assert not (tmp_path / "cadis").exists()


@pytest.mark.parametrize("given", ["nowhere", "empty", "text.txt"])
def test_from_something_else(given, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(MscsError, match=given):
        fetch.fetch("ade20k", tmp_path / "root", given=tmp_path / given)


def test_an_incomplete_folder_is_refused(small, tmp_path):
    tree = small("cityscapes")
    shutil.rmtree(tree / "gtFine")
    with pytest.raises(UsageError, match=r"has 0 of 3 files gtFine/train"):
        fetch.fetch("cityscapes", tmp_path / "root", given=tree)


@pytest.fixture
def context_server(server, small, tmp_path, monkeypatch):
    """A server with the Pascal-Context files; the 459-class list holds the 59 names in another order."""
    tree = small("pascal_context")
    names = sorted(
        {*label_set("pascal_context").classes, *(f"other{i}" for i in range(400))}, key=lambda n: n[::-1]
    )
    (tree / "labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(names, 1)))
    (tree / "trainval").mkdir()
    rng = np.random.default_rng(0)
    for path in (tree / "SegmentationClassContext59").iterdir():
        raw = rng.integers(1, 460, (24, 40)).astype(np.uint16)
        scipy.io.savemat(tree / "trainval" / f"{path.stem}.mat", {"LabelMap": raw})
    shutil.rmtree(tree / "SegmentationClassContext59")
    for name, folder in (("voc.tar", "VOCdevkit"), ("trainval.tar.gz", "trainval")):
        path = pack_tree(tree / folder, tmp_path / name, "tar", prefix=f"{folder}/")
        server.files[f"/{name}"] = path.read_bytes()
    server.files["/labels.txt"] = (tree / "labels.txt").read_bytes()
    spec, counts = DATASETS["pascal_context"], {"trainval": {"trainval/*.mat": 5}}
    parts = tuple(
        dataclasses.replace(
            part,
            url=f"{server.url}/{'voc.tar' if part.pattern == 'VOCdevkit' else part.url.rsplit('/', 1)[1]}",
            files=counts.get(part.pattern, part.files),
            checksum=None,
        )
        for part in spec.parts
    )
    monkeypatch.setitem(DATASETS, "pascal_context", dataclasses.replace(spec, parts=parts))
    return tree


def test_pascal_context_downloads(context_server, tmp_path):
    root = tmp_path / "root"
    added = fetch.fetch("pascal_context", root)
    assert added == ["VOCdevkit", "trainval", "labels.txt"]
    assert len(list((root / "trainval").glob("*.mat"))) == 5


class TestCityscapes:
    """The official downloader, against a local copy of its site."""

    @pytest.fixture
    def site(self, server, small, tmp_path, monkeypatch):
        requests = pytest.importorskip("requests")
        pytest.importorskip("cityscapesscripts.download.downloader")
        tree = small("cityscapes")
        listing = []
        for number, part in enumerate(("leftImg8bit", "gtFine")):
            data = pack_tree(tree / part, tmp_path / f"{part}.zip", "zip", prefix=f"{part}/").read_bytes()
            name = f"{part}_trainvaltest.zip"
            listing.append({"name": name, "packageID": number, "size": "1MB", "thirdparty": "0"})
            server.files[f"/file-handling/?packageID={number}"] = data
            server.files[f"/md5-sum/?packageID={number}"] = (
                f"{hashlib.md5(data).hexdigest()}  {name}".encode()
            )
        server.files["/downloads/?list"] = json.dumps(listing).encode()
        server.files["/login"] = b""

        class Local(requests.adapters.HTTPAdapter):
            def send(self, request, **kwargs):
                request.url = request.url.replace("https://www.cityscapes-dataset.com", server.url)
                return super().send(request, **kwargs)

        real = requests.Session

        def session():
            session = real()
            session.mount("https://www.cityscapes-dataset.com", Local())
            return session

        monkeypatch.setattr(requests, "Session", session)
        monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
        monkeypatch.setenv("CITYSCAPES_PASSWORD", "secret")
        return server

    def fetch(self, root):
        return fetch.fetch("cityscapes", root)

    def test_with_an_account_from_the_environment(self, site, tmp_path, capfd):
        assert self.fetch(tmp_path / "root") == ["leftImg8bit", "gtFine"]
        assert readable("cityscapes", tmp_path / "root") == [3, 2]
        output = "".join(capfd.readouterr())
        assert "secret" not in output
        stored = [p.read_bytes() for p in tmp_path.joinpath("root").rglob("*") if p.is_file()]
        assert not any(b"secret" in content for content in stored)

    def test_with_an_account_from_the_prompt(self, site, tmp_path, monkeypatch):
        monkeypatch.delenv("CITYSCAPES_USERNAME")
        monkeypatch.delenv("CITYSCAPES_PASSWORD")
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda prompt: "you")
        monkeypatch.setattr("getpass.getpass", lambda prompt: "secret")
        self.fetch(tmp_path / "root")
        assert site.requests[1][2]["username"] == ["you"]

    def test_a_wrong_password(self, site, tmp_path, monkeypatch):
        monkeypatch.setenv("CITYSCAPES_PASSWORD", "guess")
        with pytest.raises(MscsError, match="refused the account") as error:
            self.fetch(tmp_path / "root")
        assert "guess" not in str(error.value)

    PACKAGE = "/file-handling/?packageID=0"

    def half_there(self, site, root):
        """Leave half of the first package, as an interrupted fetch does."""
        data = site.files[self.PACKAGE]
        partial = root / ".downloads/partial/leftImg8bit_trainvaltest.zip"
        partial.parent.mkdir(parents=True)
        partial.write_bytes(data[: len(data) // 2])
        return partial, len(data) // 2

    def test_a_dropped_connection_is_resumed(self, site, tmp_path):
        site.faults[self.PACKAGE] = [0.5]
        self.fetch(tmp_path / "root")
        assert len(site.ranges_of(self.PACKAGE)) == 2
        assert site.ranges_of(self.PACKAGE)[1] != "bytes=0-"

    def test_an_interrupted_fetch_goes_on(self, site, tmp_path):
        _, half = self.half_there(site, tmp_path / "root")
        self.fetch(tmp_path / "root")
        assert site.ranges_of(self.PACKAGE) == [f"bytes={half}-"]

    @pytest.mark.parametrize(
        "fault", ["no account", "wrong account", "full disk", "login page", "no MD5", "odd range"]
    )
    def test_a_partial_download_survives(self, site, tmp_path, monkeypatch, fault):
        root = tmp_path / "root"
        partial, half = self.half_there(site, root)
        before = partial.read_bytes()
        if fault == "no account":
            monkeypatch.delenv("CITYSCAPES_USERNAME")
            monkeypatch.setattr("sys.stdin", io.StringIO())
        elif fault == "wrong account":
            monkeypatch.setenv("CITYSCAPES_PASSWORD", "guess")
        elif fault == "full disk":
            full = shutil._ntuple_diskusage(10**9, 10**9, archive.MIN_FREE_AFTER)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        elif fault == "no MD5":
            site.files["/md5-sum/?packageID=0"] = b"<html>"
        elif fault == "login page":
            site.faults[self.PACKAGE] = [answer(body=b"<html>", Content_Length=6, Content_Type="text/html")]
        else:
            odd = answer(
                "206 Partial", b"1", Content_Length=1, Content_Range=f"bytes {half + 1}-{half + 1}/9"
            )
            site.faults[self.PACKAGE] = [odd]
        with pytest.raises(
            MscsError, match=rf"account|free|web page|no MD5|206.*where {half} bytes are there"
        ):
            self.fetch(root)
        assert partial.read_bytes() == before
        monkeypatch.undo()

    def test_a_server_that_starts_over_is_followed(self, site, tmp_path):
        self.half_there(site, tmp_path / "root")
        site.ranges = False
        self.fetch(tmp_path / "root")

    def test_a_download_that_only_lacks_its_check_is_checked(self, site, tmp_path):
        partial, _ = self.half_there(site, tmp_path / "root")
        partial.write_bytes(site.files[self.PACKAGE])
        self.fetch(tmp_path / "root")
        assert site.ranges_of(self.PACKAGE) == [f"bytes={len(site.files[self.PACKAGE])}-"]

    def test_a_wrong_checksum(self, site, tmp_path):
        site.files["/md5-sum/?packageID=1"] = b"0" * 32 + b"  gtFine"
        with pytest.raises(MscsError, match=r"packageID=1: wrong checksum, expected md5:0000"):
            self.fetch(tmp_path / "root")
        assert not (tmp_path / "root/gtFine").exists()
        assert (tmp_path / "root/leftImg8bit").exists()

    @pytest.mark.parametrize("answer", ["{}", "[1]", '[{"name": "x"}]', "<html>"])
    def test_a_list_that_is_none(self, site, tmp_path, answer):
        site.files["/downloads/?list"] = answer.encode()
        with pytest.raises(MscsError, match=r"cityscapes-dataset\.com|don't have access"):
            self.fetch(tmp_path / "root")

    def test_no_access_to_the_package(self, site, tmp_path):
        site.files["/downloads/?list"] = b"[]"
        with pytest.raises(MscsError, match="don't have access"):
            self.fetch(tmp_path / "root")


@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_known_one_by_one_are_compared(small, tmp_path, packed):
    source = small("camvid")
    given = source
    label = next(source.glob("testannot/*"))
    label.write_bytes(label.read_bytes() + b"x")
    if packed:
        given = zip_of(
            tmp_path / "camvid.zip",
            {f"SegNet/CamVid/{p.relative_to(source)}": p.read_bytes() for p in source.rglob("*.png")},
        )
    with pytest.raises(BrokenArchive, match=r"1 files are not the official ones, such as testannot/"):
        fetch.fetch("camvid", tmp_path / "root", given=given)
    assert not any((tmp_path / "root").glob("*/*.png"))


def test_camvid_is_downloaded_once_for_all_its_folders(small, server, tmp_path, monkeypatch):
    source = small("camvid")
    spec = DATASETS["camvid"]
    assert len({part.url for part in spec.parts}) == 1
    parts = tuple(dataclasses.replace(part, url=f"{server.url}/master.zip") for part in spec.parts)
    monkeypatch.setitem(DATASETS, "camvid", dataclasses.replace(spec, parts=parts))
    members = {f"SegNet-x/CamVid/{p.relative_to(source)}": p.read_bytes() for p in source.rglob("*.png")}
    server.files["/master.zip"] = zip_of(tmp_path / "x.zip", members).read_bytes()
    added = fetch.fetch("camvid", tmp_path / "root")
    assert sorted(added) == ["test", "testannot", "train", "trainannot", "val", "valannot"]
    assert len(server.requests) == 1
    assert len(build_dataset("camvid", "train+val", tmp_path / "root")) == 5
