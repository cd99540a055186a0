import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mscs.inference import Predictor, Protocol, window_places
from mscs.models import ModelOutput
from mscs.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize


class Local(nn.Module):
    """A 3x3 convolution: enough to notice crops, flips and padding."""

    def __init__(self, asymmetric=True):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(4, 3, 3, 3, generator=generator)
        if not asymmetric:
            self.weight = (self.weight + self.weight.flip(-1)) / 2
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape))
        return ModelOutput(F.conv2d(images, self.weight, padding=1), None, None)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)


def test_single_scale_is_the_model_on_the_whole_image(image):
    model = Local()
    scores = Predictor(model, Protocol()).scores(image)
    assert torch.allclose(scores, model(normalize(image)[None]).logits[0])


def test_short_side_and_padding_are_undone(image):
    model = Local()
    scores = Predictor(model, Protocol(short_side=30, pad_multiple=32)).scores(image)
    assert model.sizes == [(1, 3, 32, 64)]
    assert scores.shape == (4, 40, 64)
    black = normalize(np.zeros((1, 1, 3), np.uint8))
    assert black.max() < -1.7, "padding is black before normalisation"


def test_mirrored_rows_are_scored_only_where_the_protocol_says(image):
    scored = Predictor(Local(), Protocol(reflect_pad=(2, 2), score_padding=True)).scores(image)
    cropped = Predictor(Local(), Protocol(reflect_pad=(2, 2))).scores(image)
    assert scored.shape == (4, 44, 64)
    assert torch.equal(scored[:, 2:42], cropped)


def test_scales_of_ade_average_raw_logits_over_flips(image):
    model = Local()
    protocol = Protocol(pad_multiple=32, ms_scales=(0.5, 1.5), ms_merge="logits")
    scores = Predictor(model, protocol).scores(image, multi_scale=True)
    padded = np.zeros((64, 64, 3), np.uint8)
    padded[:40] = image
    pixels = normalize(padded)[None]
    expected = 0
    for size in ((32, 32), (64, 64), (96, 96)):
        scaled = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        logits = (model(scaled).logits + model(scaled.flip(-1)).logits.flip(-1)) / 2
        expected = expected + F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(scores, expected[0, :, :40], atol=1e-4)


def test_windows_of_cityscapes_average_exponentials_per_crop(image):
    model = Local()
    protocol = Protocol(ms_scales=(0.5,), ms_long_side=64, ms_window=(20, 32), ms_merge="exp")
    scores = Predictor(model, protocol, max_batch=3).scores(image, multi_scale=True)
    pixels = normalize(image)[None]

    def both(x):
        return ((model(x).logits + model(x.flip(-1)).logits.flip(-1)) / 2).double().exp()

    small = F.interpolate(pixels, (20, 32), mode="bilinear", align_corners=False)
    expected = F.interpolate(both(small), (40, 64), mode="bilinear", align_corners=False)
    whole = torch.zeros(1, 4, 40, 64, dtype=torch.float64)
    for top in (0, 20):
        for left in (0, 32):
            area = (slice(None), slice(None), slice(top, top + 20), slice(left, left + 32))
            whole[area] = both(pixels[area])
    assert torch.allclose(scores.double(), (expected + whole)[0], rtol=1e-4)


def test_an_image_smaller_than_the_window_is_padded_and_cut_back(image):
    protocol = Protocol(ms_long_side=64, ms_window=(64, 64), ms_merge="softmax")
    scores = Predictor(Local(), protocol).scores(image, multi_scale=True)
    assert scores.shape == (4, 40, 64)
    assert torch.allclose(scores.sum(0), torch.ones(40, 64), atol=1e-5)


def test_a_mirror_symmetric_model_is_not_changed_by_flips(image):
    model = Local(asymmetric=False)
    multi = Predictor(model, Protocol(ms_merge="logits")).scores(image, multi_scale=True)
    assert torch.allclose(multi, Predictor(model, Protocol()).scores(image), atol=1e-5)


def test_exponentials_of_large_logits_stay_finite(image):
    model = Local()
    model.weight *= 200
    protocol = Protocol(ms_long_side=64, ms_window=(20, 32), ms_merge="exp")
    assert not Predictor(model, protocol).scores(image, multi_scale=True).isnan().any()


@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.5])
def test_windows_cover_every_pixel_and_stay_inside(overlap):
    seen = torch.zeros(50, 70, dtype=torch.int)
    for rows, columns in window_places((50, 70), (32, 32), overlap, shift=True):
        assert (rows.stop - rows.start, columns.stop - columns.start) == (32, 32)
        assert rows.stop <= 50
        assert columns.stop <= 70
        seen[rows, columns] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("overlap", [0.0, 1 / 3])
def test_windows_that_are_not_shifted_keep_their_stride_and_reach_beyond(overlap):
    places = window_places((50, 70), (32, 32), overlap, shift=False)
    stride = int(32 * (1 - overlap))
    assert {rows.start for rows, _ in places} == set(range(0, 50 - 32 + stride, stride))
    assert {columns.start for _, columns in places} == set(range(0, 70 - 32 + stride, stride))
    assert max(rows.stop for rows, _ in places) >= 50
    assert max(columns.stop for _, columns in places) >= 70


def pascal_context_reference(model, pixels, scales, base, window):
    """Multi-scale scores of the authors' Pascal-Context evaluation, float64, one window at a time.

    pixels: float64 (h, w, 3), normalised. The longer side becomes base times the scale, sizes rounded. What
    is smaller than the window gets black below and to the right. Windows start every two thirds of a window;
    what the last ones lack is black again, and only what shows the image counts. exp of the mean over both
    flips, averaged over windows, summed over scales.
    """
    black = -np.array(IMAGENET_MEAN) / np.array(IMAGENET_STD)

    def filled(part):
        whole = np.tile(black, (max(window, part.shape[0]), max(window, part.shape[1]), 1))
        whole[: part.shape[0], : part.shape[1]] = part
        return whole

    def exponentials(part):
        batch = torch.from_numpy(part.transpose(2, 0, 1)[None].copy())
        straight, mirrored = model(batch).logits, model(batch.flip(-1)).logits.flip(-1)
        return ((straight + mirrored) * 0.5).exp().numpy()[0]

    total = 0.0
    stride = int(window * 2 / 3)
    for scale in [*scales, 1.0]:
        long, side = int(base * scale + 0.5), max(pixels.shape[:2])
        height, width = (int(length * long / side + 0.5) for length in pixels.shape[:2])
        padded = filled(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR))
        summed = np.zeros((4, *padded.shape[:2]))
        seen = np.zeros(padded.shape[:2])
        for row in range(math.ceil((padded.shape[0] - window) / stride) + 1):
            for column in range(math.ceil((padded.shape[1] - window) / stride) + 1):
                area = np.s_[
                    row * stride : min(row * stride + window, padded.shape[0]),
                    column * stride : min(column * stride + window, padded.shape[1]),
                ]
                part = padded[area]
                scores = exponentials(filled(part))
                summed[:, *area] += scores[:, : part.shape[0], : part.shape[1]]
                seen[area] += 1
        mean = torch.from_numpy((summed / seen)[None, :, :height, :width])
        total += F.interpolate(mean, pixels.shape[:2], mode="bilinear", align_corners=model.align_corners)
    return total[0]


class Contextual(nn.Module):
    """Scores that depend on the whole of what is shown, so that padding and the place of a window matter."""

    def __init__(self, align_corners):
        super().__init__()
        self.align_corners = align_corners
        generator = torch.Generator().manual_seed(4)
        self.near = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) / 5
        self.far = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def forward(self, images):
        near = F.conv2d(images.double(), self.near, padding=2)
        far = images.double().mean((2, 3)) @ self.far.T
        return ModelOutput(near + far[:, :, None, None], None, None)


@pytest.mark.parametrize("size", [(40, 64), (61, 47), (33, 33), (90, 31), (52, 52)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_pascal_context_is_scored_as_the_authors_do(size, align_corners):
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    model = Contextual(align_corners)
    scales, base, window = (0.5, 0.75, 1.25, 1.5, 1.75, 2.0), 52, 48
    protocol = Protocol(
        ms_scales=scales,
        ms_long_side=base,
        ms_window=(window, window),
        ms_overlap=0.3333,
        ms_border="pad",
        ms_merge="exp",
    )
    found = Predictor(model, protocol, max_batch=3).scores(image, multi_scale=True)
    pixels = (image / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    expected = pascal_context_reference(model, pixels, scales, base, window)
    assert torch.equal(found.argmax(0), expected.argmax(0))
    # pixels and logits are float32 in the package
    assert torch.allclose(found.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("align_corners", [True, False])
def test_scores_are_resized_as_the_network_resizes(image, align_corners):
    model = Local()
    model.align_corners = align_corners
    protocol = Protocol(short_side=25, ms_scales=(0.5,), ms_merge="logits")
    found = {mode: Predictor(model, protocol).scores(image, multi_scale=mode) for mode in (False, True)}
    shown = normalize(np.asarray(Image.fromarray(image).resize((40, 25), Image.Resampling.BILINEAR)))[None]

    def resized(x, size):
        return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)

    def both(x):
        return (model(x).logits + model(x.flip(-1)).logits.flip(-1)) / 2

    assert torch.allclose(found[False], resized(model(shown).logits, (40, 64))[0], atol=1e-5)
    merged = both(shown) + resized(both(resized(shown, (12, 20))), (25, 40))
    assert torch.allclose(found[True], resized(merged, (40, 64))[0], atol=1e-4)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((40, 67), (30, 50)), ((66, 40), (50, 30)), ((40, 66), (30, 50)), ((37, 55), (30, 45))],
)
def test_the_long_side_is_rounded(size, shown):
    # 30 / 40 * 67 = 50.25, 49.5 and 44.59: the authors round (to even where it is a half)
    model = Local()
    Predictor(model, Protocol(short_side=30)).scores(np.zeros((*size, 3), np.uint8))
    assert model.sizes == [(1, 3, *shown)]
