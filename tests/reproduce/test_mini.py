"""What profile mini promises: it learns, colour alone does not do, every scale has something to contrast."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mscs.build import open_dataset, train_transform
from mscs.datasets.toy import write_dataset
from mscs.loader import draws_of_step
from mscs.seeding import numpy_generator
from reproduce.baselines import colour_miou
from reproduce.pipeline import default_runs
from reproduce.tables import Results

RESULTS = Path(__file__).parents[2] / "results" / "mini"


def ce_runs():
    from mscs.params import load_params

    params = load_params(Path(__file__).parents[2] / "params.yaml")
    return [run for run in default_runs(params) if params.resolve(run).settings.loss.name == "ce"]


@pytest.mark.parametrize("run", ce_runs())
def test_every_ce_run_learned(run, params):
    record = Results("mini", RESULTS.parent).evaluation(run)
    if record is None:
        pytest.skip("needs the results of `make reproduce`, which are no part of the repository")
    dataset = params.run_info(run)["dataset"]
    colour = json.loads((RESULTS / "data" / f"{dataset}.json").read_text())["colour_miou"]
    miou = record["ss"]["miou"]
    assert miou >= {"cityscapes": 40, "cadis": 40, "ade20k": 25, "pascal_context": 25}[dataset]
    assert miou < 95
    assert colour < 0.8 * miou, "a per-pixel colour classifier stays well below"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, params):
    def draw(settings):
        root = tmp_path_factory.getbasetemp() / f"scenes-{settings.data.name}"
        if not root.exists():
            size = settings.data.image_size
            write_dataset(settings.data.name, root, train=8, val=1, image_size=size)
        return root

    return draw


@pytest.mark.parametrize(
    "run",
    [
        "cityscapes-hrnet-hr48-ours",
        "cityscapes-hrnet-hr48-ours-b8-40k",
        "ade20k-upernet-swins-ours",
        "cadis-ocrnet-r50-ours",
        "pascal_context-hrnet-hr48-ours",
    ],
)
def test_every_scale_has_two_groups_and_two_classes_in_most_steps(params, scenes, run):
    settings = params.resolve(run, "mini").settings
    dataset = open_dataset(settings, "train", scenes(settings))
    transform = train_transform(settings)
    strides = {4: (4, 8, 16, 32), 3: (4, 8, 8), 2: (4, 8)}[settings.model.feature_maps]
    enough = {stride: [] for stride in strides}
    for step in range(4):
        labels = [
            transform(dataset[draw.sample], numpy_generator(0, "augment", draw.epoch, draw.sample))[1]
            for draw in draws_of_step(len(dataset), settings.schedule.batch_size, 0, step)
        ]
        for first in range(0, len(labels), settings.schedule.images_per_group):
            group = labels[first : first + settings.schedule.images_per_group]
            for stride in strides:
                sets = [
                    int(value)
                    for label in group
                    for value, count in zip(*_counts(label[::stride, ::stride]), strict=True)
                    if value != 255 and count >= settings.loss.contrastive.min_views
                ]
                enough[stride].append(len(sets) >= 2 and len(set(sets)) >= 2)
    for stride, outcomes in enough.items():
        assert np.mean(outcomes) > 0.6, f"stride {stride}: {np.mean(outcomes):.0%}"


def _counts(label):
    values, counts = torch.unique(label, return_counts=True)
    return values.tolist(), counts.tolist()


def test_a_colour_that_tells_the_class_is_found_by_the_colour_baseline():
    class Flat:
        num_classes, ignore_index = 3, 255

        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

        def __getitem__(self, i):
            from mscs.datasets import Sample

            label = np.random.default_rng(i).integers(0, 3, (8, 8)).astype(np.uint8)
            return Sample((label[..., None] * 100).repeat(3, 2).astype(np.uint8), label, str(i))

    assert colour_miou(Flat(4), Flat(2)) == 100
