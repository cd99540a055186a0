"""Names, options and backbones: what is accepted, and what the errors say."""

import subprocess
import sys

import pytest
import torch
from small_models import NARROW_SWIN, SWIN

from mscs.errors import UsageError
from mscs.model_options import MODEL_OPTIONS
from mscs.models import build_model

# a small member of six further families, with its number of channels at strides 4 to 32
FAMILIES = {
    "convnext_atto": (40, 80, 160, 320),
    "efficientnet_lite0": (24, 40, 112, 320),
    "regnetx_002": (24, 56, 152, 368),
    "mobilenetv3_small_050": (16, 24, 24, 288),
    "pvt_v2_b0": (32, 64, 160, 256),
    "resnest14d": (256, 512, 1024, 2048),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_carry_upernet_and_hrnet_heads(family):
    model = build_model("upernet", family, 3, projector="backbone", channels=8, projector_channels=4)
    assert len(model.backbone.channels) == 4
    images = torch.randn(2, 3, 64, 96)
    output = model.train()(images)
    (output.logits.mean() + sum(e.square().mean() for e in output.embeddings)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert [tuple(e.shape) for e in output.embeddings] == [(2, 4, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    head = build_model("hrnet", family, 3, head_channels=8).eval()
    with torch.no_grad():
        assert head(torch.randn(1, 3, 67, 99)).logits.shape == (1, 3, 67, 99)


@pytest.mark.parametrize("name", ["ocrnet", "deeplabv3"])
@pytest.mark.parametrize("family", ["convnext_atto", "regnetx_002"])
def test_other_families_can_be_dilated(name, family):
    channels = {"mid_channels": 8} if name == "ocrnet" else {"aspp_channels": 8}
    model = build_model(name, family, 3, **channels).eval()
    assert model.backbone.strides == (4, 8, 8, 8)
    with torch.no_grad():
        assert model.backbone(torch.randn(1, 3, 64, 96))[-1].shape[-2:] == (8, 12)


def test_output_stride_can_be_left_alone():
    options = {"output_stride": 32, "aspp_channels": 8, "backbone_options": NARROW_SWIN}
    model = build_model("deeplabv3", SWIN, 3, **options).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("hrnets", "hrnet_w48", 19), {}, "did you mean 'hrnet'.*deeplabv3, hrnet, ocrnet, upernet"),
        (("hrnet", "hrnet_w49", 19), {}, "unknown backbone 'hrnet_w49'.*hrnet_w48"),
        (("upernet", "resnet101.tv_in2k", 19), {}, "unknown weight tag.*'resnet101.tv_in1k'"),
        (("hrnet", "hrnet_w48", 19), {"head_kernels": 1}, "option of model 'hrnet'.*'head_kernel'"),
        (
            ("hrnet", "hrnet_w48", 19),
            {"projector": "fpn"},
            "no projector position 'fpn'; accepted: backbone, concat",
        ),
        (("hrnet", "hrnet_w48", 1), {}, "num_classes must be at least 2"),
        (("hrnet", "hrnet_w48", 19), {"drop_path_rate": 0.1}, "no drop path"),
        (("deeplabv3", SWIN, 19), {}, r"strides \[4, 8, 16, 32\].*from stride 4 to stride 8"),
        (("deeplabv3", "hrnet_w18_small", 19), {}, r"strides \[4, 8, 16, 32\].*from stride 4 to stride 8"),
        (("ocrnet", "hrnet_w18_small", 19), {"output_stride": 8}, "from stride 4 to stride 8"),
        (("upernet", "vit_tiny_patch16_224", 19), {}, "four maps, from stride 4"),
        (("upernet", "resnet18", 19), {"backbone_options": {"nonsense": 1}}, "cannot make.*nonsense"),
        (("upernet", "resnet18", 19), {"aux_index": 4}, "from 0 to 3, found 4"),
        (("upernet", "resnet18", 19), {"aux_index": "2"}, "'auto', None or a stage"),
    ],
)
def test_wrong_requests_are_refused_with_what_is_accepted(arguments, options, message):
    with torch.device("meta"), pytest.raises(UsageError, match=f"(?s){message}"):
        build_model(*arguments, **options)


def test_every_option_is_used_by_its_model():
    backbones = {
        "hrnet": "hrnet_w18_small",
        "ocrnet": "resnet18",
        "deeplabv3": "resnet18",
        "upernet": "resnet18",
    }
    for name, options in MODEL_OPTIONS.items():
        with torch.device("meta"):
            build_model(name, backbones[name], 3, **vars(options))


def test_reading_the_options_imports_no_torch():
    code = "import sys, mscs.model_options; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("family", ["convnext_atto", "pvt_v2_b0", "resnest14d"])
def test_other_families_recompute_their_blocks(family):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model("upernet", family, 3, channels=8, checkpointing=checkpointing).train()
        torch.manual_seed(1)
        model(torch.ones(2, 3, 64, 64).cumsum(-1)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_fuse_align_corners_reaches_the_backbone():
    outputs = []
    for value in (False, True):
        torch.manual_seed(0)
        model = build_model("hrnet", "hrnet_w18_small", 3, head_channels=8, fuse_align_corners=value).eval()
        with torch.no_grad():
            outputs.append(model.backbone(torch.ones(1, 3, 64, 64).cumsum(-1))[0])
    assert not torch.allclose(*outputs)
