"""The training transform against a plain one on whole images (PIL, torchvision), and its statistics."""

import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

import mscs.transforms
from mscs.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TrainTransform,
    color_jitter,
    normalize,
    pad_reflect,
    photometric_distortion,
)

# The plain transform lives with the benchmark that compares speeds.
benchmark = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/data.py")))


@dataclass
class Picture:
    image: np.ndarray
    label: np.ndarray


def picture(height, width, seed=0):
    """A smooth colourful image with noise, and a label of coarse blobs with some ignored pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) + rng.normal(
        0, 6, (height, width, 3)
    )
    blobs = rng.choice(
        np.array([0, 1, 2, 3, 255], np.uint8),
        (height // 24 + 2, width // 24 + 2),
        p=[0.5, 0.2, 0.1, 0.1, 0.1],
    )
    label = cv2.resize(blobs, (width, height), interpolation=cv2.INTER_NEAREST)
    return Picture(np.clip(image, 0, 255).astype(np.uint8), label)


def plain(sample, seed, crop, **options):
    return benchmark.plain_transform(sample.image, sample.label, np.random.default_rng(seed), crop, **options)


def plain_jitter(image, rng):
    return np.asarray(benchmark.plain_jitter(Image.fromarray(image), rng, functional))


def plain_normalize(image):
    return functional.normalize(functional.to_tensor(Image.fromarray(image)), IMAGENET_MEAN, IMAGENET_STD)


def levels_apart(a, b):
    """Difference of two normalised images, in levels of 0..255."""
    return ((a - b).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255).numpy()


geometries = pytest.mark.parametrize(
    ("size", "crop"), [((160, 320), (64, 128)), ((70, 90), (96, 96)), ((200, 61), (80, 80))]
)


@geometries
def test_equal_to_the_plain_transform(size, crop):
    transform = TrainTransform(crop_size=crop)
    for seed in range(15):
        sample = picture(*size, seed)
        image, label = transform(sample, np.random.default_rng(seed))
        plain_image, plain_label = plain(sample, seed, crop)
        assert torch.equal(label, plain_label)
        apart = levels_apart(image, plain_image)
        # One level of resampling noise can move the grey mean that contrast blends with to the next integer,
        # or a pixel over a step of PIL's 8-bit hue.
        assert apart.mean() < 0.75
        assert np.mean(apart > 2.5) < 0.05
        assert apart.max() < 20


@geometries
def test_geometry_is_equal_to_rounding(size, crop):
    transform = TrainTransform(crop_size=crop, photometric=None)
    for seed in range(15):
        sample = picture(*size, seed)
        image, label = transform(sample, np.random.default_rng(seed))
        plain_image, plain_label = plain(sample, seed, crop, jitter=False)
        assert torch.equal(label, plain_label)
        apart = levels_apart(image, plain_image)
        # PIL rounds after each of its two passes, and small images often resample to exact halves.
        assert apart.max() < 2.01
        assert np.mean(apart > 1.5) < 0.005
        assert apart.mean() < 0.2


def test_result_types():
    image, label = TrainTransform(crop_size=(32, 48))(picture(64, 96), np.random.default_rng(0))
    assert (image.dtype, image.shape) == (torch.float32, (3, 32, 48))
    assert (label.dtype, label.shape) == (torch.int64, (32, 48))


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("brightness", 1.37, functional.adjust_brightness),
        ("brightness", 0.71, functional.adjust_brightness),
        ("contrast", 1.37, functional.adjust_contrast),
        ("contrast", 0.71, functional.adjust_contrast),
        ("saturation", 1.37, functional.adjust_saturation),
        ("saturation", 0.71, functional.adjust_saturation),
        ("hue", 0.043, functional.adjust_hue),
        ("hue", -0.043, functional.adjust_hue),
    ],
)
def test_jitter_step_is_equal_to_torchvision(name, value, plain):
    sample = picture(130, 200)
    ours = getattr(mscs.transforms, f"_{name}")(sample.image, value)
    theirs = np.asarray(plain(Image.fromarray(sample.image), value))
    apart = np.abs(ours.astype(int) - theirs)
    assert np.mean(apart > 1) < (0.002 if name == "hue" else 1e-9)
    assert apart.max() <= (7 if name == "hue" else 1)


def test_distortion_is_equal_to_a_plain_one():
    def scaled(values, alpha, beta=0.0):
        return np.clip(values.astype(np.float64) * alpha + beta, 0, 255).astype(np.uint8)

    def plain(image, rng):
        if rng.random() < 0.5:
            image = scaled(image, 1, rng.uniform(-32, 32))
        contrast_first = rng.random() < 0.5
        if contrast_first and rng.random() < 0.5:
            image = scaled(image, rng.uniform(0.5, 1.5))
        saturate, turn = rng.random() < 0.5, rng.random() < 0.5
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)
        if saturate:
            hsv[..., 1] = scaled(hsv[..., 1], rng.uniform(0.5, 1.5))
        if turn:
            hsv[..., 0] = (hsv[..., 0] + rng.integers(-18, 19)) % 180
        if saturate or turn:
            image = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
        if not contrast_first and rng.random() < 0.5:
            image = scaled(image, rng.uniform(0.5, 1.5))
        return image

    sample = picture(40, 50)
    changed = 0
    for seed in range(60):
        ours = photometric_distortion(sample.image, np.random.default_rng(seed))
        assert np.array_equal(ours, plain(sample.image, np.random.default_rng(seed)))
        changed += not np.array_equal(ours, sample.image)
    assert 45 <= changed < 60  # all steps are left out once in 16 times


def test_whole_images_are_only_padded_flipped_and_jittered():
    sample = picture(54, 96)
    transform = TrainTransform(crop_size=None, reflect_pad=(2, 2))
    for seed in range(6):
        image, label = transform(sample, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        flip = slice(None, None, -1 if rng.random() < 0.5 else 1)
        padded = np.pad(sample.image, ((2, 2), (0, 0), (0, 0)), mode="reflect")[:, flip]
        jittered = plain_jitter(padded, rng)
        assert label.shape == (58, 96)
        assert np.array_equal(label, np.pad(sample.label, ((2, 2), (0, 0)), mode="reflect")[:, flip])
        assert np.mean(levels_apart(image, plain_normalize(jittered)) > 1.5) < 0.005


def test_reflect_pad_on_tall_padding():
    array = np.arange(20, dtype=np.uint8).reshape(10, 2)
    assert np.array_equal(pad_reflect(array, (3, 6)), np.pad(array, ((3, 6), (0, 0)), mode="reflect"))
    assert pad_reflect(array, (0, 0)) is array


def test_normalize_is_equal_to_torchvision():
    sample = picture(33, 47)
    torch.testing.assert_close(normalize(sample.image), plain_normalize(sample.image), rtol=0, atol=1e-6)


def draws(transform, number, height=1000, width=2000):
    rng = np.random.default_rng(3)
    return np.array([transform._draw_size(height, width, rng) for _ in range(number)], float)


def test_scale_and_aspect_are_uniform():
    sizes = draws(TrainTransform(crop_size=(8, 8)), 20000) / (1000, 2000)
    scale, aspect = np.sqrt(sizes.prod(axis=1)), sizes[:, 1] / sizes[:, 0]
    for values, low, high in ((scale, 0.5, 2.0), (aspect, 0.9, 1.1)):
        shares, _ = np.histogram(values, 10, (low, high))
        assert np.abs(shares / 20000 - 0.1).max() < 0.012
        assert values.min() > low - 0.002
        assert values.max() < high + 0.002
    assert abs(np.corrcoef(scale, aspect)[0, 1]) < 0.03


@pytest.mark.parametrize(
    ("size", "expected"), [((1000, 2000), (512, 1024)), ((300, 1600), (384, 2048)), ((683, 512), (683, 512))]
)
def test_scale_base_is_the_short_side(size, expected):
    transform = TrainTransform(crop_size=(8, 8), scale_base=512, scale_range=(1, 1), aspect_range=(1, 1))
    assert draws(transform, 1, *size).tolist() == [list(expected)]


def test_flip_and_crop_corner_are_uniform():
    column = np.broadcast_to(np.arange(40, dtype=np.uint8), (8, 40))
    transform = TrainTransform(
        crop_size=(8, 8), scale_range=(1, 1), aspect_range=(1, 1), photometric=None, crop_tries=1
    )
    sample = Picture(np.repeat(column[..., None], 3, axis=2), column)
    rng = np.random.default_rng(0)
    rows = np.array([transform(sample, rng)[1][0].numpy() for _ in range(6000)])
    flipped = rows[:, 0] > rows[:, 1]
    assert abs(flipped.mean() - 0.5) < 0.03
    corners = np.bincount(np.where(flipped, 39 - rows[:, 0], rows[:, 0]), minlength=33)
    assert len(corners) == 33
    assert corners.min() > 6000 / 33 * 0.6
    assert corners.max() < 6000 / 33 * 1.4


def test_jitter_is_equal_to_torchvision_in_every_order():
    image = picture(32, 32).image
    orders = set()
    for seed in range(120):
        orders.add(tuple(np.random.default_rng(seed).permutation(4).tolist()))
        ours = color_jitter(image, np.random.default_rng(seed)).astype(int)
        theirs = plain_jitter(image, np.random.default_rng(seed))
        assert np.mean(np.abs(ours - theirs) > 2) < 0.01
    assert len(orders) == 24


def test_crops_are_mixed_where_possible():
    label = np.zeros((64, 256), np.uint8)
    label[:, 230:] = 1
    sample = Picture(np.zeros((64, 256, 3), np.uint8), label)
    shares = {}
    for tries in (1, 10):
        transform = TrainTransform(crop_size=(32, 32), scale_range=(1, 1), photometric=None, crop_tries=tries)
        labels = [transform(sample, np.random.default_rng(seed))[1].numpy() for seed in range(300)]
        shares[tries] = np.mean([benchmark.is_mixed(crop) for crop in labels])
    assert shares[1] < 0.12
    assert shares[10] > 1 - (1 - shares[1]) ** 10 - 0.12


def test_an_ignored_image_passes():
    sample = Picture(np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 255, np.uint8))
    image, label = TrainTransform(crop_size=(32, 32))(sample, np.random.default_rng(0))
    assert (label == 255).all()
    assert torch.isfinite(image).all()


def test_padding_is_black_and_ignored():
    sample = Picture(np.full((20, 20, 3), 200, np.uint8), np.ones((20, 20), np.uint8))
    transform = TrainTransform(crop_size=(64, 64), scale_range=(1, 1), aspect_range=(1, 1), photometric=None)
    for seed in range(20):
        image, label = transform(sample, np.random.default_rng(seed))
        inside = (label == 1).numpy()
        assert inside.sum() == 400
        assert torch.equal(
            image[:, ~inside], normalize(np.zeros((1, 1, 3), np.uint8))[:, 0].expand(3, 64 * 64 - 400)
        )


def test_padding_before_is_uniform_from_none_to_all_of_what_is_missing():
    # the authors draw randint(0, missing), both ends included, for each axis by itself
    sample = Picture(np.full((20, 28, 3), 200, np.uint8), np.ones((20, 28), np.uint8))
    transform = TrainTransform(
        crop_size=(29, 32), scale_range=(1, 1), aspect_range=(1, 1), hflip=0, photometric=None, crop_tries=1
    )
    rng = np.random.default_rng(0)
    counts = np.zeros((10, 5), int)
    for _ in range(5000):
        inside = (transform(sample, rng)[1] == 1).numpy()
        counts[inside.any(1).argmax(), inside.any(0).argmax()] += 1
    expected = counts.sum() / counts.size  # every (rows, columns) is equally likely
    # the 99.9 % quantile of chi-square with 49 degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum() < 85.4


def test_a_crop_of_a_padded_image_may_lie_anywhere_along_the_long_side():
    sample = Picture(np.zeros((20, 40, 3), np.uint8), np.tile(np.arange(40, dtype=np.uint8), (20, 1)))
    transform = TrainTransform(
        crop_size=(24, 30), scale_range=(1, 1), aspect_range=(1, 1), hflip=0, photometric=None, crop_tries=1
    )
    rng = np.random.default_rng(1)
    seen = {}
    for _ in range(600):
        label = transform(sample, rng)[1].numpy()
        top = int((label != 255).any(1).argmax())
        assert np.array_equal(label[top], np.arange(label[top, 0], label[top, 0] + 30))
        assert (label != 255).sum() == 20 * 30
        seen.setdefault(top, set()).add(int(label[top, 0]))
    assert seen == {top: set(range(11)) for top in range(5)}


def test_same_generator_same_result():
    sample = picture(60, 80)
    transform = TrainTransform(crop_size=(32, 32))
    first, second, other = (transform(sample, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_the_sample_is_not_changed():
    sample = picture(60, 80)
    before = sample.image.copy(), sample.label.copy()
    for photometric in (color_jitter, photometric_distortion):
        for crop in ((32, 32), None):
            TrainTransform(crop_size=crop, photometric=photometric)(sample, np.random.default_rng(1))
    assert np.array_equal(sample.image, before[0])
    assert np.array_equal(sample.label, before[1])


def test_torchvision_is_not_imported():
    code = "import sys, mscs.transforms, mscs.loader; print('torchvision' in sys.modules)"
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
