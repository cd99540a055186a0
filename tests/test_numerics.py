"""Which units a run uses, their versions, and the accepted packages."""

from pathlib import Path

import pytest

from mscs.errors import UsageError
from mscs.numerics import check_packages, installed_packages, load_numerics, units_of, versions

NUMERICS = load_numerics(Path(__file__).parent.parent / "numerics.yaml")


@pytest.mark.parametrize("profile", ["mini", "small", "paper"])
def test_every_run_uses_units_that_exist(params, profile):
    for run in params.runs_of(profile):
        settings = params.resolve(run, profile).values
        for phase, units in units_of(settings).items():
            assert len(set(units)) == len(units)
            assert versions(settings, phase, NUMERICS) == {u: NUMERICS["units"][u]["version"] for u in units}
        train = units_of(settings)["train"]
        assert ("contrastive" in train) == settings["contrastive"]
        networks = {"hrnet", "ocrnet", "deeplabv3", "upernet"}
        assert networks & set(train) == networks & set(units_of(settings)["evaluate"]) == {settings["model"]}


def test_every_unit_is_used(params):
    used = {
        unit
        for p in params.profiles
        for run in params.runs_of(p)
        for unit in _all(params.resolve(run, p).values)
    }
    assert used == set(NUMERICS["units"]) - {"folders"}, "which reads datasets of the user's own"


def _all(settings):
    return {unit for units in units_of(settings).values() for unit in units}


def test_a_raised_version_touches_just_the_runs_that_use_the_unit():
    ce, ours = ({"dataset": "cadis", "model": "hrnet", "contrastive": flag} for flag in (False, True))
    raised = {**NUMERICS, "units": {**NUMERICS["units"], "contrastive": {"version": 7}}}
    assert versions(ce, "train", raised) == versions(ce, "train", NUMERICS)
    assert versions(ours, "train", raised) == versions(ours, "train", NUMERICS) | {"contrastive": 7}
    assert versions(ours, "evaluate", raised) == versions(ours, "evaluate", NUMERICS)


def test_an_architecture_without_a_unit_is_named():
    with pytest.raises(UsageError, match=r"no unit 'segnet', which run x uses; list it there"):
        versions({"run": "x", "dataset": "cadis", "model": "segnet", "contrastive": False}, "train", NUMERICS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "not found in"),
        ("units: [", "not valid YAML"),
        ("files: {}", "units"),
        ("units: 3", "no mapping of units.*git checkout"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, said):
    path = tmp_path / "numerics.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_numerics(path)


def with_accepted(versions):
    return {"units": {"packages": {"version": 1, "accepted": versions}}}


def test_accepted_packages_pass():
    found = installed_packages(["numpy", "torch"])
    assert all("+" not in version for version in found.values())
    accepted = {name: ["0.1", version] for name, version in found.items()}
    assert check_packages(accept=False, numerics=with_accepted(accepted)) == found


def test_unknown_packages_are_refused_unless_accepted():
    numerics = with_accepted({"numpy": ["0.1", "0.2"], "no-such-package": ["3"]})
    with pytest.raises(UsageError) as refusal:
        check_packages(accept=False, numerics=numerics)
    here = installed_packages(["numpy"])["numpy"]
    for part in (
        f"numpy {here} (accepted: 0.1, 0.2)",
        "no-such-package not installed (accepted: 3)",
        "--accept-packages",
        "python -m reproduce accept packages",
    ):
        assert part in str(refusal.value)
    assert check_packages(accept=True, numerics=numerics) == {"numpy": here, "no-such-package": None}
