import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mscs.params import load_params
from mscs.paths import resolve_all
from mscs.results import write_json
from reproduce.cli import main
from reproduce.compare import compare, differences, open_revision

ROOT = Path(__file__).parents[2]
RUN = "cityscapes-hrnet-hr48-ce-b8-40k"
SCHEDULE = "cityscapes-hrnet-hr48: {crop_size: [512, 1024], lr: 1.0e-2"


def git(*arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_results(values, torch="2.9.0"):
    """Write the mIoU per seed of some runs and what they were made with, and resolved.json."""
    write_json("results/mini/resolved.json", resolve_all(load_params(), "mini"))
    for run, seeds in values.items():
        settings = load_params().resolve(run).settings
        versions = {"numerics": settings.numerics["train"]}
        evaluation = {"digest": settings.digest("evaluate"), "numerics": settings.numerics["evaluate"]}
        costs = {"seconds": 1.0, "gpu_hours": None, "peak_bytes": 1}
        record = {"digest": settings.digest(), "settings": settings.flat() | {"numerics": settings.numerics}}
        for seed, miou in enumerate(seeds):
            folder = Path("results/mini/runs") / run / f"seed-{seed}"
            scores = {"ss": {"seeds": {str(seed): {"miou": miou}}}, "digest": settings.digest()}
            write_json(folder / "evaluation.json", scores | versions | {"evaluation": evaluation})
            write_json(folder / "run.json", record | costs | {"packages": {"torch": torch}})


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Make a repository with two commits: the learning rate of one schedule changed, three cells followed."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text().replace("\n  seeds: [0]", "\n  seeds: [0, 1, 2]")
    assert text.count(SCHEDULE) == 1
    Path("params.yaml").write_text(text)
    shutil.copy(ROOT / "numerics.yaml", tmp_path)
    git("init", "-q", "-b", "main")
    same = {"cityscapes-upernet-r101-ours": [60.0]}
    one, two = "cityscapes-hrnet-hr48-ours-b8-40k", "cityscapes-hrnet-hr48-ce-b8-80k"
    write_results({RUN: [40.0, 41.0, 42.0], one: [50.0, 52.0], two: [30.0], **same})
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "before")
    Path("params.yaml").write_text(text.replace(SCHEDULE, SCHEDULE.replace("1.0e-2", "2.0e-2")))
    write_results({RUN: [45.0, 46.0, 47.0], one: [51.0, 52.0], two: [33.0], **same}, torch="2.10.0")
    git("commit", "-q", "-a", "-m", "second")
    return tmp_path


def document_of(first, second):
    with open_revision(first) as a, open_revision(second) as b:
        return compare(a, b)


def test_one_learning_rate_and_its_effect(clone):
    found = document_of("before", "main")
    assert found["params"] == {"schedules.cityscapes-hrnet-hr48.lr": [0.01, 0.02]}
    expected = {
        run
        for run in load_params().runs
        if load_params().resolve(run).settings.schedule.name == "cityscapes-hrnet-hr48"
    }
    assert set(found["runs"]) == expected
    assert found["runs"][RUN]["settings"] == {"lr": [pytest.approx(0.1), pytest.approx(0.2)]}
    assert found["runs"][RUN]["scores"] == {"ss": [41.0, 46.0]}
    assert set(found["untouched_runs"]) == set(load_params().runs) - expected
    assert found["remarks"] == []


def test_cells_are_judged_against_seed_noise(clone):
    found = document_of("before", "main")
    moved = {(row["table"], row["run"]): row for row in found["moved"]}
    clear = moved["2b", RUN]
    assert clear["difference"] == pytest.approx(5)
    assert clear["error"] == pytest.approx((1 / 3 + 1 / 3) ** 0.5)
    assert clear["verdict"] == "moved beyond seed noise"
    assert moved["2a", "cityscapes-hrnet-hr48-ours-b8-40k"]["verdict"] == "within seed noise"
    assert "too few seeds" in moved["2b", "cityscapes-hrnet-hr48-ce-b8-80k"]["verdict"]
    assert [(row["table"], row["first"]) for row in found["unchanged"]] == [("1a", 60.0)]
    total = len(found["moved"]) + len(found["unchanged"]) + found["not_run"]
    from reproduce.cells import cells

    assert total == sum(cell.run is not None for cell in cells())


def test_the_working_tree_and_experiments_are_revisions(clone, capsys):
    git("update-ref", "refs/exps/ab/cdef/small-rate", "before")
    assert document_of("small-rate", "before")["params"] == {}
    Path("params.yaml").write_text(
        Path("params.yaml").read_text().replace("temperature: 0.1", "temperature: 0.2")
    )
    found = document_of("main", ".")
    assert found["params"] == {"defaults.temperature": [0.1, 0.2]}
    assert {row["verdict"] for row in found["moved"]} == {"stale"}
    assert all("ours" in row["run"] for row in found["moved"])
    assert [row["run"] for row in found["unchanged"] if "ours" in row["run"]] == []
    assert found["remarks"][0].startswith("working tree: params.yaml changed after its results")
    assert main(["compare", "main", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["second"] == {"name": "working tree", "commit": None}


def test_a_score_is_stale_after_a_change_of_how_it_is_made(clone):
    changed = Path("params.yaml").read_text().replace("absent_classes: skip", "absent_classes: zero")
    Path("params.yaml").write_text(changed)
    found = document_of("main", ".")
    assert {row["verdict"] for row in found["moved"]} == {"stale"}
    assert found["unchanged"] == []


def test_what_else_two_trainings_differ_in_is_named(clone):
    packages = {"packages.torch": ["2.9.0", "2.10.0"]}
    found = document_of("before", "main")["made_with"]
    assert found["cityscapes-upernet-r101-ours"] == packages
    assert found[RUN].items() > packages.items()
    assert set(found[RUN]) == {"settings", "packages.torch"}


def test_a_raised_version_touches_the_runs_that_use_the_unit(clone):
    text = Path("numerics.yaml").read_text()
    Path("numerics.yaml").write_text(text.replace("hrnet: {version: 1", "hrnet: {version: 2"))
    found = document_of("main", ".")
    params = load_params()
    expected = {run for run in params.runs if params.run_info(run)["model"] == "hrnet"}
    assert set(found["runs"]) == expected
    assert all(run["settings"] == {"numerics.hrnet": [1, 2]} for run in found["runs"].values())
    git("checkout", "-q", "numerics.yaml")
    text = Path("params.yaml").read_text()
    assert "log_every: 4\n" in text
    Path("params.yaml").write_text(text.replace("log_every: 4\n", "log_every: 5\n"))
    assert document_of("main", ".")["remarks"] == []


def test_the_same_revision_differs_in_nothing(clone):
    found = document_of("main", "HEAD")
    assert (found["params"], found["runs"], found["moved"], found["data"]) == ({}, {}, [], [])
    assert len(found["unchanged"]) > 1


def test_unknown_revisions_are_named_with_exit_code_2(clone, capsys):
    assert main(["compare", "no-such-branch", "main"]) == 2
    assert "unknown revision 'no-such-branch'" in capsys.readouterr().err


def test_a_text_comes_out(clone, capsys):
    assert main(["compare", "before", "main"]) == 0
    text = capsys.readouterr().out
    assert "schedules.cityscapes-hrnet-hr48.lr" in text
    assert "+5.00 ± 0.82" in text
    assert "moved beyond seed noise" in text


def test_leaves_that_differ():
    assert differences({"a": {"b": 1, "c": [1]}}, {"a": {"b": 2, "c": [1]}, "d": 0}) == {
        "a.b": [1, 2],
        "d": [None, 0],
    }
