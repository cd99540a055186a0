import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mscs.errors import UsageError
from mscs.params import load_params
from mscs.paths import resolve_all
from mscs.results import write_json
from reproduce import cli, stages
from reproduce.cells import TABLES, cells, claims, table_runs
from reproduce.pipeline import ROOT_FILE, ROWS_FILE, Pipeline, default_runs, own_code, render, row_runs

ROOT = Path(__file__).parents[2]
SETTINGS = ("params.yaml", "numerics.yaml")


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def pipeline(params):
    return Pipeline(params)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Settings and pipeline files of the project in a folder of their own, which is the current one."""
    for name in (*SETTINGS, ROOT_FILE, ROWS_FILE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def expanded(pipeline):
    """Return every single stage by DVC's name, as DVC fills in the matrix."""
    found = {}
    for path, document in pipeline.files().items():
        home = "" if path == ROOT_FILE else f"{ROWS_FILE}:"
        for name, stage in document["stages"].items():
            if "foreach" in stage:
                for key, item in stage["foreach"].items():
                    text = json.dumps(stage["do"])
                    for axis, value in item.items():
                        text = text.replace(f"${{item.{axis}}}", value)
                    found[f"{home}{name}@{key}"] = json.loads(text)
                continue
            axes = dict(stage["matrix"])
            for values in itertools.product(*axes.values()):
                text = json.dumps({key: value for key, value in stage.items() if key != "matrix"})
                for axis, value in zip(axes, values, strict=True):
                    text = text.replace(f"${{item.{axis}}}", value)
                found[f"{home}{name}@{'-'.join(values)}"] = json.loads(text)
    return found


def test_the_written_pipeline_is_the_described_one(pipeline):
    for path, document in pipeline.files().items():
        assert path.read_text() == render(document), f"{path} is stale: run `python -m reproduce pipeline`"


def test_every_run_of_params_is_in_exactly_one_pipeline(params, pipeline):
    default, rows = default_runs(params), row_runs(params)
    assert sorted(default + rows) == sorted(params.runs)
    for document, runs in zip(pipeline.files().values(), (default, rows), strict=True):
        for verb in ("train", "evaluate"):
            listed = [
                run
                for name, stage in document["stages"].items()
                if name.startswith(verb)
                for run in stage["matrix"]["run"]
            ]
            assert sorted(listed) == sorted(runs)


def test_a_training_depends_on_its_settings_and_data_and_an_evaluation_on_weights_too(params, pipeline):
    found = expanded(pipeline)
    for run in params.runs:
        data = f"results/mini/data/{params.run_info(run)['dataset']}.json"
        weights = f"work/mini/runs/{run}/weights/seed-0.safetensors"
        train, evaluate = (found[name] for name in pipeline.stages_of(run))
        assert (train["deps"], evaluate["deps"]) == ([data], [data, weights])
        assert train["outs"][0] == {weights: {"persist": True}}
        assert all(
            options == {"cache": False, "persist": True}
            for out in train["outs"][1:]
            for options in out.values()
        )
        for verb, stage in (("train", train), ("evaluate", evaluate)):
            assert stage["params"] == [{"results/mini/resolved.json": [f"runs.{run}.{verb}"]}]
            assert stage["cmd"] == f"reproduce/stage {verb} mini {run} 0"


def test_real_data_and_pinned_weights_are_fetched_for_the_runs_that_use_them(params):
    paper = Pipeline(params, "paper")
    found = expanded(paper)
    for run in params.runs:
        settings = params.resolve(run, "paper").settings
        dataset, backbone = settings.data.name, settings.model.backbone
        train, evaluate = (found[name] for name in paper.stages_of(run))
        data, weights = f"results/paper/data/{dataset}.json", f"results/paper/weights/{backbone}.json"
        assert train["deps"] == [data, weights]
        assert train["cmd"] == f"reproduce/stage train paper {run} 0"
        assert evaluate["deps"][0] == data
        assert weights not in evaluate["deps"]
        makers = [found[name] for name in paper.shared_stages([run])]
        assert [list(stage["outs"][0]) for stage in makers[1:]] == [[data], [weights]]
        assert f"results/paper/fetch/{dataset}.json" in makers[1]["deps"]
    made = [path for stage in found.values() if "fetch" in stage["cmd"] for path in stage["outs"][0]]
    datasets = paper.datasets(params.runs)
    assert sorted(made) == sorted(f"results/paper/fetch/{dataset}.json" for dataset in datasets)


def test_a_run_without_pinned_weights_waits_for_none(folder):
    replace(
        folder / "params.yaml", "  paper: {}", "  paper: {runs: {cadis-ocrnet-r50-ce: {pretrained: own.pth}}}"
    )
    paper = Pipeline(load_params(), "paper")
    own, pinned = (expanded(paper)[paper.stages_of(f"cadis-ocrnet-r50-{loss}")[0]] for loss in ("ce", "ours"))
    assert set(own["deps"]) == {"results/paper/data/cadis.json"}
    assert set(pinned["deps"]) == {*own["deps"], "results/paper/weights/resnet50.tv_in1k.json"}


def test_a_second_seed_adds_its_stages_and_leaves_the_first_ones(pipeline, folder):
    before = expanded(pipeline)
    replace(folder / "params.yaml", "\n  seeds: [0]", "\n  seeds: [0, 1]")
    params = load_params()
    after = expanded(Pipeline(params))
    jobs = [name for run in params.runs for name in pipeline.stages_of(run)]
    assert {name: after[name] for name in jobs} == {name: before[name] for name in jobs}
    assert after.keys() - before.keys() == {name.replace("_seed0@", "_seed1@") for name in jobs}
    for table in TABLES:
        deps = set(after[f"tables_{table}@mini"]["deps"])
        files = [f"results/mini/runs/{run}/seed-" for run in table_runs(table)]
        assert {f"{path}{seed}/evaluation.json" for path in files for seed in (0, 1)} <= deps


def test_a_second_seed_of_the_first_run_leaves_every_stage_of_all_runs(pipeline, folder):
    before, first = expanded(pipeline), pipeline.params.runs[0]
    replace(folder / "params.yaml", f"{first}: {{", f"{first}: {{seeds: [0, 1], ")
    after = expanded(Pipeline(load_params()))
    assert {name for name in before if name.startswith(("train", "evaluate"))} <= after.keys()
    added = {name.replace("_seed0@", "_seed1@") for name in pipeline.stages_of(first)}
    assert after.keys() - before.keys() == added


def test_pipeline_files_that_do_not_fit_are_refused_with_the_remedy(folder, capsys):
    remedy = "write it anew with `python -m reproduce pipeline`"
    replace(folder / "params.yaml", "\n  seeds: [0]", "\n  seeds: [0, 1]")
    with pytest.raises(UsageError, match=r"dvc\.yaml does not fit params\.yaml") as caught:
        Pipeline(load_params()).check()
    assert remedy in str(caught.value)
    for refused in (lambda: stages.run(["resolve", "mini"]), lambda: cli.main(["run", "2b"])):
        assert refused() == 2
        assert remedy in capsys.readouterr().err
    assert not (folder / "results").exists()
    assert cli.main(["pipeline"]) == 0
    Pipeline(load_params()).check()
    assert stages.run(["resolve", "mini"]) == 0
    (folder / ROWS_FILE).unlink()
    with pytest.raises(UsageError, match=r"rows/dvc\.yaml does not fit"):
        Pipeline(load_params()).check()


@pytest.mark.parametrize(
    ("unit", "phases", "uses"),
    [
        ("contrastive", {"train"}, lambda settings: settings.loss.contrastive is not None),
        ("hrnet", {"train", "evaluate"}, lambda settings: settings.model.name == "hrnet"),
        ("metrics", {"evaluate"}, lambda settings: True),
    ],
)
def test_a_raised_version_changes_the_identity_of_the_runs_that_use_the_unit(folder, unit, phases, uses):
    before = resolve_all(load_params(), "mini")
    replace(folder / "numerics.yaml", f"{unit}: {{version: 1", f"{unit}: {{version: 2")
    params = load_params()
    after = resolve_all(params, "mini")
    changed = {
        (run, part)
        for run, parts in before["runs"].items()
        for part in parts
        if parts[part] != after["runs"][run][part]
    }
    used = [run for run in params.runs if uses(params.resolve(run, "mini").settings)]
    assert changed == {(run, phase) for run in used for phase in phases}
    assert before["datasets"] == after["datasets"]


def test_every_cell_is_filled_by_a_known_run_or_cited(params):
    for cell in cells():
        assert cell.source
        assert cell.run in params.runs if cell.run else "cited" in cell.source
    for claim in claims():
        assert {claim.better, claim.worse} <= set(params.runs)
    assert [len(list(cells(table))) for table in TABLES] == [6, 2, 10, 8, 25]


def test_cells_ask_only_for_what_their_run_evaluates(params):
    for cell in cells():
        if cell.run and cell.read in ("ss", "ms"):
            assert cell.read in params.resolve(cell.run, "paper").settings.evaluation.modes


def test_a_table_depends_on_its_own_runs_only(pipeline):
    stages = pipeline.files()[ROOT_FILE]["stages"]
    for table in TABLES:
        deps = [dep for dep in stages[f"tables_{table}"]["deps"] if dep.endswith("evaluation.json")]
        assert len(deps) == len(table_runs(table))


def test_code_that_a_stage_loads_of_this_package_is_what_it_depends_on():
    """Import the modules for real and compare the loaded files with the listed ones."""
    for module in ("reproduce.tables", "reproduce.report", "reproduce.tsne", "reproduce.qualitative"):
        code = f"import sys, {module}; print(*(m for m in sys.modules if m.startswith('reproduce.')))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = {f"{name.replace('.', '/')}.py" for name in done.stdout.split()}
        assert loaded <= set(own_code(module)), module


@pytest.mark.parametrize(
    ("target", "stage"),
    [
        ("2b", "tables_2b@mini"),
        ("fig1", "tsne@mini"),
        ("fig3", "qualitative@mini"),
        ("cityscapes", "data@mini-cityscapes"),
        ("cadis-ocrnet-r50-ours", "evaluate_cadis_seed0@mini-cadis-ocrnet-r50-ours"),
        ("ade20k-ocrnet-hr48-ce", "reproduce/rows/dvc.yaml:evaluate_ade20k_seed0@mini-ade20k-ocrnet-hr48-ce"),
        ("pascal_context", "reproduce/rows/dvc.yaml:data@mini-pascal_context"),
    ],
)
def test_targets_name_stages_that_exist(pipeline, target, stage):
    assert pipeline.wanted([target])[0] == [stage]
    assert stage in expanded(pipeline)


def test_an_unknown_target_names_the_nearest(pipeline):
    with pytest.raises(UsageError, match="did you mean 'cadis-ocrnet-r50-ours'"):
        pipeline.wanted(["cadis-ocrnet-r50-our"])


def test_a_profile_with_a_choice_of_runs_has_a_file_of_its_own(params):
    small = Pipeline(params, "small")
    (path,) = small.files()
    assert str(path) == "reproduce/small/dvc.yaml"
    assert yaml.safe_load((ROOT / path).read_text()) == small.files()[path]
    stages, runs = small.wanted(["2b", "fig3"])
    assert all(stage.startswith("reproduce/small/dvc.yaml:") for stage in stages)
    assert set(runs) == {run for run in table_runs("2b") if run in params.runs_of("small")}
    assert len(stages) == 3 * len(runs) + 1, "three seeds of each, and the figure"
    assert small.wanted([]) == (["reproduce/small/dvc.yaml"], small.default)
    with pytest.raises(UsageError, match="target of profile small 'fig2'; did you mean 'fig"):
        small.wanted(["fig2"])


def test_params_name_a_profile_that_has_all_runs(folder, capsys):
    replace(folder / "params.yaml", "\nprofile: mini", "\nprofile: small")
    assert cli.main(["run", "--profile", "paper", "2b"]) == 2
    assert "python -m reproduce run --profile small" in capsys.readouterr().err


def test_only_results_in_git_are_metrics_of_the_project(params):
    root = Pipeline(params).files()[Path("dvc.yaml")]
    assert root["metrics"] == [f"results/small/tables/{table}.json" for table in ("1a", "1b", "2a", "2b")]
    assert not any("metrics" in stage or "plots" in stage for stage in root["stages"].values())
    paper = Pipeline(params, "paper").files()[Path("dvc.yaml")]
    assert "metrics" in paper["stages"]["evaluate_cityscapes_seed0"]


def dvc(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def changed_stages(folder):
    return {line.rstrip(":") for line in dvc(folder, "status").splitlines() if line and not line[0].isspace()}


def fake_outputs(folder, found):
    """Write something into every declared output of some stages."""
    for stage in found.values():
        for out in [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, ())]:
            path = folder / (out if isinstance(out, str) else next(iter(out)))
            if not path.exists():
                write_json(path, {})


@pytest.fixture(scope="module")
def project(tmp_path_factory, pipeline):
    """Copy the project and pretend that everything has run but the rows, whose stages behave alike."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    for name in ("mscs", "reproduce"):
        ignored = shutil.ignore_patterns("__pycache__", "small")  # a pipeline of its own
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in (*SETTINGS, "dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    dvc(folder, "init", "--no-scm", "-q")
    resolve(folder)
    fake_outputs(folder, {name: x for name, x in expanded(pipeline).items() if ":" not in name})
    dvc(folder, "commit", "-f", "-q")
    assert changed_stages(folder) <= {"Data and pipelines are up to date."}
    return folder


def resolve(folder):
    """Do what `dvc repro resolve@mini` does, but for the pipeline of the rows, which is put aside."""
    aside, place = folder / "rows.yaml", folder / ROWS_FILE
    if aside.exists():
        aside.rename(place)
    subprocess.run(["sh", "reproduce/stage", "resolve", "mini"], cwd=folder, check=True)
    place.rename(aside)
    if (folder / "dvc.lock").exists():
        dvc(folder, "commit", "-f", "-q", "resolve@mini")


def after(folder, path, old, new):
    """Return the stages that an edit makes stale, then take it back."""
    text = (folder / path).read_text()
    replace(folder / path, old, new)
    resolve(folder)
    found = changed_stages(folder)
    (folder / path).write_text(text)
    resolve(folder)
    # the report shows everything, so it may change with anything
    return {name for name in found if "@" in name} - {"report@mini"}


@pytest.mark.slow
def test_an_edit_reaches_the_stages_that_use_it_and_no_others(project):
    """Edit one thing at a time and ask `dvc status`."""
    run = "cityscapes-upernet-swins-ours-fpn: {"
    assert after(project, "params.yaml", run, run + "lr: 0.003, ") == {
        "train_cityscapes_seed0@mini-cityscapes-upernet-swins-ours-fpn"
    }
    row = "cadis-ocrnet-r50: {crop_size: [540, 960], lr: 1.0e-4, lr_schedule: exp, weight_decay: 0.0"
    pair = {f"train_cadis_seed0@mini-cadis-ocrnet-r50-{loss}" for loss in ("ce", "ours")}
    assert after(project, "params.yaml", row, row.replace("0.0", "0.1")) == pair
    edited = after(project, "reproduce/tables.py", '"""Result files', '"""Results files')
    assert edited == {f"tables_{table}@mini" for table in TABLES}
    assert after(project, "params.yaml", "log_every: 4\n", "log_every: 5\n") == set()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["mscs/losses/contrastive.py", "mscs/train.py", "mscs/models/hrnet.py"])
def test_a_comment_makes_nothing_stale(project, path):
    assert after(project, path, "\n\n\n", "\n\n\n# a comment\n") == set()


@pytest.mark.slow
def test_a_raised_version_makes_the_stages_of_the_runs_that_use_the_unit_stale(project, params, pipeline):
    found = after(project, "numerics.yaml", "hrnet: {version: 1", "hrnet: {version: 2")
    runs = [run for run in default_runs(params) if params.run_info(run)["model"] == "hrnet"]
    assert runs
    jobs = {name for run in runs for name in pipeline.stages_of(run)}
    assert {name for name in found if name.startswith(("train", "evaluate"))} == jobs
    assert found - jobs == {"qualitative@mini"}  # its networks are of the unit; tables follow their files
