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
_Tile = tuple[slice, slice]
_Classes = list[tuple[int, int, int, int]]  # per class: first and last row, first and last column


class TiledEngine:
    """Statistics and gradients tile by tile.

    Args:
        temperature: divisor of the dot products.
        bounded: promises |s| <= 40 (unit rows and 2/temperature <= 80). exp(s) then fits float32 without
            any shift, sums are plain, and one exp per pair serves rows and columns.
    """

    def __init__(self, temperature: float, *, bounded: bool) -> None:
        self.scale = 1 / temperature
        self.bounded = bounded

    def pack(self, x: Tensor) -> Tensor:
        """Return the rows ready for the methods below."""
        return x.contiguous()

    def statistics(
        self, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return per row nlse and the sums over positives of softplus(nlse - s) and sigmoid(nlse - s).

        x (N, C) and y (M, C) are ordered by class; start, end (N,) bound each row's class among the columns.
        Rows of classes that are absent from y have no positives, so their nlse is not needed and stays -inf.
        """
        symmetric = y is None
        y = x if y is None else y
        classes = _classes(start, end)
        tile = _Buffer(x)
        nlse = x.new_full((len(x),), 0.0 if self.bounded else -math.inf)
        for rows, columns in _negative_tiles(classes, len(y), symmetric):
            s = self._similarity(x[rows], y[columns], tile)
            if self.bounded:
                s.exp_()
                nlse[rows] += s.sum(dim=1)
                if symmetric:
                    nlse[columns] += s.sum(dim=0)
            else:
                nlse[rows] = torch.logaddexp(nlse[rows], s.logsumexp(dim=1))
                if symmetric:
                    nlse[columns] = torch.logaddexp(nlse[columns], s.logsumexp(dim=0))
        if self.bounded:
            nlse.log_()
        loss, hits = torch.zeros_like(nlse), torch.zeros_like(nlse)
        for rows, columns, diagonal in _positive_tiles(classes, symmetric):
            s = self._similarity(x[rows], y[columns], tile)
            if diagonal:
                s.fill_diagonal_(math.inf)  # softplus and sigmoid of -inf are 0: not its own positive
            margin = nlse[rows, None] - s
            hits[rows] += margin.sigmoid().sum(dim=1)
            loss[rows] += F.softplus(margin, threshold=40).sum(dim=1)
            if symmetric and not diagonal:
                margin = torch.sub(nlse[columns], s, out=s)
                hits[columns] += margin.sigmoid().sum(dim=0)
                loss[columns] += F.softplus(margin, threshold=40).sum(dim=0)
        return nlse, loss, hits

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
        """Return dL/dx and, for a separate y that needs it, dL/dy.

        With G = dL/ds, G_in = push_i * exp(s_in - nlse_i) for negatives and
        G_ip = -pull_i * sigmoid(nlse_i - s_ip) for positives: dx = G y / temperature,
        dy = G^T x / temperature.
        """
        symmetric = y is None
        y = x if y is None else y
        classes = _classes(start, end)
        tile, scratch = _Buffer(x), _Buffer(x)
        dx = torch.zeros_like(x)
        dy = dx if symmetric else (torch.zeros_like(y) if need_y else None)
        finite = nlse.masked_fill(nlse == -math.inf, 0)  # push is 0 where there is no negative
        alpha = push * (-finite).exp() if self.bounded else push
        for rows, columns in _negative_tiles(classes, len(y), symmetric):
            s = self._similarity(x[rows], y[columns], tile)
            if self.bounded:
                weight = alpha[rows, None]
                if symmetric:
                    weight = torch.add(weight, alpha[columns], out=scratch.like(s))
                g = s.exp_().mul_(weight)
            else:
                g = torch.sub(s, finite[rows, None], out=scratch.like(s)).exp_().mul_(push[rows, None])
                if symmetric:
                    g.add_(s.sub_(finite[columns]).exp_().mul_(push[columns]))
            self._accumulate(g, rows, columns, x, y, dx, dy)
        for rows, columns, diagonal in _positive_tiles(classes, symmetric):
            s = self._similarity(x[rows], y[columns], tile)
            if diagonal:
                s.fill_diagonal_(math.inf)
            g = torch.sub(nlse[rows, None], s, out=scratch.like(s)).sigmoid_().mul_(-pull[rows, None])
            if symmetric:
                g.sub_(torch.sub(nlse[columns], s, out=s).sigmoid_().mul_(pull[columns]))
            self._accumulate(g, rows, columns, x, y, dx, None if diagonal else dy)
        return dx, None if symmetric else dy

    def _similarity(self, x: Tensor, y: Tensor, buffer: "_Buffer") -> Tensor:
        out = buffer.take(len(x), len(y))
        return torch.addmm(out, x, y.T, beta=0, alpha=self.scale, out=out)

    def _accumulate(
        self, g: Tensor, rows: slice, columns: slice, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor | None
    ) -> None:
        dx[rows].addmm_(g, y[columns], alpha=self.scale)
        if dy is not None:
            dy[columns].addmm_(g.T, x[rows], alpha=self.scale)


class _Buffer:
    """Memory for one tile, reused: allocating each tile anew costs more than filling it."""

    def __init__(self, like: Tensor) -> None:
        self.memory = like.new_empty(_ROWS * _COLUMNS)

    def take(self, rows: int, columns: int) -> Tensor:
        return self.memory[: rows * columns].view(rows, columns)

    def like(self, tile: Tensor) -> Tensor:
        return self.take(*tile.shape)


def _classes(start: Tensor, end: Tensor) -> _Classes:
    """Return row and column bounds of each class; classes absent from the columns may be merged."""
    pairs, sizes = torch.unique_consecutive(torch.stack((start, end)), dim=1, return_counts=True)
    stops = sizes.cumsum(0)
    return torch.stack((stops - sizes, stops, *pairs)).T.tolist()


def _negative_tiles(classes: _Classes, columns: int, symmetric: bool) -> Iterator[_Tile]:
    for first, last, start, end in classes:
        if start == end:
            continue  # no positives, so negatives do not matter either
        for rows in _split(first, last, _ROWS):
            for span in ((end, columns),) if symmetric else ((0, start), (end, columns)):
                for part in _split(*span, _COLUMNS):
                    yield rows, part


def _positive_tiles(classes: _Classes, symmetric: bool) -> Iterator[tuple[slice, slice, bool]]:
    for first, last, start, end in classes:
        for rows in _split(first, last, _ROWS):
            if symmetric:
                yield rows, rows, True
            for part in _split(rows.stop if symmetric else start, end, _COLUMNS):
                yield rows, part, False


def _split(first: int, last: int, size: int) -> Iterator[slice]:
    """Cut [first, last) into equal parts of at most `size`."""
    parts = -(-(last - first) // size)
    for part in range(parts):
        yield slice(first + (last - first) * part // parts, first + (last - first) * (part + 1) // parts)
