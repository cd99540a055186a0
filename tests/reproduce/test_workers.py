"""Runs side by side: the order of DVC calls, a GPU per worker, failures; and real DVC on a toy pipeline."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mscs.errors import UsageError
from mscs.params import load_params
from reproduce import workers
from reproduce.pipeline import ROWS_FILE, Pipeline, row_runs

ROOT = Path(__file__).parents[2]

PIPELINE = Pipeline(load_params(ROOT / "params.yaml"))
RUNS = ["cityscapes-hrnet-hr48-ce", "cityscapes-hrnet-hr48-ours", "cadis-ocrnet-r50-ce"]


@pytest.fixture
def calls(monkeypatch):
    """Record DVC's calls instead of making them; `fail` names a run whose stages fail."""
    record = SimpleNamespace(made=[], fail=None, current=set(), lock=threading.Lock())

    def run(command, *, check, env):
        with record.lock:
            record.made.append((command[command.index("dvc") + 1 :], env.get("CUDA_VISIBLE_DEVICES")))
        failed = record.fail is not None and command[-1].endswith(record.fail)
        return SimpleNamespace(returncode=255 if failed else 0)

    every = {stage for name in RUNS for stage in PIPELINE.stages_of(name)}
    monkeypatch.setattr(workers, "changed", lambda *_: every - record.current)
    monkeypatch.setattr(workers.subprocess, "run", run)
    return record


def test_the_shared_stages_come_first_then_every_run_once(calls):
    gpus = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert workers.side_by_side(PIPELINE, RUNS, gpus) == 0
    (first, _), *rest = calls.made
    assert first == ["repro", "resolve@mini", "data@mini-cityscapes", "data@mini-cadis"]
    assert all(call[:3] == ["--wait-for-lock", "repro", "--single-item"] for call, _ in rest)
    stages = [call[-1] for call, _ in rest]
    assert sorted(stages) == sorted(stage for run in RUNS for stage in PIPELINE.stages_of(run))
    for run in RUNS:
        (train, gpu), (evaluate, same) = [(s, g) for (*_, s), g in rest if s.endswith(f"-{run}")]
        assert train.startswith("train_")
        assert evaluate.startswith("evaluate_")
        assert gpu == same in ("0", "1")


def test_after_a_failure_nothing_new_starts_unless_told_to(calls):
    calls.fail = RUNS[0]
    assert workers.side_by_side(PIPELINE, RUNS, [{}]) == 255
    assert [call[-1] for call, _ in calls.made[1:]] == [f"train_cityscapes_seed0@mini-{RUNS[0]}"]
    calls.made.clear()
    assert workers.side_by_side(PIPELINE, RUNS, [{}], keep_going=True) == 255
    assert len(calls.made) == 1 + 1 + 2 + 2


def test_runs_that_are_up_to_date_are_not_asked_about(calls):
    calls.current = set(PIPELINE.stages_of(RUNS[1]))
    assert workers.side_by_side(PIPELINE, RUNS, [{}]) == 0
    assert not [call for call, _ in calls.made[1:] if call[-1].endswith(f"-{RUNS[1]}")]
    assert len(calls.made) == 1 + 2 + 2


def test_rows_live_in_their_own_file():
    row = row_runs(PIPELINE.params)[0]
    assert all(stage.startswith(f"{ROWS_FILE}:") for stage in PIPELINE.stages_of(row))


def test_gpus_are_counted_and_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert workers.devices(2, None) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(UsageError, match="found 2 GPUs"):
        workers.devices(3, None)
    with pytest.raises(UsageError, match="from 1"):
        workers.devices(None, 0)
    assert workers.devices(None, 3) == [{}, {}, {}]


TOY = """
stages:
  train_a: {cmd: "sleep 1; echo a > a", deps: [settings], outs: [{a: {cache: false}}]}
  train_b: {cmd: "sleep 1; echo b > b", deps: [settings], outs: [{b: {cache: false}}]}
  evaluate_a: {cmd: "cp a a.json", deps: [a], outs: [{a.json: {cache: false}}]}
  evaluate_b: {cmd: "cp b b.json", deps: [b], outs: [{b.json: {cache: false}}]}
  resolve: {cmd: "echo 1 > settings", outs: [{settings: {cache: false}}]}
"""


@pytest.mark.slow
def test_dvc_keeps_the_locks_of_stages_that_ran_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], check=True)
    (tmp_path / "dvc.yaml").write_text(TOY)
    monkeypatch.setattr(workers, "upstream", lambda *_: ["resolve"])
    pipeline = SimpleNamespace(stages_of=lambda run: [f"train_{run}", f"evaluate_{run}"])
    assert workers.side_by_side(pipeline, ["a", "b"], [{}, {}]) == 0
    status = subprocess.run([*dvc, "status"], capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout


def test_a_stage_of_which_only_files_are_missing_is_fresh_where_results_are_in_git(monkeypatch):
    found = {
        "missing": [{"changed outs": {"weights": "deleted"}}, {"changed deps": {"weights": "deleted"}}],
        "edited": [{"changed deps": {"settings": "modified", "weights": "deleted"}}],
        "new": [{"changed deps": {"resolved.json": "new"}}, {"changed outs": {"weights": "deleted"}}],
        "command": [{"changed outs": {"weights": "deleted"}}, "changed command"],
        "param": [{"changed deps": {"resolved.json": {"runs.a.train": "modified"}}}],
    }

    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, json.dumps(found))

    monkeypatch.setattr(workers.subprocess, "run", run)
    assert workers.changed({}, allow_missing=False) == set(found)
    assert workers.changed({}, allow_missing=True) == set(found) - {"missing"}
