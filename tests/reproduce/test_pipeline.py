import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mscs.errors import UsageError
from reproduce.cli import stages_of
from reproduce.cells import TABLES, cells, claims, table_runs
from reproduce.pipeline import build, default_runs, imports_of, render, row_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_written_pipeline_is_the_described_one(params):
    for path, document in build(params).items():
        assert path.read_text() == render(document), f"{path} is stale: run `python -m reproduce pipeline`"


def test_every_run_of_params_is_in_exactly_one_pipeline(params):
    default, rows = default_runs(params), row_runs(params)
    assert sorted(default + rows) == sorted(params.runs)
    documents = list(build(params).values())
    for document, runs in zip(documents, (default, rows), strict=True):
        for verb in ("train", "evaluate"):
            listed = [
                run
                for name, stage in document["stages"].items()
                if name.startswith(verb)
                for run in stage["matrix"]["run"]
            ]
            assert sorted(listed) == sorted(runs)


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
            assert cell.read in params.resolve(cell.run, "paper").settings.evaluation


def test_a_table_depends_on_its_own_runs_only(params):
    stages = build(params)[Path("dvc.yaml")]["stages"]
    for table in TABLES:
        deps = [dep for dep in stages[f"tables_{table}"]["deps"] if dep.endswith("evaluation.json")]
        assert len(deps) == len(table_runs(table))


def test_imports_are_followed_through_lazy_packages():
    files = imports_of("mscs.engine")
    assert {
        "mscs/engine.py",
        "mscs/models/hrnet.py",
        "mscs/losses/multiscale.py",
        "mscs/transforms.py",
    } <= set(files)
    assert not {"mscs/datasets/toy.py", "mscs/inference.py", "mscs/models/convert.py", "mscs/cli.py"} & set(
        files
    )


def test_code_that_training_loads_is_what_its_stage_depends_on():
    """Import the engine for real and compare the loaded files of ours with the listed ones."""
    code = (
        "import sys, mscs.engine, mscs.models.build, mscs.datasets.base;"
        "print('\\n'.join(m for m in sys.modules if m.startswith('mscs')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = set(imports_of("mscs.engine"))
    for module in done.stdout.split():
        path = Path(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert str(file) in listed or file == Path("mscs/__init__.py"), file


@pytest.mark.parametrize(
    ("target", "stage"),
    [
        ("2b", "tables_2b@mini"),
        ("fig1", "tsne@mini"),
        ("fig3", "qualitative@mini"),
        ("cityscapes", "data@mini-cityscapes"),
        ("cadis-ocrnet-r50-ours", "evaluate_cadis@mini-cadis-ocrnet-r50-ours"),
        ("ade20k-ocrnet-hr48-ce", "reproduce/rows/dvc.yaml:evaluate_ade20k@mini-ade20k-ocrnet-hr48-ce"),
        ("pascal_context", "reproduce/rows/dvc.yaml:data@mini-pascal_context"),
    ],
)
def test_targets_name_stages_that_exist(params, target, stage):
    assert stages_of(target, params) == [stage]


def test_an_unknown_target_names_the_nearest():
    from mscs.params import load_params

    with pytest.raises(UsageError, match="did you mean 'cadis-ocrnet-r50-ours'"):
        stages_of("cadis-ocrnet-r50-our", load_params())


def dvc(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def changed_stages(folder):
    return {line.rstrip(":") for line in dvc(folder, "status").splitlines() if line and not line[0].isspace()}


def fake_outputs(folder, document, params):
    """Write something into every declared output of the pipeline."""
    for stage in document["stages"].values():
        matrix = stage["matrix"]
        names = matrix.get("run") or matrix.get("dataset") or [""]
        for kind in ("outs", "metrics", "plots"):
            for out in stage.get(kind, ()):
                for name in names:
                    path = out if isinstance(out, str) else next(iter(out))
                    path = path.replace("${item.profile}", "mini").replace("${item.run}", name)
                    path = folder / path.replace("${item.dataset}", name)
                    if not path.exists():
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text("{}\n") if path.suffix else path.mkdir()


@pytest.mark.slow
def test_an_edit_reaches_the_stages_that_use_it_and_no_others(params, tmp_path):
    """Pretend that everything has run, then edit one thing at a time and ask `dvc status`."""
    folder = tmp_path / "project"
    for name in ("mscs", "reproduce"):
        shutil.copytree(name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml", ".dvcignore"):
        shutil.copy(name, folder / name)
    (folder / "reproduce/rows/dvc.yaml").unlink()
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    dvc(folder, "init", "--no-scm", "-q")
    resolve = ["sh", "reproduce/stage", "resolve", "mini"]
    subprocess.run(resolve, cwd=folder, check=True)
    document = yaml.safe_load((folder / "dvc.yaml").read_text())
    fake_outputs(folder, document, params)
    dvc(folder, "commit", "-f", "-q")
    assert changed_stages(folder) <= {"Data and pipelines are up to date."}

    def after(path, old, new):
        original = (folder / path).read_text()
        assert old in original
        (folder / path).write_text(original.replace(old, new, 1))
        subprocess.run(resolve, cwd=folder, check=True)
        dvc(folder, "commit", "-f", "-q", "resolve@mini")
        found = changed_stages(folder)
        (folder / path).write_text(original)
        subprocess.run(resolve, cwd=folder, check=True)
        dvc(folder, "commit", "-f", "-q", "resolve@mini")
        # the report shows everything, so it may change with anything
        return {name for name in found if "@" in name} - {"report@mini"}

    run = "cityscapes-upernet-swins-ours-fpn: {"
    assert after("params.yaml", run, run + "lr: 0.003, ") == {
        "train_cityscapes@mini-cityscapes-upernet-swins-ours-fpn"
    }
    row = "cadis-ocrnet-r50: {crop_size: [540, 960], lr: 1.0e-4, lr_schedule: exp, weight_decay: 0.0"
    pair = {f"train_cadis@mini-cadis-ocrnet-r50-{loss}" for loss in ("ce", "ours")}
    assert after("params.yaml", row, row.replace("0.0", "0.1")) == pair | {"qualitative@mini"}
    edited = after("reproduce/tables.py", '"""Result files', '"""Results files')
    assert {name.split("_")[0] for name in edited} <= {"tables"}
    edited = after("mscs/inference.py", '"""From one image', '"""From each image')
    assert {name.split("@")[0] for name in edited} >= {
        "evaluate_cityscapes",
        "evaluate_ade20k",
        "evaluate_cadis",
    }
    assert not [name for name in edited if name.startswith("train")]
