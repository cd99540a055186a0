"""Generated datasets: the real layout, reproducible bytes, few classes, which colour does not tell."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mscs.datasets import DATASETS, build_dataset, label_set, toy
from mscs.errors import UsageError
from reproduce.baselines import colour_miou

# image and label of the first training sample
EXPECTED = {
    "cityscapes": (
        "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
    ),
    "ade20k": (
        "ADEChallengeData2016/images/training/ADE_train_00000001.jpg",
        "ADEChallengeData2016/annotations/training/ADE_train_00000001.png",
    ),
    "pascal_context": (
        "VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg",
        "SegmentationClassContext59/2008_000001.png",
    ),
    "cadis": ("Video01/Images/Video1_frame000010.png", "Video01/Labels/Video1_frame000010.png"),
    "camvid": ("train/0001TP_000000.png", "trainannot/0001TP_000000.png"),
}
SIZE = (64, 96)


def write(name: str, root: Path, **changes: int) -> Path:
    arguments = {"train": 12, "val": 4} | changes
    toy.write_dataset(name, root, image_size=SIZE, **arguments)
    return root


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("generated")
    return {name: write(name, base / name) for name in DATASETS}


@pytest.mark.parametrize("name", DATASETS)
def test_layout_is_read_by_the_readers(name: str, trees: dict[str, Path]) -> None:
    for file in EXPECTED[name]:
        assert (trees[name] / file).is_file()
    for split, count in (("train", 12), ("val", 4)):
        dataset = build_dataset(name, split, trees[name])
        assert len(dataset) == count
        for i in range(count):
            height, width = dataset[i].label.shape
            assert 0.75 * SIZE[0] - 1 <= height <= SIZE[0]
            assert 0.75 * SIZE[1] - 1 <= width <= SIZE[1]


@pytest.mark.parametrize("name", DATASETS)
def test_few_classes_some_of_them_rare_and_colour_does_not_tell_them(
    name: str, trees: dict[str, Path]
) -> None:
    train, val = (build_dataset(name, split, trees[name]) for split in ("train", "val"))
    labels = np.concatenate([train[i].label.ravel() for i in range(len(train))])
    counts = np.bincount(labels, minlength=256)[: train.num_classes]
    assert counts.sum() == labels.size, "every pixel belongs to a class"
    assert 8 <= np.count_nonzero(counts) <= 12
    assert counts.max() > 3 * counts[counts > 0].min()
    assert colour_miou(train, val) < 35


@pytest.mark.parametrize("name", DATASETS)
def test_tables_name_classes_of_the_dataset(name: str) -> None:
    shown = {part[0] for _, parts in toy.things(DATASETS[name].toy.things) for part in parts}
    assert 8 <= len(shown) <= 12
    assert shown <= set(label_set(name).classes)


@pytest.mark.parametrize("name", DATASETS)
def test_bytes_depend_on_the_arguments_alone(name: str, tmp_path: Path) -> None:
    first, again, other = (
        digest(write(name, tmp_path / folder, train=2, val=1, seed=seed))
        for folder, seed in (("first", 5), ("again", 5), ("other", 6))
    )
    assert first == again
    assert first != other


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    few, many = write("cadis", tmp_path / "few", train=1), write("cadis", tmp_path / "many", train=3)
    file = EXPECTED["cadis"][0]
    assert (few / file).read_bytes() == (many / file).read_bytes()


def test_a_finished_tree_is_kept_and_another_request_replaces_it(tmp_path: Path) -> None:
    root = write("cityscapes", tmp_path / "set", train=2, val=1)
    stamp = (root / toy.MARKER).stat().st_mtime_ns
    write("cityscapes", root, train=2, val=1)
    assert (root / toy.MARKER).stat().st_mtime_ns == stamp
    write("cityscapes", root, train=1, val=1)
    assert json.loads((root / toy.MARKER).read_text())["train"] == 1
    assert len(build_dataset("cityscapes", "train", root)) == 1


def test_a_failure_leaves_the_old_tree_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write("cadis", tmp_path / "set", train=1, val=1)
    before = digest(root)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("light bulb")

    monkeypatch.setattr(toy, "render", broken)
    with pytest.raises(RuntimeError, match="light bulb"):
        write("cadis", root, train=2, val=1)
    assert digest(root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(UsageError, match="was not generated"):
        write("cadis", tmp_path / "set", train=1, val=1)


def test_two_that_want_the_same_tree_draw_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    replace_tree = toy._replace_tree
    monkeypatch.setattr(
        toy, "_replace_tree", lambda *args: (drawn.append(args[-1]["dataset"]), replace_tree(*args))
    )
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(write, "cadis", tmp_path / "set", train=2, val=1) for _ in range(2)]
    assert jobs[0].result() == jobs[1].result()
    assert drawn == ["cadis"]


def test_real_data_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photograph.png").write_bytes(b"precious")
    with pytest.raises(UsageError, match="was not generated"):
        write("cadis", tmp_path)
    assert (tmp_path / "photograph.png").read_bytes() == b"precious"


@pytest.mark.parametrize("changes", [{"train": 0}, {"val": -1}])
def test_impossible_numbers_are_refused(changes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Accepted"):
        write("cadis", tmp_path / "set", **changes)
