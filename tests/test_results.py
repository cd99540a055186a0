import json
from pathlib import Path

import pytest

from mscs.results import write_json

RECORD = {
    "miou": 41.25,
    "std": None,
    "seeds": {"0": {"class_iou": [1.5, None, 3.0]}},
    "matrix": [[0, 0, 7], [0, 12, 1]],
    "rows": [{"id": "α, [1]", "box": (1, 2)}],
    "nothing": [{}, []],
}
WRITTEN = """\
{
 "miou": 41.25,
 "std": null,
 "seeds": {
  "0": {
   "class_iou": [1.5, null, 3.0]
  }
 },
 "matrix": [
  [0, 0, 7],
  [0, 12, 1]
 ],
 "rows": [
  {
   "id": "α, [1]",
   "box": [1, 2]
  }
 ],
 "nothing": [
  {},
  []
 ]
}
"""


def test_json_has_one_line_per_row_of_a_matrix(tmp_path):
    write_json(tmp_path / "a.json", RECORD)
    assert (tmp_path / "a.json").read_text() == WRITTEN


@pytest.mark.parametrize("value", [RECORD, [], {}, [[]], None, 1e-300, "text\n", [True, "x"], {"a": {}}])
def test_json_reads_back_as_it_was(value, tmp_path):
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(value))


def test_committed_results_keep_their_values(tmp_path):
    for path in sorted((Path(__file__).parents[1] / "results/mini").rglob("*.json")):
        value = json.loads(path.read_text())
        write_json(tmp_path / "a.json", value)
        assert json.loads((tmp_path / "a.json").read_text()) == value
