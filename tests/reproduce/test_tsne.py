import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mscs.build import network
from mscs.checkpoint import save_weights
from mscs.datasets import Sample
from mscs.datasets.toy import write_dataset
from mscs.errors import MscsError
from mscs.params import load_params
from reproduce import tsne
from reproduce.trained import TrainedRun
from reproduce.tsne import Points, balance, embed, separation, spaces_of, write_tsne


def points_at(centres: list[list[float]], classes: list[int], images: list[int]) -> Points:
    features = np.array(centres, dtype=float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Points(features, np.array(classes), np.array(images))


def test_separated_classes_measure_as_separated():
    axes = [[1.0, 0.0], [0.0, 1.0]] * 4
    found = separation(points_at(axes, [3, 7] * 4, [0, 0, 1, 1, 2, 2, 3, 3]))
    assert found == {"knn_accuracy": 100.0, "silhouette": 1.0, "distance_ratio": 0.0}


def test_identical_classes_measure_as_mixed():
    # every class has the same two directions: within and between have equal pairs, up to leaving out self
    both = [[1.0, 0.0], [0.0, 1.0]]
    found = separation(points_at(both * 40, [0, 0, 1, 1] * 20, list(range(80))))
    assert found["distance_ratio"] == pytest.approx((40 * 20 / (40 * 39)) / 0.5)
    assert found["silhouette"] == pytest.approx(-1 / 39 / 1, abs=0.03)


def test_neighbours_come_from_other_images():
    # within each image both points coincide, so that neighbours of the same image would always be right
    centres = [
        [1.0, 0.0],
        [1.0, 0.0],
        [0.0, 1.0],
        [0.0, 1.0],
        [1.0, 0.01],
        [1.0, 0.01],
        [0.01, 1.0],
        [0.01, 1.0],
    ]
    found = separation(points_at(centres, [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]))
    assert found["knn_accuracy"] == 0.0


def test_every_class_counts_the_same():
    centres = [[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 2
    classes = [0] * 30 + [1, 1]
    found = separation(points_at(centres, classes, list(range(32))))
    # the two points of class 1 see one of their own and four of class 0
    assert found["knn_accuracy"] == 50.0


def test_balance_limits_frequent_and_drops_rare_classes():
    classes = np.repeat([0, 1, 2], [500, 20, 3])
    points = balance(Points(np.eye(523), classes, np.arange(523)), tsne.ALL_SCALES)
    values, counts = np.unique(points.classes, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {0: tsne.PER_CLASS, 1: 20}
    assert (points.features.argmax(1) == points.images).all()


def test_scales_are_normalised_before_and_after_joining():
    maps = [1000 * torch.rand(3, 16, 32), torch.rand(5, 8, 16)]
    label = np.zeros((64, 128), np.uint8)
    spaces = spaces_of(maps, Sample(np.zeros((64, 128, 3), np.uint8), label, "x"))
    assert list(spaces) == [tsne.ALL_SCALES, "scale 0, stride 4", "scale 1, stride 8"]
    joined = spaces[tsne.ALL_SCALES]
    assert joined.shape == (8, 16, 32)
    torch.testing.assert_close(joined.norm(dim=0), torch.ones(16, 32))
    assert float(joined[3:].norm(dim=0).mean()) == pytest.approx(0.5**0.5, abs=0.03)


def test_embedding_is_the_same_each_time():
    random = np.random.default_rng(0)
    features = random.normal(size=(40, 5)) + np.repeat(np.eye(2, 5) * 20, 20, 0)
    points = Points(features.astype(np.float32), np.repeat([0, 1], 20), np.arange(40))
    plane = embed(points, 400)
    assert np.array_equal(plane, embed(points, 400))
    gap = np.linalg.norm(plane[:20].mean(0) - plane[20:].mean(0))
    assert gap > 2 * plane[:20].std(0).max()


def test_too_few_labelled_pixels_is_an_error_that_says_so(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(tsne, "LEAST_PER_CLASS", 10**6)
    with pytest.raises(MscsError, match="fewer than two classes"):
        tsne.sample_pixels(runs[0], tsne.MINI)


@pytest.fixture
def runs(tmp_path: Path) -> list[TrainedRun]:
    write_dataset("cityscapes", tmp_path / "data", train=1, val=3, image_size=(64, 128))
    found = []
    for seed, run in enumerate(("cityscapes-upernet-r101-ce", "cityscapes-upernet-r101-ours")):
        settings = load_params().resolve(run, "mini", {"channels_last": False}).settings
        weights = tmp_path / f"{run}.safetensors"
        save_weights(weights, network(settings, 19, seed=seed).state_dict(), {})
        found.append(TrainedRun(settings, weights, tmp_path / "data", run))
    return found


def test_figure_has_numbers_for_both_runs_and_every_scale(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(tsne, "PER_CLASS", 12)
    monkeypatch.setattr(tsne, "PER_CLASS_OF_SCALE", 10)
    write_tsne([runs[0]], [runs[1]], tmp_path, "profile mini: a stamp")
    found = json.loads((tmp_path / "fig1.json").read_text())
    assert list(found) == [*tsne.NETWORKS, "points", "picture"]
    assert found["picture"]["iterations"] == tsne.MINI.iterations
    assert 1 < max(found["picture"]["points"].values()) <= tsne.MINI.per_class
    for name in tsne.NETWORKS:
        assert {tsne.ALL_SCALES, "scale 0, stride 4"} <= set(found[name])
        assert tsne.RAW not in found[name]
        assert all(0 <= values["knn_accuracy"] <= 100 for values in found[name].values())
    assert found[tsne.NETWORKS[0]] != found[tsne.NETWORKS[1]]
    assert max(found["points"].values()) == tsne.PER_CLASS
    assert min(Image.open(tmp_path / "fig1.png").size) > 1000
    first = (tmp_path / "fig1.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    assert b"/CreationDate" not in first
    assert not list(tmp_path.glob(".*"))


class Street:
    """A run whose images show one class on either side and whose map tells each cell."""

    def __init__(self, images):
        self.images = images

    def dataset(self):
        label = np.full((32, 64), 255, np.uint8)
        label[:, :32], label[:16, 32:] = 3, 17
        return [Sample(np.zeros((32, 64, 3), np.uint8), label, str(i)) for i in range(self.images)]

    def label(self, sample):
        return sample.label

    def features(self, sample):
        cells = torch.arange(8.0 * 16).reshape(1, 8, 16) + 1
        return [torch.cat([cells, torch.full_like(cells, float(sample.id))]), torch.rand(2, 4, 8)]


def test_the_picture_takes_what_the_authors_take():
    assert (tsne.AUTHORS.per_class, tsne.AUTHORS.iterations, tsne.PERPLEXITY) == (1000, 2000, 30)
    points = tsne.sample_pixels(Street(110), tsne.AUTHORS)[tsne.RAW]
    for value, per_image, total in ((3, 2, 220), (17, 10, 1000)):
        of_class = points.classes == value
        assert of_class.sum() == total
        images, counts = np.unique(points.images[of_class], return_counts=True)
        assert set(counts) == {per_image}
        # in order of the images, until there are enough
        assert images.tolist() == list(range(total // per_image))
    cells, image = points.features.T
    assert np.array_equal(image, points.images), "features are those of the cell, neither scaled nor joined"
    columns, rows = (cells.astype(int) - 1) % 16, (cells.astype(int) - 1) // 16
    assert np.array_equal(points.classes == 3, columns < 8)
    assert (rows[points.classes == 17] < 4).all()
    assert len(np.unique(cells[points.classes == 17])) == 32, "drawn at random from all cells"


def test_profile_paper_draws_as_the_authors_and_mini_less(tmp_path, runs, monkeypatch):
    asked = []
    plane = lambda points, iterations: asked.append(iterations) or np.zeros((len(points.classes), 2))  # noqa: E731
    monkeypatch.setattr(tsne, "embed", plane)

    def real(run):
        data = run.settings.data.model_copy(update={"source": "real"})
        return replace(run, settings=run.settings.model_copy(update={"data": data}))

    for name, pair in {"mini": runs, "paper": [real(run) for run in runs]}.items():
        asked.clear()
        write_tsne(pair[:1], pair[1:], tmp_path / name, "a stamp")
        expected = tsne.MINI if name == "mini" else tsne.AUTHORS
        assert asked == [expected.iterations] * 2
        drawn = json.loads((tmp_path / name / "fig1.json").read_text())["picture"]
        assert (drawn["per_class"], drawn["perplexity"]) == (expected.per_class, 30)
        assert drawn["iterations"] == expected.iterations


def test_numbers_of_several_seeds_are_mean_and_standard_deviation(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(tsne, "PER_CLASS", 12)
    monkeypatch.setattr(tsne, "PER_CLASS_OF_SCALE", 10)
    monkeypatch.setattr(tsne, "embed", lambda points, iterations: np.zeros((len(points.classes), 2)))
    single = []
    for name, seeds in (("a", runs[:1]), ("b", runs[1:]), ("both", runs)):
        write_tsne(seeds, seeds, tmp_path / name, "a stamp")
        found = json.loads((tmp_path / name / "fig1.json").read_text())[tsne.NETWORKS[0]]
        single.append(found[tsne.ALL_SCALES])
    a, b, both = single
    for key in ("knn_accuracy", "silhouette", "distance_ratio"):
        assert both[key] == pytest.approx((a[key] + b[key]) / 2, abs=1e-5)
        assert both[f"{key}_std"] == pytest.approx(abs(a[key] - b[key]) / 2**0.5, abs=1e-5)
        assert f"{key}_std" not in a
