"""The loss as CUDA kernels in Triton: each program owns a block of rows and walks over the columns.

Nothing is added atomically and every reduction has a fixed order, so results repeat bit for bit. Rows and
columns are ordered by class; `start` and `end` bound each row's class among the columns, so classes cost
two comparisons. Exponents are in base 2.

Products of unit rows run on the fp16 tensor cores: rows are scaled by 2^10 and rounded, and at fp32 grade
the rounding error is kept as a second fp16 number, of which three products restore float32's accuracy
("fp16x3"). As |s| <= 40, exp(s) and its sums fit float32 as they are, without a running maximum.
"""
# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = math.log2(math.e)
_ROW_SCALE = 1024.0  # keeps the second halves of unit rows clear of fp16's subnormal numbers
_WEIGHT_BOUND = 2.0**14  # one side's share of |dL/ds| after scaling; both together stay below fp16's 65504
_TILES = ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 1))
_KEEP_SHAPE = ["n", "m"]  # sizes change every step: do not compile anew for multiples of 16


@triton.jit
def _load_rows(data, rows, count, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """Return (rows, SIZE) of rounded numbers and of their rounding errors if SPLIT; zeros past the end."""
    offsets = rows.to(tl.int64)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (rows < count)[:, None]
    rounded = tl.load(data + offsets, mask=inside, other=0.0)
    if SPLIT:
        return rounded, tl.load(data + count.to(tl.int64) * SIZE + offsets, mask=inside, other=0.0)
    return rounded, rounded


@triton.jit
def _product(a, a_rest, b, b_rest, total, SPLIT: tl.constexpr):
    """Return total + a @ b, of three products if SPLIT; the small parts are added first."""
    if SPLIT:
        total = tl.dot(a_rest, b, total)
        total = tl.dot(a, b_rest, total)
    return tl.dot(a, b, total)


@triton.jit
def _load_block(x, start, end, n, SIZE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):
    """Return this program's rows, which of them exist, the bounds of their classes, and their numbers."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = rows < n
    low = tl.load(start + rows, mask=own, other=0)
    high = tl.load(end + rows, mask=own, other=0)
    a, a_rest = _load_rows(x, rows, n, SIZE, SPLIT)
    return rows, own, low[:, None], high[:, None], a, a_rest


@triton.jit
def _load_tile(a, a_rest, y, tile, m, scale, SIZE: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr):
    """Return a tile's columns, their numbers, and the similarities s = scale * a b^T."""
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    b, b_rest = _load_rows(y, columns, m, SIZE, SPLIT)
    zero = tl.zeros((a.shape[0], COLUMNS), tl.float32)
    s = _product(a, a_rest, tl.trans(b), tl.trans(b_rest), zero, SPLIT) * scale
    return columns, b, b_rest, s


@triton.jit
def _load_statistics(nlse, negative, positive, anchors, inside, AXIS: tl.constexpr):
    """Return nlse and the weights of negatives and positives with a new axis of length 1 at AXIS."""
    level = tl.load(nlse + anchors, mask=inside, other=0.0)
    push = tl.load(negative + anchors, mask=inside, other=0.0)
    pull = tl.load(positive + anchors, mask=inside, other=0.0)
    return tl.expand_dims(level, AXIS), tl.expand_dims(push, AXIS), tl.expand_dims(pull, AXIS)


@triton.jit
def _sigmoid(z):
    """Return 1 / (1 + 2^-z); exact limits at +-inf."""
    u = tl.exp2(-tl.abs(z))
    return tl.where(z >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def _softplus(z):
    """Return log2(1 + 2^z); a series where 1 + u would lose u's digits."""
    u = tl.exp2(-tl.abs(z))
    series = u * (1.0 - u * (0.5 - u * 0.33333334)) * 1.4426950408889634
    return tl.maximum(z, 0.0) + tl.where(u < 0.01, series, tl.log2(1.0 + u))


@triton.jit(do_not_specialize=_KEEP_SHAPE)
def _negatives_kernel(
    x, y, start, end, out, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write log2 of the sum of 2^s over this part's negatives: out[part, row]."""
    part = tl.program_id(1)
    rows, own, low, high, a, a_rest = _load_block(x, start, end, n, SIZE, ROWS, SPLIT)
    first = tl.program_id(0) * ROWS
    # tiles wholly inside the class of every row hold no negative: [before, resume) is left out
    before = tl.cdiv(tl.load(start + tl.minimum(first + ROWS, n) - 1), COLUMNS)
    resume = tl.maximum(tl.load(end + first) // COLUMNS, before)
    tiles = before + tl.cdiv(m, COLUMNS) - resume
    total = tl.zeros((ROWS,), tl.float32)
    for index in range(part, tiles, tl.num_programs(1)):
        tile = tl.where(index < before, index, index - before + resume)
        columns, _, _, s = _load_tile(a, a_rest, y, tile, m, scale, SIZE, COLUMNS, SPLIT)
        at = columns[None, :]
        negative = (at < m) & ((at < low) | (at >= high))
        total += tl.sum(tl.where(negative, tl.exp2(s), 0.0), axis=1)
    tl.store(out + part * n + rows, tl.log2(total), mask=own)


@triton.jit(do_not_specialize=_KEEP_SHAPE)
def _positives_kernel(
    x, y, start, end, nlse, softplus_sum, sigmoid_sum, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """Write the sums of softplus and sigmoid of nlse - s over this part's positives."""
    part = tl.program_id(1)
    rows, own, low, high, a, a_rest = _load_block(x, start, end, n, SIZE, ROWS, SPLIT)
    first = tl.program_id(0) * ROWS
    level = tl.load(nlse + rows, mask=own, other=0.0)
    begin = tl.load(start + first) // COLUMNS
    stop = tl.cdiv(tl.load(end + tl.minimum(first + ROWS, n) - 1), COLUMNS)
    softplus = tl.zeros((ROWS,), tl.float32)
    sigmoid = tl.zeros((ROWS,), tl.float32)
    for tile in range(begin + part, stop, tl.num_programs(1)):
        columns, _, _, s = _load_tile(a, a_rest, y, tile, m, scale, SIZE, COLUMNS, SPLIT)
        at = columns[None, :]
        positive = (at >= low) & (at < high)
        if SELF:
            positive = positive & (at != rows[:, None])
        z = tl.where(positive, level[:, None] - s, float("-inf"))
        softplus += tl.sum(_softplus(z), axis=1)
        sigmoid += tl.sum(_sigmoid(z), axis=1)
    tl.store(softplus_sum + part * n + rows, softplus, mask=own)
    tl.store(sigmoid_sum + part * n + rows, sigmoid, mask=own)


@triton.jit(do_not_specialize=_KEEP_SHAPE)
def _gradient_kernel(
    x, y, start, end, nlse, negative, positive, out, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Write H y over this part's columns: out[part, row, channel].

    H = G if BY_ROW: the anchors are the rows, whose statistics are given. H = G^T if BY_COLUMN: the anchors
    are the columns. Both: anchors against themselves, H = G + G^T with a zero diagonal. The weights of
    negatives come multiplied by 2^-nlse.
    """
    part = tl.program_id(1)
    rows, own, low, high, a, a_rest = _load_block(x, start, end, n, SIZE, ROWS, SPLIT)
    first = tl.program_id(0) * ROWS
    begin = tl.load(start + first)
    stop = tl.load(end + tl.minimum(first + ROWS, n) - 1)
    if BY_ROW:
        level, push, pull = _load_statistics(nlse, negative, positive, rows, own, 1)
    total = tl.zeros((ROWS, SIZE), tl.float32)
    for tile in range(part, tl.cdiv(m, COLUMNS), tl.num_programs(1)):
        columns, b, b_rest, s = _load_tile(a, a_rest, y, tile, m, scale, SIZE, COLUMNS, SPLIT)
        at = columns[None, :]
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        if BY_ROW:
            h += push * tl.exp2(s)
        if BY_COLUMN:
            level_at, push_at, pull_at = _load_statistics(nlse, negative, positive, columns, columns < m, 0)
            h += push_at * tl.exp2(s)
        if (tile * COLUMNS < stop) & (tile * COLUMNS + COLUMNS > begin):
            attraction = tl.zeros((ROWS, COLUMNS), tl.float32)
            if BY_ROW:
                attraction += pull * _sigmoid(level - s)
            if BY_COLUMN:
                attraction += pull_at * _sigmoid(level_at - s)
            h = tl.where((at >= low) & (at < high), -attraction, h)
        keep = (at < m) & own[:, None]
        if BY_ROW and BY_COLUMN:
            keep = keep & (at != rows[:, None])
        h = tl.where(keep, h, 0.0)
        rounded = h.to(tl.float16)
        rest = (h - rounded.to(tl.float32)).to(tl.float16)
        total = _product(rounded, rest, b, b_rest, total, SPLIT)
    offsets = (rows.to(tl.int64) + part * n)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + offsets, total, mask=own[:, None])


class TritonBackend:
    """Launches the kernels, with the methods of `mscs.losses.tiled.TiledBackend`.

    Rows must be at most of length 1, and the temperature at least 0.025.

    Args:
        temperature: divisor of the dot products.
        half: one fp16 product instead of three.
    """

    def __init__(self, temperature: float, *, half: bool) -> None:
        self.scale = 1 / temperature
        self.half = half

    def pack(self, x: Tensor) -> Tensor:
        """Return the kernels' form of the rows: (parts, N, power of two) fp16."""
        channels = max(16, triton.next_power_of_2(x.shape[1]))
        x = torch.nn.functional.pad(x * _ROW_SCALE, (0, channels - x.shape[1]))
        rounded = x.half()
        return torch.stack((rounded,) if self.half else (rounded, (x - rounded).half()))

    def statistics(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return nlse and both sums over positives."""
        bounds = start.int(), end.int()
        splits, launch = self._plan(x, x if y is None else y, most_splits=8)
        parts = x.new_empty((3, splits, x.shape[1]), dtype=torch.float32)
        launch(_negatives_kernel, *bounds, parts[0])
        nlse = (parts[0] / _LOG2E).logsumexp(dim=0)
        launch(_positives_kernel, *bounds, nlse * _LOG2E, parts[1], parts[2], SELF=y is None)
        return nlse, parts[1].sum(dim=0) / _LOG2E, parts[2].sum(dim=0)

    def gradients(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor,
        nlse: Tensor, negative: Tensor, positive: Tensor, need_y: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return dL/dx and, for a separate y that needs it, dL/dy."""
        # |dL/ds| <= 1/N per row, so the weights scaled by N use fp16's range to the full
        amplify = _WEIGHT_BOUND * x.shape[1]
        negative = negative * (-nlse.masked_fill(nlse == -math.inf, 0)).exp()
        statistics = nlse * _LOG2E, negative * amplify, positive * amplify

        def gradient(rows: Tensor, columns: Tensor, *bounds: Tensor, **flags: bool) -> Tensor:
            splits, launch = self._plan(rows, columns, most_splits=4)
            out = rows.new_empty((splits, *rows.shape[1:]), dtype=torch.float32)
            launch(_gradient_kernel, *bounds, *statistics, out, **flags)
            return (out[0] if splits == 1 else out.sum(dim=0)).mul_(self.scale / (amplify * _ROW_SCALE))

        start, end = start.int(), end.int()
        dx = gradient(x, x if y is None else y, start, end, BY_ROW=True, BY_COLUMN=y is None)
        if y is None or not need_y:
            return dx, None
        # the anchors of row j of y are those i with start_i <= j < end_i, and both bounds are sorted
        index = torch.arange(y.shape[1], dtype=torch.int32, device=y.device)
        bounds = [torch.searchsorted(ends, index, right=True, out_int32=True) for ends in (end, start)]
        return dx, gradient(y, x, *bounds, BY_ROW=False, BY_COLUMN=True)

    def _plan(self, x: Tensor, y: Tensor, most_splits: int) -> tuple[int, Callable[..., None]]:
        """Return into how many splits the columns go, and how to run a kernel on x and y in so many."""
        memory, processors = _device(x)
        rows, columns, warps, stages = _tile(x, memory)
        n, m = x.shape[1], y.shape[1]
        blocks, tiles = triton.cdiv(n, rows), triton.cdiv(m, columns)

        def idle(splits: int) -> float:
            """Share of the processors' time without a block, when blocks are handed out in waves."""
            waves = triton.cdiv(blocks * splits, processors)
            return round(1 - blocks * splits / (waves * processors), 1)

        splits = min(range(1, min(most_splits, tiles) + 1), key=idle)
        scale = self.scale * _LOG2E / _ROW_SCALE**2

        def launch(kernel: Any, *given: Tensor, **flags: bool) -> None:
            with torch.cuda.device_of(x):
                kernel[blocks, splits](
                    x, y, *given, n, m, scale, SIZE=x.shape[2], ROWS=rows, COLUMNS=columns,
                    SPLIT=not self.half, num_warps=warps, num_stages=stages, **flags,
                )  # fmt: skip

        return splits, launch


def _device(x: Tensor) -> tuple[int, int]:
    """Return shared memory per block in bytes and the number of multiprocessors."""
    if not x.is_cuda:
        return 1 << 15, 11  # Triton's interpreter: anything small that needs several tiles and splits
    properties = triton.runtime.driver.active.utils.get_device_properties(x.device.index)
    return properties["max_shared_mem"], properties["multiprocessor_count"]


def _tile(x: Tensor, memory: int) -> tuple[int, int, int, int]:
    """Return rows, columns, warps and pipeline stages of the largest tile whose operands fit on chip."""
    row_bytes = x.shape[0] * x.shape[2] * x.element_size()
    for rows, columns, warps, stages in _TILES:
        if row_bytes * (rows + stages * columns) + 4 * rows * columns <= memory:
            return rows, columns, warps, stages
    return 16, 16, 4, 1
