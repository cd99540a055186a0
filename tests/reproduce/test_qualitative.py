from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mscs.build import network
from mscs.checkpoint import save_weights
from mscs.datasets.toy import write_dataset
from mscs.params import load_params
from reproduce.qualitative import Box, choose_rows, find_boxes, image_miou, write_comparisons
from reproduce.trained import TrainedRun


def test_boxes_are_the_largest_regions_that_only_one_gets_right():
    label = np.zeros((100, 100), np.uint8)
    right, wrong = np.zeros_like(label), np.zeros_like(label)
    wrong[10:20, 30:50] = 1  # 200 pixels
    wrong[60:90, 5:15] = 2  # 300 pixels
    wrong[95:97, 95:97] = 1  # 4 pixels, below the least area of 5
    wrong[40:45, 80:90] = 3
    right[40:45, 80:90] = 3  # both wrong: no region
    assert find_boxes(label, right, wrong) == [Box(5, 60, 10, 30, 300), Box(30, 10, 20, 10, 200)]
    assert find_boxes(label, wrong, right) == []


def test_boxes_join_diagonal_neighbours_and_skip_ignored_pixels():
    label = np.zeros((40, 40), np.uint8)
    right, wrong = np.zeros_like(label), np.zeros_like(label)
    wrong[0:4, 0:4] = wrong[4:8, 4:8] = 1
    wrong[20:30, 20:30] = 1
    label[20:30, 20:30] = 255
    assert find_boxes(label, right, wrong) == [Box(0, 0, 8, 8, 32)]


def test_at_most_three_boxes():
    label = np.zeros((50, 50), np.uint8)
    wrong = label.copy()
    for size, corner in enumerate((0, 10, 20, 30, 40), start=2):
        wrong[corner : corner + size, 0:size] = 1
    assert [box.pixels for box in find_boxes(label, label, wrong)] == [36, 25, 16]


def test_rows_are_best_median_and_worst_in_equal_shares():
    gains = np.array([0.0, 5.0, -3.0, 1.0, 9.0, -8.0, 2.0, -1.0, 4.0])
    best, median, worst = [4, 1], [6, 3], [2, 5]
    ranks = ["best"] * 2 + ["median"] * 2 + ["worst"] * 2
    assert choose_rows(gains) == list(zip(best + median + worst, ranks, strict=True))


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 6, 7, 20])
def test_no_image_is_shown_twice(images):
    rows = choose_rows(np.arange(images, dtype=float))
    assert len({i for i, _ in rows}) == len(rows) == (images if images < 3 else 3 if images < 6 else 6)


def test_image_miou_averages_over_the_classes_of_the_label():
    label = np.array([[0, 0, 1, 1, 255]], np.uint8)
    prediction = np.array([[0, 0, 1, 5, 7]], np.uint8)
    assert image_miou(prediction, label) == pytest.approx(75.0)
    assert image_miou(prediction, np.full_like(label, 255)) == 0.0


@pytest.fixture
def runs(tmp_path: Path) -> list[TrainedRun]:
    """CaDIS: its protocol scores mirrored rows, so that image, label and prediction must be made to fit."""
    write_dataset("cadis", tmp_path / "data", train=1, val=3, image_size=(47, 80))
    found = []
    for seed, run in enumerate(("cadis-ocrnet-r50-ce", "cadis-ocrnet-r50-ours")):
        settings = load_params().resolve(run, "mini").settings
        weights = tmp_path / f"{run}.safetensors"
        classes = TrainedRun(settings, weights, tmp_path / "data", run).dataset().num_classes
        save_weights(weights, network(settings, classes, seed=seed).state_dict(), {})
        found.append(TrainedRun(settings, weights, tmp_path / "data", run))
    return found


def test_sheet_reports_what_it_shows(tmp_path, runs):
    found = write_comparisons("fig4", *runs, tmp_path, "profile mini: a stamp")
    assert found["images"] == 3
    assert [row["rank"] for row in found["rows"]] == ["best", "median", "worst"]
    gains = [row["gain"] for row in found["rows"]]
    assert gains == sorted(gains, reverse=True)
    assert found["mean_gain"] == pytest.approx(np.mean(gains))
    for row in found["rows"]:
        assert row["gain"] == pytest.approx(row["ours"] - row["baseline"])
        assert row["id"] in runs[0].dataset().ids
    sample = runs[0].dataset()[0]
    assert runs[0].predict(sample).shape == runs[0].label(sample).shape == runs[0].image(sample).shape[:2]
    assert Image.open(tmp_path / "fig4.png").width == 1440
    assert (tmp_path / "fig4.pdf").read_bytes().startswith(b"%PDF")
