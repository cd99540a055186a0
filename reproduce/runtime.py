"""Where a pipeline stage runs: in this interpreter, in a container of the project's image, or as a Slurm job.

The stage's command is the same either way, so DVC sees one hash. Stages of profile paper run in the image,
those of mini here; MSCS_RUNTIME=native, docker or slurm (reproduce/slurm.py) overrides. The project is
mounted at its own path, because links between its files may be absolute.
"""

import hashlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mscs.doctor import has_gpu_runtime
from mscs.errors import MscsError, UsageError, unknown_name
from mscs.provenance import git_state

RUNTIMES = ("native", "docker", "slurm")
IMAGE = "mscs:train"
SHARED_MEMORY = "8g"  # data loader workers hand batches over in /dev/shm; engines give 64 MB
PROCESSES = 4096  # at most in one container: training processes, data readers, their threads
NETWORK_VERBS = {
    "fetch": ("CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD"),
    "weights": ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"),
}
"""Stages whose containers have a network, and what these alone get of the environment."""
GIVEN = "MSCS_FROM_"  # and a dataset's name in capitals: its archive or folder
GPU_VERBS = ("train", "evaluate", "tsne", "qualitative")
PASSED_ON = ("MSCS_DATA", "MSCS_FRESH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
INSTEAD = "; MSCS_RUNTIME=native runs the stage without a container"


def runtime_of(profile: str, verb: str) -> str:
    """Return where a stage, started here, belongs: one of RUNTIMES. On Slurm only what computes is a job."""
    if os.environ.get("MSCS_IN_CONTAINER") or verb == "resolve":  # which reads and writes text only
        return "native"
    asked = os.environ.get("MSCS_RUNTIME") or ("docker" if profile == "paper" else "native")
    if asked not in RUNTIMES:
        raise UsageError(unknown_name("MSCS_RUNTIME", asked, RUNTIMES))
    return "native" if asked == "slurm" and verb not in GPU_VERBS else asked


def stage_name(verb: str, profile: str, names: Sequence[str], root: Path) -> str:
    """Return the name of a stage of this project on its machine or cluster. It has no random part."""
    project = f"{re.sub('[^a-zA-Z0-9_.-]', '', root.name)}-{hashlib.sha256(bytes(root)).hexdigest()[:6]}"
    return "-".join(("mscs", project, profile, *(() if verb == "train" else (verb,)), *names))


def commit_variable() -> dict[str, str]:
    """Return MSCS_GIT_COMMIT as it stands in for git where a stage cannot see the repository."""
    git = git_state()
    return {"MSCS_GIT_COMMIT": git["commit"] + ("-dirty" if git["dirty"] else "")} if git["commit"] else {}


def run_in_container(verb: str, profile: str, names: Sequence[str]) -> int:
    """Run one stage in a new container, pass signals on to it and return its exit code."""
    client = connect()
    image = find_image(client)
    options = container_options(verb, profile, names, Path.cwd(), image.id)
    engine = client.info()
    if profile == "paper" and verb in GPU_VERBS:
        from docker.types import DeviceRequest

        if not has_gpu_runtime(engine):
            raise MscsError(
                f"`{verb} {profile}` needs a GPU and the Docker engine cannot hand one over: install "
                f"nvidia-container-toolkit, run `sudo nvidia-ctk runtime configure --runtime=docker`, "
                f"restart Docker{INSTEAD}"
            )
        options["device_requests"] = [DeviceRequest(driver="nvidia", count=-1, capabilities=[["gpu"]])]
    security = engine.get("SecurityOptions", ())
    if "name=rootless" in security:
        options["user"] = "0:0"  # a rootless engine's root is the person who runs it
    if "name=userns" in security:
        options["userns_mode"] = "host"  # else the files would belong to a user of the engine's own
    container = create(client, image, options)
    print(f"{options['name']}: in {image.tags[0] if image.tags else image.id}", file=sys.stderr)
    try:
        return follow(container)
    finally:
        container.remove(force=True)


def connect() -> Any:
    """Return a client of the Docker engine that answers."""
    import docker

    try:
        client = docker.from_env()
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        raise MscsError(
            f"no Docker engine answers ({error}): start it, or join its group "
            f"(`sudo usermod -aG docker $USER`, then log in again){INSTEAD}"
        ) from None
    return client


def find_image(client: Any) -> Any:
    """Return the image that stages run in: $MSCS_TRAIN_IMAGE, or mscs:train."""
    import docker

    name = os.environ.get("MSCS_TRAIN_IMAGE") or IMAGE
    try:
        return client.images.get(name)
    except docker.errors.ImageNotFound:
        raise MscsError(f"there is no image {name}; `make image` builds it{INSTEAD}") from None


def container_options(
    verb: str, profile: str, names: Sequence[str], root: Path, image: str
) -> dict[str, Any]:
    """Return what the container of a stage is created with.

    Train and evaluate of a seed share a name: two containers that write the same files cannot be there.
    """
    from docker.types import Mount

    environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    network, given = "none", given_data() if verb == "fetch" else {}
    if verb in NETWORK_VERBS:
        network = "bridge"
        proxies = [key for key in os.environ if key.lower().endswith("_proxy")]
        wanted = (*NETWORK_VERBS[verb], *proxies)
        environment |= {key: os.environ[key] for key in wanted if key in os.environ}
        environment |= {key: str(path) for key, path in given.items()}
    environment |= {
        "HOME": "/tmp",
        "USER": os.environ.get("USER", "mscs"),
        "MSCS_IMAGE": image,
        "MSCS_WEIGHTS": str(weights_folder()),
        **commit_variable(),
    }
    return {
        "name": stage_name("train" if verb == "evaluate" else verb, profile, names, root),
        "command": ["python", "-m", "reproduce.stages", verb, profile, *names],
        "working_dir": str(root),
        "mounts": [
            Mount(str(path), str(path), type="bind", read_only=mode == "ro")
            for path, mode in mounts(root, *given.values(), writes_data=verb in ("fetch", "data")).items()
        ],
        "user": "{}:{}".format(*owner(root)),
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": PROCESSES,
        "environment": environment,
        "network_mode": os.environ.get("MSCS_NETWORK") or network,
        "shm_size": SHARED_MEMORY,
        "init": True,
        "detach": True,
    }


def owner(root: Path) -> tuple[int, int]:
    """Return the user and group of a stage: the caller, or for root the owner of the project's folder."""
    if os.getuid():
        return os.getuid(), os.getgid()
    return root.stat().st_uid, root.stat().st_gid


def weights_folder() -> Path:
    """Return where pretrained weights lie, as mscs.models does, without loading PyTorch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub" / "checkpoints"
    return Path(os.environ.get("MSCS_WEIGHTS") or hub).absolute()


def given_data() -> dict[str, Path]:
    """Return the archives and folders that the environment names for datasets, by variable."""
    given = {key: x for key, x in os.environ.items() if key.startswith(GIVEN) and x}
    return {key: Path(x).expanduser().resolve() for key, x in given.items()}


def mounts(root: Path, *given: Path, writes_data: bool = False) -> dict[Path, str]:
    """Return the folders that a stage uses and how: the project and its data ro, what it writes rw.

    A stage that fetches or checks a dataset writes into its folder. `given` is read too, as is what the links
    in a dataset's folder lead to.
    """
    data = (root / os.environ.get("MSCS_DATA", "data")).absolute()
    found = {root: "ro"}
    written = (root / "work", root / "results", weights_folder(), *([data] if writes_data else ()))
    for folder in written:
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, *owner(root))
        found |= {folder: "rw", folder.resolve(): "rw"}
    linked = (path.resolve() for path in data.glob("*/*") if path.is_symlink())
    found |= {path: "ro" for path in (*given, *linked) if path.exists()}
    for folder in (data, *(data.glob("*") if data.is_dir() else ())):
        for path in {folder, folder.resolve()}:
            if path.is_dir():
                found.setdefault(path, "rw" if writes_data else "ro")
    return {path: mode for path, mode in found.items() if not path.is_symlink()}  # but what they lead to


def create(client: Any, image: Any, options: dict[str, Any]) -> Any:
    """Create the container; one of its name that still runs is an error, one that has ended is replaced."""
    import docker

    with suppress(docker.errors.NotFound):
        old = client.containers.get(options["name"])
        if old.status == "created":
            raise MscsError(
                f"container {options['name']} was created by another process, which has not started it; wait "
                f"for it, or remove what a killed one left: `docker rm {options['name']}`"
            )
        if old.status in ("running", "paused", "restarting"):
            raise MscsError(
                f"container {options['name']} is at work on the same files; wait for it, or stop it: "
                f"`docker stop --time 120 {options['name']}` saves a checkpoint"
            )
        old.remove(force=True)
    try:
        return client.containers.create(image.id, **options)
    except docker.errors.APIError as error:
        raise MscsError(
            f"Docker refuses the container {options['name']}: {error.explanation}{INSTEAD}"
        ) from None


def follow(container: Any) -> int:
    """Start a container, copy its output here until it ends, and return its exit code."""
    import docker

    def hand_over(number: int) -> None:  # it then saves and ends
        with suppress(docker.errors.APIError):
            container.kill(signal="SIGINT" if number == signal.SIGINT else "SIGTERM")

    output = container.attach(stream=True, demux=True)
    with handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), hand_over):
        try:
            container.start()
        except docker.errors.APIError as error:
            raise MscsError(f"Docker cannot start {container.name}: {error.explanation}{INSTEAD}") from None
        for out, err in output:
            for text, stream in ((out, sys.stdout), (err, sys.stderr)):
                if text:
                    stream.buffer.write(text)
                    stream.flush()
        code = int(container.wait()["StatusCode"])
    container.reload()
    if container.attrs["State"].get("OOMKilled"):
        raise MscsError(
            f"{container.name} ran out of memory and was killed; `mscs doctor` says what a run needs"
        )
    return code


@contextmanager
def handling(numbers: Iterable[signal.Signals], handler: Callable[[int], None]) -> Iterator[None]:
    """Give signals to a function while the block runs."""
    before = {number: signal.signal(number, lambda found, _frame: handler(found)) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
