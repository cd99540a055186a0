"""The contrastive term of one scale (anchors against themselves) or of a pair of scales.

With similarities s_ij = x_i.y_j / temperature, positives P_i (same class, not i itself) and negatives N_i
(other classes), the loss is the mean over anchors of

    1/|P_i| * sum_{p in P_i} -log( exp(s_ip) / (exp(s_ip) + sum_{n in N_i} exp(s_in)) )

which is 1/|P_i| * sum_p softplus(nlse_i - s_ip), where nlse_i is the log-sum-exp over the negatives. Value
and gradient need three numbers per anchor, so no backend but "reference" ever holds an N x M matrix.
"""

import math
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mscs.losses.sampling import gather_pixels
from mscs.losses.tiled import TiledBackend

if TYPE_CHECKING:
    from mscs.losses.triton_kernels import TritonBackend

Rows = tuple[Tensor, Tensor]  # rows (N, C), and the (N,) classes that they are ordered by

BACKENDS = ("auto", "reference", "tiled", "triton")
PRECISIONS = ("auto", "fp32", "fp16")
_REFERENCE_PAIRS = 512 * 512  # below this many pairs the dense formula is the fastest on a CPU
OLDEST_TRITON = (3, 2)  # with older ones the kernels give other numbers
MAX_TRITON_CHANNELS = 256  # a row of either operand stays on chip as one block
_BOUNDED_EXPONENT = 80.0  # the exponents of unit rows span 2/temperature: exp() of them fits float32


def contrastive_loss(
    anchors: Tensor,
    anchor_labels: Tensor,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """Return the supervised contrastive loss, the mean over anchors of the formula above.

    An anchor without a positive or without a negative contributes exactly 0 and is counted in the mean. With
    no anchors, or nothing to contrast, the result is a zero attached to the graph.

    Args:
        anchors: (N, C) float, any layout. float64 is kept, other dtypes are evaluated in float32, also
            inside autocast.
        anchor_labels: (N,) integer classes; every value is a class of its own, none is ignored.
        contrast: (M, C) set that anchors are compared with; None contrasts anchors with each other.
        contrast_labels: (M,) integer; needed with `contrast`.
        temperature: positive divisor of the similarities.
        normalize: scale rows to unit length first (a zero row stays zero and gets no gradient).
        backend: "reference" (dense), "tiled" (PyTorch, O(N*C) memory), "triton" (CUDA kernels), or "auto".
        precision: grade of the Triton kernels: "fp32" (also "auto") or "fp16".

    Raises:
        ValueError: wrong shapes, dtypes, devices or names, or a backend that cannot run the input.
    """
    _check_set("anchors", anchors, anchor_labels)
    if (contrast is None) != (contrast_labels is None):
        raise ValueError("contrast and contrast_labels must be given together")
    check_options(temperature, backend, precision)
    sets = [(anchors, anchor_labels)]
    if contrast is not None and contrast_labels is not None:
        _check_set("contrast", contrast, contrast_labels)
        if contrast.shape[1] != anchors.shape[1] or contrast.device != anchors.device:
            raise ValueError(
                f"anchors are {tuple(anchors.shape)} on {anchors.device}, "
                f"contrast {tuple(contrast.shape)} on {contrast.device}: channels and device must agree"
            )
        sets.append((contrast, contrast_labels))
    with torch.autocast(anchors.device.type, enabled=False):
        ordered = [_sort(prepare(features, normalize), labels) for features, labels in sets]
        return sorted_loss(
            *ordered, temperature=temperature, unit=normalize, backend=backend, precision=precision
        )


def _sort(rows: Tensor, labels: Tensor) -> Rows:
    labels, order = torch.sort(labels.long(), stable=True)
    return gather_pixels(rows[:, :, None, None], order), labels


def _check_set(name: str, features: Tensor, labels: Tensor) -> None:
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"{name} must be float (N, C); found {features.dtype} {tuple(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels of the {name} must be {len(features)} integers; "
            f"found {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.device != features.device:
        raise ValueError(f"{name} are on {features.device}, their labels on {labels.device}")


def check_options(temperature: float, backend: str, precision: str) -> None:
    """Raise ValueError for an impossible temperature or an unknown backend or precision."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; found {temperature}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; accepted: {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; accepted: {', '.join(PRECISIONS)}")


def prepare(features: Tensor, normalize: bool = True) -> Tensor:
    """Return (N, C) rows in float32 or float64, scaled to unit length if asked; zero rows stay zero."""
    rows = features if features.dtype == torch.float64 else features.float()
    if not normalize:
        return rows
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm.masked_fill(norm < 1e-12, math.inf)


@torch.compiler.disable  # loops over tiles whose number differs at every step
def sorted_loss(*sets: Rows, temperature: float, unit: bool, backend: str, precision: str) -> Tensor:
    """Return the loss of one set against itself, or of the first against the second.

    Each set is float rows (N, C) ordered by class, and their int64 classes (N,). `unit` promises that no row
    is longer than 1.
    """
    if not all(len(rows) for rows, _ in sets):
        return torch.cat([rows[:0] for rows, _ in sets]).sum()
    x, x_labels = sets[0]
    columns, column_labels = sets[-1][0].to(x.dtype), sets[-1][1]
    y = None if len(sets) == 1 else columns
    bounded = unit and 2 / temperature <= _BOUNDED_EXPONENT
    name = _resolve(backend, x, len(columns), bounded)
    if name == "reference":
        same = x_labels[:, None] == column_labels
        return _dense(x @ columns.T / temperature, same, exclude_diagonal=y is None)
    start = torch.searchsorted(column_labels, x_labels)
    end = torch.searchsorted(column_labels, x_labels, right=True)
    if name == "tiled":
        return _FusedLoss.apply(x, y, start, end, TiledBackend(temperature, bounded=bounded))
    from mscs.losses.triton_kernels import TritonBackend  # imports triton, which is heavy and CUDA only

    return _FusedLoss.apply(x, y, start, end, TritonBackend(temperature, half=precision == "fp16"))


def _dense(similarity: Tensor, same: Tensor, *, exclude_diagonal: bool) -> Tensor:
    """Return the loss from an (N, M) similarity matrix; `same` marks pairs of one class."""
    positive = same.clone().fill_diagonal_(False) if exclude_diagonal else same
    # the lowest finite number instead of -inf: a row without negatives then has loss and gradient 0, not NaN
    lowest = torch.finfo(similarity.dtype).min
    nlse = similarity.masked_fill(same, lowest).logsumexp(dim=1, keepdim=True)
    loss = -F.logsigmoid(similarity - nlse)
    return (loss.where(positive, 0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)).mean()


class _FusedLoss(torch.autograd.Function):
    """The loss by a backend that visits tiles of the similarity matrix and keeps three numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, start: Tensor, end: Tensor,
        backend: "TiledBackend | TritonBackend",
    ) -> Tensor:  # fmt: skip
        rows, columns = backend.pack(x), None if y is None else backend.pack(y)
        nlse, softplus_sum, sigmoid_sum = backend.statistics(rows, columns, start, end)
        count = end - start - (1 if y is None else 0)
        positive = (count > 0) / (count.clamp(min=1) * len(x)).to(x.dtype)
        ctx.backend, ctx.channels = backend, x.shape[1]
        # as the weights of a row in dL/ds sum to 0, its negatives weigh as much as its positives together
        ctx.save_for_backward(rows, columns, start, end, nlse, positive * sigmoid_sum, positive)
        return (positive * softplus_sum).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the statistics would silently count as constants
            raise RuntimeError('contrastive_loss: second derivatives need backend "reference"')
        with torch.autocast(grad.device.type, enabled=False):
            dx, dy = ctx.backend.gradients(*ctx.saved_tensors, need_y=ctx.needs_input_grad[1])
            dx, dy = (None if d is None else d[:, : ctx.channels].mul_(grad) for d in (dx, dy))
        return dx, dy, None, None, None


def _resolve(backend: str, x: Tensor, columns: int, bounded: bool) -> str:
    """Return the backend that runs: what was asked for, or the fastest for this input."""
    fits = bounded and x.dtype == torch.float32 and x.shape[1] <= MAX_TRITON_CHANNELS
    if backend == "triton" and not (fits and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(
            f'backend "triton" runs CUDA tensors of at most 32 bits and {MAX_TRITON_CHANNELS} channels, with '
            f"normalize=True and a temperature of at least {2 / _BOUNDED_EXPONENT}; found {x.dtype} on "
            f'{x.device} with {x.shape[1]} channels. Use backend "auto" or "tiled"'
        )
    if backend == "triton" and not triton_is_usable():
        raise ValueError('backend "triton" needs Triton from {}.{}; use "auto"'.format(*OLDEST_TRITON))
    if backend != "auto":
        return backend
    if fits and x.is_cuda and triton_is_usable():
        return "triton"
    return "reference" if len(x) * columns <= _REFERENCE_PAIRS else "tiled"


@cache
def triton_is_usable() -> bool:
    """Return whether Triton is installed, in a version that the kernels have been checked with."""
    try:
        import triton  # heavy, and asked for on CUDA only
    except ImportError:  # old releases do so too where setuptools is missing, which they do not require
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST_TRITON
