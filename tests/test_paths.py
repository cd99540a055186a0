"""resolved.json: what is written comes back, and what does not belong there is refused."""

import json

import pytest

from mscs.errors import UsageError
from mscs.params import load_params
from mscs.paths import read_resolved, resolve_all

RUN, OTHER = "cadis-ocrnet-r50-ce", "cadis-ocrnet-r50-ours"


@pytest.fixture(scope="module")
def resolved():
    return resolve_all(load_params(), "mini")


def write(tmp_path, document):
    path = tmp_path / "resolved.json"
    path.write_text(json.dumps(document))
    return path


def test_every_run_comes_back(resolved, tmp_path):
    params = load_params()
    path = write(tmp_path, resolved)
    for run in params.runs:
        assert read_resolved(path, run) == params.resolve(run, "mini").settings


def test_a_block_under_another_runs_key_is_refused(resolved, tmp_path):
    path = write(tmp_path, {**resolved, "runs": {RUN: resolved["runs"][OTHER]}})
    with pytest.raises(UsageError, match=f"'{RUN}' holds the settings of '{OTHER}'"):
        read_resolved(path, RUN)


@pytest.mark.parametrize("key", ["run", "profile"])
def test_names_that_lead_out_of_the_project_are_refused(resolved, tmp_path, key):
    name = "../../.."
    block = json.loads(json.dumps(resolved["runs"][RUN]))
    for part in block.values():
        if key in part:
            part[key] = name
    wanted = name if key == "run" else RUN
    path = write(tmp_path, {**resolved, "runs": {wanted: block}})
    with pytest.raises(UsageError, match=rf"{key}: found '\.\./\.\./\.\.'"):
        read_resolved(path, wanted)


def test_other_files_are_named_with_the_remedy(tmp_path):
    for text in ("[]", "{}", '{"runs": {"x": 3}}'):
        path = tmp_path / "resolved.json"
        path.write_text(text)
        with pytest.raises(UsageError, match=r"reproduce resolve"):
            read_resolved(path, "x")
