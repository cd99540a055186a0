"""The results of a run are those of its seeds: which count, and what they are joined to."""

import pytest

from mscs.errors import MscsError
from mscs.results import write_json
from reproduce.tables import Results

RUN = "cityscapes-hrnet-hr48-ce"


def write_seed(results, seed, miou, digest="d1", folder=None):
    scores = {"miou": miou, "std": None, "n": 1, "seeds": {str(seed): {"miou": miou}}}
    place = results.root / "runs" / RUN / (folder or f"seed-{seed}")
    write_json(place / "evaluation.json", {"ss": scores, "digest": digest})
    cost = {"gpu_hours": 0.5, "seconds": 60.0, "peak_bytes": 2**30 + seed, "seed": seed}
    write_json(place / "run.json", cost)


@pytest.fixture
def results(tmp_path):
    found = Results("paper", tmp_path)
    for seed, miou in ((0, 70.0), (2, 71.0), (10, 75.0)):
        write_seed(found, seed, miou)
    return found


def with_seeds(results, seeds):
    write_json(results.root / "resolved.json", {"runs": {RUN: {"info": {"seeds": seeds}}}})
    return Results(results.profile, results.root.parent)


def test_seeds_are_joined_to_mean_and_sample_deviation(results):
    value = results.score(RUN, "ss")
    assert (value.number, value.n) == (72.0, 3)
    assert value.std == pytest.approx(7**0.5)  # (4 + 1 + 9) / (3 - 1)
    assert list(results.evaluation(RUN)["ss"]["seeds"]) == ["0", "2", "10"]


def test_one_seed_has_no_deviation_and_none_no_value(results):
    value = with_seeds(results, [2]).score(RUN, "ss")
    assert (value.number, value.std, value.n) == (71.0, None, 1)
    nothing = with_seeds(results, [7]).score(RUN, "ss")
    assert (nothing.number, nothing.n) == (None, 0)


def test_a_seed_that_is_no_longer_asked_for_does_not_count(results):
    found = with_seeds(results, [10, 0])
    assert found.score(RUN, "ss").number == 72.5
    assert [path.parent.name for path in found.seed_files(RUN, "run.json")] == ["seed-0", "seed-10"]


def test_other_evaluations_of_a_seed_are_no_seeds(results):
    write_seed(results, 0, 10.0, digest="of a file", folder="seed-0+0123456789ab")
    assert results.score(RUN, "ss").n == 3


def test_seeds_of_different_settings_are_refused_with_the_remedy(results):
    write_seed(results, 2, 71.0, digest="d2")
    with pytest.raises(MscsError, match=rf"seeds of {RUN} .* `python -m reproduce run {RUN}`"):
        results.score(RUN, "ss")
    assert with_seeds(results, [0, 10]).score(RUN, "ss").n == 2


def test_costs_are_those_of_all_seeds(results):
    record = results.record(RUN)
    assert (record["seconds"], record["gpu_hours"], record["peak_bytes"]) == (180.0, 1.5, 2**30 + 10)
    assert record["seed"] == 0
