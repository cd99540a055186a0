import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mscs.blocks import Block, flat_types, from_flat
from mscs.errors import UsageError
from mscs.model_options import MODEL_OPTIONS
from mscs.params import Params, load_params, parse_overrides
from mscs.settings import PHASES, Folders, Loss, OwnLoss, Settings, Weight

OF_OWN_CODE = {"spec"} | flat_types(Folders).keys() | flat_types(OwnLoss).keys()
"""Keys that no run of the project uses: they name data and code of the user's own."""

# The supplement's Tables 4 to 7: dataset, model, backbone ->
# crop, lr, decay, weight decay, batch, steps, optimiser.
SUPPLEMENT = {
    ("cityscapes", "hrnet", "hrnet_w48"): ((512, 1024), 1e-2, "poly", 5e-5, 12, 120_000, "sgd"),
    ("cityscapes", "ocrnet", "hrnet_w48"): ((512, 1024), 1e-2, "poly", 5e-5, 12, 120_000, "sgd"),
    ("cityscapes", "deeplabv3", "resnet101"): ((512, 1024), 1e-2, "poly", 5e-5, 12, 120_000, "sgd"),
    ("cityscapes", "upernet", "resnet101"): ((512, 1024), 1e-2, "poly", 5e-5, 12, 120_000, "sgd"),
    ("cityscapes", "upernet", "swin_tiny"): ((512, 1024), 6e-5, "linear", 1e-2, 8, 120_000, "adamw"),
    ("cityscapes", "upernet", "swin_small"): ((512, 1024), 6e-5, "linear", 1e-2, 8, 120_000, "adamw"),
    ("cityscapes", "upernet", "swin_base"): ((512, 1024), 6e-5, "linear", 1e-2, 8, 120_000, "adamw"),
    ("ade20k", "ocrnet", "hrnet_w48"): ((512, 512), 1e-2, "poly", 1e-4, 16, 160_000, "sgd"),
    ("ade20k", "deeplabv3", "resnet101"): ((512, 512), 1e-2, "poly", 1e-4, 16, 160_000, "sgd"),
    ("ade20k", "upernet", "resnet101"): ((512, 512), 1e-2, "poly", 1e-4, 16, 160_000, "sgd"),
    ("ade20k", "upernet", "swin_tiny"): ((512, 512), 6e-5, "linear", 1e-2, 16, 160_000, "adamw"),
    ("ade20k", "upernet", "swin_small"): ((512, 512), 6e-5, "linear", 1e-2, 16, 160_000, "adamw"),
    ("ade20k", "upernet", "swin_base"): ((512, 512), 6e-5, "linear", 1e-2, 16, 160_000, "adamw"),
    ("ade20k", "upernet", "swin_large"): ((640, 640), 6e-5, "linear", 1e-2, 16, 160_000, "adamw"),
    ("pascal_context", "ocrnet", "hrnet_w48"): ((512, 512), 1e-3, "poly", 1e-4, 16, 160_000, "sgd"),
    ("pascal_context", "hrnet", "hrnet_w48"): ((512, 512), 1e-3, "poly", 1e-4, 16, 160_000, "sgd"),
    ("cadis", "ocrnet", "resnet50"): ((540, 960), 1e-4, "exp", 0.0, 8, 20_000, "adam"),
}


@pytest.fixture(scope="module")
def params():
    return load_params()


@pytest.fixture
def document():
    return yaml.safe_load(Path("params.yaml").read_text())


def test_every_row_of_tables_4_to_7_has_a_ce_and_an_ours_run_with_the_printed_settings(params):
    found = {}
    for run in params.runs:
        s = params.resolve(run, "paper").settings
        if s.variant in ("ce", "ours"):
            key = (s.data.name, s.model.name, s.model.backbone.split(".")[0].split("_patch")[0])
            schedule, decay, optimizer = s.schedule, s.schedule.lr_schedule.name, s.schedule.optimizer.name
            row = (schedule.crop_size, schedule.lr, decay, schedule.weight_decay)
            row += (schedule.batch_size, schedule.steps, optimizer)
            found.setdefault(key, {})[s.variant] = row
    assert found == {key: {"ce": row, "ours": row} for key, row in SUPPLEMENT.items()}


def test_section_a_and_e_of_the_supplement(params):
    loss = params.resolve("cityscapes-hrnet-hr48-ours", "paper").settings.loss
    ours = loss.contrastive
    assert (ours.multi_scale_weight, ours.cross_scale_weight) == (0.1, 0.1)
    assert ours.scale_weights == (1.0, 0.7, 0.4, 0.1)
    assert ours.cross_pairs == ((0, 3), (0, 2))
    assert loss.projector == "backbone"
    swin = params.resolve("ade20k-upernet-swint-ours", "paper")
    assert swin.settings.loss.projector == "fpn"
    assert swin.values["ms_scales"] == [0.5, 0.75, 1.25, 1.5, 1.75]
    for dataset in ("cityscapes", "pascal_context"):
        values = params.resolve(f"{dataset}-hrnet-hr48-ours", "paper").values
        assert values["ms_scales"] == [0.5, 0.75, 1.25, 1.5, 1.75, 2.0]


@pytest.mark.parametrize(
    ("run", "weights", "pairs"),
    [
        ("cityscapes-deeplabv3-r101-ours", (1.0, 0.7, 0.4), ((0, 2), (0, 1))),
        ("cadis-ocrnet-r50-ours", (1.0, 0.7), ((0, 1),)),
        ("cityscapes-hrnet-hr48-one-scale", (1.0,), ()),
        ("cityscapes-hrnet-hr48-ours-equal-weights", (1.0,) * 4, ((0, 3), (0, 2))),
    ],
)
def test_networks_with_fewer_maps_take_the_first_weights_and_the_last_pairs(params, run, weights, pairs):
    settings = params.resolve(run, "paper").settings
    assert settings.loss.contrastive.scale_weights == weights
    assert settings.loss.contrastive.cross_pairs == pairs


@pytest.mark.parametrize(("batch", "images"), [(8, 2), (12, 3), (16, 4)])
def test_a_group_is_a_quarter_of_the_batch(params, batch, images):
    run = "cityscapes-hrnet-hr48-ours"
    assert params.resolve(run, "paper", {"batch_size": batch}).settings.schedule.images_per_group == images


@pytest.mark.parametrize("recipe", ["paper", "code", "upstream"])
def test_every_run_resolves_in_every_profile_and_comes_back_from_flat_json(params, recipe):
    for profile in params.profiles:
        for run in params.runs_of(profile):
            resolved = params.resolve(run, profile, {"recipe": recipe})
            settings = resolved.settings
            flat = json.loads(json.dumps(settings.flat()))
            assert from_flat(Settings, flat, "test") == settings
            assert from_flat(Settings, resolved.values, "test") == settings
            assert flat.items() <= {key: resolved.values[key] for key in flat}.items()
            used = flat_types(Settings).keys() - OF_OWN_CODE
            assert set(resolved.values) == used == set(resolved.sources)
            assert "." not in run
            assert set(settings.model.options) <= set(vars(MODEL_OPTIONS[settings.model.name]))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("paper", {"swinb22k": 512, "swinl22k": 640}),
        ("code", {"swinb22k": 512, "swinl22k": 512}),
        ("upstream", {"swinb22k": 640, "swinl22k": 640}),
    ],
)
def test_ade20k_is_scored_at_the_size_of_the_training_crops_but_in_recipe_code(params, recipe, expected):
    for run in params.runs:
        if not run.startswith("ade20k-upernet-"):
            continue
        settings = params.resolve(run, "paper", {"recipe": recipe}).settings
        assert settings.evaluation.short_side == expected.get(run.split("-")[2], 512)
        assert settings.evaluation.short_side == settings.schedule.crop_size[0] or recipe == "code"
        assert params.resolve(run, "mini", {"recipe": recipe}).settings.evaluation.short_side == 96


def test_mini_keeps_the_ratio_of_budgets_and_four_groups(params):
    steps = [
        params.resolve(f"cityscapes-hrnet-hr48-ce-b8-{k}k", "mini").settings.schedule.steps
        for k in (40, 80, 120)
    ]
    assert steps[1] == 2 * steps[0]
    assert steps[2] == 3 * steps[0]
    for run in params.runs:
        settings = params.resolve(run, "mini").settings
        assert settings.schedule.batch_size == 4 * settings.schedule.images_per_group


def test_sources_name_the_supplements_table(params):
    sources = params.resolve("ade20k-upernet-swinl22k-ours", "paper").sources
    assert "Table 5" in sources["lr"]
    assert "Table 7" in params.resolve("cadis-ocrnet-r50-ce", "paper").sources["steps"]
    assert sources["seeds"].startswith("our choice")


def test_a_source_names_where_the_value_really_stands(params):
    def source(run, key, recipe="paper"):
        return params.resolve(run, "paper", {"recipe": recipe}).sources[key]

    for run in ("cadis-ocrnet-r50-ours", "cityscapes-deeplabv3-r101-ours"):
        for key in ("scale_weights", "cross_pairs"):
            assert source(run, key).startswith("our reading")
    assert source("cityscapes-hrnet-hr48-ours", "scale_weights").startswith("supplement, Table 1(b)")
    concat = source("cityscapes-hrnet-hr48-one-scale", "projector")
    assert "HRNet.py:602-605" in concat
    assert "720" in concat
    for key in ("skip_wrong_labels", "scale_range"):
        assert source("cadis-ocrnet-r50-ce", key).startswith("our choice")
    assert "defaults.py:204" in source("cadis-ocrnet-r50-ce", "skip_wrong_labels", "code")
    options = source("cityscapes-upernet-r101-ce", "model_options")
    assert options.startswith(
        "align_corners, dropout: our choice, after the authors' configuration for UPerNet"
    )
    assert "models/UPerNet.py" in source("cityscapes-upernet-r101-ce", "model_options", "code")


def test_a_source_in_the_authors_code_is_a_file_a_configuration_or_an_absence(params):
    for run in params.runs:
        for recipe in ("paper", "code", "upstream"):
            sources = params.resolve(run, "paper", {"recipe": recipe}).sources
            assert not sources["pretrained"].startswith("authors' code")
            for key, source in sources.items():
                if "authors' code" in source and key != "recipe":
                    named = source.split("authors' code", 1)[1]
                    assert ".py" in named or "models/" in named or "no autocast" in named, (run, key, source)


def test_a_recipe_is_a_source_of_its_own(params):
    resolved = params.resolve("cityscapes-upernet-swins-ce", "paper", {"recipe": "code"})
    assert resolved.sources["recipe"].startswith("--set")
    assert "drop_path_rate: authors' code, models/Swin.py" in resolved.sources["model_options"]
    assert "aux_index: authors' configuration" in resolved.sources["model_options"]
    asked = {"model_options": {"dropout": 0.2}}
    found = params.resolve("cityscapes-upernet-swins-ce", "paper", asked).sources["model_options"]
    assert found.endswith("dropout: --set")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schedules", "cityscapes-hrnet-hr48", "lrr"), 0.1, ["lrr", "did you mean 'lr'"]),
        (("schedules", "cityscapes-hrnet-hr48", "lr"), "fast", ["lr", "'fast'", "a number"]),
        (("schedules", "cityscapes-hrnet-hr48", "lr"), -1, ["lr", "-1", "equal to 0"]),
        (("schedules", "cityscapes-hrnet-hr48", "batch_size"), 12.5, ["batch_size", "12.5", "whole number"]),
        (("schedules", "cityscapes-hrnet-hr48", "crop_size"), [512], ["crop_size", "[512]", "one item more"]),
        (("schedules", "cityscapes-hrnet-hr48", "optimizer"), "sgdd", ["optimizer", "'sgdd'", "'sgd'"]),
        (("runs", "cityscapes-hrnet-hr48-ce", "loss"), "cee", ["loss", "'cee'", "did you mean 'ce'"]),
        (("runs", "cityscapes-hrnet-hr48-ce", "hflip"), 2, ["hflip", "2", "equal to 1"]),
        (("profiles", "mini", "datasets", "citiscapes"), {}, ["citiscapes", "did you mean 'cityscapes'"]),
        (("profiless",), {}, ["profiless", "did you mean 'profiles'"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_nearest_valid_one(document, path, value, words):
    block = document
    for key in path[:-1]:
        block = block[key]
    block[path[-1]] = value
    with pytest.raises(UsageError) as caught:
        Params(document)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_key_names_the_run(document):
    del document["schedules"]["cityscapes-hrnet-hr48"]["lr"]
    with pytest.raises(UsageError, match=r"cityscapes-hrnet-hr48-ce.*missing key 'lr'"):
        Params(document).resolve("cityscapes-hrnet-hr48-ce", "paper")


def test_a_run_id_with_a_dot_or_a_foreign_name_is_refused(document):
    for name, message in (("hr48-v1.5", "letters, digits"), ("hr18-ce", "<dataset>-<model>-<variant>")):
        runs = {f"cityscapes-hrnet-{name}": document["runs"]["cityscapes-hrnet-hr48-ce"]}
        with pytest.raises(UsageError, match=message):
            Params({**document, "runs": runs})


def test_unknown_model_option_is_refused(params):
    with pytest.raises(UsageError, match=r"head_chanels.*did you mean 'head_channels'"):
        params.resolve("cityscapes-hrnet-hr48-ce", "paper", {"model_options": {"head_chanels": 3}})


def test_overrides_are_yaml_and_reach_the_settings(params):
    overrides = parse_overrides(["lr=0.5", "crop_size=[64, 64]", "projector=null"])
    resolved = params.resolve("cityscapes-hrnet-hr48-ce", "paper", overrides)
    assert resolved.settings.schedule.lr == 0.5
    assert resolved.settings.schedule.crop_size == (64, 64)
    assert resolved.sources["lr"] == "--set"
    with pytest.raises(UsageError, match="key=value"):
        parse_overrides(["lr"])
    with pytest.raises(UsageError, match="did you mean 'momentum'"):
        params.resolve("cityscapes-hrnet-hr48-ce", "paper", {"momentun": 1})


OURS, PLAIN = "cityscapes-hrnet-hr48-ours-b8-40k", "cityscapes-hrnet-hr48-ce"
SWIN_MS = "ade20k-upernet-swins-ours"
NOTHING = ("log_every=7", "checkpoint_every=7", "threads=7", "seeds=[7]")


@pytest.mark.parametrize(
    ("run", "pair", "changed"),
    [
        (PLAIN, "lr=0.02", ["train"]),
        (PLAIN, "momentum=0.8", ["train"]),
        (PLAIN, "crop_size=[64, 64]", ["train"]),
        (PLAIN, "precision=bf16", ["train", "evaluate"]),
        (PLAIN, "ms_scales=[0.5]", []),
        (PLAIN, "temperature=0.2", []),
        (PLAIN, "embedding_subsample=2", []),
        (PLAIN, "initial_weights=w.pth", ["train"]),
        *((PLAIN, f"validate_every={steps}", []) for steps in ("null", "5")),
        (OURS, "temperature=0.2", ["train"]),
        (SWIN_MS, "ms_scales=[0.5]", ["evaluate"]),
        (SWIN_MS, "warmup_steps=7", ["train"]),
        (SWIN_MS, "momentum=0.8", []),
        (SWIN_MS, "exp_decay=0.8", []),
        *((run, pair, []) for run in (PLAIN, OURS, SWIN_MS) for pair in NOTHING),
    ],
)
def test_the_identity_holds_what_decides_the_outcome_and_nothing_else(params, run, pair, changed):
    base = params.resolve(run, "paper").settings
    other = params.resolve(run, "paper", parse_overrides([pair])).settings
    for phase in PHASES:
        assert (other.identity(phase) != base.identity(phase)) == (phase in changed), phase
        assert (other.digest(phase) != base.digest(phase)) == (phase in changed), phase


def test_parts_that_a_run_does_not_use_are_not_there(params):
    plain = params.resolve("cityscapes-hrnet-hr48-ce-b8-40k", "mini").settings
    assert plain.loss.contrastive is None
    assert plain.evaluation.multi_scale is None
    assert not {"contrastive", "temperature", "ms_scales", "warmup_steps"} & set(plain.flat())
    assert "momentum" not in params.resolve(SWIN_MS, "paper").settings.flat()


class Neighbours(Block):
    """A loss on embeddings that this package does not have."""

    neighbours: Literal[True]
    neighbour_weight: Weight


class LossWithNeighbours(Loss):
    neighbours: Neighbours | None


class SettingsWithNeighbours(Settings):
    loss: LossWithNeighbours


def test_a_new_loss_changes_the_identity_of_the_runs_that_use_it_alone(params):
    for run in (PLAIN, OURS, SWIN_MS):
        resolved = params.resolve(run, "paper")
        before = {
            phase: (resolved.settings.identity(phase), resolved.settings.digest(phase)) for phase in PHASES
        }
        added = {"neighbours": False, "neighbour_weight": 0.5}
        other = from_flat(SettingsWithNeighbours, {**resolved.values, **added}, "test")
        assert {phase: (other.identity(phase), other.digest(phase)) for phase in PHASES} == before
        used = from_flat(SettingsWithNeighbours, {**resolved.values, **added, "neighbours": True}, "test")
        assert used.loss.neighbours.neighbour_weight == 0.5
        assert used.digest("train") != before["train"][1]


@pytest.mark.parametrize(("images", "groups"), [(2, 8), (4, 4), (16, 1)])
def test_the_number_of_groups_follows_from_batch_and_group(params, images, groups):
    overrides = {"batch_size": 16, "images_per_group": images}
    assert params.resolve(OURS, "mini", overrides).settings.schedule.groups == groups


@pytest.mark.parametrize("command", [["mscs", "--help"], ["mscs", "runs"], ["reproduce", "cells"]])
def test_light_commands_do_not_import_torch(command):
    code = f"import runpy, sys; sys.argv = {command!r}; runpy.run_module({command[0]!r}, run_name='__main__')"
    script = (
        f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'cv2' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_options_of_the_model_on_the_command_line_add_to_those_of_the_recipe(params):
    run = "ade20k-upernet-swint-ce"
    before = params.resolve(run, "paper", {"recipe": "code"}).settings.model.options
    asked = {"recipe": "code", "model_options": {"checkpointing": True}}
    assert params.resolve(run, "paper", asked).settings.model.options == {**before, "checkpointing": True}


@pytest.mark.parametrize("run", ["ade20k-upernet-swint-ours", "cadis-ocrnet-r50-ours"])
def test_options_of_another_family_of_backbones_are_dropped_with_a_note(params, run):
    before = params.resolve(run, "mini").settings.model.options
    resolved = params.resolve(run, "mini", {"backbone": "convnext_tiny"})
    kept = {name: value for name, value in before.items() if name != "backbone_options"}
    assert resolved.settings.model.options == kept
    assert "backbone_options" not in resolved.sources["model_options"]
    (note,) = resolved.notes
    assert str(before["backbone_options"]) in note
    own = {"backbone": "convnext_tiny", "model_options": {"backbone_options": {"depths": [1, 1, 1, 1]}}}
    found = params.resolve(run, "mini", own).settings.model.options["backbone_options"]
    assert found == {"depths": [1, 1, 1, 1]}
    backbone = params.resolve(run, "mini").settings.model.backbone
    same = params.resolve(run, "mini", {"backbone": f"{backbone}_x"})
    assert same.settings.model.options == before
    assert not same.notes


def test_a_backbone_without_drop_path_is_given_none(params):
    resolved = params.resolve("ade20k-upernet-swint-ours", "mini", {"backbone": "hrnet_w18_small"})
    assert "drop_path_rate" not in resolved.settings.model.options
    assert len(resolved.notes) == 2


def test_an_empty_mapping_on_the_command_line_clears_the_options_of_the_model(params):
    resolved = params.resolve("ade20k-upernet-swint-ours", "mini", {"model_options": {}})
    assert resolved.settings.model.options == {}
    assert resolved.sources["model_options"] == "--set"


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("steps=abc", "^--set: steps: found 'abc', expected a whole number"),
        ("momentum=x", "^--set: momentum: found 'x', expected a number"),
        ("images_per_group=3", "--set images_per_group: .*no divisor"),
    ],
)
def test_errors_of_the_command_line_say_so(params, pair, message):
    with pytest.raises(UsageError, match=message):
        params.resolve("ade20k-upernet-swint-ours", "mini", parse_overrides([pair]))


def test_without_the_loss_there_is_no_projector(params):
    settings = params.resolve("cadis-ocrnet-r50-ours", "mini", {"contrastive": False}).settings
    assert settings.loss.projector is None


def test_numbers_without_a_point_are_numbers(params):
    settings = params.resolve(
        "cadis-ocrnet-r50-ours", "mini", parse_overrides(["lr=1e-3", "steps=1e3"])
    ).settings
    assert (settings.schedule.lr, settings.schedule.steps) == (1e-3, 1000)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("seeds=[]", "seeds: found \\[\\]"),
        ("seeds=[0, 0]", "none twice"),
        ("evaluation=[]", "at least one item"),
        ("scale_range=[2, 0.5]", "the smaller one first"),
        ("projector=null", "needs a projector"),
        ("scale_weights=[1, 1, 1, 1]", "has 2 feature maps"),
        ("cross_pairs=[[0, 9]]", "two scales out of 0 to 1"),
        ("cross_pairs=[[1, 1]]", "two scales out of 0 to 1"),
        ("images_per_group=3", "no divisor"),
    ],
)
def test_values_that_contradict_each_other_are_refused(params, pair, message):
    with pytest.raises(UsageError, match=message):
        params.resolve("cadis-ocrnet-r50-ours", "mini", parse_overrides([pair]))


@pytest.mark.parametrize("value", ["[", "*a", "!!python/object:os.system x"])
def test_a_value_that_is_no_yaml_is_one_line(value):
    with pytest.raises(UsageError, match="not valid YAML") as caught:
        parse_overrides([f"lr={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  hflip: 0.5", "  hflip: 0.5\n  hflip: 0.4", "stands twice"),
        ("profile: mini", "profile: [mini]", "unknown profile"),
        ("steps_factor:", "steps_factor: abc #", "steps_factor: found 'abc', expected a number"),
        ("\nruns:", "\nruns:\n  5: {}", "found the name 5, expected text"),
    ],
)
def test_slips_in_the_file_are_named(tmp_path, old, new, message):
    path = tmp_path / "params.yaml"
    path.write_text(Path("params.yaml").read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        load_params(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "params.yaml"):
        with pytest.raises(UsageError, match="cannot be read"):
            load_params(path)


def test_a_profile_may_choose_runs_and_replace_their_dataset(params):
    runs = params.runs_of("small")
    assert set(runs) < set(params.runs) == set(params.runs_of("paper"))
    for run in runs:
        data = params.resolve(run, "small").settings.data
        assert (data.name, data.train_split, data.score_split) == ("camvid", "train+val", "test")
        assert params.dataset_of(run, "small") == "camvid"
        assert (
            params.dataset_of(run, "paper") == params.resolve(run, "paper").settings.data.name == "cityscapes"
        )
    with pytest.raises(UsageError, match="unknown run of profile small 'cadis-ocrnet-r50-ce'"):
        params.resolve("cadis-ocrnet-r50-ce", "small")


def test_small_leaves_the_papers_loss_as_it_is(params):
    for run in params.runs_of("small"):
        small, paper = (params.resolve(run, profile).settings for profile in ("small", "paper"))
        assert small.loss == paper.loss
        assert small.schedule.batch_size == paper.schedule.batch_size


def test_splits_are_part_of_a_run_only_where_they_are_not_the_usual_ones(params):
    run = "cityscapes-hrnet-hr48-ce"
    plain = params.resolve(run, "paper").settings
    assert "train_split" not in plain.flat()
    joined = params.resolve(run, "paper", {"train_split": "train+val"}).settings
    assert joined.digest("train") != plain.digest("train")
    scored = params.resolve(run, "paper", {"score_split": "test"}).settings
    assert (scored.digest("train"), scored.data.score_split) == (plain.digest("train"), "test")
    assert scored.digest("evaluate") != plain.digest("evaluate")
    for wrong, message in (("tset", "did you mean 'test'"), ("val+val", "twice")):
        with pytest.raises(UsageError, match=message):
            params.resolve(run, "paper", {"score_split": wrong})


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"runs": {"*": {"dataset": "camvit"}}}, "did you mean 'camvid'"),
        ({"runs": {"*": {"model": "hrnet-hr48"}}}, "unknown model 'hrnet-hr48'"),
    ],
)
def test_wrong_replacements_are_refused(document, overlay, message):
    document["profiles"]["small"] = overlay
    with pytest.raises(UsageError, match=message):
        Params(document)
