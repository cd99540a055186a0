import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mscs.build import network, open_dataset, protocol
from mscs.distributed import World
from mscs.errors import UsageError
from mscs.evaluation import count_pixels
from mscs.inference import Predictor
from mscs.metrics import scores
from mscs.models import build_model, count_parameters
from reproduce import calibrate as module
from reproduce.calibrate import (
    CHECKPOINTS,
    SegFormer,
    calibrate,
    check_file,
    checkpoint_settings,
    find,
    judge,
)
from reproduce.cli import main

ROOT = Path(__file__).parents[2]
WORLD = World(0, 1, torch.device("cpu"))
NARROW = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 4], "window_size": 4}
SMALL = {
    "short_side": 64,
    "ms_scales": [0.5],
    "threads": 1,
    "model_options": {
        "channels": 16,
        "aux_channels": 8,
        "ppm_upsample_first": False,
        "backbone_options": NARROW,
    },
}


def published_names(tensors):
    """Return this package's UPerNet-Swin tensors under the names of the Swin authors' checkpoints."""
    rules = [
        (r"^backbone\.norms\.(\d)", r"backbone.norm\1"),
        (
            r"^backbone\.body\.layers\.(\d)\.downsample",
            lambda m: f"backbone.layers.{int(m[1]) - 1}.downsample",
        ),
        (r"^backbone\.body\.", "backbone."),
        (r"^classifier\.", "decode_head.conv_seg."),
        (r"^aux_head\.classifier\.", "auxiliary_head.conv_seg."),
        (r"^aux_head\.conv\.", "auxiliary_head.convs.0.conv."),
        (r"^aux_head\.norm\.", "auxiliary_head.convs.0.bn."),
        (r"^ppm\.convs\.(\d)\.", r"decode_head.psp_modules.\1.1."),
        (r"^ppm\.fuse\.", "decode_head.bottleneck."),
        (r"^lateral\.", "decode_head.lateral_convs."),
        (r"^smooth\.", "decode_head.fpn_convs."),
        (r"^fuse\.", "decode_head.fpn_bottleneck."),
        (r"^(decode_head\.(?!conv_seg).*)\b0\.(?=\w+$)", r"\1conv."),
        (r"^(decode_head\.(?!conv_seg).*)\b1\.(?=\w+$)", r"\1bn."),
    ]
    renamed = {}
    for name, value in tensors.items():
        if name == "aux_head.conv.bias":
            continue  # theirs has none
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


@pytest.fixture
def small(params, tmp_path):
    """Return an entry with a narrow network, its weights under the published names, and the network."""
    entry = replace(CHECKPOINTS["upernet-swin-t"], overrides=SMALL)
    model = network(checkpoint_settings(entry, params), 150, seed=1, projector=False)
    with torch.no_grad():
        model.aux_head.conv.bias.zero_()
    path = tmp_path / "weights.pth"
    torch.save({"meta": {}, "state_dict": published_names(model.state_dict())}, path)
    return entry, path, model


def test_a_checkpoint_scores_what_its_network_scores(small, params, generated):
    entry, path, model = small
    root = generated("ade20k")
    settings = checkpoint_settings(entry, params)
    assert (settings.evaluation.multi_scale.ms_merge, settings.evaluation.absent_classes) == (
        "softmax",
        "skip",
    )
    predictor = Predictor(model, protocol(settings))
    dataset = open_dataset(settings, "val", root)
    expected = {
        mode: scores(count_pixels(predictor, dataset, settings, WORLD, multi_scale=mode == "ms"), "skip")[
            "miou"
        ]
        for mode in ("ss", "ms")
    }
    entry = replace(entry, published={"ss": expected["ss"] + 0.1, "ms": expected["ms"] + 9})
    found = calibrate(entry, path, root, params, WORLD)
    for mode, miou in expected.items():
        assert found["scores"][mode]["miou"] == pytest.approx(miou, abs=1e-9)
    assert found["scores"]["ss"]["agrees"]
    assert not found["scores"]["ms"]["agrees"]
    assert found["checksum"] == "not the recorded one"
    assert found["images"] == 3


def test_the_command_says_whether_it_agrees(small, params, generated, tmp_path, monkeypatch, capsys):
    entry, path, _ = small
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CHECKPOINTS, "small", entry)
    command = ["calibrate", "small", "--weights", str(path), "--data", str(generated("ade20k")), "--ss"]
    assert main(command) == 1
    assert "does NOT agree" in capsys.readouterr().out
    monkeypatch.setitem(module.TOLERANCES, "ss", 100.0)
    assert main(command) == 0
    assert (tmp_path / "results/calibration/small.json").exists()
    assert main(["calibrate", "upernet-swin-x", "--weights", "x", "--data", "y"]) == 2
    assert main(["calibrate", "small", "--weights", "missing.pth", "--data", str(generated("ade20k"))]) == 2
    assert main(["calibrate", "small"]) == 2
    capsys.readouterr()
    assert main(["calibrate"]) == 0
    listed = capsys.readouterr().out
    assert all(entry.url in listed for entry in CHECKPOINTS.values())


@pytest.mark.parametrize(
    ("name", "millions"), [("upernet-swin-t", 60), ("upernet-swin-s", 81), ("upernet-swin-b", 121)]
)
def test_the_listed_networks_are_the_published_ones(name, millions, params):
    """Parameter counts of the Swin authors' README."""
    settings = checkpoint_settings(CHECKPOINTS[name], params)
    with torch.device("meta"):
        model = build_model(settings.model.name, settings.model.backbone, 150, **settings.model.options)
    assert round(count_parameters(model) / 1e6) == millions
    assert settings.model.options["ppm_upsample_first"] is False


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in CHECKPOINTS.items() if "upernet" in name])
def test_checkpoints_of_full_size_load(name, params, tmp_path):
    entry = CHECKPOINTS[name]
    settings = checkpoint_settings(entry, params)
    model = network(settings, 150, seed=1, projector=False)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": published_names(model.state_dict())}, path)
    loaded = module.load_model(entry, settings, 150, path).state_dict()
    for key, value in model.state_dict().items():
        if key != "aux_head.conv.bias":
            assert torch.equal(loaded[key], value), key


def test_a_score_agrees_within_the_tolerance():
    assert judge(44.3, 44.51, 0.3)["agrees"]
    assert not judge(44.9, 44.51, 0.3)["agrees"]
    assert judge(44.3, 44.51, 0.3)["difference"] == pytest.approx(-0.21)


def test_checksums(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    entry = CHECKPOINTS["upernet-swin-s"]
    assert check_file(entry, path) == {"sha256": empty, "checksum": "none recorded"}
    assert check_file(replace(entry, sha256=empty), path)["checksum"] == "as recorded"
    with pytest.raises(UsageError, match="did you mean 'hrnet-w48'"):
        find("hrnet-w84")


def test_segformer_comes_from_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"mscs\[calibrate\]"):
        SegFormer(tmp_path)

    class Net(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, folder, local_files_only):
            assert local_files_only
            return cls()

        def forward(self, pixel_values):
            return types.SimpleNamespace(logits=pixel_values[:, :2, ::4, ::4])

    fake = types.SimpleNamespace(SegformerForSemanticSegmentation=Net)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    assert SegFormer(tmp_path)(torch.ones(1, 3, 32, 64)).logits.shape == (1, 2, 32, 64)
    with pytest.raises(UsageError, match="no folder"):
        SegFormer(tmp_path / "missing")


def test_checkpoints_are_scored_at_the_size_they_were_trained_at(params):
    sizes = {
        name: checkpoint_settings(entry, params).evaluation.short_side for name, entry in CHECKPOINTS.items()
    }
    assert {name: size for name, size in sizes.items() if size} == {
        "upernet-swin-t": 512,
        "upernet-swin-s": 512,
        "upernet-swin-b": 512,
        "segformer-b5": 640,
    }
