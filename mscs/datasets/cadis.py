"""CaDIS: cataract surgery, 540x960, tasks with 8, 17 and 25 classes, 25 videos.

Layout under the root folder (as the official archive unpacks; numbers of two digits in folder names only):

    Video<NN>/Images/Video<N>_frame<FFFFFF>.png      RGB
    Video<NN>/Labels/Video<N>_frame<FFFFFF>.png      8 bit, raw ids 0..35

Splits are by video (mscs.datasets.labels.cadis_videos). Of a split's videos, those whose folder exists are
read. Option `exclude_blacklisted` leaves out the frames that the paper's authors list as wrongly annotated;
their published settings do not say whether they did. Sample id: `Video<N>_frame<FFFFFF>`.
"""

from pathlib import Path

from mscs.datasets.base import Index, index_of, names_in, pair, require_folder
from mscs.datasets.labels import LabelSet, cadis_blacklist, cadis_videos


def index(labels: LabelSet, split: str, root: Path, *, exclude_blacklisted: bool = False) -> Index:
    """List a split."""
    require_folder("cadis", root)
    videos = [video for video in cadis_videos(split) if (root / f"Video{video:02d}").is_dir()]
    if not videos:
        require_folder("cadis", root / f"Video{cadis_videos(split)[0]:02d}")
    blacklist = cadis_blacklist() if exclude_blacklisted else frozenset()
    found = [
        (video, name)
        for video in videos
        for name in names_in(require_folder("cadis", root / f"Video{video:02d}" / "Images"), ".png")
        if name not in blacklist
    ]
    entries = pair(
        "cadis",
        root,
        [f"Video{video:02d}/Images/{name}.png" for video, name in found],
        [f"Video{video:02d}/Labels/{name}.png" for video, name in found],
        [name for _, name in found],
    )
    return index_of(labels, entries)
