"""Carries out trainings and evaluations on this machine: checks first, then processes, then work.

The command line and the stages of the pipeline both call these. Heavy packages are imported after the checks.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mscs.command_line import loading
from mscs.datasets.spec import GENERATED
from mscs.errors import MscsError, UsageError
from mscs.job import Job
from mscs.numerics import check_packages
from mscs.paths import data_root
from mscs.results import read_mapping
from mscs.settings import Settings

if TYPE_CHECKING:
    from mscs.evaluation import OnPrediction

SAVING_SECONDS = 110
"""How long processes that were asked to stop may take; Docker and schedulers are told to wait two minutes."""


def train(job: Job, argv: Sequence[str], *, processes: int | None = None, restarts: int = 0) -> int:
    """Train the seeds of a job, in this process or in several that run `mscs ARGV`; return the exit code."""
    launched = os.environ.get("WORLD_SIZE")
    if launched:
        processes = int(launched)
    elif processes is None:
        processes = default_processes(job.device, job.settings.schedule.groups)
    check_processes(job.settings, processes)
    if restarts < 0:
        raise UsageError(f"--restarts {restarts}: accepted are numbers from 0")
    check_packages(accept=job.accept_packages)
    require_data(job.settings, job.data_root)
    if not launched and (processes > 1 or restarts):
        return launch(processes, restarts, argv)

    with loading():
        from mscs.distributed import join_world
        from mscs.runs import train_seed

    with join_world(job.device) as world:
        for seed in job.seeds:
            trained = train_seed(job, seed, world)
            if world.is_main:
                files, run = job.files(seed), job.settings.run
                there = f"{run} seed {seed} is trained under these settings; --fresh trains it again"
                print(f"weights: {files.weights}  metrics: {files.metrics}" if trained else there)
    return 0


def evaluate(
    job: Job,
    *,
    checkpoint: Path | None = None,
    split: str | None = None,
    tag: str = "",
    save: "OnPrediction | None" = None,
) -> dict[int, dict[str, Any]]:
    """Score the seeds of a job; return their records. `tag` is added to the names of the result folders."""
    check_packages(accept=job.accept_packages)
    require_data(job.settings, job.data_root)

    with loading():
        from mscs.distributed import join_world
        from mscs.runs import evaluate_seed

    records = {}
    with join_world(job.device) as world:
        for seed in job.seeds:
            results = job.files(seed).results
            folder = results.with_name(results.name + tag)
            records[seed] = evaluate_seed(job, seed, world, folder, checkpoint, split, save)
            if world.is_main:
                modes = job.settings.evaluation.modes
                shown = ", ".join(f"{mode} {records[seed][mode]['miou']:.2f}" for mode in modes)
                run, scored = job.settings.run, split or job.settings.data.score_split
                print(f"{run} seed {seed}: mIoU {shown} (in percent, {scored}), in {folder}")
    return records


def predict(
    job: Job,
    paths: Sequence[Path],
    folder: Path,
    *,
    checkpoint: Path | None = None,
    multi_scale: bool = False,
) -> None:
    """Write what the first seed of a job, or a weights file, answers to images and folders of images.

    Raises:
        UsageError: a path that holds no image, or no weights.
        MscsError: images that could not be read, all named; the others have their predictions.
    """
    check_packages(accept=job.accept_packages)

    with loading():
        from tqdm import tqdm

        from mscs import build
        from mscs.datasets.base import decode_image, read_bytes
        from mscs.distributed import join_world
        from mscs.predictions import pictures_in, write_views
        from mscs.runs import check_weights

    settings, files, pictures = job.settings, job.files(job.seeds[0]), pictures_in(paths)
    if checkpoint is None:
        check_weights(settings, job.seeds[0], files)
    labels = settings.data.labels
    top = settings.data.reflect_pad[0] if settings.evaluation.score_padding else 0
    problems = []
    build.apply_machine_settings(settings)
    with join_world(job.device) as world:
        predictor = build.predictor(settings, labels.num_classes, checkpoint or files.weights, world.device)
        for picture in tqdm(pictures, desc=f"predict {settings.run}", unit="image", disable=None):
            try:
                image = decode_image(read_bytes(picture), picture)
                scores = predictor.scores(image, multi_scale=multi_scale)
            except MscsError as error:  # broken, or smaller than the network's stride
                problems.append(str(error) if str(picture) in str(error) else f"{picture}: {error}")
                continue
            ids = scores.argmax(0)[top : top + len(image)]
            write_views(folder, labels, picture.stem, image, ids.cpu().numpy())
    print(f"{len(pictures) - len(problems)} of {len(pictures)} images: ids, color, overlay in {folder}")
    if problems:
        raise MscsError("\n  ".join([f"{len(problems)} images have no prediction:", *problems]))


def check_processes(settings: Settings, processes: int) -> None:
    """Raise UsageError unless the groups of a batch can be shared among so many processes."""
    groups, parts = settings.schedule.groups, settings.schedule.accumulation_steps
    if processes < 1 or groups % (processes * parts):
        in_parts = f" in {parts} parts" if parts > 1 else ""
        raise UsageError(
            f"{processes} processes cannot share a batch of {groups} groups of images{in_parts}; accepted "
            f"are the divisors of {groups // parts}"
        )


def default_processes(device: str, groups: int) -> int:
    """Return how many processes a training of `groups` groups of images gets here: one per GPU it can use."""
    if device == "cpu" or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    import torch

    count = torch.cuda.device_count()
    return max((n for n in range(1, groups + 1) if groups % n == 0 and n <= count), default=1)


def launch(processes: int, restarts: int, argv: Sequence[str]) -> int:
    """Run `mscs ARGV` under torchrun with this many processes; return its exit code."""
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
    """Draw a generated dataset that is not there yet; refuse one that is not what the settings say.

    Raises:
        UsageError: no dataset, generated scenes instead of a real one or a real one instead of
            generated scenes, or scenes of another number or size.
        MscsError: a real dataset whose files do not fit its manifest.
    """
    data = settings.data
    asked = {"train": data.train_images, "val": data.val_images, "image_size": data.image_size}
    if not root.is_dir():
        if data.source != "generated" or root != data_root(settings):
            raise UsageError(
                f"no dataset in {root}; make or fetch it with `python -m reproduce run {data.name}` or "
                "`mscs data --help`"
            )
        train, val = data.train_images, data.val_images
        if train is None or val is None:
            raise UsageError("generated data needs train_images and val_images")
        from mscs.datasets.toy import write_dataset

        write_dataset(data.spec, root, train=train, val=val, image_size=data.image_size)
    marker = root / GENERATED
    made = read_mapping(marker) if marker.is_file() else None
    if (made is not None) != (data.source == "generated"):
        kind, source = ("a real dataset", "real") if made is None else ("generated scenes", "generated")
        raise UsageError(
            f"{root} holds {kind}, the settings of {settings.run} say data_source: {data.source}; name "
            f"the right folder with --data-root, or --set data_source={source}"
        )
    if made is None:
        from mscs.datasets.verify import check_manifest

        check_manifest(data.spec, root)
        return
    for key, value in asked.items():
        wanted, found = list(value) if isinstance(value, tuple) else value, made.get(key)
        if found != wanted:
            raise UsageError(
                f"{root} was generated with {key} {found}, the settings of {settings.run} say {wanted}; "
                f"make it anew with `python -m reproduce run {data.name}`, or name a folder with --data-root"
            )
