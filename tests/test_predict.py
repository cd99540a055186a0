"""Prediction on images of one's own, and weights in other file formats."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from mscs.checkpoint import read_weights
from mscs.cli import main
from mscs.datasets.registry import dataset_spec

RUN = "cityscapes-hrnet-hr48-ce-b8-40k"
SMALL = [f"--set={pair}" for pair in ("train_images=8", "val_images=3", "image_size=[64, 96]", "threads=1")]
SMALL += ["--set=steps=1", "--set=crop_size=[64, 96]", "--set=log_every=1"]
LABELS = dataset_spec("cityscapes").labels()


@pytest.fixture
def trained(project, generated):
    """Return the folder of the dataset that a run of one step was trained on, beside its results."""
    root = generated("cityscapes")
    assert main(["train", RUN, "--data-root", str(root), *SMALL]) == 0
    return root


def weights_of(project):
    (path,) = project.glob("work/mini/runs/*/weights/seed-0.safetensors")
    return path


def ids_of(path):
    return np.asarray(Image.open(path))


def test_predictions_are_those_that_are_scored(trained, project, capsys):
    saved = ["--save-predictions", "saved"]
    assert main(["evaluate", RUN, "--data-root", str(trained), *SMALL, *saved]) == 0
    folder = next(trained.glob("leftImg8bit/val/*"))
    assert main(["predict", RUN, str(folder), *SMALL, "--out", "out"]) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    expected = sorted((project / "saved/ss-seed-0").rglob("*.png"))
    ids, color, overlay = (sorted((project / "out" / kind).iterdir()) for kind in ("ids", "color", "overlay"))
    assert len(expected) == len(ids) == len(color) == len(overlay) == 3
    for one, other, colored in zip(expected, ids, color, strict=True):
        assert np.array_equal(ids_of(one), ids_of(other))
        lookup = np.frombuffer(LABELS.lookup(), np.uint8)
        assert np.array_equal(ids_of(colored), np.array(LABELS.colors, np.uint8)[lookup[ids_of(other)]])
    image = ids_of(sorted(folder.glob("*.png"))[0]).astype(float)
    blended = 0.4 * image + 0.6 * ids_of(color[0])
    assert np.abs(ids_of(overlay[0]) - blended).max() <= 1


def test_one_image_of_any_size_and_kind(trained, project):
    Image.fromarray(np.arange(50 * 70, dtype=np.uint8).reshape(50, 70)).save("grey.jpg")
    assert main(["predict", RUN, "grey.jpg", *SMALL, "--ms"]) == 0
    (folder,) = project.glob("work/mini/runs/*/predictions")
    assert ids_of(folder / "color" / "grey.png").shape == (50, 70, 3)


def test_a_broken_image_is_named_and_the_others_are_predicted(trained, project, capsys):
    (project / "photos").mkdir()
    good = next(trained.glob("leftImg8bit/val/*/*.png"))
    shutil.copy(good, project / "photos" / "good.png")
    (project / "photos" / "bad.png").write_bytes(good.read_bytes()[:300])
    assert main(["predict", RUN, "photos", *SMALL, "--out", "out"]) == 1
    Image.new("RGB", (8, 8)).save("photos/tiny.png")
    assert "photos/bad.png: cannot be decoded" in capsys.readouterr().err
    assert main(["predict", RUN, "photos", *SMALL, "--out", "out"]) == 1
    assert "photos/tiny.png: images are 8x8 pixels" in capsys.readouterr().err
    assert [path.name for path in (project / "out" / "color").iterdir()] == ["good.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], "no image or folder nowhere.png"),
        (["empty"], "empty holds no images"),
        (["a.png", "a.jpg"], "would have predictions of one name"),
        (["a.png", "--out", "a.png"], "is a file; name a folder"),
        (["a.png"], "train the run first"),
        (["a.png", "--checkpoint", "none.pth"], "no weight file none.pth"),
    ],
)
def test_misuse_is_named(project, capsys, arguments, words):
    (project / "empty").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (64, 64)).save(name)
    assert main(["predict", RUN, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_weights_of_torch_save_are_scored_and_asked_like_the_runs_own(trained, project, capsys, suffix):
    command = ["evaluate", RUN, "--data-root", str(trained), *SMALL]
    tensors = read_weights(weights_of(project))[0]
    wrapped = {"state_dict": {f"module.{name}": value for name, value in tensors.items()}, "epoch": 3}
    torch.save(wrapped if suffix == ".pth" else tensors, f"own{suffix}")
    assert main(command) == main([*command, "--checkpoint", f"own{suffix}"]) == 0
    folders = sorted(project.glob("results/mini/runs/*/seed-0*"))
    assert len(folders) == 2
    assert len({(folder / "confusion.json").read_text() for folder in folders}) == 1
    torch.save(dict.fromkeys(tensors, torch.tensor([float("nan")])), f"own{suffix}")
    assert main([*command, "--checkpoint", f"own{suffix}"]) == 1
    assert "not finite" in capsys.readouterr().err


def test_training_goes_on_from_a_network_of_ones_own(trained, project, capsys):
    start = read_weights(weights_of(project))[0]
    torch.save(start, "own.pth")
    command = [
        "train",
        RUN,
        "--data-root",
        str(trained),
        *SMALL,
        "--set=lr=0",
        "--set=initial_weights=own.pth",
    ]
    assert main(command) == 0
    weights = [read_weights(path)[0] for path in project.glob("work/mini/runs/*/weights/*.safetensors")]
    assert len(weights) == 2
    name = "backbone.body.conv1.weight"
    assert all(torch.equal(found[name], start[name]) for found in weights)
    capsys.readouterr()
    torch.save({n: x if n.startswith("backbone") else x.reshape(-1)[:1] for n, x in start.items()}, "own.pth")
    assert main([*command, "--fresh"]) == 0
    assert "tensors do not fit and are drawn anew: " in capsys.readouterr().out
    torch.save({n.removeprefix("backbone.body."): x for n, x in start.items()}, "own.pth")
    assert main([*command, "--fresh"]) == 2
    assert "weights of a backbone alone go to pretrained" in capsys.readouterr().err
