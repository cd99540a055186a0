"""CaDIS: cataract surgery, 540x960, tasks with 8, 17 and 25 classes, 25 videos.

Layout under the root folder (as the official archive unpacks; numbers of two digits in folder names only):

    Video<NN>/Images/Video<N>_frame<FFFFFF>.png      RGB
    Video<NN>/Labels/Video<N>_frame<FFFFFF>.png      8 bit, raw ids 0..35

Splits are by video. Of a split's videos, those whose folder exists are read. Option `exclude_blacklisted`
leaves out the frames that the paper's authors list as wrongly annotated; their published settings do not say
whether they did. Sample id: `Video<N>_frame<FFFFFF>`.
"""

from pathlib import Path

from mscs.datasets import spec

SPLITS = {"train": 3550, "val": 534, "test": 586}
VIDEOS = {
    "train": (1, 3, 4, 6, 8, 9, 10, 11, 13, 14, 15, 17, 18, 19, 20, 21, 23, 24, 25),
    "val": (5, 7, 16),
    "test": (2, 12, 22),
}
RAW_VALUES = range(36)
ANATOMY = "Pupil, Surgical Tape, Hand, Eye Retractors, Iris, Skin, Cornea"  # raw values 0..6, in every task
# Per task: names of the other classes, and the raw values of each
INSTRUMENTS = {
    1: ("Instrument", "7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35"),
    2: (
        """Cannula, Cap. Cystotome, Tissue Forceps, Primary Knife, Ph. Handpiece, Lens Injector,
        I/A Handpiece, Secondary Knife, Micromanipulator, Cap. Forceps""",
        "7 8 10 27 20 32, 9 22, 11 33, 12 28, 13 21, 14 24, 15 18, 16 23, 17, 19",
    ),
    3: (
        """Hydro. Cannula, Visc. Cannula, Cap. Cystotome, Rycroft Cannula, Bonn Forceps, Primary Knife,
        Ph. Handpiece, Lens Injector, I/A Handpiece, Secondary Knife, Micromanipulator, I/A Handpiece Handle,
        Cap. Forceps, R. Cannula Handle, Ph. Handpiece Handle, Cap. Cystotome Handle, Sec. Knife Handle,
        Lens Injector Handle""",
        "7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24",
    ),
}
# Frames that the paper's authors list as wrongly annotated, by video
BLACKLIST = {
    2: """
    001630 001680 001710 001780 001960 001970 001990 002010 002100 002160 002180 002210 002250 002420 002450
    002460 002490 002500 002510 002550 002610 002620 002630 002670 002680 002690 003440 003710 004120 004210
    004660 004800 004830 005160 005190 005210 005340 005490 006410 006510 006580 006630 006690 006710 006720
    006860 006870 006920 006930 006940 007060 007280 007620 007640 007660 007670 007680 007690 007700 008980
    009000 009010 009020 009090 009110 009140 009190 009200 009390 009420 009470 009920 010040 010090 010100
    010170 010240 010280 010290 010300 010500 010730 010780 010840 010860 010980 011000 011020 011100 011120
    011370 011380 011440 011460 011470 011480""",
    7: """
    006010 008830 012270 012310 012320 012340 012410 012430 012470 012510 012560 012650 012660 012740 012840
    012850 012870 012920 012950 013960 016660""",
    8: "006770 007860",
    10: "010740",
    14: "008140 008170 008220 008290 008510 008580 012010 012100 016900",
    16: "017890 017910",
    19: "061270",
    20: "014870 015590 016080 016090 016100 016130 016150 016160",
    21: "013750",
    24: """
    006560 006650 006720 006790 006970 007000 007130 007310 007330 007360 007380 007760 008060 008100 008220
    008310 008490 008580 009500 009530 009550 009580 009620 009800 009920 009930 009950 009970 010040 010050
    010290 010380 010450 010550 010660 010830 010870 010990""",
}


def _labels(task: int) -> spec.LabelSet:
    names, values = INSTRUMENTS[task]
    classes = spec.split_names(f"{ANATOMY}, {names}")
    grouped = [tuple(map(int, group.split())) for group in values.split(",")]
    raw_ids = (*((value,) for value in range(7)), *grouped)
    used = {value for raw in raw_ids for value in raw}
    return spec.LabelSet(
        dataset="cadis",
        task=task,
        classes=classes,
        raw_ids=raw_ids,
        ignored_raw_ids=tuple(value for value in RAW_VALUES if value not in used),
        colors=spec.voc_palette(len(classes)),
    )


def blacklist() -> frozenset[str]:
    """Return the ids of the frames that the paper's authors list as wrongly annotated."""
    return frozenset(f"Video{v}_frame{f}" for v, frames in BLACKLIST.items() for f in frames.split())


def index(labels: spec.LabelSet, split: str, root: Path, *, exclude_blacklisted: bool = False) -> spec.Index:
    """List a split."""
    spec.require_folder("cadis", root)
    folders = [f"Video{video:02d}" for video in VIDEOS[split]]
    folders = [folder for folder in folders if (root / folder).is_dir()] or folders
    excluded = blacklist() if exclude_blacklisted else frozenset()
    return spec.build_index(
        labels,
        root,
        (
            (name, f"{folder}/Images/{name}.png", f"{folder}/Labels/{name}.png")
            for folder in folders
            for name in spec.names_in(spec.require_folder("cadis", root / folder / "Images"), ".png")
            if name not in excluded
        ),
    )


# What the generated stand-in shows, see `Toy.things`
SCENE = """
1   | 1       | 0.5       | 1         | 0        | Skin           | pink blobs   | box   | -9 0 9 1
1-2 | 0.7-1   | 0-1       | 0.9-1     | -0.1-0.1 | Surgical Tape  | pink columns | box   | -0.3 0 0.3 1
1   | 0.85-1  | 0.45-0.55 | 0.95-1    | 0        | Cornea         | pink plain   | disc  | -0.75 0 0.75 1
+   |         |           |           |          | Iris           | pink rows    | disc  | -0.4 0.1 0.4 0.9
+   |         |           |           |          | Pupil          | pink plain   | disc  | -0.22 .28 0.22 .72
+   |         |           |           |          | Eye Retractors | grey plain   | box   | -0.4 0.93 0.4 1.03
+   |         |           |           |          | Eye Retractors | grey plain   | box   | -0.4 -0.03 0.4 0.07
0-1 | 0.9-1.1 | 0.45-0.55 | 0.45-0.55 | 0-1      | Primary Knife  | grey plain   | knife | -0.2 0 0.2 1.5
0-1 | 0.9-1.1 | 0.45-0.55 | 0.45-0.55 | 0-1      | Bonn Forceps   | grey plain   | fork  | -0.16 0 0.16 1.5
0-1 | 0.9-1.1 | 0.45-0.55 | 0.45-0.55 | 0-1      | Lens Injector  | grey rows    | box   | -0.12 0 0.12 1.5
0-1 | 0.5-0.7 | 0-0.1     | 1-1.1     | 0        | Hand           | pink plain   | disc  | -0.5 0 0.5 1
"""


def _toy_paths(split: str, index: int) -> tuple[str, str]:
    videos = VIDEOS[split]
    video, frame = videos[index % len(videos)], 10 * (index // len(videos) + 1)
    stem = f"Video{video}_frame{frame:06d}.png"
    return f"Video{video:02d}/Images/{stem}", f"Video{video:02d}/Labels/{stem}"


SPEC = spec.Spec(
    name="cadis",
    label_sets=tuple(_labels(task) for task in INSTRUMENTS),
    splits=SPLITS,
    index=index,
    parts=(
        spec.Part(
            "Video[0-9][0-9]",
            {f"Video[0-9][0-9]/{kind}/*.png": sum(SPLITS.values()) for kind in ("Images", "Labels")},
        ),
    ),
    home="https://cataracts-semantic-segmentation2020.grand-challenge.org",
    licence="terms of the challenge, registration needed",
    tolerance=1.0,
    toy=spec.Toy(size=(135, 240), paths=_toy_paths, things=SCENE),
)
