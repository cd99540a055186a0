"""params.yaml, parsed and validated once: blocks in, the `Settings` of one run out.

A run names one entry of each of the blocks `datasets`, `models`, `losses` and `schedules` and overrides
little. Layers, later ones winning: `defaults`, dataset, model, loss, schedule, run; then the recipe's
overlay, then the profile's, then `--set` from the command line. For every value the layer that set it is
kept, so that `mscs show` can say where a number comes from.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mscs.blocks import check_value, from_flat, keys
from mscs.errors import UsageError, unknown_name
from mscs.numerics import FILE as NUMERICS
from mscs.numerics import load_numerics, versions
from mscs.settings import EMBEDDING_LOSSES, PHASES, Data, Evaluation, Loss, Model, Schedule, Settings

PAPER_GROUPS = 4
"""Every row of the supplement was trained on four GPUs: unless said otherwise a batch is four groups."""

OUR_CHOICE = "our choice"
NAME = re.compile(r"[A-Za-z0-9_-]+")

BLOCKS = ("datasets", "models", "losses", "schedules")
OWNERS = {"datasets": (Data, Evaluation), "models": (Model,), "losses": (Loss,), "schedules": (Schedule,)}
"""Whose keys stand in which block of the file."""

SECTIONS = ("profile", "recipe", "defaults", *BLOCKS, "recipes", "profiles", "runs")
NAMES = {"datasets": "dataset", "models": "model", "losses": "loss", "schedules": "schedule"}
"""The key by which a run names its entry of a block."""

COMPUTED = {"run", "profile", "recipe", "variant", "schedule", "dataset", "loss", "numerics"}
IDENTITY = COMPUTED - {"recipe"} | {"model"}
REWRITES: dict[str, Any] = {
    "backbone": dict[str, str],
    "batch_size": dict[int, int],
    "steps_factor": float,
    "lr_factor": dict[str, float],
}


@dataclass(frozen=True)
class Resolved:
    """Settings of one run, every value by flat key (also those not in use), and where each comes from."""

    settings: Settings
    values: Mapping[str, Any]
    sources: Mapping[str, str]


class Params:
    """The parsed params.yaml."""

    def __init__(self, document: Mapping[str, Any], path: str = "params.yaml"):
        self._path = path
        _known(document, SECTIONS, path, "section")
        missing = [name for name in SECTIONS if name not in document]
        if missing:
            raise UsageError(f"{path}: missing section {missing[0]!r}; needed: {', '.join(SECTIONS)}")
        for section in ("profiles", "recipes", *BLOCKS, "runs"):
            _check_names(_mapping(document[section], f"{path}: {section}"), f"{path}: {section}")
        for name in ("profile", "recipe"):
            _choice(name, document[name], document[f"{name}s"], path)
        self._document = document
        self.profile: str = document["profile"]
        self.recipe: str = document["recipe"]
        for block in BLOCKS:
            for name, entry in _mapping(document[block], f"{path}: {block}").items():
                self._check_keys(entry, f"{block}.{name}", block)
        self._check_keys(document["defaults"], "defaults")
        for run, entry in _mapping(document["runs"], f"{path}: runs").items():
            self._check_run(run, entry)
        for family in ("profiles", "recipes"):
            for name, overlay in _mapping(document[family], f"{path}: {family}").items():
                self._check_overlay(overlay, f"{family}.{name}")

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

    def run_info(self, run: str) -> dict[str, str]:
        """Return id, dataset, model, backbone and variant of a run as the paper's profile has them."""
        entry = self._run(run)
        model = self._document["models"][entry["model"]]
        return {
            "run": run,
            "dataset": entry["dataset"],
            "model": model["model"],
            "backbone": model["backbone"],
            "variant": self._variant(run, entry),
        }

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
        _known(overrides, set(keys(Settings)) - IDENTITY, "--set", "key")
        if run in self.runs and run not in self.runs_of(profile):
            raise UsageError(unknown_name(f"run of profile {profile}", run, self.runs_of(profile)))
        entry = self._entry(run, profile)
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        origins: dict[str, str] = {}
        for layer, source in self._layers(entry, run, recipe, profile):
            notes = layer.get("sources", {})
            for key, value in layer.items():
                if key in ("sources", "dataset") or (layer is entry and key in NAMES.values()):
                    continue
                note = notes if isinstance(notes, str) else notes.get(key, notes.get("*", OUR_CHOICE))
                sources[key] = f"{note} ({source})"
                if key == "model_options":  # they add up, each with its source
                    origins |= dict.fromkeys(value, sources[key])
                    value = {**values.get(key, {}), **value}
                values[key] = value
        self._rewrite(values, sources, profile, entry["schedule"])
        if isinstance(overrides.get("model_options"), Mapping):
            origins |= dict.fromkeys(overrides["model_options"], "--set")
            overrides["model_options"] = {**values.get("model_options", {}), **overrides["model_options"]}
        values |= overrides
        sources |= dict.fromkeys(overrides, "--set")
        if origins:
            sources["model_options"] = _by_origin(origins)
        own = {key: entry[key] for key in ("dataset", "loss", "schedule")}
        own |= {"run": run, "variant": self._variant(run, self._run(run))}
        values |= {**own, "profile": profile, "recipe": recipe}
        sources |= dict.fromkeys(own, f"params.yaml, runs.{run}")
        sources |= {"profile": "params.yaml, profile", "recipe": f"{recipe_source}: {self.about(recipe)}"}
        where = f"{self._path}: run {run}"
        _complete(values, sources, overrides, where)
        values["numerics"] = {phase: versions(values, phase, self._numerics) for phase in PHASES}
        sources["numerics"] = f"{NUMERICS}: versions of the code that the run uses"
        return Resolved(from_flat(Settings, values, where), values, sources)

    def _layers(
        self, entry: Mapping[str, Any], run: str, recipe: str, profile: str
    ) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Yield (values, source) from weakest to strongest."""
        yield self._document["defaults"], "defaults"
        names = {block: entry[key] for block, key in NAMES.items()}
        for block in BLOCKS:
            yield self._document[block][names[block]], f"{block}.{names[block]}"
        yield entry, f"runs.{run}"
        for family, chosen in (("recipes", recipe), ("profiles", profile)):
            overlay = self._document[family][chosen]
            yield overlay.get("defaults", {}), f"{family}.{chosen}"
            for block in (*BLOCKS, "runs"):
                name = run if block == "runs" else names[block]
                for pattern, values in overlay.get(block, {}).items():
                    if fnmatchcase(name, pattern):
                        yield values, f"{family}.{chosen}.{block}.{pattern}"

    def _rewrite(self, values: dict[str, Any], sources: dict[str, str], profile: str, schedule: str) -> None:
        """Apply the profile's rules that map the paper's values to others: editing those still counts."""
        rules = self._document["profiles"][profile].get("rewrite", {})
        source = f"profiles.{profile}.rewrite"
        for key in ("backbone", "batch_size"):
            if values.get(key) in rules.get(key, {}):
                values[key] = rules[key][values[key]]
                sources[key] = f"{OUR_CHOICE} ({source})"
        factors = {"steps": rules.get("steps_factor", 1)}
        for pattern, factor in rules.get("lr_factor", {}).items():
            if fnmatchcase(schedule, pattern):
                factors["lr"] = factor
        for key, factor in factors.items():
            if factor != 1 and isinstance(values.get(key), int | float):
                values[key] *= factor
                sources[key] += f", times {factor} ({OUR_CHOICE}, {source})"
        if isinstance(values.get("steps"), float):
            values["steps"] = max(1, round(values["steps"]))

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

    def _check_keys(
        self, entry: Any, where: str, block: str | None = None, also: set[str] | None = None
    ) -> None:
        where = f"{self._path}: {where}"
        owners = OWNERS[block] if block else (Settings,)
        accepted = {key for owner in owners for key in keys(owner)}
        _known(_mapping(entry, where), accepted - COMPUTED | {"sources"} | (also or set()), where, "key")
        for key, value in entry.items():
            if key != "sources" and key not in (also or ()):
                check_value(Settings, key, value, where)

    def _check_overlay(self, overlay: Any, where: str) -> None:
        accepted = ("about", "includes", "defaults", *BLOCKS, "runs", "rewrite")
        _known(_mapping(overlay, f"{self._path}: {where}"), accepted, f"{self._path}: {where}", "section")
        self._check_keys(overlay.get("defaults", {}), f"{where}.defaults")
        for block in (*BLOCKS, "runs"):
            for pattern, values in overlay.get(block, {}).items():
                if not any(fnmatchcase(name, pattern) for name in self._document[block]):
                    message = unknown_name(f"{block} entry", pattern, self._document[block])
                    raise UsageError(f"{self._path}: {where}.{block}: {message}")
                replaces = {"dataset"} if block == "runs" and where.startswith("profiles.") else set()
                self._check_keys(values, f"{where}.{block}.{pattern}", also=replaces)
                if "dataset" in values:
                    _choice(
                        "dataset", values["dataset"], self._document["datasets"], f"{self._path}: {where}"
                    )
        rules = overlay.get("rewrite", {})
        _known(rules, REWRITES, f"{self._path}: {where}.rewrite", "rule")
        for rule, value in rules.items():
            try:
                TypeAdapter(REWRITES[rule], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as error:
                raise UsageError(
                    f"{self._path}: {where}.rewrite.{rule}: found {value!r}; {error.errors()[0]['msg']}"
                ) from None

    def _check_run(self, run: str, entry: Any) -> None:
        where = f"{self._path}: runs.{run}"
        self._check_keys(entry, f"runs.{run}", also=set(NAMES.values()))
        for block, key in NAMES.items():
            if key not in entry:
                raise UsageError(f"{where}: missing key {key!r} (names an entry of {block})")
            _choice(f"{key}", entry[key], self._document[block], where)
        if not run.startswith(f"{entry['dataset']}-{entry['model']}-"):
            raise UsageError(
                f"{where}: a run's id is <dataset>-<model>-<variant>, "
                f"here '{entry['dataset']}-{entry['model']}-...'"
            )


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and validate params.yaml; raise UsageError with file, key and remedy."""
    path = Path(path)
    try:
        document = yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError:
        raise UsageError(
            f"{path} not found in {Path.cwd()}; run from the project's root folder or name it with --params"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {_one_line(error)}") from None
    return Params(_mapping(document, str(path)), str(path))


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
            raise UsageError(f"--set {pair!r}: the value is not valid YAML: {_one_line(error)}") from None
    return overrides


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML without doubled keys, of which the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        double = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if double is not None:
            raise yaml.YAMLError(f"key {double!r} stands twice in one mapping{node.start_mark}")
        return super().construct_mapping(node, deep)


def _by_origin(origins: Mapping[str, str]) -> str:
    """Return 'a, b: origin; c: other' for the origins of a, b and c."""
    names: dict[str, list[str]] = {}
    for name, origin in origins.items():
        names.setdefault(origin, []).append(name)
    return "; ".join(f"{', '.join(found)}: {origin}" for origin, found in names.items())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: expected a mapping of names to values, found {value!r}")
    return value


def _check_names(found: Mapping[Any, Any], where: str) -> None:
    """Refuse names that could mean something to a shell or lead out of a folder."""
    for name in found:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UsageError(f"{where}: found the name {name!r}; accepted are letters, digits, _ and -")


def _known(found: Mapping[str, Any], accepted: Any, where: str, kind: str) -> None:
    for key in found:
        if key not in accepted:
            raise UsageError(f"{where}: {unknown_name(kind, key, accepted)}")


def _choice(key: str, value: Any, accepted: Any, where: str) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise UsageError(f"{where}: {unknown_name(key, value, accepted)}")


def _complete(
    values: dict[str, Any], sources: dict[str, str], overrides: Mapping[str, Any], where: str
) -> None:
    """Fill what follows from other values: groups of images, and the scales that the model really has."""
    if values.get("images_per_group") is None and isinstance(values.get("batch_size"), int):
        if values["batch_size"] % PAPER_GROUPS:
            raise UsageError(
                f"{where}: batch_size {values['batch_size']} is not a multiple of the paper's {PAPER_GROUPS} "
                "groups; set images_per_group too, to a divisor of it"
            )
        values["images_per_group"] = values["batch_size"] // PAPER_GROUPS
        sources["images_per_group"] = f"batch_size / {PAPER_GROUPS}: the paper's images per GPU"
    if not any(values.get(loss) for loss in EMBEDDING_LOSSES) and "projector" not in overrides:
        values["projector"] = None  # it would train on nothing
    maps = 1 if values.get("projector") == "concat" else values.get("feature_maps", 0)
    reading = f"our reading for {maps} maps (ledger: fewer-maps):"
    if "scale_weights" not in overrides and len(values.get("scale_weights", ())) > maps:
        values["scale_weights"] = list(values["scale_weights"])[:maps]
        sources["scale_weights"] = f"{reading} the first printed weights"
    if "cross_pairs" not in overrides and maps and "cross_pairs" in values:
        # the pairs name four maps; with fewer the coarse end of a pair moves along, and may fall together
        moved = [[fine, coarse - 4 + maps] for fine, coarse in values["cross_pairs"]]
        if moved != values["cross_pairs"]:
            values["cross_pairs"] = [pair for pair in moved if pair[1] > pair[0]]
            sources["cross_pairs"] = f"{reading} the finest with the coarsest"
