"""`mscs doctor`: is this machine ready for a profile, or for one run? Each finding names its remedy."""

import argparse
import configparser
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mscs import memory, numerics
from mscs.command_line import add_command
from mscs.datasets.spec import default_root
from mscs.errors import UsageError, unknown_name
from mscs.params import Params, load_params
from mscs.paths import data_root
from mscs.provenance import nvidia
from mscs.settings import Settings

LOCK = Path("requirements.lock")
PYTHON = (3, 11)
CUDA = 13000  # what the pinned PyTorch is built for, as the driver counts: 1000 * major + 10 * minor
NEEDS = {
    "mini": {"disk": 3, "memory": 4, "gpu": 0},
    "small": {"disk": 8, "memory": 8, "gpu": 0},
    "paper": {"disk": 250, "memory": 64, "gpu": 24},
}
"""GB of free disk, memory and memory of one GPU. Small: two trainings of 3 GB side by side, weights and two
checkpoints of 48. Paper: the four datasets unpacked with their archives (about 100 GB), weights and two
checkpoints of 80 runs. All are planning figures."""
STATES = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the report; state is ok, warning or problem, and the last two say what to do."""

    name: str
    state: str
    found: str
    remedy: str = ""


def _finding(name: str, good: bool, found: str, remedy: str, otherwise: str = "problem") -> Finding:
    return Finding(name, "ok", found) if good else Finding(name, otherwise, found, remedy)


def add_doctor_command(commands: Any) -> None:
    """Add the command `doctor` to the subparsers of the program."""
    text = "check this machine before a long run"
    command = add_command(commands, "doctor", _doctor, text, profile=True, as_json=True)
    command.add_argument("run", metavar="RUN", nargs="?", help="what this run needs: its data, its memory")
    text = "train two steps of RUN, as it is and with what needs less memory, until it fits"
    command.add_argument("--measure", action="store_true", help=text)


def _doctor(args: argparse.Namespace) -> int:
    if args.measure and not args.run:
        raise UsageError("--measure needs a RUN (see `mscs runs`)")
    profile = args.profile or load_params().profile
    if args.run:
        params = load_params()
        if args.measure:
            memory.measure(params, args.run, profile)
        findings = list(examine_run(params, args.run, profile))
    elif profile not in NEEDS:
        raise UsageError(unknown_name("profile", profile, NEEDS))
    else:
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
    remedy = f"install Python {PYTHON[0]}.{PYTHON[1]} or later, then `make setup PYTHON=python3.x`"
    yield _finding("python", sys.version_info >= PYTHON, sys.version.split()[0], remedy)
    yield check_packages()
    yield from check_gpus(profile)
    if os.environ.get("MSCS_IN_CONTAINER"):
        yield Finding("docker", "ok", f"inside an image: {os.environ.get('MSCS_IMAGE', 'unnamed')}")
    elif os.environ.get("MSCS_RUNTIME") == "slurm":
        found = shutil.which("sbatch")
        yield _finding("slurm", found is not None, found or "no sbatch", "go to a login node of the cluster")
    else:
        yield from check_docker(profile)
    yield from check_room(profile)
    yield from check_data(load_params(), profile)
    yield check_links()


def examine_run(params: Params, run: str, profile: str) -> Iterator[Finding]:
    """Yield what one run needs of this machine."""
    settings = params.resolve(run, profile).settings
    yield check_packages()
    yield from check_gpus("mini")  # no size that all need: its memory is measured
    yield check_data_of(settings)
    yield check_fit(params, run, profile)


def check_data_of(settings: Settings) -> Finding:
    """The dataset of a run."""
    name, root = settings.data.name, data_root(settings)
    if settings.data.source == "generated":
        return Finding("data", "ok", "generated when needed")
    verified = (root / "manifest.json").is_file()
    remedy = f"`mscs data verify {name}`" if root.is_dir() else f"`mscs data fetch {name}`"
    return _finding("data", verified, f"{root}, {'' if verified else 'not '}verified", remedy)


def check_fit(params: Params, run: str, profile: str) -> Finding:
    """Whether a run fits into memory here, as far as that was measured."""
    device = memory.device()
    found = memory.fit(params, run, profile, device)
    if found is None:
        remedy = f"`mscs doctor {run} --profile {profile} --measure` does that, in minutes"
        return Finding("fits", "warning", f"never measured on {device}", remedy)
    if found["peak_bytes"] is None:
        remedy = "smaller crop_size or batch_size, another backbone; then measure again"
        return Finding("fits", "problem", f"nothing that was tried fits on {device}", remedy)
    needed = f"{found['peak_bytes'] / 2**30:.1f} GiB on {device}"
    if not found["set"]:
        return Finding("fits", "ok", f"as it is: {needed}")
    return Finding(
        "fits", "warning", f"with less: {needed}", f"`{memory.command(run, profile, found['set'])}`"
    )


def check_packages() -> Finding:
    """The packages that can change results, against the versions that were last accepted."""
    try:
        installed = numerics.check_packages(accept=False)
    except UsageError as error:
        state = "warning" if _version("torch") else "problem"
        return Finding("packages", state, str(error), "`make setup` installs the pinned ones")
    return Finding("packages", "ok", ", ".join(f"{name} {version}" for name, version in installed.items()))


def check_gpus(profile: str) -> Iterator[Finding]:
    """GPUs with their driver, the CUDA it can serve, and NCCL where there are several."""
    need = NEEDS[profile]["gpu"]
    gpus, driver, cuda = nvidia()
    if not gpus:
        yield _finding(
            "gpu", not need, "none", "an NVIDIA GPU and its driver are needed to train at this size"
        )
        return
    for name, size in gpus:
        remedy = "the largest crops will not fit: see out of memory in docs/operations.md"
        yield _finding("gpu", size >= need, f"{name}, {size:.0f} GB", remedy, "warning")
    serves = f"{driver}, up to CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    remedy = f"PyTorch here needs CUDA {CUDA // 1000}: update the driver (580 or later)"
    yield _finding("driver", cuda >= CUDA, serves, remedy)
    if len(gpus) > 1:
        nccl = _version("nvidia-nccl-cu13")
        remedy = "`make setup` installs it; without it several GPUs cannot work together"
        yield _finding("nccl", bool(nccl), nccl or "missing", remedy)


def check_docker(profile: str) -> Iterator[Finding]:
    """The engine, whether it can hand over GPUs, and the image."""
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
    there = has_gpu_runtime(info)
    remedy = (
        "install nvidia-container-toolkit, `sudo nvidia-ctk runtime configure --runtime=docker`, restart "
        f"Docker, {instead}"
    )
    yield _finding("docker gpu", there, "NVIDIA runtime" if there else "no NVIDIA runtime", remedy, lacking)
    name = os.environ.get("MSCS_TRAIN_IMAGE") or "mscs:train"
    try:
        image = client.images.get(name)
    except docker.errors.ImageNotFound:
        yield Finding("image", lacking, f"no {name}", f"`make image` builds it, {instead}")
        return
    lock = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12] if LOCK.exists() else ""
    remedy = f"it was not built from this {LOCK}: `make image` builds it anew"
    fits = image.labels.get("mscs.lock") == lock
    yield _finding("image", fits, f"{name} {image.short_id}", remedy, "warning")


def has_gpu_runtime(info: dict[str, Any]) -> bool:
    """Return whether an engine with this `docker info` can give NVIDIA GPUs to containers."""
    discovered = [str(device.get("ID", "")) for device in info.get("DiscoveredDevices") or ()]
    return "nvidia" in info.get("Runtimes", {}) or any("nvidia.com/gpu" in name for name in discovered)


def check_room(profile: str) -> Iterator[Finding]:
    """Free disk, memory and shared memory."""
    disk = shutil.disk_usage(".").free / 1e9
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    for name, found, remedy in (
        ("disk", disk, "free some, or put data/ and work/ on a larger disk by a link"),
        ("memory", memory, "fewer data workers (`--workers`) need less"),
    ):
        wanted = NEEDS[profile][name]
        text = f"{found:.0f} GB, {wanted} GB needed for everything"
        yield _finding(name, found >= wanted, text, remedy, "warning")
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < 1e9:
        remedy = "start the container with --shm-size 8g, or use --workers 0"
        yield Finding("shared memory", "problem", f"{size / 1e6:.0f} MB", remedy)


def check_data(params: Params, profile: str) -> Iterator[Finding]:
    """The folders of a profile's real datasets, and the Cityscapes login if it needs one."""
    data = [params.resolve(run, profile).settings.data for run in params.runs_of(profile)]
    names = list(dict.fromkeys(of_run.name for of_run in data if of_run.source == "real"))
    if not names:
        yield Finding("data", "ok", "generated when needed")
    for name in names:
        root = default_root(name)
        remedy = f"the pipeline fetches it when needed; or set MSCS_DATA to the folder that holds {name}/"
        yield _finding(f"data {name}", root.is_dir(), str(root), remedy, "warning")
    if "cityscapes" not in names:
        return
    given = all(os.environ.get(f"CITYSCAPES_{part}") for part in ("USERNAME", "PASSWORD"))
    good = given or default_root("cityscapes").is_dir()
    remedy = "set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD: the pipeline does not ask"
    yield _finding("cityscapes login", good, "set" if given else "not set", remedy, "warning")


def check_links() -> Finding:
    """How DVC links files out of its cache: symbolic links may point to nothing inside a container."""
    config = configparser.ConfigParser(strict=False)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    config.read([home / "dvc" / "config", ".dvc/config", ".dvc/config.local"])
    kinds = config.get("cache", "type", fallback="reflink,copy").strip('"').replace(" ", "")
    remedy = "`dvc config --local cache.type reflink,hardlink,copy`, then `dvc checkout --relink`"
    return _finding("dvc cache", "symlink" not in kinds, kinds, remedy)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
