"""Cityscapes: street scenes, 1024x2048, 19 classes, 2975 / 500 / 1525 images.

Layout under the root folder (as the official archives unpack):

    leftImg8bit/{train,val,test}/<city>/<city>_<seq>_<frame>_leftImg8bit.png      RGB
    gtFine/{train,val,test}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png       8 bit, raw ids 0..33

`_gtFine_labelTrainIds.png` (training ids, 255 = ignored) is read where a split has no labelIds.
Sample id: `<city>_<seq>_<frame>`.
"""

from pathlib import Path

from mscs.datasets.base import Index, identity_index, index_of, names_in, pair, require_folder
from mscs.datasets.labels import LabelSet

IMAGE_SUFFIX = "_leftImg8bit.png"
RAW_SUFFIX = "_gtFine_labelIds.png"
TRAIN_ID_SUFFIX = "_gtFine_labelTrainIds.png"


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    images_root = require_folder("cityscapes", root / "leftImg8bit" / split)
    require_folder("cityscapes", root / "gtFine" / split)
    cities = sorted(folder.name for folder in images_root.iterdir() if folder.is_dir())
    found = [(city, name) for city in cities for name in names_in(images_root / city, IMAGE_SUFFIX)]
    raw = any((root / "gtFine" / split).glob(f"*/*{RAW_SUFFIX}"))
    label_suffix = RAW_SUFFIX if raw else TRAIN_ID_SUFFIX
    entries = pair(
        "cityscapes",
        root,
        [f"leftImg8bit/{split}/{city}/{name}{IMAGE_SUFFIX}" for city, name in found],
        [f"gtFine/{split}/{city}/{name}{label_suffix}" for city, name in found],
        [name for _, name in found],
    )
    return index_of(labels, entries) if raw else identity_index(labels, entries)
