"""The `mscs` command: one subcommand per thing a person does with one run or one dataset."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mscs
from mscs.errors import MscsError, UsageError
from mscs.params import Params, Settings, from_plain, load_params, parse_overrides, to_plain

if TYPE_CHECKING:
    from mscs.engine import TrainFiles

WORK = Path("work")
RESULTS = Path("results")
PROCESSES = (1, 2, 4)  # four groups of images are shared among them
SAVING_SECONDS = 110
"""How long processes that were asked to stop may take; Docker and schedulers are told to wait two minutes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors become one line on stderr and an exit code (2 misuse, 1 failure)."""
    return run_command(build_parser(), argv)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse `argv`, call the chosen handler and turn errors into messages and exit codes."""
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.handler(args) or 0)
    except MscsError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        said = f"{error.strerror}: {error.filename}" if error.strerror else error
        print(f"{parser.prog}: error: {said}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = argparse.ArgumentParser(prog="mscs", description=mscs.__doc__)
    parser.add_argument("--version", action="version", version=f"mscs {mscs.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    listing = _command(commands, "runs", "list every run of the paper", _runs)
    listing.add_argument("--json", action="store_true", help="print JSON")

    show = _command(commands, "show", "print one run's settings and where each comes from", _show)
    _add_run_arguments(show)
    show.add_argument("--json", action="store_true", help="print JSON")

    train = _command(commands, "train", "train one run, or go on with it", _train)
    _add_run_arguments(train)
    _add_job_arguments(train)
    train.add_argument(
        "--workers", type=int, help="processes that read data ahead (default: 0 on CPU, 4 on GPU)"
    )
    train.add_argument("--processes", type=int, help="training processes: 1, 2 or 4 (default: one per GPU)")
    train.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start the training processes again, up to N times, when one is lost (default: 0)",
    )
    train.add_argument("--fresh", action="store_true", help="start from step 0 even if there is a checkpoint")
    train.add_argument(
        "--log",
        action="append",
        default=[],
        choices=("dvclive", "tensorboard"),
        help="log there too (repeatable)",
    )
    train.add_argument(
        "--samples",
        type=int,
        default=0,
        metavar="N",
        help="draw predictions every N log rows (default: never)",
    )

    evaluate = _command(commands, "evaluate", "score a trained run on its validation images", _evaluate)
    _add_run_arguments(evaluate)
    _add_job_arguments(evaluate)
    evaluate.add_argument("--checkpoint", type=Path, help="weights file (default: those of the run)")
    evaluate.add_argument(
        "--ms", action="store_true", help="multi-scale + flip too, also where the run has ss only"
    )
    evaluate.add_argument("--split", default="val", help="split to score (default: val)")
    evaluate.add_argument("--boundary", action="store_true", help="boundary IoU too")
    evaluate.add_argument(
        "--save-predictions", type=Path, metavar="DIR", help="write predictions in the benchmark's format"
    )

    from mscs.datasets.commands import add_data_commands
    from mscs.doctor import add_doctor_command

    add_data_commands(commands)
    add_doctor_command(commands)

    return parser


def _command(
    commands: Any, name: str, text: str, handler: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(handler=handler)
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="parameter file (default: %(default)s)"
    )
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="id of a run (see `mscs runs`)")
    parser.add_argument("--profile", help="mini or paper (default: the one in params.yaml)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting (repeatable)"
    )


def _add_job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="resolved.json to take the settings from"
    )
    parser.add_argument(
        "--data-root", type=Path, help="folder of the dataset (default: where `mscs data` puts it)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _runs(args: argparse.Namespace) -> None:
    params = load_params(args.params)
    rows = [params.run_info(run) for run in params.runs]
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print("  ".join(row[key].ljust(widths[key]) for key in row).rstrip())


def _show(args: argparse.Namespace) -> None:
    resolved = load_params(args.params).resolve(args.run, args.profile, parse_overrides(args.set))
    values = to_plain(resolved.settings)
    if args.json:
        print(json.dumps({**values, "sources": dict(resolved.sources)}, indent=1))
        return
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key.ljust(width)}  {json.dumps(value):32}  {resolved.sources.get(key, '')}")


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings that the command line names: params.yaml and --set, or a resolved.json."""
    if args.settings is not None:
        if args.set:
            raise UsageError("--set changes params.yaml's values and cannot be combined with --settings")
        return read_resolved(args.settings, args.run)
    return load_params(args.params).resolve(args.run, args.profile, parse_overrides(args.set)).settings


def read_resolved(path: Path, run: str) -> Settings:
    """Return one run's settings from a resolved.json."""
    remedy = "make it anew with `python -m reproduce resolve`"
    try:
        phases = json.loads(path.read_text())[run].values()
        return from_plain({key: value for phase in phases for key, value in phase.items()})
    except KeyError:
        raise UsageError(f"{path} has no run {run!r}; {remedy}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} holds no resolved settings ({error}); {remedy}") from None


def data_root(settings: Settings) -> Path:
    """Return where a run's dataset lies: $MSCS_DATA or data/ if real, else the profile's work folder."""
    if settings.data_source == "generated":
        return WORK / settings.profile / "data" / settings.dataset
    from mscs.datasets.commands import default_root

    return default_root(settings.dataset)


def _train_files(settings: Settings, args: argparse.Namespace) -> "TrainFiles":
    """Return where a run's files are; settings changed on the command line get folders of their own."""
    from mscs.engine import TrainFiles

    folder = f"{settings.run}+{settings.digest()}" if args.set else settings.run
    return TrainFiles(*(base / settings.profile / "runs" / folder for base in (WORK, RESULTS)))


def _train(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    launched = "WORLD_SIZE" in os.environ
    processes = args.processes if args.processes is not None else _gpu_count(args.device)
    processes = 1 if launched else processes
    if processes not in PROCESSES:
        raise UsageError(f"--processes {processes}: a batch is four groups of images; accepted are 1, 2 or 4")
    if args.restarts < 0:
        raise UsageError(f"--restarts {args.restarts}: accepted are numbers from 0")
    _require_pretrained(settings, args.set)
    root = args.data_root or data_root(settings)
    require_data(_without_overrides(settings, args), root)
    if processes > 1 or (args.restarts and not launched):
        return _launch(processes, args.restarts, args.argv)

    from mscs.distributed import join_world
    from mscs.engine import train_run
    from mscs.provenance import record, utc
    from mscs.results import write_json

    # a launcher's second start goes on from the checkpoint of its first
    fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    files = _train_files(settings, args)
    with join_world(args.device) as world:
        workers = args.workers if args.workers is not None else 4 * (world.device.type == "cuda")
        facts = train_run(
            settings,
            root,
            files,
            WORK / settings.profile / "checkpoints",
            world,
            workers=workers,
            fresh=fresh,
            observers=_observers(args, settings, files.work) if world.is_main else (),
        )
        if facts is None:
            if world.is_main:
                print(f"{settings.run} is trained under these settings; --fresh trains it again")
        elif world.is_main:
            manifest = RESULTS / settings.profile / "data" / f"{settings.dataset}.json"
            facts |= {"data": _manifest_digest(manifest), "started": utc(facts["started"])}
            facts |= {"pretrained_weights": _pretrained_digest(settings)}
            write_json(files.results / "run.json", record(**facts))
            print(f"weights: {files.work / 'weights'}  metrics: {files.metrics}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import dataclasses

    settings = settings_of(args)
    if args.ms and "ms" not in settings.evaluation:
        settings = dataclasses.replace(settings, evaluation=(*settings.evaluation, "ms"))
    root = args.data_root or data_root(settings)
    require_data(_without_overrides(settings, args), root)

    from mscs.distributed import join_world
    from mscs.evaluation import evaluate_run, nonzero
    from mscs.results import write_json

    files = _train_files(settings, args)
    weights = {seed: args.checkpoint or files.weights(seed) for seed in settings.seeds}
    results = files.results
    asked = [str(args.checkpoint), args.split, args.ms, args.boundary]
    if asked != ["None", "val", False, False]:  # not what the pipeline asks for: it keeps its own scores
        tag = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
        results = results.with_name(f"{results.name}+{tag}")
    save = None
    if args.save_predictions is not None:
        if args.save_predictions.exists() and not args.save_predictions.is_dir():
            raise UsageError(f"--save-predictions {args.save_predictions} is a file; name a folder")
        from mscs.predictions import prediction_saver

        save = prediction_saver(args.save_predictions)
    with join_world(args.device) as world:
        record, matrices = evaluate_run(
            settings, root, weights, world, split=args.split, boundary=args.boundary, save=save
        )
        if world.is_main:
            write_json(results / "evaluation.json", record)
            write_json(results / "confusion.json", {k: nonzero(m) for k, m in matrices.items()})
            shown = ", ".join(f"{mode} {record[mode]['miou']:.2f}" for mode in settings.evaluation)
            print(f"{settings.run}: mIoU {shown} (in percent, {args.split}), in {results}")
    return 0


def _observers(args: argparse.Namespace, settings: Settings, work: Path) -> list[Any]:
    """Return what watches a training beside its own log."""
    if not args.log and not args.samples:
        return []
    from mscs.datasets import label_set
    from mscs.trackers import build_tracker, sample_pictures

    observers = [build_tracker(name, work / "logs") for name in args.log]
    if args.samples:
        colors = label_set(settings.dataset, settings.task).colors
        observers.append(sample_pictures(work / "samples", colors, args.samples))
    return observers


def _pretrained_digest(settings: Settings) -> dict[str, str] | None:
    """Return name and SHA-256 of the file that the backbone started from."""
    if not settings.pretrained:
        return None
    from mscs.checkpoint import file_digest
    from mscs.models import fetch_pretrained

    path = fetch_pretrained(settings.backbone)
    return {path.name: file_digest(path)}


def _require_pretrained(settings: Settings, overrides: Sequence[str]) -> None:
    """Refuse to train the paper's networks from random weights, unless asked for by name."""
    if (
        settings.profile == "paper"
        and not settings.pretrained
        and not any(pair.partition("=")[0].strip() == "pretrained" for pair in overrides)
    ):
        raise UsageError(
            f"{settings.run} would start from random weights in profile paper, with results that mean "
            "nothing beside the paper's. Set pretrained: true, or ask for it by name: --set pretrained=false"
        )


def _gpu_count(device: str) -> int:
    """Return how many processes a training on this machine gets: one per GPU, at most four."""
    if device == "cpu" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    import torch

    count = torch.cuda.device_count()
    return max((n for n in PROCESSES if n <= count), default=1)


def _launch(processes: int, restarts: int, argv: list[str]) -> int:
    """Run the same command under torchrun with this many processes."""
    # by address, because a container without network cannot resolve its own name
    one_machine = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    patience = [f"--max-restarts={restarts}", f"--shutdown-timeout={SAVING_SECONDS}"]
    command = [sys.executable, "-m", "torch.distributed.run", *one_machine, *patience]
    # else PyTorch 2.14 sends restarted processes to the addresses of the lost ones
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = subprocess.Popen([*command, "-m", "mscs", *argv], env=environment)
    received: list[int] = []

    def pass_on(signum: int, _frame: object) -> None:
        received.append(signum)
        launcher.send_signal(signal.SIGTERM)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, pass_on)
    code = launcher.wait()
    return 128 + received[0] if received else code


def require_data(settings: Settings, root: Path) -> None:
    """Draw a generated dataset that is not there yet; ask for a real one."""
    if root.is_dir():
        return
    if settings.data_source != "generated" or root != data_root(settings):
        profile = f"`python -m reproduce run {settings.dataset}`"
        raise UsageError(f"no dataset in {root}; make or fetch it with {profile} or `mscs data --help`")
    from mscs.datasets.toy import write_dataset

    if settings.train_images is None or settings.val_images is None:
        raise UsageError("generated data needs train_images and val_images")
    write_dataset(
        settings.dataset,
        root,
        train=settings.train_images,
        val=settings.val_images,
        image_size=settings.image_size,
    )


def _without_overrides(settings: Settings, args: argparse.Namespace) -> Settings:
    """Return a run's settings as they stand in the files: other runs share its data."""
    if not args.set:
        return settings
    return load_params(args.params).resolve(settings.run, settings.profile).settings


def _manifest_digest(path: Path) -> str | None:
    return json.loads(path.read_text()).get("digest") if path.exists() else None


def resolve_all(params: Params, profile: str) -> dict[str, dict[str, Any]]:
    """Return what resolved.json holds: per dataset its data settings, per run its settings by phase."""
    document: dict[str, dict[str, Any]] = {}
    for run in params.runs:
        settings = params.resolve(run, profile).settings
        keys = ("data_source", "task", "image_size", "train_images", "val_images")
        plain = to_plain(settings)
        document.setdefault(settings.dataset, {key: plain[key] for key in keys})
        train, evaluate = settings.phase("train"), settings.phase("evaluate")
        info = {key: value for key, value in plain.items() if key not in train and key not in evaluate}
        document[run] = {"info": info, "train": train, "evaluate": evaluate}
    return document
