"""The examples of docs/loss-examples.md for libraries that are no part of the environment, run with these."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("segmentation-models-pytorch", "mmsegmentation", "mmcv-lite==2.1.0", "mmengine"),
    *("ftfy", "wcwidth", "addict", "yapf", "termcolor", "prettytable"),
)
DATA = """
import torch
from torch import nn
from mscs.losses import MultiScaleContrastiveLoss, segmentation_loss

images = torch.randn(2, 3, 128, 256)
labels = torch.randint(3, (2, 4, 8)).repeat_interleave(32, 1).repeat_interleave(32, 2)
"""
AROUND = {
    "smp.Unet": (
        "import segmentation_models_pytorch as smp",
        "loss.backward()\nassert projectors[0].weight.grad.abs().sum() > 0",
    ),
    # the compiled operators are not needed, and on the package index there is no build of them
    "EncoderDecoder": (
        """
import sys, types

class Operators(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None

sys.modules["mmcv._ext"] = Operators("mmcv._ext")
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
""",
        """
norm = {"type": "BN"}
head = {"type": "FCNHead", "channels": 32, "num_classes": 3, "norm_cfg": norm}
head["loss_decode"] = {"type": "CrossEntropyLoss"}
network = {"type": "ContrastiveEncoderDecoder", "backbone": {"type": "ResNet", "depth": 50, "norm_cfg": norm}}
network["decode_head"] = head | {"in_channels": 2048, "in_index": 3}
network["auxiliary_head"] = head | {"in_channels": 1024, "in_index": 2}
model = MODELS.build(network)
samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
losses = model.loss(images, samples)
assert {"decode.loss_ce", "aux.loss_ce", "loss_contrast"} <= set(losses)
model.parse_losses(losses)[0].backward()
assert model.projectors[0].weight.grad.abs().sum() > 0
""",
    ),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A folder with the libraries, and nothing that they would exchange in the environment."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    folder = tmp_path_factory.mktemp("libraries")
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder]
    done = subprocess.run([*install, *PACKAGES], capture_output=True, text=True)
    if "error sending request" in done.stderr:
        pytest.skip("needs the package index")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("library", AROUND)
def test_an_example_trains_its_projectors(library, libraries):
    page = (ROOT / "docs/loss-examples.md").read_text()
    [example] = [
        x for x in re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if library in x
    ]
    before, after = AROUND[library]
    example = example.replace('"resnet34",', '"resnet34", encoder_weights=None,')  # else they are downloaded
    paths = {"PYTHONPATH": f"{libraries}{os.pathsep}{ROOT}"}
    program = "\n".join([before, DATA, example, after])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | paths, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
