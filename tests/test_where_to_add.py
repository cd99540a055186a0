"""Adds a dataset, a model, a loss and a recipe to a copy of the project, in the places that README lists."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = "dots-pixelnet-hr48-spread"

DATASET = '''\
"""Dots: made for a test."""

from pathlib import Path

from mscs.datasets.spec import Index, LabelSet, Spec, build_index, names_in, numbered_labels


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    names = names_in(root / split / "images", ".png")
    return build_index(
        labels, root, ((n, f"{split}/images/{n}.png", f"{split}/labels/{n}.png") for n in names)
    )


SPEC = Spec(
    name="dots",
    label_sets=(numbered_labels("dots", "dot, ground"),),
    splits={"train": 8, "val": 2},
    index=index,
    parts=(),
    home="https://example.org",
    licence="none",
    tolerance=1.0,
)
'''

MODEL = '''\
"""PixelNet: made for a test."""

from torch import Tensor, nn

from mscs.model_options import PixelNetOptions
from mscs.models.backbone import Backbone
from mscs.models.base import Decoded, SegmentationModel


class PixelNet(SegmentationModel):
    """One convolution on the finest map."""

    def __init__(
        self, backbone: Backbone, num_classes: int, projector: str | None, options: PixelNetOptions
    ) -> None:
        super().__init__(backbone, options)
        self.classifier = nn.Sequential(
            nn.Conv2d(backbone.channels[0], options.width, 1), nn.Conv2d(options.width, num_classes, 1)
        )
        self.add_projectors(projector, {"backbone": backbone.channels})

    def decode(self, features: list[Tensor]) -> Decoded:
        """Return logits at the finest map's size."""
        return Decoded(self.classifier(features[0]), None, {"backbone": features})
'''

LOSS = '''\
"""Spread: made for a test."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mscs.losses.objective import EmbeddingLoss, Terms


class Spread(EmbeddingLoss):
    """Pushes the mean embedding of the coarsest map towards zero."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self, embeddings: Sequence[Tensor], labels: Tensor, generators: Sequence[torch.Generator]
    ) -> Terms:
        """Return the squared norm of the mean."""
        spread = embeddings[-1].mean((0, 2, 3)).square().sum()
        return Terms(self.weight * spread, {"spread": spread}, {})
'''


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Put text before or in the place of a line; every place must be there once."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{path}: {old!r}"
        text = text.replace(old, new)
    path.write_text(text)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    for name in ("mscs", "reproduce"):
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(name, folder / name)
    return folder


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def identities(folder: Path) -> dict[str, dict[str, object]]:
    run(folder, "reproduce", "resolve")
    return json.loads((folder / "results/mini/resolved.json").read_text())["runs"]


def add_dataset(folder: Path) -> None:
    (folder / "mscs/datasets/dots.py").write_text(DATASET)
    edit(
        folder / "mscs/datasets/registry.py",
        ("from mscs.datasets import ade20k", "from mscs.datasets import dots, ade20k"),
        ('    "cadis": cadis.SPEC,\n', '    "cadis": cadis.SPEC,\n    "dots": dots.SPEC,\n'),
    )
    edit(
        folder / "numerics.yaml",
        (
            "\n  transforms: {version",
            '\n  dots: {version: 1, digest: "", why: "new"}\n  transforms: {version',
        ),
        ("\n  transforms:\n", "\n  dots: [mscs/datasets/dots.py]\n  transforms:\n"),
    )
    edit(folder / "params.yaml", ("\nmodels:", "\n  dots: {data_source: real}\n\nmodels:"))


def add_model(folder: Path) -> None:
    (folder / "mscs/models/pixelnet.py").write_text(MODEL)
    edit(
        folder / "mscs/models/build.py",
        ("from mscs.models.upernet", "from mscs.models.pixelnet import PixelNet\nfrom mscs.models.upernet"),
        ('    "upernet": UPerNet,\n', '    "upernet": UPerNet,\n    "pixelnet": PixelNet,\n'),
    )
    edit(
        folder / "mscs/model_options.py",
        (
            "MODEL_OPTIONS: dict[str, ModelOptions] = {\n",
            '@dataclass(frozen=True, kw_only=True)\nclass PixelNetOptions(ModelOptions):\n    """Its."""\n\n'
            "    width: int = 8\n\n\nMODEL_OPTIONS: dict[str, ModelOptions] = {\n"
            '    "pixelnet": PixelNetOptions(),\n',
        ),
    )
    edit(
        folder / "numerics.yaml",
        ("\n  cross_entropy: {", '\n  pixelnet: {version: 1, digest: "", why: "new"}\n  cross_entropy: {'),
        ("\n  cross_entropy:\n", "\n  pixelnet: [mscs/models/pixelnet.py]\n  cross_entropy:\n"),
    )
    entry = (
        "pixelnet-hr48: {model: pixelnet, backbone: hrnet_w18_small, pretrained: false, feature_maps: 4, "
        "aux_weight: 0.0, model_options: {width: 4, projector_channels: 16}}"
    )
    edit(folder / "params.yaml", ("\nlosses:", f"\n  {entry}\n\nlosses:"))


def add_loss(folder: Path) -> None:
    (folder / "mscs/losses/spread.py").write_text(LOSS)
    edit(
        folder / "mscs/settings.py",
        (
            "class Loss(Block):",
            'class SpreadBlock(Block):\n    """Settings of the loss."""\n\n'
            "    spread: Literal[True]\n    spread_weight: Weight\n\n\nclass Loss(Block):",
        ),
        (
            "    contrastive: Contrastive | None\n",
            "    contrastive: Contrastive | None\n    spread: SpreadBlock | None\n",
        ),
    )
    edit(
        folder / "mscs/build.py",
        ("from mscs.models import", "from mscs.losses.spread import Spread\nfrom mscs.models import"),
        (
            '    "contrastive": contrastive_terms,\n',
            '    "contrastive": contrastive_terms,\n'
            '    "spread": lambda block, _: Spread(block.spread_weight),\n',
        ),
    )
    edit(
        folder / "numerics.yaml",
        (
            "\n  optimizer: {version",
            '\n  spread: {version: 1, digest: "", why: "new"}\n  optimizer: {version',
        ),
        ("\n  optimizer: [", "\n  spread: [mscs/losses/spread.py]\n  optimizer: ["),
    )
    entry = "spread: {contrastive: false, spread: true, spread_weight: 0.5, projector: backbone}"
    edit(folder / "params.yaml", ("\nschedules:", f"\n  {entry}\n\nschedules:"))


def add_recipe_and_run(folder: Path) -> None:
    entry = "{dataset: dots, model: pixelnet-hr48, loss: spread, schedule: cityscapes-hrnet-hr48}"
    edit(
        folder / "params.yaml",
        (
            "\nprofiles:\n",
            "\n  gentle:\n    about: a smaller learning rate\n    defaults: {hflip: 0.25}\n\nprofiles:\n",
        ),
        ("\nruns:\n", f"\nruns:\n  {RUN}: {entry}\n"),
    )


def write_images(root: Path) -> None:
    import cv2
    import numpy as np

    for split, count in (("train", 8), ("val", 2)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            label = np.full((64, 96), 2, np.uint8)
            cv2.circle(label, (20 + 8 * i, 30), 12, 1, -1)
            noise = np.random.default_rng(i).integers(0, 40, (64, 96, 1))
            image = np.where(label[..., None] == 1, 200, 60) + noise
            cv2.imwrite(str(root / split / "images" / f"{i}.png"), np.repeat(image, 3, 2).astype(np.uint8))
            cv2.imwrite(str(root / split / "labels" / f"{i}.png"), label)


@pytest.mark.slow
def test_each_family_is_extended_in_the_places_that_the_readme_lists(copy):
    before = identities(copy)
    for add in (add_dataset, add_model, add_loss, add_recipe_and_run):
        add(copy)
    after = identities(copy)
    assert {run: after[run] for run in before} == before, "what was there before stays fresh"
    assert after[RUN]["train"]["spread_weight"] == 0.5
    assert {"dots", "pixelnet", "spread"} <= set(after[RUN]["train"]["numerics"])

    write_images(copy / "data/dots")
    short = [
        "--set",
        "steps=3",
        "--set",
        "log_every=1",
        "--set",
        "crop_size=[64,96]",
        "--set",
        "recipe=gentle",
        "--set",
        "data_source=real",
    ]
    run(copy, "mscs", "data", "verify", "dots")
    run(copy, "mscs", "train", RUN, *short)
    [losses] = copy.glob("results/mini/runs/*/seed-0/losses.csv")
    assert "spread" in losses.read_text().splitlines()[0].split(",")
    assert "mIoU ss" in run(copy, "mscs", "evaluate", RUN, *short)
    shown = json.loads(run(copy, "mscs", "show", RUN, "--json", "--set", "recipe=gentle"))
    assert shown["hflip"] == 0.25


def test_the_readme_lists_these_places():
    section = Path("README.md").read_text().partition("## Where do I add")[2].partition("\n## ")[0]
    assert "(docs/own-data.md)" in section, "the way that needs no edit of the package"
    places = {
        "dataset": ["mscs/datasets/", "registry.py", "numerics.yaml", "params.yaml"],
        "model": ["mscs/models/", "BUILDERS", "options.py", "numerics.yaml", "params.yaml"],
        "loss": ["mscs/losses/", "mscs/settings.py", "EMBEDDING_LOSSES", "numerics.yaml", "params.yaml"],
        "recipe": ["params.yaml", "ledger.yaml"],
    }
    for family, named in places.items():
        [item] = re.findall(rf"^- \*\*a {family}\*\*.*?(?=^- |\Z)", section, re.M | re.S)
        missing = [place for place in named if place not in item]
        assert not missing, f"README, a {family}: {missing}"
