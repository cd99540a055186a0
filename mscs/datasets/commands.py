"""`mscs data`: fetch, synth, prepare, verify, info, show. Light: every handler imports what it needs."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mscs.command_line import Handler, add_command
from mscs.datasets.registry import DATASETS, dataset_spec
from mscs.datasets.spec import default_root
from mscs.errors import UsageError


def add_data_commands(subparsers: Any) -> None:
    """Add the command `data` to the subparsers of the program; handlers are set as `handler`."""
    text = "get, make, check and look at the datasets"
    data = subparsers.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".")
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)

    fetch = _command(commands, "fetch", "download a dataset, or take it from a folder or archive", _fetch)
    fetch.add_argument(
        "--from", dest="given", type=Path, metavar="PATH", help="archive, or folder (linked) to use"
    )
    fetch.add_argument(
        "--keep-archives", action="store_true", help="keep downloaded archives after unpacking"
    )

    synth = _command(commands, "synth", "draw generated scenes in the dataset's layout", _synth)
    synth.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: %(default)s)")
    synth.add_argument("--train", type=int, default=64, help="training images (default: %(default)s)")
    synth.add_argument("--val", type=int, default=16, help="validation images (default: %(default)s)")
    synth.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="image size (default: the dataset's)"
    )

    prepare = _command(
        commands, "prepare", "convert labels once; optionally decode images to a cache", _prepare
    )
    prepare.add_argument("--cache", action="store_true", help="decode all images to uncompressed files")
    prepare.add_argument("--cache-dir", type=Path, help="where the cache goes (default: decoded in the root)")
    prepare.add_argument("--yes", action="store_true", help="do not ask before writing the cache")

    verify = _command(commands, "verify", "decode and check every file, write the manifest", _verify)
    verify.add_argument("--workers", type=int, help="threads (default: one per core)")

    _command(commands, "info", "print classes, splits, licence and state of a dataset", _info)

    show = _command(commands, "show", "write a contact sheet of images and labels", _show)
    show.add_argument("--split", default="train", help="split (default: %(default)s)")
    show.add_argument("--n", type=int, default=4, help="number of samples (default: %(default)s)")
    show.add_argument("--task", type=int, help="task, for a dataset that has several (CaDIS: 1, 2 or 3)")
    show.add_argument("--out", type=Path, help="PNG file (default: DATASET-SPLIT.png)")


def _command(commands: Any, name: str, text: str, handler: Handler) -> argparse.ArgumentParser:
    parser = add_command(commands, name, handler, text)
    parser.add_argument("dataset", metavar="DATASET", help=", ".join(DATASETS))
    parser.add_argument(
        "--root", type=Path, help="the dataset's folder (default: $MSCS_DATA/DATASET or data/DATASET)"
    )
    return parser


def _root(args: argparse.Namespace) -> Path:
    return args.root or default_root(dataset_spec(args.dataset).name)


def _fetch(args: argparse.Namespace) -> int:
    from mscs.datasets.fetch import fetch

    root = _root(args)
    added = fetch(args.dataset, root, given=args.given, keep_archives=args.keep_archives)
    print(f"{root}: {'added ' + ', '.join(added) if added else 'everything is there'}")
    next_step = "prepare" if DATASETS[args.dataset].prepare else "verify"
    print(f"Next: mscs data {next_step} {args.dataset}")
    return 0


def _synth(args: argparse.Namespace) -> int:
    from mscs.datasets.toy import write_dataset

    root = _root(args)
    size = tuple(args.size) if args.size else None
    write_dataset(args.dataset, root, seed=args.seed, train=args.train, val=args.val, image_size=size)
    print(f"{root}: {args.train} training and {args.val} validation scenes, seed {args.seed}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    root = _root(args)
    if convert := DATASETS[args.dataset].prepare:
        number = convert(root)
        print(f"{root}: {f'converted {number} label files' if number else 'labels are converted'}")
    elif not args.cache:
        print(f"{args.dataset} needs no preparation; --cache decodes its images for faster reading")
    if args.cache:
        from mscs.datasets.prepare import build_cache, cache_bytes

        print(f"decoded images and labels will take {cache_bytes(args.dataset, root) / 1e9:.1f} GB")
        if not args.yes and (not sys.stdin.isatty() or input("Write them? [y/N] ").strip().lower() != "y"):
            raise UsageError("nothing written; add --yes to write the cache")
        print(f"{root}: {build_cache(args.dataset, root, args.cache_dir)} files in the cache")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mscs.datasets.verify import verify

    root = _root(args)
    manifest = verify(args.dataset, root, workers=args.workers)
    print(f"{root}: sound ({_counts(manifest['splits'])}), digest {manifest['digest']}")
    return 0


def _counts(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {count}" for split, count in splits.items())


def _info(args: argparse.Namespace) -> int:
    root, spec = _root(args), DATASETS[args.dataset]
    print(f"{spec.name}: {spec.home} ({spec.licence})")
    print(f"  images: {_counts(spec.splits)}")
    for labels in spec.label_sets:
        task = f"task {labels.task}, " if labels.task else ""
        print(f"  {task}{labels.num_classes} classes: {', '.join(labels.classes)}")
    if not root.is_dir():
        print(f"  {root}: not there; `mscs data fetch {args.dataset}` or `mscs data synth {args.dataset}`")
    elif not (root / "manifest.json").is_file():
        print(f"  {root}: not verified yet; `mscs data verify {args.dataset}`")
    else:
        from mscs.datasets.verify import read_manifest

        found = read_manifest(args.dataset, root)
        kind = "generated scenes" if found["generated"] else "verified"
        print(f"  {root}: {kind}, {_counts(found['splits'])}, digest {found['digest']}")
        print(f"  cache of decoded images: {'yes' if (root / 'decoded/index.json').is_file() else 'no'}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from mscs.datasets.base import build_dataset
    from mscs.datasets.show import write_contact_sheet

    dataset = build_dataset(args.dataset, args.split, _root(args), args.task)
    out = args.out or Path(f"{args.dataset}-{args.split}.png")
    write_contact_sheet(dataset, args.n, out)
    print(out)
    return 0
