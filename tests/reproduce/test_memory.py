import json
import math
import shutil

import pytest
import torch

from mscs.results import write_json
from reproduce.cells import cells
from reproduce.cli import main
from reproduce.memory import measure_runs, memory_runs, train_steps
from reproduce.tables import Results

ONE_SCALE_ALL = "cityscapes-hrnet-hr48-one-scale-all"


def fake(settings, backend):
    """Return the paper's numbers for the dense formula, and 5 GB for ours."""
    assert settings.schedule.crop_size == (512, 1024)
    assert settings.schedule.images_per_group == 2
    assert not settings.model.pretrained
    if backend == "auto":
        return 5.0
    if settings.loss.contrastive.sampling == "all":
        return 14.2 if settings.loss.contrastive.embedding_subsample == 2 else None
    return 7.4 if settings.loss.projector == "concat" else 9.7


def test_five_rows_are_measured_and_exhausted_memory_is_named(params):
    found = measure_runs(params, fake)
    assert list(found) == memory_runs()
    assert len(found) == 5
    assert found[ONE_SCALE_ALL] == {"dense_gb": "OOM", "ours_gb": 5.0}
    assert found[ONE_SCALE_ALL + "-s8"]["dense_gb"] == 14.2
    assert found["cityscapes-hrnet-hr48-ours-b8-40k"]["dense_gb"] == 9.7


def test_the_table_shows_the_dense_numbers(params, tmp_path):
    write_json(tmp_path / "paper" / "memory.json", {"runs": measure_runs(params, fake)})
    results = Results("paper", tmp_path)
    values = {cell.run: results.value(cell).number for cell in cells("2a") if cell.read == "memory"}
    assert values["cityscapes-hrnet-hr48-ours-all"] == "OOM"
    assert values["cityscapes-hrnet-hr48-one-scale"] == 7.4


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("run", ["cityscapes-hrnet-hr48-ours-b8-40k", ONE_SCALE_ALL + "-s8"])
def test_the_measured_steps_train(params, run, backend):
    overrides = {"crop_size": [64, 128], "images_per_group": 2, "threads": 1}
    settings = params.resolve(run, "mini", overrides).settings
    loss = train_steps(settings, backend, torch.device("cpu"))
    assert math.isfinite(loss)
    assert loss > 0


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["memory"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_dense_formula_runs_out_on_24_gb_and_ours_does_not(tmp_path, monkeypatch):
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["memory"]) == 0
    runs = json.loads((tmp_path / "results/mini/memory.json").read_text())["runs"]
    assert runs["cityscapes-hrnet-hr48-ours-all"]["dense_gb"] == "OOM"
    assert all(row["ours_gb"] != "OOM" for row in runs.values())
