"""Costs from measurements that are known, and their honest absence."""

import json

import pytest

from mscs import paths
from mscs.errors import UsageError
from mscs.params import load_params
from mscs.results import write_json
from reproduce import cli as command
from reproduce import plan
from reproduce.cells import TSNE_RUNS, table_runs
from reproduce.pipeline import Pipeline, default_runs

RUN = "cityscapes-hrnet-hr48-ours-b8-40k"
DEVICE = "a device"


@pytest.fixture
def params(monkeypatch, tmp_path):
    loaded = load_params()
    monkeypatch.setattr(plan, "WORK", tmp_path / "work")
    monkeypatch.setattr(paths, "WORK", tmp_path / "work")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plan, "MEASURED", tmp_path / "measured")
    return loaded


def measured(settings, folder, device=DEVICE, step_ms=250.0, **changes):
    options = {key: getattr(settings.machine, key) for key in plan.OPTIONS}
    row = {"row": settings.schedule.name, "options": options, "step_ms": step_ms, "peak_bytes": 2**30}
    row |= {"loss": settings.loss.name, "batch": settings.schedule.images_per_group}
    document = {
        "device": device,
        "profile": settings.profile,
        "quick": False,
        "results": [{**row, **changes}],
    }
    write_json(folder / "step-here.json", document)


def test_hours_are_steps_times_four_groups(params, tmp_path):
    settings = params.resolve(RUN).settings
    measured(settings, tmp_path / "measured")
    (cost,) = plan.costs([params.resolve(RUN).settings], DEVICE)
    assert cost.steps == settings.schedule.steps
    assert cost.images == settings.schedule.steps * settings.schedule.batch_size
    assert cost.hours == pytest.approx(settings.schedule.steps * 4 * 0.25 / 3600)
    assert cost.group_bytes == 2**30


@pytest.mark.parametrize(
    "other",
    [
        {"device": "another"},
        {"row": "cadis-x"},
        {"loss": "ce"},
        {"batch": 3},
        {"options": dict.fromkeys(plan.OPTIONS)},
        {"failed": "x"},
    ],
)
def test_what_was_not_measured_is_unknown(params, tmp_path, other):
    settings = params.resolve(RUN).settings
    measured(settings, tmp_path / "measured", **{"device": DEVICE, **other})
    found = plan.costs([params.resolve(RUN).settings], DEVICE)
    assert found[0].hours is None
    document = plan.document(found, DEVICE, 1)
    assert document["total"]["wall_hours"] is None
    assert "unknown" in plan.text(document)


def test_a_run_is_done_only_under_its_own_settings(params, tmp_path):
    settings = params.resolve(RUN).settings
    folder = tmp_path / "results" / settings.profile / "runs" / RUN / "seed-0"
    assert plan.state(settings, 0) == "to do"
    record = {"digest": settings.digest(), "settings": settings.flat()}
    write_json(folder / "run.json", record)
    assert plan.state(settings, 0) == "trained"
    assert plan.state(settings, 1) == "to do"
    write_json(folder / "evaluation.json", {})
    assert plan.state(settings, 0) == "done"
    write_json(folder / "run.json", {**record, "digest": "of other settings"})
    assert plan.state(settings, 0) == "to do"
    before = {"numerics": {"train": {**settings.numerics["train"], "hrnet": 0}}}
    write_json(folder / "run.json", {**record, "settings": before})
    assert plan.state(settings, 0) == "to do"


def test_a_run_that_has_begun_costs_what_is_left(params, tmp_path):
    settings = params.resolve(RUN).settings
    measured(settings, tmp_path / "measured")
    folder = tmp_path / "work" / settings.profile / "checkpoints" / f"{RUN}-{settings.digest()}" / "seed-0"
    for step in (4, settings.schedule.steps // 2):
        write_json(folder / f"step-{step:08d}.json", {"step": step})
    (cost,) = plan.costs([params.resolve(RUN).settings], DEVICE)
    assert (cost.state, cost.left) == ("started", settings.schedule.steps - settings.schedule.steps // 2)
    document = plan.document([cost], DEVICE, 1)
    assert document["to_do"]["hours"] == pytest.approx(document["total"]["hours"] / 2)
    assert document["to_do"]["steps"] == cost.left


def test_the_wall_time_is_that_of_the_device_which_ends_last():
    assert plan.wall_hours([3, 1, 1, 2], 1) == 7
    assert plan.wall_hours([3, 1, 1, 2], 2) == 4
    assert plan.wall_hours([3, 1], 4) == 3
    assert plan.wall_hours([], 2) == 0


def test_the_command_prints_every_run_of_a_table(params, capsys):
    assert command.main(["plan", "2b", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {run["run"] for run in document["runs"]} == set(table_runs("2b"))
    assert document["to_do"]["runs"] == len(document["runs"])


def test_targets_that_train_nothing_and_unknown_ones(params):
    pipeline = Pipeline(params)
    assert pipeline.wanted(["cityscapes"])[1] == []
    assert pipeline.wanted(["fig1"])[1] == list(TSNE_RUNS)
    assert pipeline.wanted(["report"])[1] == pipeline.wanted([])[1] == default_runs(params)
    assert pipeline.wanted([])[0] == []
    with pytest.raises(UsageError, match="2c"):
        pipeline.wanted(["2c"])


@pytest.mark.parametrize("verb", ["tables", "report", "cards", "verify", "resolve", "memory"])
def test_an_unknown_profile_is_refused_before_anything_is_written(verb, capsys):
    assert command.main([verb, "--profile", "foo"]) == 2
    assert "unknown profile 'foo'" in capsys.readouterr().err
    assert not command.RESULTS.joinpath("foo").exists()
