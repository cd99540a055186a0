"""Which cells are judged: the paper's own measurements, never what it cites from others."""

import shutil

import pytest

from mscs.results import write_json
from reproduce.cells import cells, claims
from reproduce.tables import Results, body, notes, write_table
from reproduce.verify import verify

CE, OURS = "ade20k-upernet-swinb22k-ce", "ade20k-upernet-swinb22k-ours"


def write_seed(results, run, seed, ss, ms):
    scores = {mode: {"seeds": {str(seed): {"miou": miou}}} for mode, miou in (("ss", ss), ("ms", ms))}
    write_json(results.root / "runs" / run / f"seed-{seed}" / "evaluation.json", scores)


@pytest.fixture
def results(tmp_path):
    """Results of profile paper: Swin-B far from the cited CE values, our loss as printed."""
    found = Results("paper", tmp_path)
    for run, ss, ms in ((CE, 46.0, 47.0), (OURS, 51.3, 52.2)):
        write_seed(found, run, 0, ss, ms)
    return found


def rows_of(outcome, run_row, column):
    [row] = [
        row for row in outcome.document["cells"] if row["row"].startswith(run_row) and row["column"] == column
    ]
    return row


def test_cited_values_and_gains_over_them_are_shown_and_not_judged(results):
    outcome = verify(results)
    cited = rows_of(outcome, "UPerNet / Swin-B† / CE", "mIoU ss")
    assert (cited["paper"], cited["ours"], cited["status"]) == (50.1, 46.0, "cited, not judged")
    assert cited["difference"] == pytest.approx(-4.1)
    gain = rows_of(outcome, "UPerNet / Swin-B† / ours", "Improvement ss")
    assert (gain["status"], gain["difference"]) == ("not judged", pytest.approx(4.1))
    assert rows_of(outcome, "UPerNet / Swin-B† / ours", "mIoU ss")["status"] == "reproduced"
    assert outcome.exit_code == 0
    assert "| 50.1 | 46.0 | -4.1 | cited, not judged |" in outcome.markdown


def test_our_own_measurements_and_directions_still_set_the_exit_code(results):
    for seed, miou in enumerate((39.9, 40.0, 40.1)):
        write_seed(results, OURS, seed, miou, miou)
    outcome = verify(results)
    assert rows_of(outcome, "UPerNet / Swin-B† / ours", "mIoU ss")["status"] == "not reproduced"
    assert outcome.exit_code == 1


def test_every_cited_value_with_a_run_of_ours_is_unjudged_and_nothing_else_but_gains():
    unjudged = [cell for cell in cells() if not cell.judged]
    assert len(unjudged) == 8
    assert all("cited" in cell.source or cell.over for cell in unjudged)
    assert not any("cited" in cell.source and cell.run and cell.judged for cell in cells())
    assert {claim.better for claim in claims("3")} >= {OURS}


def test_table_3_shows_the_daggers_and_what_they_mean(results):
    daggered = {row[1] for row in body("3", results) if "†" in row[1]}
    assert daggered == {"Swin-B†", "Swin-L†", "ViT-L/16†", "T-Large†"}
    assert [row[1] for row in body("3", results) if "†" not in row[1]] == ["MiT-B5"]
    assert any("†" in note and "ImageNet-22k" in note for note in notes("3"))
    write_table("3", results)
    folder = results.root / "tables"
    assert "† ImageNet-22k" in (folder / "3.md").read_text()
    assert "not explain" in (folder / "3.md").read_text()
    tex = (folder / "3.tex").read_text()
    assert r"ViT-L/16$^\dagger$" in tex
    assert "†" not in tex


def test_profile_mini_shows_no_difference_to_the_paper(results):
    mini = Results("mini", results.root.parent)
    for run in (CE, OURS):
        shutil.copytree(results.root / "runs" / run, mini.root / "runs" / run)
    scores = [row[7:11] for row in body("3", mini) if row[1] == "Swin-B†"]
    assert scores == [["50.1 [cited]", "46.0", "", "ran"], ["51.3", "51.3", "", "ran"]]
