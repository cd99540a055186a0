import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mscs.losses import contrastive_loss
from mscs.losses.contrastive import sorted_loss

BACKENDS = ["reference", "tiled"]
Naive = Callable[..., Tensor]


def _set(rows: int, channels: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator, dtype=dtype)
    return x, torch.randint(classes, (rows,), generator=generator)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def _value_and_grads(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30), columns=st.integers(0, 30), channels=st.integers(1, 9),
    classes=st.integers(1, 6), temperature=st.sampled_from([1.0, 0.5, 0.1, 0.07, 0.02]), 
    seed=st.integers(0, 999),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_printed_formula(
    naive, backend, rows, columns, channels, classes, temperature, seed
) -> None:
    """Zero columns stand for the within-scale term."""
    x, lx = _set(rows, channels, classes, seed)
    inputs, labels = [x], [lx]
    if columns:
        y, ly = _set(columns, channels, classes, seed + 1)
        inputs, labels = [x, y], [lx, ly]

    def ours(*tensors: Tensor) -> Tensor:
        mixed = [part for pair in zip(tensors, labels, strict=True) for part in pair]
        return contrastive_loss(*mixed, temperature=temperature, backend=backend)

    def theirs(*tensors: Tensor) -> Tensor:
        mixed = [part for t, label in zip(tensors, labels, strict=True) for part in (_unit(t), label)]
        return naive(*mixed, temperature=temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mscs.losses.tiled._ROWS", 4)
        patch.setattr("mscs.losses.tiled._COLUMNS", 6)
        found = _value_and_grads(ours, *inputs)
    for a, b in zip(found, _value_and_grads(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, normalize: bool) -> None:
    x, lx = _set(13, 3, 3)
    y, ly = _set(9, 3, 4, seed=1)
    x.requires_grad_()
    y.requires_grad_()
    options = {"backend": backend, "normalize": normalize, "temperature": 0.3}
    assert torch.autograd.gradcheck(lambda a: contrastive_loss(a, lx, **options), x)
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, lx, b, ly, **options), (x, y))
    assert torch.autograd.gradcheck(lambda b: contrastive_loss(x.detach(), lx, b, ly, **options), y)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_of_the_similarity_gradient_sums_to_zero(backend: str, temperature: float) -> None:
    """Contrasting with the unit vectors makes dL/dx the gradient of the similarities, up to 1/temperature."""
    x, lx = _set(40, 12, 4)
    lx = lx.sort().values
    ly = torch.arange(12) // 3  # every class is there, so every anchor has positives and negatives
    _, grad = _value_and_grads(
        lambda a: sorted_loss(
            (a, lx), (torch.eye(12, dtype=a.dtype), ly),
            temperature=temperature, unit=True, backend=backend, precision="auto",
        ),
        _unit(x),
    )  # fmt: skip
    assert (grad.abs().sum(dim=1) > 1e-6).all()
    assert (grad.sum(dim=1).abs() < 1e-13 * grad.abs().sum(dim=1).max()).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", BACKENDS)
def test_symmetries(backend: str) -> None:
    x, labels = _set(31, 5, 4)
    value, grad = _value_and_grads(lambda a: contrastive_loss(a, labels, backend=backend), x)
    assert ((x * grad).sum(dim=1).abs() < 1e-14).all(), "length does not matter, so x . dL/dx = 0"
    order = torch.randperm(31, generator=torch.Generator().manual_seed(3))
    shuffled, shuffled_grad = _value_and_grads(
        lambda a: contrastive_loss(a, labels[order], backend=backend), x[order]
    )
    torch.testing.assert_close(shuffled, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(shuffled_grad, grad[order], rtol=1e-10, atol=1e-14)
    renamed = torch.tensor([70, -3, 12, 5])[labels]
    torch.testing.assert_close(contrastive_loss(x, renamed, backend=backend), value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.03])
def test_float32_is_as_good_as_the_printed_formula_in_float32(
    naive: Naive, temperature: float, cross: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    for spread in (5.0, 0.6):  # early and late in training
        lx, ly = torch.arange(480) % 6, torch.arange(120) % 6
        x, y = (
            (centres[label] + spread * torch.randn(len(label), 32, generator=generator, dtype=torch.float64))
            .float()
            .double()
            for label in (lx, ly)
        )
        inputs = [x, y] if cross else [x]

        def run(function, *tensors, lx=lx, ly=ly):
            pairs = [part for t, label in zip(tensors, (lx, ly), strict=False) for part in (t, label)]
            return function(*pairs, temperature=temperature)

        def plain(*args, **kwargs):
            return naive(*(_unit(a) if a.is_floating_point() else a for a in args), **kwargs)

        truth = _value_and_grads(lambda *t: run(plain, *t), *inputs)
        rough = _value_and_grads(lambda *t: run(plain, *t), *[t.float() for t in inputs])
        ours = _value_and_grads(lambda *t: run(contrastive_loss, *t), *[t.float() for t in inputs])
        for exact, printed, found in zip(truth, rough, ours, strict=True):
            error, allowed = ((value - exact).abs().max() for value in (found, printed))
            assert error <= allowed + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.025, 0.0245, 0.0112, 0.01, 0.005])
def test_every_temperature_is_finite_and_right_in_float32(
    temperature: float, backend: str, cross: bool
) -> None:
    x, lx = _set(60, 16, 4)
    y, ly = _set(33, 16, 4, seed=5)
    extra = [y, ly] if cross else []
    exact = _value_and_grads(
        lambda a: contrastive_loss(a, lx, *extra, temperature=temperature, backend="reference"), x
    )
    rest = [y.float(), ly] if cross else []
    found = _value_and_grads(
        lambda a: contrastive_loss(a, lx, *rest, temperature=temperature, backend=backend), x.float()
    )
    torch.testing.assert_close(found[0].double(), exact[0], rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-5 * float(exact[1].abs().max()))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_unnormalised_inputs(backend: str, scale: float) -> None:
    x, labels = _set(50, 8, 4)
    x = _unit(x) * scale
    exact = _value_and_grads(lambda a: contrastive_loss(a, labels, normalize=False, backend="reference"), x)
    found = _value_and_grads(
        lambda a: contrastive_loss(a, labels, normalize=False, backend=backend), x.float()
    )
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=0, atol=1e-3 * float(exact[1].abs().max()))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
class TestEdges:
    def test_anchor_without_positive_contributes_zero_but_is_counted(self, naive, backend, normalize) -> None:
        x = _unit(_set(7, 4, 1)[0]).float()
        labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
        found = contrastive_loss(x, labels, backend=backend, normalize=normalize)
        torch.testing.assert_close(found, naive(x, labels))
        kept = contrastive_loss(x[:6], labels[:6], x, labels, backend=backend, normalize=normalize)
        assert kept.isfinite()
        y = x[:6]
        cross = contrastive_loss(x, labels, y, labels[:6], backend=backend, normalize=normalize)
        present = contrastive_loss(x[:6], labels[:6], y, labels[:6], backend=backend, normalize=normalize)
        torch.testing.assert_close(cross, present * 6 / 7)

    def test_without_negatives_it_is_exactly_zero(self, backend, normalize) -> None:
        x = _set(9, 4, 1, dtype=torch.float32)[0]
        labels = torch.full((9,), 3)
        for function in (
            lambda a: contrastive_loss(a, labels, backend=backend, normalize=normalize),
            lambda a: contrastive_loss(a, labels, x, labels, backend=backend, normalize=normalize),
        ):
            value, grad = _value_and_grads(function, x)
            assert value == 0
            assert (grad == 0).all()

    def test_no_class_in_common(self, backend, normalize) -> None:
        x = _set(6, 4, 1, dtype=torch.float32)[0]
        value, dx, dy = _value_and_grads(
            lambda a, b: contrastive_loss(
                a, torch.zeros(6).long(), b, torch.ones(6).long(), backend=backend, normalize=normalize
            ),
            x,
            x,
        )
        assert value == 0
        assert (dx == 0).all()
        assert (dy == 0).all()

    @pytest.mark.parametrize(("rows", "columns"), [(0, None), (0, 5), (5, 0), (0, 0), (1, None), (1, 1)])
    def test_empty_and_single_sets_give_an_attached_zero(self, backend, normalize, rows, columns) -> None:
        sizes = [rows] if columns is None else [rows, columns]
        leaves = [torch.ones(size, 4, requires_grad=True) for size in sizes]
        sets = [part for leaf in leaves for part in (leaf, torch.zeros(len(leaf)).long())]
        loss = contrastive_loss(*sets, backend=backend, normalize=normalize)
        loss.backward()
        assert loss == 0
        assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in leaves)

    def test_all_rows_equal(self, backend, normalize) -> None:
        labels = torch.arange(12) % 3
        x = torch.ones(12, 5, dtype=torch.float64) / math.sqrt(5)
        value, grad = _value_and_grads(
            lambda a: contrastive_loss(a, labels, backend=backend, normalize=normalize), x
        )
        assert value.item() == pytest.approx(math.log(1 + 8), rel=1e-12)
        assert grad.isfinite().all()


def test_zero_rows_get_no_gradient() -> None:
    x, labels = _set(12, 4, 3)
    x[4] = 0
    for backend in BACKENDS:
        value, grad = _value_and_grads(
            lambda a, backend=backend: contrastive_loss(a, labels, backend=backend), x
        )
        assert value.isfinite()
        assert grad.isfinite().all()
        assert (grad[4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_inputs_and_autocast_are_evaluated_in_float32(backend: str, dtype: torch.dtype) -> None:
    x, labels = _set(40, 8, 4)
    x = x.to(dtype)
    exact, exact_grad = _value_and_grads(lambda a: contrastive_loss(a, labels, backend=backend), x.float())
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(leaf, labels, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backend == "tiled"):
        loss.backward()  # autograd's own backward of the dense formula cannot be shielded, ours is
    assert loss.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, exact_grad.to(dtype))


def test_mixed_dtypes_follow_the_anchors() -> None:
    x, lx = _set(20, 4, 3)
    loss = contrastive_loss(x.float(), lx, x.half(), lx)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), contrastive_loss(x, lx, x, lx), rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_rows(backend: str) -> None:
    x, labels = _set(20, 6, 3)
    wide = torch.stack((x, -x), dim=-1).transpose(0, 1)
    expected = contrastive_loss(x, labels, backend=backend)
    for view in (wide[..., 0].T, x.T.contiguous().T):
        assert not view.is_contiguous()
        torch.testing.assert_close(contrastive_loss(view, labels, backend=backend), expected)


def test_second_derivatives_are_refused() -> None:
    x, labels = _set(20, 6, 3)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match='second derivatives need backend "reference"'):
        torch.autograd.grad(contrastive_loss(x, labels, backend="tiled"), x, create_graph=True)


def test_bitwise_repeatable() -> None:
    x, labels = _set(700, 16, 5, dtype=torch.float32)
    runs = [_value_and_grads(lambda a: contrastive_loss(a, labels, backend="tiled"), x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class _Largest(TorchDispatchMode):
    """Records the largest tensor that any operation produces."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def _saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage counted once."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("cross", [False, True])
def test_memory_grows_with_rows_not_pairs(cross: bool, normalize: bool) -> None:
    rows, channels = 2048, 32
    x, lx = _set(rows, channels, 7, dtype=torch.float32)
    x.requires_grad_()
    extra = [x.detach() * 2, lx] if cross else []

    def run(backend: str) -> Tensor:
        return contrastive_loss(x, lx, *extra, backend=backend, normalize=normalize)

    sets = 2 if cross else 1
    assert _saved_bytes(lambda: run("reference")) > 4 * rows * rows
    assert _saved_bytes(lambda: run("tiled")) <= sets * 4 * (4 * rows * channels) + 64 * rows
    with _Largest() as largest:
        run("tiled").backward()
    assert largest.elements <= 512 * 1024 < rows * rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": torch.zeros(4, 2, 2)}, "anchors must be float"),
        ({"anchors": torch.zeros(4, 3).long()}, "anchors must be float"),
        ({"anchor_labels": torch.zeros(3).long()}, "labels of the anchors"),
        ({"anchor_labels": torch.zeros(4)}, "labels of the anchors"),
        ({"contrast": torch.zeros(4, 3)}, "given together"),
        ({"contrast_labels": torch.zeros(4).long()}, "given together"),
        ({"contrast": torch.zeros(4, 5), "contrast_labels": torch.zeros(4).long()}, "must agree"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"backend": "fast"}, "accepted: auto, reference, tiled, triton"),
        ({"precision": "tf32"}, "accepted: auto, fp32, fp16"),
        ({"backend": "triton", "anchors": torch.zeros(4, 3).double()}, '"triton" runs CUDA tensors'),
        ({"backend": "triton", "temperature": 0.02}, "temperature of at least 0.025"),
    ],
)
def test_misuse_is_named(change: dict, message: str) -> None:
    arguments = {"anchors": torch.zeros(4, 3), "anchor_labels": torch.zeros(4).long()} | change
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments)
