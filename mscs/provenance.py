"""What a result was made with: code, data, packages, machine. Written beside results, never depended on."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "scikit-learn", "dvc")


def git_state() -> dict[str, Any]:
    """Return the commit of this package's checkout, and whether code or params.yaml differ from it.

    MSCS_GIT_COMMIT stands in inside an image; None where the package is installed outside a checkout.
    """
    announced = os.environ.get("MSCS_GIT_COMMIT")
    if announced:
        return {"commit": announced.removesuffix("-dirty"), "dirty": announced.endswith("-dirty")}
    try:
        git = ["git", "-C", str(Path(__file__).parents[1])]
        _output([*git, "ls-files", "--error-unmatch", "mscs/provenance.py"])
        commit = _output([*git, "rev-parse", "HEAD"])
        decisive = ("mscs", "reproduce/*.py", "params.yaml", "numerics.yaml")
        changed = _output([*git, "status", "--porcelain", "--", *decisive])
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return installed versions, None where missing; by default of the packages that decide results."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def environment_digest() -> str:
    """Return a fingerprint of every installed package and its version."""
    lines = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Return operating system, processor and, where PyTorch is loaded, the GPUs it sees."""
    lines = _lines(Path("/proc/cpuinfo"))
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, Any] = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "cpu": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = torch.version.cuda
        facts["driver"] = next(iter(_lines(Path("/proc/driver/nvidia/version"))), None)
    return facts


def nvidia() -> tuple[list[tuple[str, float]], str, int]:
    """Return (name, GB) of every GPU, the driver's version and the CUDA version it serves."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
    except Exception:  # no package, library, driver or device: each raises its own, all mean no GPU
        return [], "", 0
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    gpus = [(pynvml.nvmlDeviceGetName(h), pynvml.nvmlDeviceGetMemoryInfo(h).total / 2**30) for h in handles]
    return gpus, pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion()


def record(**facts: Any) -> dict[str, Any]:
    """Return a provenance record: the caller's facts, and where and with what they came about."""
    return {
        **facts,
        "git": git_state(),
        "packages": {name: found for name, found in package_versions().items() if found},
        "environment": environment_digest(),
        "machine": machine(),
        "image": os.environ.get("MSCS_IMAGE"),
        "finished": utc(time.time()),
    }


def utc(seconds: float) -> str:
    """Return a time, given in seconds since 1970, as text in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
