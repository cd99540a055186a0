"""Digests of units, what they cover, and how a changed unit is accepted."""

import ast
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mscs.errors import MscsError, UsageError
from mscs.numerics import FILE, load_numerics
from reproduce import numerics, plan, trees
from reproduce.numerics import accept_changed, accept_same, accepted_commit, digest

ROOT = Path(__file__).parents[2]
NUMERICS = load_numerics(ROOT / "numerics.yaml")

CODE = '''\
"""A module."""
import math
import warnings

SCALES = (1.0, 0.7)
TABLE = {"road": 7, "car": [26, None]}


class Loss:
    """A class."""

    weight: float = 0.1
    """A documented field."""

    def __call__(self, x, *, low=None):
        """Doc."""
        if x < 0:
            raise ValueError(f"found {x:.3g}") from None
        warnings.warn(f"low {low}", stacklevel=2)
        print("step", x)
        return f"{x!r:>{len(TABLE)}} of" f" {self.weight}" * 2 + u"end" + "\\u00fc"
'''
GOLDEN = "7430a9d6a24bf3c2"


def of(text):
    return digest(["module.py"], lambda _: text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import math\n", "import math  # a comment\n\n\n"),
        ('"""A module."""\n', ""),
        ('    """A class."""\n', '    """Another text."""\n'),
        ('    """A documented field."""\n', ""),
        ('f"found {x:.3g}"', '"expected a positive number, found", x'),
        ('f"low {low}", stacklevel=2', 'f"this is low: {low}", stacklevel=3'),
        ('"step", x', '"at step", x, flush=True'),
        ("(1.0, 0.7)", "(\n    1.0,\n    0.70,\n)"),
        ('u"end"', "'end'"),
        ('of" f" {self', "of {self"),
    ],
)
def test_text_for_people_and_layout_do_not_count(old, new):
    assert CODE.count(old) == 1
    assert of(CODE.replace(old, new)) == of(CODE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.7", "0.71"),
        ("x < 0", "x <= 0"),
        ("1.0,", "1,"),
        ('"road": 7', '"road": 8'),
        ("[26, None]", "[26, False]"),
        ("[26, None]", "[26]"),
        ("weight: float", "weight: int"),
        ("low=None", "low"),
        ("ValueError", "TypeError"),
        ("* 2", "+ 2"),
        ('}} of"', '}} off"'),
        ("!r:>", "!s:>"),
        (":>{len", ":<{len"),
        ("from None", "from error"),
        ('u"end"', 'b"end"'),
        ("*, low", "low"),
        ("import math", "import cmath"),
    ],
)
def test_everything_else_counts(old, new):
    assert old in CODE
    assert of(CODE.replace(old, new, 1)) != of(CODE)


def test_the_digest_is_the_same_on_every_python():
    """The same text gave this digest on Python 3.11, 3.12 and 3.13."""
    assert of(CODE) == GOLDEN


def test_data_files_count_by_content():
    def table(text):
        return digest(["labels.json"], lambda _: text)

    assert table('{"a": [1, 2]}') == table('{\n "a": [1,\n 2]\n}\n')
    assert table('{"a": [1, 2]}') != table('{"a": [1, 3]}')
    assert table('{"a": 1, "b": 2}') != table('{"b": 2, "a": 1}')


def test_names_and_order_of_files_do_not_count_but_each_file_does():
    texts = {"a.py": "A = 1", "b.py": "B = 2", "c.py": "A = 1"}
    read = texts.__getitem__
    assert digest(["a.py", "b.py"], read) == digest(["b.py", "c.py"], read)
    assert digest(["a.py"], read) != digest(["a.py", "c.py"], read)


def moved(numerics):
    """Return the units that no longer have the accepted digest."""
    return {x for x, files in numerics["files"].items() if numerics["units"][x]["digest"] != digest(files)}


def test_no_digest_moved(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert not moved(NUMERICS), (
        "the code of these units changed. If its results are the same: python -m reproduce accept UNIT "
        '--same; if they changed on purpose: python -m reproduce accept UNIT --changed "why"'
    )


def reached(entries, root):
    """Return the files of `mscs` that the `entries` import, directly or not, and the data beside them.

    Packages count, but their imports are not followed: a name imported from a package leads to the module
    that the package takes it from, so that a lazy package does not stand for all of its modules.
    """
    seen = set()
    waiting = [root / entry for entry in entries]
    while waiting:
        path = waiting.pop()
        if path not in seen and path.name != "__init__.py":
            waiting += imported(path, root)
        seen.add(path)
    for folder in {path.parent for path in seen}:
        seen |= {*folder.glob("__init__.py"), *folder.glob("*.json")}
    return {str(path.relative_to(root)) for path in seen}


def imported(path, root):
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    found = [home(name, root) for name in names if name.startswith("mscs.")]
    return [path for path in found if path is not None]


def home(name, root):
    """Return the file of a module, or of the one that a package takes `name` from; None for others."""
    path = root.joinpath(*name.split("."))
    if path.is_dir():
        return path / "__init__.py"
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    package = path.parent / "__init__.py"
    for node in ast.walk(ast.parse(package.read_text())) if package.exists() else ():
        if isinstance(node, ast.ImportFrom) and node.module and path.name in {a.name for a in node.names}:
            return home(node.module, root)
    return None


def test_every_module_that_training_or_evaluation_reaches_belongs_to_one_unit_or_is_exempt():
    listed = Counter(file for files in NUMERICS["files"].values() for file in files)
    listed.update(list(NUMERICS["exempt"]))
    found = reached(NUMERICS["entries"], ROOT)
    assert found - set(listed) == set(), "list these in numerics.yaml, under files or, with a reason, exempt"
    assert [file for file, count in listed.items() if count > 1] == []
    unreached = set(listed) - found - set(NUMERICS["exempt"])
    assert unreached == set(), "neither training nor evaluation imports these: remove them from numerics.yaml"
    assert all((ROOT / file).is_file() for file in listed)
    assert all(reason for reason in NUMERICS["exempt"].values())
    assert set(NUMERICS["files"]) | {"packages"} == set(NUMERICS["units"])


def test_reached_follows_imports_wherever_they_stand(tmp_path):
    lazy = "if 0:\n    from mscs.lazy.home import Thing\n    from mscs.lazy.other import X"
    modules = {
        "mscs/__init__.py": "from mscs.never import nothing",
        "mscs/entry.py": "import mscs.a\ndef f():\n    from mscs.lazy import Thing\n    from mscs import b",
        "mscs/a.py": "import json\nfrom mscs.lazy import *",
        "mscs/b.py": "",
        "mscs/never.py": "",
        "mscs/lazy/__init__.py": lazy,
        "mscs/lazy/home.py": "",
        "mscs/lazy/other.py": "",
        "mscs/lazy/table.json": "{}",
    }
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = reached(["mscs/entry.py"], tmp_path)
    assert found == set(modules) - {"mscs/never.py", "mscs/lazy/other.py"}


def test_architectures_do_not_import_each_other():
    """Else a run would depend on an architecture that is no unit of its own."""
    names = ("hrnet", "ocrnet", "deeplabv3", "upernet")
    for name in names:
        [file] = NUMERICS["files"][name]
        others = {path for other in names if other != name for path in NUMERICS["files"][other]}
        assert not others & reached([file], ROOT)


@pytest.fixture
def project(tmp_path, monkeypatch, params):
    """Make a repository whose unit `optimizer` was accepted, and whose short trainings are stood in for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mscs").mkdir()
    write("LR = 0.1\n")
    text = (ROOT / "numerics.yaml").read_text()
    accepted = digest(["mscs/optim.py"])
    FILE.write_text(text.replace(NUMERICS["units"]["optimizer"]["digest"], accepted))
    subprocess.run(["git", "init", "-q"], check=True)
    commit()
    return params


def write(text):
    Path("mscs/optim.py").write_text(text)


def commit():
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["add", "."], ["commit", "-q", "-m", "state"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def stand_in(monkeypatch, findings):
    asked = []

    def compare(pair, params, runs):
        asked.extend(runs)
        asked.append((pair[0].source / "mscs/optim.py").read_text())
        return findings

    monkeypatch.setattr(trees, "compare_trainings", compare)
    return asked


def test_accept_same_writes_the_digest_only_if_the_trainings_agree(project, monkeypatch):
    commit_ = accepted_commit({"optimizer": load_numerics()["units"]["optimizer"]["digest"]})
    before = FILE.read_text()
    assert accept_same(project, ["optimizer"]) == "optimizer: nothing to accept"
    write("LR = 0.2\n")
    assert set(moved({**load_numerics(), "files": {"optimizer": ["mscs/optim.py"]}})) == {"optimizer"}
    commit()
    stand_in(monkeypatch, {"run.losses.csv.loss": [1.0, 2.0]})
    with pytest.raises(MscsError, match=r"was 1.0\n  is  2.0\noptimizer: 1 differences.*UNIT --changed"):
        accept_same(project, ["optimizer"])
    assert FILE.read_text() == before
    asked = stand_in(monkeypatch, {})
    assert "the same results; accepted" in accept_same(project, ["optimizer"])
    assert asked.pop() == "LR = 0.1\n", "compared with another state than the accepted one"
    assert len(asked) > 10
    old, new = (yaml.safe_load(text)["units"] for text in (before, FILE.read_text()))
    assert new["optimizer"] == old["optimizer"] | {"digest": digest(["mscs/optim.py"])}
    assert len(set(before.splitlines()) ^ set(FILE.read_text().splitlines())) == 2
    assert accepted_commit({"optimizer": old["optimizer"]["digest"]}) == commit_


def test_accept_same_asks_just_the_runs_that_use_the_unit(params, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(numerics, "_states", lambda *_: ("old", "new"))
    monkeypatch.setattr(numerics, "accepted_commit", lambda *_: "HEAD")
    monkeypatch.setattr(numerics, "_write", lambda *_: None)
    asked = stand_in(monkeypatch, {})
    accept_same(params, ["deeplabv3"])
    assert asked.pop()
    assert {params.run_info(run)["model"] for run in asked} == {"deeplabv3"}
    assert len(asked) == 2


def test_accept_same_needs_a_committed_state(project):
    write("LR = 0.2\n")
    FILE.write_text(FILE.read_text().replace(load_numerics()["units"]["optimizer"]["digest"], "0" * 16))
    with pytest.raises(UsageError, match="no commit has the accepted digests of optimizer"):
        accept_same(project, ["optimizer"])


def test_accept_changed_raises_the_version_and_counts_the_cost(project, monkeypatch):
    monkeypatch.setattr(plan, "device_name", lambda: "a device")
    write("LR = 0.2\n")
    said = accept_changed(project, "optimizer", 'a "larger" step: twice')
    assert said.startswith(
        "optimizer is at version 2; in profile mini 48 runs are trained and evaluated again"
    )
    assert "cityscapes-hrnet-hr48-ours" in said
    assert load_numerics()["units"]["optimizer"] == {
        "version": 2,
        "digest": digest(["mscs/optim.py"]),
        "why": 'a "larger" step: twice',
    }
    assert accept_changed(project, "optimizer", "again") == "optimizer: nothing to accept"


def test_accept_takes_several_units_at_once(project, monkeypatch):
    Path("mscs/metrics.py").write_text("ABSENT = 0\n")
    FILE.write_text(
        FILE.read_text().replace(NUMERICS["units"]["metrics"]["digest"], digest(["mscs/metrics.py"]))
    )
    commit()
    before = load_numerics()["units"]
    write("LR = 0.2\n")
    Path("mscs/metrics.py").write_text("ABSENT = 1\n")
    asked = stand_in(monkeypatch, {})
    said = accept_same(project, ["optimizer", "metrics"])
    assert said.startswith("optimizer, metrics: ")
    assert len(asked) == len(set(asked)), "one commit has both, so each run is trained once"
    after = load_numerics()["units"]
    assert {unit for unit in after if after[unit] != before[unit]} == {"optimizer", "metrics"}


def test_accept_knows_its_units(project):
    with pytest.raises(UsageError, match="unknown unit 'optimiser'; did you mean 'optimizer'"):
        accept_same(project, ["optimiser"])


def test_packages_are_accepted_beside_those_of_before_or_instead(project, monkeypatch):
    text = FILE.read_text()
    accepted = load_numerics()["units"]["packages"]["accepted"]
    other = {name: ["0.1"] for name in accepted}
    FILE.write_text(text.replace(json.dumps(accepted["timm"]), '["0.1"]'))
    with pytest.raises(UsageError, match="packages --same needs --python PATH"):
        accept_same(project, ["packages"])
    (Path("mscs") / "optim.py").touch()
    stand_in(monkeypatch, {})
    accept_same(project, ["packages"], python="/an/older/python")
    here = numerics.installed_packages(accepted)
    assert load_numerics()["units"]["packages"]["accepted"]["timm"] == ["0.1", here["timm"]]
    assert load_numerics()["units"]["packages"]["version"] == 1
    monkeypatch.setattr(plan, "device_name", lambda: "a device")
    monkeypatch.setattr(numerics, "installed_packages", lambda names: dict.fromkeys(names, "9.9"))
    accept_changed(project, "packages", "new timm")
    assert load_numerics()["units"]["packages"] == {
        "version": 2,
        "accepted": {name: ["9.9"] for name in other},
        "why": "new timm",
    }
