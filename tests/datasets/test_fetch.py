"""Downloads from a local server that misbehaves, hostile archives, and every way to hand over a dataset."""

import hashlib
import http.server
import io
import json
import shutil
import stat
import tarfile
import threading
import urllib.parse
import zipfile

import numpy as np
import pytest
import scipy.io

from mscs.datasets import archive, build_dataset, download, fetch, label_set
from mscs.datasets.archive import Limits, extract
from mscs.datasets.download import Retry
from mscs.errors import MscsError, UsageError

RETRY = Retry(tries=3, pause=0.001)


class Server:
    """Serves `files`; `faults` lists what goes wrong with the next requests of a path."""

    def __init__(self):
        self.files = {}
        self.faults = {}
        self.requests = []
        self.ranges = True
        self.etag = '"v1"'
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
                if isinstance(fault, int) and fault >= 400:
                    self.reply(fault, b"no")
                    return
                if self.path not in server.files:
                    self.reply(404, b"")
                    return
                data = server.files[self.path]
                start = 0
                wanted = self.headers.get("Range")
                fresh = self.headers.get("If-Range") in (None, server.etag)
                if wanted and server.ranges and fresh:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    if start >= len(data):
                        self.reply(416, b"")
                        return
                headers = {"ETag": server.etag} if server.etag else {}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                cut = int(fault * len(data)) if fault else None
                self.reply(206 if start else 200, data[start:], headers, cut)

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


DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


def get(server, folder, **options):
    target = folder / "file.bin"
    options = {"retry": RETRY, "progress": False} | options
    return target, download.download(f"{server.url}/file.bin", target, **options)


def test_download(server, tmp_path):
    server.files["/file.bin"] = DATA
    target, sha256 = get(server, tmp_path / "new", checksum=f"sha1:{hashlib.sha1(DATA).hexdigest()}")
    assert target.read_bytes() == DATA
    assert sha256 == SHA256
    assert sorted(path.name for path in target.parent.iterdir()) == ["checksums.json", "file.bin"]


def test_a_dropped_connection_is_resumed(server, tmp_path):
    server.files["/file.bin"] = DATA
    server.faults["/file.bin"] = [0.4, 0.3]
    assert get(server, tmp_path)[1] == SHA256
    ranges = server.ranges_of("/file.bin")
    assert ranges == [None, "bytes=120000-", "bytes=210000-"]


def test_an_earlier_run_is_continued(server, tmp_path):
    server.files["/file.bin"] = DATA
    server.faults["/file.bin"] = [0.4, 503, 503]
    with pytest.raises(MscsError, match=r"HTTP 503.*3 tries.*goes on from"):
        get(server, tmp_path)
    assert not (tmp_path / "file.bin").exists()
    assert (tmp_path / "file.bin.part").stat().st_size == 120_000
    server.requests.clear()
    _, sha256 = get(server, tmp_path)
    assert sha256 == SHA256
    assert server.ranges_of("/file.bin") == ["bytes=120000-"]


def test_a_changed_file_is_not_glued_to_the_old_part(server, tmp_path):
    server.files["/file.bin"] = DATA[::-1]
    server.faults["/file.bin"] = [0.4, 503, 503]
    with pytest.raises(MscsError):
        get(server, tmp_path)
    server.files["/file.bin"], server.etag = DATA, '"v2"'
    assert get(server, tmp_path)[1] == SHA256


@pytest.mark.parametrize("etag", ['"v1"', None])
def test_without_ranges_it_starts_over(server, tmp_path, etag):
    server.files["/file.bin"], server.ranges, server.etag = DATA, False, etag
    server.faults["/file.bin"] = [0.5]
    assert get(server, tmp_path)[1] == SHA256


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    server.files["/file.bin"] = DATA
    (tmp_path / "file.bin.part").write_bytes(DATA + b"more")
    (tmp_path / "file.bin.part.tag").write_text('"v1"')
    assert get(server, tmp_path)[1] == SHA256
    assert server.ranges_of("/file.bin") == ["bytes=300004-", None]


def test_a_file_that_stays_truncated_fails(server, tmp_path):
    server.files["/file.bin"], server.ranges = DATA, False
    server.faults["/file.bin"] = [0.5, 0.5, 0.5, 0.5]
    with pytest.raises(MscsError, match="closed after 150000 of 300000 bytes"):
        get(server, tmp_path)
    assert not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize(
    ("status", "message"), [(401, "access refused"), (403, "access refused"), (404, "not there")]
)
def test_refusals_are_final(server, tmp_path, status, message):
    server.files["/file.bin"] = DATA
    server.faults["/file.bin"] = [status] * 5
    with pytest.raises(MscsError, match=rf"file\.bin: {message}.*{status}.*--from"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.files["/file.bin"] = DATA
    server.faults["/file.bin"] = [503, 429]
    assert get(server, tmp_path)[1] == SHA256


def test_no_server(tmp_path):
    with pytest.raises(MscsError, match="no answer"):
        download.download("http://127.0.0.1:9/file.bin", tmp_path / "f", retry=RETRY, progress=False)


def test_a_wrong_checksum_is_refused(server, tmp_path):
    server.files["/file.bin"] = DATA
    with pytest.raises(MscsError, match=r"wrong checksum .* expected 00 \(published\)"):
        get(server, tmp_path, checksum="sha256:00")
    assert not (tmp_path / "file.bin").exists()
    assert not (tmp_path / "file.bin.part").exists()


def test_the_first_checksum_is_recorded_and_binding(server, tmp_path):
    server.files["/file.bin"] = DATA
    target, _ = get(server, tmp_path)
    record = json.loads((tmp_path / "checksums.json").read_text())
    assert record == {f"{server.url}/file.bin": {"size": len(DATA), "sha256": SHA256}}
    target.unlink()
    server.files["/file.bin"] = DATA[:-1] + b"!"
    with pytest.raises(MscsError, match=r"recorded in .*checksums\.json"):
        get(server, tmp_path)
    assert not target.exists()


def test_a_full_disk_is_noticed_before(server, tmp_path, monkeypatch):
    server.files["/file.bin"] = DATA
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100_000))
    with pytest.raises(MscsError, match=r"needs 0\.00 GB, 0\.00 GB are free.*--root"):
        get(server, tmp_path)
    assert not list(tmp_path.glob("file.bin"))


def test_a_read_only_folder_is_named(server, tmp_path, monkeypatch):
    server.files["/file.bin"] = DATA

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_copy", refuse)
    with pytest.raises(MscsError, match=r"file\.bin\.part: cannot write .No space left"):
        get(server, tmp_path)


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
    extract(path, tmp_path / "out", progress=False)
    files = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert files == {"a/b/c.txt": b"hello", "d.txt": b"", "e": b"1" * 5000}


@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:evil", ".."])
def test_paths_that_leave_the_folder_are_refused(pack, name, tmp_path):
    path = pack(tmp_path / "archive", {"good": b"1", name: b"evil"})
    with pytest.raises(MscsError, match="points outside"):
        extract(path, tmp_path / "in" / "out", progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive", "in"]


@pytest.mark.parametrize("index", [0, 1], ids=["zip", "tar"])
@pytest.mark.parametrize("kind", ["symlink", "hardlink", "device", "fifo"])
def test_links_and_devices_are_refused(index, kind, tmp_path):
    pack = (zip_of, tar_of)[index]
    path = pack(tmp_path / "archive", {special("link", kind)[index]: b"/etc/passwd", "link/file": b"evil"})
    with pytest.raises(MscsError, match="link is a link or a device"):
        extract(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_bombs_are_refused(pack, tmp_path):
    path = pack(tmp_path / "archive", {"zeros": bytes(5_000_000)})
    with pytest.raises(MscsError, match="bomb"):
        extract(path, tmp_path / "out", limits=Limits(ratio=20, slack=1000), progress=False)
    many = pack(tmp_path / "many", {f"{i}": b"" for i in range(30)})
    with pytest.raises(MscsError, match="more than 20 files"):
        extract(many, tmp_path / "out", limits=Limits(num_files=20), progress=False)
    assert not (tmp_path / "out").exists()


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path):
    path = zip_of(tmp_path / "archive", {"zeros": bytes(3_000_000)})
    data = path.read_bytes().replace((3_000_000).to_bytes(4, "little"), (30).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(MscsError, match=r"broken archive|bomb"):
        extract(path, tmp_path / "out", limits=Limits(ratio=20, slack=1000), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_broken_archives_are_named(pack, tmp_path):
    path = pack(tmp_path / "archive.x", {"noise": DATA})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(MscsError, match=r"archive\.x: broken archive"):
        extract(path, tmp_path / "out", progress=False)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MscsError, match=r"archive\.x: broken archive"):
        extract(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def pack_tree(root, path, kind, prefix=""):
    members = {
        prefix + str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }
    return {"zip": zip_of, "tar": tar_of}[kind](path, members)


def readable(name, root):
    return [len(build_dataset(name, split, root)) for split in ("train", "val")]


@pytest.fixture
def ade_server(server, make_tree, tmp_path, monkeypatch):
    """A server with ADEChallengeData2016.zip in the true layout."""
    path = pack_tree(make_tree("ade20k"), tmp_path / "ade.zip", "zip")
    server.files["/ADEChallengeData2016.zip"] = path.read_bytes()
    part = fetch.Part(
        "ADEChallengeData2016",
        f"{server.url}/ADEChallengeData2016.zip",
        f"sha256:{download.file_digest(path)}",
    )
    monkeypatch.setitem(fetch.SOURCES, "ade20k", fetch.Source((part,), "home", "licence"))
    return server


def fetch_ade(root, **options):
    return fetch.fetch("ade20k", root, retry=RETRY, progress=False, **options)


def test_fetch_download_to_dataset(ade_server, tmp_path):
    root = tmp_path / "fetched"
    assert fetch_ade(root) == ["ADEChallengeData2016"]
    assert readable("ade20k", root) == [3, 2]
    assert sorted(p.name for p in root.iterdir()) == [".downloads", "ADEChallengeData2016"]
    assert [p.name for p in (root / ".downloads").iterdir()] == ["checksums.json"]
    ade_server.requests.clear()
    assert fetch_ade(root) == []
    assert ade_server.requests == []


def test_keep_archives(ade_server, tmp_path):
    fetch_ade(tmp_path / "fetched", keep_archives=True)
    assert (tmp_path / "fetched/.downloads/ADEChallengeData2016.zip").exists()


def test_interrupted_unpacking_is_not_taken_for_a_dataset(ade_server, tmp_path, monkeypatch):
    root = tmp_path / "fetched"

    def interrupt(archive, name, **kwargs):
        if name.endswith("00000002.png"):
            raise KeyboardInterrupt
        return real(archive, name, **kwargs)

    real = archive._safe_name
    monkeypatch.setattr(archive, "_safe_name", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_ade(root)
    assert not (root / "ADEChallengeData2016").exists()
    monkeypatch.undo()
    # Killed outright, the half-unpacked files would still be there.
    (root / ".unpacking/content/ADEChallengeData2016").mkdir(parents=True)
    part = fetch.Part("ADEChallengeData2016", f"{ade_server.url}/ADEChallengeData2016.zip")
    monkeypatch.setitem(fetch.SOURCES, "ade20k", fetch.Source((part,), "home", "licence"))
    ade_server.requests.clear()
    fetch_ade(root)
    assert ade_server.requests == []  # the downloaded archive was kept and used
    assert readable("ade20k", root) == [3, 2]
    assert not (root / ".unpacking").exists()


def test_a_malicious_download_leaves_nothing(ade_server, tmp_path, monkeypatch):
    evil = zip_of(tmp_path / "evil.zip", {"ADEChallengeData2016/../../../evil": b"x"})
    ade_server.files["/evil.zip"] = evil.read_bytes()
    part = fetch.Part("ADEChallengeData2016", f"{ade_server.url}/evil.zip")
    monkeypatch.setitem(fetch.SOURCES, "ade20k", fetch.Source((part,), "home", "licence"))
    with pytest.raises(MscsError, match="points outside"):
        fetch_ade(tmp_path / "fetched")
    assert not list(tmp_path.glob("**/evil"))


@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "pascal_context", "cadis"])
def test_from_folder_is_linked(name, make_tree, tmp_path):
    tree = make_tree(name)
    if name == "pascal_context":
        (tree / "SegmentationClassContext59").rename(tree / "trainval")
        (tree / "trainval" / "labels.txt").write_text("1: wall\n")
    root = tmp_path / "root"
    added = fetch.fetch(name, root, given=tree, progress=False)
    assert added
    assert all((root / part).is_symlink() for part in added)
    if name == "pascal_context":
        assert set(added) == {"VOCdevkit", "trainval", "labels.txt"}
    else:
        assert readable(name, root) == [3, 2]
    assert fetch.fetch(name, root, given=tree, progress=False) == []


def test_from_the_inner_folder(make_tree, tmp_path):
    tree = make_tree("ade20k")
    fetch.fetch("ade20k", tmp_path / "root", given=tree / "ADEChallengeData2016", progress=False)
    assert readable("ade20k", tmp_path / "root") == [3, 2]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_cadis_from_a_wrapped_archive(kind, make_tree, tmp_path):
    path = pack_tree(make_tree("cadis"), tmp_path / "cadis.archive", kind, prefix="CaDISv2/")
    added = fetch.fetch("cadis", tmp_path / "root", given=path, progress=False)
    assert all(part.startswith("Video") for part in added)
    assert readable("cadis", tmp_path / "root") == [3, 2]
    assert path.exists()


def test_cityscapes_from_a_folder_of_archives(make_tree, tmp_path):
    tree, archives = make_tree("cityscapes"), tmp_path / "archives"
    archives.mkdir()
    for part in ("leftImg8bit", "gtFine"):
        pack_tree(tree / part, archives / f"{part}_trainvaltest.zip", "zip", prefix=f"{part}/")
    fetch.fetch("cityscapes", tmp_path / "root", given=archives, progress=False)
    assert readable("cityscapes", tmp_path / "root") == [3, 2]


def test_cadis_says_where_to_get_it(tmp_path):
    with pytest.raises(UsageError, match=r"grand-challenge\.org.*mscs data fetch cadis --from"):
        fetch.fetch("cadis", tmp_path, progress=False)


@pytest.mark.parametrize("given", ["nowhere", "empty", "text.txt"])
def test_from_something_else(given, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UsageError, match=given):
        fetch.fetch("ade20k", tmp_path / "root", given=tmp_path / given, progress=False)


def test_an_incomplete_folder_is_refused(make_tree, tmp_path):
    tree = make_tree("cityscapes")
    shutil.rmtree(tree / "gtFine")
    with pytest.raises(UsageError, match="has no gtFine"):
        fetch.fetch("cityscapes", tmp_path / "root", given=tree, progress=False)


@pytest.fixture
def context_server(server, make_tree, tmp_path, monkeypatch):
    """A server with the Pascal-Context files; the 459-class list holds the 59 names in another order."""
    tree = make_tree("pascal_context")
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
    parts = (
        fetch.Part("VOCdevkit", f"{server.url}/voc.tar"),
        fetch.Part("trainval", f"{server.url}/trainval.tar.gz"),
        fetch.Part("labels.txt", f"{server.url}/labels.txt"),
        fetch.Part("59_labels.txt", f"{server.url}/59_labels.txt", optional=True),
    )
    monkeypatch.setitem(fetch.SOURCES, "pascal_context", fetch.Source(parts, "home", "licence"))
    return tree


def test_pascal_context_downloads(context_server, tmp_path):
    root = tmp_path / "root"
    added = fetch.fetch("pascal_context", root, retry=RETRY, progress=False)
    assert added == ["VOCdevkit", "trainval", "labels.txt"]
    assert len(list((root / "trainval").glob("*.mat"))) == 5


class TestCityscapes:
    """The official downloader, against a local copy of its site."""

    @pytest.fixture
    def site(self, server, make_tree, tmp_path, monkeypatch):
        requests = pytest.importorskip("requests")
        pytest.importorskip("cityscapesscripts.download.downloader")
        tree = make_tree("cityscapes")
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
        return fetch.fetch("cityscapes", root, retry=RETRY, progress=False)

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
        monkeypatch.setattr("builtins.input", lambda prompt: "you")
        monkeypatch.setattr("getpass.getpass", lambda prompt: "secret")
        self.fetch(tmp_path / "root")
        assert site.requests[1][2]["username"] == ["you"]

    def test_a_wrong_password(self, site, tmp_path, monkeypatch):
        monkeypatch.setenv("CITYSCAPES_PASSWORD", "guess")
        with pytest.raises(MscsError, match="refused the account") as error:
            self.fetch(tmp_path / "root")
        assert "guess" not in str(error.value)

    def test_a_dropped_connection_is_resumed(self, site, tmp_path):
        path = "/file-handling/?packageID=0"
        site.faults[path] = [0.5]
        self.fetch(tmp_path / "root")
        assert len(site.ranges_of(path)) == 2
        assert site.ranges_of(path)[1] != "bytes=0-"

    def test_a_wrong_checksum(self, site, tmp_path):
        site.files["/md5-sum/?packageID=1"] = b"00  gtFine"
        with pytest.raises(MscsError, match=r"gtFine_trainvaltest\.zip: MD5"):
            self.fetch(tmp_path / "root")
        assert not (tmp_path / "root/gtFine").exists()
        assert (tmp_path / "root/leftImg8bit").exists()

    def test_no_access_to_the_package(self, site, tmp_path):
        site.files["/downloads/?list"] = b"[]"
        with pytest.raises(MscsError, match="don't have access"):
            self.fetch(tmp_path / "root")
