"""HRNet and Swin against plain implementations, at sizes that are no multiples of strides or windows."""

import pytest
import torch
from torch.nn import functional as F

from mscs.model_options import BackboneOptions
from mscs.models.backbone import build_backbone
from mscs.models.deeplabv3 import ASPP
from mscs.models.upernet import PyramidPooling

SWIN = "swin_tiny_patch4_window7_224"


def randomise(module, seed=0):
    """Give every tensor values that a wrong use would show, norm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.ndim >= 2 and not name.endswith("table"):
            value.copy_(noise / value[0].numel() ** 0.5)
        else:
            value.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise)
    return module.double().eval()


class PlainHRNet:
    """HRNet read off its state dict: tensors and torch functions only."""

    def __init__(self, state, align_corners):
        self.state, self.align_corners = state, align_corners

    def has(self, prefix):
        return any(name.startswith(prefix) for name in self.state)

    def conv(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, x, name):
        get = lambda part: self.state[f"{name}.{part}"].view(1, -1, 1, 1)  # noqa: E731
        scaled = (x - get("running_mean")) / (get("running_var") + 1e-5).sqrt()
        return scaled * get("weight") + get("bias")

    def unit(self, x, name, stride=1):
        return self.norm(self.conv(x, f"{name}.0", stride), f"{name}.1")

    def blocks(self, x, name):
        index = 0
        while self.has(f"{name}.{index}."):
            block = f"{name}.{index}"
            count = 3 if self.has(f"{block}.conv3") else 2
            y = x
            for i in range(1, count + 1):
                y = self.norm(self.conv(y, f"{block}.conv{i}"), f"{block}.bn{i}")
                y = y.relu() if i < count else y
            x = (y + (self.unit(x, f"{block}.downsample") if self.has(f"{block}.downsample") else x)).relu()
            index += 1
        return x

    def transition(self, branches, name, count):
        result = []
        for i in range(count):
            source = branches[min(i, len(branches) - 1)]
            if self.has(f"{name}.{i}.0.weight"):
                source = self.unit(source, f"{name}.{i}").relu()
            elif self.has(f"{name}.{i}.0.0."):
                source = self.unit(branches[-1], f"{name}.{i}.0", stride=2).relu()
            result.append(source)
        return result

    def exchange(self, branches, name):
        count = len(branches)
        branches = [self.blocks(x, f"{name}.branches.{i}") for i, x in enumerate(branches)]
        fused = []
        for i in range(count):
            total = branches[i]
            for j in range(count):
                path = f"{name}.fuse_layers.{i}.{j}"
                if j > i:
                    up = self.unit(branches[j], path)
                    total = total + F.interpolate(
                        up, branches[i].shape[-2:], mode="bilinear", align_corners=self.align_corners
                    )
                elif j < i:
                    down = branches[j]
                    for k in range(i - j):
                        down = self.unit(down, f"{path}.{k}", stride=2)
                        down = down.relu() if k < i - j - 1 else down
                    total = total + down
            fused.append(total.relu())
        return fused

    def __call__(self, x):
        for i in (1, 2):
            x = self.norm(self.conv(x, f"conv{i}", stride=2), f"bn{i}").relu()
        branches = [self.blocks(x, "layer1")]
        for stage in (2, 3, 4):
            branches = self.transition(branches, f"transition{stage - 1}", stage)
            index = 0
            while self.has(f"stage{stage}.{index}."):
                branches = self.exchange(branches, f"stage{stage}.{index}")
                index += 1
        return branches


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (60, 100), (67, 105)])
def test_hrnet_equals_the_plain_one(size, align_corners):
    backbone = randomise(build_backbone("hrnet_w18_small", BackboneOptions(fuse_align_corners=align_corners)))
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = PlainHRNet(backbone.body.state_dict(), align_corners)(images)
        found = backbone(images)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def dense_window_attention(x, block, window, shift):
    """Shifted-window attention as one over all tokens: who sees whom is written out pair by pair."""
    _, height, width, channels = x.shape
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))[0]
    rows, columns = (torch.arange(n) for n in padded.shape[:2])
    y, x_ = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    moved_y, moved_x = (y - shift) % len(rows), (x_ - shift) % len(columns)
    same_window = (moved_y // window)[:, None].eq(moved_y // window) & (moved_x // window)[:, None].eq(
        moved_x // window
    )
    wrapped = ((y < shift)[:, None] != (y < shift)) | ((x_ < shift)[:, None] != (x_ < shift))
    offset_y = (moved_y[:, None] - moved_y).clamp(1 - window, window - 1) + window - 1
    offset_x = (moved_x[:, None] - moved_x).clamp(1 - window, window - 1) + window - 1
    attn = block.attn
    bias = attn.relative_position_bias_table[offset_y * (2 * window - 1) + offset_x]  # N, N, heads
    tokens = padded.reshape(-1, channels)
    query, key, value = (
        part.unflatten(-1, (attn.num_heads, -1)).movedim(1, 0)
        for part in F.linear(tokens, attn.qkv.weight, attn.qkv.bias).chunk(3, dim=-1)
    )
    scores = query @ key.mT * query.shape[-1] ** -0.5 + bias.movedim(-1, 0)
    scores = (scores - 100.0 * wrapped).masked_fill(~same_window, float("-inf"))
    mixed = (scores.softmax(-1) @ value).movedim(0, 1).flatten(1)
    mixed = F.linear(mixed, attn.proj.weight, attn.proj.bias)
    return mixed.reshape(1, *padded.shape)[:, :height, :width]


def plain_swin(backbone, images, window):
    body, norms = backbone.body, backbone.norms
    layer_norm = lambda x, norm: F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)  # noqa: E731
    x = F.pad(images, (0, -images.shape[-1] % 4, 0, -images.shape[-2] % 4))
    x = F.conv2d(x, body.patch_embed.proj.weight, body.patch_embed.proj.bias, stride=4).movedim(1, -1)
    x = layer_norm(x, body.patch_embed.norm)
    features = []
    for stage, norm in zip(body.layers, norms, strict=True):
        if features:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
            x = (
                layer_norm(torch.cat(corners, -1), stage.downsample.norm)
                @ stage.downsample.reduction.weight.mT
            )
        for index, block in enumerate(stage.blocks):
            shift = window // 2 if index % 2 else 0
            x = x + dense_window_attention(layer_norm(x, block.norm1), block, window, shift)
            hidden = F.linear(layer_norm(x, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias)
            x = x + F.linear(F.gelu(hidden), block.mlp.fc2.weight, block.mlp.fc2.bias)
        features.append(layer_norm(x, norm).movedim(-1, 1))
    return features


@pytest.mark.parametrize("size", [(56, 84), (64, 64), (70, 99)])
@pytest.mark.parametrize("window", [4, 7])
def test_swin_equals_the_plain_one(size, window):
    options = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": window}
    backbone = randomise(build_backbone(SWIN, BackboneOptions(backbone_options=options)))
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = plain_swin(backbone, images, window)
        found = backbone(images)
    assert [x.shape[-2:] for x in found] == [x.shape[-2:] for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_drop_path_rises_linearly_over_all_blocks():
    body = build_backbone(SWIN).body
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in body.layers for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    assert all(
        getattr(block.drop_path2, "drop_prob", 0.0) == getattr(block.drop_path1, "drop_prob", 0.0)
        for stage in body.layers
        for block in stage.blocks
    )


def test_resnet_with_output_stride_8_dilates_like_torchvision():
    from torchvision.models import resnet50

    reference = resnet50(replace_stride_with_dilation=[False, True, True])
    backbone = build_backbone("resnet50", BackboneOptions(output_stride=8))
    backbone.body.load_state_dict(reference.state_dict(), strict=False)
    images = torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        found = backbone.eval()(images)
        x = reference.eval().maxpool(reference.relu(reference.bn1(reference.conv1(images))))
        for feature, layer in zip(found, ("layer1", "layer2", "layer3", "layer4"), strict=True):
            x = getattr(reference, layer)(x)
            assert torch.equal(feature, x)


def test_aspp_equals_torchvisions():
    from torchvision.models.segmentation.deeplabv3 import ASPP as TorchvisionASPP

    ours = randomise(ASPP(6, 4, (12, 24, 36), eps=3e-4))
    theirs = TorchvisionASPP(6, [12, 24, 36], out_channels=4).double().eval()
    state = {}
    for name, value in ours.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "mean":  # their pooling path begins with the pooling
            index, _, tensor = rest.partition(".")
            state[f"convs.4.{int(index) + 1}.{tensor}"] = value
        else:
            state[f"{'convs' if part == 'paths' else 'project'}.{rest}"] = value
    theirs.load_state_dict(state)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 3e-4
    x = torch.randn(2, 6, 40, 50, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("upsample_first", [True, False])
def test_both_orders_of_pyramid_pooling(upsample_first):
    ppm = randomise(PyramidPooling(3, 2, (1, 2, 3, 6), upsample_first))
    x = torch.randn(1, 3, 7, 9, dtype=torch.float64)
    up = lambda y: F.interpolate(y, (7, 9), mode="bilinear", align_corners=False)  # noqa: E731
    with torch.no_grad():
        maps = [x]
        for size, conv in zip((1, 2, 3, 6), ppm.convs, strict=True):
            pooled = F.adaptive_avg_pool2d(x, size)
            maps.append(conv(up(pooled)) if upsample_first else up(conv(pooled)))
        expected = ppm.fuse(torch.cat(maps, 1))
        torch.testing.assert_close(ppm(x), expected)
        ppm.upsample_first = not upsample_first
        assert not torch.allclose(ppm(x), expected, rtol=1e-2)
