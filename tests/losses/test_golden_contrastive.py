"""Against the numbers of the authors' code; tests/golden/README.md describes the arrays."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mscs.losses import MultiScaleContrastiveLoss, contrastive_loss, sample_anchors
from mscs.losses.sampling import downsample_labels

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "contrastive.npz")
BACKENDS = ["reference", "tiled"]


def _rows(name: str) -> Tensor:
    """(T, C, V) to (T*V, C)."""
    return torch.from_numpy(GOLDEN[name]).double().permute(0, 2, 1).flatten(0, 1)


def _labels(name: str, views: int) -> Tensor:
    return torch.from_numpy(GOLDEN[name]).repeat_interleave(views)


def _same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", range(8))
def test_within_scale_term(case: int, backend: str) -> None:
    name = f"self{case}"
    x = _rows(f"{name}_features").requires_grad_()
    labels = _labels(f"{name}_labels", GOLDEN[f"{name}_features"].shape[2])
    loss = contrastive_loss(x, labels, temperature=float(GOLDEN[f"{name}_temperature"]), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}_loss"]), rel=1e-9)
    _same(x.grad, _rows(f"{name}_grad"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", range(5))
def test_cross_scale_term(case: int, backend: str) -> None:
    name = f"cross{case}"
    x, y = (_rows(f"{name}_{side}_features").requires_grad_() for side in ("anchor", "contrast"))
    lx, ly = (
        _labels(f"{name}_{side}_labels", GOLDEN[f"{name}_{side}_features"].shape[2])
        for side in ("anchor", "contrast")
    )
    temperature = float(GOLDEN[f"{name}_temperature"])
    loss = contrastive_loss(x, lx, y, ly, temperature=temperature, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}_loss"]), rel=1e-9)
    _same(x.grad, _rows(f"{name}_anchor_grad"))
    _same(y.grad, _rows(f"{name}_contrast_grad"))


@pytest.mark.parametrize(
    ("case", "backend"),
    [(0, "reference"), *((case, "tiled") for case in range(4))],
)
def test_whole_loss(case: int, backend: str) -> None:
    name, strides = f"full{case}", (4, 8, 16, 32)
    features = [torch.from_numpy(GOLDEN[f"{name}_features_s{s}"]).double().requires_grad_() for s in strides]
    loss = MultiScaleContrastiveLoss(
        multi_scale_weight=1,
        cross_scale_weight=1,
        ignore_index=19,
        min_views=int(GOLDEN[f"{name}_min_views"]),
        backend=backend,
    )
    terms = loss(features, torch.from_numpy(GOLDEN[f"{name}_labels"]))
    terms.total.backward()
    # the authors' code allocates the sampled features in float32, so this case is known to float32 only
    np.testing.assert_allclose(terms.multi_scale.detach(), GOLDEN[f"{name}_multiscale"], rtol=5e-7)
    np.testing.assert_allclose(
        terms.cross_scale.detach(), GOLDEN[f"{name}_crossscale_s4s32_s4s16"], rtol=5e-7
    )
    assert terms.total.item() == pytest.approx(float(GOLDEN[f"{name}_total"]), rel=5e-7)
    for feature, stride in zip(features, strides, strict=True):
        theirs = GOLDEN[f"{name}_grad_s{stride}"]
        np.testing.assert_allclose(feature.grad, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("case", range(8))
def test_sampling_rule(case: int) -> None:
    name = f"sample{case}"
    stride, min_views, max_views, max_anchors = GOLDEN[f"{name}_params"].tolist()
    if max_views == 1:  # the authors' code takes 1 for "no cap"; ours takes it at its word
        max_views = 1 << 30
    labels = torch.from_numpy(GOLDEN[f"{name}_labels"])
    reduced = torch.from_numpy(GOLDEN[f"{name}_downsampled"])
    assert torch.equal(downsample_labels(labels, *reduced.shape[1:]), reduced)
    pixel = torch.arange(reduced.numel(), dtype=torch.float64).view(len(labels), 1, *reduced.shape[1:])
    anchors = sample_anchors(
        pixel,
        labels,
        ignore_index=19,
        min_views=min_views,
        max_views=max_views,
        max_anchors=max_anchors,
        generator=torch.Generator().manual_seed(case),
    )
    views = int(GOLDEN[f"{name}_views"])
    assert (anchors.groups, anchors.views) == (len(GOLDEN[f"{name}_group_classes"]), views)
    assert anchors.labels[::views].tolist() == GOLDEN[f"{name}_group_classes"].tolist()
    drawn = anchors.features.flatten().long()
    assert len(drawn.unique()) == len(drawn)
    assert torch.equal(reduced.flatten()[drawn].long(), anchors.labels)
    image = (drawn // (reduced.shape[1] * reduced.shape[2])).view(-1, views)
    assert (image == image[:, :1]).all()
    assert (image[:, 0].diff() >= 0).all()
    assert stride * reduced.shape[1] == labels.shape[1]
