"""Batch norm over the images of all processes, on GPUs and on CPUs.

torch's SyncBatchNorm needs GPUs. Here CPU processes compute the same with a differentiable all-reduce, so
that a run of several processes can be compared with a run of one.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce

Module = TypeVar("Module", bound=nn.Module)


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, extended to CPU tensors and to timm's norms that carry an activation.

    Shape: (B, C, ...) -> the same; in training statistics run over all but C and over all processes, whose
    batches may differ in size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised (and activated, where this was a norm with an activation)."""
        shared = distributed.is_initialized() and distributed.get_world_size() > 1
        if self.training and shared and x.device.type == "cpu":
            normalised = self._normalise_on_cpu(x)
        else:
            normalised = super().forward(x)
        for name in ("drop", "act"):  # of timm's BatchNormAct2d
            if hasattr(self, name):
                normalised = getattr(self, name)(normalised)
        return normalised

    def _normalise_on_cpu(self, x: Tensor) -> Tensor:
        # all_reduce sums the gradient over processes too, since every process uses the sum
        values = x.to(self.weight.dtype)
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = values.new_tensor([x.numel() // x.shape[1]])
        sums = all_reduce(torch.cat([values.sum(dims), count]))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / total
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                momentum = self.momentum or 0.0
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * total / (total - 1), momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        scale = (self.weight * (variance + self.eps).rsqrt()).view(shape)
        return (centred * scale + self.bias.view(shape)).to(x.dtype)


def convert_sync_batchnorm(model: Module) -> Module:
    """Make every 2-d batch norm of `model` synchronised, in place; parameters and their names stay."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.__class__ = SyncBatchNorm
        norm.process_group = None
    return model


def freeze_batch_norm(network: nn.Module) -> None:
    """Let every batch norm use its running statistics, and leave them as they are; affine parts train on."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
