"""Pascal-Context: VOC 2010 photographs with 59 classes, 4998 / 5105 images of many sizes.

Layout under the root folder:

    VOCdevkit/VOC2010/JPEGImages/<id>.jpg                     RGB
    VOCdevkit/VOC2010/ImageSets/Main/{train,val}.txt          one id per line
    SegmentationClassContext59/<id>.png                       8 bit, 0..59

Label value 0 is ignored, 1..59 are the classes in the order of the label table. The real dataset comes with
`trainval/<id>.mat` (459 classes, key LabelMap) and their list `labels.txt` in the root folder;
`mscs data prepare pascal_context` converts them once to SegmentationClassContext59. Sample id: `<id>`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mscs.datasets.spec import Index, LabelSet, Part, Spec, Toy, build_index, numbered_labels, require_folder
from mscs.errors import MscsError, UsageError
from mscs.results import atomic_path

if TYPE_CHECKING:
    import numpy as np

VOC = "VOCdevkit/VOC2010"
LABEL_FOLDER = "SegmentationClassContext59"
MAT_FOLDER = "trainval"
HOME = "https://cs.stanford.edu/~roozbeh/pascal-context"
SPLITS = {"train": 4998, "val": 5105}
CLASSES = """
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat,
ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground,
horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep,
shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window,
wood
"""


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    path = require_folder("pascal_context", root / VOC / "ImageSets" / "Main") / f"{split}.txt"
    try:
        names = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise MscsError(
            f"{path}: cannot read this list of images ({error}). Fetch pascal_context again"
        ) from error
    if not (root / LABEL_FOLDER).is_dir() and (root / MAT_FOLDER).is_dir():
        raise UsageError(
            f"pascal_context: no folder {root / LABEL_FOLDER}, but the 459-class annotations are there. "
            f"Convert them once with `mscs data prepare pascal_context --root {root}`"
        )
    samples = ((name, f"{VOC}/JPEGImages/{name}.jpg", f"{LABEL_FOLDER}/{name}.png") for name in names)
    return build_index(labels, root, samples)


def context_lookup(root: Path) -> "np.ndarray":
    """Return uint8 (460,): from the 459 classes of Pascal-Context to 1..59, everything else 0.

    Raises:
        MscsError: the archive's list of names is missing, or lacks one of the 59 classes.
    """
    import numpy as np

    classes = SPEC.labels().classes
    path = root / "labels.txt"
    if not path.is_file():
        raise MscsError(f"{path}: the list of the 459 class names is missing. Fetch pascal_context again")
    found = re.findall(r"^\s*(\d+)\s*:\s*(.+?)\s*$", path.read_text(errors="replace"), flags=re.MULTILINE)
    numbers = {name: int(number) for number, name in found}
    missing = [name for name in classes if name not in numbers]
    if missing:
        raise MscsError(
            f"{path}: has no class named {', '.join(missing)}. Expected the list of 459 names; "
            "remove it and fetch pascal_context again"
        )
    table = np.zeros(max(459, *numbers.values()) + 1, np.uint8)
    for value, name in enumerate(classes, 1):
        table[numbers[name]] = value
    return table


def convert_labels(root: Path) -> int:
    """Write SegmentationClassContext59 from the .mat files; return how many were converted.

    Interrupted, it goes on where it was; the folder appears when it is complete.
    """
    import cv2
    from tqdm.contrib.concurrent import thread_map

    target = root / LABEL_FOLDER
    if target.is_dir():
        return 0
    paths = sorted((root / MAT_FOLDER).glob("*.mat"))
    if not paths:
        raise UsageError(
            f"pascal_context: no .mat file in {root / MAT_FOLDER}. Run `mscs data fetch pascal_context` first"
        )
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UsageError("reading .mat files needs SciPy: pip install 'mscs[data]'") from error
    table = context_lookup(root)
    staging = root / f".{LABEL_FOLDER}"
    staging.mkdir(exist_ok=True)

    def convert(path: Path) -> None:
        out = staging / f"{path.stem}.png"
        if out.exists():
            return
        try:
            label = table[loadmat(path)["LabelMap"]]
        except Exception as error:  # SciPy raises many kinds on a broken file
            raise MscsError(f"{path}: broken annotation ({error}). Fetch pascal_context again") from error
        with atomic_path(out) as temporary:
            temporary.write_bytes(cv2.imencode(".png", label)[1].tobytes())

    thread_map(convert, paths, desc="converting labels", disable=None)
    staging.rename(target)
    return len(paths)


# What the generated stand-in shows, see `Toy.things`
SCENE = """
1   | 1        | 0.5       | 1         | 0 | sky          | grey plain    | box    | -9 0 9 1
1-2 | 0.3-0.45 | 0-1       | 0.5       | 0 | mountain     | grey rows     | hill   | -1.2 0 1.2 1
1-2 | 0.3-0.4  | 0-1       | 0.55      | 0 | building     | grey checks   | box    | -0.6 0 0.6 1
1   | 0.5-0.58 | 0.5       | 1         | 0 | grass        | green columns | box    | -9 0 9 1
0-1 | 0.25-0.3 | 0.2-0.8   | 1         | 0 | water        | grey rows     | disc   | -2 0 2 1
1-2 | 0.4-0.55 | 0-1       | 0.6-0.65  | 0 | tree         | green blobs   | disc   | -0.5 0.1 0.5 1.1
0-1 | 0.25-0.3 | 0-1       | 0.7-0.75  | 0 | fence        | paint plain   | fence  | -2 0 2 1
0-1 | 0.35-0.4 | 0.1-0.9   | 0.75-0.95 | 0 | cow          | paint plain   | cow    | -0.7 0 0.7 1
0-1 | 0.4-0.5  | 0.1-0.9   | 0.75-0.95 | 0 | horse        | paint plain   | horse  | -0.55 0 0.55 1
0-1 | 0.3-0.35 | 0.1-0.9   | 0.75-0.95 | 0 | sheep        | paint checks  | cow    | -0.7 0 0.7 1
1-2 | 0.5-0.6  | 0.1-0.9   | 0.8-0.95  | 0 | person       | paint plain   | person | -0.2 0 0.2 1
"""


def _toy_paths(split: str, index: int) -> tuple[str, str]:
    stem = f"{2008 if split == 'train' else 2009}_{index + 1:06d}"
    return f"{VOC}/JPEGImages/{stem}.jpg", f"{LABEL_FOLDER}/{stem}.png"


def _list_of(split: str) -> str:
    return f"{VOC}/ImageSets/Main/{split}.txt"


SPEC = Spec(
    name="pascal_context",
    label_sets=(numbered_labels("pascal_context", CLASSES),),
    splits=SPLITS,
    index=index,
    parts=(
        Part(
            "VOCdevkit",
            {f"{VOC}/JPEGImages/*.jpg": sum(SPLITS.values())}
            | {f"{VOC}/ImageSets/Main/{split}.txt": 1 for split in SPLITS},
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            "sha1:bf9985e9f2b064752bf6bd654d89f017c76c395a",
        ),
        Part(
            MAT_FOLDER,
            {f"{MAT_FOLDER}/*.mat": sum(SPLITS.values())},
            f"{HOME}/trainval.tar.gz",
            max_bytes=1 << 30,
        ),
        Part("labels.txt", {"labels.txt": 1}, f"{HOME}/labels.txt", max_bytes=1 << 20),
    ),
    home=HOME,
    licence="photographs: Flickr terms of use, as for Pascal VOC",
    tolerance=0.7,
    prepare=convert_labels,
    toy=Toy(size=(128, 160), smallest=0.75, paths=_toy_paths, list_of=_list_of, things=SCENE),
)
