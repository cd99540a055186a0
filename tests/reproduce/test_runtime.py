"""Which runtime a stage gets, what its container is created with, and what goes wrong; without an engine."""

import hashlib
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import docker
from mscs.errors import MscsError, UsageError
from mscs.params import load_params
from mscs.paths import resolve_all
from mscs.results import write_json
from reproduce import runtime, stages

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    for name in ("MSCS_RUNTIME", "MSCS_IN_CONTAINER", "MSCS_DATA", "MSCS_TRAIN_IMAGE", "MSCS_NETWORK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MSCS_WEIGHTS", str(tmp_path / "weights"))


def project_name(root):
    return f"{root.name}-{hashlib.sha256(bytes(root)).hexdigest()[:6]}"


class Container:
    """Stands in for a container: prints, then ends with `code`, or when a signal reaches it."""

    name = "mscs-x"

    def __init__(self, code=0, waits=False, oom=False, status="created"):
        self.code, self.status, self.removed = code, status, False
        self.attrs = {"State": {"OOMKilled": oom}}
        self.ended = threading.Event()
        if not waits:
            self.ended.set()

    def attach(self, **_options):
        yield b"to stdout\n", None
        yield None, b"to stderr\n"
        self.ended.wait(10)

    def start(self):
        self.status = "running"

    def kill(self, **options):
        self.code = {"SIGINT": 130, "SIGTERM": 143}[options["signal"]]
        self.ended.set()

    def wait(self):
        return {"StatusCode": self.code}

    def reload(self):
        pass

    def remove(self, force=False):
        self.removed = True


class Engine:
    """Stands in for a Docker client with one image and at most one container."""

    def __init__(self, container=None, old=None, runtimes=("runc",), image=True):
        self.container, self.old, self.runtimes, self.image = container, old, runtimes, image
        self.images = SimpleNamespace(get=self._get_image)
        self.containers = SimpleNamespace(get=self._get, create=self._create)

    def ping(self):
        return True

    def info(self):
        return {"Runtimes": {name: {} for name in self.runtimes}, "SecurityOptions": []}

    def _get_image(self, name):
        if not self.image:
            raise docker.errors.ImageNotFound(name)
        return SimpleNamespace(id="sha256:1234", tags=[name])

    def _get(self, name):
        if self.old is None or self.old.removed:
            raise docker.errors.NotFound(name)
        return self.old

    def _create(self, image, **options):
        self.created = {"image": image, **options}
        return self.container


def use(monkeypatch, engine):
    monkeypatch.setattr(docker, "from_env", lambda **_: engine)
    return engine


@pytest.mark.parametrize(
    ("profile", "verb", "asked", "inside", "expected"),
    [
        ("paper", "train", None, None, "docker"),
        ("mini", "train", None, None, "native"),
        ("paper", "train", "native", None, "native"),
        ("mini", "data", "docker", None, "docker"),
        ("paper", "train", None, "1", "native"),
        ("mini", "train", "docker", "1", "native"),
        ("paper", "evaluate", "slurm", None, "slurm"),
        ("paper", "tables", "slurm", None, "native"),
    ],
)
def test_paper_runs_in_the_image_and_mini_here_unless_asked(
    monkeypatch, profile, verb, asked, inside, expected
):
    if asked:
        monkeypatch.setenv("MSCS_RUNTIME", asked)
    if inside:
        monkeypatch.setenv("MSCS_IN_CONTAINER", inside)
    assert runtime.runtime_of(profile, verb) == expected


def test_an_unknown_runtime_names_the_known(monkeypatch):
    monkeypatch.setenv("MSCS_RUNTIME", "podman")
    with pytest.raises(UsageError, match="docker, native, slurm"):
        runtime.runtime_of("mini", "train")


def test_a_stage_goes_to_its_container_with_the_same_words(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_json("results/paper/resolved.json", resolve_all(load_params(ROOT / "params.yaml"), "paper"))
    engine = use(monkeypatch, Engine(Container(code=3), runtimes=("runc", "nvidia")))
    assert stages.run(["train", "paper", "cadis-ocrnet-r50-ce", "0"]) == 3
    assert engine.created["command"] == [
        "python",
        "-m",
        "reproduce.stages",
        "train",
        "paper",
        "cadis-ocrnet-r50-ce",
        "0",
    ]
    assert engine.created["name"] == f"mscs-{project_name(tmp_path)}-paper-cadis-ocrnet-r50-ce-0"
    assert engine.created["device_requests"][0]["Capabilities"] == [["gpu"]]
    assert engine.container.removed


def test_the_container_is_closed_to_the_network_and_belongs_to_the_caller(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "git_state", lambda: {"commit": "abc", "dirty": True})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CITYSCAPES_PASSWORD", "hidden")
    options = runtime.container_options("tables", "mini", ["1a"], tmp_path, "sha256:1234")
    assert options["name"] == f"mscs-{project_name(tmp_path)}-mini-tables-1a"
    assert (options["cap_drop"], options["security_opt"]) == (["ALL"], ["no-new-privileges"])
    assert options["pids_limit"] > 0
    assert "userns_mode" not in options
    assert options["network_mode"] == "none"
    assert options["user"] == f"{os.getuid()}:{os.getgid()}"
    if os.getuid() == 0:
        os.chown(tmp_path, 1234, 1235)
        assert runtime.owner(tmp_path) == (1234, 1235)
    assert options["working_dir"] == str(tmp_path)
    assert (options["init"], options["shm_size"]) == (True, "8g")
    environment = options["environment"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["MSCS_IMAGE"] == "sha256:1234"
    assert environment["MSCS_GIT_COMMIT"] == "abc-dirty"
    assert "hidden" not in str(options)


def test_what_lies_outside_the_project_is_mounted_too(monkeypatch, tmp_path):
    project, data, disk = (tmp_path / name for name in ("project", "sets", "disk"))
    for folder in (project, data / "cadis", disk / "ade", disk / "work", tmp_path / "weights"):
        folder.mkdir(parents=True)
    (data / "ade20k").symlink_to(disk / "ade")
    (project / "work").symlink_to(disk / "work")
    monkeypatch.setenv("MSCS_DATA", str(data))
    assert runtime.mounts(project) == {
        project: "ro",
        disk / "work": "rw",
        project / "results": "rw",
        tmp_path / "weights": "rw",
        data: "ro",
        data / "cadis": "ro",
        disk / "ade": "ro",
    }
    monkeypatch.delenv("MSCS_DATA")
    monkeypatch.setenv("MSCS_WEIGHTS", str(project / "work"))
    assert list(runtime.mounts(project)) == [project, disk / "work", project / "results"]


def test_a_stage_that_checks_data_may_write_the_manifest(monkeypatch, tmp_path):
    (tmp_path / "sets/cadis").mkdir(parents=True)
    monkeypatch.setenv("MSCS_DATA", str(tmp_path / "sets"))
    (tmp_path / "project").mkdir()
    found = runtime.mounts(tmp_path / "project")
    assert found[tmp_path / "sets/cadis"] == "ro"
    assert runtime.mounts(tmp_path / "project", writes_data=True)[tmp_path / "sets/cadis"] == "rw"


def test_what_fetches_has_a_network_and_may_write_where_it_puts_things(monkeypatch, tmp_path):
    project, archives = tmp_path / "project", tmp_path / "CaDIS"
    (archives / "Video01").mkdir(parents=True)
    project.mkdir()
    monkeypatch.setenv("MSCS_FROM_CADIS", str(archives))
    monkeypatch.setenv("CITYSCAPES_PASSWORD", "hidden")
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    monkeypatch.setenv("https_proxy", "http://proxy")

    def options(verb, *names):
        found = runtime.container_options(verb, "paper", names, project, "sha256:1234")
        modes = {Path(m["Target"]): "ro" if m["ReadOnly"] else "rw" for m in found["mounts"]}
        return found["network_mode"], found["environment"], modes

    network, environment, modes = options("fetch", "cadis")
    assert (network, modes[project / "data"], modes[archives]) == ("bridge", "rw", "ro")
    assert environment["MSCS_FROM_CADIS"] == str(archives)
    assert environment["CITYSCAPES_PASSWORD"] == "hidden"
    network, environment, modes = options("weights", "resnet50.tv_in1k")
    assert (network, modes[tmp_path / "weights"], modes[project / "data"]) == ("bridge", "rw", "ro")
    assert (environment["HF_ENDPOINT"], environment["https_proxy"]) == ("http://mirror", "http://proxy")
    assert "hidden" not in str(environment)
    # where a folder was given, the dataset consists of links into it
    (project / "data/cadis").mkdir()
    (project / "data/cadis/Video01").symlink_to(archives / "Video01")
    for verb, mode in (("data", "rw"), ("train", "ro")):
        network, environment, modes = options(verb, "cadis")
        assert (network, modes[project / "data/cadis"], modes[archives / "Video01"]) == ("none", mode, "ro")
        assert not {"CITYSCAPES_PASSWORD", "HF_ENDPOINT", "https_proxy"} & environment.keys()


def test_output_and_exit_code_come_through(capfdbinary):
    assert runtime.follow(Container(code=7)) == 7
    out, err = capfdbinary.readouterr()
    assert (out, err) == (b"to stdout\n", b"to stderr\n")


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_signals_reach_the_container(sent, code):
    before = signal.getsignal(sent)
    threading.Timer(0.1, os.kill, (os.getpid(), sent)).start()
    assert runtime.follow(Container(waits=True)) == code
    assert signal.getsignal(sent) is before


def test_a_container_out_of_memory_is_named():
    with pytest.raises(MscsError, match="out of memory"):
        runtime.follow(Container(code=137, oom=True))


def test_a_second_start_is_refused_and_a_dead_container_replaced(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, Engine(Container(), old=Container(status="running")))
    with pytest.raises(MscsError, match=r"-mini-some-run-0 is at work .*docker stop"):
        runtime.run_in_container("train", "mini", ["some-run", "0"])
    use(monkeypatch, Engine(Container(), old=Container(status="created")))
    with pytest.raises(MscsError, match=r"another process, which has not started it; .*docker rm"):
        runtime.run_in_container("train", "mini", ["some-run", "0"])
    dead = Container(status="exited")
    engine = use(monkeypatch, Engine(Container(), old=dead))
    assert runtime.run_in_container("train", "mini", ["some-run", "0"]) == 0
    assert dead.removed
    assert "device_requests" not in engine.created


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    use(monkeypatch, Engine(image=False))
    with pytest.raises(MscsError, match=r"no image mscs:train; `make image`.*MSCS_RUNTIME=native"):
        runtime.run_in_container("train", "paper", ["x", "0"])
    use(monkeypatch, Engine())
    with pytest.raises(MscsError, match="nvidia-container-toolkit"):
        runtime.run_in_container("train", "paper", ["x", "0"])
    monkeypatch.undo()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(MscsError, match=r"no Docker engine answers .* MSCS_RUNTIME=native"):
        runtime.connect()


def test_gpu_runtimes_are_recognised():
    assert runtime.has_gpu_runtime({"Runtimes": {"nvidia": {}}})
    assert runtime.has_gpu_runtime({"Runtimes": {}, "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]})
    assert not runtime.has_gpu_runtime({"Runtimes": {"runc": {}}, "DiscoveredDevices": None})


def test_weights_are_looked_for_where_pytorch_does(monkeypatch, tmp_path):
    from mscs.models import pretrained

    assert runtime.weights_folder() == tmp_path / "weights"
    monkeypatch.delenv("MSCS_WEIGHTS")
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert runtime.weights_folder() == Path(pretrained.weights_folder())
        monkeypatch.delenv(name)
