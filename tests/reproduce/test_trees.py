"""Two trees side by side: what counts as a difference, which runs are trained, and one real comparison."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from mscs.errors import MscsError, UsageError
from reproduce import trees
from reproduce.cli import main
from reproduce.revisions import differences
from reproduce.trees import Tree, alike, cases, compare_trees, described

ROOT = Path(__file__).parents[2]


def places(old, new):
    return list(differences(old, new, "x", alike))


def test_numbers_may_differ_by_rounding_only():
    old = {"a": [1.0, {"b": -2.0}], "c": None, "d": "text", "e": float("nan"), "f": 0.0, "g": {"h": 1.0}}
    assert places(old, {**old, "a": [1.0 + 1e-10, {"b": -2.0}]}) == []
    assert places(old, {**old, "a": [1.0 + 1e-8, {"b": -2.0}]}) == ["x.a"]
    assert places(old, {**old, "a": [1.0, {"b": 2.0}]}) == ["x.a"]
    assert places(old, {**old, "a": [1.0]}) == ["x.a"]
    assert places(old, {**old, "d": "other", "e": 0.0, "f": 1e-6}) == ["x.d", "x.e", "x.f"]
    assert places(old, {**old, "c": False, "i": 1, "g": {}}) == ["x.c", "x.g.h", "x.i"]
    assert places({"a": 1, "b": True}, {"a": 1.0, "b": 1}) == ["x.a", "x.b"]


def test_arrays_may_differ_by_rounding_of_their_largest_entry():
    old = np.array([1e-12, 0.0, 4.0])
    assert places(old, old + 1e-9) == []
    [(place, values)] = differences(old, old + np.array([0, 1e-8, 0]), "w", alike).items()
    assert described(place, *values).splitlines() == ["w", "  was 0.0", "  is  1e-08"]
    assert places(old, np.array([1e-12, np.nan, 4.0])) == ["x"]
    assert places(old, old.astype(np.float32)) == ["x"]
    assert places(old, old[:2]) == ["x"]
    assert places({"w": old}, {}) == ["x.w"]


def test_cases_are_one_run_per_kind_and_show_every_dataset(params):
    settings = {run: params.resolve(run, "mini").values for run in params.runs}
    chosen = cases(params, params.runs)
    kinds = [
        tuple(settings[run][key] for key in ("model", "loss", "projector", "optimizer")) for run in chosen
    ]
    assert len(set(kinds)) == len(kinds)
    assert {kind[0] for kind in kinds} == {"hrnet", "ocrnet", "deeplabv3", "upernet"}
    assert {kind[3] for kind in kinds} == {"sgd", "adam", "adamw"}
    assert {values["loss"] for values in settings.values()} == {kind[1] for kind in kinds}
    assert {settings[run]["dataset"] for run in chosen} == {"cityscapes", "ade20k", "pascal_context", "cadis"}


def test_a_tree_keeps_its_results_apart_and_runs_its_own_code(tmp_path):
    for name in ("mscs/__main__.py", "results/old", "work/old"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "mscs/__init__.py").write_text("")
    program = "import sys; from pathlib import Path; print(Path('results').exists(), sys.argv[1:])\n"
    program += "print('no', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    (tmp_path / "mscs/__main__.py").write_text(program)
    tree = Tree(tmp_path)
    with tree.folder() as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["mscs"]
        assert tree.run(folder, [["mscs", "0", "a"]]) == [(0, "False ['0', 'a']\n", "no")]
        outcomes = tree.run(folder, [["mscs", "3"], ["mscs", "0"], ["mscs", "x"]])
        assert [code for code, _, _ in outcomes] == [3, 0, 1]
        assert outcomes[-1][2].splitlines()[-1].startswith("ValueError: invalid literal for int()")
        with pytest.raises(MscsError, match="could not be run"):
            Tree(tmp_path, python="false").run(folder, [["mscs", "0"]])
    assert not folder.exists()


def test_intended_differences_are_listed_and_all_others_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = {"answers.x=[5].new_key": [None, 1], "run.weights.w": [1.0, 2.0]}
    monkeypatch.setattr(trees, "compare_trainings", lambda pair, params, runs: found)
    monkeypatch.setattr(trees, "LISTS", tmp_path / "trees.yaml")
    trees.LISTS.write_text("intended: {'answers.*x=[5].new_key': a new setting}\nmistakes: []\n")
    assert main(["compare-trees", "HEAD", "--cases", "run"]) == 1
    said = capsys.readouterr().out
    assert said == (
        "answers.*x=[5].new_key: 1 differences on purpose\nrun.weights.w\n  was 1.0\n  is  2.0\n"
        "1 differences that are not on purpose\n"
    )
    found.pop("run.weights.w")
    assert main(["compare-trees", "HEAD", "--cases", "run"]) == 0


def test_an_unknown_revision_or_run_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match="unknown revision 'nothing'"):
        compare_trees("nothing", None)


def test_the_lists_are_well_formed():
    document = yaml.safe_load((ROOT / trees.LISTS).read_text())
    assert all(document["intended"].values() if document["intended"] else ())
    lines = document["mistakes"]
    assert len(set(lines)) == len(lines) >= 25
    assert {line.split(" ")[0] for line in lines} == {"mscs", "reproduce"}


@pytest.mark.slow
def test_a_commit_is_like_itself_and_unlike_an_edit(copy_project, monkeypatch):
    project = copy_project(small=True)
    monkeypatch.chdir(project)
    run = ["cadis-ocrnet-r50-ce"]
    assert compare_trees("HEAD", run)[0] == {}
    optim = Path("mscs/optim.py")
    text = optim.read_text()
    schedule = "return lr * exp_decay"
    assert text.count(schedule) == 1
    optim.write_text(text.replace(schedule, "return lr * (1 + 1e-5) * exp_decay"))
    unlike, _ = compare_trees("HEAD", run)
    assert {place.split(".")[1] for place in unlike} >= {"weights", "losses"}


@pytest.mark.slow
def test_every_mistake_is_one_and_every_other_line_is_answered(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = trees.answers(Tree(ROOT), ROOT / "results", ["cadis-ocrnet-r50-ce"])
    mistakes = yaml.safe_load((ROOT / trees.LISTS).read_text())["mistakes"]
    assert [
        line for line in mistakes if not re.match("exit code [12]: (.*error: |  split )", found[line])
    ] == []
    # a profile may leave a run out
    others = {x: y for x, y in found.items() if x not in mistakes and "--profile small" not in x}
    assert not [line for line, answer in others.items() if re.match("exit code [^0]", str(answer))]
    shown = others["mscs show cadis-ocrnet-r50-ce --json --profile paper --set recipe=code"]
    assert shown["recipe"] == "code"
