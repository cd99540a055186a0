"""Trainings through a real Slurm on this machine: two preempted, a node lost, the login process killed.

As root on Debian: `apt-get install slurmctld slurmd slurm-client munge`, then
`MSCS_TRIAL_RUNS=27 MSCS_TRIAL_STEPS=0 python -m pytest tests/reproduce/test_slurm_cluster.py` for all runs of
profile mini as they are; by default three runs are cut to 40 steps each.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reproduce.pipeline import default_runs

RUNS = int(os.environ.get("MSCS_TRIAL_RUNS", "3"))
STEPS = int(os.environ.get("MSCS_TRIAL_STEPS", "40"))
NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17817
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={home}/munge.socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=15
MinJobAge=10
JobCompType=jobcomp/filetxt
JobCompLoc={home}/jobs
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17821-17824] CPUs=1 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Return the folder of a running Slurm, which SLURM_CONF names: four nodes, two pretended GPUs each."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.getuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing else'}: see the head of this file")
    home = tmp_path_factory.mktemp("slurm")
    (home / "state").mkdir()
    home.chmod(0o755)
    (home / "slurm.conf").write_text(CONFIGURATION.format(host=socket.gethostname(), home=home))
    (home / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={home}/gpu[0-1]\n")
    for name in ("gpu0", "gpu1"):
        (home / name).touch()
    (home / "munge.key").write_bytes(os.urandom(128))
    (home / "munge.key").chmod(0o400)
    options = {
        "key-file": "key",
        "socket": "socket",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    files = [f"--{option}={home}/munge.{name}" for option, name in options.items()]
    os.environ["SLURM_CONF"] = str(home / "slurm.conf")
    subprocess.run(["munged", "--force", *files], check=True)
    subprocess.run(["slurmctld", "-c"], check=True)
    for node in NODES:
        subprocess.run(["slurmd", "-N", node], check=True)
    until(lambda: slurm("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES))
    yield home
    slurm("scancel", f"--user={os.getuid()}")
    for file in home.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(file.read_text()), signal.SIGTERM)
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def projects(new_pipeline, params):
    """Return two copies of the project, and the runs to train."""
    runs = default_runs(params)[:RUNS]

    def shorten(document):
        mini = document["profiles"]["mini"]
        mini["defaults"] |= {"train_images": 8, "val_images": 2}
        # 400 of the paper's steps are one of mini
        short = {"steps": 400 * STEPS, "crop_size": [64, 128], "log_every": 4, "checkpoint_every": 2}
        mini["runs"] |= {run: mini["runs"].get(run, {}) | short for run in runs}

    first = new_pipeline(shorten if STEPS else lambda document: None)
    return first, Path(shutil.copytree(first, first.with_name("slurm"), symlinks=True)), runs


def until(condition, seconds=600.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def slurm(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def reproduce(project, runs, runtime):
    command = [
        sys.executable,
        "-m",
        "reproduce",
        "run",
        *runs,
        "--jobs",
        "2" if runtime == "native" else "48",
    ]
    environment = {**os.environ, "MSCS_RUNTIME": runtime, "MSCS_SBATCH": "--gres=gpu:1"}
    log = (project / "log").open("a")
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def trainings():
    """Return {run: (job, node)} of the trainings that run."""
    found = {}
    for line in slurm("squeue", "--noheader", "--states=RUNNING", "--format=%A|%N|%j").splitlines():
        job, node, name = line.split("|")
        if "-evaluate-" not in name:
            found[name.split("-mini-")[1].rsplit("-0-", 1)[0]] = job, node
    return found


def checkpointed(project, but=()):
    """Return a run whose training is under way and has saved, and is none of `but`."""
    checkpoints = project / "work/mini/checkpoints"
    for run in trainings():
        if run not in but and any(checkpoints.glob(f"{run}-{'[0-9a-f]' * 12}/seed-0/step-*.json")):
            return run
    return None


def lose(node):
    """Kill a node's daemon, what watches its jobs, and its jobs, without a word, in this order."""
    jobs, parents, daemons = [], {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                jobs.append(int(folder.name))
            if (folder / "cmdline").read_bytes().startswith(f"slurmd\0-N\0{node}\0".encode()):
                daemons.append(int(folder.name))
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    for process in (*daemons, *({parents[job] for job in jobs} - set(jobs)), *jobs):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def results(project, run):
    folder = project / "results/mini/runs" / run / "seed-0"
    files = [folder / name for name in ("losses.csv", "train.json", "evaluation.json", "confusion.json")]
    return [
        path.read_bytes() for path in (*files, project / f"work/mini/runs/{run}/weights/seed-0.safetensors")
    ]


@pytest.mark.slow
def test_trainings_on_a_cluster_end_as_those_here_whatever_happens_to_them(cluster, projects):
    native, project, runs = projects
    assert reproduce(native, runs, "native").wait() == 0, (native / "log").read_text()[-3000:]

    login = reproduce(project, runs, "slurm")
    until(lambda: checkpointed(project))
    first = checkpointed(project)
    slurm("scontrol", "requeue", trainings()[first][0])
    os.killpg(login.pid, signal.SIGKILL)  # DVC and what follows the jobs with it; the jobs go on
    login.wait()
    login = reproduce(project, runs, "slurm")
    until(lambda: checkpointed(project, [first]))
    second = checkpointed(project, [first])
    slurm("scontrol", "requeue", trainings()[second][0])
    until(lambda: checkpointed(project, [first, second]))
    third = checkpointed(project, [first, second])
    lose(trainings()[third][1])
    assert login.wait() == 0, (project / "log").read_text()[-3000:]

    for run in runs:
        assert results(project, run) == results(native, run), run
        sessions = json.loads((project / f"results/mini/runs/{run}/seed-0/run.json").read_text())["sessions"]
        assert len(sessions) == 1 + (run in (first, second, third)), "it went on from its checkpoint"
    ends = [
        dict(word.split("=", 1) for word in line.split())
        for line in (cluster / "jobs").read_text().splitlines()
    ]
    jobs = {(end["Name"], end["JobId"]) for end in ends}
    assert len(jobs) == 2 * len(runs), "each training and each evaluation was submitted once"
    assert "goes on as job" in (project / "log").read_text()
    assert not list((project / "work/slurm").iterdir())
