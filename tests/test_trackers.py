"""What watches a training sees all of it, and harms nothing."""

import json
import sys

import pytest

from mscs.errors import UsageError
from mscs.trackers import build_tracker


def rows(steps):
    return [{"step": step, "lr": 0.1, "loss": 1.0 / step} for step in steps]


def test_dvclive_curves_are_whole_after_a_resumption(tmp_path):
    pytest.importorskip("dvclive")
    first = build_tracker("dvclive", tmp_path)
    for end in (2, 4, 6):
        first(0, rows(range(2, end + 1, 2)))
    resumed = build_tracker("dvclive", tmp_path)  # from step 4: row 6 was written, and comes again
    resumed(0, rows([2, 4, 6]))
    resumed(0, rows([2, 4, 6, 8]))
    folder = tmp_path / "dvclive" / "seed-0"
    lines = (folder / "plots" / "metrics" / "loss.tsv").read_text().splitlines()
    assert [int(line.split("\t")[0]) for line in lines[1:]] == [2, 4, 6, 8]
    assert json.loads((folder / "metrics.json").read_text())["step"] == 8
    assert not list(tmp_path.rglob("dvc.yaml"))


def test_tensorboard_gets_every_row_of_every_seed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    observe = build_tracker("tensorboard", tmp_path)
    observe(0, rows([5]))
    observe(0, rows([5, 10]))
    observe(1, rows([5]))
    for seed, steps in ((0, [5, 10]), (1, [5])):
        log = EventAccumulator(str(tmp_path / "tensorboard" / f"seed-{seed}"))
        log.Reload()
        assert [event.step for event in log.Scalars("loss")] == steps


@pytest.mark.parametrize(
    ("name", "module"), [("dvclive", "dvclive"), ("tensorboard", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"needs the package {name}.*mscs\[log\]"):
        build_tracker(name, tmp_path)(0, rows([1]))
