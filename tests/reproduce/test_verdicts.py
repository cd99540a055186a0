import json
import shutil
from pathlib import Path

import pytest

from mscs.results import write_json
from reproduce.cells import claims
from reproduce.cli import main
from reproduce.tables import STAMPS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """Return what writes the mIoU over three seeds of the runs behind the first claim, for a profile."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    claim = next(claims("2b"))

    def write(profile, better, worse):
        for run, miou in ((claim.better, better), (claim.worse, worse)):
            for seed, value in enumerate((miou - 0.3, miou, miou + 0.3)):
                path = Path("results") / profile / "runs" / run / f"seed-{seed}" / "evaluation.json"
                write_json(path, {claim.read: {"seeds": {str(seed): {"miou": value}}}})
        return claim

    return write


@pytest.mark.parametrize(
    ("better", "worse", "status", "code"),
    [
        (81.5, 79.1, "holds", 0),
        (79.2, 79.1, "within seed noise", 1),  # a value that is off fails too
        (79.1, 81.5, "contradicted", 1),
    ],
)
def test_a_direction_is_judged_by_the_spread_of_its_seeds(scores, better, worse, status, code, capsys):
    claim = scores("paper", better, worse)
    assert main(["verify", "--profile", "paper", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    (row,) = (row for row in document["claims"] if row["claim"] == claim.text)
    assert (row["status"], row["n"]) == (status, 3)
    assert row["error"] == pytest.approx((2 * 0.3**2 / 3) ** 0.5)
    text = Path("results/paper/verify.md").read_text()
    assert f"| 2b | {claim.text} | {better - worse:+.2f} ± 0.24 | {status} |" in text


def test_mini_says_what_ran_and_judges_no_direction(scores, capsys):
    claim = scores("mini", 10.0, 20.0)
    assert main(["verify", "--profile", "mini"]) == 0
    text = capsys.readouterr().out
    assert STAMPS["mini"] in text
    assert claim.text not in text
    assert "| 2b | HRNet / +ours / 8 | mIoU 40K | 81.5 | 10.0 |  | ran |" in text
    assert "| same count |" in text
    document = json.loads(Path("results/mini/verify.json").read_text())
    assert document["claims"] == []
    assert {row["status"] for row in document["cells"]} == {"ran", "not run", "same count"}


def test_small_judges_directions_and_no_value(scores, capsys):
    claim = scores("small", 62.0, 60.0)
    assert main(["verify", "--profile", "small", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = (row for row in document["claims"] if row["claim"] == claim.text)
    assert (row["status"], row["n"]) == ("holds", 3)
    assert "CamVid" in document["stamp"]
    assert {cell["status"] for cell in document["cells"]} <= {"ran", "not run", "same count", "not measured"}


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"ss": {}}, "ss.seeds"),
        ({"ss": {"seeds": {"0": {}}}}, "ss.seeds.0.miou"),
        ({"ss": {"seeds": {"0": {"miou": "nan"}}}}, "ss.seeds.0.miou"),
        ([], "the whole file"),
    ],
)
def test_a_result_that_lacks_something_is_named(scores, capsys, content, place):
    claim = scores("paper", 2.0, 1.0)
    write_json(Path("results/paper/runs") / claim.better / "seed-0/evaluation.json", content)
    assert main(["verify", "--profile", "paper"]) == 1
    error = capsys.readouterr().err
    assert f"seed-0/evaluation.json: {place}: " in error
    assert "Traceback" not in error
