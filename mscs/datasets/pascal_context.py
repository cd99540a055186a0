"""Pascal-Context: VOC 2010 photographs with 59 classes, 4998 / 5105 images of many sizes.

Layout under the root folder:

    VOCdevkit/VOC2010/JPEGImages/<id>.jpg                     RGB
    VOCdevkit/VOC2010/ImageSets/Main/{train,val}.txt          one id per line
    SegmentationClassContext59/<id>.png                       8 bit, 0..59

Label value 0 is ignored, 1..59 are the classes in the order of the label table. The real dataset comes with
`trainval/<id>.mat` (459 classes, key LabelMap), `labels.txt` and `59_labels.txt` in the root folder;
`mscs data prepare pascal_context` converts them once to SegmentationClassContext59. Sample id: `<id>`.
"""

from pathlib import Path

from mscs.datasets.base import Index, index_of, pair, require_folder
from mscs.datasets.labels import LabelSet
from mscs.errors import MscsError, UsageError

VOC = "VOCdevkit/VOC2010"
LABEL_FOLDER = "SegmentationClassContext59"
MAT_FOLDER = "trainval"


def split_ids(root: Path, split: str) -> list[str]:
    """Return the ids in the official list of a split."""
    path = require_folder("pascal_context", root / VOC / "ImageSets" / "Main") / f"{split}.txt"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise MscsError(
            f"{path}: cannot read this list of images ({error}). Fetch pascal_context again"
        ) from error
    return [line.split()[0] for line in lines if line.strip()]


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    names = split_ids(root, split)
    if not (root / LABEL_FOLDER).is_dir() and (root / MAT_FOLDER).is_dir():
        raise UsageError(
            f"pascal_context: no folder {root / LABEL_FOLDER}, but the 459-class annotations are there. "
            f"Convert them once with `mscs data prepare pascal_context --root {root}`"
        )
    entries = pair(
        "pascal_context",
        root,
        [f"{VOC}/JPEGImages/{name}.jpg" for name in names],
        [f"{LABEL_FOLDER}/{name}.png" for name in names],
        names,
    )
    return index_of(labels, entries)
