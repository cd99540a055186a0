"""The weighted sum of terms, its groups of images, and its equality over processes."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mscs.losses import MultiScaleContrastiveLoss, contrastive_loss, sample_anchors
from mscs.losses.multiscale import EMPTY_STEPS

SIZES = ((16, 24), (8, 12), (4, 6), (2, 3))


def _batch(images: int = 4, sizes: tuple = SIZES, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(images, 6, *size, generator=generator, dtype=dtype) for size in sizes]
    blocks = torch.randint(3, (images, 4, 6), generator=generator)
    labels = blocks.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    labels[:, 60:] = 255
    return features, labels


def _generators(first: int, last: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(700 + group) for group in range(first, last)]


def _grads(loss: MultiScaleContrastiveLoss, features: list[Tensor], labels: Tensor, generator=None):
    leaves = [feature.detach().requires_grad_() for feature in features]
    terms = loss(leaves, labels, generator)
    return terms, torch.autograd.grad(terms.total, leaves)


def test_terms_and_weights() -> None:
    features, labels = _batch()
    loss = MultiScaleContrastiveLoss(min_views=1, temperature=0.2)
    terms = loss(features, labels, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    drawn = [sample_anchors(f, labels, min_views=1, generator=generator) for f in features]
    multi = [contrastive_loss(a.features, a.labels, temperature=0.2) for a in drawn]
    cross = [
        contrastive_loss(
            drawn[a].features, drawn[a].labels, drawn[b].features, drawn[b].labels, temperature=0.2
        )
        for a, b in ((0, 3), (0, 2))
    ]
    torch.testing.assert_close(terms.multi_scale, torch.stack(multi))
    torch.testing.assert_close(terms.cross_scale, torch.stack(cross))
    weighted = sum(w * t for w, t in zip((1.0, 0.7, 0.4, 0.1), multi, strict=True))
    torch.testing.assert_close(terms.total, 0.1 * weighted + 0.1 * sum(cross))
    assert terms.anchors.tolist() == [[len(a.features) for a in drawn]]
    assert terms.groups.tolist() == [[a.groups for a in drawn]]
    assert terms.views.tolist() == [[a.views for a in drawn]]
    assert (terms.multi_scale > 0).all()
    assert (terms.cross_scale > 0).all()


def test_one_feature_map() -> None:
    features, labels = _batch()
    loss = MultiScaleContrastiveLoss(scale_weights=(1.0,), cross_pairs=())
    terms = loss(features[:1], labels)
    assert terms.cross_scale.shape == (0,)
    torch.testing.assert_close(terms.total, 0.1 * terms.multi_scale[0])


def test_all_pixels() -> None:
    features, labels = _batch()
    loss = MultiScaleContrastiveLoss(sampling="all")
    terms, grads = _grads(loss, features, labels)
    reduced = labels[:, ::4, ::4].flatten()
    rows = features[0].permute(0, 2, 3, 1).flatten(0, 2)[reduced != 255]
    torch.testing.assert_close(terms.multi_scale[0], contrastive_loss(rows, reduced[reduced != 255]))
    assert terms.anchors[0, 0] == (reduced != 255).sum()
    assert (grads[0].abs().sum(dim=1).flatten()[reduced != 255] > 0).all()
    assert (grads[0].abs().sum(dim=1).flatten()[reduced == 255] == 0).all()


def test_groups_equal_separate_batches() -> None:
    features, labels = _batch()
    grouped = MultiScaleContrastiveLoss(images_per_group=2, min_views=2)
    terms, grads = _grads(grouped, features, labels, _generators(0, 2))
    single = MultiScaleContrastiveLoss(min_views=2)
    parts = [
        _grads(single, [f[i : i + 2] for f in features], labels[i : i + 2], _generators(i // 2, i // 2 + 1))
        for i in (0, 2)
    ]
    torch.testing.assert_close(terms.total, (parts[0][0].total + parts[1][0].total) / 2)
    torch.testing.assert_close(terms.cross_scale, (parts[0][0].cross_scale + parts[1][0].cross_scale) / 2)
    for whole, first, second in zip(grads, parts[0][1], parts[1][1], strict=True):
        torch.testing.assert_close(whole, torch.cat((first, second)) / 2)
    assert terms.anchors.shape == (2, 4)
    whole_batch = MultiScaleContrastiveLoss(min_views=2)(features, labels, _generators(0, 1)[0])
    assert not torch.isclose(whole_batch.total, terms.total)


def test_a_group_without_labels_counts_as_zero() -> None:
    features, labels = _batch()
    labels[2:] = 255
    loss = MultiScaleContrastiveLoss(images_per_group=2, min_views=2)
    terms, grads = _grads(loss, features, labels, _generators(0, 2))
    alone = MultiScaleContrastiveLoss(min_views=2)([f[:2] for f in features], labels[:2], _generators(0, 1))
    torch.testing.assert_close(terms.total, alone.total / 2)
    assert terms.anchors[1].tolist() == [0, 0, 0, 0]
    assert all((grad[2:] == 0).all() for grad in grads)


@pytest.mark.parametrize("sampling", ["balanced", "all"])
def test_nothing_at_all_is_a_zero_attached_to_every_map(sampling: str) -> None:
    features, labels = _batch()
    loss = MultiScaleContrastiveLoss(sampling=sampling)
    terms, grads = _grads(loss, features, torch.full_like(labels, 255))
    assert terms.total == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("sampling", ["balanced", "all"])
def test_layouts_odd_sizes_and_half_precision(sampling: str) -> None:
    features, labels = _batch(2, ((17, 25), (9, 13), (5, 7), (3, 4)), dtype=torch.float32)
    labels = labels[:, :63, :95]
    loss = MultiScaleContrastiveLoss(min_views=1, sampling=sampling)
    expected, expected_grads = _grads(loss, features, labels, torch.Generator().manual_seed(0))
    last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    found, grads = _grads(loss, last, labels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.total, expected.total)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)
    half = [f.bfloat16() for f in features]
    rounded = loss([f.float() for f in half], labels, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(half, labels, torch.Generator().manual_seed(0))
    assert mixed.total.dtype == torch.float32
    torch.testing.assert_close(mixed.total, rounded.total)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "some"}, "accepted: all, balanced"),
        ({"cross_pairs": ((0, 4),)}, "two different scales out of 4"),
        ({"cross_pairs": ((1, 1),)}, "two different scales out of 4"),
        ({"scale_weights": (), "cross_pairs": ()}, "out of 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleContrastiveLoss(**settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    features, labels = _batch(4)
    loss = MultiScaleContrastiveLoss(images_per_group=3)
    with pytest.raises(ValueError, match="multiple of images_per_group"):
        loss(features, labels)
    loss.images_per_group = 2
    with pytest.raises(ValueError, match="3 generators for 2 groups"):
        loss(features, labels, _generators(0, 3))
    with pytest.raises(ValueError, match="3 feature maps for 4 scale weights"):
        loss(features[:3], labels)


def test_what_is_no_list_of_maps_or_no_generator_is_named() -> None:
    features, labels = _batch()
    loss = MultiScaleContrastiveLoss()
    with pytest.raises(ValueError, match=r"found dict.*pass list\(maps.values\(\)\)"):
        loss(dict(enumerate(features)), labels)
    with pytest.raises(ValueError, match=r"found Tensor.*\[map\]"):
        loss(features[0], labels)
    for wrong in (0, [0]):
        with pytest.raises(ValueError, match=r"found 0\. For a seed pass torch.Generator\(\)"):
            loss(features, labels, wrong)
    with pytest.raises(ValueError, match=r"found 0\. For a seed"):
        sample_anchors(features[0], labels, generator=0)


def test_the_record_is_not_added_to_a_loss() -> None:
    terms = MultiScaleContrastiveLoss()(*_batch())
    for add in (lambda: torch.ones(()) + terms, lambda: terms + torch.ones(()), lambda: sum([terms])):
        with pytest.raises(TypeError, match=r"loss \+ terms.total"):
            add()


def test_repr_shows_every_setting() -> None:
    loss = MultiScaleContrastiveLoss((1.0, 0.5), [(0, 1)], images_per_group=2, sampling="all", min_views=3)
    assert repr(loss) == (
        "MultiScaleContrastiveLoss(scale_weights=(1.0, 0.5), cross_pairs=((0, 1),), multi_scale_weight=0.1, "
        "cross_scale_weight=0.1, temperature=0.1, images_per_group=2, sampling='all', min_views=3, "
        "max_views=2500, max_anchors=10000, ignore_index=255, backend='auto', precision='auto')"
    )
    again = eval(repr(loss), {"MultiScaleContrastiveLoss": MultiScaleContrastiveLoss})
    assert repr(again) == repr(loss)


def test_a_scale_that_stays_empty_is_told_once() -> None:
    features, labels = _batch(2, ((4, 6), (2, 3)), dtype=torch.float32)
    loss = MultiScaleContrastiveLoss((1.0, 0.7), ((0, 1),), min_views=5, max_views=2)
    labels[:], labels[:, :, :48] = 0, 1  # 12 pixels of each class on the first map, 2 or 4 on the second
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(EMPTY_STEPS - 1):
            loss(features, labels)
        interrupted = MultiScaleContrastiveLoss((1.0, 0.7), ((0, 1),), min_views=5, max_views=2)
        for step in range(EMPTY_STEPS + 1):  # a step with pixels starts the count anew
            interrupted(features if step != EMPTY_STEPS // 2 else [features[0]] * 2, labels)
    with pytest.warns(UserWarning, match="scale 1 had no pixel .* min_views = 5 .* finer maps") as told:
        [loss(features, labels) for _ in range(3 * EMPTY_STEPS)]
    assert len(told) == 1


def test_maps_from_coarse_to_fine_are_told_once() -> None:
    features, labels = _batch()
    loss = MultiScaleContrastiveLoss()
    with pytest.warns(UserWarning, match=r"\[\(2, 3\), .* do not go from fine to coarse") as told:
        [loss(features[::-1], labels) for _ in range(3)]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss([features[0], features[1], features[1], features[1]], labels)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_compiled_models_leave_the_loss_uncompiled(backend: str) -> None:
    features, labels = _batch(dtype=torch.float32)
    heads = nn.ModuleList(nn.Conv2d(6, 5, 1) for _ in SIZES)
    loss = MultiScaleContrastiveLoss(min_views=1, backend=backend)

    def step(maps: list[Tensor]) -> Tensor:
        embeddings = [head(x) for head, x in zip(heads, maps, strict=True)]
        return loss(embeddings, labels, torch.Generator().manual_seed(0)).total

    def term(maps: list[Tensor]) -> Tensor:
        return contrastive_loss(heads[3](maps[3]).flatten(2)[0].T, labels[0, ::32, ::32].flatten())

    for function in (step, term):
        expected = torch.autograd.grad(function(features), heads[3].weight)
        found = torch.autograd.grad(torch.compile(function, backend="aot_eager")(features), heads[3].weight)
        torch.testing.assert_close(found, expected)


def _model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleList(nn.Conv2d(6, 5, 1).double() for _ in SIZES)


def _gradients(
    model: nn.Module, features: list[Tensor], labels: Tensor, first: int, groups: int
) -> list[Tensor]:
    loss = MultiScaleContrastiveLoss(images_per_group=1, min_views=1)
    terms = loss(model(features), labels, _generators(first, first + groups))
    terms.total.backward()
    return [parameter.grad for parameter in model.parameters()]


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = _model()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]


def _partly_labelled() -> tuple[list[Tensor], Tensor]:
    """Four images, the last of which has no labels: its process has nothing to contrast."""
    features, labels = _batch()
    labels[3] = 255
    return features, labels


def _train_on_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world
    )
    features, labels = _partly_labelled()
    share = 4 // world
    mine = slice(rank * share, (rank + 1) * share)
    model = DistributedDataParallel(_Heads())
    grads = _gradients(model, [f[mine] for f in features], labels[mine], rank * share, share)
    if rank == 0:
        torch.save(grads, f"{folder}/grads{world}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_do_not_depend_on_the_number_of_processes(world: int, tmp_path) -> None:
    expected = _gradients(_Heads(), *_partly_labelled(), 0, 4)
    mp.set_forkserver_preload(["torch", "mscs.losses"])
    mp.start_processes(_train_on_rank, (world, str(tmp_path)), nprocs=world, start_method="forkserver")
    found = torch.load(tmp_path / f"grads{world}.pt")
    assert sum(float(grad.abs().sum()) for grad in expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
