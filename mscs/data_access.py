"""Is a run's data there, complete, and of the kind that its settings ask for?"""

from pathlib import Path
from typing import Any

from mscs.errors import UsageError
from mscs.paths import data_root
from mscs.results import read_json
from mscs.settings import Data, Settings


def require_data(settings: Settings, root: Path) -> None:
    """Draw a generated dataset that is not there yet; refuse one that is not what the settings say.

    Raises:
        UsageError: no dataset, generated scenes instead of a real one (or the other way round), or scenes of
            another number or size.
        MscsError: a real dataset whose files do not fit its manifest.
    """
    from mscs.datasets.verify import check_manifest

    data = settings.data
    if not root.is_dir():
        if data.source != "generated" or root != data_root(settings):
            raise UsageError(
                f"no dataset in {root}; make or fetch it with `python -m reproduce run {data.name}` or "
                "`mscs data --help`"
            )
        _draw(data, root)
    marker = root / "generated.json"
    made: dict[str, Any] | None = read_json(marker) if marker.is_file() else None
    if (made is not None) != (data.source == "generated"):
        kind = "generated scenes" if made else "a real dataset"
        raise UsageError(
            f"{root} holds {kind}, the settings of {settings.run} say data_source: {data.source}; name "
            f"the right folder with --data-root, or --set data_source={'generated' if made else 'real'}"
        )
    if made is None:
        check_manifest(data.name, root)
        return
    for key, value in (
        ("train", data.train_images),
        ("val", data.val_images),
        ("image_size", data.image_size),
    ):
        wanted = list(value) if isinstance(value, tuple) else value
        if made[key] != wanted:
            raise UsageError(
                f"{root} was generated with {key} {made[key]}, the settings of {settings.run} say {wanted}; "
                f"make it anew with `python -m reproduce run {data.name}`, or name a folder with --data-root"
            )


def _draw(data: Data, root: Path) -> None:
    from mscs.datasets.toy import write_dataset

    if data.train_images is None or data.val_images is None:
        raise UsageError("generated data needs train_images and val_images")
    size = data.image_size
    write_dataset(data.name, root, train=data.train_images, val=data.val_images, image_size=size)
