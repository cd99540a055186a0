"""The loss as CUDA kernels in Triton: each program owns a block of rows and walks over the columns.

Nothing is added atomically and every reduction has a fixed order, so results repeat bit for bit. Rows and
columns are ordered by class; `start` and `end` bound each row's class among the columns, so classes cost
two comparisons. Exponents are in base 2.

Products of unit rows run on the fp16 tensor cores: rows are scaled by 2^10 and rounded, and at fp32 grade
the rounding error is kept as a second fp16 number, of which three products restore float32's accuracy
("fp16x3"). Rows of any length, whose square could leave fp16's range, are multiplied in IEEE float32.
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

_HALF, _SPLIT, _IEEE = 0, 1, 2  # one fp16 product, three, or float32
SPLIT, IEEE = tl.constexpr(_SPLIT), tl.constexpr(_IEEE)


@triton.jit
def _load_rows(data, rows, count, SIZE: tl.constexpr, MODE: tl.constexpr):
    """Return (rows, SIZE) of rounded numbers and of their rounding errors if kept; zeros past the end."""
    offsets = rows.to(tl.int64)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = (rows < count)[:, None]
    rounded = tl.load(data + offsets, mask=inside, other=0.0)
    if MODE == SPLIT:
        return rounded, tl.load(data + count.to(tl.int64) * SIZE + offsets, mask=inside, other=0.0)
    return rounded, rounded


@triton.jit
def _product(a, a_rest, b, b_rest, total, MODE: tl.constexpr):
    """Return total + a @ b at the accuracy of MODE; the small parts are added first."""
    if MODE == IEEE:
        return tl.dot(a, b, total, input_precision="ieee")
    if MODE == SPLIT:
        total = tl.dot(a_rest, b, total)
        total = tl.dot(a, b_rest, total)
    return tl.dot(a, b, total)


@triton.jit
def _similarity(a, a_rest, b, b_rest, scale, MODE: tl.constexpr):
    """Return s = scale * a b^T."""
    zero = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    return _product(a, a_rest, tl.trans(b), tl.trans(b_rest), zero, MODE) * scale


@triton.jit
def _load_bounds(start, end, rows, own):
    """Return the bounds of each row's class among the columns, as (rows, 1)."""
    low = tl.load(start + rows, mask=own, other=0)
    return low[:, None], tl.load(end + rows, mask=own, other=0)[:, None]


@triton.jit
def _load_statistics(nlse, negative, positive, anchors, inside, AXIS: tl.constexpr):
    """Return nlse and the weights of negatives and positives with a new axis of length 1 at AXIS."""
    level = tl.load(nlse + anchors, mask=inside, other=0.0)
    push = tl.load(negative + anchors, mask=inside, other=0.0)
    pull = tl.load(positive + anchors, mask=inside, other=0.0)
    return tl.expand_dims(level, AXIS), tl.expand_dims(push, AXIS), tl.expand_dims(pull, AXIS)


@triton.jit
def _repulsion(s, level, weight, BOUNDED: tl.constexpr):
    """Return dL/ds of negatives; the weight comes multiplied by 2^-level when BOUNDED."""
    if BOUNDED:
        return weight * tl.exp2(s)
    return weight * tl.exp2(s - tl.where(level == float("-inf"), s, level))


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
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Write log2 of the sum of 2^s over this split's negatives: out[split, row]."""
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    rows = first + tl.arange(0, ROWS)
    own = rows < n
    low, high = _load_bounds(start, end, rows, own)
    # tiles wholly inside the class of every row hold no negative: [before, resume) is left out
    before = tl.cdiv(tl.load(start + tl.minimum(first + ROWS, n) - 1), COLUMNS)
    resume = tl.maximum(tl.load(end + first) // COLUMNS, before)
    tiles = before + tl.cdiv(m, COLUMNS) - resume
    a, a_rest = _load_rows(x, rows, n, SIZE, MODE)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for index in range(split, tiles, tl.num_programs(1)):
        tile = tl.where(index < before, index, index - before + resume)
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        b, b_rest = _load_rows(y, columns, m, SIZE, MODE)
        s = _similarity(a, a_rest, b, b_rest, scale, MODE)
        at = columns[None, :]
        negative = (at < m) & ((at < low) | (at >= high))
        if BOUNDED:
            total += tl.sum(tl.where(negative, tl.exp2(s), 0.0), axis=1)
        else:
            s = tl.where(negative, s, float("-inf"))
            higher = tl.maximum(peak, tl.max(s, axis=1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(peak - finite) + tl.sum(tl.exp2(s - finite[:, None]), axis=1)
            peak = higher
    if BOUNDED:
        peak = tl.zeros((ROWS,), tl.float32)
    tl.store(out + split * n + rows, peak + tl.log2(total), mask=own)


@triton.jit(do_not_specialize=_KEEP_SHAPE)
def _positives_kernel(
    x, y, start, end, nlse, softplus_sum, sigmoid_sum, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """Write the sums of softplus and sigmoid of nlse - s over this split's positives."""
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    rows = first + tl.arange(0, ROWS)
    own = rows < n
    low, high = _load_bounds(start, end, rows, own)
    level = tl.load(nlse + rows, mask=own, other=0.0)
    begin = tl.load(start + first) // COLUMNS
    stop = tl.cdiv(tl.load(end + tl.minimum(first + ROWS, n) - 1), COLUMNS)
    a, a_rest = _load_rows(x, rows, n, SIZE, MODE)
    softplus = tl.zeros((ROWS,), tl.float32)
    sigmoid = tl.zeros((ROWS,), tl.float32)
    for tile in range(begin + split, stop, tl.num_programs(1)):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        b, b_rest = _load_rows(y, columns, m, SIZE, MODE)
        s = _similarity(a, a_rest, b, b_rest, scale, MODE)
        at = columns[None, :]
        positive = (at >= low) & (at < high)
        if SELF:
            positive = positive & (at != rows[:, None])
        z = tl.where(positive, level[:, None] - s, float("-inf"))
        softplus += tl.sum(_softplus(z), axis=1)
        sigmoid += tl.sum(_sigmoid(z), axis=1)
    tl.store(softplus_sum + split * n + rows, softplus, mask=own)
    tl.store(sigmoid_sum + split * n + rows, sigmoid, mask=own)


@triton.jit(do_not_specialize=_KEEP_SHAPE)
def _gradient_kernel(
    x, y, start, end, nlse, negative, positive, out, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, BOUNDED: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Write H y over this split's columns: out[split, row, channel].

    H = G if BY_ROW: the anchors are the rows, whose statistics are given. H = G^T if BY_COLUMN: the anchors
    are the columns. Both: anchors against themselves, H = G + G^T with a zero diagonal.
    """
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    rows = first + tl.arange(0, ROWS)
    own = rows < n
    low, high = _load_bounds(start, end, rows, own)
    begin = tl.load(start + first)
    stop = tl.load(end + tl.minimum(first + ROWS, n) - 1)
    if BY_ROW:
        level, push, pull = _load_statistics(nlse, negative, positive, rows, own, 1)
    a, a_rest = _load_rows(x, rows, n, SIZE, MODE)
    total = tl.zeros((ROWS, SIZE), tl.float32)
    for tile in range(split, tl.cdiv(m, COLUMNS), tl.num_programs(1)):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        at = columns[None, :]
        b, b_rest = _load_rows(y, columns, m, SIZE, MODE)
        s = _similarity(a, a_rest, b, b_rest, scale, MODE)
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        if BY_ROW:
            h += _repulsion(s, level, push, BOUNDED)
        if BY_COLUMN:
            level_at, push_at, pull_at = _load_statistics(nlse, negative, positive, columns, columns < m, 0)
            h += _repulsion(s, level_at, push_at, BOUNDED)
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
        if MODE == IEEE:
            total = _product(h, h, b, b, total, MODE)
        else:
            rounded = h.to(tl.float16)
            rest = (h - rounded.to(tl.float32)).to(tl.float16)
            total = _product(rounded, rest, b, b_rest, total, MODE)
    offsets = (rows.to(tl.int64) + split * n)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + offsets, total, mask=own[:, None])


class TritonBackend:
    """Launches the kernels; see `mscs.losses.contrastive.Backend`.

    Args:
        temperature: divisor of the dot products.
        bounded: promises |s| <= 40: exp(s) and its sums then fit float32 with the constant shift 0, and no
            running maximum is needed.
        unit: promises rows of length at most 1, so that fp16 can hold them.
        half: one fp16 product instead of three (ignored unless `unit`).
    """

    def __init__(self, temperature: float, *, bounded: bool, unit: bool, half: bool) -> None:
        self.mode = _IEEE if not unit else _HALF if half else _SPLIT
        self.scale = 1 / temperature
        self.row_scale = _ROW_SCALE if unit else 1.0
        self.bounded = bounded

    def pack(self, x: Tensor) -> Tensor:
        """Return the kernels' form of the rows: (parts, N, power of two) fp16, or float32 in IEEE mode."""
        channels = max(16, triton.next_power_of_2(x.shape[1]))
        x = torch.nn.functional.pad(x * self.row_scale, (0, channels - x.shape[1]))
        if self.mode == _IEEE:
            return x[None].contiguous()
        rounded = x.half()
        return torch.stack((rounded, (x - rounded).half()) if self.mode == _SPLIT else (rounded,))

    def statistics(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return nlse and both sums over positives."""
        columns = x if y is None else y
        bounds = start.int(), end.int()
        splits, launch = self._plan(x, columns, most_splits=8)
        parts = x.new_empty((3, splits, x.shape[1]), dtype=torch.float32)
        launch(_negatives_kernel, *bounds, parts[0], BOUNDED=self.bounded)
        nlse = (parts[0] / _LOG2E).logsumexp(dim=0)
        launch(_positives_kernel, *bounds, nlse * _LOG2E, parts[1], parts[2], SELF=y is None)
        return nlse, parts[1].sum(dim=0) / _LOG2E, parts[2].sum(dim=0)

    def gradients(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor,
        nlse: Tensor, negative: Tensor, positive: Tensor, need_y: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return dL/dx and, for a separate y that needs it, dL/dy."""
        # |dL/ds| <= 1/N per row, so the weights scaled by N use fp16's range to the full
        amplify = 1.0 if self.mode == _IEEE else _WEIGHT_BOUND * x.shape[1]
        if self.bounded:
            negative = negative * (-nlse.masked_fill(nlse == -math.inf, 0)).exp()
        statistics = nlse * _LOG2E, negative * amplify, positive * amplify

        def gradient(rows: Tensor, columns: Tensor, bounds: tuple[Tensor, Tensor], **flags: bool) -> Tensor:
            splits, launch = self._plan(rows, columns, most_splits=4)
            out = rows.new_empty((splits, *rows.shape[1:]), dtype=torch.float32)
            launch(_gradient_kernel, *bounds, *statistics, out, BOUNDED=self.bounded, **flags)
            return (out[0] if splits == 1 else out.sum(dim=0)).mul_(self.scale / (amplify * self.row_scale))

        start, end = start.int(), end.int()
        if y is None:
            return gradient(x, x, (start, end), BY_ROW=True, BY_COLUMN=True), None
        dx = gradient(x, y, (start, end), BY_ROW=True, BY_COLUMN=False)
        if not need_y:
            return dx, None
        # the anchors of row j of y are those i with start_i <= j < end_i, and both bounds are sorted
        index = torch.arange(y.shape[1], dtype=torch.int32, device=y.device)
        bounds = [torch.searchsorted(ends, index, right=True, out_int32=True) for ends in (end, start)]
        return dx, gradient(y, x, (bounds[0], bounds[1]), BY_ROW=False, BY_COLUMN=True)

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
        scale = self.scale * _LOG2E / self.row_scale**2

        def launch(kernel: Any, *given: Tensor, **flags: bool) -> None:
            with torch.cuda.device_of(x):
                kernel[blocks, splits](
                    x, y, *given, n, m, scale, SIZE=x.shape[2], ROWS=rows, COLUMNS=columns, MODE=self.mode,
                    num_warps=warps, num_stages=stages, **flags,
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
    for rows, columns, warps, stages in _TILES if x.dtype == torch.float16 else _TILES[-1:]:
        if row_bytes * (rows + stages * columns) + 4 * rows * columns <= memory:
            return rows, columns, warps, stages
    return 16, 16, 4, 1
