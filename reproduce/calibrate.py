"""Published checkpoints of others through this evaluation: does it give their published score?

To be done before spending GPU-weeks. Networks and protocol are those of recipe `upstream`. Left to explain a
difference within the tolerance: images are resized by Pillow (with area support) instead of OpenCV, padded to
a multiple of 32, and at several scales resized from the padded image instead of the original.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from mscs import build
from mscs.distributed import World
from mscs.errors import UsageError, unknown_name
from mscs.evaluation import count_pixels
from mscs.inference import Predictor
from mscs.metrics import scores
from mscs.models import ModelOutput, load_upstream, read_state_dict
from mscs.params import Params
from mscs.results import file_sha256
from mscs.settings import Settings

TOLERANCES = {"ss": 0.3, "ms": 0.5}


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: the run that has its network and protocol, its mIoU in percent, where it is.

    sha256: None where none is recorded anywhere; loader: "upstream", or "transformers", which brings its own
    network (the weights are then the downloaded folder). overrides: of the run's settings.
    """

    run: str
    published: Mapping[str, float]
    source: str
    url: str
    sha256: str | None = None
    loader: str = "upstream"
    overrides: Mapping[str, Any] = field(default_factory=dict)


CHECKPOINTS = {
    name: Checkpoint(**entry)
    for name, entry in yaml.safe_load(Path(__file__).with_name("checkpoints.yaml").read_text()).items()
}


def find(name: str) -> Checkpoint:
    """Return an entry of the list; an unknown name is a UsageError."""
    if name not in CHECKPOINTS:
        raise UsageError(unknown_name("checkpoint", name, CHECKPOINTS))
    return CHECKPOINTS[name]


def listing() -> str:
    """Return the list as text, a line each."""
    return "\n".join(
        f"{name:17} mIoU {dict(entry.published)}  {entry.url}  SHA-256 {entry.sha256 or 'not published'}"
        for name, entry in CHECKPOINTS.items()
    )


def calibrate(
    checkpoint: Checkpoint,
    weights: Path,
    root: Path,
    params: Params,
    world: World,
    *,
    multi_scale: bool = True,
) -> dict[str, Any]:
    """Evaluate a checkpoint on the dataset in `root`; return its scores beside the published ones."""
    settings = checkpoint_settings(checkpoint, params)
    build.apply_machine_settings(settings)
    dataset = build.open_dataset(settings, "val", root)
    model = load_model(checkpoint, settings, dataset.num_classes, weights)
    predictor = Predictor(model, build.protocol(settings), device=world.device)
    rows = {}
    for mode, published in checkpoint.published.items():
        if mode == "ss" or multi_scale:
            confusion = count_pixels(predictor, dataset, settings, world, multi_scale=mode == "ms")
            found: Any = scores(confusion, settings.evaluation.absent_classes)["miou"]
            rows[mode] = judge(float(found), published, TOLERANCES[mode])
    facts = {key: getattr(checkpoint, key) for key in ("run", "source", "url")}
    return {**facts, "images": len(dataset), **check_file(checkpoint, weights), "scores": rows}


def judge(found: float, published: float, tolerance: float) -> dict[str, Any]:
    """Return a score beside the published one, and whether they agree."""
    difference = found - published
    facts = {"miou": found, "published": published, "difference": difference, "tolerance": tolerance}
    return {**facts, "agrees": abs(difference) <= tolerance}


def checkpoint_settings(checkpoint: Checkpoint, params: Params) -> Settings:
    """Return the settings of a checkpoint's run in recipe `upstream`."""
    overrides = {"recipe": "upstream", "pretrained": False, **checkpoint.overrides}
    return params.resolve(checkpoint.run, "paper", overrides).settings


def load_model(checkpoint: Checkpoint, settings: Settings, num_classes: int, weights: Path) -> nn.Module:
    """Return the network of a checkpoint with its weights; a file that does not fit is a UsageError."""
    if checkpoint.loader == "transformers":
        return SegFormer(weights)
    model = build.network(settings, num_classes, seed=None, projector=False)
    load_upstream(model, read_state_dict(weights))
    return model


def check_file(checkpoint: Checkpoint, weights: Path) -> dict[str, Any]:
    """Return a weight file's SHA-256 and whether it is the recorded one."""
    if not weights.is_file():
        return {"sha256": None, "checksum": "a folder"}
    digest = file_sha256(weights)
    verdict = "as recorded" if digest == checkpoint.sha256 else "not the recorded one"
    return {"sha256": digest, "checksum": verdict if checkpoint.sha256 else "none recorded"}


class SegFormer(nn.Module):
    """SegFormer as transformers has it, behind the interface of this package's networks."""

    def __init__(self, folder: Path):
        """Load a downloaded folder (config.json and weights); nothing is fetched."""
        super().__init__()
        try:
            from transformers import SegformerForSemanticSegmentation
        except ImportError:
            raise UsageError('segformer-b5 needs transformers: pip install "mscs[calibrate]"') from None
        if not folder.is_dir():
            raise UsageError(
                f"no folder {folder}; it must hold the files of {CHECKPOINTS['segformer-b5'].url}"
            )
        self.net = SegformerForSemanticSegmentation.from_pretrained(folder, local_files_only=True)

    def forward(self, images: Tensor) -> ModelOutput:
        """Return logits (B, 150, H, W): the network's own, at stride 4, upsampled."""
        logits = self.net(pixel_values=images).logits
        return ModelOutput(
            F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False), None, None
        )


def as_text(name: str, document: Mapping[str, Any]) -> str:
    """Return the outcome in a few lines."""
    lines = [
        f"{name} on {document['images']} images, file {document['checksum']} (SHA-256 {document['sha256']})"
    ]
    for mode, row in document["scores"].items():
        verdict = "agrees" if row["agrees"] else "does NOT agree"
        lines.append(
            f"  {mode}: mIoU {row['miou']:.2f}, published {row['published']:.2f}, "
            f"difference {row['difference']:+.2f}: {verdict} (tolerance {row['tolerance']})"
        )
    return "\n".join(lines)
