import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mscs.losses import MultiScaleContrastiveLoss, sample_anchors
from mscs.losses.sampling import (
    Selection,
    downsample_labels,
    draw_all,
    draw_balanced,
    gather_pixels,
    select,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose_balanced(labels: Tensor, *settings) -> Selection:
    return select([draw_balanced(labels, *settings)])[0]


def choose_all(labels: Tensor, ignore_index: int) -> Selection:
    return select([draw_all(labels, ignore_index)])[0]


def _numbered(labels: Tensor) -> Tensor:
    """A one-channel map whose values are the positions themselves."""
    return torch.arange(labels.numel(), dtype=torch.float64).view(len(labels), 1, *labels.shape[1:])


def test_sets_are_ordered_and_equal_in_size() -> None:
    labels = torch.full((2, 6, 6), 255)
    labels[0, :2] = 7  # 12 pixels
    labels[0, 2, :5] = 3  # 5
    labels[0, 3, :4] = 1  # 4: one too few
    labels[1, :5] = 0  # 30
    labels[1, 5] = 4095  # 6, the largest id
    anchors = sample_anchors(_numbered(labels), labels, generator=_generator())
    assert (anchors.groups, anchors.views) == (4, 5)
    assert anchors.labels.tolist() == [3] * 5 + [7] * 5 + [0] * 5 + [4095] * 5
    assert torch.equal(labels.flatten()[anchors.features.flatten().long()], anchors.labels)


@pytest.mark.parametrize(
    ("caps", "views"),
    [
        ({}, 9),
        ({"max_views": 4}, 4),
        ({"max_views": 1}, 1),
        ({"max_anchors": 11}, 5),
        ({"max_anchors": 1}, 1),
    ],
)
def test_caps(caps: dict[str, int], views: int) -> None:
    labels = torch.zeros(1, 3, 6).long()
    labels[:, :, 3:] = 1
    anchors = sample_anchors(torch.zeros(1, 2, 3, 6), labels, **caps)
    assert (anchors.groups, anchors.views) == (2, views)
    assert anchors.features.shape == (2 * views, 2)


@pytest.mark.parametrize("ignore_index", [255, -1, 19, 0])
def test_only_the_ignored_id_is_left_out(ignore_index: int) -> None:
    """The last class of a label set without an ignore id must be drawn like any other."""
    labels = torch.arange(8).repeat_interleave(8).view(1, 8, 8)
    anchors = sample_anchors(_numbered(labels), labels, ignore_index=ignore_index)
    assert anchors.labels.unique().tolist() == [c for c in range(8) if c != ignore_index]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types(dtype: torch.dtype) -> None:
    labels = torch.zeros(1, 4, 4, dtype=dtype)
    labels[:, 2:] = 1
    assert sample_anchors(torch.zeros(1, 2, 4, 4), labels).labels.dtype == torch.int64


def test_nothing_to_sample_gives_empty_attached_anchors() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    few = torch.full((2, 4, 4), 255)
    few[0, 0] = 1  # four pixels, fewer than min_views
    for labels in (torch.full((2, 4, 4), 255), few):
        anchors = sample_anchors(features, labels)
        assert (anchors.features.shape, anchors.groups, anchors.views) == ((0, 3), 0, 0)
        (grad,) = torch.autograd.grad(anchors.features.sum(), features)
        assert (grad == 0).all()


def test_single_pixels_can_be_sampled() -> None:
    labels = torch.full((1, 3, 3), 255)
    labels[0, 1, 2] = 4
    anchors = sample_anchors(_numbered(labels), labels, min_views=1)
    assert anchors.features.tolist() == [[5.0]]


def test_draw_is_uniform_without_replacement() -> None:
    sizes = torch.tensor([13, 7, 5, 9, 11, 15])
    labels = torch.arange(6).repeat_interleave(sizes).view(1, 1, 60)
    generator, draws = _generator(5), 3000
    counts = torch.zeros(60)
    for _ in range(draws):
        chosen = choose_balanced(labels, 255, 5, 2500, 10000, generator).positions
        assert len(chosen.unique()) == 6 * 5
        counts[chosen] += 1
    p = 5 / sizes.repeat_interleave(sizes)
    assert (counts[p == 1] == draws).all()
    z = ((counts - draws * p) / (draws * p * (1 - p)) ** 0.5)[p < 1]
    assert z.abs().max() < 4
    assert 0.8 < z.square().mean().sqrt() < 1.2


def test_generators_decide_alone() -> None:
    labels = torch.randint(4, (2, 16, 16), generator=_generator())
    features = _numbered(labels)
    first = sample_anchors(features, labels, max_views=9, generator=_generator(1)).features
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = sample_anchors(features, labels, max_views=9, generator=_generator(1)).features
    other = sample_anchors(features, labels, max_views=9, generator=_generator(2)).features
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        sample_anchors(features, labels, max_views=9).features,
        sample_anchors(features, labels, max_views=9).features,
    )


@pytest.mark.parametrize("size", [(64, 128), (65, 129), (61, 47), (16, 32)])
def test_labels_shrink_like_nearest_interpolation(size: tuple[int, int]) -> None:
    labels = torch.randint(19, (2, *size), generator=_generator())
    for target in ((16, 32), (17, 33), (15, 7), (1, 1), (40, 50)):
        expected = F.interpolate(labels[:, None].double(), size=target, mode="nearest")[:, 0].long()
        assert torch.equal(downsample_labels(labels, *target), expected)


def test_all_pixels_ordered_by_class() -> None:
    labels = torch.tensor([[[2, 255, 0]], [[0, 2, 1]]])
    chosen = choose_all(labels, 255)
    assert chosen.labels.tolist() == [0, 0, 1, 2, 2]
    assert chosen.positions.tolist() == [2, 3, 5, 0, 4]
    assert (chosen.groups, chosen.views) == (5, 0)
    assert choose_all(torch.full((1, 2, 2), 255), 255).positions.numel() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gather_and_its_gradient(layout: torch.memory_format) -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=_generator())
    features = features.contiguous(memory_format=layout).requires_grad_()
    positions = torch.tensor([39, 0, 7, 20])
    rows = gather_pixels(features, positions)
    assert torch.equal(rows, features.permute(0, 2, 3, 1).reshape(-1, 3)[positions])
    assert torch.autograd.gradcheck(lambda f: gather_pixels(f, positions), features)
    (grad,) = torch.autograd.grad(rows.sum(), features)
    assert grad.is_contiguous(memory_format=layout)
    strided = torch.randn(2, 4, 5, 6).permute(0, 3, 1, 2)[:, ::2]
    assert torch.equal(
        gather_pixels(strided, positions), strided.permute(0, 2, 3, 1).reshape(-1, 3)[positions]
    )


class _Synchronising(TorchDispatchMode):
    """Collects the operations that would make the host wait for a GPU."""

    names = ("nonzero", "_local_scalar_dense", "unique", "masked_select", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.names):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", ["balanced", "all"])
def test_one_host_synchronisation(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.randint(5, (2, 16, 16), generator=_generator())
    reads = []
    read = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or read(self))
    loss = MultiScaleContrastiveLoss(
        scale_weights=(1.0, 0.5), cross_pairs=((0, 1),), images_per_group=1, sampling=sampling
    )
    with _Synchronising() as operations:
        loss._sampled_groups([torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8)], labels, None)
    assert len(reads) == 1, "for all scales and groups together"
    assert operations.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_draw_and_one_synchronisation_on_cuda() -> None:
    labels = torch.randint(5, (2, 64, 64), generator=_generator())
    features = _numbered(labels).float()
    expected = sample_anchors(features, labels, generator=_generator(3))
    found = sample_anchors(features.cuda(), labels.cuda(), generator=_generator(3))
    assert torch.equal(found.features.cpu(), expected.features)
    on_device = torch.Generator("cuda").manual_seed(0)
    arguments = features.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            sample_anchors(*arguments, generator=on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        ((2, 3, 4), (2, 4, 4), {}, "must be float"),
        ((2, 3, 4, 4), (2, 4), {}, "integer map"),
        ((3, 3, 4, 4), (2, 4, 4), {}, "B = 2"),
        ((2, 3, 4, 4), (2, 4, 4), {"min_views": 0}, "at least 1"),
    ],
)
def test_misuse_is_named(features: tuple, labels: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_anchors(torch.zeros(features), torch.zeros(labels).long(), **options)


@pytest.mark.parametrize("bad", [-1, 4096])
def test_labels_out_of_range_are_named(bad: int) -> None:
    labels = torch.zeros(1, 4, 4).long()
    labels[0, 2, 2] = bad
    with pytest.raises(ValueError, match=r"labels must be 0\.\.4095 or ignore_index"):
        sample_anchors(torch.zeros(1, 2, 4, 4), labels)
    with pytest.raises(ValueError, match="integer map"):
        sample_anchors(torch.zeros(1, 2, 4, 4), labels.float())
    assert sample_anchors(torch.zeros(1, 2, 4, 4), labels, ignore_index=bad).groups == 1
