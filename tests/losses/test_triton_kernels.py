"""The Triton backend: interpreted logic, code for a GPU, and, where there is one, its numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mscs.losses import MultiScaleContrastiveLoss, contrastive_loss
from mscs.losses.contrastive import triton_is_usable

if not triton_is_usable():
    pytest.skip("needs Triton, not older than contrastive.OLDEST_TRITON", allow_module_level=True)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_logic_in_the_interpreter() -> None:
    """In its own process, because Triton decides on import whether it compiles or interprets."""
    inner = Path(__file__).with_name("test_triton_interpreted.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(inner), "-p", "no:xdist", f"--rootdir={inner.parents[2]}"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=inner.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert re.search(r"\b14 passed", result.stdout), result.stdout[-500:]
    assert "skipped" not in result.stdout


def test_importing_the_losses_does_not_import_triton() -> None:
    code = "import sys, mscs.losses; sys.exit('mscs.losses.triton_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 3.1 interprets the kernels without an error, to wrong numbers."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("triton.__version__", "3.1.0")
    triton_is_usable.cache_clear()
    with pytest.raises(ValueError, match=r'needs Triton from 3\.2; use "auto"'):
        contrastive_loss(torch.randn(4, 8), torch.tensor([0, 0, 1, 1]), backend="triton")
    monkeypatch.undo()
    triton_is_usable.cache_clear()
    assert triton_is_usable()


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True], ids=["fp16", "fp32"])
@pytest.mark.parametrize(
    ("kernel", "flags"),
    [
        ("_negatives_kernel", {}),
        ("_positives_kernel", {"SELF": True}),
        ("_gradient_kernel", {"BY_ROW": True, "BY_COLUMN": True}),
        ("_gradient_kernel", {"BY_ROW": True, "BY_COLUMN": False}),
        ("_gradient_kernel", {"BY_ROW": False, "BY_COLUMN": True}),
    ],
)
def test_code_for_hopper_uses_its_tensor_cores_and_fits_on_chip(
    kernel: str, flags: dict, split: bool
) -> None:
    """Compiles without a GPU; the limit is an H100's or H200's shared memory per block."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mscs.losses import triton_kernels

    function = getattr(triton_kernels, kernel)
    limit = 232_448
    packed = torch.empty(1 + split, 1, 256, dtype=torch.float16)
    rows, columns, warps, stages = triton_kernels._tile(packed, limit)
    constants = {"SIZE": 256, "ROWS": rows, "COLUMNS": columns, "SPLIT": split, **flags}
    types = {
        "x": "*fp16",
        "y": "*fp16",
        "start": "*i32",
        "end": "*i32",
        "n": "i32",
        "m": "i32",
        "scale": "fp32",
    }
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if "*" in signature[name]}
    compiled = triton.compile(
        ASTSource(function, signature, {(names.index(k),): v for k, v in constants.items()}, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert compiled.metadata.shared <= limit
    assert "wgmma.mma_async" in compiled.asm["ptx"]


def _run(x: Tensor, labels: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    loss = contrastive_loss(leaf, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("channels", [64, 200, 256])
@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        ({"precision": "fp32"}, 1e-6, 1e-6),
        ({"precision": "fp16"}, 1e-5, 5e-4),
        ({"precision": "fp32", "temperature": 0.025}, 3e-6, 1e-5),
    ],
)
def test_numbers_on_cuda(options: dict, value: float, gradient: float, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3001, channels, generator=generator) / 8
    labels = torch.randint(19, (3001,), generator=generator)
    exact = _run(
        x.double(), labels, backend="tiled", **{k: v for k, v in options.items() if k != "precision"}
    )
    found = _run(x.cuda(), labels.cuda(), backend="triton", **options)
    again = _run(x.cuda(), labels.cuda(), backend="triton", **options)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])
    assert found[0].item() == pytest.approx(exact[0].item(), rel=value)
    assert (found[1].cpu() - exact[1]).norm() <= gradient * exact[1].norm()


@pytest.mark.gpu
@on_gpu
def test_memory_on_cuda() -> None:
    rows, channels = 16384, 256
    x = torch.randn(rows, channels, device="cuda", requires_grad=True)
    labels = torch.arange(rows, device="cuda") % 19
    contrastive_loss(x, labels).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contrastive_loss(x, labels).backward()
    assert torch.cuda.max_memory_allocated() - before <= 10 * 4 * rows * channels


@pytest.mark.gpu
@on_gpu
def test_whole_loss_on_cuda_equals_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 64, 32 >> s, 64 >> s, generator=generator) for s in range(4)]
    labels = (
        torch.randint(4, (2, 8, 16), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
    )
    loss = MultiScaleContrastiveLoss(images_per_group=1)
    expected = loss(features, labels, torch.Generator().manual_seed(0))
    found = loss([f.cuda() for f in features], labels.cuda(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.total.cpu(), expected.total, rtol=1e-5, atol=0)
