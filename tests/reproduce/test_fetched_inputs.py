"""What the stages that fetch do; and from nothing to a table, with a server here in the publishers' place.

For that a copy of the project is cut to three steps, a tiny network and a few images in the real layout. All
else stays as it is.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from mscs.datasets import DATASETS
from mscs.datasets.toy import write_dataset
from mscs.errors import MscsError, UsageError
from mscs.params import load_params
from mscs.results import write_json
from reproduce import cli, stages
from reproduce.pipeline import Pipeline

SITE = "https://www.cityscapes-dataset.com"
BACKBONE = "test_resnet.r160_in1k"
RUNS = ("cityscapes-hrnet-hr48-ours-equal-weights", "cityscapes-hrnet-hr48-ours")
SPLITS = {"train": 4, "val": 2}
CUT = {
    "train_split": "train",
    "crop_size": [32, 64],
    "steps": 3,
    "batch_size": 4,
    "precision": "fp32",
    "evaluation": ["ss"],
    "min_views": 1,
    "threads": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "class_weighted": False,
}
REDIRECTION = """
import os

import requests


class Local(requests.adapters.HTTPAdapter):
    def send(self, request, **options):
        request.url = request.url.replace("{site}", os.environ["LOCAL_SITE"])
        return super().send(request, **options)


plain = requests.Session.__init__


def redirected(self):
    plain(self)
    self.mount("{site}", Local())


requests.Session.__init__ = redirected
"""


class Publisher:
    """Cityscapes' site, whose account is me with the password secret, and a hub with one file of weights."""

    def __init__(self, archives, weights):
        self.asked = []
        answers = {"/login": b"", "/downloads/?list": b"[]"}
        listing = []
        for number, (name, content) in enumerate(archives.items()):
            listing.append({"name": name, "packageID": number, "size": "1MB", "thirdparty": "0"})
            answers[f"/md5-sum/?packageID={number}"] = f"{hashlib.md5(content).hexdigest()}  {name}".encode()
            answers[f"/file-handling/?packageID={number}"] = content
        answers["/downloads/?list"] = json.dumps(listing).encode()
        answers[f"/timm/{BACKBONE}/resolve/main/model.safetensors"] = weights
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.answer(b"", 302 if "password=secret" in form else 200)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                if self.command == "GET":
                    publisher.asked.append(self.path)
                found = answers.get(self.path)
                self.answer(found or b"", 200 if found is not None else 404)

            def answer(self, content, status):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                if status == 302:
                    self.send_header("Location", "/")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def files(self):
        """Return which files were sent."""
        return [path for path in self.asked if "file-handling" in path or path.endswith(".safetensors")]


@pytest.fixture(scope="module")
def publisher(tmp_path_factory):
    import timm
    from safetensors.torch import save

    root = tmp_path_factory.mktemp("publisher") / "cityscapes"
    write_dataset("cityscapes", root, **SPLITS, image_size=(64, 128))
    archives = {}
    for part in ("leftImg8bit", "gtFine"):
        content = BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted((root / part).rglob("*.png")):
                archive.write(path, path.relative_to(root))
        archives[f"{part}_trainvaltest.zip"] = content.getvalue()
    found = Publisher(archives, save(timm.create_model(BACKBONE.partition(".")[0]).state_dict()))
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(scope="module")
def fresh(new_pipeline, publisher):
    """Return a copy of the project, cut down, without data, and an environment of a machine without cache."""

    def cut(document):
        document["profile"] = "paper"
        document["profiles"]["paper"] = {
            "rewrite": {"backbone": {"hrnet_w48.ms_in1k": BACKBONE}},
            "models": {"hrnet-*": {"model_options": {"output_stride": 32, "head_channels": 8}}},
            "runs": dict.fromkeys(RUNS, CUT),
        }

    def fewer_images(folder):
        reader = folder / "mscs/datasets/cityscapes.py"
        text, changes = re.subn(
            r"^SPLITS = .*$", f"SPLITS = {SPLITS | {'test': 1}}", reader.read_text(), flags=re.M
        )
        assert changes == 1
        reader.write_text(text)

    folder = new_pipeline(cut, fewer_images)
    patches = folder.with_name("patches")
    patches.mkdir()
    (patches / "sitecustomize.py").write_text(REDIRECTION.replace("{site}", SITE))
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    for name in ("MSCS_DATA", "CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD"):
        environment.pop(name, None)
    environment |= {
        "PYTHONPATH": f"{folder}:{patches}",
        "LOCAL_SITE": publisher.url,
        "HF_ENDPOINT": publisher.url,
        "MSCS_WEIGHTS": str(folder.with_name("weights")),
        "MSCS_RUNTIME": "native",
    }
    return folder, environment


def start(fresh, *command, **more):
    folder, environment = fresh
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


ACCOUNT = {"CITYSCAPES_USERNAME": "me", "CITYSCAPES_PASSWORD": "secret"}


@pytest.mark.slow
def test_from_nothing_to_a_table_and_nothing_is_done_twice(fresh, publisher):
    folder, _ = fresh
    without = start(fresh, "dvc", "repro", "--keep-going", "tables_1b@paper")
    text = without.communicate()[0]
    assert without.returncode != 0
    assert "set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD" in text
    # what needs no account is there all the same
    assert (folder / f"results/paper/weights/{BACKBONE}.json").exists()

    killed = start(fresh, "dvc", "repro", "tables_1b@paper", **ACCOUNT)
    for line in killed.stdout:
        if "step 2/3" in line:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    again = start(fresh, "dvc", "repro", "tables_1b@paper", **ACCOUNT)
    text = again.communicate()[0]
    assert again.returncode == 0, text
    table = json.loads((folder / "results/paper/tables/1b.json").read_text())
    assert len(re.findall(r"step 3/3", text)) == 2, text
    assert len(re.findall(r"step 1/3", text)) == 1, "the killed training goes on from its checkpoint"
    assert table
    assert len(publisher.files()) == len(set(publisher.files())) == 3, publisher.asked
    fetched = {path.stem for path in (folder / "results/paper/fetch").iterdir()}
    assert fetched == {"cityscapes"}, "of the other datasets the table needs nothing"
    assert [path.stem for path in (folder / "results/paper/weights").iterdir()] == [BACKBONE]
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"secret" not in stored

    # a clone has records and results and no files: nothing is fetched or trained for what is there
    for name in ("data", "work", ".dvc/cache", "../weights"):
        shutil.rmtree(folder / name)
    code = folder / "reproduce/tables.py"
    code.write_text(f"{code.read_text()}# edited\n")
    clone = start(fresh, "dvc", "repro", "--allow-missing", "tables_1b@paper")
    text = clone.communicate()[0]
    assert clone.returncode == 0, text
    assert re.findall(r"^> reproduce/stage (.*)$", text, flags=re.M) == ["tables paper 1b"], text
    assert not (folder / "data").exists()
    assert len(publisher.files()) == 3


def draw(root, seed):
    """Draw a small CamVid, as if it were the real one."""
    write_dataset("camvid", root, seed=seed, train=3, val=2, image_size=(32, 48))
    (root / "generated.json").unlink()
    for kind in ("", "annot"):
        shutil.copytree(root / f"val{kind}", root / f"test{kind}")
    return root


@pytest.fixture
def camvid(project, monkeypatch):
    """Return the folder of CamVid, which has few pictures here and is taken from another folder."""
    for name in ("MSCS_DATA", "MSCS_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    spec = DATASETS["camvid"]
    parts = tuple(dataclasses.replace(part, files={f"{part.pattern}/*.png": 2}) for part in spec.parts)
    counts = {"train": 3, "val": 2, "test": 2}
    small = dataclasses.replace(spec, splits=counts, parts=parts, digests=None)
    monkeypatch.setitem(DATASETS, "camvid", small)
    monkeypatch.setenv("MSCS_FROM_CAMVID", str(draw(project.parent / "given", seed=0)))
    stages.resolve("small", check=False)
    return project / "data/camvid"


def record(kind):
    return json.loads(Path("results/small", kind, "camvid.json").read_text())


def test_a_fetched_dataset_is_recorded_and_checked(camvid, capsys):
    assert stages.run(["fetch", "small", "camvid"]) == 0
    assert "added " in capsys.readouterr().out
    assert record("fetch")["splits"] == {"train": 3, "val": 2, "test": 2}
    assert stages.run(["data", "small", "camvid"]) == 0
    assert record("data")["digest"] == json.loads((camvid / "manifest.json").read_text())["digest"]
    assert stages.run(["fetch", "small", "camvid"]) == 0
    assert "everything is there" in capsys.readouterr().out


def test_a_recorded_dataset_that_is_not_here_is_brought_again(camvid, monkeypatch):
    stages.restore("small", "data", "camvid")
    assert not camvid.exists(), "nothing is recorded yet"
    for verb in ("fetch", "data"):
        stages.run([verb, "small", "camvid"])
    before = record("data")
    shutil.rmtree(camvid)
    stages.restore("small", "data", "camvid")
    assert record("data") == before
    assert (camvid / "manifest.json").exists()
    monkeypatch.delenv("MSCS_FROM_CAMVID")
    stages.restore("small", "data", "camvid")  # asks nobody

    shutil.rmtree(camvid)
    draw(camvid, seed=1)
    with pytest.raises(MscsError, match=r"camvid is not what results/small/data/camvid.json said"):
        stages.restore("small", "data", "camvid")
    assert record("data") != before
    stages.restore("small", "data", "camvid")


def test_before_a_training_its_inputs_are_brought(camvid, monkeypatch):
    for verb in ("fetch", "data"):
        stages.run([verb, "small", "camvid"])
    shutil.rmtree(camvid)
    write_json("results/small/weights/tf_efficientnet_lite0.json", {"tf_efficientnet_lite0": "0" * 64})
    monkeypatch.setenv("MSCS_WEIGHTS", "cache")
    seen = []

    def train(*names):
        seen.append((names, (camvid / "manifest.json").exists()))

    def bring(profile, backbone):
        seen.append((profile, backbone))
        write_json(f"cache/{backbone}.safetensors", {})

    monkeypatch.setitem(stages.VERBS, "train", train)
    monkeypatch.setitem(stages.VERBS, "weights", bring)
    for _ in range(2):
        assert stages.run(["train", "small", "cityscapes-hrnet-hr48-ce", "0"]) == 0
    training = (("small", "cityscapes-hrnet-hr48-ce", "0"), True)
    assert seen == [("small", "tf_efficientnet_lite0"), training, training]


@pytest.mark.parametrize("made_from", ["0" * 64, "1" * 64])
def test_what_was_trained_from_other_weights_is_trained_again(camvid, monkeypatch, made_from):
    run, name = "cityscapes-hrnet-hr48-ce", "tf_efficientnet_lite0"
    write_json(f"results/small/weights/{name}.json", {name: "0" * 64})
    made = Path("results/small/runs") / run / "seed-0/run.json"
    write_json(made, {"pretrained_weights": {name: made_from}})
    jobs = []
    monkeypatch.setattr(stages.launch, "train", lambda job, argv: jobs.append((job.fresh, argv)) or 0)
    stages.train("small", run, "0")
    stages.train("small", run, "0")  # after it was killed, it goes on
    other = made_from != "0" * 64
    assert [fresh for fresh, _ in jobs] == [other, False]
    assert ["--fresh" in argv for _, argv in jobs] == [other, False]
    assert made.exists() is not other


def test_a_dataset_that_cannot_be_had_stops_only_the_runs_that_need_it(project, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "check", lambda self: None)
    paper = Pipeline(load_params(), "paper")
    calls, side = [], []

    def dvc(command, **_):
        calls.append(command[3:])
        for name in ("data/cadis", "weights/resnet50.tv_in1k"):  # all that can be had
            write_json(f"results/paper/{name}.json", {})
        return SimpleNamespace(returncode=255)

    def side_by_side(_pipeline, runs, _workers, **options):
        side.append((runs, options["keep_going"]))
        return 0

    monkeypatch.setattr(cli.subprocess, "run", dvc)
    monkeypatch.setattr(cli, "side_by_side", side_by_side)
    assert cli.main(["run", "--profile", "paper", "2b", "fig4", "--jobs", "2"]) == 255
    shared = paper.shared_stages(paper.wanted(["2b", "fig4"])[1])
    going_on = ["repro", "--allow-missing", "--keep-going"]
    assert calls == [[*going_on, *shared], [*going_on, "tables_2b@paper", "qualitative@paper"]]
    assert side == [(["cadis-ocrnet-r50-ce", "cadis-ocrnet-r50-ours"], False)], (
        "a training that fails still stops the rest"
    )
    assert "left out, see above: cityscapes-hrnet-hr48-ce, " in capsys.readouterr().err


def test_who_has_no_account_is_told_what_to_do(project, monkeypatch):
    for name in ("MSCS_DATA", "MSCS_FROM_CITYSCAPES", "CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin", BytesIO())
    with pytest.raises(UsageError, match=r"cityscapes-dataset.com/register/.*CITYSCAPES_USERNAME"):
        stages.fetch("paper", "cityscapes")
    with pytest.raises(UsageError, match=r"registration: get the archive at .*MSCS_FROM_CADIS"):
        stages.fetch("paper", "cadis")
    assert not Path("results").exists()
