"""Checkpoints of a training that goes on, and the final weights.

A checkpoint is `step-XXXXXXXX.pt` beside `step-XXXXXXXX.json` (step, SHA-256, settings): readable without
loading it, while what counts is inside the checksum. The last two are kept; a damaged newest one falls back
to the one before, with a warning.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mscs.errors import MscsError, UsageError
from mscs.locks import locked
from mscs.models.weights import read_state_dict
from mscs.results import atomic_path, file_sha256, read_json, write_json

KEPT = 2
HEADER = "mscs"


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the outputs that `path` stands for; a second training that writes the same ones is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except BlockingIOError:
            message = f"another process is training into {path.parent}; wait for it or stop it"
            raise UsageError(message) from None
        yield


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the state after `step` steps, then drop all but the newest `KEPT` checkpoints.

    Later ones are dropped too: that training went on from here says that they are damaged.
    """
    path = folder / f"step-{step:08d}.pt"
    with atomic_path(path) as temporary:
        with _full_disk(path):
            torch.save({**state, "step": step, "settings": dict(settings)}, temporary)
        digest = file_sha256(temporary)
    write_json(path.with_suffix(".json"), {"step": step, "sha256": digest, "settings": dict(settings)})
    prune(folder, KEPT, path)


def prune(folder: Path, keep: int, newest: Path | None = None) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, and the unfinished files of killed saves."""
    found = sorted(folder.glob("step-*.pt"), reverse=True)
    kept = [path for path in found if newest is None or path <= newest][:keep]
    for path in found:
        if path not in kept:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    for unfinished in folder.glob(".step-*"):
        unfinished.unlink()


def load_checkpoint(
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device | str = "cpu",
    *,
    accept_changed: bool = False,
) -> tuple[int, dict[str, Any]] | None:
    """Return (step, state) of the newest sound checkpoint, or None where there is none.

    Raises UsageError where the checkpoint was written under other settings, listing the keys that differ, or
    by another version of the code, unless `accept_changed`.
    """
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            info = read_json(path.with_suffix(".json"))
            if file_sha256(path) != info["sha256"]:
                raise MscsError("its checksum does not match")
            state = torch.load(path, map_location=device, weights_only=True)
            step, before = state.pop("step"), state.pop("settings")
        except Exception as error:
            warnings.warn(f"checkpoint {path} is damaged ({error}); trying the one before", stacklevel=2)
            continue
        changed = [key for key, value in settings.items() if value != before.get(key)]
        only_code = changed == ["numerics"]
        if changed and not (only_code and accept_changed):
            remedy = ", --accept-changed to go on with the code as it is now" if only_code else ""
            raise UsageError(
                f"{path} was written under other settings ({differences(before, settings)}); use --fresh to "
                f"start again{remedy}"
            )
        return step, state
    return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how settings have changed since `before`: "key: old -> new, ..."."""
    pairs = [(key, before.get(key), value) for key, value in now.items()]
    return ", ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in pairs if old != new)


def save_weights(path: Path, weights: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write final weights as safetensors, with `info` in the file's header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_path(path) as temporary, _full_disk(path):
        # one entry: the library writes several in no fixed order, and equal weights would differ in bytes
        save_file(tensors, temporary, metadata={HEADER: json.dumps(dict(info), sort_keys=True)})


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, header) of a weights file; values that no training leaves are an MscsError.

    A file of `torch.save` (.pth, .pt, .bin: tensors by name, also inside a checkpoint) has an empty header.
    """
    header = {} if Path(path).suffix in (".pth", ".pt", ".bin") else read_header(path)
    tensors = read_state_dict(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MscsError(f"weights {path}: {name} holds values that are not finite; train the run again")
    return tensors, header


def read_header(path: str | Path) -> dict[str, Any]:
    """Return what `save_weights` was told to put into the header."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except FileNotFoundError:
        raise UsageError(f"weights {path} do not exist; train the run first") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise MscsError(f"weights {path} cannot be read: {error}") from None


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """Say what happened where a library reports a failed write as an error of its own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if "DataLoader worker" in str(error):
            raise  # PyTorch reports a lost worker wherever the main thread is
        reason = str(error).splitlines()[0]
        raise MscsError(
            f"cannot write {path} ({reason}); make room there. What was there before is untouched; "
            "the same command goes on from the last checkpoint"
        ) from error
