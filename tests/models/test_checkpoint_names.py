"""Checkpoints of other code bases: every tensor finds its place, and nothing else is let in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import SWIN, UPSTREAM_OPTIONS

from mscs.errors import MscsError, UsageError
from mscs.models import build_model, load_official, load_upstream, read_state_dict

GOLDEN = Path(__file__).parent.parent / "golden"
NORM = ("weight", "bias", "running_mean", "running_var")


def norm(name, channels):
    return {f"{name}.{part}": (channels,) for part in NORM}


def conv(name, outputs, inputs, kernel=1, bias=False):
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)} | (
        {f"{name}.bias": (outputs,)} if bias else {}
    )


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}


def backbone_shapes(model, prefix):
    """Shapes of the backbone's tensors by the names that ResNets and HRNets have everywhere."""
    return {
        prefix + name: tuple(value.shape)
        for name, value in model.backbone.body.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def assert_loaded(model, expected):
    """`expected`: our names with the tensors they must now hold."""
    own = model.state_dict()
    for name, value in expected.items():
        assert torch.equal(own[name], value), name


def test_official_deeplabv3():
    model = build_model("deeplabv3", "resnet18", 3, projector="backbone", aspp_channels=8)
    shapes = backbone_shapes(model, "backbone.")
    for i, kernel in enumerate((1, 3, 3, 3, 1), start=1):
        shapes |= conv(f"aspp.aspp{i}", 8, 512, kernel) | norm(f"aspp.aspp{i}_bn", 8)
    shapes |= conv("aspp.conv2", 8, 40) | norm("aspp.bn2", 8) | conv("conv_out", 3, 8, bias=True)
    for i, channels in enumerate((64, 256, 512)):
        shapes |= conv(f"projector_model.project{i}.0", channels, channels)
        shapes |= norm(f"projector_model.project{i}.2", channels)
        shapes |= conv(f"projector_model.project{i}.3", 256, channels, bias=True)
    state = drawn(shapes)
    load_official(model, {"state_dict": {f"module.{name}": value for name, value in state.items()}})
    assert_loaded(
        model,
        {
            "backbone.body.layer3.1.bn2.running_var": state["backbone.layer3.1.bn2.running_var"],
            "aspp.paths.2.0.weight": state["aspp.aspp3.weight"],
            "aspp.paths.3.1.bias": state["aspp.aspp4_bn.bias"],
            "aspp.mean.1.running_mean": state["aspp.aspp5_bn.running_mean"],
            "aspp.fuse.0.weight": state["aspp.conv2.weight"],
            "projectors.2.3.bias": state["projector_model.project2.3.bias"],
        },
    )


def test_official_one_scale_projector():
    model = build_model(
        "hrnet", "hrnet_w18_small", 3, projector="concat", projector_channels=4, head_channels=8
    )
    total = sum(model.backbone.channels)
    shapes = backbone_shapes(model, "backbone.") | conv("cls_head.0", 8, total, 3, bias=True)
    shapes |= norm("cls_head.1", 8) | conv("cls_head.2", 3, 8) | norm("projector_model.project.2", total)
    shapes |= conv("projector_model.project.0", total, total)
    shapes |= conv("projector_model.project.3", 4, total, bias=True)
    state = drawn(shapes)
    load_official(model, state)
    assert_loaded(model, {"projectors.0.3.weight": state["projector_model.project.3.weight"]})


def hrnet_upstream(model):
    return backbone_shapes(model, "model.")


def test_upstream_hrnet():
    options = UPSTREAM_OPTIONS["hrnet"]
    model = build_model("hrnet", "hrnet_w18_small", 3, **options)
    total = sum(model.backbone.channels)
    shapes = hrnet_upstream(model) | conv("model.last_layer.0", total, total, bias=True)
    shapes |= norm("model.last_layer.1", total) | conv("model.last_layer.3", 3, total, bias=True)
    # published files carry the training wrapper's class weights
    state = drawn(shapes | {"loss.criterion.weight": (3,)})
    load_upstream(model, state)
    assert_loaded(
        model,
        {
            "head.conv.weight": state["model.last_layer.0.weight"],
            "head.classifier.bias": state["model.last_layer.3.bias"],
            "backbone.body.stage4.0.fuse_layers.0.3.0.weight": state[
                "model.stage4.0.fuse_layers.0.3.0.weight"
            ],
        },
    )


def test_upstream_ocrnet():
    options = UPSTREAM_OPTIONS["ocrnet"] | {"mid_channels": 8, "key_channels": 4, "aux_channels": None}
    model = build_model("ocrnet", "hrnet_w18_small", 3, **options)
    total = sum(model.backbone.channels)
    block = "model.ocr_distri_head.object_context_block"
    shapes = hrnet_upstream(model) | conv("model.conv3x3_ocr.0", 8, total, 3, bias=True)
    shapes |= norm("model.conv3x3_ocr.1", 8) | conv("model.cls_head", 3, 8, bias=True)
    shapes |= conv("model.aux_head.0", 8, total, bias=True) | norm("model.aux_head.1", 8)
    shapes |= conv("model.aux_head.3", 3, 8, bias=True)
    for part in ("f_pixel", "f_object"):
        shapes |= conv(f"{block}.{part}.0", 4, 8) | norm(f"{block}.{part}.1.0", 4)
        shapes |= conv(f"{block}.{part}.2", 4, 4) | norm(f"{block}.{part}.3.0", 4)
    shapes |= conv(f"{block}.f_down.0", 4, 8) | norm(f"{block}.f_down.1.0", 4)
    shapes |= conv(f"{block}.f_up.0", 8, 4) | norm(f"{block}.f_up.1.0", 8)
    shapes |= conv("model.ocr_distri_head.conv_bn_dropout.0", 8, 16)
    shapes |= norm("model.ocr_distri_head.conv_bn_dropout.1.0", 8)
    state = drawn(shapes)
    load_upstream(model, state)
    assert_loaded(
        model,
        {
            "attention.query.3.weight": state[f"{block}.f_pixel.2.weight"],
            "attention.query.4.running_var": state[f"{block}.f_pixel.3.0.running_var"],
            "attention.key.1.bias": state[f"{block}.f_object.1.0.bias"],
            "attention.value.1.weight": state[f"{block}.f_down.1.0.weight"],
            "attention.out.0.weight": state[f"{block}.f_up.0.weight"],
            "attention.fuse.1.bias": state["model.ocr_distri_head.conv_bn_dropout.1.0.bias"],
            "aux_head.classifier.weight": state["model.aux_head.3.weight"],
            "classifier.bias": state["model.cls_head.bias"],
        },
    )


def test_upstream_upernet_swin_takes_the_names_of_the_golden_backbone():
    facts = json.loads((GOLDEN / "upernet_swinT_ade20k.json").read_text())
    # Swin's own names are the same in both repositories
    shapes = {name: tuple(shape) for name, shape in facts["parameters"] if name.startswith("backbone.")}
    shapes["backbone.layers.0.blocks.0.attn.relative_position_index"] = (49, 49)
    for i in range(4):
        shapes |= conv(f"decode_head.psp_modules.{i}.1.conv", 512, 768)
        shapes |= norm(f"decode_head.psp_modules.{i}.1.bn", 512)
    shapes |= conv("decode_head.bottleneck.conv", 512, 2816, 3) | norm("decode_head.bottleneck.bn", 512)
    for i, channels in enumerate((96, 192, 384)):
        shapes |= conv(f"decode_head.lateral_convs.{i}.conv", 512, channels)
        shapes |= norm(f"decode_head.lateral_convs.{i}.bn", 512)
        shapes |= conv(f"decode_head.fpn_convs.{i}.conv", 512, 512, 3)
        shapes |= norm(f"decode_head.fpn_convs.{i}.bn", 512)
    shapes |= conv("decode_head.fpn_bottleneck.conv", 512, 2048, 3)
    shapes |= norm("decode_head.fpn_bottleneck.bn", 512) | conv("decode_head.conv_seg", 150, 512, bias=True)
    shapes |= conv("auxiliary_head.convs.0.conv", 256, 384, 3) | norm("auxiliary_head.convs.0.bn", 256)
    shapes |= conv("auxiliary_head.conv_seg", 150, 256, bias=True)
    state = drawn(shapes)
    model = build_model("upernet", SWIN, 150, **UPSTREAM_OPTIONS["upernet"])
    load_upstream(model, {"meta": {"epoch": 1}, "state_dict": state})
    assert_loaded(
        model,
        {
            "backbone.body.layers.2.downsample.norm.weight": state[
                "backbone.layers.1.downsample.norm.weight"
            ],
            "backbone.norms.3.bias": state["backbone.norm3.bias"],
            "ppm.convs.2.0.weight": state["decode_head.psp_modules.2.1.conv.weight"],
            "ppm.convs.2.1.running_mean": state["decode_head.psp_modules.2.1.bn.running_mean"],
            "ppm.fuse.1.weight": state["decode_head.bottleneck.bn.weight"],
            "lateral.1.0.weight": state["decode_head.lateral_convs.1.conv.weight"],
            "smooth.2.1.bias": state["decode_head.fpn_convs.2.bn.bias"],
            "fuse.0.weight": state["decode_head.fpn_bottleneck.conv.weight"],
            "aux_head.norm.running_var": state["auxiliary_head.convs.0.bn.running_var"],
            "aux_head.classifier.bias": state["auxiliary_head.conv_seg.bias"],
            "aux_head.conv.bias": torch.zeros(256),
        },
    )


def test_a_foreign_checkpoint_is_refused_with_names():
    model = build_model("upernet", "resnet18", 3, channels=8)
    own = {name.replace("backbone.body.", "backbone."): value for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"missing: .*unexpected: stem\.weight"):
        load_official(model, {"stem.weight": torch.zeros(3)})
    own["classifier.weight"] = torch.zeros(19, 8, 1, 1)
    with pytest.raises(
        UsageError, match=r"another shape: classifier.weight \(19, 8, 1, 1\) instead of \(3, 8"
    ):
        load_upstream(model, own)
    with pytest.raises(UsageError, match="holds no tensors"):
        load_official(model, {"epoch": 3})


def test_files_are_read_without_running_code(tmp_path):
    tensors = {"a.weight": torch.arange(3.0)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert torch.equal(read_state_dict(tmp_path / name)["a.weight"], tensors["a.weight"])
    torch.save({"a": torch.zeros(1), "path": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(MscsError, match="cannot read weights"):
        read_state_dict(tmp_path / "code.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_truncated_and_missing_files_are_refused(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(UsageError, match="no weight file"):
        read_state_dict(path)
    tensors = {"a.weight": torch.zeros(1000)}
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(MscsError, match=r"cannot read weights.*complete"):
        read_state_dict(path)
