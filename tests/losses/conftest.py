from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Naive = Callable[..., Tensor]


def _naive(
    x: Tensor, lx: Tensor, y: Tensor | None = None, ly: Tensor | None = None, temperature: float = 0.1
) -> Tensor:
    """The formula as printed, exp by exp, for rows taken as they are."""
    columns, labels = (x, lx) if y is None else (y, ly)
    s = x @ columns.T / temperature
    same = (lx[:, None] == labels).to(s)
    positive = same - torch.eye(len(x)).to(s) if y is None else same
    negatives = (s.exp() * (1 - same)).sum(dim=1, keepdim=True)
    log_probability = s - (s.exp() + negatives).log()
    count = positive.sum(dim=1)
    return (-(positive * log_probability).sum(dim=1) / count.clamp(min=1)).mean()


@pytest.fixture(scope="session")
def naive() -> Naive:
    return _naive


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiles so small that a handful of rows already needs many."""
    monkeypatch.setattr("mscs.losses.tiled._ROWS", 4)
    monkeypatch.setattr("mscs.losses.tiled._COLUMNS", 6)
