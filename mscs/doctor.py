"""`mscs doctor`: is this machine ready for the runs of a profile? Each finding names its remedy."""

import argparse
import configparser
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mscs.command_line import add_command
from mscs.datasets import DATASETS
from mscs.datasets.spec import default_root
from mscs.errors import UsageError, unknown_name

LOCK = Path("requirements.lock")
PYTHON = (3, 11)
COMPOSE = (2, 20)
CUDA = 13000  # what the pinned PyTorch is built for, as the driver counts: 1000 * major + 10 * minor
NEEDS = {"mini": {"disk": 3, "memory": 4, "gpu": 0}, "paper": {"disk": 250, "memory": 64, "gpu": 24}}
"""GB of free disk, memory and memory of one GPU. Paper: the four datasets unpacked with their archives (about
100 GB), weights and two checkpoints of 80 runs. Both are planning figures."""
STATES = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the report; state is ok, warning or problem, and the last two say what to do."""

    name: str
    state: str
    found: str
    remedy: str = ""


def add_doctor_command(commands: Any) -> None:
    """Add the command `doctor` to the subparsers of the program."""
    text = "check this machine before a long run"
    add_command(commands, "doctor", _doctor, text, profile=True, as_json=True)


def _doctor(args: argparse.Namespace) -> int:
    from mscs.params import load_params

    profile = args.profile or load_params().profile
    if profile not in NEEDS:
        raise UsageError(unknown_name("profile", profile, NEEDS))
    findings = list(examine(profile))
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:8} {finding.name:20} {finding.found}")
            if finding.remedy:
                print(f"{'':29} -> {finding.remedy}")
    return int(any(finding.state == "problem" for finding in findings))


def examine(profile: str) -> Iterator[Finding]:
    """Yield every finding about this machine."""
    checks: tuple[Callable[[str], Iterator[Finding]], ...] = (
        check_python,
        check_packages,
        check_gpus,
        check_docker,
        check_compose,
        check_room,
        check_data,
        check_credentials,
        check_links,
    )
    for check in checks:
        yield from check(profile)


def check_python(_profile: str) -> Iterator[Finding]:
    """Python's version."""
    good = sys.version_info >= PYTHON
    remedy = (
        "" if good else f"install Python {PYTHON[0]}.{PYTHON[1]} or later, then `make setup PYTHON=python3.x`"
    )
    yield Finding("python", STATES[0 if good else 2], sys.version.split()[0], remedy)


def check_packages(_profile: str) -> Iterator[Finding]:
    """Installed packages against the lock."""
    if not LOCK.exists():
        yield Finding("packages", "problem", f"no {LOCK}", "run this in the project's folder")
        return
    wanted = pinned(LOCK.read_text())
    installed = {name: _version(name) for name in wanted}
    other = {name: found for name, found in installed.items() if found != wanted[name]}
    if not other:
        yield Finding("packages", "ok", f"{len(wanted)}, all as in {LOCK}")
        return
    shown = ", ".join(
        f"{name} {found or 'missing'} (lock: {wanted[name]})" for name, found in list(other.items())[:5]
    )
    more = f" and {len(other) - 5} more" if len(other) > 5 else ""
    state = "warning" if _version("torch") else "problem"
    yield Finding(
        "packages", state, shown + more, "`make setup` installs the pinned ones; others may change numbers"
    )


def pinned(lock: str) -> dict[str, str]:
    """Return name -> version of what a lock asks for on this machine."""
    from packaging.requirements import Requirement

    lines = (line.rstrip(" \\") for line in lock.splitlines() if line[:1].isalnum())
    found = [Requirement(line) for line in lines]
    return {
        r.name: str(r.specifier).removeprefix("==") for r in found if r.marker is None or r.marker.evaluate()
    }


def check_gpus(profile: str) -> Iterator[Finding]:
    """GPUs with their driver, the CUDA it can serve, and NCCL where there are several."""
    need = NEEDS[profile]["gpu"]
    gpus, driver, cuda = nvidia()
    if not gpus:
        missing = "an NVIDIA GPU and its driver are needed to train at this size"
        yield Finding("gpu", "problem" if need else "ok", "none", missing if need else "")
        return
    for name, memory in gpus:
        small = memory < need
        remedy = "the largest crops will not fit: see out of memory in docs/operations.md" if small else ""
        yield Finding("gpu", "warning" if small else "ok", f"{name}, {memory:.0f} GB", remedy)
    old = cuda < CUDA
    yield Finding(
        "driver",
        "problem" if old else "ok",
        f"{driver}, up to CUDA {cuda // 1000}.{cuda % 1000 // 10}",
        f"PyTorch here needs CUDA {CUDA // 1000}: update the driver (580 or later)" if old else "",
    )
    if len(gpus) > 1:
        nccl = _version("nvidia-nccl-cu13")
        remedy = "" if nccl else "`make setup` installs it; without it several GPUs cannot work together"
        yield Finding("nccl", "ok" if nccl else "problem", nccl or "missing", remedy)


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


def check_docker(profile: str) -> Iterator[Finding]:
    """The engine, whether it can hand over GPUs, and the image."""
    if os.environ.get("MSCS_IN_CONTAINER"):
        yield Finding("docker", "ok", f"inside an image: {os.environ.get('MSCS_IMAGE', 'unnamed')}")
        return
    needed = profile == "paper" and os.environ.get("MSCS_RUNTIME") != "native"
    lacking = "problem" if needed else "warning"
    instead = "or set MSCS_RUNTIME=native" if needed else "mini does without"
    try:
        import docker

        client = docker.from_env(timeout=5)
        info = client.info()
    except Exception as error:  # no package, socket, right or answer: each raises its own
        first = str(error).splitlines()[0][:90]
        yield Finding("docker", lacking, f"no engine: {first}", f"start Docker and join its group, {instead}")
        return
    yield Finding("docker", "ok", f"engine {info['ServerVersion']}")
    if has_gpu_runtime(info):
        yield Finding("docker gpu", "ok", "NVIDIA runtime")
    else:
        remedy = (
            "install nvidia-container-toolkit, `sudo nvidia-ctk runtime configure --runtime=docker`, restart"
        )
        yield Finding("docker gpu", lacking, "no NVIDIA runtime", f"{remedy} Docker, {instead}")
    name = os.environ.get("MSCS_TRAIN_IMAGE") or "mscs:train"
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        yield Finding("image", lacking, f"no {name}", f"`make image` builds it, {instead}")
        return
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12] if LOCK.exists() else ""
    fits = image.labels.get("mscs.lock") == lock
    remedy = "" if fits else f"it was not built from this {LOCK}: `make image` builds it anew"
    yield Finding("image", "ok" if fits else "warning", f"{name} {image.short_id}", remedy)


def has_gpu_runtime(info: dict[str, Any]) -> bool:
    """Return whether an engine with this `docker info` can give NVIDIA GPUs to containers."""
    discovered = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or ()]
    return "nvidia" in info.get("Runtimes", {}) or any("nvidia.com/gpu" in name for name in discovered)


def check_compose(_profile: str) -> Iterator[Finding]:
    """The version of Docker Compose, v2 or the older separate program."""
    if os.environ.get("MSCS_IN_CONTAINER"):
        return
    for command in (["docker", "compose"], ["docker-compose"]):
        text = _output([*command, "version", "--short"])
        if text:
            numbers = tuple(int(part) for part in text.lstrip("v").split(".")[:2] if part.isdigit())
            good = numbers >= COMPOSE
            remedy = "" if good else f"{COMPOSE[0]}.{COMPOSE[1]} or later is recommended (1.29 works)"
            yield Finding("compose", "ok" if good else "warning", text, remedy)
            return
    yield Finding("compose", "warning", "none", "install docker compose to use `docker compose run`")


def check_room(profile: str) -> Iterator[Finding]:
    """Free disk, memory and shared memory."""
    need = NEEDS[profile]
    disk = shutil.disk_usage(".").free / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    for name, found, wanted, remedy in (
        ("disk", disk, need["disk"], "free some, or put data/ and work/ on a larger disk by a link"),
        ("memory", memory, need["memory"], "fewer data workers (`--workers`) need less"),
    ):
        short = found < wanted
        text = f"{found:.0f} GB, {wanted} GB needed for everything"
        yield Finding(name, "warning" if short else "ok", text, remedy if short else "")
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < 1e9:
        text = f"{shutil.disk_usage(shared).total / 1e6:.0f} MB"
        yield Finding(
            "shared memory", "problem", text, "start the container with --shm-size 8g, or use --workers 0"
        )


def check_data(profile: str) -> Iterator[Finding]:
    """The folders of the real datasets; mini draws its own."""
    if profile == "mini":
        yield Finding("data", "ok", "generated when needed")
        return
    for name in DATASETS:
        root = default_root(name)
        there = root.is_dir()
        remedy = (
            "" if there else f"`mscs data fetch {name}`, or set MSCS_DATA to the folder that holds {name}/"
        )
        yield Finding(f"data {name}", "ok" if there else "problem", str(root), remedy)


def check_credentials(profile: str) -> Iterator[Finding]:
    """Whether the Cityscapes login is given; its value is never looked at further."""
    given = all(os.environ.get(f"CITYSCAPES_{part}") for part in ("USERNAME", "PASSWORD"))
    needed = profile == "paper" and not default_root("cityscapes").is_dir()
    remedy = "set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, or be asked by `mscs data fetch cityscapes`"
    lacking = needed and not given
    yield Finding(
        "cityscapes login", STATES[lacking], "set" if given else "not set", remedy if lacking else ""
    )


def check_links(_profile: str) -> Iterator[Finding]:
    """How DVC links files out of its cache: symbolic links may point to nothing inside a container."""
    config = configparser.ConfigParser(strict=False)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    config.read([home / "dvc" / "config", ".dvc/config", ".dvc/config.local"])
    kinds = config.get("cache", "type", fallback="reflink,copy").strip('"').replace(" ", "")
    linked = "symlink" in kinds
    remedy = "`dvc config --local cache.type reflink,hardlink,copy`, then `dvc checkout --relink`"
    yield Finding("dvc cache", STATES[2 * linked], kinds, remedy if linked else "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
