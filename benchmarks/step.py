"""A training step of every row of the supplement's Tables 4 to 7, taken apart.

Each row is measured at its crop and its images per GPU (the batch over four GPUs) with the network, loss,
optimiser and loader of `mscs train`, in plain fp32 and with each of our options on top: time of a whole step,
images per second, peak memory, and the parts: data (one process reading, per batch), forward, cross-entropy,
contrastive loss (forward), backward, optimiser. The parts wait for the device after each of them, so they add
up to more than the step. The contrastive loss's share is what a step takes longer with it than without it.
Every measurement runs in a process of its own: peaks do not mix, and an exhausted memory ends one only.

    python benchmarks/step.py                            # all rows, all options
    python benchmarks/step.py --quick                    # an eighth of the crop's sides, two repeats
    python benchmarks/step.py --profile mini --variants settings
    python benchmarks/step.py --rows cadis --variants "fp32 plain" "bf16 channels-last"

Writes step-DEVICE.json and .md to benchmarks/results; `python -m reproduce plan` reads the former.
"""

import argparse
import gc
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {
    "precision": "fp32",
    "tf32": False,
    "channels_last": False,
    "compile": False,
    "deterministic": False,
}
VARIANTS = {
    "fp32 plain": PLAIN,
    "fp32 channels-last": PLAIN | {"channels_last": True},
    "tf32 channels-last": PLAIN | {"channels_last": True, "tf32": True},
    "bf16 plain": PLAIN | {"precision": "bf16"},
    "bf16 channels-last": PLAIN | {"precision": "bf16", "channels_last": True},
    "bf16 channels-last compile": PLAIN | {"precision": "bf16", "channels_last": True, "compile": True},
    "fp32 plain deterministic": PLAIN | {"deterministic": True},
}
PARTS = ("data", "forward", "cross_entropy", "contrastive", "backward", "optimiser")
WARM_UP = 2


def jobs(arguments):
    """Yield one job per row and variant; a row is measured on a run with the full loss where it has one.

    With --runs, one per network, loss and images per group of those runs.
    """
    from mscs.params import load_params

    params = load_params(ROOT / "params.yaml")
    seen = set()
    runs = sorted(
        params.runs_of(arguments.profile), key=lambda run: params.resolve(run).settings.loss.name != "ours"
    )
    for run in arguments.runs or runs:
        settings = params.resolve(run, arguments.profile).settings
        row, loss, images = settings.schedule.name, settings.loss.name, settings.schedule.images_per_group
        kind = (row, loss, images) if arguments.runs else (row,)
        if kind in seen or not any(part in row for part in arguments.rows):
            continue
        seen.add(kind)
        own = {key: getattr(settings.machine, key) for key in PLAIN}
        for name in arguments.variants:
            options = own if name == "settings" else VARIANTS[name]
            yield {
                "row": row,
                "loss": loss,
                "run": run,
                "profile": arguments.profile or params.profile,
                "variant": name,
                "options": options,
                "batch": images,
                "quick": arguments.quick,
            }


def settings_of(job):
    """Return the settings of a job: one group of images, no pretrained weights, drawn data, no learning."""
    from mscs.params import load_params

    params = load_params(ROOT / "params.yaml")
    schedule = params.resolve(job["run"], job["profile"]).settings.schedule
    overrides = {**job["options"], "pretrained": False, "skip_wrong_labels": False, "lr": 0.0}
    overrides |= {"batch_size": job["batch"], "images_per_group": job["batch"]}
    overrides["accumulation_steps"] = 1
    if job["quick"]:
        sides = [max(64, side // 8 // 32 * 32) for side in schedule.crop_size]
        overrides |= {"crop_size": sides, "scale_range": [0.5, 1.0]}
    return params.resolve(job["run"], job["profile"], overrides).settings


IMAGE_SIZES = {
    "cityscapes": (1024, 2048),
    "ade20k": (512, 683),
    "pascal_context": (375, 500),
    "cadis": (540, 960),
    "camvid": (360, 480),
}
"""Height and width of the datasets' images; where they vary, of a usual one."""


READ = {}


def read_batches(settings, quick, count):
    """Return a dataset of a few drawn images, a batch of it, and the median seconds to read such a batch.

    What was read for the same images, crops and batch before is returned again.
    """
    from mscs import build
    from mscs.loader import train_loader

    key = (settings.data.model_dump_json(), settings.schedule.crop_size, settings.schedule.batch_size)
    if key in READ:
        return READ[key]
    with tempfile.TemporaryDirectory() as folder:
        dataset = drawn_dataset(settings, quick, Path(folder))
        transform, size = build.train_transform(settings), settings.schedule.batch_size
        loader = train_loader(dataset, transform, batch_size=size, seed=0, num_steps=count)
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            batch = next(loader)
            seconds.append(time.perf_counter() - begun)
    READ[key] = dataset, batch, statistics.median(seconds[WARM_UP:])
    return READ[key]


def drawn_dataset(settings, quick, folder):
    """Draw a few images of the dataset's usual size: reading and augmenting cost what they do in training.

    Of a dataset of the user's own, which nothing here can draw, the images that are there are taken.
    """
    from mscs import build
    from mscs.datasets import build_dataset
    from mscs.datasets.toy import write_dataset
    from mscs.paths import data_root

    if settings.data.spec.toy is None:
        return build.open_dataset(settings, settings.data.train_split, data_root(settings))
    size = settings.data.image_size or IMAGE_SIZES[settings.data.name]
    if quick:
        size = tuple(max(96, side // 4) for side in size)
    count = max(4, settings.schedule.batch_size)
    write_dataset(settings.data.name, folder, train=count, val=1, image_size=size)
    return build_dataset(settings.data.name, "train", folder, settings.data.task)


def measure(job, repeats):
    """Return the measurements of one job."""
    import torch

    from mscs import build
    from mscs.monitor import peak_bytes

    settings = settings_of(job)
    build.apply_machine_settings(settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # one process may measure several jobs
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    dataset, batch, data = read_batches(settings, job["quick"], WARM_UP + repeats)
    step = Step(settings, dataset, batch, device)
    whole = step.time(repeats)
    without = step.time(repeats, contrastive=False)
    peak = peak_bytes(device)
    parts = {"data": data, **step.parts(repeats)}
    return {
        "crop": list(batch.images.shape[-2:]),
        "step_ms": 1000 * whole,
        "images_per_s": settings.schedule.batch_size / whole,
        "contrastive_share": 1 - without / whole,
        "peak_bytes": peak,
        "parts_ms": {name: 1000 * parts[name] for name in PARTS},
    }


class Step:
    """The step of `mscs.train.Trainer` on one batch that stays on the device."""

    def __init__(self, settings, dataset, batch, device):
        import torch

        from mscs import build

        self.device = device
        model = build.network(settings, dataset.num_classes, seed=0).to(device)
        self.images = batch.images.to(device).contiguous(memory_format=build.memory_format_of(settings))
        self.labels = batch.labels.to(device)
        self.optimizer = build.optimizer(settings, model, fused=device.type == "cuda")
        self.network = torch.compile(model.train()) if settings.machine.compile else model.train()
        self.objective = build.objective(settings, dataset.class_weights).to(device)
        self.contrastive = self.objective.on_embeddings
        dtype = build.AUTOCAST[settings.machine.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.machine.precision == "fp16")
        self.autocast = lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def use(self, losses):
        """Use these losses on the embeddings."""
        from torch import nn

        self.objective.on_embeddings = nn.ModuleList(losses)

    def loss(self, output):
        from mscs.seeding import torch_generator

        return self.objective(output, self.labels, [torch_generator(0, "anchors")])[0]

    def update(self):
        from mscs.optim import gradient_norm

        self.scaler.unscale_(self.optimizer)
        gradient_norm(self.network)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def wait(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, repeats, contrastive=True):
        """Return the median seconds of a step that is never waited for inside."""
        self.use(self.contrastive if contrastive else ())
        seconds = []
        for _ in range(WARM_UP + repeats):
            begun = self.wait()
            with self.autocast():
                total = self.loss(self.network(self.images))
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(total).backward()
            self.update()
            seconds.append(self.wait() - begun)
        self.use(self.contrastive)
        return statistics.median(seconds[WARM_UP:])

    def parts(self, repeats):
        """Return the median seconds of each part, waiting for the device after each."""
        seconds = []
        for _ in range(WARM_UP + repeats):
            marks = [self.wait()]
            with self.autocast():
                output = self.network(self.images)
                marks.append(self.wait())
                self.use(())
                self.loss(output)
                marks.append(self.wait())
                self.use(self.contrastive)
                total = self.loss(output)
            marks.append(self.wait())
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(total).backward()
            marks.append(self.wait())
            self.update()
            marks.append(self.wait())
            forward, entropy, both, backward, optimiser = (b - a for a, b in itertools.pairwise(marks))
            seconds.append((forward, entropy, max(0.0, both - entropy), backward, optimiser))
        medians = map(statistics.median, zip(*seconds[WARM_UP:], strict=True))
        return dict(zip(PARTS[1:], medians, strict=True))


def run_job(job, repeats):
    """Measure `job` in a new process; a failure becomes the row's note."""
    command = [sys.executable, __file__, "--job", json.dumps(job), "--repeats", str(repeats)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return job | json.loads(result.stdout.splitlines()[-1])
    if result.returncode == -9 or "OutOfMemoryError" in result.stderr:
        return job | {"failed": "out of memory"}
    last = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit {result.returncode}"
    return job | {"failed": last[:200]}


def table(results):
    lines = [
        "| Row | Loss | Options | Images x crop | Step (ms) | Images/s | Peak (GiB) | Contrastive share | "
        + " | ".join(name.replace("_", "-") for name in PARTS)
        + " |",
        "|---" * (8 + len(PARTS)) + "|",
    ]
    for r in results:
        start = f"| {r['row']} | {r['loss']} | {r['variant']}"
        if "failed" in r:
            lines.append(f"{start} | {r['batch']} | {r['failed']}" + " |" * 10)
            continue
        parts = " | ".join(f"{r['parts_ms'][name]:.1f}" for name in PARTS)
        size = f"{r['batch']} x {r['crop'][0]}x{r['crop'][1]}"
        lines.append(
            f"{start} | {size} | {r['step_ms']:.1f} | {r['images_per_s']:.1f} "
            f"| {r['peak_bytes'] / 2**30:.2f} | {r['contrastive_share']:.1%} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def device_name():
    """Return the GPU's name, or the processor's."""
    import torch

    from mscs.provenance import machine

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    facts = machine()
    return f"{facts['cpu']}, {facts['cpus']} cores"


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="paper", help="mini or paper (default: paper)")
    parser.add_argument("--quick", action="store_true", help="an eighth of each side, two repeats")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose name contains one of these")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="RUN", help="these runs instead of one a row"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=[*VARIANTS, "settings"],
        metavar="NAME",
        help=f"of {', '.join(VARIANTS)}; or settings, as the profile has them",
    )
    parser.add_argument("--repeats", type=int, default=10, help="median of so many, after two")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main():
    arguments = parse()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job), arguments.repeats)))
        return
    import torch

    from mscs.results import write_json, write_text

    if arguments.quick:
        arguments.repeats = 2
    device = device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    name = f"step-{slug}-{arguments.profile}" + ("-quick" if arguments.quick else "")
    facts = {"device": device, "torch": torch.__version__, "profile": arguments.profile}
    results = []
    for job in jobs(arguments):
        results.append(run_job(job, arguments.repeats))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        document = facts | {"quick": arguments.quick, "results": results}
        write_json(arguments.output / f"{name}.json", document)
        text = f"Measured by benchmarks/step.py on {device}, torch {torch.__version__}, profile "
        text += f"{arguments.profile}{', quick' if arguments.quick else ''}. Parts in ms.\n\n{table(results)}"
        write_text(arguments.output / f"{name}.md", text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
