"""ADE20K (scene parsing benchmark 2016): 150 classes, 20210 / 2000 images of many sizes.

Layout under the root folder (as ADEChallengeData2016.zip unpacks):

    ADEChallengeData2016/images/{training,validation}/ADE_{train,val}_<number>.jpg            RGB
    ADEChallengeData2016/annotations/{training,validation}/ADE_{train,val}_<number>.png       8 bit, 0..150

Label value 0 is ignored, 1..150 are the classes. Sample id: the file name without suffix.
"""

from pathlib import Path

from mscs.datasets.base import Index, index_of, names_in, pair, require_folder
from mscs.datasets.labels import LabelSet

FOLDERS = {"train": "training", "val": "validation"}


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    base, folder = "ADEChallengeData2016", FOLDERS[split]
    names = names_in(require_folder("ade20k", root / base / "images" / folder), ".jpg")
    entries = pair(
        "ade20k",
        root,
        [f"{base}/images/{folder}/{name}.jpg" for name in names],
        [f"{base}/annotations/{folder}/{name}.png" for name in names],
        names,
    )
    return index_of(labels, entries)
