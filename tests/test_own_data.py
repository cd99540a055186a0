"""Data, networks and losses of the user's own: the page that tells it, as a script, and what it promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import yaml
from safetensors.torch import save_file

from mscs import modules
from mscs.cli import main
from mscs.datasets import build_dataset
from mscs.datasets.folders import folder_spec
from mscs.errors import MscsError, UsageError
from mscs.params import load_params
from mscs.paths import read_resolved, resolve_all
from mscs.results import write_json
from reproduce.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "own-data.md").read_text()
SMALLER = {
    "crop_size: [512, 512]": "crop_size: [64, 64]",
    "batch_size: 8": "batch_size: 4",
    "steps: 20000": "steps: 3",
    "validate_every: 1000": "validate_every: 2",
    "convnext_tiny.fb_in1k": "convnext_atto.d2_in1k",
    "head_channels: 256": "head_channels: 32",
}
BACKBONE = "convnext_atto.d2_in1k"


def block(language):
    [text] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return text


def add_entries(path, entries):
    """Put entries into params.yaml, each under the line that begins the block of its name."""
    text = path.read_text()
    for name, value in entries.items():
        [head] = re.findall(rf"^{name}:.*\n", text, re.MULTILINE)
        if isinstance(value, str):
            new = f"{name}: {value}\n"
        else:
            new = head + "".join(f"  {key}: {json.dumps(entry)}\n" for key, entry in value.items())
        text = text.replace(f"\n{head}", f"\n{new}", 1)
    path.write_text(text)


def write_photos(folder, values=(0, 1, 2), ignored=255):
    """Write 8 training and 2 validation images of three stripes, with a border that is ignored."""
    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            label = np.repeat(np.array(values, np.uint8), 28)[:, None].repeat(96, 1)
            noise = np.random.default_rng(i).integers(0, 40, (84, 96, 3))
            image = (np.searchsorted(values, label)[..., None] * 80 + noise).astype(np.uint8)
            label[:4] = ignored
            cv2.imwrite(str(folder / f"images/{split}/{i}.jpg"), image)
            cv2.imwrite(str(folder / f"labels/{split}/{i}.png"), label)


def fill_cache(folder):
    """Put weights of the page's backbone where the hub's client looks for downloaded ones."""
    repository = folder / f"models--timm--{BACKBONE}"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    for place in (repository / "refs", snapshot):
        place.mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    save_file(timm.create_model(BACKBONE).state_dict(), snapshot / "model.safetensors")


@pytest.mark.slow
def test_the_page_as_a_script(copy_project, tmp_path):
    project = copy_project(small=True)
    write_photos(project.parent / "photos")
    fill_cache(tmp_path / "weights")
    text = block("yaml")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    add_entries(project / "params.yaml", yaml.safe_load(text))
    (project / "mynets.py").write_text(block("python"))
    (tmp_path / "bin").mkdir()
    for name, words in (("python", ""), ("mscs", "-m mscs")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MSCS_WEIGHTS": str(tmp_path / "weights"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["sh", "-e", "-c", block("sh")],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "as it is: " in done.stdout
    assert "step 2 validation mIoU" in done.stdout
    rows = re.findall(r"^paper +(mydata-\S+) +0 +\d", done.stdout, re.MULTILINE)
    assert rows == ["mydata-hrnet-convnext-ce", "mydata-hrnet-convnext-ours"]
    ids = cv2.imread(str(project / "answers/ids/0.png"), cv2.IMREAD_GRAYSCALE)
    assert ids.shape == (84, 96)
    [losses] = project.glob("results/paper/runs/mydata-mynet-spread/seed-0/losses.csv")
    assert "spread" in losses.read_text().splitlines()[0].split(",")


OWN = {
    "datasets": {
        "mydata": {
            "folders": {split: [f"images/{split}", f"labels/{split}"] for split in ("train", "val")},
            "image_suffix": ".jpg",
            "classes": ["road", "building", "tree"],
            "class_values": [[7, 8], 11, 21],
            "ignored_values": [0, 255],
        }
    },
    "models": {
        "mynet": {
            "model": "mynets:MyNet",
            "backbone": "resnet18",
            "pretrained": False,
            "feature_maps": 4,
            "aux_weight": 0.0,
            "model_options": {"output_stride": 32, "projector_channels": 8},
        }
    },
    "losses": {
        "spread": {
            "embedding_loss": "mynets:Spread",
            "loss_options": {"weight": 0.5},
            "contrastive": False,
            "projector": "backbone",
        }
    },
    "schedules": {
        "mydata": {
            "crop_size": [64, 64],
            "optimizer": "sgd",
            "lr": 0.01,
            "lr_schedule": "poly",
            "weight_decay": 0.0,
            "batch_size": 4,
            "steps": 800,
        }
    },
    "runs": {
        "mydata-mynet-spread": {
            "dataset": "mydata",
            "model": "mynet",
            "loss": "spread",
            "schedule": "mydata",
        },
        "mydata-hrnet-hr48-ce": {
            "dataset": "mydata",
            "model": "hrnet-hr48",
            "loss": "ce",
            "schedule": "mydata",
        },
    },
}
RUN = "mydata-mynet-spread"


@pytest.fixture
def own(project, monkeypatch):
    """Return a project with data, a network and a loss of its own; its modules are forgotten afterwards."""
    before = set(sys.modules)
    add_entries(project / "params.yaml", OWN)
    write_photos(project / "data/mydata", values=(7, 11, 21), ignored=0)
    (project / "mynets.py").write_text(f"import mylayers\n{block('python')}")
    (project / "mylayers.py").write_text("WIDTH = 8\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield project
    for name in set(sys.modules) - before:
        if name.startswith("my"):
            del sys.modules[name]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def identities():
    return resolve_all(load_params(), "mini")["runs"]


def test_labels_hold_the_values_that_the_block_names(own, capsys):
    for words in (["info"], ["verify"], ["show", "--out", "sheet.png"]):
        assert main(["data", words[0], "mydata", *words[1:]]) == 0
    said = capsys.readouterr().out
    assert "3 classes: road, building, tree" in said
    assert "sound (train 8, val 2)" in said
    assert Path("sheet.png").is_file()
    spec = load_params().spec("mydata")
    dataset = build_dataset(spec, "train+val", Path("data/mydata"))
    assert len(dataset) == 10
    label = dataset[0].label
    assert [label[row, 0] for row in (0, 4, 28, 56)] == [255, 0, 1, 2]
    path = own / "data/mydata/labels/val/1.png"
    cv2.imwrite(str(path), np.full((84, 96), 8, np.uint8))
    assert (build_dataset(spec, "val", Path("data/mydata"))[1].label == 0).all()
    cv2.imwrite(str(path), np.full((84, 96), 9, np.uint8))
    assert main(["data", "verify", "mydata"]) == 1
    assert "labels/val/1.png: unknown label values [9]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"classes": ["road", "road", "tree"]},
            "classes: found 3 names, 2 different ones; expected 2 to 255",
        ),
        ({"classes": ["road"], "class_values": [1]}, "classes: found 1 names"),
        ({"class_values": [1, 2]}, "class_values: found 2 for 3 classes"),
        ({"class_values": [1, 2, [3, 1]]}, r"found \[1\] twice"),
        ({"ignored_values": [21]}, r"found \[21\] twice"),
        (
            {"class_values": [1, 2, 256]},
            r"class_values: found \[1, 2, 256\], expected less than or equal to 255",
        ),
        ({"colors": [[1, 2, 3]]}, "colors: found 1 for 3 classes"),
        ({"image_sufix": ".jpg"}, "unknown key 'image_sufix'; did you mean 'image_suffix'"),
        ({"folders": {"train": "images"}}, "datasets.mydata.folders.train: found 'images', expected a list"),
        ({"train_split": "training"}, "unknown split of mydata 'training'; did you mean 'train'"),
        ({"spec": "mynets:SPEC"}, "'mydata' has both folders and spec"),
        ({"classes": None}, "missing key 'classes'|expected a list"),
    ],
)
def test_a_wrong_block_is_told(own, changes, said):
    text = (own / "params.yaml").read_text()
    entry = OWN["datasets"]["mydata"]
    (own / "params.yaml").write_text(text.replace(json.dumps(entry), json.dumps(entry | changes)))
    with pytest.raises(UsageError, match=said):
        load_params().resolve(RUN)


@pytest.mark.parametrize(
    ("name", "path", "said"),
    [
        ("mydata", "nowhere:SPEC", "there is no module nowhere"),
        ("mydata", "mylayers:SPEC", "unknown name of module mylayers 'SPEC'"),
        ("mydata", "mylayers:WIDTH", "spec mylayers:WIDTH is of type int, expected"),
        ("mydata", "mybroken:SPEC", "importing mybroken fails with ZeroDivisionError"),
        ("mydata", "mylayers", "found 'mylayers'"),
        ("mydata", "mspec:SPEC", "is the dataset 'pets', expected .* the name 'mydata'"),
        ("cityscapes", "mspec:SPEC", "the package has one of this name"),
    ],
)
def test_a_wrong_import_path_is_told(own, name, path, said):
    (own / "mybroken.py").write_text("1 / 0\n")
    (own / "mspec.py").write_text(
        "from mscs.datasets.folders import folder_spec\n"
        "SPEC = folder_spec('pets', {'train': ('a', 'b'), 'val': ('c', 'd')}, ['cat', 'dog'])\n"
    )
    document = yaml.safe_load((own / "params.yaml").read_text())
    document["datasets"][name] = {"spec": path}
    (own / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    with pytest.raises(UsageError, match=said):
        load_params().spec(name)


def test_a_dataset_by_import_path(own, monkeypatch):
    (own / "myspec.py").write_text(
        "from mscs.datasets.folders import folder_spec\n"
        "SPEC = folder_spec('mydata', {s: (f'images/{s}', f'labels/{s}') for s in ('train', 'val')},\n"
        "    ['road', 'building', 'tree'], image_suffix='.jpg', class_values=(7, 11, 21),\n"
        "    ignored_values=(0,))\n"
    )
    edit(own / "params.yaml", json.dumps(OWN["datasets"]["mydata"]), '{"spec": "myspec:SPEC"}')
    found = resolve_all(load_params(), "mini")
    digest = modules.own_digest("myspec:SPEC")
    assert found["datasets"]["mydata"]["digest"] == digest
    assert found["runs"][RUN]["evaluate"]["numerics"]["myspec:SPEC"] == digest
    assert main(["data", "verify", "mydata"]) == 0


def test_missing_files_are_told(own):
    spec = load_params().spec("mydata")
    with pytest.raises(UsageError, match=r"no folder elsewhere/images/train, .*split 'train'.*--from FOLDER"):
        build_dataset(spec, "train", "elsewhere")
    (own / "data/mydata/labels/val/1.png").unlink()
    with pytest.raises(MscsError, match=r"val/1.jpg has no label: .*labels/val/1.png is missing"):
        build_dataset(spec, "val", "data/mydata")
    other = folder_spec("mydata", {"val": ("images/val", "labels/val")}, ["a", "b"], image_suffix=".bmp")
    with pytest.raises(UsageError, match=r"no name in data/mydata/images/val ends in '.bmp'"):
        build_dataset(other, "val", "data/mydata")


def test_what_is_added_leaves_the_other_runs_fresh(own):
    before = resolve_all(load_params(ROOT / "params.yaml"), "mini")
    after = resolve_all(load_params(), "mini")
    added = set(OWN["runs"])
    assert {run: after["runs"][run] for run in after["runs"].keys() - added} == before["runs"]
    assert {name: after["datasets"][name] for name in before["datasets"]} == before["datasets"]
    assert after["datasets"]["mydata"].items() >= OWN["datasets"]["mydata"].items()
    spread, ce = (after["runs"][run]["train"] for run in OWN["runs"])
    assert spread["numerics"].keys() >= {"folders", "mynets:MyNet", "mynets:Spread", "packages"}
    assert {"folders", "hrnet"} <= ce["numerics"].keys()
    write_json("resolved.json", after)
    settings = read_resolved(Path("resolved.json"), RUN)
    assert settings == load_params().resolve(RUN).settings
    assert settings.data.labels.raw_ids == ((7, 8), (11,), (21,))
    edit(own / "mylayers.py", "8", "9")
    with pytest.raises(UsageError, match="the code of mynets:MyNet has changed since; make it anew with"):
        read_resolved(Path("resolved.json"), RUN)


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("mynets.py", "self.weight * spread", "self.weight * 2 * spread", {RUN}),
        ("mynets.py", "import mylayers", "import mylayers  # a comment", set()),
        ("mylayers.py", "8", "9", {RUN}),
        ("params.yaml", "[0, 255]", "[0]", set(OWN["runs"])),
        ("params.yaml", '{"weight": 0.5}', '{"weight": 0.25}', {RUN}),
    ],
)
def test_an_edit_makes_stale_what_uses_it(own, file, old, new, stale):
    before = identities()
    edit(own / file, old, new)
    after = identities()
    assert {run for run in after if after[run] != before[run]} == stale


def test_a_training_notices_an_edit_of_the_network(own, capsys):
    assert main(["data", "verify", "mydata"]) == 0
    short = ["--set", "steps=2", "--set", "checkpoint_every=1"]
    assert main(["train", RUN, *short]) == 0
    assert main(["train", RUN, *short]) == 0
    assert "is trained under these settings" in capsys.readouterr().out
    edit(own / "mynets.py", "num_classes, 1)", "num_classes, 3, padding=1)")
    assert main(["train", RUN, *short]) == 2
    assert "--accept-changed" in capsys.readouterr().err
    assert main(["evaluate", RUN, *short]) == 1
    assert "another version of the code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("model_options={widht: 3}", "unknown option of model 'MyNet' 'widht'"),
        ("loss_options={wieght: 3}", r"mynets:Spread with loss_options {'wieght': 3}: .*unexpected keyword"),
        (
            "embedding_loss=mynets:MyNet",
            "embedding_loss mynets:MyNet is no mscs.losses.objective.EmbeddingLoss",
        ),
        ("projector=null", "embedding_loss needs a projector"),
    ],
)
def test_wrong_arguments_of_own_code_are_told(own, capsys, pair, said):
    assert main(["data", "verify", "mydata"]) == 0
    assert main(["train", RUN, "--set", pair]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_digest_covers_what_a_package_imports_of_itself_and_runs_nothing(tmp_path, monkeypatch):
    texts = {
        "mypackage/__init__.py": "1 / 0",
        "mypackage/nets.py": "from . import parts\nfrom .deep.layer import x\nimport torch, other",
        "mypackage/parts.py": "from mypackage import lonely",
        "mypackage/lonely.py": "",
        "mypackage/unused.py": "",
        "mypackage/deep/__init__.py": "",
        "mypackage/deep/layer.py": "from ..third import y",
        "mypackage/third.py": "",
        "other.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def covered():
        return {str(path.relative_to(tmp_path)) for path in modules.own_files("mypackage.nets:Net")}

    assert covered() == texts.keys() - {"mypackage/unused.py", "other.py"}, (
        "another package of the environment"
    )
    monkeypatch.chdir(tmp_path)
    assert covered() == texts.keys() - {"mypackage/unused.py"}
    with pytest.raises(UsageError, match=r"there is no module mypackage\.nothing"):
        modules.own_files("mypackage.nothing:Net")
    (tmp_path / "mypackage/third.py").write_text("def broken(:")
    with pytest.raises(UsageError, match=r"third.py, line 1: "):
        modules.own_digest("mypackage.nets:Net")


def test_the_pipeline_takes_the_new_runs_in(own):
    before = Pipeline(load_params(ROOT / "params.yaml"))
    after = Pipeline(load_params())
    root, rows = after.files().values()
    resolve = root["stages"].pop("resolve")
    assert {"mynets.py", "mylayers.py"} < set(resolve["deps"])
    old_root, old_rows = before.files().values()
    del old_root["stages"]["resolve"]
    assert root == old_root
    added = {name: stage for name, stage in rows["stages"].items() if stage != old_rows["stages"].get(name)}
    assert set(added) == {"fetch", "own_data", "train_mydata_seed0", "evaluate_mydata_seed0"}
    assert old_rows["stages"].keys() <= rows["stages"].keys()
    assert added["own_data"]["matrix"]["dataset"] == ["mydata"]
    assert after.data_stage("mydata") == "reproduce/rows/dvc.yaml:own_data@mini-mydata"
    assert after.data_stage("ade20k") == before.data_stage("ade20k")
