"""The loss in plain PyTorch over tiles of the similarity matrix: O(N*C) memory on any device.

Rows and columns are ordered by class, so a tile holds only positives or only negatives and needs no mask.
When the anchors are contrasted with themselves the matrix is symmetric: only its upper triangle is
visited, and every tile serves its rows and its columns.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS, _COLUMNS = 512, 1024  # 2 MB in float32: a tile stays in the cache between its few passes


class TiledBackend:
    """Statistics and gradients tile by tile.

    x (N, C) and y (M, C) are ordered by class, y = None means x against itself; start, end (N,) bound the
    columns of each row's class.

    Args:
        temperature: divisor of the dot products.
        bounded: promises |s| <= 40 (unit rows and 2/temperature <= 80). exp(s) then fits float32 without
            any shift, sums are plain, and one exp per pair serves rows and columns.
    """

    def __init__(self, temperature: float, *, bounded: bool) -> None:
        self.scale = 1 / temperature
        self.bounded = bounded

    def pack(self, x: Tensor) -> Tensor:
        """Return the rows in the form the other two methods take."""
        return x.contiguous()

    def statistics(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return per row nlse and the sums over positives of softplus(nlse - s) and sigmoid(nlse - s).

        nlse stays -inf where a row has no positive.
        """
        tiles = _Tiles(x, y, start, end, self.scale)
        nlse = x.new_full((len(x),), 0.0 if self.bounded else -math.inf)
        for rows, columns, s, _ in tiles.visit(positives=False):
            if self.bounded:
                s.exp_()
            for anchors, values in tiles.sides(rows, columns, s):
                if self.bounded:
                    nlse[anchors] += values.sum(dim=1)
                else:
                    nlse[anchors] = torch.logaddexp(nlse[anchors], values.logsumexp(dim=1))
        if self.bounded:
            nlse.log_()
        softplus_sum, sigmoid_sum = torch.zeros_like(nlse), torch.zeros_like(nlse)
        for rows, columns, s, _ in tiles.visit(positives=True):
            for anchors, values in tiles.sides(rows, columns, s):
                margin = nlse[anchors, None] - values
                sigmoid_sum[anchors] += margin.sigmoid().sum(dim=1)
                softplus_sum[anchors] += F.softplus(margin, threshold=40).sum(dim=1)
        return nlse, softplus_sum, sigmoid_sum

    def gradients(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor,
        nlse: Tensor, negative: Tensor, positive: Tensor, need_y: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return dL/dx = G y / temperature and, for a y that needs it, dL/dy = G^T x / temperature.

        G = dL/ds is negative_i * exp(s_in - nlse_i) for negatives n and -positive_i * sigmoid(nlse_i - s_ip)
        for positives p.
        """
        tiles = _Tiles(x, y, start, end, self.scale)
        dx = torch.zeros_like(x)
        dy = dx if y is None else torch.zeros_like(y) if need_y else None
        shift = nlse.masked_fill(nlse == -math.inf, 0)  # the weight is 0 where there is no negative
        if self.bounded:
            negative = negative * (-shift).exp()
        for rows, columns, s, spare in tiles.visit(positives=False):
            if self.bounded:
                weight = negative[rows, None]
                if tiles.symmetric:
                    weight = torch.add(weight, negative[columns], out=spare)
                g = s.exp_().mul_(weight)
            else:
                g = torch.sub(s, shift[rows, None], out=spare).exp_().mul_(negative[rows, None])
                if tiles.symmetric:
                    g.add_(s.sub_(shift[columns]).exp_().mul_(negative[columns]))
            tiles.accumulate(g, rows, columns, dx, dy)
        for rows, columns, s, spare in tiles.visit(positives=True):
            g = torch.sub(nlse[rows, None], s, out=spare).sigmoid_().mul_(-positive[rows, None])
            if tiles.symmetric:
                g.sub_(torch.sub(nlse[columns], s, out=s).sigmoid_().mul_(positive[columns]))
            tiles.accumulate(g, rows, columns, dx, dy)
        return dx, None if y is None else dy


class _Tiles:
    """The tiles of the similarity matrix of x and y, or of x and itself."""

    def __init__(self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor, scale: float) -> None:
        self.symmetric = y is None
        self.x, self.y, self.scale = x, x if y is None else y, scale
        # per class its first and last row, first and last column; classes absent from y may be merged
        pairs, sizes = torch.unique_consecutive(torch.stack((start, end)), dim=1, return_counts=True)
        stops = sizes.cumsum(0)
        self.classes = torch.stack((stops - sizes, stops, *pairs)).T.tolist()

    def visit(self, *, positives: bool) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Yield rows, columns and similarities of each tile, and a spare tile; the next tile overwrites both.

        A row is not its own positive: where rows meet themselves s is inf, of which softplus(nlse - s) and
        sigmoid(nlse - s) are 0.
        """
        # reused, because allocating each tile costs more than filling it
        memory = [self.x.new_empty(_ROWS * _COLUMNS) for _ in range(2)]
        for rows, columns in self._positions(positives):
            x, y = self.x[rows], self.y[columns]
            s, spare = (m[: len(x) * len(y)].view(len(x), len(y)) for m in memory)
            torch.addmm(s, x, y.T, beta=0, alpha=self.scale, out=s)
            if self._on_diagonal(rows, columns):
                s.fill_diagonal_(math.inf)
            yield rows, columns, s, spare

    def _positions(self, positives: bool) -> Iterator[tuple[slice, slice]]:
        for first, last, start, end in self.classes:
            if start == end:
                continue  # without positives the loss is 0, so the negatives do not matter either
            for rows in _split(first, last, _ROWS):
                if positives:
                    if self.symmetric:
                        yield rows, rows
                    spans = [(rows.stop if self.symmetric else start, end)]
                else:
                    spans = [(end, len(self.y))] if self.symmetric else [(0, start), (end, len(self.y))]
                for span in spans:
                    for columns in _split(*span, _COLUMNS):
                        yield rows, columns

    def sides(self, rows: slice, columns: slice, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the anchors that a tile serves, and their values: its rows, and by symmetry its columns."""
        yield rows, values
        if self.symmetric and not self._on_diagonal(rows, columns):
            yield columns, values.T

    def accumulate(self, g: Tensor, rows: slice, columns: slice, dx: Tensor, dy: Tensor | None) -> None:
        """Add one tile's part of the gradients; on the diagonal g holds both directions already."""
        dx[rows].addmm_(g, self.y[columns], alpha=self.scale)
        if dy is not None and not self._on_diagonal(rows, columns):
            dy[columns].addmm_(g.T, self.x[rows], alpha=self.scale)

    def _on_diagonal(self, rows: slice, columns: slice) -> bool:
        return self.symmetric and rows == columns


def _split(first: int, last: int, size: int) -> Iterator[slice]:
    """Cut [first, last) into equal parts of at most `size`."""
    parts = -(-(last - first) // size)
    for part in range(parts):
        yield slice(first + (last - first) * part // parts, first + (last - first) * (part + 1) // parts)
