"""Stages as Slurm jobs, with programs in the place of Slurm's that start real processes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mscs.errors import MscsError
from mscs.paths import read_resolved, resolve_all, resolved_path
from mscs.results import write_json
from reproduce import plan, slurm

ROOT = Path(__file__).parents[2]
RUN = "cityscapes-hrnet-hr48-ours"
FOLDER = f"results/mini/runs/{RUN}/seed-0"

PROGRAMS = {
    "sbatch": """\
echo "$@" >> submitted
[ ! -e refuse ] || { echo "sbatch: error: Invalid account" >&2; exit 1; }
for word; do
  case $word in --job-name=*) name=${word#*=};; --output=*) out=${word#*=};; --error=*) err=${word#*=};; esac
done
id=$(wc -l < submitted)
echo "$name" > $id.name
[ -e hold ] && echo PENDING > $id.state || echo RUNNING > $id.state
cp "$word" $id.script
( count=0
  while [ -e hold ]; do sleep 0.02; done
  while [ -e $id.state ]; do
    echo RUNNING > $id.state
    SLURM_JOB_ID=$id SLURM_RESTART_COUNT=$count setsid bash $id.script >> $out 2>> $err &
    echo $! > $id.pid
    wait $!
    [ -e $id.requeue ] || break
    rm $id.requeue
    count=$((count + 1))
  done
  rm -f $id.state
) < /dev/null > /dev/null 2>&1 &
echo "$id;cluster"
""",
    "squeue": """\
for word; do
  case $word in --name=*) name=${word#*=};; --jobs=*) cat ${word#*=}.state; exit;; esac
done
shopt -s nullglob
for file in *.state; do
  id=${file%.state} state=$(cat $file 2> /dev/null)
  [ "$(cat $id.name)" != "$name" ] || [ -z "$state" ] || echo "$id|$state|None"
done
""",
    "scancel": """\
for id; do :; done
[ -e $id.state ] || exit 0
case "$*" in
  *--state=PENDING*) grep -q RUNNING $id.state || rm -f $id.state hold;;
  *--batch*) [ ! -e $id.pid ] || kill -TERM $(cat $id.pid);;
  *) kill -KILL -- -$(cat $id.pid);;
esac
""",
    "scontrol": '[ "$1" = requeue ] && touch $2.requeue',
    "sacct": "echo OUT_OF_MEMORY",
    "apptainer": 'echo "$@" >> contained; cd "$TREE"; exec reproduce/stage "${@: -4}"',
}

STAGE = """\
#!/bin/bash
echo "$1 in $PWD ${MSCS_FRESH:-} $MSCS_RUNTIME"
echo "to stderr" >&2
notes=work/mini/checkpoints
echo "start ${MSCS_FRESH:-}" >> $notes/starts
trap 'echo saved >> $notes/starts; exit 143' TERM
while [ -e $notes/wait ]; do sleep 0.02; done
mkdir -p results/mini/runs/$3/seed-$4 work/mini/runs/$3/weights
echo result > results/mini/runs/$3/seed-$4/train.json.part
mv results/mini/runs/$3/seed-$4/train.json.part results/mini/runs/$3/seed-$4/train.json
echo weights > work/mini/runs/$3/weights/seed-$4.safetensors
exit $(cat $notes/code 2> /dev/null || echo 0)
"""

WRAPPER = """
import sys
from mscs.errors import MscsError
from reproduce import slurm
slurm.LOOK_SECONDS, slurm.ASK_SECONDS = 0.05, 0.3
try:
    sys.exit(slurm.run_as_job("train", "mini", sys.argv[1:]))
except MscsError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def cluster(project, tmp_path, monkeypatch):
    """Return the folder of a cluster's programs and notes; the current folder is a project with one stage."""
    home = tmp_path / "cluster"
    (home / "bin").mkdir(parents=True)
    for name, text in PROGRAMS.items():
        program = home / "bin" / name
        program.write_text(f"#!/bin/bash\nTREE=$PWD; cd {home}\n{text}")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}/bin:{os.environ['PATH']}")
    for name in ("MSCS_FRESH", "MSCS_SBATCH", "MSCS_APPTAINER", "MSCS_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(slurm, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(slurm, "ASK_SECONDS", 0.3)
    stage = project / "reproduce/stage"
    stage.parent.mkdir()
    stage.write_text(STAGE)
    stage.chmod(0o755)
    resolved = project / resolved_path("mini")
    resolved.parent.mkdir(parents=True)
    shutil.copy(ROOT / resolved_path("mini"), resolved)
    notes = project / "work/mini/checkpoints"
    notes.mkdir(parents=True)
    yield SimpleNamespace(home=home, notes=notes, submitted=lambda: lines(home / "submitted"))
    (notes / "wait").unlink(missing_ok=True)  # whatever still runs ends


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(*, parent=()):
    command = [*parent, sys.executable, "-c", WRAPPER, RUN, "0"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


def train(verb="train"):
    return slurm.run_as_job(verb, "mini", [RUN, "0"])


def test_a_stage_becomes_a_job_whose_output_exit_code_and_results_come_home(cluster, monkeypatch, capfd):
    monkeypatch.setenv("MSCS_SBATCH", "--partition=gpu --gres='gpu:a 100:2'")
    assert train() == 0
    assert Path(f"{FOLDER}/train.json").read_text() == "result\n"
    assert not Path(f"{FOLDER}/train.json").is_symlink()
    assert Path(f"work/mini/runs/{RUN}/weights/seed-0.safetensors").read_text() == "weights\n"
    assert list(Path("work/slurm").iterdir()) == []
    out, err = capfd.readouterr()
    (words,) = cluster.submitted()
    name = f"-mini-{RUN}-0-{slurm.digest('train', 'mini', [RUN, '0'])}"
    assert out.startswith("train in ")
    assert f"{name}/tree  native\n" in out
    assert "to stderr\n" in err
    assert f"{name} " in words
    assert "--requeue --signal=B:TERM@180 --partition=gpu --gres=gpu:a 100:2 " in words
    (cluster.notes / "code").write_text("3")
    Path(f"{FOLDER}/train.json").write_text("before\n")
    assert train() == 3
    assert Path(f"{FOLDER}/train.json").read_text() == "before\n"
    (folder,) = Path("work/slurm").iterdir()
    assert "to stderr" in (folder / "err").read_text()


def test_a_job_that_waits_runs_the_code_and_the_settings_that_it_was_submitted_with(cluster):
    (cluster.home / "hold").touch()
    with start() as wrapper:
        until(lambda: cluster.submitted())
        Path("reproduce/stage").write_text("#!/bin/bash\nexit 9\n")
        before = resolved_path("mini").read_text()
        resolved_path("mini").unlink()
        (tree,) = Path("work/slurm").glob("*/tree")
        assert (tree / resolved_path("mini")).read_text() == before
        (cluster.home / "hold").unlink()
        wrapper.communicate()
        assert wrapper.returncode == 0


@pytest.mark.parametrize("meanwhile", ["runs on", "ends"])
def test_a_killed_command_finds_its_job_again(cluster, meanwhile):
    (cluster.notes / "wait").touch()
    with start() as wrapper:
        until(lambda: lines(cluster.notes / "starts"))
        wrapper.kill()
    if meanwhile == "ends":
        (cluster.notes / "wait").unlink()
        until(lambda: not list(cluster.home.glob("*.state")))  # Slurm has forgotten it
    else:
        threading.Timer(0.3, (cluster.notes / "wait").unlink).start()
    assert train() == 0
    assert len(cluster.submitted()) == len(lines(cluster.notes / "starts")) == 1
    assert Path(f"{FOLDER}/train.json").is_file()


def test_a_command_whose_caller_is_gone_leaves_the_job(cluster):
    (cluster.notes / "wait").touch()
    with start(parent=("sh", "-c", '"$@" & echo $! > wrapper; wait', "sh")) as caller:
        until(lambda: lines(cluster.notes / "starts"))
        caller.kill()
    until(lambda: not Path("/proc", Path("wrapper").read_text().strip()).exists())
    assert len(list(cluster.home.glob("*.state"))) == 1


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_signals_cancel_the_job_after_it_has_saved(cluster, sent, code, state):
    (cluster.notes / "wait").touch()
    if state == "PENDING":
        (cluster.home / "hold").touch()
    before = signal.getsignal(sent)
    ready = cluster.notes / "starts" if state == "RUNNING" else cluster.home / "1.state"

    def send():
        until(lambda: ready.exists() and signal.getsignal(sent) is not before)
        os.kill(os.getpid(), sent)

    threading.Thread(target=send).start()
    assert train() == code
    assert lines(cluster.notes / "starts") == (["start ", "saved"] if state == "RUNNING" else [])
    assert signal.getsignal(sent) is before
    (cluster.notes / "wait").unlink()
    assert train() == 0
    assert len(cluster.submitted()) == 2


def test_a_job_that_slurm_stops_goes_on_in_its_next_turn_and_not_from_step_0(cluster, monkeypatch):
    monkeypatch.setenv("MSCS_FRESH", "1")
    (cluster.notes / "wait").touch()

    def stop():
        until(lambda: lines(cluster.notes / "starts"))
        os.kill(int((cluster.home / "1.pid").read_text()), signal.SIGTERM)
        until(lambda: len(lines(cluster.notes / "starts")) == 3)
        (cluster.notes / "wait").unlink()

    threading.Thread(target=stop).start()
    assert train() == 0
    assert lines(cluster.notes / "starts") == ["start 1", "saved", "start "]
    assert len(cluster.submitted()) == 1


def test_a_job_that_is_lost_is_told_of_and_submitted_again(cluster):
    (cluster.notes / "wait").touch()

    def end():
        until(lambda: lines(cluster.notes / "starts"))
        subprocess.run(["scancel", "1"], check=True)

    threading.Thread(target=end).start()
    with pytest.raises(MscsError, match=r"job 1 left no exit code; Slurm says: OUT_OF_MEMORY\. .*the same"):
        train()
    (cluster.notes / "wait").unlink()
    assert train() == 0


def test_what_slurm_refuses_is_passed_on(cluster, monkeypatch):
    (cluster.home / "refuse").touch()
    with pytest.raises(
        MscsError, match=r"sbatch says: sbatch: error: Invalid account; options .*MSCS_SBATCH"
    ):
        train()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MscsError, match="there is no squeue here; start this on a login node"):
        train()


def test_an_image_gets_the_projects_folders_and_the_stage(cluster, monkeypatch):
    monkeypatch.setenv("MSCS_APPTAINER", "work/mscs.sif")
    assert train() == 0
    (words,) = lines(cluster.home / "contained")
    root = Path.cwd()
    assert words.startswith("exec --nv --bind=")
    assert f"--bind={root}:{root}:ro --bind={root}/work:{root}/work:rw" in words
    assert f"{root}/work/mscs.sif python -m reproduce.stages train mini {RUN} 0" in words
    assert Path(f"{FOLDER}/train.json").is_file()


def test_the_name_of_a_job_follows_what_its_stage_depends_on(cluster, monkeypatch):
    def names():
        return [slurm.digest(verb, "mini", [RUN, "0"]) for verb in ("train", "evaluate")]

    first = names()
    assert first == names()
    assert first[0] != first[1]
    weights = Path(f"work/mini/runs/{RUN}/weights/seed-0.safetensors")
    weights.parent.mkdir(parents=True)
    weights.write_text("other")
    assert [a == b for a, b in zip(first, names(), strict=True)] == [True, False]
    second = names()
    document = json.loads(resolved_path("mini").read_text())
    document["runs"]["cityscapes-hrnet-hr48-ce"]["train"]["lr"] = 5
    write_json(resolved_path("mini"), document)
    assert names() == second
    document["runs"][RUN]["train"]["lr"] = 5
    write_json(resolved_path("mini"), document)
    assert names()[0] != second[0]
    third = names()
    monkeypatch.setenv("MSCS_FRESH", "1")
    assert names()[0] != third[0]
    with pytest.raises(MscsError, match="no stage `reproduce/stage train mini nothing 0`"):
        slurm.digest("train", "mini", ["nothing", "0"])


def test_each_stage_that_becomes_a_job_has_a_name_and_pretrained_weights_are_part_of_it(project, params):
    write_json(resolved_path("paper"), resolve_all(params, "paper"))
    pinned, other = "cityscapes-hrnet-hr48-ours", "ade20k-upernet-swins-ours"
    stages = [(verb, [run, "0"]) for verb in ("train", "evaluate") for run in (pinned, other)]
    stages += [("tsne", []), ("qualitative", [])]
    before = [slurm.digest(verb, "paper", names) for verb, names in stages]
    assert len(set(before)) == len(before)
    settings = read_resolved(resolved_path("paper"), pinned)
    write_json(Path("results/paper/weights", f"{settings.model.backbone}.json"), {"sha256": "a"})
    after = [slurm.digest(verb, "paper", names) for verb, names in stages]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] + [True] * 5


def test_resources_follow_groups_and_measured_hours(project, params):
    write_json(resolved_path("paper"), resolve_all(params, "paper"))
    assert slurm.resources("train", "mini", [RUN, "0"]) == []
    four = ["--gres=gpu:4", "--cpus-per-task=32", "--mem=128G"]
    assert slurm.resources("train", "paper", [RUN, "0"]) == four
    assert slurm.resources("tsne", "paper", []) == ["--gres=gpu:1", "--cpus-per-task=8", "--mem=32G"]
    settings = read_resolved(resolved_path("paper"), RUN)
    options = {key: getattr(settings.machine, key) for key in plan.OPTIONS}
    row = {"row": settings.schedule.name, "loss": settings.loss.name, "options": options}
    row |= {"batch": settings.schedule.images_per_group, "peak_bytes": 1}
    for name, device, milliseconds in (
        ("a", "NVIDIA A", 300),
        ("b", "NVIDIA B", 200),
        ("c", "X, 2 cores", 9e9),
    ):
        results = [{**row, "step_ms": milliseconds}]
        document = {"device": device, "profile": "paper", "quick": False, "results": results}
        write_json(Path("benchmarks/results", f"step-{name}.json"), document)
    hours = settings.schedule.steps * 4 * 0.3 / 3600
    assert plan.hours_on_slowest_gpu(settings) == pytest.approx(hours)
    assert slurm.resources("train", "paper", [RUN, "0"]) == [
        *four,
        f"--time={60 * math.ceil(hours / 4 * 1.5 + 1)}",
    ]


def test_an_exit_code_that_a_full_disk_cut_off_is_none(tmp_path):
    (tmp_path / "exit").touch()
    assert slurm.exit_code(tmp_path) is None
