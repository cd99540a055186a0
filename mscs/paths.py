"""Where everything lies: data, checkpoints, weights and results of a profile, of a run, of one seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mscs.blocks import from_flat
from mscs.datasets.spec import default_root
from mscs.errors import MscsError, UsageError
from mscs.params import Params
from mscs.results import read_json
from mscs.settings import PHASES, Settings

WORK = Path("work")
"""Big and private: generated data, checkpoints, weights."""
RESULTS = Path("results")
"""Small and shared: what tables, figures and the report are made of."""

DATA_KEYS = ("data_source", "task", "image_size", "train_images", "val_images")


@dataclass(frozen=True)
class SeedFiles:
    """The files of one run and seed. `folder` is the run's id, with a digest where settings were changed."""

    profile: str
    folder: str
    seed: int

    @property
    def weights(self) -> Path:
        """Final weights."""
        return self.work / "weights" / f"seed-{self.seed}.safetensors"

    @property
    def work(self) -> Path:
        """Folder of the run's weights and logs."""
        return WORK / self.profile / "runs" / self.folder

    @property
    def results(self) -> Path:
        """Folder of the seed's results."""
        return RESULTS / self.profile / "runs" / self.folder / f"seed-{self.seed}"

    @property
    def record(self) -> Path:
        """What the training was made with."""
        return self.results / "run.json"

    @property
    def metrics(self) -> Path:
        """Deterministic outcome of the training."""
        return self.results / "train.json"

    @property
    def losses(self) -> Path:
        """Loss terms over the steps."""
        return self.results / "losses.csv"

    @property
    def evaluation(self) -> Path:
        """Scores."""
        return self.results / "evaluation.json"


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
        datasets.setdefault(settings.data.name, {key: flat[key] for key in DATA_KEYS})
        by_phase = {phase: settings.identity(phase) for phase in PHASES}
        decisive = {key for identity in by_phase.values() for key in identity}
        info = {key: value for key, value in flat.items() if key not in decisive}
        runs[run] = {"info": info, **by_phase}
    return {"datasets": datasets, "runs": runs}


def read_resolved(path: Path, run: str) -> Settings:
    """Return one run's settings from a resolved.json."""
    remedy = "make it anew with `python -m reproduce resolve`"
    try:
        found: Mapping[str, Mapping[str, Any]] = read_json(path)["runs"]
        if run not in found:
            raise UsageError(f"{path} has no run {run!r}; {remedy}")
        values = {key: value for part in found[run].values() for key, value in part.items()}
        values["numerics"] = {phase: found[run][phase]["numerics"] for phase in PHASES}
        if values.get("run") != run:
            raise UsageError(
                f"{path}: the block {run!r} holds the settings of {values.get('run')!r}; {remedy}"
            )
        return from_flat(Settings, values, str(path))
    except (MscsError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} holds no resolved settings ({error}); {remedy}") from None
