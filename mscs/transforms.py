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

JITTER = ((2 / 3, 1.5), (2 / 3, 1.5), (2 / 3, 1.5), (-0.05, 0.05))
"""Ranges of the paper's colour jitter: brightness, contrast, saturation, hue."""
NORMALIZED = (
    np.arange(256, dtype=np.float32) / 255 - np.array(IMAGENET_MEAN, np.float32)[:, None]
) / np.array(IMAGENET_STD, np.float32)[:, None]
"""The normalised value of each uint8 level, float32 (3, 256)."""

Range = tuple[float, float]
Photometric = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class LabelledImage(Protocol):
    """What a transform takes: image uint8 (H, W, 3) RGB, label uint8 (H, W), id."""

    @property
    def image(self) -> np.ndarray:
        """Return the pixels, uint8 (H, W, 3) RGB."""

    @property
    def label(self) -> np.ndarray:
        """Return the training ids, uint8 (H, W)."""


def color_jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the uint8 image after the paper's jitter: four steps in random order, factors as in `JITTER`."""
    order = rng.permutation(4)
    factors = [float(rng.uniform(*bounds)) for bounds in JITTER]
    for step in order:
        image = (_brightness, _contrast, _saturation, _hue)[step](image, factors[step])
    return image


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the uint8 image after the colour distortion of mmsegmentation (SSD).

    Every step with probability one half: brightness +-32, contrast and saturation x 0.5-1.5, hue +-18 of 180;
    contrast comes before saturation and hue or after them, by a coin.
    """
    if rng.random() < 0.5:
        image = _affine(image, 1.0, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = _affine(image, rng.uniform(0.5, 1.5), 0.0)
    saturate, turn = rng.random() < 0.5, rng.random() < 0.5
    if saturate or turn:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        if saturate:
            hsv[..., 1] = _affine(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
        if turn:
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + int(rng.integers(-18, 19))) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and rng.random() < 0.5:
        image = _affine(image, rng.uniform(0.5, 1.5), 0.0)
    return image


def normalize(image: np.ndarray) -> Tensor:
    """Turn uint8 (H, W, 3) RGB into float32 (3, H, W), normalised with the ImageNet mean and deviation."""
    normalized = np.empty((3, *image.shape[:2]), np.float32)
    for plane, table, out in zip(cv2.split(image), NORMALIZED, normalized, strict=True):
        cv2.LUT(plane, table, out)
    return torch.from_numpy(normalized)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """The paper's training transform, `transform(sample, rng)` -> (image, label).

    image: float32 (3, h, w), ImageNet-normalised; label: int64 (h, w), 255 = ignored. All random choices come
    from `rng`.
    """

    crop_size: tuple[int, int] | None
    """(h, w) of the result; None keeps the whole image, neither scaled nor cropped."""
    scale_range: Range = (0.5, 2.0)
    """The scale is uniform in it."""
    aspect_range: Range = (0.9, 1.1)
    """The change of width over height is uniform in it."""
    scale_base: int | Literal["native"] = "native"
    """What scale 1 means: "native" the image's own size, a number the length of its short side
    (mmsegmentation)."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    class_max_ratio: float = 0.75
    """A crop is taken when it shows two classes and none covers this share of it."""
    crop_tries: int = 10
    """The last of that many crops is taken in any case."""
    photometric: Photometric | None = color_jitter
    """`color_jitter` (the paper), `photometric_distortion` (mmsegmentation) or None."""
    reflect_pad: tuple[int, int] = (0, 0)
    """Rows mirrored at the top and bottom (CaDIS: (2, 2), 540 -> 544 rows)."""

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
        slices, lengths, box = [], [], []
        for (start, stop), length, size in zip(self._inside(), source.shape, self.resized, strict=False):
            scale = length / size
            margin = math.ceil(max(scale, 1)) + 1  # the filter reaches max(scale, 1) source pixels
            first = max(0, math.floor(start * scale) - margin)
            slices.append(slice(first, min(length, math.ceil(stop * scale) + margin)))
            lengths.append(stop - start)
            box.append((start * scale - first, min(stop * scale, length) - first))
        part = Image.fromarray(_contiguous(source[tuple(slices)]))
        (top, bottom), (left, right) = box
        resized = part.resize(lengths[::-1], Image.Resampling.BILINEAR, (left, top, right, bottom))
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
