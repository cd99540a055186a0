"""Does a run fit? What is measured, what is taken from it, and its honest absence."""

import json

import pytest

from mscs import memory
from mscs.cli import main
from mscs.errors import MscsError
from mscs.params import load_params
from mscs.results import read_json

RUN, PROFILE = "cityscapes-hrnet-hr48-ours", "paper"
DEVICE = "a GPU"


@pytest.fixture
def params(project, monkeypatch):
    monkeypatch.setattr(memory, "device", lambda: DEVICE)
    return load_params()


def needs(monkeypatch, peaks):
    """Let the tries need these bytes (None: more than there are); return the changes of each try."""
    tried, left = [], iter(peaks)

    def peak(settings, changes):
        tried.append(dict(changes))
        assert settings.schedule.steps == memory.STEPS
        assert settings.machine.precision == changes.get("precision", "fp32")
        return next(left)

    monkeypatch.setattr(memory, "_peak", peak)
    return tried


LADDER = [
    {},
    {"model_options": {"checkpointing": True}},
    {"model_options": {"checkpointing": True}, "precision": "bf16"},
    {
        "model_options": {"checkpointing": True},
        "precision": "bf16",
        "accumulation_steps": 4,
        "batch_norm": "part",
    },
]


def test_what_needs_less_is_tried_mildest_first_until_it_fits(params, monkeypatch):
    assert memory.fit(params, RUN, PROFILE, DEVICE) is None
    tried = needs(monkeypatch, [None, None, 7 * 2**30])
    memory.measure(params, RUN, PROFILE)
    assert tried == LADDER[:3]
    found = memory.fit(params, RUN, PROFILE, DEVICE)
    assert (found["set"], found["peak_bytes"]) == (LADDER[2], 7 * 2**30)
    assert memory.fit(params, RUN, PROFILE, "another GPU") is None
    assert memory.fit(params, RUN, "mini", DEVICE) is None
    tried = needs(monkeypatch, [3 * 2**30])  # on a day when less of the GPU is taken
    memory.measure(params, RUN, PROFILE)
    assert memory.fit(params, RUN, PROFILE, DEVICE)["set"] == {}
    rows = read_json(memory.WORK / PROFILE / "memory" / f"{RUN}.json")
    assert len(rows) == 3, "one for each try, the newest"


def test_figures_of_other_settings_do_not_count(params, monkeypatch, project):
    needs(monkeypatch, [2**30])
    memory.measure(params, RUN, PROFILE)
    text = (project / "params.yaml").read_text()
    for old, new, counts in (("steps: 120000", "steps: 90000", True), ("[512, 1024]", "[512, 768]", False)):
        (project / "params.yaml").write_text(text.replace(old, new))
        assert (memory.fit(load_params(), RUN, PROFILE, DEVICE) is not None) == counts


def test_doctor_and_plan_say_it(params, monkeypatch, capsys):
    from reproduce import plan
    from reproduce.cli import main as reproduce_main

    monkeypatch.setattr(plan, "device_name", lambda: DEVICE)
    words = ["doctor", RUN, "--profile", PROFILE, "--json"]

    def fits():
        main(words)
        *others, found = json.loads(capsys.readouterr().out)
        assert [(x["name"], x["state"]) for x in others if x["name"] == "data"] == [("data", "problem")]
        assert found["name"] == "fits"
        return found

    assert fits()["found"] == "never measured on a GPU"
    assert fits()["remedy"].startswith(f"`mscs doctor {RUN} --profile paper --measure`")
    reproduce_main(["plan", RUN, "--profile", PROFILE])
    assert "`mscs doctor RUN --measure`" in capsys.readouterr().out
    needs(monkeypatch, [None, 5 * 2**30])
    memory.measure(params, RUN, PROFILE)
    capsys.readouterr()
    assert fits() == {
        "name": "fits",
        "state": "warning",
        "found": "with less: 5.0 GiB on a GPU",
        "remedy": f"`mscs train {RUN} --profile paper --set 'model_options={{\"checkpointing\": true}}'`",
    }
    reproduce_main(["plan", RUN, "--profile", PROFILE])
    assert "5 GiB with model_options |" in capsys.readouterr().out
    needs(monkeypatch, [None] * 4)
    memory.measure(params, RUN, PROFILE)
    capsys.readouterr()
    assert fits()["state"] == "problem"


def test_the_command_is_one_that_trains_with_these_changes(params):
    import shlex

    from mscs.cli import build_parser
    from mscs.params import parse_overrides

    words = shlex.split(memory.command(RUN, PROFILE, LADDER[3]))[1:]
    assert parse_overrides(build_parser().parse_args(words).set) == LADDER[3]


def test_a_try_trains_the_run_and_leaves_no_trace(project, generated):
    root = project / "work/mini/data/cityscapes"
    root.parent.mkdir(parents=True)
    root.symlink_to(generated("cityscapes"))
    overrides = {"train_images": 8, "val_images": 3, "image_size": [64, 96]} | memory.TRIAL
    settings = load_params().resolve(RUN, "mini", overrides).settings
    changes = {key: value for key, value in overrides.items() if key not in memory.TRIAL}
    assert memory._peak(settings, changes) > 2**20
    assert not (project / "results").exists()
    assert [path.name for path in (project / "work/mini").iterdir()] == ["data"]
    with pytest.raises(MscsError, match=r"the trial failed: .*was generated with"):
        memory._peak(settings, {})
