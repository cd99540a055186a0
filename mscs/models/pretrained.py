"""Pretrained weights: which file belongs to a backbone, where it lies, and that it is the right one."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import torch
from tqdm import tqdm

from mscs.errors import MscsError

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
CHECKSUMS = "mscs-checksums.json"


def weights_folder() -> Path:
    """Return the folder of weight files: $MSCS_WEIGHTS, or torch's hub folder."""
    return Path(os.environ.get("MSCS_WEIGHTS") or Path(torch.hub.get_dir()) / "checkpoints")


def fetch_weights(name: str, url: str) -> Path:
    """Return the checked weight file of backbone `name`, downloaded from `url` unless it is there already.

    The SHA-256 of a file is recorded when it is first used and compared ever after; where the file's name
    carries the beginning of its checksum (`resnet50-0676ba61.pth`) that is compared too.

    Raises:
        MscsError: no network and no file, a cut-off download, or a file that has changed.
    """
    folder = weights_folder()
    path = folder / _file_name(name, url)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _download(url, path)
        except (OSError, MscsError) as error:
            raise MscsError(
                f"cannot download the weights of {name} from {url}: {error}. Without network, place the file "
                f"by hand as {path} (SHA-256: {_expected(path)}), or set MSCS_WEIGHTS to a folder that has it"
            ) from error
    _check(path)
    return path


def _file_name(name: str, url: str) -> str:
    file = Path(urlparse(url).path)
    # model hubs give every file the same name
    return f"{name}{file.suffix}" if file.stem in ("model", "pytorch_model") else file.name


def _download(url: str, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as part:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                length = response.headers.get("Content-Length")
                total = int(length) if length is not None else None
                # disable=None: no progress bar where the output is no terminal
                with tqdm.wrapattr(response, "read", total=total, desc=path.name, disable=None) as stream:
                    shutil.copyfileobj(stream, part, 1 << 20)
            part.close()
            size = Path(part.name).stat().st_size
            if total is not None and size != total:
                raise MscsError(f"the connection broke after {size} of {total} bytes")
            os.replace(part.name, path)
        finally:
            Path(part.name).unlink(missing_ok=True)


def _recorded(folder: Path) -> dict[str, str]:
    file = folder / CHECKSUMS
    return json.loads(file.read_text()) if file.is_file() else {}


def _prefix(path: Path) -> str | None:
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    return match[1] if match else None


def _expected(path: Path) -> str:
    recorded, prefix = _recorded(path.parent).get(path.name), _prefix(path)
    if recorded:
        return recorded
    return f"begins with {prefix}" if prefix else "not known yet, it is recorded on first use"


def _check(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    recorded = _recorded(path.parent)
    expected = recorded.get(path.name) or _prefix(path) or ""
    if not found.startswith(expected):
        raise MscsError(
            f"{path} has SHA-256 {found}, expected {_expected(path)}. Delete it to download it again; if it "
            f"was replaced on purpose, delete its line in {path.parent / CHECKSUMS}"
        )
    if path.name not in recorded:
        temporary = path.parent / f".{CHECKSUMS}.{os.getpid()}"
        temporary.write_text(json.dumps({**recorded, path.name: found}, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, path.parent / CHECKSUMS)
