"""What is to be carried out, and how: the settings of a run, seeds, folders, device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mscs.paths import SeedFiles, data_root
from mscs.settings import Settings

Observer = Callable[[int, Sequence[Mapping[str, float]]], None]
"""What watches a training: called at every logging step with the seed and all rows of the log so far."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """How a training or an evaluation is carried out: nothing here changes its outcome."""

    settings: Settings
    seeds: Sequence[int]
    folder: str
    """Name of the run's folders, see `SeedFiles`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """What --set has changed, by flat key; kept beside the results."""
    root: Path | None = None
    """Folder of the dataset, if not the usual one."""
    device: str = "auto"
    workers: int | None = None
    """Processes that read data ahead; None: 0 on a CPU, 4 on a GPU."""
    fresh: bool = False
    """Start from step 0 even if there is a checkpoint or a result."""
    accept_changed: bool = False
    """Go on from a checkpoint of another version of the code."""
    accept_packages: bool = False
    observers: Sequence[Observer] = ()

    @property
    def data_root(self) -> Path:
        """Folder of the dataset."""
        return self.root or data_root(self.settings)

    def files(self, seed: int) -> SeedFiles:
        """Return the files of one seed."""
        return SeedFiles(self.settings.profile, self.folder, seed)
