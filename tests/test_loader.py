"""Batches are a function of (seed, step): any number of workers or processes, any starting step."""

import itertools

import numpy as np
import pytest
import torch

from mscs.datasets import Sample
from mscs.errors import MscsError, UsageError
from mscs.loader import Draw, draws_of_step, train_loader
from mscs.transforms import TrainTransform

SIZE = 23


class Pictures:
    """A dataset in memory: image i is filled with i."""

    def __init__(self, number=SIZE, broken=None):
        self.number, self.broken = number, broken

    def __len__(self):
        return self.number

    def __getitem__(self, i):
        if i == self.broken:
            raise MscsError("picture.png: cannot be decoded")
        rng = np.random.default_rng(i)
        return Sample(
            rng.integers(0, 256, (20, 30, 3), np.uint8), rng.integers(0, 4, (20, 30), np.uint8), str(i)
        )


def load(number=SIZE, **options):
    options = {"batch_size": 8, "seed": 3, "num_steps": 5} | options
    return list(train_loader(Pictures(number), TrainTransform(crop_size=(16, 16)), **options))


def assert_same(batches, others):
    assert [b.step for b in batches] == [b.step for b in others]
    for batch, other in zip(batches, others, strict=True):
        assert batch.ids == other.ids
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.labels, other.labels)


def test_batch():
    batch = load()[0]
    assert batch.images.shape == (8, 3, 16, 16)
    assert (batch.labels.shape, batch.labels.dtype) == ((8, 16, 16), torch.int64)
    assert len(batch.ids) == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(workers):
    assert_same(load(num_workers=workers), load())


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_processes(world_size):
    parts = [load(rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = load()
    for step, batch in enumerate(whole):
        assert list(itertools.chain.from_iterable(part[step].ids for part in parts)) == batch.ids
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part[step].labels for part in parts]), batch.labels)


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_starting_anywhere_continues_the_stream(start):
    assert_same(load(start_step=start), load()[start:])


def test_epochs_are_permutations_with_the_rest_dropped():
    draws = [draws_of_step(SIZE, 8, 3, step) for step in range(6)]
    orders = []
    for epoch in range(3):
        batch = draws[2 * epoch] + draws[2 * epoch + 1]
        assert {draw.epoch for draw in batch} == {epoch}
        assert len({draw.sample for draw in batch}) == 16
        orders.append([draw.sample for draw in batch])
    assert orders[0] != orders[1] != orders[2]
    assert {sample for step in range(60) for _, sample in draws_of_step(SIZE, 8, 3, step)} == set(range(SIZE))


def test_order_depends_on_the_seed_only_through_the_permutation():
    assert draws_of_step(SIZE, 8, 3, 0) == draws_of_step(SIZE, 8, 3, 0)
    assert draws_of_step(SIZE, 8, 3, 0) != draws_of_step(SIZE, 8, 4, 0)


def test_a_sample_looks_different_in_each_epoch():
    by_id = {}
    for batch in load(num_steps=8):
        for name, image in zip(batch.ids, batch.images, strict=True):
            by_id.setdefault(name, []).append(image)
    repeated = [images for images in by_id.values() if len(images) > 1]
    assert repeated
    assert all(not torch.equal(a, b) for images in repeated for a, b in itertools.pairwise(images))


def test_a_dataset_smaller_than_the_batch():
    draws = [draw for step in range(6) for draw in draws_of_step(5, 8, 0, step)]
    assert [draw.epoch for draw in draws] == [place // 5 for place in range(48)]
    assert {draw.sample for draw in draws[:5]} == {draw.sample for draw in draws[5:10]} == set(range(5))
    assert draws[0] == Draw(0, draws[0].sample)
    batch = load(number=5)[1]
    assert batch.images.shape[0] == 8
    assert len(torch.unique(batch.images.flatten(1), dim=0)) == 8  # repeats are augmented anew


def test_uneven_division_is_refused():
    with pytest.raises(UsageError, match=r"batch of 8 .* 3 processes"):
        load(world_size=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_ends_the_loop_with_its_name(workers):
    loader = train_loader(
        Pictures(8, broken=2),
        TrainTransform(crop_size=(16, 16)),
        batch_size=4,
        seed=0,
        num_steps=2,
        num_workers=workers,
    )
    with pytest.raises(MscsError, match=r"^picture\.png: cannot be decoded$"):
        list(loader)
