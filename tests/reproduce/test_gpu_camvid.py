"""CamVid packed for a machine without a network: the same pixels come out, damaged parts are refused."""

import importlib.util
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from mscs.datasets import build_dataset
from mscs.datasets.registry import dataset_spec
from mscs.datasets.verify import verify
from mscs.errors import MscsError, UsageError

spec = importlib.util.spec_from_file_location(
    "camvid", Path(__file__).parents[2] / "benchmarks" / "camvid.py"
)
camvid = importlib.util.module_from_spec(spec)
spec.loader.exec_module(camvid)


@pytest.fixture
def packed(tmp_path):
    """Return the parts of a dataset with the official names, but pictures of our own."""
    root, folder = tmp_path / "here", tmp_path / "parts"
    names = [line.split()[1] for line in dataset_spec("camvid").digests.read_text().splitlines()]
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in [name for name in names if name.startswith(f"{split}/")][:3]:
            for path, shape in (
                (root / name, (40, 60, 3)),
                (root / name.replace("/", "annot/", 1), (40, 60)),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), rng.integers(0, 12, shape, dtype=np.uint8))
    size = sum(path.stat().st_size for path in root.rglob("*.png"))
    return root, folder, camvid.pack(root, folder, part_bytes=size // 2)


def test_the_same_pixels_come_out_of_all_parts(packed, tmp_path):
    root, folder, facts = packed
    assert facts["parts"] == len(list(folder.glob("part-*.zip"))) >= 2
    assert facts["files"] == len(list(root.rglob("*.png")))
    out = tmp_path / "data" / "camvid"
    assert camvid.unpack(folder, out)["files"] == facts["files"]
    for path in root.rglob("*.png"):
        one, other = (cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (path, out / path.relative_to(root)))
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert len(build_dataset("camvid", "train+val", out)) == 6
    with pytest.raises(UsageError, match="there already"):
        camvid.unpack(folder, out)


def test_other_files_with_the_same_pixels_pass_only_when_asked_for(packed, tmp_path):
    _, folder, _ = packed
    out = tmp_path / "camvid"
    camvid.unpack(folder, out)
    with pytest.raises(MscsError, match="not the official file"):
        verify("camvid", out)
    with pytest.raises(MscsError, match="3 images, expected 367") as caught:
        verify("camvid", out, official=False)
    assert "not the official file" not in str(caught.value)


def test_a_missing_part_leaves_nothing_behind(packed, tmp_path):
    _, folder, _ = packed
    (folder / "part-2.zip").unlink()
    with pytest.raises(MscsError, match="files are missing"):
        camvid.unpack(folder, tmp_path / "camvid")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "parts"}


def test_other_pixels_are_refused(packed, tmp_path):
    _, folder, _ = packed
    part = folder / "part-1.zip"
    with zipfile.ZipFile(part) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    first, second, *_ = (name for name in members if "annot" not in name and name != camvid.DIGESTS)
    members[first] = members[second]
    with zipfile.ZipFile(part, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(MscsError, match=f"{first.removesuffix('.webp')}: not the pixels"):
        camvid.unpack(folder, tmp_path / "camvid")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="no PNG files"):
        camvid.pack(tmp_path, tmp_path / "parts")
    with pytest.raises(UsageError, match=r"no part-\*\.zip"):
        camvid.unpack(tmp_path, tmp_path / "camvid")
