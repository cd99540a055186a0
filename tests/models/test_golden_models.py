"""The authors' networks, run once by their own code, against ours with the same weights.

Origin of the files: tests/golden/README.md.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mscs.models import build_model, count_parameters, load_official

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = {
    "hrnet48_cityscapes": ("hrnet", "hrnet_w48", 19, "backbone", {}),
    "ocrnet_hrnet48_ade20k": ("ocrnet", "hrnet_w48", 150, "backbone", {}),
    "upernet_swinT_ade20k": ("upernet", "swin_tiny_patch4_window7_224", 150, "fpn", {"aux_index": 3}),
}


def weights_from_name(name, shape):
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = 0.5 + draw.random(shape)
    elif name.endswith("running_mean"):
        values = 0.1 * draw.normal(size=shape)
    elif len(shape) >= 2:
        values = draw.normal(size=shape) / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("bias"):
        values = 0.1 * draw.normal(size=shape)
    else:
        values = 0.5 + draw.random(shape)
    return torch.from_numpy(values.astype(np.float32))


def assert_close(found, expected):
    expected = torch.from_numpy(expected)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_outputs_agree_with_the_authors_network(case):
    name, backbone, classes, position, options = CASES[case]
    facts = json.loads((GOLDEN / f"{case}.json").read_text())
    arrays = np.load(GOLDEN / f"{case}.npz")
    model = build_model(name, backbone, classes, projector=position, **options)
    load_official(model, {key: weights_from_name(key, shape) for key, shape in facts["parameters"]})
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(arrays["input"]))
    assert_close(output.logits[..., ::4, ::4], arrays["logits"])
    if "aux_logits" in arrays:
        assert_close(output.aux_logits[..., ::4, ::4], arrays["aux_logits"])
    for i, embedding in enumerate(output.embeddings):
        assert_close(embedding, arrays[f"projected_{i}"])
    assert f"projected_{len(output.embeddings)}" not in arrays


@pytest.mark.parametrize("case", CASES)
def test_parameter_counts_equal_the_authors_to_the_digit(case):
    name, backbone, classes, position, options = CASES[case]
    facts = json.loads((GOLDEN / f"{case}.json").read_text())
    with torch.device("meta"):
        model = build_model(name, backbone, classes, projector=position, **options)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters_total"]
    assert count_parameters(model) == facts["parameters_total"] - facts["of_which_projectors"]
    model.drop_projector()
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model)
