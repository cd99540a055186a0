"""Training and evaluation transforms: uint8 sample in, normalised tensors out.

The training transform follows the paper's supplement and the authors' code, in this order: horizontal flip,
random scale and aspect, crop that is not filled by one class, colour jitter, ImageNet normalisation. It works
on the crop window only: the window is drawn in coordinates of the resized image, and just the source pixels
under it are resampled. The outcome equals resizing the whole image with PIL (bilinear with area support when
shrinking, nearest for labels), padding and cropping.

Shapes: H, W source image; h, w crop. Images are RGB, labels hold training ids and 255 = ignored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = 255
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# The base size of mmsegmentation, (2048, 512), bounds the long side to four times the short one.
MAX_ASPECT_OF_SCALE_BASE = 4
HUE_STRIP_PIXELS = 1 << 16

Range = tuple[float, float]


class LabelledImage(Protocol):
    """What a transform takes: image uint8 (H, W, 3) RGB, label uint8 (H, W), id."""

    @property
    def image(self) -> np.ndarray:
        """Return the pixels, uint8 (H, W, 3) RGB."""

    @property
    def label(self) -> np.ndarray:
        """Return the training ids, uint8 (H, W)."""


@dataclass(frozen=True)
class ColorJitter:
    """Ranges of the colour jitter; the four steps are applied in random order, always."""

    brightness: Range = (2 / 3, 1.5)
    contrast: Range = (2 / 3, 1.5)
    saturation: Range = (2 / 3, 1.5)
    hue: Range = (-0.05, 0.05)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the jittered uint8 image; the factors are uniform in their ranges."""
        order = rng.permutation(4)
        ranges = (self.brightness, self.contrast, self.saturation, self.hue)
        factors = [float(rng.uniform(*bounds)) for bounds in ranges]
        for step in order:
            image = _JITTER_STEPS[step](image, factors[step])
        return image


@dataclass(frozen=True)
class PhotoMetricDistortion:
    """The colour distortion of mmsegmentation (SSD): every step with probability one half.

    Brightness +-32, contrast and saturation x 0.5-1.5, hue +-18 of 180; contrast comes before saturation and
    hue or after them, by a coin.
    """

    brightness_delta: float = 32
    contrast: Range = (0.5, 1.5)
    saturation: Range = (0.5, 1.5)
    hue_delta: int = 18

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the distorted uint8 image."""
        if rng.random() < 0.5:
            image = _affine(image, 1.0, rng.uniform(-self.brightness_delta, self.brightness_delta))
        contrast_first = rng.random() < 0.5
        if contrast_first and rng.random() < 0.5:
            image = _affine(image, rng.uniform(*self.contrast), 0.0)
        saturate, turn = rng.random() < 0.5, rng.random() < 0.5
        if saturate or turn:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            if saturate:
                hsv[..., 1] = _affine(hsv[..., 1], rng.uniform(*self.saturation), 0.0)
            if turn:
                shift = int(rng.integers(-self.hue_delta, self.hue_delta + 1))
                hsv[..., 0] = (hsv[..., 0].astype(np.int16) + shift) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if not contrast_first and rng.random() < 0.5:
            image = _affine(image, rng.uniform(*self.contrast), 0.0)
        return image


PAPER_JITTER = ColorJitter()


def normalize(image: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) RGB into float32 (3, H, W), normalised with the ImageNet mean and deviation."""
    normalized = np.empty((3, *image.shape[:2]), np.float32)
    for plane, table, out in zip(cv2.split(image), _normalize_tables(), normalized, strict=True):
        cv2.LUT(plane, table, out)
    return torch.from_numpy(normalized)


def _normalize_tables() -> np.ndarray:
    """Return float32 (3, 256): the normalised value of each uint8 level."""
    levels = np.arange(256, dtype=np.float32) / 255
    mean, std = (np.array(values, np.float32)[:, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (levels - mean) / std


class TrainTransform:
    """The paper's training transform, `transform(sample, rng)` -> (image, label).

    image: float32 (3, h, w), ImageNet-normalised; label: int64 (h, w), 255 = ignored. All random choices come
    from `rng`.
    """

    def __init__(
        self,
        *,
        crop_size: tuple[int, int] | None,
        scale_range: Range = (0.5, 2.0),
        aspect_range: Range = (0.9, 1.1),
        scale_base: int | Literal["native"] = "native",
        hflip: float = 0.5,
        class_max_ratio: float = 0.75,
        crop_tries: int = 10,
        photometric: "Photometric | None" = PAPER_JITTER,
        reflect_pad: tuple[int, int] = (0, 0),
    ) -> None:
        """Fix the ranges.

        Args:
            crop_size: (h, w) of the result; None keeps the whole image, neither scaled nor cropped.
            scale_range: the scale is uniform in it.
            aspect_range: the change of width over height is uniform in it.
            scale_base: what scale 1 means: "native" the image's own size, a number the length of its short
                side (mmsegmentation).
            hflip: probability of a horizontal flip.
            class_max_ratio: a crop is taken when it shows two classes and none covers this share of it.
            crop_tries: the last of that many crops is taken in any case.
            photometric: ColorJitter (the paper), PhotoMetricDistortion (mmsegmentation) or None.
            reflect_pad: rows mirrored at the top and bottom (CaDIS: (2, 2), 540 -> 544 rows).
        """
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.aspect_range = aspect_range
        self.scale_base = scale_base
        self.hflip = hflip
        self.class_max_ratio = class_max_ratio
        self.crop_tries = crop_tries
        self.photometric = photometric
        self.reflect_pad = reflect_pad

    def __call__(self, sample: LabelledImage, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the transformed image and label."""
        image, label = (pad_reflect(array, self.reflect_pad) for array in (sample.image, sample.label))
        if rng.random() < self.hflip:
            image, label = image[:, ::-1], label[:, ::-1]
        if self.crop_size is not None:
            image, label = self._scale_and_crop(image, label, self.crop_size, rng)
        if self.photometric is not None:
            image = self.photometric(_contiguous(image), rng)
        return normalize(image), torch.from_numpy(label.astype(np.int64))

    def _scale_and_crop(
        self, image: np.ndarray, label: np.ndarray, crop_size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        resized = self._draw_size(label.shape[0], label.shape[1], rng)
        # An image smaller than the crop lies anywhere in it: what is missing per axis is split at random.
        missing = [max(0, crop - size) for crop, size in zip(crop_size, resized, strict=True)]
        before = [int(rng.integers(pad + 1)) for pad in missing]
        for _ in range(self.crop_tries):
            corner = [
                int(rng.integers(size + pad - crop + 1)) - shift
                for size, pad, crop, shift in zip(resized, missing, crop_size, before, strict=True)
            ]
            window = Window(resized, (corner[0], corner[1]), crop_size)
            cropped = window.nearest(label, fill=IGNORE_INDEX)
            if self._is_mixed(cropped):
                break
        return window.bilinear(image, fill=0), cropped

    def _draw_size(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
        scale, aspect = rng.uniform(*self.scale_range), rng.uniform(*self.aspect_range)
        if self.scale_base != "native":
            short, long = sorted((height, width))
            scale *= min(self.scale_base / short, MAX_ASPECT_OF_SCALE_BASE * self.scale_base / long)
        stretch = math.sqrt(aspect)
        return max(1, int(height * scale / stretch)), max(1, int(width * scale * stretch))

    def _is_mixed(self, label: np.ndarray) -> bool:
        counts = cv2.calcHist([label], [0], None, [IGNORE_INDEX], [0, IGNORE_INDEX])
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.class_max_ratio * counts.sum())


class Window(NamedTuple):
    """A rectangle in a resized image; it may stick out, and what lies outside is filled.

    resized: size of the whole image after resizing; corner: (top, left) of the window; size: (h, w).
    """

    resized: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    def nearest(self, source: np.ndarray, fill: int) -> np.ndarray:
        """Return the window of the label (H, W), resized by the nearest pixel."""
        rows, columns = (
            _nearest_pixels(length, size)[start:stop]
            for (start, stop), length, size in zip(self._inside(), source.shape, self.resized, strict=True)
        )
        return self._framed(source[rows].take(columns, axis=1), fill)

    def bilinear(self, source: np.ndarray, fill: int) -> np.ndarray:
        """Return the window of the image (H, W, 3), resized by PIL's bilinear filter."""
        starts, stops, box = [], [], []
        for (start, stop), length, size in zip(self._inside(), source.shape, self.resized, strict=False):
            scale = length / size
            margin = math.ceil(max(scale, 1)) + 1  # the filter reaches max(scale, 1) source pixels
            first = max(0, math.floor(start * scale) - margin)
            last = min(length, math.ceil(stop * scale) + margin)
            starts.append(first)
            stops.append(last)
            box.append((start * scale - first, min(stop * scale, length) - first))
        part = Image.fromarray(_contiguous(source[starts[0] : stops[0], starts[1] : stops[1]]))
        (top, bottom), (left, right) = box
        (y0, y1), (x0, x1) = self._inside()
        resized = part.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, (left, top, right, bottom))
        return self._framed(np.asarray(resized), fill)

    def _inside(self) -> list[tuple[int, int]]:
        """Return, per axis, the first and past-the-last resized pixel of the window that exist."""
        return [
            (max(0, corner), min(resized, corner + size))
            for resized, corner, size in zip(self.resized, self.corner, self.size, strict=True)
        ]

    def _framed(self, part: np.ndarray, fill: int) -> np.ndarray:
        """Return `part` in an array of the window's size."""
        if part.shape[:2] == self.size:
            return part
        framed = np.full((*self.size, *part.shape[2:]), fill, part.dtype)
        top, left = (max(0, -corner) for corner in self.corner)
        framed[top : top + part.shape[0], left : left + part.shape[1]] = part
        return framed


def _contiguous(view: np.ndarray) -> np.ndarray:
    """Return the pixels of a slice in memory order; OpenCV mirrors faster than NumPy copies backwards."""
    return cv2.flip(view[:, ::-1], 1) if view.strides[1] < 0 else np.ascontiguousarray(view)


def _nearest_pixels(length: int, size: int) -> np.ndarray:
    """Return, for each of `size` resized pixels, the nearest of `length` source pixels.

    Summed up step by step as PIL does, so that pixels halfway between two fall to the same side.
    """
    step = length / size
    return np.cumsum(np.concatenate(([step / 2], np.full(size - 1, step)))).astype(np.intp)


def pad_reflect(array: np.ndarray, rows: tuple[int, int]) -> np.ndarray:
    """Mirror `rows` = (top, bottom) rows of an image or label, without repeating the edge row."""
    if rows == (0, 0):
        return array
    return cv2.copyMakeBorder(array, *rows, 0, 0, cv2.BORDER_REFLECT_101)


def _affine(image: np.ndarray, factor: float, offset: float) -> np.ndarray:
    """Return factor * image + offset, rounded down and clipped to uint8."""
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table)


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _affine(image, factor, 0.0)


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey of the image."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _affine(image, factor, (1 - factor) * mean)


def _saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image; addWeighted rounds where PIL rounds down, hence the -0.5."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, grey, 1 - factor, -0.5)


def _hue(image: np.ndarray, factor: float) -> np.ndarray:
    """Turn the hue by `factor` of the full circle.

    PIL keeps hue and saturation in 8 bits, rounded down. The same here, on OpenCV's fast conversions and in
    strips that stay in the processor's cache.
    """
    levels = np.arange(256)
    hue_table = ((levels + int(factor * 255)) % 256 * (360 / 255)).astype(np.float32)
    saturation_table = (levels / 255).astype(np.float32)
    turned = np.empty_like(image)
    rows = max(1, HUE_STRIP_PIXELS // image.shape[1])
    for top in range(0, image.shape[0], rows):
        strip = slice(top, top + rows)
        hue, saturation, value = cv2.split(cv2.cvtColor(image[strip].astype(np.float32), cv2.COLOR_RGB2HSV))
        hue = cv2.LUT(_floor_to_byte(hue, 255 / 360), hue_table)
        saturation = cv2.LUT(_floor_to_byte(saturation, 255), saturation_table)
        rgb = cv2.cvtColor(cv2.merge([hue, saturation, value]), cv2.COLOR_HSV2RGB)
        turned[strip] = cv2.convertScaleAbs(rgb)
    return turned


def _floor_to_byte(values: np.ndarray, factor: float) -> np.ndarray:
    """Return floor(values * factor); float32 noise must not turn an exact 85 (pure green) into 84."""
    return (values * np.float32(factor) + np.float32(1e-4)).astype(np.uint8)


_JITTER_STEPS = (_brightness, _contrast, _saturation, _hue)
Photometric = Callable[[np.ndarray, np.random.Generator], np.ndarray]
