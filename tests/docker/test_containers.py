"""The images and services in real containers. `make docker-test BASE_IMAGE=...` builds the images first.

Runs on a copy of the project with mini cut down further; skipped without an engine or without the images.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import docker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOT_USER = os.getuid() == 0
OWNER = 1234 if ROOT_USER else os.getuid()
RUN = "cadis-ocrnet-r50-ours"
LONG_RUN = "cityscapes-hrnet-hr48-ce"


@pytest.fixture(scope="session")
def engine():
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no Docker engine: {error}")
    return client


@pytest.fixture(scope="session")
def images(engine):
    """Build both images from the base that is named; without one, take what is there."""
    base = os.environ.get("MSCS_BASE_IMAGE")
    bridged = bool(engine.networks.list(names=["bridge"]))
    for target in ("train", "report"):
        tag = f"mscs:{target}"
        if base:
            command = [
                "docker",
                "build",
                "--target",
                target,
                "--tag",
                tag,
                "--build-arg",
                f"BASE_IMAGE={base}",
            ]
            command += ["--build-arg", "GIT_COMMIT=tested", "--network", "default" if bridged else "host"]
            subprocess.run([*command, "--file", "docker/Dockerfile", "."], cwd=ROOT, check=True)
        elif not engine.images.list(name=tag):
            pytest.skip(f"no image {tag}: `make docker-test BASE_IMAGE=...` builds it")


@pytest.fixture(scope="session")
def project(images, copy_project):
    """Copy the project, smaller still, into a folder that belongs to someone else than root."""
    return give_away(copy_project(small=True))


def give_away(folder):
    if ROOT_USER:
        give_to(folder, OWNER)
    return folder


def give_to(folder, owner):
    subprocess.run(["chown", "-R", f"{owner}:{owner}", folder], check=True)


def compose(project, *arguments, check=True):
    program = ["docker", "compose"]
    if subprocess.run([*program, "version"], capture_output=True, check=False).returncode:
        program = ["docker-compose"]
    files = ["--file", "docker/compose.yaml", "--project-name", "mscs-test"]
    command = [
        *program,
        *files,
        "run",
        "--rm",
        *(["-T"] if program == ["docker-compose"] else []),
        *arguments,
    ]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def native(project, *arguments, **variables):
    """Run a module of the copy with this interpreter; `variables` go on top of the environment."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MSCS_")}
    environment |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2", **variables}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def foreign(project):
    """Return what in the copy does not belong to its owner."""
    return [p for p in project.rglob("*") if p.lstat().st_uid != OWNER]


def outputs(project, run):
    """Return the bytes of what a run must reproduce: metrics, scores, curves, weights."""
    results, work = project / "results/mini/runs" / run / "seed-0", project / "work/mini/runs" / run
    names = ("train.json", "losses.csv", "evaluation.json", "confusion.json")
    found = {name: (results / name).read_bytes() for name in names if (results / name).exists()}
    for path in (work / "weights").iterdir():  # tensors only: the order of a safetensors header is by chance
        found |= {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return found


def test_images_hold_what_they_need_and_run_as_nobody_special(engine, images):
    def run(image, command):
        return engine.containers.run(f"mscs:{image}", command, remove=True, network_mode="none").decode()

    assert run("train", "id -u") == run("report", "id -u") == "10001\n"
    assert "COMMAND" in run("train", "mscs --help")
    assert run("train", ["sh", "-c", "gcc --version >/dev/null && ls /usr/include/python3*/Python.h"])
    assert (
        run(
            "report",
            ["python", "-c", "import torch; print(torch.ones(2, 2).mm(torch.ones(2, 2)).sum().item())"],
        )
        == "8.0\n"
    )
    for image in ("train", "report"):
        listing = run(image, ["sh", "-c", "ls -A /workspace"]).split()
        assert not {".git", "work", "results", "data", ".venv"} & set(listing)
        assert engine.images.get(f"mscs:{image}").labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert (
        engine.images.get("mscs:report").attrs["Size"] < 0.75 * engine.images.get("mscs:train").attrs["Size"]
    )


def test_compose_trains_and_scores_a_mini_run_as_a_native_one(project):
    compose(project, "train", RUN)
    compose(project, "evaluate", RUN)
    assert not foreign(project)
    record = json.loads((project / f"results/mini/runs/{RUN}/seed-0/run.json").read_text())
    assert record["image"].startswith("train/commit-")
    head = ["git", "-c", "safe.directory=*", "-C", project, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True)
    assert record["git"] == {"commit": commit.stdout.strip(), "dirty": False}
    inside = outputs(project, RUN)
    assert len(inside) > 50
    for folder in (
        f"results/mini/runs/{RUN}",
        f"work/mini/runs/{RUN}",
        "work/mini/checkpoints",
        "work/mini/data",
    ):
        shutil.rmtree(project / folder)
    for verb in ("train", "evaluate"):
        done = native(project, "mscs", verb, RUN)
        assert done.returncode == 0, done.stderr
    assert outputs(project, RUN) == inside
    if ROOT_USER:
        give_to(project, OWNER)


def test_services_see_no_network_and_cannot_change_the_source(project):
    probe = "import os; print(sorted(os.listdir('/sys/class/net')), os.getuid())"
    done = compose(project, "--entrypoint", "mscs-entrypoint", "train", "python", "-c", probe)
    assert done.stdout.strip() == f"['lo'] {OWNER}"
    for service, target, code in (("train", "mscs/x", 1), ("train", "work/x", 0), ("shell", "mscs/x", 0)):
        script = f"touch {target} && rm {target}"
        done = compose(project, "--entrypoint", "mscs-entrypoint", service, "sh", "-c", script, check=False)
        assert done.returncode == code, done.stderr


def test_the_package_answers_from_any_folder(project):
    done = compose(
        project, "--workdir", "/tmp", "--entrypoint", "mscs-entrypoint", "train", "mscs", "--version"
    )
    assert done.stdout.startswith("mscs 0.")


def test_dvclive_logs_beside_a_read_only_project(project):
    compose(project, "train", RUN, "--log", "dvclive", "--set", "steps=5")
    assert list(project.glob(f"work/mini/runs/{RUN}+*/logs/dvclive/seed-0/metrics.json"))
    assert not foreign(project)


def test_the_suite_passes_in_the_image(images, copy_project):
    compose(give_away(copy_project(small=False)), "test")


def test_two_processes_train_without_a_network(project):
    compose(project, "train", RUN, "--processes", "2", "--set", "steps=4")


def test_a_table_from_inside_is_up_to_date_outside(project):
    """Draw, train, score and tabulate in one container; DVC outside finds the same hashes."""
    compose(project, "repro", "1b")
    assert "HRNet" in (project / "results/mini/tables/1b.md").read_text()
    assert not foreign(project)
    done = native(project, "dvc", "status", "tables_1b@mini")
    assert "up to date" in done.stdout, done.stdout + done.stderr
    compose(project, "tables", "1b")
    assert not foreign(project)


@pytest.fixture
def long_run(project):
    """Give one run more steps, in the copy's resolved settings, and forget its files."""
    if ROOT_USER:
        give_to(project, 0)
    assert native(project, "reproduce.stages", "resolve", "mini").returncode == 0
    path = project / "results/mini/resolved.json"
    document = json.loads(path.read_text())
    document["runs"][LONG_RUN]["train"]["steps"] = 20
    path.write_text(json.dumps(document))
    return project


def test_a_killed_container_saves_and_goes_on_exactly(engine, long_run, monkeypatch):
    stage = [sys.executable, "-m", "reproduce.stages", "train", "mini", LONG_RUN, "0"]
    for name in ("MSCS_IN_CONTAINER", "MSCS_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MSCS_RUNTIME", "docker")
    digest = hashlib.sha256(bytes(long_run)).hexdigest()[:6]
    name = f"mscs-{long_run.name}-{digest}-mini-{LONG_RUN}-0"
    with subprocess.Popen(
        stage, cwd=long_run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        deadline = time.monotonic() + 120
        while not list((long_run / "work/mini/checkpoints").glob(f"{LONG_RUN}-*/seed-0/*")):
            assert started.poll() is None, started.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(stage, cwd=long_run, capture_output=True, text=True, check=False)
        assert (second.returncode, f"container {name} is at work" in second.stderr) == (1, True)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 143
    assert name not in [container.name for container in engine.containers.list(all=True)]
    assert not (long_run / f"work/mini/runs/{LONG_RUN}/weights/seed-0.safetensors").exists()

    done = subprocess.run(stage, cwd=long_run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((long_run / f"results/mini/runs/{LONG_RUN}/seed-0/run.json").read_text())
    assert record["image"] == engine.images.get("mscs:train").id
    resumed = outputs(long_run, LONG_RUN)
    done = native(long_run, "reproduce.stages", "train", "mini", LONG_RUN, "0", MSCS_FRESH="1")
    assert done.returncode == 0, done.stderr
    assert outputs(long_run, LONG_RUN) == resumed


def test_a_failing_stage_keeps_its_exit_code(long_run, monkeypatch):
    monkeypatch.setenv("MSCS_RUNTIME", "docker")
    stage = [sys.executable, "-m", "reproduce.stages", "train", "mini", "no-such-run", "0"]
    done = subprocess.run(stage, cwd=long_run, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no run 'no-such-run'" in done.stderr
