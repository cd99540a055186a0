"""Every random choice comes from a generator that is a function of (seed, purpose, indices) alone.

Nothing here depends on process rank, worker or GPU count, so the same numbers come out however a
run is distributed.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *indices: int | str) -> int:
    """Return a 63-bit seed that depends on all arguments and on nothing else."""
    text = "\x1f".join(str(part) for part in (seed, purpose, *indices))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def numpy_generator(seed: int, purpose: str, *indices: int | str) -> np.random.Generator:
    """Return a NumPy generator for (seed, purpose, indices)."""
    return np.random.default_rng(derive_seed(seed, purpose, *indices))


def torch_generator(
    seed: int, purpose: str, *indices: int | str, device: "torch.device | str" = "cpu"
) -> "torch.Generator":
    """Return a PyTorch generator on `device` for (seed, purpose, indices)."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *indices))
