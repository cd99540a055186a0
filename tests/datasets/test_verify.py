"""Verification, manifest, conversion of Pascal-Context, cache of decoded images, contact sheet, commands."""

import argparse
import hashlib
import json
import shutil
import struct

import cv2
import numpy as np
import pytest
import scipy.io
from PIL import Image

from mscs.datasets import DATASETS, build_dataset, label_set
from mscs.datasets.commands import add_data_commands, default_root
from mscs.datasets.pascal_context import context_lookup, convert_labels
from mscs.datasets.prepare import build_cache, cache_bytes
from mscs.datasets.show import contact_sheet
from mscs.datasets.verify import check_manifest, verify
from mscs.errors import MscsError, UsageError
from mscs.params import load_params

COUNTS = {"train": 3, "val": 2}


def problems_of(name, root):
    with pytest.raises(MscsError) as error:
        verify(name, root)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize("name", DATASETS)
def test_manifest(name, small):
    root = small(name)
    found = verify(name, root)
    assert found["splits"] == DATASETS[name].splits
    assert not found["generated"]
    files = {}
    for line in found["files"]:
        sha256, size, path = line.split(" ", 2)
        data = (root / path).read_bytes()
        assert (sha256, int(size)) == (hashlib.sha256(data).hexdigest(), len(data))
        files[path] = sha256
    entries = [entry for split in found["splits"] for entry in build_dataset(name, split, root).entries]
    assert set(files) == {path for entry in entries for path in (entry.image, entry.label)}
    text = "".join(f"{line}\n" for line in found["files"])
    assert found["digest"] == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads((root / "manifest.json").read_text()) == found


def test_the_digest_depends_on_contents_and_nothing_else(small, tmp_path):
    root = small("ade20k")
    before = verify("ade20k", root)["digest"]
    copy = shutil.copytree(root, tmp_path / "copy")
    assert verify("ade20k", copy)["digest"] == before
    path = copy / build_dataset("ade20k", "val", copy).entries[0].label
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    label[0, 0] = (label[0, 0] + 1) % 151
    cv2.imwrite(str(path), label)
    assert verify("ade20k", copy)["digest"] != before


def test_all_problems_are_reported(small):
    root = small("ade20k")
    images = [root / entry.image for entry in build_dataset("ade20k", "train", root).entries]
    labels = [root / entry.label for entry in build_dataset("ade20k", "train", root).entries]
    images[0].write_bytes(images[0].read_bytes()[:300])
    cv2.imwrite(str(labels[1]), np.full((24, 40), 151, np.uint8))
    cv2.imwrite(str(labels[2]), np.zeros((24, 41), np.uint8))
    problems = problems_of("ade20k", root)
    assert len(problems) == 3
    assert f"{images[0]}: cannot be decoded" in problems[0]
    assert problems[1] == f"{labels[1]}: unknown label values [151]"
    assert f"{labels[2]}: label is 41x24 pixels, its image 40x24" in problems[2]
    assert not (root / "manifest.json").exists()


def test_a_header_that_claims_too_much_is_one_problem_of_many(small):
    root = small("cityscapes")
    first, second = (root / entry.image for entry in build_dataset("cityscapes", "train", root).entries[:2])
    first.write_bytes(first.read_bytes()[:16] + struct.pack(">II", 65500, 65500) + first.read_bytes()[24:])
    second.write_bytes(b"")
    problems = problems_of("cityscapes", root)
    assert [problem.partition(":")[0] for problem in problems] == [str(first), str(second)]


@pytest.mark.parametrize("name", DATASETS)
def test_training_data_must_fit_the_manifest(name, small):
    root = small(name)
    with pytest.raises(UsageError, match=f"mscs data verify {name}"):
        check_manifest(name, root)
    digest = verify(name, root)["digest"]
    assert check_manifest(name, root) == digest
    image = root / build_dataset(name, "train", root).entries[0].image
    data = image.read_bytes()
    image.write_bytes(data[:-1])
    with pytest.raises(MscsError, match=rf"files do not fit.*{image.name}: {len(data) - 1} bytes, not"):
        check_manifest(name, root)
    image.unlink()
    with pytest.raises(MscsError, match=rf"{image.name}: missing"):
        check_manifest(name, root)
    image.write_bytes(data)
    manifest_file = root / "manifest.json"
    whole = manifest_file.read_text()
    for damaged in (whole.replace(digest, "0" * 64), "[]", '{"dataset": 1}', whole[:-9], "[" * 99999):
        manifest_file.write_text(damaged)
        with pytest.raises(MscsError, match=r"manifest\.json"):
            check_manifest(name, root)


def test_files_that_were_added_do_not_fit_the_manifest(small):
    root = small("ade20k")
    verify("ade20k", root)
    entry = build_dataset("ade20k", "train", root).entries[0]
    for path in (entry.image, entry.label):
        shutil.copy(root / path, root / path.replace("00000001", "00000009"))
    with pytest.raises(MscsError, match=r"2 files do not fit.*00000009.*not in the manifest"):
        check_manifest("ade20k", root)


def test_a_changed_list_of_images_does_not_fit_the_manifest(small):
    root = small("pascal_context")
    verify("pascal_context", root)
    path = root / "VOCdevkit/VOC2010/ImageSets/Main/train.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(MscsError, match=r"2 files do not fit.*in no split"):
        check_manifest("pascal_context", root)


def test_wrong_counts_and_missing_splits(small):
    root = small("cityscapes")
    for folder in ("leftImg8bit", "gtFine"):
        victim = sorted((root / folder / "train").glob("*/*"))[0]
        victim.unlink()
        shutil.rmtree(root / folder / "test")
    problems = problems_of("cityscapes", root)
    assert problems[0] == "split train: 2 images, expected 3"
    assert problems[1].startswith("split test: cityscapes: no folder")
    assert len(problems) == 2


def test_a_split_that_no_run_uses_may_be_absent_but_not_broken(small):
    root = small("cityscapes")
    used = load_params().splits_used("cityscapes")
    assert used == {"train", "val"}
    victim = next((root / "gtFine" / "test").glob("*/*"))
    victim.unlink()
    with pytest.raises(MscsError, match=r"split test: .* has no label"):
        verify("cityscapes", root, needed=used)
    shutil.rmtree(root / "leftImg8bit" / "test")
    assert verify("cityscapes", root, needed=used)["splits"] == COUNTS
    shutil.rmtree(root / "leftImg8bit" / "val")
    with pytest.raises(MscsError, match="split val: cityscapes: no folder"):
        verify("cityscapes", root, needed=used)


def test_the_splits_of_camvids_runs_are_all_needed():
    assert load_params().splits_used("camvid") == {"train", "val", "test"}


def test_the_official_counts_are_expected(make_tree):
    problems = problems_of("pascal_context", make_tree("pascal_context", COUNTS))
    assert problems == ["split train: 3 images, expected 4998", "split val: 2 images, expected 5105"]


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="mscs data fetch cadis"):
        verify("cadis", tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_generated_data_is_sound(name, tmp_path):
    from mscs.datasets.toy import write_dataset

    write_dataset(name, tmp_path / name, seed=5, train=3, val=2, image_size=(64, 96))
    found = verify(name, tmp_path / name)
    assert found["generated"]
    assert found["splits"] == COUNTS


@pytest.fixture
def context(make_tree):
    """A Pascal-Context tree with .mat annotations and shuffled names, and the raw labels."""
    root = make_tree("pascal_context", COUNTS)
    classes = label_set("pascal_context").classes
    names = np.random.default_rng(1).permutation([*classes, *(f"other {i}" for i in range(400))]).tolist()
    (root / "labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(names, 1)))
    (root / "trainval").mkdir()
    raws = {}
    for path in (root / "SegmentationClassContext59").iterdir():
        raws[path.stem] = np.random.default_rng(len(raws)).integers(0, 460, (24, 40)).astype(np.uint16)
        scipy.io.savemat(root / "trainval" / f"{path.stem}.mat", {"LabelMap": raws[path.stem]})
    shutil.rmtree(root / "SegmentationClassContext59")
    return root, ["unlabelled", *names], raws


def test_context_is_converted_by_name(context):
    root, names, raws = context
    assert convert_labels(root) == 5
    dataset = build_dataset("pascal_context", "train", root)
    for sample in dataset:
        expected = np.full((24, 40), 255)
        for place in np.ndindex(24, 40):
            name = names[raws[sample.id][place]]
            if name in dataset.classes:
                expected[place] = dataset.classes.index(name)
        assert np.array_equal(sample.label, expected)
    assert convert_labels(root) == 0


def test_conversion_goes_on_after_a_broken_file(context):
    root, _, _ = context
    path = sorted((root / "trainval").iterdir())[2]
    data = path.read_bytes()
    path.write_bytes(data[:100])
    with pytest.raises(MscsError, match=rf"{path.name}: broken annotation"):
        convert_labels(root)
    assert not (root / "SegmentationClassContext59").exists()
    path.write_bytes(data)
    assert convert_labels(root) == 5
    assert len(build_dataset("pascal_context", "train", root)) == 3


def test_names_that_do_not_fit(context):
    root, _, _ = context
    text = (root / "labels.txt").read_text()
    (root / "labels.txt").write_text(text.replace(": aeroplane\n", ": airplane\n"))
    with pytest.raises(MscsError, match="no class named aeroplane"):
        context_lookup(root)
    (root / "labels.txt").unlink()
    with pytest.raises(MscsError, match="459 class names is missing"):
        context_lookup(root)


@pytest.mark.parametrize("name", DATASETS)
def test_cache_gives_the_same_samples(name, small, tmp_path):
    root = small(name)
    verify(name, root)
    plain = build_dataset(name, "train", root)
    before = [plain[i] for i in range(3)]
    files = build_cache(name, root, tmp_path / "fast disk")
    assert files == 2 * sum(DATASETS[name].splits.values())
    assert sum(p.stat().st_size for p in (tmp_path / "fast disk").rglob("*.npy")) == cache_bytes(name, root)
    cached = build_dataset(name, "train", root)
    for entry in plain.entries:
        (root / entry.image).unlink()  # the cache alone is read
    for i in range(3):
        assert np.array_equal(cached[i].image, before[i].image)
        assert np.array_equal(cached[i].label, before[i].label)
        assert type(cached[i].image) is np.ndarray


def test_cache_belongs_to_one_manifest(small):
    root = small("ade20k")
    with pytest.raises(UsageError, match="mscs data verify ade20k"):
        build_cache("ade20k", root)
    with pytest.raises(UsageError, match="mscs data verify ade20k"):
        cache_bytes("ade20k", root)
    verify("ade20k", root)
    build_cache("ade20k", root)
    path = root / build_dataset("ade20k", "train", root).entries[0].image
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(path)
    verify("ade20k", root)
    with pytest.raises(UsageError, match="decoded from other files"):
        build_dataset("ade20k", "train", root)
    assert cache_bytes("ade20k", root) > 0
    build_cache("ade20k", root)
    assert build_dataset("ade20k", "train", root)[0].image.max() == 0


def test_a_damaged_cache_is_refused_and_built_again(small):
    root = small("ade20k")
    verify("ade20k", root)
    build_cache("ade20k", root)
    next((root / "decoded").iterdir()).rename(root / "decoded/other")
    with pytest.raises(UsageError, match="mscs data prepare --cache"):
        build_dataset("ade20k", "train", root)
    build_cache("ade20k", root)
    assert [path.name for path in (root / "decoded").iterdir()] == [verify("ade20k", root)["digest"]]
    dataset = build_dataset("ade20k", "train", root)
    next((root / "decoded").rglob("ADE_train_00000001.jpg.npy")).write_bytes(b"\x93NUMPY")
    with pytest.raises(MscsError, match=r"ADE_train_00000001\.jpg\.npy.*damaged"):
        dataset[0]


def test_cache_refuses_files_that_are_not_in_the_manifest(small):
    root = small("ade20k")
    verify("ade20k", root)
    path = root / build_dataset("ade20k", "train", root).entries[0].image
    Image.fromarray(np.zeros((24, 40, 3), np.uint8)).save(path)
    with pytest.raises(MscsError, match=rf"{path.name}: not the file in"):
        build_cache("ade20k", root)
    assert [path.name[0] for path in (root / "decoded").iterdir()] == ["."]


def test_cache_keeps_nothing_of_an_unfinished_one_of_other_files(small):
    root = small("ade20k")
    verify("ade20k", root)
    entries = build_dataset("ade20k", "train", root).entries
    black = Image.fromarray(np.zeros((24, 40, 3), np.uint8))
    black.save(root / entries[2].image)
    with pytest.raises(MscsError, match="not the file in"):
        build_cache("ade20k", root)
    assert len(list((root / "decoded").rglob("*.npy"))) > 0
    for entry in entries:
        black.save(root / entry.image)
    verify("ade20k", root)
    build_cache("ade20k", root)
    assert build_dataset("ade20k", "train", root)[0].image.max() == 0


@pytest.mark.parametrize("name", ["cityscapes", "ade20k"])
def test_contact_sheet(name, make_tree):
    dataset = build_dataset(name, "train", make_tree(name))
    sheet = contact_sheet(dataset, 2)
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] > 2 * 288
    assert np.array_equal(contact_sheet(dataset, 50)[:100, :500], contact_sheet(dataset, 3)[:100, :500])
    colors = {tuple(color) for color in sheet.reshape(-1, 3)[::3].tolist()}
    assert len(colors & {tuple(color) for color in dataset.colors.tolist()}) > 15  # the legend
    with pytest.raises(UsageError, match="at least 1"):
        contact_sheet(dataset, 0)


def command(*words):
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True), lambda _dataset: None)
    args = parser.parse_args(["data", *map(str, words)])
    return args.handler(args) or 0


def test_commands_from_generation_to_contact_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MSCS_DATA", str(tmp_path))
    assert default_root("cadis") == tmp_path / "cadis"
    assert command("info", "cadis") == 0
    assert "not there; `mscs data fetch cadis`" in capsys.readouterr().out
    assert command("synth", "cadis", "--train", 3, "--val", 2, "--size", 64, 96) == 0
    assert command("verify", "cadis") == 0
    assert "sound (train 3, val 2), digest" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--yes"):
        command("prepare", "cadis", "--cache")
    assert command("prepare", "cadis", "--cache", "--yes") == 0
    assert "10 files in the cache" in capsys.readouterr().out
    assert command("show", "cadis", "--split", "val", "--task", 2, "--out", tmp_path / "sheet.png") == 0
    assert Image.open(tmp_path / "sheet.png").width > 900
    capsys.readouterr()
    assert command("info", "cadis") == 0
    told = capsys.readouterr().out
    assert "generated scenes, train 3, val 2" in told
    assert "cache of decoded images: yes" in told
    assert "task 2, 17 classes" in told
    with pytest.raises(UsageError, match="generated scenes"):
        command("fetch", "cadis", "--from", tmp_path)
    with pytest.raises(UsageError, match="did you mean 'cadis'"):
        command("verify", "cadi")


def test_verify_command_fails_with_code_1_on_a_broken_file(tmp_path):
    command("synth", "ade20k", "--root", tmp_path / "a", "--train", 2, "--val", 1, "--size", 64, 64)
    path = tmp_path / "a" / build_dataset("ade20k", "train", tmp_path / "a").entries[0].image
    path.write_bytes(b"")
    with pytest.raises(MscsError, match=path.name) as error:
        command("verify", "ade20k", "--root", tmp_path / "a")
    assert error.value.exit_code == 1


def test_a_changed_file_of_a_dataset_with_known_files(small):
    root = small("camvid")
    assert verify("camvid", root)["splits"] == {"train": 3, "val": 2, "test": 1}
    image = next(root.glob("val/*"))
    cv2.imwrite(str(image), cv2.imread(str(image)) ^ 1)
    with pytest.raises(MscsError, match=r"1 problems\n.*val/.*not the official file"):
        verify("camvid", root)
