"""One contract for all datasets, in the real layout and generated; mapping, errors, start-up cost."""

import importlib
import pickle
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mscs.datasets import DATASETS, Dataset, Sample, build_dataset, label_set
from mscs.datasets.cadis import VIDEOS, blacklist
from mscs.datasets.fetch import fetch
from mscs.datasets.spec import Part, Spec, build_index, names_in, numbered_labels, voc_palette
from mscs.datasets.verify import verify
from mscs.errors import MscsError, UsageError
from mscs.predictions import write_prediction


def split_sizes(name):
    return {"train": 3, "val": 2} | ({"test": 1} if "test" in DATASETS[name].splits else {})


@pytest.fixture(params=["real layout", "generated"])
def any_root(request, make_tree, tmp_path):
    """A function from a dataset's name to the root of a tree."""
    if request.param == "real layout":
        return lambda name: make_tree(name, split_sizes(name))

    def generate(name):
        toy = importlib.import_module("mscs.datasets.toy")
        root = tmp_path / name
        toy.write_dataset(name, root, seed=1, train=3, val=2, image_size=(64, 96))
        return root

    return generate


@pytest.mark.parametrize("name", DATASETS)
def test_contract(name, any_root):
    root = any_root(name)
    for split in ("train", "val"):
        dataset = build_dataset(name, split, root)
        assert isinstance(dataset, Dataset)
        assert (dataset.name, dataset.split) == (name, split)
        assert len(dataset) == {"train": 3, "val": 2}[split] == len(set(dataset.ids))
        assert len(dataset.classes) == dataset.num_classes == len(dataset.colors)
        assert dataset.colors.dtype == np.uint8
        assert dataset.ignore_index == 255
        for i in range(len(dataset)):
            sample = dataset[i]
            assert isinstance(sample, Sample)
            assert sample.id == dataset.ids[i]
            assert sample.image.dtype == sample.label.dtype == np.uint8
            assert sample.image.shape == (*sample.label.shape, 3)
            values = np.unique(sample.label)
            assert values[values != 255].max() < dataset.num_classes
    twin = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(twin[0].image, dataset[0].image)


@pytest.mark.parametrize(
    ("name", "task"),
    [(name, labels.task) for name, spec in DATASETS.items() for labels in spec.label_sets],
)
def test_labels_are_mapped_as_the_table_says(name, task, make_tree):
    dataset = build_dataset(name, "train", make_tree(name), task)
    labels = label_set(name, task)
    for entry, sample in zip(dataset.entries, dataset, strict=True):
        raw = cv2.imread(str(dataset.root / entry.label), cv2.IMREAD_UNCHANGED)
        expected = np.full(raw.shape, 255, np.uint8)
        for train_id, values in enumerate(labels.raw_ids):
            for value in values:
                expected[raw == value] = train_id
        assert np.array_equal(sample.label, expected)
        assert set(np.unique(sample.label)) >= set(range(labels.num_classes))


@pytest.mark.parametrize("name", DATASETS)
def test_images_are_rgb_and_equal_to_pil(name, make_tree):
    dataset = build_dataset(name, "val", make_tree(name))
    with Image.open(dataset.root / dataset.entries[0].image) as image:
        assert np.array_equal(dataset[0].image, np.asarray(image.convert("RGB")))


def test_cityscapes_agrees_with_the_official_scripts():
    official = pytest.importorskip("cityscapesscripts.helpers.labels")
    labels = label_set("cityscapes")
    lookup = labels.lookup()
    for label in official.labels:
        assert lookup[label.id % 256] == (label.trainId if label.trainId >= 0 else 255), label.name
        if 0 <= label.trainId < 255:
            assert labels.classes[label.trainId] == label.name
            assert labels.colors[label.trainId] == label.color
    assert labels.known_raw_values() == {label.id % 256 for label in official.labels}


def test_facts():
    counts = {"cityscapes": 19, "ade20k": 150, "pascal_context": 59, "camvid": 11}
    assert {name: label_set(name).num_classes for name in counts} == counts
    assert [label_set("cadis", task).num_classes for task in (1, 2, 3)] == [8, 17, 25]
    assert label_set("cadis").task == 3
    assert {name: tuple(spec.splits.values()) for name, spec in DATASETS.items()} == {
        "cityscapes": (2975, 500, 1525),
        "ade20k": (20210, 2000),
        "pascal_context": (4998, 5105),
        "cadis": (3550, 534, 586),
        "camvid": (367, 101, 233),
    }
    assert sorted(video for videos in VIDEOS.values() for video in videos) == list(range(1, 26))
    assert len(blacklist()) == 179
    for task in (1, 2, 3):
        labels = label_set("cadis", task)
        assert labels.known_raw_values() == set(range(36))
        assert labels.raw_ids[:7] == tuple((value,) for value in range(7))
        anatomy = ("Pupil", "Surgical Tape", "Hand", "Eye Retractors", "Iris", "Skin", "Cornea")
        assert labels.classes[:7] == anatomy
    weights = label_set("cityscapes").class_weights
    assert len(weights) == 19
    assert (weights[0], weights[-1]) == (0.8373, 1.0507)
    assert voc_palette(3) == ((128, 0, 0), (0, 128, 0), (128, 128, 0))


def test_every_colour_is_unique():
    for labels in (*(label_set(name) for name in DATASETS), label_set("cadis", 1), label_set("cadis", 2)):
        assert len(set(labels.colors)) == labels.num_classes


def test_cityscapes_reads_train_ids(make_tree):
    root = make_tree("cityscapes")
    ids = np.array([*range(19), 255], np.uint8)
    raw = build_dataset("cityscapes", "train", root)
    for entry in raw.entries:
        path = root / entry.label
        cv2.imwrite(str(path).replace("labelIds", "labelTrainIds"), np.resize(ids, (24, 40)))
        path.unlink()
    dataset = build_dataset("cityscapes", "train", root)
    assert np.array_equal(dataset[0].label, np.resize(ids, (24, 40)))
    assert dataset.known_raw_values == set(ids.tolist())


def test_blacklist_is_an_option(make_tree):
    root = make_tree("cadis")
    listed = sorted(id for id in blacklist() if id.startswith("Video8_"))[0]
    image, label = (root / "Video01" / kind / "Video1_frame000000.png" for kind in ("Images", "Labels"))
    for source, kind in ((image, "Images"), (label, "Labels")):
        target = root / "Video08" / kind / f"{listed}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    assert listed in build_dataset("cadis", "train", root).ids
    assert listed not in build_dataset("cadis", "train", root, exclude_blacklisted=True).ids


def test_palette_labels_are_read_by_index(make_tree):
    root = make_tree("pascal_context")
    path = root / build_dataset("pascal_context", "train", root).entries[0].label
    raw = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    palette = Image.fromarray(raw).convert("P")
    palette.putdata(raw.ravel().tolist())
    palette.putpalette(list(range(256)) * 3)
    before = build_dataset("pascal_context", "train", root)[0].label
    palette.save(path)
    assert np.array_equal(build_dataset("pascal_context", "train", root)[0].label, before)


def test_exif_rotation_is_not_applied(make_tree):
    root = make_tree("ade20k")
    dataset = build_dataset("ade20k", "train", root)
    path = root / dataset.entries[0].image
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # rotate by 90 degrees
        image.save(path, exif=exif, quality=95)
    assert dataset[0].image.shape == (24, 40, 3)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "gone"])
def test_broken_files_are_named(name, damage, make_tree):
    root = make_tree(name)
    dataset = build_dataset(name, "train", root)
    path = root / dataset.entries[1].image
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    with pytest.raises(MscsError, match=path.name):
        dataset[1]
    assert dataset[0].id == dataset.ids[0]


def test_size_mismatch_is_named(make_tree):
    root = make_tree("ade20k")
    dataset = build_dataset("ade20k", "train", root)
    path = root / dataset.entries[0].label
    cv2.imwrite(str(path), np.zeros((10, 10), np.uint8))
    with pytest.raises(MscsError, match=rf"{path.name}.*10x10.*40x24"):
        dataset[0]


@pytest.mark.parametrize(
    "pixels", [np.zeros((24, 40, 3), np.uint8), np.zeros((24, 40), np.uint16)], ids=["colour", "16 bit"]
)
def test_labels_of_the_wrong_kind_are_refused(pixels, make_tree):
    root = make_tree("ade20k")
    dataset = build_dataset("ade20k", "train", root)
    cv2.imwrite(str(root / dataset.entries[0].label), pixels)
    with pytest.raises(MscsError, match="expected 8-bit class ids"):
        dataset[0]


def test_missing_label_is_named(make_tree):
    root = make_tree("cadis")
    victim = next((root / "Video01" / "Labels").iterdir())
    victim.unlink()
    with pytest.raises(MscsError, match=victim.name):
        build_dataset("cadis", "train", root)


@pytest.mark.parametrize("name", DATASETS)
def test_missing_folder_says_how_to_get_it(name, tmp_path):
    with pytest.raises(UsageError, match=rf"{tmp_path}.*mscs data fetch {name}.*mscs data synth {name}"):
        build_dataset(name, "train", tmp_path / "nowhere")


def test_unprepared_pascal_context_says_so(make_tree):
    root = make_tree("pascal_context")
    (root / "SegmentationClassContext59").rename(root / "trainval")
    with pytest.raises(UsageError, match="mscs data prepare pascal_context"):
        build_dataset("pascal_context", "train", root)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("cityscape", "train"), {}, "did you mean 'cityscapes'"),
        (("ade20k", "test"), {}, "Accepted: train, val"),
        (("cadis", "train", 4), {}, "Accepted: 1"),
        (("ade20k", "train", 1), {}, r"has no task 1. Accepted: None"),
        (("cadis", "train"), {"exclude_blacklist": True}, "did you mean 'exclude_blacklisted'"),
        (("ade20k", "train"), {"exclude_blacklisted": True}, "option of ade20k"),
    ],
)
def test_wrong_requests(arguments, options, message, tmp_path):
    name, split, *task = arguments
    with pytest.raises(UsageError, match=message):
        build_dataset(name, split, tmp_path, *task, **options)


def test_facts_need_no_heavy_package():
    code = (
        "import sys, mscs.datasets as d, mscs.datasets.commands; d.label_set('cadis', 2);"
        "print([m for m in ('torch', 'cv2', 'numpy', 'PIL', 'pooch', 'requests') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_png_decoders_agree(make_tree, monkeypatch):
    pytest.importorskip("imagecodecs")
    dataset = build_dataset("cityscapes", "train", make_tree("cityscapes"))
    fast = dataset[0]
    monkeypatch.setattr("mscs.datasets.base.imagecodecs", None)
    assert np.array_equal(fast.image, dataset[0].image)
    assert np.array_equal(fast.label, dataset[0].label)


def test_a_colour_png_in_grey_is_read_as_rgb(make_tree):
    root = make_tree("cityscapes")
    dataset = build_dataset("cityscapes", "train", root)
    grey = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40)
    cv2.imwrite(str(root / dataset.entries[0].image), grey)
    assert np.array_equal(dataset[0].image, np.repeat(grey[..., None], 3, axis=2))


def test_a_colour_png_with_a_transparent_colour_has_three_channels(make_tree):
    root = make_tree("cityscapes")
    dataset = build_dataset("cityscapes", "train", root)
    before = dataset[0].image
    Image.fromarray(before).save(root / dataset.entries[0].image, transparency=tuple(before[0, 0].tolist()))
    assert np.array_equal(dataset[0].image, before)


def test_labels_with_a_transparent_value_are_read_by_value(make_tree):
    root = make_tree("cadis")
    dataset = build_dataset("cadis", "train", root)
    path, before = root / dataset.entries[0].label, dataset[0].label
    Image.fromarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)).save(path, transparency=3)
    assert np.array_equal(dataset[0].label, before)


def giant_png(width, height):
    """A PNG of a few bytes whose header claims any size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


@pytest.mark.parametrize("size", [(65500, 65500), (9000, 9000)])
def test_a_header_that_claims_too_much_is_named(size, make_tree):
    root = make_tree("cityscapes")
    dataset = build_dataset("cityscapes", "train", root)
    path = root / dataset.entries[1].image
    path.write_bytes(giant_png(*size))
    with pytest.raises(MscsError, match=rf"{path.name}: cannot be decoded .*pixels"):
        dataset[1]


@pytest.mark.parametrize("name", ["/tmp/evil", "../../evil", "a/../../evil", "../..", "a\\b", "a\x1b[2J"])
def test_lists_of_images_cannot_name_files_elsewhere(name, make_tree):
    root = make_tree("pascal_context")
    with (root / "VOCdevkit/VOC2010/ImageSets/Main/train.txt").open("a") as file:
        file.write(f"{name}\n")
    with pytest.raises(MscsError, match=r"points outside|no plain") as error:
        build_dataset("pascal_context", "train", root)
    assert str(error.value).isprintable()
    with pytest.raises(MscsError, match=r"points outside|no plain"):
        write_prediction(root, label_set("pascal_context"), name, np.zeros((2, 2), np.uint8))
    assert not (root.parent / "evil.png").exists()


def test_lists_that_name_an_image_twice_are_refused(make_tree):
    root = make_tree("pascal_context")
    path = root / "VOCdevkit/VOC2010/ImageSets/Main/train.txt"
    path.write_text(path.read_text() * 2)
    with pytest.raises(MscsError, match="listed twice"):
        build_dataset("pascal_context", "train", root)


def test_a_dataset_is_one_spec(make_tree, monkeypatch):
    """What the README asks for is enough: reading, verifying and fetching take everything from the `Spec`."""

    def index(labels, split, root):
        names = names_in(root / split, ".jpg")
        return build_index(labels, root, ((n, f"{split}/{n}.jpg", f"{split}/{n}.png") for n in names))

    spec = Spec(
        name="pets",
        label_sets=(numbered_labels("pets", "cat, dog"),),
        splits={"train": 1},
        index=index,
        parts=(Part("train", {"train/*.jpg": 1}),),
        home="home",
        licence="licence",
        tolerance=1.0,
    )
    monkeypatch.setitem(DATASETS, "pets", spec)
    root = make_tree("ade20k") / "pets"
    (root / "given/train").mkdir(parents=True)
    cv2.imwrite(str(root / "given/train/tom.jpg"), np.zeros((8, 8, 3), np.uint8))
    cv2.imwrite(str(root / "given/train/tom.png"), np.full((8, 8), 2, np.uint8))
    assert fetch("pets", root, given=root / "given") == ["train"]
    assert verify("pets", root)["splits"] == {"train": 1}
    assert build_dataset("pets", "train", root)[0].label.tolist() == [[1] * 8] * 8


def test_known_files_of_camvid():
    lines = DATASETS["camvid"].digests.read_text().splitlines()
    folders = Counter(line.split()[1].split("/")[0] for line in lines)
    splits = DATASETS["camvid"].splits
    assert folders == {f"{split}{kind}": count for split, count in splits.items() for kind in ("", "annot")}
    assert len({line.split()[0] for line in lines}) == len(lines)


def test_splits_can_be_joined(make_tree):
    root = make_tree("cityscapes")
    ids = [build_dataset("cityscapes", split, root).ids for split in ("train", "val", "train+val")]
    assert ids[2] == ids[0] + ids[1]
    for wrong, message in (("train+train", "twice"), ("train+vall", "did you mean 'val'"), ("+", "unknown")):
        with pytest.raises(UsageError, match=message):
            build_dataset("cityscapes", wrong, root)
