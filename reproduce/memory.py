"""Peak GPU memory of Table 2(a)'s rows: the dense formula beside this package's, under the paper's 24 GB.

One process trains two steps on the paper's images per GPU (two crops of 512x1024) with drawn pixels and
labels; no dataset is needed. Every pixel has a label, so "all" sampling is at its largest. Numbers are peaks
of memory in use (PyTorch's allocator, GiB), without the CUDA context that nvidia-smi adds.
"""

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mscs.errors import MscsError
from mscs.params import Params
from mscs.settings import Settings
from reproduce.cells import cells

if TYPE_CHECKING:
    import torch

CAP_GB = 24.0
BACKENDS = {"dense_gb": "reference", "ours_gb": "auto"}
LABEL_BLOCK = 32  # side of equally labelled squares, so that every scale shows several classes
STEPS = 2  # the optimiser's state exists from the second on
GIB = 2**30

Measure = Callable[[Settings, str], float | None]


def memory_runs() -> list[str]:
    """Return the runs whose memory Table 2(a) prints, and the stride-8 reading of its first row."""
    return [cell.run for cell in cells("2a") if cell.read == "memory" and cell.run is not None]


def measure_runs(params: Params, measure: Measure) -> dict[str, dict[str, float | str]]:
    """Return {run: {dense_gb, ours_gb}}; "OOM" where `measure` gave None."""
    paper = {run: params.resolve(run, "paper", {"pretrained": False}).settings for run in memory_runs()}
    return {run: measure_run(settings, measure) for run, settings in paper.items()}


def measure_run(settings: Settings, measure: Measure) -> dict[str, float | str]:
    """Return {dense_gb, ours_gb} of one run; "OOM" where `measure` gave None."""
    peaks = {key: measure(settings, backend) for key, backend in BACKENDS.items()}
    return {key: "OOM" if peak is None else round(peak, 2) for key, peak in peaks.items()}


def measure_on_gpu(params: Params) -> dict[str, Any]:
    """Return memory.json's content for the current CUDA device; MscsError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise MscsError("measuring GPU memory needs a CUDA device, and PyTorch sees none (see `mscs doctor`)")
    cap = limit_memory(CAP_GB)
    runs = measure_runs(params, gpu_peak)
    return {"device": torch.cuda.get_device_name(0), "cap_gb": cap, "runs": runs}


def limit_memory(cap_gb: float | None) -> float:
    """Let PyTorch use so many GiB of the current GPU (None: all); return how many that are."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory / GIB
    cap = total if cap_gb is None else min(cap_gb, total)
    torch.cuda.set_per_process_memory_fraction(cap / total)
    return round(cap, 1)


def gpu_peak(settings: Settings, backend: str) -> float | None:
    """Return the peak in GiB of training one group of images, None if the memory ran out."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        train_steps(settings, backend, torch.device("cuda"))
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() / GIB


def train_steps(settings: Settings, backend: str, device: "torch.device") -> float:
    """Train `STEPS` steps on one group of drawn images; return the last loss."""
    import torch
    import torch.nn.functional as F

    from mscs import build
    from mscs.losses import MultiScaleContrastiveLoss
    from mscs.seeding import torch_generator

    build.apply_machine_settings(settings)
    labels = settings.data.labels
    model = build.network(settings, labels.num_classes, seed=0).to(device).train()
    objective = build.objective(settings, labels.class_weights).to(device)
    for module in objective.modules():
        if isinstance(module, MultiScaleContrastiveLoss):
            module.backend = backend
    optimizer = build.optimizer(settings, model, fused=device.type == "cuda")
    generator = torch_generator(0, "memory")
    height, width = settings.schedule.crop_size
    shape = (settings.schedule.images_per_group, height // LABEL_BLOCK, width // LABEL_BLOCK)
    blocks = torch.randint(0, labels.num_classes, shape, generator=generator)
    truth = F.interpolate(blocks[:, None].float(), (height, width))[:, 0].long().to(device)
    images = torch.randn(len(blocks), 3, height, width, generator=generator).to(device)
    for step in range(STEPS):
        total, _, _ = objective(model(images), truth, [torch_generator(0, "anchors", step)])
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
    return float(total.detach())
