"""What `python -m reproduce gpu` measures: the items of the sequence, in order of value.

The scripts in benchmarks/ hold the measuring; here stand the sizes and how long each is expected to take. In
a dry run the sizes are tiny.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu import Context, Item, Job
from mscs.errors import MscsError
from mscs.paths import WORK

ROWS = {2_000: 3, 10_000: 5, 32_768: 8, 65_536: 12, 131_072: 15}
"""Anchors N at which the loss is measured, with seconds."""
COMPILING = 30
NAMES_OF_METHODS = ("dense", "ours, fp32 grade", "ours, fp16 grade")
FIRST_RUNS = ("hrnet-hr48-ours", "hrnet-hr48-ce", "upernet-r101-ce", "upernet-r101-ours")
"""Of profile small: CE and ours of Table 2(b) at batch 12, and the pair of Fig. 1."""
SCORED = (
    "cityscapes-hrnet-hr48-ce",
    "cityscapes-upernet-swins-ce",
    "ade20k-upernet-swins-ce",
    "cadis-ocrnet-r50-ce",
)
SCRATCH = WORK / "gpu"
CAMVID = Path("data") / "camvid"
PACKED = WORK / "camvid"


def script(name: str) -> Any:
    """Return a module of benchmarks/."""
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", f"benchmarks.{name}"):
            raise
        raise MscsError(f"benchmarks/{name}.py is missing; measure in a checkout of the project") from None


def hardware() -> dict[str, Any]:
    """Return what the results are made with: device, packages, rates of matrix products (FLOP/s)."""
    import torch

    from mscs.provenance import record

    gpu = torch.cuda.is_available()
    machine = script("loss").Machine("cuda" if gpu else "cpu")
    versions = {}
    for name in ("triton", "opencv-python-headless", "pydantic"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else None
    facts = {"device": machine.label, "gpu": gpu, "memory_bytes": memory, "rates": machine.rates}
    return record(**facts, more_packages=versions)


def test_jobs(context: Context) -> list[Job]:
    """The tests that are marked gpu."""
    return [Job("tests marked gpu", 120, {"expression": "gpu and not slow"})]


def run_tests(expression: str) -> dict[str, Any]:
    """Return how many tests passed, and which failed; without a GPU they are skipped."""
    files = sorted(str(f) for f in Path("tests").rglob("test_*.py") if "mark.gpu" in f.read_text())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--continue-on-collection-errors"]
        command += ["-m", expression, f"--junitxml={report}", *files]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = (
            "1"  # of other packages, which may lack what they need
        )
        subprocess.run(command, check=False, env=environment)
        cases = list(ET.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(1 for case in cases if case.find("skipped") is not None)
    return {
        "passed": len(cases) - skipped - len(failed),
        "skipped": skipped,
        "failed": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
    }


def loss_jobs(context: Context) -> list[Job]:
    """The loss at several numbers of anchors, and on all pixels; profiles of what misses its target."""
    from benchmarks.gpu_page import loss_targets

    rows = {48: 1} if context.dry_run else ROWS
    crops = (1,) if context.dry_run else (1, 2)
    jobs = [
        Job(f"{n} rows", s, {"part": "self", "rows": n, "methods": ["dense", "ours"]})
        for n, s in rows.items()
    ]
    jobs += [Job(f"all pixels of {n} crops", 15, {"part": "whole", "crops": n}) for n in crops]
    if not context.dry_run:
        compiled = {"part": "self", "methods": ["dense, compiled"]}
        jobs += [
            Job(f"{n} rows, compiled", s + COMPILING, compiled | {"rows": n}, True) for n, s in rows.items()
        ]
    missed = {(t.rows, t.method) for t in loss_targets(context.measured("loss")) if t.hit is False}
    if context.dry_run:
        missed = {(min(rows), method) for method in NAMES_OF_METHODS[1:]}
    for n, method in sorted(missed):
        arguments = {"part": "profile", "rows": n, "methods": [method]}
        jobs.append(Job(f"profile of {method}, {n} rows", 10, arguments, True))
    return jobs


def run_loss(part: str, rows: int = 0, methods: tuple[str, ...] = (), crops: int = 2) -> dict[str, Any]:
    """Return the cases of one section of benchmarks/loss.py, or the kernels of one pass."""
    import torch

    loss = script("loss")
    machine = loss.Machine("cuda" if torch.cuda.is_available() else "cpu")
    few = [] if machine.cuda else ["--quick"]
    options = loss.parse(
        [*few, "--seconds", "2", "--repeats", "20" if machine.cuda else "1", "--crops", str(crops)]
    )
    options.methods = list(methods)
    if part == "profile":
        return {"kernels": loss.profile(machine, methods[0], rows)}
    cases = (
        loss.bench_whole(machine, options)
        if part == "whole"
        else loss.bench_terms(machine, [(rows, None)], options)
    )
    return {"cases": cases}


def memory_jobs(context: Context) -> list[Job]:
    """Table 2(a)'s rows, under the paper's 24 GB and with all the memory there is."""
    from reproduce.memory import CAP_GB, memory_runs

    caps = {f"under {CAP_GB:g} GiB": CAP_GB, "all memory": None}
    runs = memory_runs()[:1] if context.dry_run else memory_runs()
    return [
        Job(f"{run}, {text}", 15, {"run": run, "cap_gb": cap, "tiny": context.dry_run}, cap is None)
        for text, cap in caps.items()
        for run in runs
    ]


def run_memory(run: str, cap_gb: float | None, tiny: bool) -> dict[str, Any]:
    """Return the peaks of the dense formula and of this package, in GiB, and the limit."""
    import torch

    from mscs.monitor import peak_bytes
    from mscs.params import load_params
    from reproduce import memory

    def on_cpu(settings: Any, backend: str) -> float:
        memory.train_steps(settings, backend, torch.device("cpu"))
        return peak_bytes(torch.device("cpu")) / memory.GIB

    params = load_params()
    if tiny:
        settings = params.resolve(run, "mini", {"images_per_group": 2}).settings
        return memory.measure_run(settings, on_cpu) | {"cap_gb": cap_gb}
    settings = params.resolve(run, "paper", {"pretrained": False}).settings
    cap = memory.limit_memory(cap_gb)
    return memory.measure_run(settings, memory.gpu_peak) | {"cap_gb": cap}


def step_jobs(context: Context) -> list[Job]:
    """A step of every network, loss and group of images in profile paper; then the variants of every row.

    The second round begins with the images per GPU of mmsegmentation's published figures.
    """
    from benchmarks.gpu_page import MMSEGMENTATION

    step = script("step")
    profile = ["--profile", "mini", "--quick"] if context.dry_run else ["--profile", "paper"]
    order = sorted(context.params.runs, key=lambda run: (not run.endswith("-ours"), not run.endswith("-ce")))
    base = list(step.jobs(step.parse([*profile, "--variants", "settings", "--runs", *order])))
    entropy = [job for job in base if job["loss"] == "ce"]
    later = [
        job | {"batch": images}
        for job in entropy
        if (images := MMSEGMENTATION.get(job["row"], (job["batch"],))[0]) != job["batch"]
    ]
    measured = {_step_name(job) for job in base}
    later = [job for job in later if _step_name(job) not in measured]
    others = [name for name in step.VARIANTS if name != "fp32 channels-last"]  # that is what "settings" are
    for name in sorted(others, key=lambda name: "compile" in name):
        later += step.jobs(step.parse([*profile, "--variants", name]))
    if context.dry_run:
        base, later = base[:1], later[:1]
    jobs = [(job, False) for job in base] + [(job, True) for job in later]
    return [Job(_step_name(job), _step_seconds(job), {"job": job}, second) for job, second in jobs]


def _step_name(job: Mapping[str, Any]) -> str:
    return f"{job['row']} {job['loss']} x{job['batch']}, {job['variant']}"


def _step_seconds(job: Mapping[str, Any]) -> float:
    return 90 if job["options"]["compile"] else 9


def run_step(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measurements of one step."""
    found = script("step").measure(job, 1 if job["quick"] else 5)
    if job["options"]["compile"]:
        import torch

        torch.compiler.reset()
    return found


def small_jobs(context: Context) -> list[Job]:
    """Profile small's first twelve trainings, side by side."""
    profile = "mini" if context.dry_run else "small"
    if profile not in context.params.profiles:
        return []
    runs = [f"cityscapes-{name}" for name in FIRST_RUNS]
    seeds = {run: context.params.resolve(run, profile).settings.seeds for run in runs}
    job: dict[str, Any] = {"profile": profile, "side": 12, "workers": 1}
    job["trainings"] = [(run, seed) for run in runs for seed in seeds[run]]
    if context.dry_run:
        few = {"steps": 2, "train_images": 8, "val_images": 2, "checkpoint_every": 2}
        job |= {"trainings": job["trainings"][:2], "side": 2, "workers": 0, "overrides": few}
    arguments = {"job": job, "archive": str(context.out / "gpu-small.tar.gz")}
    return [Job(f"{len(job['trainings'])} trainings side by side", 150, arguments)]


def run_small(job: Mapping[str, Any], archive: str) -> Iterator[dict[str, Any]]:
    """Yield the scores so far; the archive holds everything but weights."""
    if job["profile"] == "small":
        from mscs.datasets.verify import verify

        if not CAMVID.exists():
            script("camvid").unpack(PACKED, CAMVID)
            verify("camvid", CAMVID, official=False)  # the same pixels, in other files
        job = dict(job) | {"data": str(CAMVID.resolve())}
    yield from script("training").side_by_side(job, SCRATCH.resolve(), Path(archive))


def training_jobs(context: Context) -> list[Job]:
    """Short trainings at the paper's crop: loss curve, resumption after SIGKILL, one process and two."""
    training = script("training")
    if context.dry_run:
        jobs = {"hrnet": training.EXAMPLE}
    else:
        own = training.EXAMPLE["overrides"] | {"steps": 60, "checkpoint_every": 20}
        job = {"profile": "paper", "image_size": [1024, 2048], "images": 8, "overrides": own}
        jobs = {
            "hrnet": job | {"run": "cityscapes-hrnet-hr48-ours"},
            "swin": job | {"run": "cityscapes-upernet-swint-ours", "overrides": own | {"warmup_steps": 10}},
        }
    few = jobs["hrnet"] | {"overrides": jobs["hrnet"]["overrides"] | {"steps": 4}}
    exact = few | {"overrides": few["overrides"] | {"precision": "fp64"}}
    return [
        *(Job(f"curve of {name}", 60, {"kind": "curve", "job": job}) for name, job in jobs.items()),
        Job("killed and resumed", 75, {"kind": "resumed", "job": jobs["hrnet"]}),
        Job("one process and two, fp32", 60, {"kind": "processes", "job": few}),
        Job("one process and two, fp64", 60, {"kind": "processes", "job": exact}, later=True),
    ]


def run_training(kind: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Return what one of benchmarks/training.py's functions found."""
    return getattr(script("training"), kind)(job, SCRATCH.resolve())


def inference_jobs(context: Context) -> list[Job]:
    """Images per second of the evaluation; the runs on images of 1024x2048 first."""
    runs = SCORED[-1:] if context.dry_run else SCORED
    return [
        Job(run, 45, {"run": run, "quick": context.dry_run}, later=not run.startswith("cityscapes"))
        for run in runs
    ]


def run_inference(run: str, quick: bool) -> dict[str, Any]:
    """Return rows of images per second, by mode and method."""
    import torch

    from mscs.params import load_params

    inference = script("inference")
    options = inference.parse(["--images", "1" if quick else "3", *(["--quick"] if quick else [])])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"rows": inference.measure_run(load_params(), run, options, device)}


def feed_jobs(context: Context) -> list[Job]:
    """Images per second that all cores read, beside which the steps' show whether a GPU must augment."""
    shrink, steps = (16, 1) if context.dry_run else (1, 20)
    arguments = {"workers": 1 if context.dry_run else os.cpu_count() or 1, "shrink": shrink, "steps": steps}
    names = ("cityscapes",) if context.dry_run else ("cityscapes", "ade20k")
    return [Job(f"loader of {name}", 40, arguments | {"dataset": name}) for name in names]


def run_feed(dataset: str, workers: int, steps: int, shrink: int) -> dict[str, Any]:
    """Return images per second of the training loader."""
    data = script("data")
    case = next(case for case in data.CASES if case.dataset == dataset)
    rate = data.loader_rate(case, workers, steps, shrink)
    return {"dataset": dataset, "workers": workers, "images_per_s": rate}


ITEMS = (
    Item("tests", "Tests marked gpu", test_jobs, run_tests),
    Item("loss", "The loss beside the dense formula", loss_jobs, run_loss),
    Item("memory", "Table 2(a)'s memory column", memory_jobs, run_memory),
    Item("step", "A training step of every row", step_jobs, run_step),
    Item("small", "Profile small's first trainings", small_jobs, run_small),
    Item("training", "Short trainings at full crop", training_jobs, run_training),
    Item("inference", "Multi-scale + flip inference", inference_jobs, run_inference),
    Item("feed", "Can the loader feed the step?", feed_jobs, run_feed),
)
