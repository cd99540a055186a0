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
def _load_rows(data, rows, count, size: tl.constexpr, PART: tl.constexpr):
    """Return (rows, size) of part 0 (rounded rows) or 1 (their rounding errors); zeros past the end."""
    channels = tl.arange(0, size)
    offsets = (rows.to(tl.int64) + PART * count)[:, None] * size + channels[None, :]
    return tl.load(data + offsets, mask=(rows < count)[:, None], other=0.0)


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
    low = tl.load(start + rows, mask=own, other=0)
    high = tl.load(end + rows, mask=own, other=0)
    # tiles wholly inside the class of every row hold no negative: [before, resume) is left out
    before = tl.cdiv(tl.load(start + tl.minimum(first + ROWS, n) - 1), COLUMNS)
    resume = tl.maximum(tl.load(end + first) // COLUMNS, before)
    tiles = before + tl.cdiv(m, COLUMNS) - resume
    a = _load_rows(x, rows, n, SIZE, 0)
    a_rest = _load_rows(x, rows, n, SIZE, 1) if MODE == SPLIT else a
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for index in range(split, tiles, tl.num_programs(1)):
        tile = tl.where(index < before, index, index - before + resume)
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        b = _load_rows(y, columns, m, SIZE, 0)
        b_rest = _load_rows(y, columns, m, SIZE, 1) if MODE == SPLIT else b
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = _product(a, a_rest, tl.trans(b), tl.trans(b_rest), s, MODE) * scale
        at = columns[None, :]
        negative = (at < m) & ((at < low[:, None]) | (at >= high[:, None]))
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
    x, y, start, end, nlse, loss, hits, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """Write the sums of softplus and sigmoid of nlse - s over this split's positives."""
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    rows = first + tl.arange(0, ROWS)
    own = rows < n
    low = tl.load(start + rows, mask=own, other=0)
    high = tl.load(end + rows, mask=own, other=0)
    level = tl.load(nlse + rows, mask=own, other=0.0)
    begin = tl.load(start + first) // COLUMNS
    stop = tl.cdiv(tl.load(end + tl.minimum(first + ROWS, n) - 1), COLUMNS)
    a = _load_rows(x, rows, n, SIZE, 0)
    a_rest = _load_rows(x, rows, n, SIZE, 1) if MODE == SPLIT else a
    total = tl.zeros((ROWS,), tl.float32)
    count = tl.zeros((ROWS,), tl.float32)
    for tile in range(begin + split, stop, tl.num_programs(1)):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        b = _load_rows(y, columns, m, SIZE, 0)
        b_rest = _load_rows(y, columns, m, SIZE, 1) if MODE == SPLIT else b
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = _product(a, a_rest, tl.trans(b), tl.trans(b_rest), s, MODE) * scale
        at = columns[None, :]
        positive = (at >= low[:, None]) & (at < high[:, None])
        if SELF:
            positive = positive & (at != rows[:, None])
        z = tl.where(positive, level[:, None] - s, float("-inf"))
        total += tl.sum(_softplus(z), axis=1)
        count += tl.sum(_sigmoid(z), axis=1)
    tl.store(loss + split * n + rows, total, mask=own)
    tl.store(hits + split * n + rows, count, mask=own)


@triton.jit(do_not_specialize=_KEEP_SHAPE)
def _gradient_kernel(
    x, y, start, end, nlse, push, pull, out, n, m, scale,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MODE: tl.constexpr, BOUNDED: tl.constexpr,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
):  # fmt: skip
    """Write H y over this split's columns: out[split, row, channel].

    H = G if BY_ROW: the anchors are the rows, whose statistics are given. H = G^T if BY_COLUMN: the anchors
    are the columns. Both: anchors against themselves, H = G + G^T with a zero diagonal. `push` comes
    multiplied by 2^-nlse when BOUNDED.
    """
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    rows = first + tl.arange(0, ROWS)
    own = rows < n
    last = tl.minimum(first + ROWS, n) - 1
    if BY_ROW:
        low = tl.load(start + rows, mask=own, other=0)[:, None]
        high = tl.load(end + rows, mask=own, other=0)[:, None]
        level = tl.load(nlse + rows, mask=own, other=0.0)[:, None]
        push_row = tl.load(push + rows, mask=own, other=0.0)[:, None]
        pull_row = tl.load(pull + rows, mask=own, other=0.0)[:, None]
        begin = tl.load(start + first)
        stop = tl.load(end + last)
    a = _load_rows(x, rows, n, SIZE, 0)
    a_rest = _load_rows(x, rows, n, SIZE, 1) if MODE == SPLIT else a
    total = tl.zeros((ROWS, SIZE), tl.float32)
    for tile in range(split, tl.cdiv(m, COLUMNS), tl.num_programs(1)):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < m
        b = _load_rows(y, columns, m, SIZE, 0)
        b_rest = _load_rows(y, columns, m, SIZE, 1) if MODE == SPLIT else b
        s = tl.zeros((ROWS, COLUMNS), tl.float32)
        s = _product(a, a_rest, tl.trans(b), tl.trans(b_rest), s, MODE) * scale
        if BY_COLUMN:
            level_column = tl.load(nlse + columns, mask=inside, other=0.0)[None, :]
            push_column = tl.load(push + columns, mask=inside, other=0.0)[None, :]
            pull_column = tl.load(pull + columns, mask=inside, other=0.0)[None, :]
        if BY_ROW:
            same = (columns[None, :] >= low) & (columns[None, :] < high)
            mixed = (tile * COLUMNS < stop) & (tile * COLUMNS + COLUMNS > begin)
        else:
            low = tl.load(start + columns, mask=inside, other=0)[None, :]
            high = tl.load(end + columns, mask=inside, other=0)[None, :]
            same = (rows[:, None] >= low) & (rows[:, None] < high)
            begin = tl.load(start + tile * COLUMNS)
            stop = tl.load(end + tl.minimum(tile * COLUMNS + COLUMNS, m) - 1)
            mixed = (first < stop) & (last >= begin)
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        if BOUNDED:
            if BY_ROW:
                h += push_row
            if BY_COLUMN:
                h += push_column
            h *= tl.exp2(s)
        else:
            if BY_ROW:
                h += push_row * tl.exp2(s - tl.where(level == float("-inf"), s, level))
            if BY_COLUMN:
                h += push_column * tl.exp2(s - tl.where(level_column == float("-inf"), s, level_column))
        if mixed:
            attraction = tl.zeros((ROWS, COLUMNS), tl.float32)
            if BY_ROW:
                attraction += pull_row * _sigmoid(level - s)
            if BY_COLUMN:
                attraction += pull_column * _sigmoid(level_column - s)
            h = tl.where(same, -attraction, h)
        keep = inside[None, :] & own[:, None]
        if BY_ROW and BY_COLUMN:
            keep = keep & (columns[None, :] != rows[:, None])
        h = tl.where(keep, h, 0.0)
        if MODE == IEEE:
            total = _product(h, h, b, b, total, MODE)
        else:
            rounded = h.to(tl.float16)
            rest = (h - rounded.to(tl.float32)).to(tl.float16)
            total = _product(rounded, rest, b, b_rest, total, MODE)
    channels = tl.arange(0, SIZE)
    offsets = (rows.to(tl.int64) + split * n)[:, None] * SIZE + channels[None, :]
    tl.store(out + offsets, total, mask=own[:, None])


class TritonEngine:
    """Launches the kernels; see `mscs.losses.contrastive.Engine`.

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
        """Return per row nlse and the sums over positives of softplus(nlse - s) and sigmoid(nlse - s)."""
        columns = x if y is None else y
        start, end = start.int(), end.int()
        grid, tile = self._plan(x, columns, most_splits=8)
        n, m = x.shape[1], columns.shape[1]
        scale = self.scale * _LOG2E / self.row_scale**2
        parts = x.new_empty((3, grid[1], n), dtype=torch.float32)
        with torch.cuda.device_of(x):
            _negatives_kernel[grid](
                x, columns, start, end, parts[0], n, m, scale, BOUNDED=self.bounded, **tile
            )
            nlse = (parts[0] / _LOG2E).logsumexp(dim=0)
            _positives_kernel[grid](
                x, columns, start, end, nlse * _LOG2E, parts[1], parts[2], n, m, scale, SELF=y is None, **tile
            )
        return nlse, parts[1].sum(dim=0) / _LOG2E, parts[2].sum(dim=0)

    def gradients(
        self,
        x: Tensor,
        y: Tensor | None,
        start: Tensor,
        end: Tensor,
        nlse: Tensor,
        push: Tensor,
        pull: Tensor,
        need_y: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return dL/dx and, for a separate y that needs it, dL/dy."""
        # |dL/ds| <= 1/N per row, so the weights scaled by N use fp16's range to the full
        amplify = 1.0 if self.mode == _IEEE else _WEIGHT_BOUND * x.shape[1]
        if self.bounded:
            push = push * (-nlse.masked_fill(nlse == -math.inf, 0)).exp()
        given = start.int(), end.int(), nlse * _LOG2E, push * amplify, pull * amplify
        factor = self.scale / (amplify * self.row_scale)
        columns = x if y is None else y
        dx = self._gradient(x, columns, given, factor, by_row=True, by_column=y is None)
        if y is None or not need_y:
            return dx, None
        return dx, self._gradient(y, x, given, factor, by_row=False, by_column=True)

    def _gradient(
        self, x: Tensor, y: Tensor, given: tuple[Tensor, ...], factor: float, *, by_row: bool, by_column: bool
    ) -> Tensor:
        grid, tile = self._plan(x, y, most_splits=4)
        n, m = x.shape[1], y.shape[1]
        scale = self.scale * _LOG2E / self.row_scale**2
        out = x.new_empty((grid[1], n, x.shape[2]), dtype=torch.float32)
        with torch.cuda.device_of(x):
            _gradient_kernel[grid](
                x, y, *given, out, n, m, scale,
                BOUNDED=self.bounded, BY_ROW=by_row, BY_COLUMN=by_column, **tile,
            )  # fmt: skip
        return (out[0] if len(out) == 1 else out.sum(dim=0)).mul_(factor)

    def _plan(self, x: Tensor, y: Tensor, most_splits: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Return the grid (row blocks, column splits) and the tile settings for this device."""
        memory, processors = _device(x)
        rows, columns, warps, stages = _tile(x, memory)
        blocks, tiles = triton.cdiv(x.shape[1], rows), triton.cdiv(y.shape[1], columns)

        def idle(splits: int) -> float:
            """Share of the processors' time without a block, when blocks are handed out in waves."""
            waves = triton.cdiv(blocks * splits, processors)
            return round(1 - blocks * splits / (waves * processors), 1)

        splits = min(range(1, min(most_splits, tiles) + 1), key=idle)
        return (blocks, splits), {
            "SIZE": x.shape[2],
            "ROWS": rows,
            "COLUMNS": columns,
            "MODE": self.mode,
            "num_warps": warps,
            "num_stages": stages,
        }


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
