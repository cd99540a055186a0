"""`mscs data`: fetch, synth, prepare, verify, info, show. Light: every handler imports what it needs."""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mscs.command_line import add_command
from mscs.datasets.registry import DATASETS, dataset_spec
from mscs.datasets.spec import Spec, default_root
from mscs.errors import UsageError

DataHandler = Callable[[argparse.Namespace, Spec, Path], None]
SplitsUsed = Callable[[str], Collection[str] | None]


def add_data_commands(
    subparsers: Any, splits_used: SplitsUsed, find: Callable[[str], Spec] = dataset_spec
) -> None:
    """Add the command `data` to the subparsers of the program; handlers are set as `handler`.

    `splits_used` tells which splits of a dataset the runs use, None: not known; `find` its facts by name.
    """
    text = "get, make, check and look at the datasets"
    data = subparsers.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".")
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = partial(_command, find)
    fetch = command(commands, "fetch", "download a dataset, or take it from a folder or archive", _fetch)
    fetch.add_argument("--from", dest="given", type=Path, metavar="PATH", help="archive, or folder (linked)")

    synth = command(commands, "synth", "draw generated scenes in the dataset's layout", _synth)
    for name, default, what in (
        ("--seed", 0, "seed of the scenes"),
        ("--train", 64, "training images"),
        ("--val", 16, "validation images"),
    ):
        synth.add_argument(name, type=int, default=default, help=f"{what} (default: %(default)s)")
    size = "image size (default: the dataset's)"
    synth.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help=size)

    text = "convert labels once; optionally decode images to a cache"
    prepare = command(commands, "prepare", text, _prepare)
    prepare.add_argument("--cache", action="store_true", help="decode all images to uncompressed files")
    prepare.add_argument("--cache-dir", type=Path, help="where the cache goes (default: decoded in the root)")
    prepare.add_argument("--yes", action="store_true", help="do not ask before writing the cache")

    text = "decode and check every file, write the manifest"
    command(commands, "verify", text, partial(_verify, splits_used))
    command(commands, "info", "print classes, splits, licence and state of a dataset", _info)

    show = command(commands, "show", "write a contact sheet of images and labels", _show)
    show.add_argument("--split", default="train", help="split (default: %(default)s)")
    show.add_argument("--n", type=int, default=4, help="number of samples (default: %(default)s)")
    show.add_argument("--task", type=int, help="task, for a dataset that has several (CaDIS: 1, 2 or 3)")
    show.add_argument("--out", type=Path, help="PNG file (default: DATASET-SPLIT.png)")


def _command(
    find: Callable[[str], Spec], commands: Any, name: str, text: str, handler: DataHandler
) -> argparse.ArgumentParser:
    def handle(args: argparse.Namespace) -> None:
        spec = find(args.dataset)
        handler(args, spec, args.root or default_root(spec.name))

    parser = add_command(commands, name, handle, text)
    parser.add_argument("dataset", metavar="DATASET", help=f"{', '.join(DATASETS)}, or one of params.yaml")
    parser.add_argument(
        "--root", type=Path, help="the dataset's folder (default: $MSCS_DATA/DATASET or data/DATASET)"
    )
    return parser


def _fetch(args: argparse.Namespace, spec: Spec, root: Path) -> None:
    from mscs.datasets.fetch import fetch

    added = fetch(spec, root, given=args.given)
    print(f"{root}: {'added ' + ', '.join(added) if added else 'everything is there'}")
    print(f"Next: mscs data {'prepare' if spec.prepare else 'verify'} {spec.name}")


def _synth(args: argparse.Namespace, spec: Spec, root: Path) -> None:
    from mscs.datasets.toy import write_dataset

    size = tuple(args.size) if args.size else None
    write_dataset(spec, root, seed=args.seed, train=args.train, val=args.val, image_size=size)
    print(f"{root}: {args.train} training and {args.val} validation scenes, seed {args.seed}")


def _prepare(args: argparse.Namespace, spec: Spec, root: Path) -> None:
    if spec.prepare:
        number = spec.prepare(root)
        print(f"{root}: {f'converted {number} label files' if number else 'labels are converted'}")
    elif not args.cache:
        print(f"{spec.name} needs no preparation; --cache decodes its images for faster reading")
    if args.cache:
        from mscs.datasets.prepare import build_cache, cache_bytes

        print(f"decoded images and labels will take {cache_bytes(spec, root) / 1e9:.1f} GB")
        if not args.yes and (not sys.stdin.isatty() or input("Write them? [y/N] ").strip().lower() != "y"):
            raise UsageError("nothing written; add --yes to write the cache")
        print(f"{root}: {build_cache(spec, root, args.cache_dir)} files in the cache")


def _verify(splits_used: SplitsUsed, _args: argparse.Namespace, spec: Spec, root: Path) -> None:
    from mscs.datasets.verify import verify

    manifest = verify(spec, root, needed=splits_used(spec.name))
    print(f"{root}: sound ({_counts(manifest['splits'])}), digest {manifest['digest']}")


def _counts(splits: Mapping[str, int | None]) -> str:
    return ", ".join(split if count is None else f"{split} {count}" for split, count in splits.items())


def _info(_args: argparse.Namespace, spec: Spec, root: Path) -> None:
    print(f"{spec.name}: {spec.home} ({spec.licence})" if spec.home else f"{spec.name}: your own")
    print(f"  images: {_counts(spec.splits)}")
    for labels in spec.label_sets:
        task = f"task {labels.task}, " if labels.task else ""
        print(f"  {task}{labels.num_classes} classes: {', '.join(labels.classes)}")
    if not root.is_dir():
        how = f"` or `mscs data synth {spec.name}`" if spec.toy else " --from FOLDER`"
        print(f"  {root}: not there; `mscs data fetch {spec.name}{how}")
    elif not (root / "manifest.json").is_file():
        print(f"  {root}: not verified yet; `mscs data verify {spec.name}`")
    else:
        from mscs.datasets.verify import read_manifest

        found = read_manifest(spec, root)
        kind = "generated scenes" if found["generated"] else "verified"
        print(f"  {root}: {kind}, {_counts(found['splits'])}, digest {found['digest']}")
        print(f"  cache of decoded images: {'yes' if any((root / 'decoded').glob('[!.]*')) else 'no'}")


def _show(args: argparse.Namespace, spec: Spec, root: Path) -> None:
    from mscs.datasets.base import build_dataset
    from mscs.datasets.show import write_contact_sheet

    out = args.out or Path(f"{spec.name}-{args.split}.png")
    write_contact_sheet(build_dataset(spec, args.split, root, args.task), args.n, out)
    print(out)
