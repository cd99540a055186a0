"""Runs side by side: the order of DVC calls, a GPU per worker, failures; and real DVC on a toy pipeline."""

import json
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mscs.errors import UsageError
from mscs.params import load_params
from reproduce import workers
from reproduce.pipeline import ROWS_FILE, Pipeline, row_runs
from reproduce.workers import Places

ROOT = Path(__file__).parents[2]

PIPELINE = Pipeline(load_params(ROOT / "params.yaml"))
RUNS = ["cityscapes-hrnet-hr48-ce", "cityscapes-hrnet-hr48-ours", "cadis-ocrnet-r50-ce"]


@pytest.fixture
def calls(monkeypatch):
    """Record DVC's calls instead of making them; `fail` names a run whose stages fail."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    record = SimpleNamespace(made=[], fail=None, current=set(), lock=threading.Lock(), most=0, now=0)

    def run(command, *, check, env):
        words = command[command.index("dvc") + 1 :]
        with record.lock:
            record.made.append((words, env.get("CUDA_VISIBLE_DEVICES")))
            record.now += words[-1].startswith("train")
            record.most = max(record.most, record.now)
        time.sleep(0.05)
        with record.lock:
            record.now -= words[-1].startswith("train")
        failed = record.fail is not None and words[-1].endswith(record.fail)
        return SimpleNamespace(returncode=255 if failed else 0)

    every = {stage for name in RUNS for stage in PIPELINE.stages_of(name)} | set(PIPELINE.shared_stages(RUNS))
    monkeypatch.setattr(workers, "changed", lambda *_: every - record.current)
    monkeypatch.setattr(workers.subprocess, "run", run)
    return record


def test_the_shared_stages_come_first_then_every_run_once(calls):
    assert workers.side_by_side(PIPELINE, RUNS, Places(2, None, 1)) == 0
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


def test_shared_stages_that_are_up_to_date_are_left_alone_since_running_stages_lock_them(calls):
    calls.current = set(PIPELINE.shared_stages(RUNS))
    assert workers.side_by_side(PIPELINE, RUNS, Places(None, 1)) == 0
    assert len(calls.made) == 2 * len(RUNS)


def test_after_a_failure_nothing_new_starts_unless_told_to(calls):
    calls.fail = RUNS[0]
    assert workers.side_by_side(PIPELINE, RUNS, Places(None, 1)) == 255
    assert [call[-1] for call, _ in calls.made[1:]] == [f"train_cityscapes_seed0@mini-{RUNS[0]}"]
    calls.made.clear()
    assert workers.side_by_side(PIPELINE, RUNS, Places(None, 1), keep_going=True) == 255
    assert len(calls.made) == 1 + 1 + 2 + 2


def test_runs_that_are_up_to_date_are_not_asked_about(calls):
    calls.current = set(PIPELINE.stages_of(RUNS[1]))
    assert workers.side_by_side(PIPELINE, RUNS, Places(None, 1)) == 0
    assert not [call for call, _ in calls.made[1:] if call[-1].endswith(f"-{RUNS[1]}")]
    assert len(calls.made) == 1 + 2 + 2


def test_eight_gpus_train_two_runs_of_four_groups_and_evaluate_on_one_each(calls):
    assert workers.side_by_side(PIPELINE, RUNS, Places(8, None)) == 0
    gpus = {call[-1]: given.split(",") for call, given in calls.made[1:]}
    assert calls.most == 2
    assert all(len(given) == (4 if stage.startswith("train") else 1) for stage, given in gpus.items())
    assert sorted(gpus[f"train_cityscapes_seed0@mini-{RUNS[0]}"]) == ["0", "1", "2", "3"]
    assert sorted(gpus[f"train_cityscapes_seed0@mini-{RUNS[1]}"]) == ["4", "5", "6", "7"]


def test_a_run_gets_what_its_groups_can_share_and_no_more_than_it_was_allowed():
    def counts(places, *groups):
        found = []
        for number in groups:
            found.append(len(taken := places.take(number)))
            places.give_back(taken)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
        assert counts(Places(8, None), 4, 8, 6, 1) == [4, 8, 6, 1]
        assert counts(Places(3, None), 4, 6) == [2, 3]
        assert counts(Places(8, None, 2), 4, 3, 8) == [2, 1, 2]


def test_a_run_that_wants_all_gpus_is_not_overtaken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    places, order = Places(8, None), []
    first, second = places.take(4), places.take(4)

    def want(groups):
        taken = places.take(groups)
        order.append(groups)
        places.give_back(taken)

    threads = [threading.Thread(target=want, args=(groups,)) for groups in (8, 4)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    places.give_back(first)
    time.sleep(0.05)
    assert order == []
    places.give_back(second)
    for thread in threads:
        thread.join(5)
    assert order == [8, 4]


def test_rows_live_in_their_own_file():
    row = row_runs(PIPELINE.params)[0]
    assert all(stage.startswith(f"{ROWS_FILE}:") for stage in PIPELINE.stages_of(row))


def test_gpus_are_counted_and_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert (Places(2, None).count, Places(None, 3).count) == (2, 3)
    assert Places(2, None).take(4) == ["2", "5"]
    with pytest.raises(UsageError, match="found 2 GPUs"):
        Places(3, None)
    for numbers in ((None, 0), (0, None), (2, None, 0)):
        with pytest.raises(UsageError, match="from 1"):
            Places(*numbers)
    for numbers in ((None, 2, 2), (None, None, 2), (1, None, 2)):
        with pytest.raises(UsageError, match="takes --gpus N with N from 2"):
            Places(*numbers)


def test_all_means_every_run():
    stages, runs = PIPELINE.wanted(["all"])
    assert stages == ["dvc.yaml", str(ROWS_FILE)]
    assert runs == list(PIPELINE.params.runs)
    assert len(runs) == 48


TOY = """
stages:
  train_a: {cmd: "echo once >> started; sleep 8; echo a > a", deps: [settings], outs: [{a: {cache: false}}]}
  train_b: {cmd: "sleep 1; echo b > b", deps: [settings], outs: [{b: {cache: false}}]}
  evaluate_a: {cmd: "cp a a.json", deps: [a], outs: [{a.json: {cache: false}}]}
  evaluate_b: {cmd: "cp b b.json", deps: [b], outs: [{b.json: {cache: false}}]}
  resolve: {cmd: "echo 1 > settings", outs: [{settings: {cache: false}}]}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Return a pipeline of real DVC with two runs, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([*workers.DVC, "init", "--no-scm", "-q"], check=True)
    (tmp_path / "dvc.yaml").write_text(TOY)
    settings = SimpleNamespace(schedule=SimpleNamespace(groups=4, accumulation_steps=1))
    return SimpleNamespace(
        stages_of=lambda run: [f"train_{run}", f"evaluate_{run}"],
        shared_stages=lambda _: ["resolve"],
        in_git=False,
        profile="mini",
        params=SimpleNamespace(resolve=lambda *_: SimpleNamespace(settings=settings)),
    )


@pytest.mark.slow
def test_dvc_keeps_the_locks_of_stages_that_ran_side_by_side(toy):
    assert workers.side_by_side(toy, ["a", "b"], Places(None, 2)) == 0
    status = subprocess.run([*workers.DVC, "status"], capture_output=True, text=True, check=True)
    assert "up to date" in status.stdout


@pytest.mark.slow
def test_a_second_command_waits_for_what_another_one_has_under_way(toy, tmp_path, capfd):
    subprocess.run([*workers.DVC, "repro", "resolve"], check=True)
    with subprocess.Popen([*workers.DVC, "repro", "--single-item", "train_a"]) as other:
        while not (tmp_path / "started").exists():
            time.sleep(0.1)
        assert workers.side_by_side(toy, ["a", "b"], Places(None, 2)) == 0
        assert other.wait() == 0
    assert "waiting for what runs in this folder already" in capfd.readouterr().err
    assert (tmp_path / "started").read_text() == "once\n"


def test_a_stage_of_which_only_files_are_missing_is_fresh_where_results_are_in_git(monkeypatch):
    found = {
        "missing": [{"changed outs": {"weights": "deleted"}}, {"changed deps": {"weights": "deleted"}}],
        "edited": [{"changed deps": {"settings": "modified", "weights": "deleted"}}],
        "new": [{"changed deps": {"resolved.json": "new"}}, {"changed outs": {"weights": "deleted"}}],
        "command": [{"changed outs": {"weights": "deleted"}}, "changed command"],
        "param": [{"changed deps": {"resolved.json": {"runs.a.train": "modified"}}}],
    }

    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    monkeypatch.setattr(workers.subprocess, "run", run)
    assert workers.changed({}, allow_missing=False) == set(found)
    assert workers.changed({}, allow_missing=True) == set(found) - {"missing"}
