"""Whole trainings by `mscs train` on the device at hand, short ones, without a network.

`curve` trains at the paper's crop on generated scenes; `resumed` does the same, is killed in mid-run, goes on
and must end with the same losses, bit for bit; `processes` compares one process with two that share the
device (gloo, fp32); `side_by_side` trains and scores several runs at once on one device and packs their
results, without weights, into one archive. Jobs are plain dictionaries; `python -m reproduce gpu` makes them.

    python benchmarks/training.py                 # the first three on profile mini's tiny network
"""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
POLL = 0.05  # seconds between looks for the first checkpoint
LAST_LINES = 6

EXAMPLE = {
    "run": "cityscapes-hrnet-hr48-ours",
    "profile": "mini",
    "image_size": [64, 128],
    "images": 4,
    "overrides": {
        "steps": 6,
        "batch_size": 4,
        "images_per_group": 1,
        "log_every": 1,
        "checkpoint_every": 2,
        "deterministic": True,
    },
}


def project(folder):
    """Make `folder` a project of its own, so that nothing of this checkout is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def mscs(folder, *words, **environment):
    """Start `mscs WORDS` in a project folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "mscs", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process):
    """Wait for a command; RuntimeError with its last lines if it failed."""
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError("\n".join(said.splitlines()[-LAST_LINES:]) or f"exit {process.returncode}")


def words_of(job, *, data=None):
    """Return the arguments that `mscs train` and `mscs evaluate` share."""
    words = [job["run"], "--profile", job["profile"], "--accept-packages"]
    for key, value in job.get("overrides", {}).items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    return words + ([] if data is None else ["--data-root", str(data)])


def train_words(job, scratch):
    """Return the arguments of a training on scenes drawn in `scratch`."""
    from mscs.datasets.toy import write_dataset
    from mscs.params import load_params

    dataset = load_params(ROOT / "params.yaml").run_info(job["run"])["dataset"]
    scenes = {"train_images": job["images"], "val_images": 1, "image_size": job["image_size"]}
    data = scratch / f"{dataset}-{job['image_size'][0]}"
    write_dataset(dataset, data, train=job["images"], val=1, image_size=job["image_size"])
    own = {"data_source": "generated", "pretrained": False, **scenes}
    words = words_of(job | {"overrides": job["overrides"] | own}, data=data)
    return ["train", *words, "--processes", "1", "--workers", "0"]


def losses_of(folder):
    """Return the loss at every logged step of the one training in a project folder."""
    (path,) = folder.glob("results/*/runs/*/seed-*/losses.csv")
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def curve(job, scratch):
    """Train from start to end; return losses, seconds and peak bytes."""
    from mscs.results import read_json

    folder = scratch / f"{job['run']}-whole"
    shutil.rmtree(folder, ignore_errors=True)
    project(folder)
    finished(mscs(folder, *train_words(job, scratch)))
    (path,) = folder.glob("results/*/runs/*/seed-*/run.json")
    record = read_json(path)
    losses = losses_of(folder)
    return {"losses": losses, "fell": losses[-1] < losses[0]} | {
        key: record[key] for key in ("seconds", "peak_bytes")
    }


def resumed(job, scratch):
    """Kill a training after its first checkpoint and let it go on; compare with one that was not killed."""
    whole = scratch / f"{job['run']}-whole"
    if not list(whole.glob("results/*/runs/*/seed-*/train.json")):
        curve(job, scratch)
    folder, words = scratch / f"{job['run']}-killed", train_words(job, scratch)
    shutil.rmtree(folder, ignore_errors=True)
    project(folder)
    process = mscs(folder, *words)
    while process.poll() is None and not list(folder.glob("work/*/checkpoints/*/seed-*/step-*.json")):
        time.sleep(POLL)
    process.kill()
    process.communicate()
    killed = process.returncode == -9
    finished(mscs(folder, *words))
    expected, found = losses_of(whole), losses_of(folder)
    return {"killed": killed, "losses": found, "bit_identical": expected == found}


def processes(job, scratch):
    """Train with one process and with two on the same device; return both curves and their distance."""
    train_words(job, scratch)  # draws the scenes
    curves = {count: _in_processes(job, scratch, count) for count in (1, 2)}
    apart = max(abs(a - b) / abs(a) for a, b in zip(curves[1], curves[2], strict=True))
    return {"one": curves[1], "two": curves[2], "largest_relative_difference": apart}


def _in_processes(job, scratch, count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(job), str(scratch)],
                env={**os.environ, **place, "MASTER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    answers = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, answers, strict=True):
        if process.returncode:
            raise RuntimeError("\n".join(errors.splitlines()[-LAST_LINES:]))
    return json.loads(answers[0][0].splitlines()[-1])


def one_process(job, scratch):
    """Train as the environment's rank of its world size, on the first device, and return the losses.

    `mscs train` gives every process a GPU of its own; here they share one, which only gloo allows.
    """
    import torch
    import torch.distributed as dist

    from mscs import build
    from mscs.distributed import World
    from mscs.params import load_params
    from mscs.train import Trainer

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = {"pretrained": False, "data_source": "generated"}
    settings = (
        load_params(ROOT / "params.yaml").resolve(job["run"], job["profile"], job["overrides"] | own).settings
    )
    build.apply_machine_settings(settings)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if size > 1:
        dist.init_process_group("gloo")
    dataset = build.open_dataset(settings, "train", scratch / f"{settings.data.name}-{job['image_size'][0]}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, 0, World(rank, size, device), dataset, Path(folder))
        trainer.train()
    if size > 1:
        dist.destroy_process_group()
    return [row["loss"] for row in trainer.history]


def side_by_side(job, scratch, archive):
    """Train and score every (run, seed) of a job, `job["side"]` at a time; yield the scores after each.

    Those whose scores are in `archive` are done. The archive holds results only and is replaced after each.
    """
    folder = project(scratch / "side-by-side")
    shutil.rmtree(folder / "results", ignore_errors=True)  # of earlier calls the archive's count
    if archive.exists():
        with tarfile.open(archive) as earlier:
            earlier.extractall(folder, filter="data")
    lock = threading.Lock()

    def one(run, seed):
        own = job | {"run": run}
        words = [*words_of(own, data=job.get("data")), "--seed", str(seed)]
        if _score(folder, run, seed) is None:
            finished(mscs(folder, "train", *words, "--processes", "1", "--workers", str(job["workers"])))
            finished(mscs(folder, "evaluate", *words))
            with lock:
                _archive(folder, archive)
        score = _score(folder, run, seed)
        if score is None:
            raise RuntimeError(f"{run} seed {seed}: trained and evaluated, but there is no evaluation.json")
        return score

    found = {"scores": {}, "failed": {}}
    with ThreadPoolExecutor(job["side"]) as threads:
        tasks = {threads.submit(one, run, seed): f"{run} seed {seed}" for run, seed in job["trainings"]}
        for task in as_completed(tasks):
            try:
                found["scores"][tasks[task]] = task.result()
            except RuntimeError as error:
                found["failed"][tasks[task]] = str(error)
            yield found


def _score(folder, run, seed):
    """Return the single-scale mIoU of a training in a project folder, None if it was not scored."""
    from mscs.results import read_json

    runs = [*folder.glob(f"results/*/runs/{run}"), *folder.glob(f"results/*/runs/{run}+*")]
    for path in (one / f"seed-{seed}" / "evaluation.json" for one in runs):
        if path.exists():
            return read_json(path)["ss"]["miou"]
    return None


def _archive(folder, archive):
    from mscs.results import atomic_path

    with atomic_path(archive) as temporary, tarfile.open(temporary, "w:gz") as packed:
        packed.add(folder / "results", "results")


def main():
    if len(sys.argv) == 3:
        print(json.dumps(one_process(json.loads(sys.argv[1]), Path(sys.argv[2]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for measure in (curve, resumed, processes):
            print(measure.__name__, json.dumps(measure(EXAMPLE, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
