import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from mscs import build
from mscs.checkpoint import save_weights
from mscs.cli import main
from mscs.distributed import World
from mscs.evaluation import count_pixels, evaluate_weights, scored_label
from mscs.inference import Predictor
from mscs.metrics import scores
from mscs.models import ModelOutput
from mscs.params import load_params
from mscs.predictions import prediction_saver
from mscs.transforms import normalize

ROOT = Path(__file__).parent.parent
CITYSCAPES = "cityscapes-hrnet-hr48-ce-b8-40k"
CADIS = "cadis-ocrnet-r50-ce"


class ColourRule(nn.Module):
    """A fixed convolution: predictions that depend on the image and are never all of one class."""

    def __init__(self, classes):
        super().__init__()
        self.weight = torch.randn(classes, 3, 3, 3, generator=torch.Generator().manual_seed(3))

    def forward(self, images):
        return ModelOutput(F.conv2d(images, self.weight, padding=1), None, None)


def pieces(run, root):
    settings = load_params(ROOT / "params.yaml").resolve(run, "mini").settings
    dataset = build.open_dataset(settings, "val", root)
    return settings, dataset, Predictor(ColourRule(dataset.num_classes), build.protocol(settings))


def world(rank=0, size=1):
    return World(rank, size, torch.device("cpu"))


def test_the_scores_are_those_of_the_official_cityscapes_evaluation(generated, tmp_path):
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    root = generated("cityscapes")
    settings, dataset, predictor = pieces(CITYSCAPES, root)
    save = prediction_saver(tmp_path)

    confusion = count_pixels(
        predictor,
        dataset,
        settings,
        world(),
        multi_scale=False,
        on_prediction=lambda sample, prediction: save("ss", dataset, sample, prediction),
    )
    args = official.args
    args.quiet, args.JSONOutput, args.evalInstLevelScore = True, False, False
    args.predictionPath, args.predictionWalk = str(tmp_path / "ss"), None
    truths = [str(root / entry.label) for entry in dataset.entries]
    written = [official.getPrediction(args, truth) for truth in truths]
    theirs = official.evaluateImgLists(written, truths, args)
    ours = scores(confusion, "skip")
    for name, value in zip(dataset.classes, ours["class_iou"], strict=True):
        expected = theirs["classScores"][name]
        assert (value is None and np.isnan(expected)) or value == pytest.approx(100 * expected, abs=1e-9)
    assert ours["miou"] == pytest.approx(100 * theirs["averageScoreClasses"], abs=1e-9)
    assert 0 < ours["miou"] < 100


def one_of_two(rank, folder, root):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    settings, dataset, predictor = pieces(CITYSCAPES, root)
    confusion = count_pixels(predictor, dataset, settings, world(rank, 2), multi_scale=True)
    torch.save(confusion, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_what_one_counts(generated, tmp_path):
    root = generated("cityscapes")
    mp.spawn(one_of_two, (str(tmp_path), root), nprocs=2)
    settings, dataset, predictor = pieces(CITYSCAPES, root)
    alone = count_pixels(predictor, dataset, settings, world(), multi_scale=True)
    assert alone.dtype == torch.int64
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_mirrored_rows_of_cadis_count_but_are_not_saved(generated):
    settings, dataset, predictor = pieces(CADIS, generated("cadis"))
    assert settings.evaluation.score_padding
    seen = []
    confusion = count_pixels(
        predictor,
        dataset,
        settings,
        world(),
        multi_scale=False,
        on_prediction=lambda *pair: seen.append(pair),
    )
    labels = [scored_label(sample, settings) for sample, _ in seen]
    assert confusion.sum() == sum((label != 255).sum() for label in labels)
    for (sample, prediction), label in zip(seen, labels, strict=True):
        assert label.shape == (sample.label.shape[0] + 4, sample.label.shape[1])
        assert np.array_equal(label[2:-2], sample.label)
        assert prediction.shape == sample.label.shape


@pytest.mark.parametrize(
    ("run", "recipe", "expected"),
    [
        ("cityscapes-hrnet-hr48-ce", "paper", True),
        ("ade20k-ocrnet-hr48-ce", "paper", True),
        ("ade20k-deeplabv3-r101-ce", "paper", True),
        ("ade20k-deeplabv3-r101-ce", "upstream", False),
        ("ade20k-upernet-swint-ce", "paper", False),
    ],
)
def test_scores_are_resized_with_the_flag_of_the_run_s_network(run, recipe, expected):
    overrides = {"recipe": recipe, "short_side": 48}
    settings = load_params(ROOT / "params.yaml").resolve(run, "mini", overrides).settings
    predictor = Predictor(build.network(settings, 5, seed=0), build.protocol(settings))
    small = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    shown, inner = predictor._fit(small)
    logits = predictor._logits(normalize(shown)[None])[:, :, : inner[0], : inner[1]].detach()
    resized = F.interpolate(logits, (32, 40), mode="bilinear", align_corners=expected)
    assert torch.equal(predictor.scores(small), resized[0])


def test_weights_are_scored_per_mode(generated, tmp_path):
    overrides = {"evaluation": ["ss", "ms"]}
    settings = load_params(ROOT / "params.yaml").resolve(CITYSCAPES, "mini", overrides).settings
    save_weights(tmp_path / "w.safetensors", build.network(settings, 19, seed=0).state_dict(), {})
    root = generated("cityscapes")
    record, matrices = evaluate_weights(settings, 3, tmp_path / "w.safetensors", root, world())
    assert set(matrices) == {"ss-seed-3", "ms-seed-3"}
    for mode in ("ss", "ms"):
        found = scores(torch.from_numpy(matrices[f"{mode}-seed-3"]), settings.evaluation.absent_classes)
        assert record[mode] == {"miou": found["miou"], "std": None, "n": 1, "seeds": {"3": found}}


def test_evaluate_writes_predictions_from_the_command_line(generated, project):
    settings = load_params(ROOT / "params.yaml").resolve(CITYSCAPES, "mini").settings
    save_weights(project / "w.safetensors", build.network(settings, 19, seed=0).state_dict(), {})
    data = ["--set=train_images=8", "--set=val_images=3", "--set=image_size=[64, 96]"]
    command = ["evaluate", CITYSCAPES, "--device=cpu", "--data-root", str(generated("cityscapes")), *data]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*command, "--checkpoint=w.safetensors", "--save-predictions=out"]) == 0
    names = sorted(path.name for path in (project / "out" / "ss-seed-0").iterdir())
    assert len(names) == 3
    assert all(name.endswith("_pred_labelIds.png") for name in names)
    runs = project / "results/mini/runs"
    (run,) = runs.iterdir()
    (folder,) = run.iterdir()
    assert folder.name.startswith("seed-0+")  # the pipeline's own scores are not overwritten
    assert '"class_iou"' in (folder / "evaluation.json").read_text()
