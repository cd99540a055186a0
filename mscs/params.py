"""params.yaml, parsed and validated once: blocks in, the `Settings` of one run out.

A run names one entry of each of the blocks `datasets`, `models`, `losses` and `schedules` and overrides
little. Layers, later ones winning: `defaults`, dataset, model, loss, schedule, run; then the recipe's
overlay, then the profile's, then `--set` from the command line. For every value the layer that set it is
kept, so that `mscs show` can say where a number comes from.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mscs.blocks import Block, check, flat_types, form, from_flat
from mscs.datasets import Spec
from mscs.errors import UsageError, unknown_name
from mscs.numerics import FILE as NUMERICS
from mscs.numerics import load_numerics, versions
from mscs.results import read_yaml
from mscs.settings import (
    EMBEDDING_LOSSES,
    PHASES,
    Data,
    Evaluation,
    Float,
    Folders,
    Int,
    Loss,
    Model,
    Name,
    Schedule,
    Settings,
    find_dataset,
)

PAPER_GROUPS = 4
"""Every row of the supplement was trained on four GPUs: unless said otherwise a batch is four groups."""

OUR_CHOICE = "our choice"

NAMES = {"datasets": "dataset", "models": "model", "losses": "loss", "schedules": "schedule"}
"""The blocks of the file, and the key by which a run names its entry of each."""

COMPUTED = {"run", "profile", "recipe", "variant", "schedule", "dataset", "loss", "numerics"}
"""Keys of the settings that no entry of the file holds."""
IDENTITY = COMPUTED - {"recipe"} | {"model", "spec"} | flat_types(Folders).keys()
"""Keys that --set does not change."""


OWNERS = {"datasets": (Data, Evaluation), "models": (Model,), "losses": (Loss,), "schedules": (Schedule,)}
"""Whose keys stand in which block of the file."""


def _entry(*owners: type[Block], **further: Any) -> Any:
    """Return the form of an entry: keys of these blocks of settings, and where the values come from."""
    types = {key: hint for owner in owners for key, hint in flat_types(owner).items() if key not in COMPUTED}
    return form(**types | further, sources=str | dict[str, str])


def _each(accepted: Any, name: Any = Name) -> Any:
    """Return the type of a mapping from names, which become part of paths and commands, to forms."""
    return dict[name, accepted]


def _overlay(**of_runs: Any) -> Any:
    """Return the form of an overlay, whose entries may set anything; those of runs these keys too."""
    by_pattern = _each(_entry(Settings), str)
    rewrite = form(
        backbone=dict[str, str], batch_size=dict[Int, Int], steps_factor=Float, lr_factor=dict[str, Float]
    )
    return form(
        about=str,
        includes=list[str],
        defaults=_entry(Settings),
        **dict.fromkeys(NAMES, by_pattern),
        runs=_each(_entry(Settings, **of_runs), str),
        rewrite=rewrite,
    )


_DOCUMENT = form(
    profile=Any,
    recipe=Any,
    defaults=_entry(Settings),
    **{block: _each(_entry(*owners)) for block, owners in OWNERS.items()},
    runs=_each(_entry(Settings, **dict.fromkeys(NAMES.values(), str))),
    recipes=_each(_overlay()),
    profiles=_each(_overlay(dataset=str)),
)


_ANYTHING = form(**flat_types(Settings))
"""What --set may say, in use or not."""


@dataclass(frozen=True)
class Resolved:
    """Settings of one run, every value by flat key (also those not in use), and where each comes from."""

    settings: Settings
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """What --set has changed beyond its own keys, for the user."""


@dataclass
class _Draft:
    """Values by flat key and where they come from, while the layers are put on each other."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    """Source of every model option: these add up."""

    def put(self, key: str, value: Any, source: str) -> None:
        """Take a value in the place of an earlier one."""
        if key == "model_options" and isinstance(value, Mapping):
            self.options |= dict.fromkeys(value, source)
            value = {**self.values.get(key, {}), **value}
            names: dict[str, list[str]] = {}
            for name, origin in self.options.items():
                names.setdefault(origin, []).append(name)
            source = "; ".join(f"{', '.join(found)}: {origin}" for origin, found in names.items()) or source
        self.values[key], self.sources[key] = value, source

    def drop_options(self, names: Iterable[str]) -> dict[str, Any]:
        """Take model options out; return those that were there."""
        options = dict(self.values.get("model_options", {}))
        dropped = {name: options.pop(name) for name in sorted(names) if name in options}
        self.options = {name: source for name, source in self.options.items() if name in options}
        self.values["model_options"] = options
        self.put("model_options", {}, self.sources.get("model_options", ""))
        return dropped


class Params:
    """The parsed params.yaml."""

    def __init__(self, document: Mapping[str, Any], path: str = "params.yaml"):
        self._path = path
        check(_DOCUMENT, document, path)
        for section in _DOCUMENT.model_fields:
            if section not in document:
                raise UsageError(f"{path}: missing section {section!r}")
        for name in ("profile", "recipe"):
            _choice(name, document[name], document[f"{name}s"], path)
        self._document = document
        self.profile: str = document["profile"]
        self.recipe: str = document["recipe"]
        for run, entry in document["runs"].items():
            where = f"{path}: runs.{run}"
            for block, key in NAMES.items():
                _choice(key, entry.get(key), document[block], where)
            start = f"{entry['dataset']}-{entry['model']}-"
            if not run.startswith(start):
                raise UsageError(f"{where}: a run's id is <dataset>-<model>-<variant>, here '{start}...'")
        for family in ("profiles", "recipes"):
            for name, overlay in document[family].items():
                for block in (*NAMES, "runs"):
                    for pattern, values in overlay.get(block, {}).items():
                        where = f"{path}: {family}.{name}.{block}"
                        if "dataset" in values:
                            _choice("dataset", values["dataset"], document["datasets"], where)
                        if not any(fnmatchcase(name, pattern) for name in document[block]):
                            message = unknown_name(f"{block} entry", pattern, document[block])
                            raise UsageError(f"{where}: {message}")

    @cached_property
    def _numerics(self) -> Mapping[str, Any]:
        return load_numerics(Path(self._path).with_name(NUMERICS.name))

    @property
    def profiles(self) -> tuple[str, ...]:
        """Names of the profiles, in file order."""
        return tuple(self._document["profiles"])

    def about(self, recipe: str) -> str:
        """Return what a recipe takes, in one sentence."""
        return self._document["recipes"][recipe].get("about", recipe)

    @property
    def runs(self) -> tuple[str, ...]:
        """Ids of all runs, in file order."""
        return tuple(self._document["runs"])

    def runs_of(self, profile: str) -> tuple[str, ...]:
        """Return the ids of the runs that a profile has, in file order."""
        patterns = self._document["profiles"][profile].get("includes", ["*"])
        return tuple(run for run in self.runs if any(fnmatchcase(run, pattern) for pattern in patterns))

    def dataset_of(self, run: str, profile: str) -> str:
        """Return the dataset that a run uses in a profile."""
        return self._entry(run, profile)["dataset"]

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of all datasets, in file order."""
        return tuple(self._document["datasets"])

    def spec(self, dataset: str) -> Spec:
        """Return the facts of a dataset; UsageError where the file has none of this name."""
        where = f"{self._path}: datasets.{dataset}"
        _choice("dataset", dataset, self.datasets, self._path)
        entry = self._document["datasets"][dataset]
        keys = flat_types(Folders).keys() & entry.keys()
        folders = from_flat(Folders, {key: entry[key] for key in keys}, where) if keys else None
        return find_dataset(dataset, folders, entry.get("spec"))

    def splits_used(self, dataset: str) -> set[str]:
        """Return the splits of a dataset that runs of any profile train on or are scored on."""
        runs = [(run, profile) for profile in self.profiles for run in self.runs_of(profile)]
        data = [self.resolve(*pair).settings.data for pair in runs if self.dataset_of(*pair) == dataset]
        return {split for x in data for split in f"{x.train_split}+{x.score_split}".split("+")}

    def run_info(self, run: str) -> dict[str, str]:
        """Return id, dataset, model, backbone and variant of a run as the paper's profile has them."""
        entry = self._run(run)
        model = self._document["models"][entry["model"]]
        names = {key: model[key] for key in ("model", "backbone")}
        return {"run": run, "dataset": entry["dataset"], **names, "variant": self._variant(run, entry)}

    def run_model(self, run: str) -> str:
        """Return the name of the entry of `models` that a run uses."""
        return self._run(run)["model"]

    def resolve(
        self,
        run: str,
        profile: str | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Resolved:
        """Merge all layers for `run`; raise UsageError naming run and key where something is wrong."""
        overrides = dict(overrides or {})
        recipe_source = "--set" if "recipe" in overrides else "params.yaml, recipe"
        recipe = overrides.pop("recipe", self.recipe)
        profile = profile or self.profile
        _choice("profile", profile, self._document["profiles"], self._path)
        _choice("recipe", recipe, self._document["recipes"], self._path)
        accepted = flat_types(Settings).keys() - IDENTITY
        for key in overrides:
            if key not in accepted:
                raise UsageError(f"--set: {unknown_name('key', key, accepted)}")
        check(_ANYTHING, overrides, "--set")
        if run in self.runs and run not in self.runs_of(profile):
            raise UsageError(unknown_name(f"run of profile {profile}", run, self.runs_of(profile)))
        entry = self._entry(run, profile)
        draft = _Draft()
        for layer, source in self._layers(entry, run, recipe, profile):
            notes = layer.get("sources", {})
            for key, value in layer.items():
                if key not in ("sources", "dataset") and not (layer is entry and key in NAMES.values()):
                    note = notes if isinstance(notes, str) else notes.get(key, notes.get("*", OUR_CHOICE))
                    draft.put(key, value, f"{note} ({source})")
        self._rewrite(draft, profile, entry["schedule"])
        if overrides.get("model_options") == {}:
            draft.drop_options(tuple(draft.options))
        notes = _drop_options(draft, overrides["backbone"]) if "backbone" in overrides else ()
        for key, value in overrides.items():
            draft.put(key, value, "--set")
        for key in ("dataset", "loss", "schedule"):
            draft.put(key, entry[key], f"params.yaml, runs.{run}")
        draft.put("run", run, f"params.yaml, runs.{run}")
        draft.put("variant", self._variant(run, self._run(run)), f"params.yaml, runs.{run}")
        draft.put("profile", profile, "params.yaml, profile")
        draft.put("recipe", recipe, f"{recipe_source}: {self.about(recipe)}")
        where = f"{self._path}: run {run}" + "".join(f", --set {key}" for key in overrides)
        _complete(draft, overrides, where)
        found = {phase: versions(draft.values, phase, self._numerics) for phase in PHASES}
        draft.put("numerics", found, f"{NUMERICS}: versions of the code that the run uses")
        return Resolved(from_flat(Settings, draft.values, where), draft.values, draft.sources, notes)

    def _layers(
        self, entry: Mapping[str, Any], run: str, recipe: str, profile: str
    ) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Yield (values, source) from weakest to strongest."""
        yield self._document["defaults"], "defaults"
        names = {block: entry[key] for block, key in NAMES.items()}
        for block, name in names.items():
            yield self._document[block][name], f"{block}.{name}"
        yield entry, f"runs.{run}"
        for family, chosen in (("recipes", recipe), ("profiles", profile)):
            overlay = self._document[family][chosen]
            yield overlay.get("defaults", {}), f"{family}.{chosen}"
            for block, name in {**names, "runs": run}.items():
                for pattern, values in overlay.get(block, {}).items():
                    if fnmatchcase(name, pattern):
                        yield values, f"{family}.{chosen}.{block}.{pattern}"

    def _rewrite(self, draft: _Draft, profile: str, schedule: str) -> None:
        """Apply the profile's rules that map the paper's values to others: editing those still counts."""
        rules = self._document["profiles"][profile].get("rewrite", {})
        source = f"profiles.{profile}.rewrite"
        values = draft.values
        for key in ("backbone", "batch_size"):
            if values.get(key) in rules.get(key, {}):
                draft.put(key, rules[key][values[key]], f"{OUR_CHOICE} ({source})")
        factors = {"steps": rules.get("steps_factor", 1)}
        for pattern, factor in rules.get("lr_factor", {}).items():
            if fnmatchcase(schedule, pattern):
                factors["lr"] = factor
        for key, factor in factors.items():
            if factor != 1 and isinstance(values.get(key), int | float):
                value = values[key] * factor
                note = f"{draft.sources[key]}, times {factor} ({OUR_CHOICE}, {source})"
                draft.put(key, max(1, round(value)) if key == "steps" else value, note)

    def _entry(self, run: str, profile: str) -> Mapping[str, Any]:
        """Return the entry of a run, with the dataset that the profile puts in the place of the paper's."""
        entry = self._run(run)
        for pattern, values in self._document["profiles"][profile].get("runs", {}).items():
            if "dataset" in values and fnmatchcase(run, pattern):
                entry = {**entry, "dataset": values["dataset"]}
        return entry

    def _run(self, run: str) -> Mapping[str, Any]:
        if run not in self._document["runs"]:
            raise UsageError(unknown_name("run", run, self._document["runs"]) + " (see `mscs runs`)")
        return self._document["runs"][run]

    @staticmethod
    def _variant(run: str, entry: Mapping[str, Any]) -> str:
        return run.removeprefix(f"{entry['dataset']}-{entry['model']}-")


def _choice(key: str, value: Any, accepted: Any, where: str) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise UsageError(f"{where}: {unknown_name(key, value, accepted)}")


def _drop_options(draft: _Draft, backbone: str) -> tuple[str, ...]:
    """Drop the options that only the backbone before knows, if the new one is of another family; say so."""
    before = draft.values.get("backbone", backbone)
    families = [re.split("[^a-z]", name)[0] for name in (before, backbone)]
    if families[0] == families[1]:
        return ()
    specific = ("backbone_options", "drop_path_rate") if families[1] == "hrnet" else ("backbone_options",)
    return tuple(
        f"model option {name} {value} is meant for {before}; dropped for {backbone}"
        for name, value in draft.drop_options(specific).items()
    )


def _complete(draft: _Draft, overrides: Mapping[str, Any], where: str) -> None:
    """Fill what follows from other values: groups of images, and the scales that the model really has."""
    values = draft.values
    if values.get("folders") or values.get("spec"):
        own = {"data_source": "real", "image_size": None, "train_images": None, "val_images": None}
        for key in own.keys() - overrides.keys():
            draft.put(key, own[key], "a dataset of your own is never generated")
    if values.get("images_per_group") is None and isinstance(values.get("batch_size"), int):
        images, rest = divmod(values["batch_size"], PAPER_GROUPS)
        if rest:
            raise UsageError(
                f"{where}: batch_size {values['batch_size']} is not a multiple of the paper's {PAPER_GROUPS} "
                "groups; set images_per_group too, to a divisor of it"
            )
        draft.put("images_per_group", images, f"batch_size / {PAPER_GROUPS}: the paper's images per GPU")
    if not any(values.get(loss) for loss in EMBEDDING_LOSSES) and "projector" not in overrides:
        values["projector"] = None  # it would train on nothing
    maps = 1 if values.get("projector") == "concat" else values.get("feature_maps", 0)
    reading = f"our reading for {maps} maps (ledger: fewer-maps):"
    weights, pairs = values.get("scale_weights", []), values.get("cross_pairs", [])
    if "scale_weights" not in overrides and len(weights) > maps:
        draft.put("scale_weights", weights[:maps], f"{reading} the first printed weights")
    # the pairs name four maps; with fewer the coarse end of a pair moves along, and may fall together
    moved = [[fine, coarse - 4 + maps] for fine, coarse in pairs]
    if "cross_pairs" not in overrides and maps and moved != pairs:
        kept = [pair for pair in moved if pair[1] > pair[0]]
        draft.put("cross_pairs", kept, f"{reading} the finest with the coarsest")


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml; raise UsageError with file, key and remedy."""
    return Params(read_yaml(path, "name it with --params"), str(path))


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Turn ["key=value", ...] into a mapping; values are YAML."""
    overrides = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise UsageError(f"--set {pair!r}: expected key=value, for example --set lr=0.01")
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            said = " ".join(str(error).split())
            raise UsageError(f"--set {pair!r}: the value is not valid YAML: {said}") from None
    return overrides
