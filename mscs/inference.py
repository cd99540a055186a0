"""From one image to per-class scores at its native size, as each dataset's protocol has it.

Single scale: (reflect padding,) resize the short side, pad bottom and right with black, whole image through
the model, logits back to native size. Multi-scale + flip: every scale and 1.0, flipped and not, whole or in
sliding windows, merged as the protocol says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mscs.transforms import normalize, pad_reflect


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images of one dataset are shown to a model, and how its answers are merged.

    short_side: resize so that the short side has this many pixels. pad_multiple: then pad bottom and right
    with black to a multiple. reflect_pad: rows mirrored at top and bottom, at native size, first.
    score_padding: mirrored pixels are scored too (the authors' CaDIS evaluation).
    ms_scales: factors besides 1.0. ms_long_side: scales refer to this long side; None: to the padded image.
    ms_window, ms_overlap: windows for scales >= 1, and the share of a window that the next one repeats.
    ms_merge: what is averaged: "exp" of the flip-averaged logits (authors, Cityscapes and Pascal-Context),
    "logits" (authors, ADE20K) or "softmax" (mmsegmentation).
    """

    short_side: int | None = None
    pad_multiple: int | None = None
    reflect_pad: tuple[int, int] = (0, 0)
    score_padding: bool = False
    ms_scales: tuple[float, ...] = ()
    ms_long_side: int | None = None
    ms_window: tuple[int, int] | None = None
    ms_overlap: float = 0.0
    ms_merge: Literal["exp", "logits", "softmax"] = "logits"


class Predictor:
    """A model in evaluation mode and the protocol it is asked by."""

    def __init__(
        self,
        model: nn.Module,
        protocol: Protocol,
        *,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        max_batch: int = 8,
    ):
        """Args: max_batch: windows of one image go through the model at most this many at a time."""
        self.protocol = protocol
        self.device = torch.device(device)
        self._model = model.to(self.device).eval()
        self._dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self._autocast = autocast
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._max_batch = max_batch

    @torch.inference_mode()
    def scores(self, image: np.ndarray, *, multi_scale: bool = False) -> Tensor:
        """Return per-class scores (K, H, W) float32 for a uint8 (H, W, 3) RGB image.

        With `score_padding`, H and W include the mirrored pixels.
        """
        shown = pad_reflect(image, self.protocol.reflect_pad)
        native = shown.shape[:2]
        shown, inner = self._fit(shown)
        pixels = normalize(shown)[None].to(self.device, self._dtype)
        scores = self._merge_scales(pixels) if multi_scale else self._logits(pixels)
        scores = scores[:, :, : inner[0], : inner[1]]
        scores = resize(scores, native)[0]
        if not self.protocol.score_padding:
            top, bottom = self.protocol.reflect_pad
            scores = scores[:, top : native[0] - bottom]
        return scores

    def _fit(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Resize and pad; also return the size before padding."""
        protocol = self.protocol
        if protocol.short_side is not None:
            height, width = image.shape[:2]
            short, long = min(height, width), max(height, width)
            sides = {short: protocol.short_side, long: int(protocol.short_side * long / short)}
            size = (sides[width], sides[height])
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        inner = image.shape[:2]
        if protocol.pad_multiple is not None:
            extra = [-side % protocol.pad_multiple for side in inner]
            image = np.pad(image, ((0, extra[0]), (0, extra[1]), (0, 0)))
        return image, (inner[0], inner[1])

    def _logits(self, pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=self._format)
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            logits = self._model(pixels).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def _merge_scales(self, pixels: Tensor) -> Tensor:
        size = (pixels.shape[2], pixels.shape[3])
        total: Tensor | None = None
        for scale in sorted({*self.protocol.ms_scales, 1.0}):
            scaled = resize(pixels, self._scaled_size(size, scale))
            if self.protocol.ms_window is not None and scale >= 1:
                scores = self._windows(scaled, self.protocol.ms_window)
            else:
                scores = self._both_flips(scaled)
            scores = resize(scores, size)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total.to(pixels.dtype)

    def _scaled_size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        if self.protocol.ms_long_side is not None:
            scale = scale * self.protocol.ms_long_side / max(size)
        return int(size[0] * scale + 1e-6), int(size[1] * scale + 1e-6)

    def _both_flips(self, pixels: Tensor) -> Tensor:
        """Return the merge quantity, averaged over the image and its mirror image."""
        pair = self._logits(torch.cat([pixels, pixels.flip(-1)]))
        straight, mirrored = pair.chunk(2)
        mirrored = mirrored.flip(-1)
        if self.protocol.ms_merge == "softmax":
            return (straight.softmax(1) + mirrored.softmax(1)) / 2
        mean = (straight + mirrored) / 2
        # in float64: the protocol exponentiates unshifted logits, and float32 would overflow at 88
        return mean.double().exp() if self.protocol.ms_merge == "exp" else mean

    def _windows(self, pixels: Tensor, window: tuple[int, int]) -> Tensor:
        height, width = pixels.shape[-2:]
        missing = [max(0, window[0] - height), max(0, window[1] - width)]
        if any(missing):
            black = normalize(np.zeros((1, 1, 3), np.uint8)).to(pixels)[None]
            padded = black.expand(1, 3, height + missing[0], width + missing[1]).clone()
            padded[:, :, :height, :width] = pixels
            pixels = padded
        places = list(window_places((pixels.shape[-2], pixels.shape[-1]), window, self.protocol.ms_overlap))
        total = count = None
        for first in range(0, len(places), self._max_batch):
            part = places[first : first + self._max_batch]
            crops = torch.cat([pixels[:, :, p.top : p.bottom, p.left : p.right] for p in part])
            for place, scores in zip(part, self._both_flips(crops), strict=True):
                if total is None or count is None:
                    total = scores.new_zeros(1, len(scores), *pixels.shape[-2:])
                    count = scores.new_zeros(1, 1, *pixels.shape[-2:])
                total[0, :, place.top : place.bottom, place.left : place.right] += scores
                count[0, :, place.top : place.bottom, place.left : place.right] += 1
        assert total is not None
        assert count is not None
        return (total / count)[:, :, :height, :width]


class Place(NamedTuple):
    """One window: rows top to bottom, columns left to right, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int


def window_places(size: tuple[int, int], window: tuple[int, int], overlap: float) -> Iterator[Place]:
    """Yield the windows that cover `size`; the last of a row or column is moved inwards, not padded."""
    starts = []
    for side, length in zip(size, window, strict=True):
        stride = max(1, int(length * (1 - overlap)))
        count = 1 + max(0, -(-(side - length) // stride))
        starts.append([min(i * stride, max(0, side - length)) for i in range(count)])
    for top in starts[0]:
        for left in starts[1]:
            yield Place(top, top + window[0], left, left + window[1])


def resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W) bilinearly (align_corners False); nothing happens where the size is right."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
