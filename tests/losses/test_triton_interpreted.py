"""The kernels' logic on a CPU: run by test_triton_kernels.py with TRITON_INTERPRET=1, skipped otherwise."""

import os

import pytest
import torch
from torch import Tensor

from mscs.losses import contrastive_loss
from mscs.losses.contrastive import sorted_loss

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns of log2(0), which is meant here
]


def _case(rows: int, channels: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, channels, generator=generator),
        torch.randint(classes, (rows,), generator=generator),
    )


def _run(inputs: list[Tensor], labels: list[Tensor], **options) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss = contrastive_loss(*[part for pair in zip(leaves, labels, strict=True) for part in pair], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _assert_near(found: list[Tensor], exact: list[Tensor], value: float, gradient: float) -> None:
    assert found[0].item() == pytest.approx(exact[0].item(), rel=value, abs=1e-7)
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        assert (ours - theirs).norm() <= gradient * theirs.norm() + 1e-9


@pytest.mark.parametrize("columns", [None, 41])
@pytest.mark.parametrize(
    ("rows", "channels", "classes", "temperature"),
    [(150, 64, 5, 0.1), (70, 128, 3, 0.025), (37, 200, 30, 0.1), (33, 256, 2, 0.03), (1, 64, 1, 0.1)],
)
def test_float32_grade(
    rows: int, channels: int, classes: int, temperature: float, columns: int | None
) -> None:
    sets = [_case(rows, channels, classes, 0)]
    if columns:
        sets.append(_case(columns, channels, classes + 1, 1))
    inputs, labels = [x for x, _ in sets], [label for _, label in sets]
    found = _run(inputs, labels, temperature=temperature, backend="triton", precision="fp32")
    exact = _run([x.double() for x in inputs], labels, temperature=temperature, backend="reference")
    _assert_near(found, exact, 1e-6, 2e-6)


@pytest.mark.parametrize("columns", [None, 20])
def test_half_grade(columns: int | None) -> None:
    sets = [_case(70, 200, 6, 0)] + ([_case(columns, 200, 4, 1)] if columns else [])
    inputs, labels = [x for x, _ in sets], [label for _, label in sets]
    found = _run(inputs, labels, backend="triton", precision="fp16")
    exact = _run([x.double() for x in inputs], labels, backend="reference")
    _assert_near(found, exact, 1e-5, 1e-3)
    assert (found[1] - exact[1]).norm() > 1e-5 * exact[1].norm(), "this should be the rougher arithmetic"


def test_edges_are_exact_zeros() -> None:
    x, _ = _case(20, 16, 1, 0)
    one, other = torch.zeros(20).long(), torch.ones(20).long()
    for labels in ([one], [one, one], [one, other]):
        found = _run([x, x.flip(0)][: len(labels)], labels, backend="triton")
        assert all((part == 0).all() for part in found)


def test_rows_of_the_similarity_gradient_sum_to_zero() -> None:
    x, labels = _case(40, 16, 4, 0)
    x = (x / x.norm(dim=1, keepdim=True)).requires_grad_()
    loss = sorted_loss(
        (x, labels.sort().values), (torch.eye(16), torch.arange(16) // 4),
        temperature=0.1, unit=True, backend="triton", precision="auto",
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, x)
    assert (grad.sum(dim=1).abs() < 2e-6 * grad.abs().sum(dim=1)).all()
