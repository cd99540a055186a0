import json
from pathlib import Path

import pytest

from mscs.blocks import flat_types
from mscs.model_options import MODEL_OPTIONS
from mscs.settings import Settings
from reproduce.ledger import entries, rows, switched

RECIPES = ("paper", "code", "upstream")
CADIS = "cadis-ocrnet-r50-ours"


def taken(params, run, recipe):
    """Return every setting and model option of a run under a recipe, with the options' defaults filled in."""
    plain = dict(params.resolve(run, "paper", {"recipe": recipe}).values)
    options = {**vars(MODEL_OPTIONS[plain["model"]]), **plain.pop("model_options")}
    del plain["recipe"]
    return json.loads(json.dumps({**plain, **{f"model_options.{key}": x for key, x in options.items()}}))


def entry_of(name):
    [entry] = [entry for entry in entries() if entry.id == name]
    return entry


def test_every_entry_touches_a_run_and_explains_itself(params):
    names = [entry.id for entry in entries()]
    assert len(names) == len(set(names)) >= 30
    for entry in entries():
        patterns = [entry.runs] if isinstance(entry.runs, str) else entry.runs
        for pattern in patterns:
            assert any(type(entry)(**{**vars(entry), "runs": pattern}).touches(r) for r in params.runs), (
                entry.id
            )
        assert entry.values
        assert entry.why
        assert entry.setting in flat_types(Settings) or entry.setting is None
        assert not entry.take or ((entry.setting or entry.option) and tuple(entry.take) == RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_params_take_what_the_ledger_says(params, recipe):
    for run in params.runs:
        found = taken(params, run, recipe)
        for entry in entries():
            if entry.take and entry.touches(run):
                key = entry.setting or f"model_options.{entry.option}"
                assert found[key] == entry.take[recipe], (entry.id, run)


def test_what_differs_between_recipes_has_an_entry_that_touches_the_run(params):
    for run in params.runs:
        paper = taken(params, run, "paper")
        switches = {
            entry.setting or f"model_options.{entry.option}"
            for entry in entries()
            if entry.take and entry.touches(run)
        }
        for recipe in ("code", "upstream"):
            found = taken(params, run, recipe)
            assert {key for key in found if found[key] != paper[key]} <= switches, (run, recipe)


def test_a_recipe_is_named_for_what_it_is_and_the_docs_list_what_it_switches(params):
    fidelity = Path("docs/fidelity.md").read_text()
    assert switched("paper") == []
    assert "not the upstream training recipe as a whole" in params.about("upstream")
    for recipe in ("code", "upstream"):
        line = f"`{recipe}` switches: " + ", ".join(switched(recipe)) + "."
        assert line in " ".join(fidelity.split()), line
        source = params.resolve(CADIS, "paper", {"recipe": recipe}).sources["recipe"]
        assert source == f"--set: {params.about(recipe)}"


def test_rows_of_one_run():
    found = {row["id"] for row in rows(CADIS)}
    assert {"cadis-padding", "pretrained", "fewer-maps", "cadis-blur", "cadis-normalisation"} <= found
    assert not {"weight-decay-cityscapes", "ocr-head"} & found


def test_upstream_of_each_network_decides_how_it_trains_and_is_tested_on_ade20k(params):
    """HRNet-Semantic-Segmentation jitters no colour and adds exp(logits); mmsegmentation does otherwise."""
    expected = {
        "ade20k-ocrnet-hr48-ours": ("native", "none", "exp", "zero"),
        "ade20k-upernet-swins-ours": (512, "photometric", "softmax", "skip"),
        "ade20k-deeplabv3-r101-ours": (512, "photometric", "softmax", "skip"),
        "pascal_context-hrnet-hr48-ours": ("native", "none", "exp", "zero"),
    }
    for run, values in expected.items():
        s = params.resolve(run, "paper", {"recipe": "upstream"}).settings
        shown, scored = s.data.augmentation, s.evaluation
        found = (shown.scale_base, shown.color, scored.multi_scale.ms_merge, scored.absent_classes)
        assert found == values, run


def test_recipe_code_leaves_the_listed_cadis_frames_out(params):
    from mscs.datasets.cadis import SPLITS, VIDEOS, blacklist

    skips = {
        r: params.resolve(CADIS, "paper", {"recipe": r}).settings.data.skip_wrong_labels for r in RECIPES
    }
    assert skips == {"paper": False, "code": True, "upstream": False}
    for split, kept in (("train", 3490), ("val", 511)):
        prefixes = tuple(f"Video{video}_" for video in VIDEOS[split])
        listed = [frame for frame in blacklist() if frame.startswith(prefixes)]
        assert SPLITS[split] - len(listed) == kept
        assert str(kept) in entry_of("cadis-wrong-labels").values["code"]


def test_entries_say_what_their_source_says():
    """Facts read in the authors' code and in issue 4 of their repository."""
    assert "had them on" in entry_of("pretrained").why
    assert "one GPU" in entry_of("sampling-per-group").values["answer"]
    assert "no one could" not in entry_of("sampling-per-group").why
    assert "TypeError" in entry_of("cadis-protocol").values["code"]
    assert "0.96" in entry_of("cadis-protocol").values["earlier"]
    assert "guess" in entry_of("cadis-padding").why
    baseline = entry_of("baseline-runs").values["code"]
    assert "deletes the projector" in baseline
    assert "`-l ms` and `-l ms_cs`" in baseline
    assert "first epoch on Cityscapes" in entry_of("rank-seeds").values["code"]
    assert "DenseContrastiveLossV2_ms.py:74" in entry_of("deeplabv3-scales").values["code"]
    assert "one pair" in entry_of("fewer-maps").why
    assert "ImageNet-1k" in entry_of("swinb-weights-cityscapes").values["code"]
