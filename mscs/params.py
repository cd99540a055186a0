"""params.yaml, parsed and validated once: blocks in, one flat frozen `Settings` per run out.

A run names one entry of each of the blocks `datasets`, `models`, `losses` and `schedules` and overrides
little. Layers, later ones winning: `defaults`, dataset, model, loss, schedule, run; then the recipe's
overlay, then the profile's, then `--set` from the command line. For every value the layer that set it is
kept, so that `mscs show` can say where a number comes from.

A library schema (pydantic, attrs) would check the types; it would neither name the nearest valid key nor
carry provenance through the layers, and it would cost start-up time. This file imports nothing heavy.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from mscs.datasets.registry import DatasetName
from mscs.errors import UsageError, unknown_name
from mscs.models.options import MODEL_OPTIONS

GROUPS = 4
"""Every row of the supplement was trained on four GPUs: a batch is always four groups of images."""

OUR_CHOICE = "our choice"

BLOCKS = ("datasets", "models", "losses", "schedules")
SECTIONS = ("profile", "recipe", "defaults", *BLOCKS, "recipes", "profiles", "runs")

Check = tuple[float | None, float | None]


def _setting(block: str, phase: str = "train", bounds: Check = (None, None)) -> Any:
    return field(metadata={"block": block, "phase": phase, "bounds": bounds})


def _dataset(phase: str = "train", bounds: Check = (None, None)) -> Any:
    return _setting("datasets", phase, bounds)


def _model(bounds: Check = (None, None)) -> Any:
    return _setting("models", "both", bounds)


def _loss(bounds: Check = (None, None)) -> Any:
    return _setting("losses", "train", bounds)


def _schedule(bounds: Check = (None, None)) -> Any:
    return _setting("schedules", "train", bounds)


def _engine(phase: str = "train", bounds: Check = (None, None)) -> Any:
    return _setting("defaults", phase, bounds)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides one run, resolved: plain values, nothing left to look up.

    `phase` in a field's metadata says whose result it can change: "train", "evaluate" or "both".
    """

    run: str = _setting("", "both")
    profile: str = _setting("", "both")
    recipe: Literal["paper", "code", "upstream"] = _setting("", "info")
    variant: str = _setting("", "info")
    schedule: str = _setting("", "info")
    seeds: tuple[int, ...] = _engine("both", (0, None))

    dataset: DatasetName = _dataset("both")  # noqa: RUF009
    task: int | None = _dataset("both", (1, 3))
    data_source: Literal["real", "generated"] = _dataset("both")
    skip_wrong_labels: bool = _dataset("both")
    image_size: tuple[int, int] | None = _dataset("both", (32, None))
    train_images: int | None = _dataset("both", (1, None))
    val_images: int | None = _dataset("both", (1, None))
    class_weighted: bool = _dataset()
    hflip: float = _dataset(bounds=(0, 1))
    scale_range: tuple[float, float] | None = _dataset(bounds=(0.01, 100))
    scale_base: Literal["native"] | int = _dataset(bounds=(1, None))
    aspect_range: tuple[float, float] = _dataset(bounds=(0.1, 10))
    class_max_ratio: float = _dataset(bounds=(0.01, 1))
    color: Literal["jitter", "photometric", "none"] = _dataset()
    reflect_pad: tuple[int, int] = _dataset("both", (0, None))
    evaluation: tuple[Literal["ss", "ms"], ...] = _dataset("evaluate")
    short_side: int | None = _dataset("evaluate", (1, None))
    pad_multiple: int | None = _dataset("evaluate", (1, None))
    score_padding: bool = _dataset("evaluate")
    ms_scales: tuple[float, ...] = _dataset("evaluate", (0.05, 10))
    ms_long_side: int | None = _dataset("evaluate", (1, None))
    ms_window: tuple[int, int] | None = _dataset("evaluate", (1, None))
    ms_overlap: float = _dataset("evaluate", (0, 0.95))
    ms_border: Literal["shift", "pad"] = _dataset("evaluate")
    ms_merge: Literal["exp", "logits", "softmax"] = _dataset("evaluate")
    absent_classes: Literal["zero", "skip"] = _dataset("evaluate")

    model: Literal["hrnet", "ocrnet", "deeplabv3", "upernet"] = _model()
    backbone: str = _model()
    pretrained: bool = _setting("models")
    feature_maps: int = _setting("models", bounds=(1, 4))
    aux_weight: float = _setting("models", bounds=(0, None))
    model_options: Mapping[str, Any] = _model()

    loss: str = _loss()
    projector: Literal["backbone", "fpn", "concat"] | None = _loss()
    contrastive: bool = _loss()
    scale_weights: tuple[float, ...] = _loss((0, None))
    cross_pairs: tuple[tuple[int, int], ...] = _loss((0, None))
    multi_scale_weight: float = _loss((0, None))
    cross_scale_weight: float = _loss((0, None))
    temperature: float = _loss((0.001, None))
    sampling: Literal["balanced", "all"] = _loss()
    embedding_subsample: int = _loss((1, 8))
    min_views: int = _loss((1, None))
    max_views: int = _loss((1, None))
    max_anchors: int = _loss((2, None))

    crop_size: tuple[int, int] = _schedule((16, None))
    optimizer: Literal["sgd", "adamw", "adam"] = _schedule()
    lr: float = _schedule((0, None))
    lr_schedule: Literal["poly", "linear", "exp"] = _schedule()
    warmup_steps: int = _schedule((0, None))
    poly_power: float = _schedule((0, None))
    exp_decay: float = _schedule((0, 1))
    momentum: float = _schedule((0, 1))
    weight_decay: float = _schedule((0, None))
    batch_size: int = _schedule((GROUPS, None))
    images_per_group: int = _schedule((1, None))
    steps: int = _schedule((1, None))

    accumulation_steps: int = _engine("train", (1, GROUPS))
    batch_norm: Literal["batch", "part", "frozen"] = _engine()
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = _engine("both")
    tf32: bool = _engine("both")
    channels_last: bool = _engine("both")
    compile: bool = _engine("both")
    deterministic: bool = _engine("both")
    threads: int | None = _engine("both", (1, None))
    log_every: int = _engine("train", (1, None))
    checkpoint_every: int = _engine("train", (1, None))

    def phase(self, name: str) -> dict[str, Any]:
        """Return, as plain JSON values, the settings that can change the outcome of "train" or "evaluate"."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata["phase"] in (name, "both")]
        plain = to_plain(self)
        return {key: plain[key] for key in names}

    def digest(self, phase: str = "train") -> str:
        """Return a 12-digit fingerprint of what decides `phase`; it names the checkpoint folder."""
        text = json.dumps(self.phase(phase), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Resolved:
    """Settings of one run and, for each of them, where the value comes from."""

    settings: Settings
    sources: Mapping[str, str]


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}
_TYPES = typing.get_type_hints(Settings)
_RUN_KEYS = {"dataset", "model", "loss", "schedule"}
_COMPUTED = {"run", "profile", "recipe", "variant", "images_per_group", "schedule", "dataset", "loss"}
_REWRITES: dict[str, Any] = {
    "backbone": Mapping[str, str],
    "batch_size": Mapping[int, int],
    "steps_factor": float,
    "lr_factor": Mapping[str, float],
}
_NUMBER = re.compile(r"[-+]?[0-9]+([.][0-9]*)?[eE][-+]?[0-9]+")
_IDENTITY = {"run", "profile", "variant", "schedule", "dataset", "model", "loss"}


def to_plain(settings: Settings) -> dict[str, Any]:
    """Return settings as JSON-ready values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def from_plain(values: Mapping[str, Any]) -> Settings:
    """Rebuild settings from `to_plain`, validating every value."""
    return _build(dict(values), "resolved settings")


class Params:
    """The parsed params.yaml."""

    def __init__(self, document: Mapping[str, Any], path: str = "params.yaml"):
        self._path = path
        _known(document, SECTIONS, path, "section")
        missing = [name for name in SECTIONS if name not in document]
        if missing:
            raise UsageError(f"{path}: missing section {missing[0]!r}; needed: {', '.join(SECTIONS)}")
        for name in ("profile", "recipe"):
            _choice(name, document[name], _mapping(document[f"{name}s"], f"{path}: {name}s"), path)
        self._document = document
        self.profile: str = document["profile"]
        self.recipe: str = document["recipe"]
        for block in BLOCKS:
            _mapping(document[block], f"{path}: {block}")
            for name, entry in document[block].items():
                self._check_keys(entry, f"{block}.{name}", block)
        self._check_keys(document["defaults"], "defaults", None)
        for run, entry in _mapping(document["runs"], f"{path}: runs").items():
            self._check_run(run, entry)
        for family in ("profiles", "recipes"):
            for name, overlay in _mapping(document[family], f"{path}: {family}").items():
                self._check_overlay(overlay, f"{family}.{name}")

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
        _known(overrides, set(FIELDS) - _IDENTITY, "--set", "key")
        entry = self._run(run)
        where = f"{self._path}: run {run}"
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        origins: dict[str, str] = {}
        for layer, source in self._layers(entry, run, recipe, profile):
            notes = layer.get("sources", {})
            for key, value in layer.items():
                if key == "sources" or (layer is entry and key in _RUN_KEYS):
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
        values.update(overrides)
        sources.update(dict.fromkeys(overrides, "--set"))
        if origins:
            sources["model_options"] = _by_origin(origins)
        values |= {"run": run, "profile": profile, "recipe": recipe}
        values |= {"dataset": entry["dataset"], "loss": entry["loss"]}
        values |= {"variant": self._variant(run, entry), "schedule": entry["schedule"]}
        sources |= dict.fromkeys(
            ("run", "dataset", "loss", "schedule", "variant"), f"params.yaml, runs.{run}"
        )
        sources |= {"profile": "params.yaml, profile", "recipe": f"{recipe_source}: {self.about(recipe)}"}
        _complete(values, sources, where, overrides)
        settings = _build(values, where)
        _known(settings.model_options, MODEL_OPTIONS[settings.model], f"{where}: model_options", "option")
        return Resolved(settings, sources)

    def _layers(
        self, entry: Mapping[str, Any], run: str, recipe: str, profile: str
    ) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Yield (values, source) from weakest to strongest."""
        yield self._document["defaults"], "defaults"
        names = {block: entry[key] for block, key in _block_keys()}
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

    def _run(self, run: str) -> Mapping[str, Any]:
        if run not in self._document["runs"]:
            raise UsageError(unknown_name("run", run, self._document["runs"]) + " (see `mscs runs`)")
        return self._document["runs"][run]

    @staticmethod
    def _variant(run: str, entry: Mapping[str, Any]) -> str:
        return run.removeprefix(f"{entry['dataset']}-{entry['model']}-")

    def _check_keys(self, entry: Any, where: str, block: str | None) -> None:
        where = f"{self._path}: {where}"
        accepted = {n for n, f in FIELDS.items() if block is None or f.metadata["block"] == block}
        _known(_mapping(entry, where), (accepted - _COMPUTED) | {"sources"}, where, "key")
        for key, value in entry.items():
            if key != "sources":
                _convert(key, value, where)

    def _check_overlay(self, overlay: Any, where: str) -> None:
        _known(
            _mapping(overlay, f"{self._path}: {where}"),
            {"about", "defaults", *BLOCKS, "runs", "rewrite"},
            f"{self._path}: {where}",
            "section",
        )
        self._check_keys(overlay.get("defaults", {}), f"{where}.defaults", None)
        for block in (*BLOCKS, "runs"):
            for pattern, values in overlay.get(block, {}).items():
                if not any(fnmatchcase(name, pattern) for name in self._document[block]):
                    message = unknown_name(f"{block} entry", pattern, self._document[block])
                    raise UsageError(f"{self._path}: {where}.{block}: {message}")
                self._check_keys(values, f"{where}.{block}.{pattern}", None)
        rules = overlay.get("rewrite", {})
        where = f"{self._path}: {where}.rewrite"
        _known(rules, _REWRITES, where, "rule")
        for rule, value in rules.items():
            try:
                _as_type(value, _REWRITES[rule])
            except TypeError:
                raise UsageError(
                    f"{where}.{rule}: found {value!r}, expected {_describe(_REWRITES[rule])}"
                ) from None

    def _check_run(self, run: str, entry: Any) -> None:
        where = f"{self._path}: runs.{run}"
        if not isinstance(run, str):
            raise UsageError(f"{where}: a run's id is text, <dataset>-<model>-<variant>")
        _known(_mapping(entry, where), (set(FIELDS) - _COMPUTED) | _RUN_KEYS | {"sources"}, where, "key")
        for block, key in _block_keys():
            if key not in entry:
                raise UsageError(f"{where}: missing key {key!r} (names an entry of {block})")
            _choice(f"{key}", entry[key], self._document[block], where)
        if "." in run or not run.startswith(f"{entry['dataset']}-{entry['model']}-"):
            raise UsageError(
                f"{where}: a run's id is <dataset>-<model>-<variant> without dots, "
                f"here '{entry['dataset']}-{entry['model']}-...'"
            )
        self._check_keys({k: v for k, v in entry.items() if k not in _RUN_KEYS}, f"runs.{run}", None)


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


def _block_keys() -> tuple[tuple[str, str], ...]:
    return (("datasets", "dataset"), ("models", "model"), ("losses", "loss"), ("schedules", "schedule"))


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: expected a mapping of names to values, found {value!r}")
    return value


def _known(found: Mapping[str, Any], accepted: Any, where: str, kind: str) -> None:
    for key in found:
        if key not in accepted:
            raise UsageError(f"{where}: {unknown_name(kind, key, accepted)}")


def _choice(key: str, value: Any, accepted: Any, where: str) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise UsageError(f"{where}: {unknown_name(key, value, accepted)}")


def _complete(
    values: dict[str, Any], sources: dict[str, str], where: str, overrides: Mapping[str, Any]
) -> None:
    """Fill what follows from other values: groups of images, and the scales that the model really has."""
    if isinstance(values.get("batch_size"), int):
        if values["batch_size"] % GROUPS:
            raise UsageError(
                f"{where}: batch_size {values['batch_size']} is not a multiple of {GROUPS}: "
                "a batch is always four groups of images"
            )
        if "images_per_group" not in overrides:
            values["images_per_group"] = values["batch_size"] // GROUPS
            sources["images_per_group"] = "batch_size / 4: the paper's images per GPU"
    parts = values.get("accumulation_steps", 1)
    if isinstance(parts, int) and parts > 0 and GROUPS % parts:
        raise UsageError(f"{where}: accumulation_steps {parts} does not divide the batch's {GROUPS} groups")
    if parts != 1 and values.get("batch_norm") == "batch":
        raise UsageError(
            f"{where}: with accumulation_steps {parts}, batch norm cannot see the whole batch. Say which "
            "one to use: batch_norm=part (statistics of each part) or batch_norm=frozen (running statistics)"
        )
    if values.get("contrastive") is False and "projector" not in overrides:
        values["projector"] = None  # it would train on nothing
    maps = 1 if values.get("projector") == "concat" else values.get("feature_maps", 0)
    reading = f"our reading for {maps} maps (ledger: fewer-maps):"
    if "scale_weights" not in overrides and len(values.get("scale_weights", ())) > maps:
        values["scale_weights"] = list(values["scale_weights"])[:maps]
        sources["scale_weights"] = f"{reading} the first printed weights"
    if "cross_pairs" not in overrides and maps and "cross_pairs" in values:
        wanted = [tuple(pair) for pair in values["cross_pairs"]]
        last = [(first, second - 4 + maps) for first, second in wanted]
        values["cross_pairs"] = [list(pair) for pair in last if pair[1] > pair[0]]
        if last != wanted:
            sources["cross_pairs"] = f"{reading} the finest with the coarsest"


def _build(values: dict[str, Any], where: str) -> Settings:
    _known(values, FIELDS, where, "key")
    for name, spec in FIELDS.items():
        if name not in values:
            block = spec.metadata["block"]
            raise UsageError(f"{where}: missing key {name!r}; set it in {block or 'params.yaml'}")
    settings = Settings(**{name: _convert(name, value, where) for name, value in values.items()})
    for problem in _contradictions(settings):
        raise UsageError(f"{where}: {problem}")
    return settings


def _contradictions(settings: Settings) -> Iterator[str]:
    """Yield what is wrong with values that are possible one by one."""
    for name in ("seeds", "evaluation"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            yield f"{name}: found {list(values)}, expected at least one item and none twice"
    for name in ("scale_range", "aspect_range"):
        low, high = getattr(settings, name) or (0, 0)
        if low > high:
            yield f"{name}: found [{low}, {high}], expected the smaller one first"
    if settings.contrastive:
        scales = len(settings.scale_weights)
        maps = 1 if settings.projector == "concat" else settings.feature_maps
        if settings.projector is None:
            yield "contrastive: true needs a projector: backbone, fpn or concat"
        if scales != maps:
            yield f"scale_weights: found {scales}, but projector {settings.projector} has {maps} feature maps"
        if any(a == b or max(a, b) >= scales for a, b in settings.cross_pairs):
            pairs = [list(pair) for pair in settings.cross_pairs]
            yield f"cross_pairs: found {pairs}, expected pairs of two scales out of 0 to {scales - 1}"
    if settings.batch_size % settings.images_per_group:
        yield f"images_per_group: found {settings.images_per_group}, no divisor of batch_size"


def _convert(name: str, value: Any, where: str) -> Any:
    """Check one value against its field's type and bounds; lists become tuples, whole floats stay floats."""
    hint = _TYPES[name]
    try:
        converted = _as_type(value, hint)
    except TypeError:
        raise UsageError(f"{where}: {name}: found {value!r}, expected {_describe(hint)}") from None
    low, high = FIELDS[name].metadata["bounds"]
    for number in _numbers(converted):
        if (low is not None and number < low) or (high is not None and number > high):
            limits = f"from {low if low is not None else '-inf'} to {high if high is not None else 'inf'}"
            raise UsageError(f"{where}: {name}: found {value!r}, accepted are values {limits}")
    return converted


def _as_type(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _as_type(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        if value in args and not isinstance(value, bool):
            return value
        raise TypeError
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        if args[-1] is Ellipsis:
            return tuple(_as_type(item, args[0]) for item in value)
        if len(value) != len(args):
            raise TypeError
        return tuple(_as_type(item, arg) for item, arg in zip(value, args, strict=True))
    if hint in (float, int) and isinstance(value, str) and _NUMBER.fullmatch(value):
        number = float(value)  # YAML takes 1e-3, without a point, for text
        value = int(number) if hint is int and number.is_integer() else number
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            raise TypeError
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    plain = {bool: bool, str: str, types.NoneType: types.NoneType}
    if hint in plain and isinstance(value, plain[hint]):
        return value
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        key, item = args
        return dict(value) if item is Any else {_as_type(k, key): _as_type(v, item) for k, v in value.items()}
    raise TypeError


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each item {_describe(args[0])}"
        return f"a list of {len(args)} items, each {_describe(args[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if origin is not None and args[-1] is not Any:
        return f"a mapping from {_describe(args[0])} to {_describe(args[1])}"
    return "null" if hint is types.NoneType else names.get(hint, "a mapping")
