import json
import shutil
from pathlib import Path

import pytest

from mscs.results import write_json
from reproduce.cards import data_card, write_cards
from reproduce.cli import main
from reproduce.tables import STAMPS, Results

ROOT = Path(__file__).parents[2]
RUN = "cityscapes-hrnet-hr48-ours-b8-40k"


def evaluation(seed, miou, classes, ious):
    seeds = {str(seed): {"miou": miou, "class_iou": ious}}
    return {
        "ss": {"seeds": seeds},
        "majority_miou": 1.5,
        "classes": classes,
    }


@pytest.fixture
def results(tmp_path):
    """One evaluated run without a run record, and one checked dataset."""
    found = Results("mini", tmp_path)
    names = [f"class {i}" for i in range(8)]
    for seed, miou in enumerate((30.75, 31.25, 31.75)):
        document = evaluation(seed, miou, names, [90.0, 1.0, 80.0, None, 2.0, 70.0, 3.0, 60.0])
        write_json(found.root / "runs" / RUN / f"seed-{seed}" / "evaluation.json", document)
    manifest = {
        "dataset": "cadis",
        "generated": True,
        "splits": {"train": 48, "val": 12},
        "digest": "0123abcd",
        "colour_miou": 12.345,
    }
    write_json(found.root / "data" / "cadis.json", manifest)
    return found


def test_a_card_for_each_run_and_dataset_that_is_there(results, params):
    paths = write_cards(results)
    assert [path.name for path in paths] == [f"model-{RUN}.md", "data-cadis.md"]
    assert all(path.parent == results.root / "cards" and path.exists() for path in paths)


def test_model_card_shows_scores_settings_sources_and_ledger(results, params):
    text = write_cards(results)[0].read_text()
    assert STAMPS["mini"] in text
    assert "| ss | 31.25 ± 0.50 | 3 |" in text
    assert "| 2b | HRNet / +ours / 8 | mIoU 40K | 81.5 | 31.2 ± 0.5 (n=3) |  | ran |" in text
    steps = params.resolve(RUN, "mini").settings.schedule.steps
    assert f"| steps | {steps} | supplement, Table 2(b)" in text
    assert "| weight-decay-cityscapes | 5e-05 |" in text
    assert "cadis-padding" not in text


def test_weakest_classes_come_first_and_absent_ones_not_at_all(results, params):
    text = write_cards(results)[0].read_text()
    weakest = text.split("## Weakest classes")[1].split("## Training")[0]
    found = [line.split(" | ")[0] for line in weakest.splitlines() if line[8:9].isdigit()]
    assert found == [f"| class {i}" for i in (1, 4, 6, 7, 5)]


@pytest.mark.parametrize(("gpus", "hardware"), [(["some card"], "some card"), ([], "some processor")])
def test_what_a_run_was_trained_with_wins_over_params(results, gpus, hardware):
    record = {
        "seconds": 12.0,
        "peak_bytes": 3 * 2**30,
        "gpu_hours": 0.25,
        "settings": {"lr": 0.123, "seeds": [0], "recipe": "code"},
        "world_size": 4,
        "data": None,
        "git": {"commit": "abc", "dirty": True},
        "packages": {"torch": "2"},
        "machine": {"cpu": "some processor", **({"gpus": gpus} if gpus else {})},
        "image": None,
        "finished": "2026-01-01T00:00:00Z",
    }
    write_json(results.root / "runs" / RUN / "seed-0" / "run.json", record)
    text = write_cards(results)[0].read_text()
    assert "| lr | 0.123 |" in text
    assert "| weight-decay-cityscapes | 0.0005 |" in text  # what recipe code takes
    for line in ("| commit | abc with changes |", f"| hardware | {hardware} |", "| processes | 4 |"):
        assert line in text
    assert "| peak memory of a process (GiB) | 3.0 |" in text
    assert "| GPU-hours | 0.2 |" in text


def test_data_card_tells_generated_from_published(results, params):
    text = write_cards(results)[1].read_text()
    assert text.startswith("# Data card: cadis")
    assert "Generated scenes" in text
    assert "| train | 48 | 3550 |" in text
    assert "| cadis, task 2 | 17 |" in text
    assert "12.3" in text
    manifest = json.loads((results.root / "data" / "cadis.json").read_text())
    assert "Generated" not in data_card("cadis", {**manifest, "generated": False}, "profile paper")


def test_the_command_counts_what_it_wrote(results, tmp_path, monkeypatch, capsys, params):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(tmp_path)
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    assert main(["cards", "--profile", "mini"]) == 0
    assert capsys.readouterr().out.startswith("2 cards: ")
