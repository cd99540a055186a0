"""Where everything lies: data, checkpoints, weights and results of a profile, of a run, of one seed."""

from pathlib import Path
from typing import Any

from mscs.blocks import flat_types, from_flat
from mscs.datasets.spec import default_root
from mscs.errors import MscsError, UsageError
from mscs.modules import own_digest
from mscs.params import Params
from mscs.results import read_json
from mscs.settings import PHASES, Folders, Settings

WORK = Path("work")
"""Big and private: generated data, checkpoints, weights."""
RESULTS = Path("results")
"""Small and shared: what tables, figures and the report are made of."""

DATA_KEYS = ("data_source", "task", "image_size", "train_images", "val_images")


class SeedFiles:
    """The files of one run and seed. `folder` is the run's id, with a digest where settings were changed."""

    def __init__(self, profile: str, folder: str, seed: int):
        self.work = WORK / profile / "runs" / folder
        self.results = RESULTS / profile / "runs" / folder / f"seed-{seed}"
        self.variant = self.results.with_name("variant.json")  # what --set has changed
        self.weights = self.work / "weights" / f"seed-{seed}.safetensors"
        self.record = self.results / "run.json"  # what the training was made with
        self.metrics = self.results / "train.json"  # its outcome, without times and machines
        self.losses = self.results / "losses.csv"  # loss terms over the steps
        self.validation = self.results / "validation.csv"  # mIoU over the steps, where validate_every is set
        self.evaluation = self.results / "evaluation.json"  # scores


def checkpoint_folder(settings: Settings, seed: int) -> Path:
    """Return where the checkpoints of a run with these settings and one seed lie."""
    folder = f"{settings.run}-{settings.digest()}"
    return WORK / settings.profile / "checkpoints" / folder / f"seed-{seed}"


def data_root(settings: Settings) -> Path:
    """Return where a run's dataset lies: $MSCS_DATA or data/ if real, else the profile's work folder."""
    return dataset_root(settings.data.name, settings.data.source, settings.profile)


def dataset_root(dataset: str, source: str, profile: str) -> Path:
    """Return the folder of a dataset, real or generated."""
    return WORK / profile / "data" / dataset if source == "generated" else default_root(dataset)


def resolved_path(profile: str) -> Path:
    """Return the file that holds the settings of all runs of a profile."""
    return RESULTS / profile / "resolved.json"


def resolve_all(params: Params, profile: str) -> dict[str, Any]:
    """Return what resolved.json holds: data settings by dataset, and by run its settings by phase."""
    datasets: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for run in params.runs_of(profile):
        settings = params.resolve(run, profile).settings
        flat = settings.flat()
        datasets.setdefault(settings.data.name, _data_facts(settings))
        by_phase = {phase: settings.identity(phase) for phase in PHASES}
        info = {key: value for key, value in flat.items() if not any(key in x for x in by_phase.values())}
        runs[run] = {"info": info, **by_phase}
    return {"datasets": datasets, "runs": runs}


def _data_facts(settings: Settings) -> dict[str, Any]:
    """Return what the files of a run's dataset depend on."""
    flat, spec = settings.flat(), settings.data.spec_path
    facts = {key: flat[key] for key in (*DATA_KEYS, "spec", *flat_types(Folders)) if key in flat}
    return facts | ({"digest": settings.numerics["train"][spec]} if spec else {})


def read_resolved(path: Path, run: str) -> Settings:
    """Return one run's settings from a resolved.json."""
    remedy = "make it anew with `python -m reproduce resolve`"
    try:
        found = read_json(path)["runs"]
        if run not in found:
            raise UsageError(f"{path} has no run {run!r}; {remedy}")
        values = {key: value for part in found[run].values() for key, value in part.items()}
        values["numerics"] = {phase: found[run][phase]["numerics"] for phase in PHASES}
        name = values["run"]
    except UsageError:
        raise
    except (MscsError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds no resolved settings ({error}); {remedy}") from None
    if name != run:
        raise UsageError(f"{path}: the block {run!r} holds the settings of {name!r}; {remedy}")
    for unit, version in values["numerics"]["train"].items():
        if ":" in unit and own_digest(unit) != version:
            raise UsageError(f"{path}: the code of {unit} has changed since; {remedy}")
    return from_flat(Settings, values, str(path))
