"""Weight files: read safely, freed of wrappers, loaded strictly."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mscs.errors import MscsError, UsageError

_OPTIONAL = ("num_batches_tracked", "relative_position_index", "attn_mask")
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file: safetensors, or a pickle read without running any code in it.

    Raises:
        UsageError: no such file.
        MscsError: the file is truncated, or is no weight file.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for broken files
        raise MscsError(
            f"cannot read weights from {path}: {str(error).splitlines()[0]}. It must be a complete "
            ".safetensors file, or a file written by torch.save that holds tensors only"
        ) from error
    return unwrap(content)


def unwrap(content: object) -> dict[str, Tensor]:
    """Return a checkpoint's tensors without wrappers (`state_dict`, `model`) and prefixes (`module.`)."""
    named = content if isinstance(content, Mapping) else {}
    while wrapped := [named[key] for key in _WRAPPERS if isinstance(named.get(key), Mapping)]:
        named = wrapped[0]
    tensors = {n: value for n, value in named.items() if isinstance(n, str) and isinstance(value, Tensor)}
    if not tensors:
        found = sorted(map(str, named))[:8] or type(content).__name__
        raise UsageError(f"the checkpoint holds no tensors by name; found {found}")
    for prefix in ("module.", "_orig_mod.", "model."):
        if any(name.startswith(prefix) for name in tensors):
            # what does not carry the prefix belongs to the training wrapper, such as a loss's class weights
            tensors = {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
    return tensors


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load `tensors`; only batch counters and position indices may be absent or left over."""
    own, given = (
        {name: value for name, value in named.items() if not name.endswith(_OPTIONAL)}
        for named in (model.state_dict(), tensors)
    )
    problems = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    text = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
    if text:
        raise UsageError(
            f"the checkpoint does not fit {type(model).__name__}: {text}. Build the model "
            "with the backbone, class count, options and projector that the checkpoint was trained with"
        )
    model.load_state_dict(tensors, strict=False)


def load_fitting(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors that fit by name and shape, and print which others of the model stay as drawn.

    So a network for other classes, or without projectors, can be trained on. UsageError where a tensor of the
    backbone is missing or of another shape.
    """
    own = model.state_dict()
    fitting = {name: x for name, x in tensors.items() if name in own and own[name].shape == x.shape}
    rest = [name for name in own if name not in fitting and not name.endswith(_OPTIONAL)]
    if missing := [name for name in rest if name.startswith("backbone.")]:
        raise UsageError(
            f"initial_weights {source} lacks {len(missing)} tensors of the backbone, or has them in another "
            f"shape: {listed(missing)}. Expected is a whole network of this project with the same backbone; "
            "weights of a backbone alone go to pretrained"
        )
    if rest:
        print(f"{source}: {len(rest)} tensors do not fit and are drawn anew: {listed(rest)}")
    model.load_state_dict(fitting, strict=False)


def listed(names: list[str], most: int = 10) -> str:
    """Return the first names in one line."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
