import cv2
import numpy as np
import pytest
from PIL import Image

from mscs.datasets import label_set
from mscs.datasets.base import decode_label
from mscs.predictions import write_prediction

CASES = [
    ("cityscapes", None),
    ("ade20k", None),
    ("pascal_context", None),
    ("cadis", 1),
    ("cadis", 2),
    ("cadis", 3),
]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_written_prediction_reads_back_as_a_label(name, task, tmp_path):
    labels = label_set(name, task)
    prediction = np.random.default_rng(0).integers(0, labels.num_classes, (32, 48), dtype=np.uint8)
    path = write_prediction(tmp_path, labels, "some_000001_000002", prediction)
    raw = decode_label(path.read_bytes(), path)
    assert np.array_equal(cv2.LUT(raw, np.frombuffer(labels.lookup(), np.uint8)), prediction)


def test_cityscapes_files_hold_label_ids_in_grey(tmp_path):
    prediction = np.arange(19, dtype=np.uint8)[None].repeat(2, 0)
    path = write_prediction(tmp_path, label_set("cityscapes"), "frankfurt_000000_000294", prediction)
    assert path.name == "frankfurt_000000_000294_pred_labelIds.png"
    with Image.open(path) as image:
        assert image.mode == "L"
        ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        assert np.asarray(image)[0].tolist() == ids


def test_ade20k_files_are_indexed_from_1_to_150_and_show_the_palette(tmp_path):
    labels = label_set("ade20k")
    path = write_prediction(tmp_path, labels, "ADE_val_00000001", np.arange(150, dtype=np.uint8)[None])
    assert path.name == "ADE_val_00000001.png"
    with Image.open(path) as image:
        assert image.mode == "P"
        assert np.asarray(image)[0].tolist() == list(range(1, 151))
        assert np.asarray(image.convert("RGB"))[0].tolist() == [list(color) for color in labels.colors]
