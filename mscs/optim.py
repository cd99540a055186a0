"""Optimisers and learning-rate schedules of the supplement's Tables 4 to 7."""

from collections.abc import Iterable

import torch
from torch import nn

NO_DECAY = ("absolute_pos_embed", "norm", "relative_position_bias_table")
"""AdamW does not decay backbone parameters with one of these in the name (Swin's recipe)."""


def learning_rate(
    step: int,
    *,
    lr: float,
    schedule: str,
    steps: int,
    warmup_steps: int = 1500,
    poly_power: float = 0.9,
    exp_decay: float = 0.98,
    steps_per_epoch: int = 1,
) -> float:
    """Return the learning rate of `step` (0 <= step < steps).

    poly: lr (1 - t / (T - 1))^power, zero at the last step. linear: 1,500 steps of linear warm-up from
    lr / warmup_steps, then lr (1 - t / (T - 1)) without restart. exp: lr decay^epoch. (authors' code)
    """
    left = 1 - step / max(1, steps - 1)
    if schedule == "poly":
        return lr * left**poly_power
    if schedule == "exp":
        return lr * exp_decay ** (step // steps_per_epoch)
    if schedule == "linear":
        if step < warmup_steps:
            return lr * (1 - (1 - (step + 1) / warmup_steps) * (1 - 1e-6))
        return lr * left
    raise ValueError(f"unknown schedule {schedule!r}; accepted: poly, linear, exp")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    name: str,
    *,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Return SGD (momentum, no Nesterov), AdamW (betas 0.9, 0.999, no-decay group) or Adam."""
    named = [(key, value) for key, value in named_parameters if value.requires_grad]
    parameters = [value for _, value in named]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, fused=fused)
    if name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=weight_decay, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(adamw_groups(named, weight_decay), lr, fused=fused)
    raise ValueError(f"unknown optimizer {name!r}; accepted: sgd, adam, adamw")


def adamw_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict[str, object]]:
    """Split parameters into decayed and not decayed, by name."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for key, value in parameters:
        spared = key.startswith("backbone.") and any(word in key for word in NO_DECAY)
        (free if spared else decayed).append(value)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Return the 2-norm over all gradients of a model, a scalar on its device."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
