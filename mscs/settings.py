"""One run's settings, nested by the part that they belong to: frozen, validated, nothing left to look up.

What a run does not use is not part of its identity: multi-scale inference, a loss on embeddings, an optimizer
and a learning-rate schedule each declare a block of their own (see `mscs.blocks`).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, StrictBool, model_validator

from mscs.blocks import BOTH, EVALUATE, NOTHING, TRAIN, Block, blocks_in
from mscs.datasets import DATASETS, LabelSet, Spec
from mscs.datasets.folders import folder_spec
from mscs.errors import UsageError, unknown_name
from mscs.model_options import MODEL_OPTIONS
from mscs.modules import IMPORT_PATH, load

Phase = Literal["train", "evaluate"]
PHASES: tuple[Phase, ...] = ("train", "evaluate")

_NUMBER = re.compile(r"[-+]?[0-9]+([.][0-9]*)?[eE][-+]?[0-9]+")


def _number(value: Any) -> Any:
    """Read 1e-3, which YAML takes for text because it has no point."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def _known_model(value: str) -> str:
    """Refuse what is neither one of our models nor an import path, naming the nearest model."""
    if value not in MODEL_OPTIONS and not re.fullmatch(IMPORT_PATH, value):
        raise ValueError(f"{unknown_name('model', value, MODEL_OPTIONS)}, or package.module:Class")
    return value


Flag = StrictBool
Int = Annotated[int, Strict(), BeforeValidator(_number)]
Float = Annotated[float, Strict(), BeforeValidator(_number)]
Index = Annotated[Int, Field(ge=0)]
Count = Annotated[Int, Field(ge=1)]
Side = Annotated[Int, Field(ge=16)]
Weight = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Ratio = Annotated[Float, Field(ge=0.01, le=100)]
NAME = "[A-Za-z0-9_-]+"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
"""Of what becomes part of paths and commands."""
ImportPath = Annotated[str, Field(pattern=f"^{IMPORT_PATH}$")]
"""Code of the user's own, see `mscs.modules`."""
Byte = Annotated[Int, Field(ge=0, le=255)]


class Augmentation(Block):
    """Training transforms, in the order of `mscs.transforms.TrainTransform`."""

    hflip: Share
    scale_range: tuple[Ratio, Ratio] | None
    scale_base: Literal["native"] | Count
    aspect_range: tuple[Ratio, Ratio]
    class_max_ratio: Share
    color: Literal["jitter", "photometric", "none"]


class Folders(Block):
    """A dataset of the user's own in folders; `mscs.datasets.folders.folder_spec` explains the keys."""

    affects = BOTH
    folders: Mapping[Name, tuple[str, str]]
    classes: tuple[str, ...]
    image_suffix: str = ".png"
    label_suffix: str = ".png"
    class_values: tuple[Byte | tuple[Byte, ...], ...] | None = None
    ignored_values: tuple[Byte, ...] = (255,)
    colors: tuple[tuple[Byte, Byte, Byte], ...] | None = None

    @classmethod
    def used(cls, flat: Mapping[str, Any]) -> bool:
        """Return whether the dataset is one in folders."""
        return flat.get("folders") is not None


def find_dataset(name: str, folders: Folders | None, spec: str | None) -> Spec:
    """Return the facts of a dataset: of the user's own in folders or by import path, or else by its name.

    Raises UsageError where there is none, or more than one.
    """
    if (folders or spec) and name in DATASETS:
        raise UsageError(f"dataset {name!r}: the package has one of this name, choose another")
    if folders and spec:
        raise UsageError(f"dataset {name!r} has both folders and spec; keep one")
    if folders is not None:
        return folder_spec(name, **folders.arguments())
    if spec is None:
        if name not in DATASETS:
            own = "One of your own needs `folders` and `classes`, or `spec`, in its block of params.yaml"
            raise UsageError(f"{unknown_name('dataset', name, DATASETS)}. {own}")
        return DATASETS[name]
    found = load(spec)
    if not isinstance(found, Spec) or found.name != name:
        what = f"the dataset {found.name!r}" if isinstance(found, Spec) else f"of type {type(found).__name__}"
        raise UsageError(f"spec {spec} is {what}, expected a mscs.datasets.Spec with the name {name!r}")
    return found


class Data(Block):
    """Which images, and how they are shown to a network that trains."""

    affects = BOTH
    name: Name = Field(alias="dataset")
    folders: Folders | None
    spec_path: ImportPath | None = Field(default=None, alias="spec")
    task: Annotated[Int, Field(ge=1, le=3)] | None
    source: Literal["real", "generated"] = Field(alias="data_source")
    skip_wrong_labels: Flag
    image_size: tuple[Side, Side] | None
    train_images: Count | None
    val_images: Count | None
    reflect_pad: tuple[Index, Index]
    class_weighted: Annotated[Flag, TRAIN]
    augmentation: Augmentation
    train_split: Annotated[str, TRAIN] = "train"
    score_split: Annotated[str, EVALUATE] = "val"
    """Splits that train and that are scored and shown in figures; "train+val" joins two."""

    @cached_property
    def spec(self) -> Spec:
        """Facts of the dataset."""
        return find_dataset(self.name, self.folders, self.spec_path)

    @property
    def labels(self) -> LabelSet:
        """Label table of the dataset and task."""
        return self.spec.labels(self.task)

    @model_validator(mode="after")
    def _check_splits(self) -> "Data":
        for split in (self.train_split, self.score_split):
            self.spec.check_split(split)
        return self


class MultiScale(Block):
    """Multi-scale + flip inference; in use where `evaluation` asks for it."""

    affects = EVALUATE
    ms_scales: tuple[Ratio, ...]
    ms_long_side: Count | None
    ms_window: tuple[Side, Side] | None
    ms_overlap: Annotated[Float, Field(ge=0, le=0.95)]
    ms_border: Literal["shift", "pad"]
    ms_merge: Literal["exp", "logits", "softmax"]

    @classmethod
    def used(cls, flat: Mapping[str, Any]) -> bool:
        """Return whether the run is scored at several scales."""
        return "ms" in (flat.get("evaluation") or ())


class Evaluation(Block):
    """The dataset's evaluation protocol."""

    affects = EVALUATE
    modes: tuple[Literal["ss", "ms"], ...] = Field(alias="evaluation")
    short_side: Count | None
    pad_multiple: Count | None
    score_padding: Flag
    absent_classes: Literal["zero", "skip"]
    multi_scale: MultiScale | None


class Model(Block):
    """Network and backbone; what the training puts on top of them."""

    affects = BOTH
    name: Annotated[str, AfterValidator(_known_model)] = Field(alias="model")
    backbone: str
    options: Mapping[str, Any] = Field(alias="model_options")
    pretrained: Annotated[Flag | str, TRAIN]
    initial_weights: Annotated[str | None, TRAIN] = None
    """A whole network to go on from; `pretrained` is about the backbone alone."""
    feature_maps: Annotated[Int, Field(ge=1, le=4), TRAIN]
    aux_weight: Annotated[Weight, TRAIN]


class Contrastive(Block):
    """The multi-scale and cross-scale contrastive loss, Eq. (5)."""

    contrastive: Literal[True]
    scale_weights: tuple[Weight, ...]
    cross_pairs: tuple[tuple[Index, Index], ...]
    multi_scale_weight: Weight
    cross_scale_weight: Weight
    temperature: Ratio
    sampling: Literal["balanced", "all"]
    embedding_subsample: Annotated[Int, Field(ge=1, le=8)]
    min_views: Count
    max_views: Count
    max_anchors: Annotated[Int, Field(ge=2)]


class OwnLoss(Block):
    """A loss on embeddings of the user's own, an `EmbeddingLoss` by import path, with its arguments."""

    embedding_loss: ImportPath
    loss_options: Mapping[str, Any] = Field(default_factory=dict)

    @classmethod
    def used(cls, flat: Mapping[str, Any]) -> bool:
        """Return whether a run names such a loss."""
        return flat.get("embedding_loss") is not None


class Loss(Block):
    """What is added to the cross-entropy: one block per loss on embeddings, None where a run does without."""

    name: Name = Field(alias="loss")
    projector: Literal["backbone", "fpn", "concat"] | None
    contrastive: Contrastive | None
    embedding_loss: OwnLoss | None


EMBEDDING_LOSSES = tuple(name for name, info in Loss.model_fields.items() if blocks_in(info))
"""Names of the losses on embeddings, which are also the keys that switch them on."""


class Sgd(Block):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = Field(alias="optimizer")
    momentum: Share


class Adam(Block):
    """Adam, or AdamW with Swin's parameters that are not decayed."""

    name: Literal["adam", "adamw"] = Field(alias="optimizer")


class Poly(Block):
    """Polynomial decay to zero."""

    name: Literal["poly"] = Field(alias="lr_schedule")
    poly_power: Weight


class Linear(Block):
    """Linear decay to zero after a linear warm-up."""

    name: Literal["linear"] = Field(alias="lr_schedule")
    warmup_steps: Index


class Exponential(Block):
    """Exponential decay per epoch."""

    name: Literal["exp"] = Field(alias="lr_schedule")
    exp_decay: Share


class Schedule(Block):
    """One row of the supplement's Tables 4 to 7: crop, optimizer, learning rate, batch, steps."""

    name: Annotated[Name, NOTHING] = Field(alias="schedule")
    crop_size: tuple[Side, Side]
    optimizer: Sgd | Adam = Field(discriminator="name")
    lr: Weight
    lr_schedule: Poly | Linear | Exponential = Field(discriminator="name")
    weight_decay: Weight
    batch_size: Count
    images_per_group: Count
    steps: Count
    accumulation_steps: Count
    batch_norm: Literal["batch", "part", "frozen"]

    @property
    def groups(self) -> int:
        """Groups of images in a batch: what the paper trained on as many GPUs."""
        return self.batch_size // self.images_per_group


class Machine(Block):
    """How the numbers are computed; what only concerns speed and logs changes no result."""

    affects = BOTH
    precision: Literal["fp64", "fp32", "bf16", "fp16"]
    tf32: Flag
    channels_last: Flag
    compile: Flag
    deterministic: Flag
    threads: Annotated[Count | None, NOTHING]
    log_every: Annotated[Count, NOTHING]
    checkpoint_every: Annotated[Count, NOTHING]
    validate_every: Annotated[Count | None, NOTHING] = None
    """Steps between validations, which the log shows and nothing else uses."""


class Settings(Block):
    """Everything that decides one run.

    `numerics` holds the versions of the code units that the run uses (see numerics.yaml), by phase; of own
    modules the digests.
    """

    affects = BOTH
    run: Name
    profile: Name
    recipe: Annotated[Name, NOTHING]
    variant: Annotated[Name, NOTHING]
    seeds: Annotated[tuple[Index, ...], NOTHING]
    numerics: Annotated[Mapping[str, Mapping[str, int | str]], NOTHING]
    data: Data
    evaluation: Evaluation
    model: Model
    loss: Loss
    schedule: Schedule
    machine: Machine

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self

    def identity(self, phase: Phase) -> dict[str, Any]:
        """Return, as flat JSON values, what can change the outcome of a phase for one seed."""
        found = {key: value for key, affects, value in self.walk() if affects in (phase, "both")}
        return {**found, "numerics": dict(self.numerics[phase])}

    def digest(self, phase: Phase = "train") -> str:
        """Return a 12-digit fingerprint of the settings that decide `phase`, without the code's versions."""
        return fingerprint(self.identity(phase))

    def flat(self) -> dict[str, Any]:
        """Return all values in use by flat key, as JSON values; `from_flat` is the inverse."""
        return {key: value for key, _, value in self.walk()}


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return 12 digits that stand for the settings in an identity, without the code's versions."""
    found = {key: value for key, value in identity.items() if key != "numerics"}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def _contradictions(settings: Settings) -> Iterator[str]:
    """Yield what is wrong with values that are possible one by one."""
    known = MODEL_OPTIONS.get(settings.model.name)  # own models check theirs when they are built
    options = vars(known) if known else settings.model.options
    for option in settings.model.options:
        if option not in options:
            yield unknown_name(f"option of model {settings.model.name!r}", option, options)
    for name, values in (("seeds", settings.seeds), ("evaluation", settings.evaluation.modes)):
        if not values or len(set(values)) < len(values):
            yield f"{name}: found {list(values)}, expected at least one item and none twice"
    shown = settings.data.augmentation
    for name, span in (("scale_range", shown.scale_range), ("aspect_range", shown.aspect_range)):
        if span is not None and span[0] > span[1]:
            yield f"{name}: found {list(span)}, expected the smaller one first"
    loss, schedule = settings.loss, settings.schedule
    for name in EMBEDDING_LOSSES:
        if getattr(loss, name) is not None and loss.projector is None:
            yield f"{name} needs a projector: backbone, fpn or concat"
    if loss.contrastive is not None:
        scales = len(loss.contrastive.scale_weights)
        maps = 1 if loss.projector == "concat" else settings.model.feature_maps
        if scales != maps:
            yield f"scale_weights: found {scales}, but projector {loss.projector} has {maps} feature maps"
        if any(a == b or max(a, b) >= scales for a, b in loss.contrastive.cross_pairs):
            pairs = [list(pair) for pair in loss.contrastive.cross_pairs]
            yield f"cross_pairs: found {pairs}, expected pairs of two scales out of 0 to {scales - 1}"
    parts = schedule.accumulation_steps
    if schedule.batch_size % schedule.images_per_group:
        yield f"images_per_group: found {schedule.images_per_group}, no divisor of batch_size"
    elif schedule.groups % parts:
        yield f"accumulation_steps {parts} does not divide the batch's {schedule.groups} groups of images"
    if parts > 1 and schedule.batch_norm == "batch":
        yield (
            f"with accumulation_steps {parts}, batch norm cannot see the whole batch. Say which one to use: "
            "batch_norm=part (statistics of each part) or batch_norm=frozen (running statistics)"
        )
