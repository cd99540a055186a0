"""A trained run as the figures see it: its validation images, what it predicts, what features it has."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mscs import build
from mscs.datasets import Dataset, Sample
from mscs.evaluation import scored_label
from mscs.inference import Predictor
from mscs.settings import Settings
from mscs.transforms import normalize, pad_reflect


@dataclass(frozen=True)
class TrainedRun:
    """One seed of a run, its weights, where its dataset lies, and its name."""

    settings: Settings
    weights: Path
    data_root: Path
    title: str

    @property
    def device(self) -> torch.device:
        """Where the network runs: the first GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def dataset(self) -> Dataset:
        """Open the images that the run is scored on."""
        return build.open_dataset(self.settings, self.settings.data.score_split, self.data_root)

    @cached_property
    def predictor(self) -> Predictor:
        """The network behind the dataset's evaluation protocol."""
        build.apply_machine_settings(self.settings)
        classes = self.dataset().num_classes
        return build.predictor(self.settings, classes, self.weights, self.device)

    @cached_property
    def network(self) -> torch.nn.Module:
        """The network in evaluation mode."""
        build.apply_machine_settings(self.settings)
        classes = self.dataset().num_classes
        return build.trained_network(self.settings, classes, self.weights).to(self.device).eval()

    def predict(self, sample: Sample) -> np.ndarray:
        """Return the single-scale prediction, uint8 (H, W), of the size of `label`."""
        return self.predictor.scores(sample.image).argmax(0).cpu().numpy().astype(np.uint8)

    def label(self, sample: Sample) -> np.ndarray:
        """Return the label (H, W) that predictions are scored against."""
        return scored_label(sample, self.settings).numpy()

    def image(self, sample: Sample) -> np.ndarray:
        """Return the image (H, W, 3) that lies under `label`."""
        rows = self.settings.data.reflect_pad if self.settings.evaluation.score_padding else (0, 0)
        return pad_reflect(sample.image, rows)

    @torch.inference_mode()
    def features(self, sample: Sample) -> list[Tensor]:
        """Return the backbone's maps (C, h, w), fine to coarse: what the projectors read."""
        pixels = normalize(self.image(sample))[None].to(self.device)
        maps = self.network.decode(self.network.backbone(pixels)).maps["backbone"]  # type: ignore[operator]
        return [x[0].float().cpu() for x in maps]
