"""Cityscapes: street scenes, 1024x2048, 19 classes, 2975 / 500 / 1525 images.

Layout under the root folder (as the official archives unpack):

    leftImg8bit/{train,val,test}/<city>/<city>_<seq>_<frame>_leftImg8bit.png      RGB
    gtFine/{train,val,test}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png       8 bit, raw ids 0..33

`_gtFine_labelTrainIds.png` (training ids, 255 = ignored) is read where a split has no labelIds.
Sample id: `<city>_<seq>_<frame>`.
"""

import dataclasses
from pathlib import Path

from mscs.datasets import spec

IMAGE_SUFFIX = "_leftImg8bit.png"
RAW_SUFFIX = "_gtFine_labelIds.png"
TRAIN_ID_SUFFIX = "_gtFine_labelTrainIds.png"
SPLITS = {"train": 2975, "val": 500, "test": 1525}
# Raw id, official colour, weight of the cross-entropy (of the HRNet code base), name
CLASSES = """
 7  128  64 128  0.8373  road
 8  244  35 232  0.9180  sidewalk
11   70  70  70  0.8660  building
12  102 102 156  1.0345  wall
13  190 153 153  1.0166  fence
17  153 153 153  0.9969  pole
19  250 170  30  0.9754  traffic light
20  220 220   0  1.0489  traffic sign
21  107 142  35  0.8786  vegetation
22  152 251 152  1.0023  terrain
23   70 130 180  0.9539  sky
24  220  20  60  0.9843  person
25  255   0   0  1.1116  rider
26    0   0 142  0.9037  car
27    0   0  70  1.0865  truck
28    0  60 100  1.0955  bus
31    0  80 100  1.0865  train
32    0   0 230  1.1529  motorcycle
33  119  11  32  1.0507  bicycle
"""


def _labels() -> spec.LabelSet:
    rows = [line.split(maxsplit=5) for line in CLASSES.strip().splitlines()]
    return spec.LabelSet(
        dataset="cityscapes",
        classes=tuple(row[5] for row in rows),
        raw_ids=tuple((int(row[0]),) for row in rows),
        ignored_raw_ids=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, -1),
        colors=tuple((int(r), int(g), int(b)) for _, r, g, b, *_ in rows),
        class_weights=tuple(float(row[4]) for row in rows),
    )


def index(labels: spec.LabelSet, split: str, root: Path) -> spec.Index:
    """List a split."""
    images, annotations = f"leftImg8bit/{split}", f"gtFine/{split}"
    for folder in (images, annotations):
        spec.require_folder("cityscapes", root / folder)
    suffix = RAW_SUFFIX
    if not any((root / annotations).glob(f"*/*{RAW_SUFFIX}")):
        suffix = TRAIN_ID_SUFFIX
        same = tuple((value,) for value in range(labels.num_classes))
        labels = dataclasses.replace(labels, raw_ids=same, ignored_raw_ids=(spec.IGNORE_INDEX,))
    cities = sorted(folder.name for folder in (root / images).iterdir() if folder.is_dir())
    return spec.build_index(
        labels,
        root,
        (
            (name, f"{images}/{city}/{name}{IMAGE_SUFFIX}", f"{annotations}/{city}/{name}{suffix}")
            for city in cities
            for name in spec.names_in(root / images / city, IMAGE_SUFFIX)
        ),
    )


def _part(folder: str, names: str) -> spec.Part:
    # Nothing is scored on the test split, so a copy without it is complete.
    files = {f"{folder}/{split}/*/{names}": SPLITS[split] for split in ("train", "val")}
    return spec.Part(folder, files, package=f"{folder}_trainvaltest.zip")


# What the generated stand-in shows, see `Toy.things`
SCENE = """
1   | 1        | 0.5       | 1         | 0 | sky          | blue plain    | box    | -9 0 9 1
2-3 | 0.35-0.5 | 0-1       | 0.5       | 0 | building     | brown columns | box    | -0.8 0 0.8 1
1-2 | 0.5-0.6  | 0-1       | 0.6       | 0 | vegetation   | green blobs   | disc   | -0.6 0 0.6 1
1   | 0.5      | 0.5       | 1         | 0 | sidewalk     | grey rows     | box    | -9 0 9 1
1   | 0.5      | 0.4-0.6   | 1         | 0 | road         | grey plain    | road   | -1.6 0 1.6 0.95
1-2 | 0.35-0.45 | 0.1-0.9   | 0.8-0.95  | 0 | car          | paint plain   | car    | -1 0 1 1
1   | 0.75-0.9 | 0.05-0.95 | 0.8-0.95  | 0 | pole         | grey plain    | box    | -0.1 0 0.1 1
+   |          |           |           |   | traffic sign | paint plain   | disc   | -0.2 0.65 0.2 1.05
1-2 | 0.5-0.65 | 0.05-0.95 | 0.75-0.95 | 0 | person       | paint rows    | person | -0.22 0 0.22 1
0-1 | 0.55-0.7 | 0.05-0.95 | 0.75-0.95 | 0 | rider        | paint rows    | rider  | -0.4 0 0.4 1
"""


def _toy_paths(split: str, index: int) -> tuple[str, str]:
    city = ("aachen", "bochum")[index % 2] if split == "train" else "frankfurt"
    stem = f"{split}/{city}/{city}_{index:06d}_000019"
    return f"leftImg8bit/{stem}{IMAGE_SUFFIX}", f"gtFine/{stem}{RAW_SUFFIX}"


SPEC = spec.Spec(
    name="cityscapes",
    label_sets=(_labels(),),
    splits=SPLITS,
    index=index,
    parts=(_part("leftImg8bit", f"*{IMAGE_SUFFIX}"), _part("gtFine", "*_gtFine_label*Ids.png")),
    home="https://www.cityscapes-dataset.com",
    licence="own licence, non-commercial, account needed",
    tolerance=0.6,
    toy=spec.Toy(size=(128, 256), paths=_toy_paths, things=SCENE),
)
