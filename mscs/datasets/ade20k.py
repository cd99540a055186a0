"""ADE20K (scene parsing benchmark 2016): 150 classes, 20210 / 2000 images of many sizes.

Layout under the root folder (as ADEChallengeData2016.zip unpacks):

    ADEChallengeData2016/images/{training,validation}/ADE_{train,val}_<number>.jpg            RGB
    ADEChallengeData2016/annotations/{training,validation}/ADE_{train,val}_<number>.png       8 bit, 0..150

Label value 0 is ignored, 1..150 are the classes. Sample id: the file name without suffix.
"""

from pathlib import Path

from mscs.datasets.spec import (
    Index,
    LabelSet,
    Part,
    Spec,
    build_index,
    names_in,
    numbered_labels,
    require_folder,
)

BASE = "ADEChallengeData2016"
FOLDERS = {"train": "training", "val": "validation"}
SPLITS = {"train": 20210, "val": 2000}
CLASSES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column,
signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path,
stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee
table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
"""


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    images, annotations = (f"{BASE}/{kind}/{FOLDERS[split]}" for kind in ("images", "annotations"))
    names = names_in(require_folder("ade20k", root / images), ".jpg")
    return build_index(labels, root, ((n, f"{images}/{n}.jpg", f"{annotations}/{n}.png") for n in names))


SPEC = Spec(
    name="ade20k",
    label_sets=(numbered_labels("ade20k", CLASSES),),
    splits=SPLITS,
    index=index,
    parts=(
        Part(
            BASE,
            {
                f"{BASE}/{kind}/{FOLDERS[split]}/*.{suffix}": count
                for split, count in SPLITS.items()
                for kind, suffix in (("images", "jpg"), ("annotations", "png"))
            },
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ),
    ),
    home="http://sceneparsing.csail.mit.edu",
    licence="images: non-commercial research and education; annotations: BSD 3-clause",
    tolerance=1.0,
)
