"""The `mscs` command: one subcommand per thing a person does with one run or one dataset."""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mscs
from mscs.command_line import Handler, add_command, run_command
from mscs.datasets import DATASETS, Spec
from mscs.datasets.registry import dataset_spec
from mscs.errors import UsageError, unknown_name
from mscs.job import Job
from mscs.launch import evaluate, predict, train
from mscs.params import Resolved, load_params, parse_overrides
from mscs.paths import RESULTS, SeedFiles, read_resolved
from mscs.results import read_mapping
from mscs.settings import NAME, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors become one line on stderr and an exit code (2 misuse, 1 failure)."""
    return run_command(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = argparse.ArgumentParser(prog="mscs", description=mscs.__doc__)
    parser.add_argument("--version", action="version", version=f"mscs {mscs.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    runs = add_command(commands, "runs", _runs, "list every run of the paper", params=True, as_json=True)
    runs.add_argument("--trained", action="store_true", help="list what has been trained here, with scores")
    _add_run_command(commands, "show", _show, "print one run's settings and where each comes from", True)
    _add_train(commands)
    _add_evaluate(commands)
    _add_predict(commands)

    from mscs.datasets.commands import add_data_commands
    from mscs.doctor import add_doctor_command

    add_data_commands(commands, _splits_used, _find_dataset)
    add_doctor_command(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = _add_run_command(commands, "train", _train, "train one run, or go on with it")
    add = command.add_argument
    add("--workers", type=int, help="processes that read data ahead (default: 0 on CPU, 4 on GPU)")
    add("--processes", type=int, help="divisor of the batch's groups of images (default: one per GPU)")
    add("--restarts", type=int, default=0, metavar="N", help="replace lost processes N times (default: 0)")
    add("--fresh", action="store_true", help="start from step 0 even if there is a checkpoint")
    add(
        "--accept-changed", action="store_true", help="go on from a checkpoint of another version of the code"
    )
    logs = ("dvclive", "tensorboard")
    add("--log", action="append", default=[], choices=logs, help="log there too (repeatable)")


def _add_evaluate(commands: Any) -> None:
    command = _add_run_command(
        commands, "evaluate", _evaluate, "score a trained run on its validation images"
    )
    add = command.add_argument
    add("--checkpoint", type=Path, help="weights file, .safetensors, .pth or .pt (default: the run's)")
    add("--ms", action="store_true", help="multi-scale + flip too, also where the run has ss only")
    add("--split", help="split to score (default: the one of the settings)")
    add("--save-predictions", type=Path, metavar="DIR", help="write predictions in the benchmark's format")


def _add_predict(commands: Any) -> None:
    command = _add_run_command(commands, "predict", _predict, "predict the classes of images of your own")
    add = command.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="image, or folder of images")
    add("--checkpoint", type=Path, help="weights file, .safetensors, .pth or .pt (default: the run's)")
    add("--ms", action="store_true", help="multi-scale + flip")
    add("--out", type=Path, metavar="DIR", help="where ids, color, overlay go (default: below work)")


def _add_run_command(
    commands: Any, name: str, handler: Handler, text: str, prints: bool = False
) -> argparse.ArgumentParser:
    """Add a command on one run: one that prints its settings, or one that computes with them."""
    command = add_command(commands, name, handler, text, params=True, profile=True, as_json=prints)
    add = command.add_argument
    add("run", metavar="RUN", help="id of a run (see `mscs runs`)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting (repeatable)")
    if not prints:
        add("--name", help="name of a variant of your own: of the settings given by --set with it at first")
        add("--settings", type=Path, metavar="FILE", help="resolved.json to take the settings from")
        if handler is not _predict:
            add("--data-root", type=Path, help="folder of the dataset (default: where `mscs data` puts it)")
        add("--seed", type=int, help="one of the run's seeds (default: all of them)")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
        text = "compute with versions of PyTorch, timm and others that numerics.yaml does not know"
        add("--accept-packages", action="store_true", help=text)
    return command


def _runs(args: argparse.Namespace) -> None:
    if args.trained:
        rows = _trained_rows()
    else:
        params = load_params(args.params)
        rows = [params.run_info(run) for run in params.runs]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print(f"nothing is trained below {RESULTS.resolve()}; start with `mscs train RUN`")
        return
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print("  ".join(row[key].ljust(widths[key]) for key in row).rstrip())


def _find_dataset(dataset: str) -> Spec:
    """Return the facts of a dataset of this package, or of params.yaml in the current folder."""
    known = dataset in DATASETS or not Path("params.yaml").is_file()
    return dataset_spec(dataset) if known else load_params().spec(dataset)


def _splits_used(dataset: str) -> set[str] | None:
    return load_params().splits_used(dataset) if Path("params.yaml").is_file() else None


def _trained_rows() -> list[dict[str, str]]:
    """Return profile, run, seed, mIoU in percent, and what --set has changed, of every finished training."""
    rows = []
    for path in sorted(RESULTS.glob("*/runs/*/seed-*/train.json")):
        profile, run, seed = path.parts[1], path.parts[3], int(path.parts[4].removeprefix("seed-"))
        files = SeedFiles(profile, run, seed)
        scores, record, changed = (
            read_mapping(file) if file.is_file() else {}
            for file in (files.evaluation, files.record, files.variant)
        )
        if scores.get("digest") != record.get("digest", scores.get("digest")):
            scores = {}  # of an earlier training
        miou = {mode: f"{scores[mode]['miou']:.2f}" if mode in scores else "" for mode in ("ss", "ms")}
        pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in changed.items())
        rows.append({"profile": profile, "run": run, "seed": str(seed), **miou, "changed": pairs})
    return rows


def _show(args: argparse.Namespace) -> None:
    resolved = _resolve(args, parse_overrides(args.set))
    if args.json:
        print(json.dumps({**resolved.values, "sources": dict(resolved.sources)}, indent=1))
        return
    used = {key for key, _, _ in resolved.settings.walk(defaults=True)}
    width = max(map(len, resolved.values))
    for key, value in resolved.values.items():
        source = resolved.sources.get(key, "") if key in used else "not used by this run"
        print(f"{key.ljust(width)}  {json.dumps(value):32}  {source}")


def _resolve(args: argparse.Namespace, overrides: Mapping[str, Any]) -> Resolved:
    resolved = load_params(args.params).resolve(args.run, args.profile, overrides)
    for note in resolved.notes:
        print(f"mscs: {note}", file=sys.stderr)
    return resolved


def _settings(args: argparse.Namespace, **overrides: Any) -> Settings:
    """Return the settings that the command line names: params.yaml and --set, or a resolved.json."""
    if args.settings is None:
        chosen = _overrides(args) | overrides
        return _resolve(args, chosen).settings
    if args.set or args.name or overrides:
        option = "--set" if args.set else "--name" if args.name else "--ms"
        raise UsageError(f"{option} changes params.yaml's values and cannot be combined with --settings")
    return read_resolved(args.settings, args.run)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return what --set changes; a name stands for what it was given with at first."""
    given = parse_overrides(args.set)
    if args.name is None:
        return given
    if not re.fullmatch(NAME, args.name):
        raise UsageError(f"--name {args.name!r}: accepted are letters, digits, _ and -")
    profile = args.profile or load_params(args.params).profile
    path = SeedFiles(profile, f"{args.run}+{args.name}", 0).variant
    if not path.is_file():
        if not given:
            found = path.parents[1].glob(f"{args.run}+*/{path.name}")
            names = [variant.parent.name.partition("+")[2] for variant in found]
            raise UsageError(f"{unknown_name('variant', args.name, names)} A new one needs --set KEY=VALUE")
        return given
    before = read_mapping(path)
    if given and given != before:
        raise UsageError(
            f"--name {args.name} stands for {before}, not for {given}; "
            "choose another name, or leave out --set"
        )
    return before


def _job(args: argparse.Namespace, settings: Settings, **further: Any) -> Job:
    """Return the job that the command line describes; changed settings get folders of their own."""
    if args.seed is not None and args.seed not in settings.seeds:
        raise UsageError(f"--seed {args.seed}: the seeds of {settings.run} are {list(settings.seeds)}")
    overrides = _overrides(args)
    suffix = f"+{args.name or settings.digest()}" if overrides else ""
    return Job(
        settings=settings,
        seeds=settings.seeds if args.seed is None else [args.seed],
        folder=settings.run + suffix,
        overrides=overrides,
        root=getattr(args, "data_root", None),
        device=args.device,
        accept_packages=args.accept_packages,
        **further,
    )


def _train(args: argparse.Namespace) -> int:
    settings = _settings(args)
    _require_pretrained(settings, _overrides(args))
    # a launcher's second start goes on from the checkpoint of its first
    fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    job = _job(args, settings, workers=args.workers, fresh=fresh, accept_changed=args.accept_changed)
    if args.log:
        from mscs.trackers import build_tracker

        folder = job.files(job.seeds[0]).work / "logs"
        job = replace(job, observers=[build_tracker(name, folder) for name in args.log])
    return train(job, args.argv, processes=args.processes, restarts=args.restarts)


def _with_ms(args: argparse.Namespace) -> Settings:
    """Return the settings, with multi-scale inference if --ms asks for it."""
    settings = _settings(args)
    if args.ms and "ms" not in settings.evaluation.modes:
        settings = _settings(args, evaluation=[*settings.evaluation.modes, "ms"])
    return settings


def _predict(args: argparse.Namespace) -> None:
    job = _job(args, _with_ms(args))
    folder = args.out or job.files(job.seeds[0]).work / "predictions"
    if folder.is_file():
        raise UsageError(f"--out {folder} is a file; name a folder")
    predict(job, args.images, folder, checkpoint=args.checkpoint, multi_scale=args.ms)


def _evaluate(args: argparse.Namespace) -> None:
    settings = _with_ms(args)
    save = None
    if args.save_predictions is not None:
        if args.save_predictions.is_file():
            raise UsageError(f"--save-predictions {args.save_predictions} is a file; name a folder")
        from mscs.predictions import prediction_saver

        save = prediction_saver(args.save_predictions)
    asked = [str(args.checkpoint), args.split or settings.data.score_split, args.ms]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    # the pipeline's own scores are kept from what it does not ask for
    tag = "" if asked == ["None", settings.data.score_split, False] else f"+{digest}"
    evaluate(_job(args, settings), checkpoint=args.checkpoint, split=args.split, tag=tag, save=save)


def _require_pretrained(settings: Settings, overrides: Mapping[str, Any]) -> None:
    """Refuse to train the paper's networks from random weights, unless asked for by name."""
    drawn = not (settings.model.pretrained or settings.model.initial_weights)
    if settings.profile == "paper" and drawn and "pretrained" not in overrides:
        raise UsageError(
            f"{settings.run} would start from random weights in profile paper, with results that mean "
            "nothing beside the paper's. Set pretrained: true, or ask for it by name: --set pretrained=false"
        )
