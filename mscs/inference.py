"""From one image to per-class scores at its native size, as each dataset's protocol has it.

Single scale: (reflect padding,) resize the short side, pad bottom and right with black, whole image through
the model, logits back to native size. Multi-scale + flip: every scale and 1.0, flipped and not, whole or in
sliding windows, merged as the protocol says. Scores are resized with the network's own `align_corners`; so
are the images of `ms_scales` where they refer to the padded image, as in the authors' code.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mscs.models.layers import resize
from mscs.transforms import normalize, pad_reflect


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images of one dataset are shown to a model, and how its answers are merged.

    short_side: resize so that the short side has this many pixels. pad_multiple: then pad bottom and right
    with black to a multiple. reflect_pad: rows mirrored at top and bottom, at native size, first.
    score_padding: mirrored pixels are scored too (the authors' CaDIS evaluation).
    ms_scales: factors besides 1.0. ms_long_side: scales refer to this long side; None: to the padded image.
    ms_window, ms_overlap: size of sliding windows, and the share of a window that the next one repeats.
    ms_border: "shift": scales below 1 are shown whole, and a window that would leave the image is moved
    inwards (authors, Cityscapes); "pad": every scale is shown in windows, which are cut off at the border and
    filled up with black (authors, Pascal-Context).
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
    ms_border: Literal["shift", "pad"] = "shift"
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
        self._align_corners = bool(getattr(model, "align_corners", False))
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
        scores = resize(scores, native, self._align_corners)[0]
        if not self.protocol.score_padding:
            top, bottom = self.protocol.reflect_pad
            scores = scores[:, top : native[0] - bottom]
        return scores

    def _fit(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Resize and pad; also return the size before padding."""
        protocol = self.protocol
        if protocol.short_side is not None:
            height, width = image.shape[:2]
            scale = protocol.short_side / min(height, width)
            size = (round(width * scale), round(height * scale))
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
            scaled = self._scaled(pixels, scale)
            whole = scale < 1 and self.protocol.ms_border == "shift"
            if self.protocol.ms_window is None or whole:
                scores = self._both_flips(scaled)
            else:
                scores = self._windows(scaled, self.protocol.ms_window)
            scores = resize(scores, size, self._align_corners)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total.to(pixels.dtype)

    def _scaled(self, pixels: Tensor, scale: float) -> Tensor:
        height, width = pixels.shape[-2:]
        if self.protocol.ms_long_side is None:
            size = (int(height * scale + 1e-6), int(width * scale + 1e-6))
            return resize(pixels, size, self._align_corners)
        # the authors resize these with OpenCV, which has no align_corners, to rounded sizes
        long = int(self.protocol.ms_long_side * scale + 0.5)
        size = (int(height * long / max(height, width) + 0.5), int(width * long / max(height, width) + 0.5))
        return resize(pixels, size, align_corners=False)

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
        inner = self.protocol.ms_border == "shift"
        places = window_places((height, width), window, self.protocol.ms_overlap, shift=inner)
        bottom, right = (max(place[axis].stop for place in places) for axis in (0, 1))
        pixels = _pad_black(pixels, bottom, right)
        total, count = torch.zeros(()), pixels.new_zeros(1, 1, bottom, right)
        for first in range(0, len(places), self._max_batch):
            part = places[first : first + self._max_batch]
            crops = torch.cat([pixels[:, :, rows, columns] for rows, columns in part])
            for (rows, columns), scores in zip(part, self._both_flips(crops), strict=True):
                if not total.ndim:
                    total = scores.new_zeros(1, len(scores), bottom, right)
                total[0, :, rows, columns] += scores
                count[0, :, rows, columns] += 1
        return (total / count)[:, :, :height, :width]


def window_places(
    size: tuple[int, int], window: tuple[int, int], overlap: float, *, shift: bool
) -> list[tuple[slice, slice]]:
    """Return rows and columns of the windows that cover `size`.

    The last one of a row or column is moved inwards (`shift`) or reaches beyond the image; where the image is
    smaller than a window it always does.
    """
    spans = []
    for side, length in zip(size, window, strict=True):
        stride = max(1, int(length * (1 - overlap)))
        inside = max(0, side - length)
        starts = range(0, inside + stride, stride)
        spans.append([slice(s, s + length) for s in (min(s, inside) if shift else s for s in starts)])
    return list(product(*spans))


def _pad_black(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return normalised pixels (B, 3, h, w) with black added at the bottom and right."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    black = normalize(np.zeros((1, 1, 3), np.uint8)).to(pixels)[None]
    padded = black.expand(len(pixels), 3, height, width).clone()
    padded[:, :, : pixels.shape[-2], : pixels.shape[-1]] = pixels
    return padded
