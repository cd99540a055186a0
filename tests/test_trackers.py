"""What watches a training sees all of it, in the right colours, and harms nothing."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mscs.errors import UsageError
from mscs.trackers import build_tracker, sample_pictures
from mscs.train import Snapshot
from mscs.transforms import normalize


def snapshot(steps, seed=0, **tensors):
    blank = dict.fromkeys(("images", "labels", "logits"), torch.zeros(0))
    history = [{"step": step, "lr": 0.1, "loss": 1.0 / step} for step in steps]
    return Snapshot(seed=seed, history=history, **{**blank, **tensors})


def test_dvclive_curves_are_whole_after_a_resumption(tmp_path):
    pytest.importorskip("dvclive")
    first = build_tracker("dvclive", tmp_path)
    for end in (2, 4, 6):
        first(snapshot(range(2, end + 1, 2)))
    resumed = build_tracker("dvclive", tmp_path)  # from step 4: row 6 was written, and comes again
    resumed(snapshot([2, 4, 6]))
    resumed(snapshot([2, 4, 6, 8]))
    folder = tmp_path / "dvclive" / "seed-0"
    lines = (folder / "plots" / "metrics" / "loss.tsv").read_text().splitlines()
    assert [int(line.split("\t")[0]) for line in lines[1:]] == [2, 4, 6, 8]
    assert json.loads((folder / "metrics.json").read_text())["step"] == 8
    assert not list(tmp_path.rglob("dvc.yaml"))


def test_tensorboard_gets_every_row_of_every_seed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observe = build_tracker("tensorboard", tmp_path)
    observe(snapshot([5]))
    observe(snapshot([5, 10]))
    observe(snapshot([5], seed=1))
    for seed, steps in ((0, [5, 10]), (1, [5])):
        log = EventAccumulator(str(tmp_path / "tensorboard" / f"seed-{seed}"))
        log.Reload()
        assert [event.step for event in log.Scalars("loss")] == steps


@pytest.mark.parametrize(
    ("name", "module"), [("dvclive", "dvclive"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"needs the package {name}.*mscs\[log\]"):
        build_tracker(name, tmp_path)(snapshot([1]))


def test_an_unknown_log_is_refused(tmp_path):
    with pytest.raises(UsageError, match="tensorboard"):
        build_tracker("tensorbord", tmp_path)


def test_samples_show_image_label_and_prediction(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    labels = torch.full((1, 8, 8), 255)
    labels[:, :, 4:] = 1
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1, 0] = 1.0
    tensors = {"images": normalize(pixels)[None], "labels": labels, "logits": logits}
    observe = sample_pictures(tmp_path, [(10, 20, 30), (200, 100, 50)], every=2)
    for end in (1, 2, 3):
        observe(snapshot(range(1, end + 1), **tensors))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "seed-0-step-000001.png",
        "seed-0-step-000003.png",
    ]
    sheet = np.asarray(Image.open(tmp_path / "seed-0-step-000003.png"))
    assert np.array_equal(sheet[:, :8], pixels)
    assert sheet[0, 8].tolist() == [0, 0, 0]
    assert sheet[0, 15].tolist() == [200, 100, 50]
    assert sheet[0, 16].tolist() == [200, 100, 50]
    assert sheet[7, 23].tolist() == [10, 20, 30]
