import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mscs.inference import Place, Predictor, Protocol, window_places
from mscs.models import ModelOutput
from mscs.transforms import normalize


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
    for place in window_places((50, 70), (32, 32), overlap):
        assert isinstance(place, Place)
        assert (place.bottom - place.top, place.right - place.left) == (32, 32)
        assert place.bottom <= 50
        assert place.right <= 70
        seen[place.top : place.bottom, place.left : place.right] += 1
    assert seen.min() >= 1
