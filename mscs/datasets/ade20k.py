"""ADE20K (scene parsing benchmark 2016): 150 classes, 20210 / 2000 images of many sizes.

Layout under the root folder (as ADEChallengeData2016.zip unpacks):

    ADEChallengeData2016/images/{training,validation}/ADE_{train,val}_<number>.jpg            RGB
    ADEChallengeData2016/annotations/{training,validation}/ADE_{train,val}_<number>.png       8 bit, 0..150

Label value 0 is ignored, 1..150 are the classes. Sample id: the file name without suffix.
"""

from pathlib import Path

from mscs.datasets import spec

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


def index(labels: spec.LabelSet, split: str, root: Path) -> spec.Index:
    """List a split."""
    images, annotations = (f"{BASE}/{kind}/{FOLDERS[split]}" for kind in ("images", "annotations"))
    names = spec.names_in(spec.require_folder("ade20k", root / images), ".jpg")
    return spec.build_index(labels, root, ((n, f"{images}/{n}.jpg", f"{annotations}/{n}.png") for n in names))


# What the generated stand-in shows, see `Toy.things`
SCENE = """
1   | 1        | 0.5       | 1         | 0 | ceiling      | grey plain    | box    | -9 0 9 1
1   | 0.72-0.8 | 0.5       | 1         | 0 | wall         | grey columns  | box    | -9 0 9 1
1-2 | 0.4      | 0.1-0.9   | 0.6       | 0 | windowpane   | grey checks   | box    | -0.4 0 0.4 1
+   |          |           |           |   | curtain      | paint columns | box    | -0.6 -0.1 -0.3 1.1
+   |          |           |           |   | curtain      | paint columns | box    | 0.3 -0.1 0.6 1.1
0-1 | 0.5-0.55 | 0.1-0.9   | 0.7       | 0 | door         | green plain   | box    | -0.25 0 0.25 1
1   | 0.38-0.45 | 0.5       | 1         | 0 | floor        | green rows    | box    | -9 0 9 1
0-1 | 0.2-0.3  | 0.3-0.7   | 0.95-1    | 0 | rug          | paint checks  | disc   | -1.5 0 1.5 1
0-1 | 0.4-0.5  | 0.1-0.9   | 0.75-0.8  | 0 | cabinet      | paint plain   | box    | -0.5 0 0.5 1
0-1 | 0.4-0.5  | 0.2-0.8   | 0.85-0.95 | 0 | bed          | paint blobs   | bed    | -0.8 0 0.8 1
0-1 | 0.3-0.4  | 0.2-0.8   | 0.85-0.95 | 0 | table        | paint plain   | table  | -0.8 0 0.8 1
"""


def _toy_paths(split: str, index: int) -> tuple[str, str]:
    stem = f"{FOLDERS[split]}/ADE_{split}_{index + 1:08d}"
    return f"{BASE}/images/{stem}.jpg", f"{BASE}/annotations/{stem}.png"


SPEC = spec.Spec(
    name="ade20k",
    label_sets=(spec.numbered_labels("ade20k", CLASSES),),
    splits=SPLITS,
    index=index,
    parts=(
        spec.Part(
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
    toy=spec.Toy(size=(128, 160), smallest=0.75, paths=_toy_paths, things=SCENE),
)
